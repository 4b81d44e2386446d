"""The local page of `fm-distill demo`: served to this machine alone, and nothing from elsewhere."""

import contextlib
import dataclasses
import http.server
import json
import pathlib
import re
import sys
import threading
from http import HTTPStatus
from urllib.parse import urlsplit

from fm_distill.errors import UserError
from fm_distill.evaluation.demo import Judge, judged

LOOPBACK = "127.0.0.1"
# Names of this machine; a page of the internet that had its name point here would send its own.
HOSTS = (LOOPBACK, "localhost")
MOST_BYTES = 64 * 2**20  # of an image
PAGE = pathlib.Path(__file__).with_name("demo_page.html")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True  # Ctrl-C waits for no browser

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that disconnects is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


def make_server(judges: tuple[Judge, ...], port: int) -> http.server.ThreadingHTTPServer:
    """A server on the loopback address; port 0 takes a free one. Raises `UserError`.

    `GET /` is the page; `POST /judge` takes the bytes of an image file and returns a JSON list with
    an object for each network, or `{"error": ...}`.
    """
    one_at_a_time = threading.Lock()  # else the networks would be timed beside each other

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = 60  # seconds for what a browser sends

        def do_GET(self) -> None:
            if self._refused():
                return
            if self.path != "/":
                self._error(HTTPStatus.NOT_FOUND, "not found")
                return
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", PAGE.read_bytes())

        def do_POST(self) -> None:
            if self._refused():
                return
            length = self.headers.get("Content-Length", "")
            if self.path != "/judge":
                self._error(HTTPStatus.NOT_FOUND, "not found")
            elif not re.fullmatch("[0-9]{1,12}", length) or not 0 < int(length) <= MOST_BYTES:
                self._error(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
                    f"expected an image of up to {MOST_BYTES / 2**20:.0f} MiB",
                )
            else:
                self._judge(self.rfile.read(int(length)))

        def _judge(self, image: bytes) -> None:
            try:
                with one_at_a_time:
                    judgements = [dataclasses.asdict(judged(x, image)) for x in judges]
            except UserError as error:
                self._error(HTTPStatus.BAD_REQUEST, str(error))
                return
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                self._error(HTTPStatus.INTERNAL_SERVER_ERROR, text)
                raise
            self._answer(HTTPStatus.OK, "application/json", json.dumps(judgements).encode())

        def _refused(self) -> bool:
            origin = self.headers.get("Origin")  # of the page that asks, where a browser says it
            with contextlib.suppress(ValueError):  # of a broken address
                addresses = [f"//{self.headers.get('Host', '')}", *([origin] if origin else [])]
                if all(urlsplit(x).hostname in HOSTS for x in addresses):
                    return False
            self._error(HTTPStatus.FORBIDDEN, f"this page is served to {LOOPBACK} only")
            return True

        def _error(self, status: HTTPStatus, text: str) -> None:
            self.close_connection = True  # what was sent is not read
            self._answer(status, "application/json", json.dumps({"error": text}).encode())

        def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            # The page may request nothing from any other machine.
            self.send_header(
                "Content-Security-Policy",
                "default-src 'none'; connect-src 'self'; img-src data:; "
                "script-src 'unsafe-inline'; style-src 'unsafe-inline'",
            )
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Requests are not logged."""

    try:
        return _Server((LOOPBACK, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            f"port {port} of {LOOPBACK} cannot be used ({error}); give another one with --port, or "
            "0 for one that is free"
        ) from None
