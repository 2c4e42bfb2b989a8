"""A server takes orders of the newest attempt at a run: one that was given up, and is alive behind a partition, must
not stop it, change its weights or take its time.

Every request of a run says which attempt at which run it is of. The highest of each run is remembered, and a lower one
is refused, whatever it asks; requests that say nothing (health checks of others) pass. `access.py` puts this behind the
bearer token. One process of the server knows nothing of its sisters (`--api-server-count`).
"""

from typing import Any

ATTEMPT, NEWEST = b"a3po-attempt", b"a3po-newest-attempt"


class Fence:
    """An ASGI middleware."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self._newest: dict[bytes, int] = {}

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        for name, value in scope.get("headers", ()):
            if name == ATTEMPT:
                run, _, number = value.rpartition(b" ")
                newest = self._newest[run] = max(self._newest.get(run, 0), int(number))
                if int(number) < newest:
                    headers = [(b"content-type", b"text/plain"), (NEWEST, b"%d" % newest)]
                    await send({"type": "http.response.start", "status": 409, "headers": headers})
                    body = b"this server takes orders of attempt %d at this run\n" % newest
                    await send({"type": "http.response.body", "body": body})
                    return
        await self.app(scope, receive, send)
