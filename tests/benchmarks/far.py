"""A service that is far away: every byte on its way to or from it is held up."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def far(port: int, seconds: float) -> Iterator[int]:
    """The port of a proxy to `port` on this machine that takes `seconds` in each direction."""
    loop, opened = asyncio.new_event_loop(), threading.Event()
    ports: list[int] = []

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def deliver() -> None:
            while True:
                due, read = await held.get()
                await asyncio.sleep(due - loop.time())
                if not read:
                    writer.close()
                    return
                writer.write(read)

        delivering = asyncio.create_task(deliver())
        read = b"-"
        while read:
            with contextlib.suppress(ConnectionError):
                read = await reader.read(2**16)
            held.put_nowait((loop.time() + seconds, read))
        await delivering

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(carry(reader, there[1]), carry(there[0], writer))

    async def listen() -> None:
        server = await asyncio.start_server(on_connection, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        opened.set()

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(listen(), loop).result()
    try:
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
