"""The TCP echo of one host: ``python -m nonn.testbed.echo_server HOST:PORT``, until standard input closes."""

from __future__ import annotations

import asyncio
import contextlib
import struct
import sys

from nonn.core.errors import UserError
from nonn.runtime.addresses import split_address
from nonn.runtime.attached import announce, told_to_stop

#: Header of a request: its size and that of the answer, in bytes.
SIZES = struct.Struct("!II")
#: Bytes of the largest request and answer.
MAX_MESSAGE_BYTES = 64 * 2**20


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request_bytes: int, response_bytes: int
) -> None:
    """Send a request and wait for its answer; a request takes at least the bytes of `SIZES`."""
    writer.write(SIZES.pack(request_bytes, response_bytes).ljust(request_bytes, b"\0"))
    await reader.readexactly(response_bytes)


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Serve one connection until it ends."""
    with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
        while True:
            request_bytes, response_bytes = SIZES.unpack(await reader.readexactly(SIZES.size))
            if not SIZES.size <= request_bytes <= MAX_MESSAGE_BYTES >= response_bytes:
                return  # on loopback any program may send something
            await reader.readexactly(request_bytes - SIZES.size)
            writer.write(bytes(response_bytes))
            await writer.drain()  # a client that sends without reading would fill the memory


async def serve(address: str) -> None:
    stopped, (host, port) = told_to_stop(attached=True), split_address(address)
    try:
        server = await asyncio.start_server(answer, host, port)
    except OSError as error:
        raise UserError(f"{address}: cannot listen there ({error.strerror}). Is the port free?") from None
    async with server:
        announce("echo", address, port)
        await stopped.wait()


if __name__ == "__main__":
    try:
        asyncio.run(serve(sys.argv[1]))
    except UserError as error:
        sys.exit(str(error))
