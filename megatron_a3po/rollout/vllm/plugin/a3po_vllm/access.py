"""Every route of a server asks for the bearer token: vLLM's own `--api-key` leaves the control routes open.

Added by `--middleware a3po_vllm.access.BearerToken`; the token is the content of the file that A3PO_VLLM_TOKEN_FILE
names. Deny by default: what is not an HTTP request with the token gets no further, whatever its path. What has it gets
to `fence.py`.
"""

import hmac
import os
from pathlib import Path
from typing import Any

from a3po_vllm.fence import Fence

TOKEN_FILE = "A3PO_VLLM_TOKEN_FILE"


class BearerToken:
    """An ASGI middleware. A server without a readable, non-empty token file does not start."""

    def __init__(self, app: Any) -> None:
        self.app = Fence(app)
        token = Path(os.environ[TOKEN_FILE]).read_text(encoding="ascii").strip()
        if not token:
            raise ValueError(f"{os.environ[TOKEN_FILE]} is empty: it must hold the bearer token.")
        self._wanted = f"Bearer {token}".encode("ascii")

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan" or self._admits(scope):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b"this server asks for its bearer token\n"})

    def _admits(self, scope: dict[str, Any]) -> bool:
        given = [value for name, value in scope.get("headers", ()) if name == b"authorization"]
        return len(given) == 1 and hmac.compare_digest(given[0], self._wanted)
