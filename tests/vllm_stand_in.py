"""What starts and answers health checks like a vLLM server, at once and on nothing: for tests of who starts servers.

A file `broken` in its working directory keeps it from starting, a file `sick` makes its health checks fail.
"""

from pathlib import Path

STAND_IN = """
import http.server, os, sys
values = dict(zip(sys.argv[1:], sys.argv[2:]))
if os.path.exists("broken"):
    sys.exit("broken")
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.headers["Authorization"] == "Bearer " + open(os.environ["A3PO_VLLM_TOKEN_FILE"]).read()
        self.send_response(500 if os.path.exists("sick") else 200 if right else 401)
        self.end_headers()
    def log_message(self, *_): pass
http.server.HTTPServer((values["--host"], int(values["--port"])), Health).serve_forever()
"""


def write_stand_in(root: Path) -> None:
    """Importable as vLLM with `root` on the path."""
    package = root / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(STAND_IN)
