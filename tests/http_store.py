"""A real HTTP server of a directory, with range requests and injected faults."""

import re
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class HttpStore:
    """`fault(name)` returns the fault of each request: None, "stall", "cut", "short", "error", "forbidden" or
    "no_ranges"."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.fault: Callable[[str], str | None] = lambda name: None
        self.requests: list[str] = []
        self.closing = threading.Event()
        self.url = ""

    def fail(self, suffix: str, fault: str, times: int = 10**9) -> None:
        """Inject a fault into the first `times` requests of files with this suffix."""
        left = [times]

        def decide(name: str) -> str | None:
            if not name.endswith(suffix) or left[0] <= 0:
                return None
            left[0] -= 1
            return fault

        self.fault = decide


@contextmanager
def serve(directory: Path):
    store = HttpStore(directory)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            name = Path(self.path).name
            store.requests.append(name)
            fault = store.fault(name)
            path = store.directory / name
            if fault in ("error", "forbidden"):
                return self.send_error(500 if fault == "error" else 403)
            if not path.is_file():
                return self.send_error(404)
            data = path.read_bytes()
            span = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            partial = span and fault != "no_ranges"
            if partial:
                data = data[int(span[1]) : int(span[2]) + 1]
            if fault == "short":
                data = data[:-1]
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if fault in ("stall", "cut"):
                self.wfile.write(data[: len(data) // 2])
                self.wfile.flush()
                while fault == "stall" and not store.closing.is_set():
                    time.sleep(0.05)
                self.close_connection = True
                return self.connection.close()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    store.url = f"http://127.0.0.1:{server.server_port}/set"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
