"""Who may talk to whom: mutual TLS with named peers, or plain text on loopback where it is asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import StatusCode, aio

from nonn.core.errors import UserError
from nonn.core.files import regular

#: Certificates of a test bed as `nonn certs` writes them.
CA, CERTIFICATE, KEY = "ca.pem", "{}.pem", "{}.key"


@dataclass(frozen=True)
class Identity:
    """Files that prove who a process is, and the authority that it trusts: all PEM."""

    certificate: Path
    key: Path
    ca: Path

    @classmethod
    def of(cls, name: str, folder: Path) -> Identity:
        """The identity of a node or coordinator in a folder that `nonn certs` wrote."""
        return cls(folder / CERTIFICATE.format(name), folder / KEY.format(name), folder / CA)

    def for_server(self) -> grpc.ServerCredentials:
        """Credentials of a node; whoever calls it must show a certificate of the authority."""
        pair = (_read_pem(self.key), _read_pem(self.certificate))
        return grpc.ssl_server_credentials([pair], _read_pem(self.ca), require_client_auth=True)

    def for_client(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(_read_pem(self.ca), _read_pem(self.key), _read_pem(self.certificate))


def _read_pem(path: Path) -> bytes:
    try:
        content = regular(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Make certificates with `nonn certs`.") from None
    if not content.startswith(b"-----BEGIN "):
        raise UserError(f"{path}: is not in PEM form. Make certificates with `nonn certs`.")
    return content


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port``, or of ``[host]:port`` for IPv6; a `ValueError` for anything else."""
    host, _, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) != host.startswith("[") or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port; write for example 127.0.0.1:7100")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Whether nothing that is sent to ``host:port`` leaves this machine."""
    host, _ = split_address(address)
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix(".") in ("localhost", "ip6-localhost")
    return (getattr(ip, "ipv4_mapped", None) or ip).is_loopback


def canonical_address(address: str) -> tuple[str, int]:
    """Host and port of ``host:port`` in one form, so that equal places compare as equal.

    All names and addresses of this machine's loopback are one. Other names are not looked up: what a name server says
    differs from day to day.
    """
    host, port = split_address(address)
    if is_loopback(address):
        return "localhost", port
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().removesuffix("."), port
    return str(getattr(ip, "ipv4_mapped", None) or ip), port


def callers_of(context: aio.ServicerContext) -> set[bytes]:
    """Common names of the certificate that a caller has shown; empty for plain text."""
    return set(context.auth_context().get("x509_common_name", []))


class Guard(aio.ServerInterceptor):
    """Lets through what a node answers: one request, one response, from a caller on the allow-list.

    A caller's name is its certificate's common name: the alternative names hold ``localhost`` in
    every certificate of a test bed, so they tell nobody apart. Streams are refused altogether: one
    that is left open would hold a place among the few calls that a node takes at once. Where there are no
    certificates, there is no list.
    """

    def __init__(self, names: Collection[str] | None):
        self.names = names if names is None else frozenset(name.encode() for name in names)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return None

        async def answer(content: bytes, context: aio.ServicerContext) -> Any:
            await self._check(context)  # before anything that a stranger sent is parsed
            try:
                request = handler.request_deserializer(content)
            except DecodeError:
                await context.abort(StatusCode.INVALID_ARGUMENT, "this is no message of the protocol")
            return await handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    async def _check(self, context: aio.ServicerContext) -> None:
        if self.names is None:
            return
        callers = callers_of(context)
        if not callers or not callers <= self.names:
            await context.abort(StatusCode.PERMISSION_DENIED, "this certificate's name is not on the allow-list")
