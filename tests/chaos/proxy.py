"""A TCP proxy between a worker and one of its servers, that can be cut, slowed, and made to answer errors."""

import asyncio
import contextlib
import re
import threading


class Proxy:
    """Listens on `host`, a free port, and forwards to `target_port` of this machine.

    status: answer every request with this HTTP status instead of forwarding it (0: forward).
    delay_seconds: hold back what a client sends for so long.
    seen: the last text sent by a client that `watch` matched.
    """

    def __init__(self, target_port: int, host: str = "127.0.0.1", watch: str = "") -> None:
        self.target_port, self.host = target_port, host
        self.status = 0
        self.delay_seconds = 0.0
        self.seen = ""
        self._watch = re.compile(watch.encode()) if watch else None
        self._is_cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server: asyncio.Server = self._run(asyncio.start_server(self._serve, host, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Drop every connection, and every new one."""
        self._is_cut = True
        self._loop.call_soon_threadsafe(self._drop)

    def heal(self) -> None:
        self._is_cut, self.status, self.delay_seconds = False, 0, 0.0

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._server.close)
        self.cut()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self, coroutine):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    def _drop(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        self._open.add(writer)
        onward: asyncio.StreamWriter | None = None
        try:
            back, onward = await asyncio.open_connection("127.0.0.1", self.target_port)
            self._open.add(onward)
            ways = [
                asyncio.create_task(self._upstream(reader, onward, writer)),
                asyncio.create_task(_pump(back, writer)),
            ]
            _, rest = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in rest:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:
            pass  # the server is down: so is the connection
        finally:
            for end in (writer, onward):
                if end is not None:
                    self._open.discard(end)
                    end.transport.abort() if self._is_cut else end.close()

    async def _upstream(
        self, reader: asyncio.StreamReader, onward: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        while data := await reader.read(1 << 16):
            if self._watch and (found := self._watch.findall(data)):
                self.seen = found[-1].decode()
            if self.delay_seconds:
                await asyncio.sleep(self.delay_seconds)
            if self.status:
                await _answer(self.status, reader, client)
                return
            onward.write(data)
            await onward.drain()


async def _answer(status: int, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
    """An empty answer; then read what the client is still sending, or it would see a reset and no answer."""
    head = f"HTTP/1.1 {status} Chaos\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    client.write(head.encode())
    with contextlib.suppress(OSError, TimeoutError):
        await client.drain()
        client.write_eof()
        async with asyncio.timeout(2):
            while await reader.read(1 << 16):
                pass


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
