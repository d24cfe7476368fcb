"""A TCP proxy whose line can be cut, slowed down, or answered with 503."""

import asyncio
import contextlib
import threading

PASS, CUT, SLOW, REFUSE = "pass", "cut", "slow", "refuse"

_SLOW_SECONDS = 0.3
_REFUSAL = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class Proxy:
    """Listens on `port` for `upstream`. CUT: bytes go nowhere and nobody hears of it, as on a broken network.
    REFUSE: an HTTP server that answers 503 to everything."""

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.mode = PASS
        self._loop = asyncio.new_event_loop()
        self._lines: set[asyncio.StreamWriter] = set()
        started = threading.Event()
        threading.Thread(target=self._run, args=(started,), daemon=True).start()
        started.wait()

    def become(self, mode: str) -> None:
        before, self.mode = self.mode, mode
        if before == CUT or mode == REFUSE:  # lines that were cut stay dead
            self._loop.call_soon_threadsafe(self._hang_up)

    def _hang_up(self) -> None:
        for line in self._lines:
            line.transport.abort()

    def _run(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._lines.add(writer)
        try:
            if self.mode == REFUSE:
                await reader.readuntil(b"\r\n\r\n")
                writer.write(_REFUSAL)
                await writer.drain()
                return
            await self._while_cut()
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self.upstream)
            self._lines.add(up_writer)
            try:
                await asyncio.gather(self._pump(reader, up_writer), self._pump(up_reader, writer))
            finally:
                self._lines.discard(up_writer)
                up_writer.close()
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            self._lines.discard(writer)
            with contextlib.suppress(OSError):
                writer.close()

    async def _while_cut(self) -> None:
        while self.mode == CUT:  # noqa: ASYNC110 - set from another thread
            await asyncio.sleep(0.05)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            await self._while_cut()
            if self.mode == SLOW:
                await asyncio.sleep(_SLOW_SECONDS)
            writer.write(data)
            await writer.drain()
        writer.close()
