"""Waiting for something to change, within one event loop, without lost wake-ups."""

import asyncio


class Change:
    """`tell` wakes everybody who waits now. Look at the state, then `await next()`: nothing runs in between."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        told, self._event = self._event, asyncio.Event()
        told.set()

    async def next(self) -> None:
        await self._event.wait()
