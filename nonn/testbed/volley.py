"""Plain TCP echoes of given sizes: what the link alone takes for the messages of one image."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator, Sequence

from nonn.core.errors import UserError
from nonn.runtime.tls import split_address

#: Seconds in which an echo process must have started.
START = 20.0


async def serve(address: str, request_bytes: int, response_bytes: int) -> None:
    """Answer every `request_bytes` with `response_bytes`, until standard input closes."""
    answer = bytes(response_bytes)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readexactly(request_bytes)
                writer.write(answer)

    host, port = split_address(address)
    closed = asyncio.Event()
    asyncio.get_running_loop().add_reader(sys.stdin, closed.set)  # nothing is ever sent: readable means closed
    async with await asyncio.start_server(echo, host, port):
        print("listening", flush=True)
        await closed.wait()


@contextlib.asynccontextmanager
async def echoing(
    addresses: Sequence[str], prefixes: Sequence[Sequence[str]], request_bytes: int, response_bytes: int
) -> AsyncIterator:
    """Run an echo process at each address; yield a coroutine function that asks all of them at once.

    Parameters
    ----------
    addresses : sequence of str
        ``host:port``.
    prefixes : sequence of sequences of str
        Command that runs the process of each address in its place, such as ``ip netns exec NAME``.
    request_bytes, response_bytes : int
        Of the messages, without headers of TCP and IP.

    Raises
    ------
    UserError
        One of them cannot listen there.
    """
    processes, streams = [], []

    async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(request_bytes))
        await reader.readexactly(response_bytes)

    async def ask_all() -> None:
        await asyncio.gather(*(ask(*stream) for stream in streams))

    try:
        for address, prefix in zip(addresses, prefixes, strict=True):
            arguments = (address, str(request_bytes), str(response_bytes))
            command = (*prefix, sys.executable, "-m", "nonn.testbed.volley", *arguments)
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
            processes.append(process)
        for address, process in zip(addresses, processes, strict=True):
            if not await asyncio.wait_for(process.stdout.readline(), START):  # it has ended
                raise UserError(f"{address}: the echo did not start. Is the port free, and the address this host's?")
            streams.append(await asyncio.open_connection(*split_address(address)))
        yield ask_all
    finally:
        for _, writer in streams:
            writer.close()
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
