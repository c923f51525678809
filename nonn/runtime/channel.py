"""A gRPC channel from a coordinator to a node: how it is opened, and why it may fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TypeVar

from grpc import ChannelConnectivity, StatusCode, aio

from nonn.core.errors import UserError, printable
from nonn.runtime.addresses import is_loopback
from nonn.runtime.admission import MAX_RETRY_S, RETRY_AFTER
from nonn.runtime.cluster import Node
from nonn.runtime.protocol import ProtocolError
from nonn.runtime.tls import Identity, handshake_problem

Received = TypeVar("Received")

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
READY = ChannelConnectivity.READY

#: Seconds that a coordinator waits for connections at its start, since a handshake may outlast a deadline.
CONNECT_TIMEOUT_S = 1.0
#: Seconds that one attempt to connect may take: a dozen TLS handshakes at once need several at 250 kbit/s.
ATTEMPT_TIMEOUT_S = 15.0

LATE = "no answer by the deadline"
#: Metadata of a coordinator's call: its deadline, in milliseconds from when it was sent. gRPC's own timeout counts from
#: when the receiver reads its buffers.
STATED = "nonn-given-ms"
CHANNEL_OPTIONS = {
    "grpc.enable_http_proxy": 0,
    "grpc.enable_retries": 0,  # an answer is wanted now or not at all
    "grpc.service_config_disable_resolution": 1,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": round(1000 * ATTEMPT_TIMEOUT_S),  # what an attempt may take, despite the name
    "grpc.max_reconnect_backoff_ms": 1000,
    # A device whose power fails closes no connection. With these, TCP gives up a connection after it has waited that
    # long for an acknowledgement (TCP_USER_TIMEOUT); by default it would retry for many minutes.
    "grpc.keepalive_time_ms": 60_000,
    "grpc.keepalive_timeout_ms": 20_000,
}


def open_channel(node: Node, message_limit: int, identity: Identity | None, own: bool = False) -> aio.Channel:
    """A channel to a node, which must show a certificate with its own name, whatever its address.

    Channels of this process to the same node share a connection, unless one is to have its `own`. Without an identity
    it must be on this machine, or it is a `UserError`.
    """
    if identity is None and not is_loopback(node.address):
        raise UserError(f"{node.name}: {node.address} is not on this machine; use `tls`")
    limits = ("grpc.max_receive_message_length", "grpc.max_send_message_length")
    options: dict[str, int | str] = {**CHANNEL_OPTIONS, **dict.fromkeys(limits, message_limit)}
    options["grpc.use_local_subchannel_pool"] = int(own)
    if identity is None:
        return aio.insecure_channel(node.address, list(options.items()))
    options["grpc.ssl_target_name_override"] = node.name
    return aio.secure_channel(node.address, identity.for_client(), list(options.items()))


async def wait_all_connected(channels: Iterable[aio.Channel], timeout: float = CONNECT_TIMEOUT_S) -> None:
    """Wait until each channel is connected or has failed once, for at most `timeout` seconds."""
    connecting = [asyncio.create_task(wait_connected(channel)) for channel in channels]
    if not connecting:
        return
    _, waiting = await asyncio.wait(connecting, timeout=timeout)
    for task in waiting:
        task.cancel()


async def wait_connected(
    channel: aio.Channel, states: Iterable[ChannelConnectivity] = (READY, ChannelConnectivity.TRANSIENT_FAILURE)
) -> None:
    """Wait until a channel is in one of some states: connected, or its first attempt has failed."""
    while (state := channel.get_state(try_to_connect=True)) not in states:
        await channel.wait_for_state_change(state)


def received(answer: Received | None) -> Received:
    """The answer of a call; a `ProtocolError` for None, which gRPC gives where none came or it cannot be read."""
    if answer is None:
        raise ProtocolError(StatusCode.INTERNAL, "the answer is no message of the protocol")
    return answer


def busy_seconds(error: BaseException) -> float | None:
    """Seconds after which a busy node may be asked again; None if the error says something else."""
    if not isinstance(error, aio.AioRpcError) or error.code() != StatusCode.RESOURCE_EXHAUSTED:
        return None
    if "larger than max" in (error.details() or ""):  # gRPC says the same of a message that is too large
        return None
    wish = dict(error.trailing_metadata() or ()).get(RETRY_AFTER, "")
    return min(int(wish) / 1000, MAX_RETRY_S) if wish.isdecimal() and len(wish) < 10 else MAX_RETRY_S


def reason_of(error: BaseException) -> str:
    """Why a node is absent, in a few words."""
    if isinstance(error, aio.AioRpcError):
        if error.code() == StatusCode.DEADLINE_EXCEEDED:
            return LATE
        details = (error.details() or "").rpartition("last error: ")[2]
        code = error.code().name.lower().replace("_", " ")
        return f"{code}: {handshake_problem(details) or printable(details[:200])}"
    return str(error) or type(error).__name__
