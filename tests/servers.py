"""A small HTTP server in a thread, for tests of what asks one: what it answers is a function of the request."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from trainers.generation import server

server.PAUSE = 0.0  # between attempts


@contextmanager
def serving(answer, port=0):
    """Serves `answer(path, content, count) -> (status, JSON or bytes)`; count is that of earlier requests.

    Gives `url`, and `requests`: (path, content) of what came in.
    """

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(content)

        def do_GET(self):
            self.reply(None)

        def reply(self, content):
            with lock:
                count = len(seen)
                seen.append((self.path, content))
            status, body = answer(self.path, content, count)
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    lock, seen = threading.Lock(), []
    httpd = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}", requests=seen)
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()
