"""An aiohttp server on the loopback address in a thread of its own; what it answers may be changed while it runs."""

import asyncio
import socket
import threading
from typing import Self

from aiohttp import web


class LoopbackServer:
    """A context manager; `url` is known inside it. Subclasses add routes."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()

    def routes(self) -> list[web.RouteDef]:
        """What the server answers."""
        raise NotImplementedError

    async def _open(self) -> None:
        app = web.Application()
        app.add_routes(self.routes())
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        await web.SockSite(self._runner, self._listener).start()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        return self

    def die(self) -> None:
        """Stop listening and drop every connection."""

        async def end() -> None:
            # asyncio loses a connection that it accepts in the turn of its loop in which the server closes (gh-109564).
            if self._listener.fileno() >= 0:  # it is open: the server did not die before
                self._loop.remove_reader(self._listener)
            for _ in range(5):
                await asyncio.sleep(0)
            await self._runner.cleanup()
            handlers = asyncio.all_tasks() - {asyncio.current_task()}
            for handler in handlers:
                handler.cancel()
            await asyncio.gather(*handlers, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)

    def __exit__(self, *_: object) -> None:
        self.die()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
