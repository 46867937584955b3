"""A report that is made anew whenever a browser asks for it."""

from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tlite_jax.errors import UserError


def make_server(page: Callable[[], str], host: str, port: int) -> ThreadingHTTPServer:
    """A server that answers / with what `page` returns, or with its error in one line; other paths are not found.

    Args:
      page: called for every request, in its thread.
      host: to listen on; 127.0.0.1 keeps the page to this machine.
      port: 0 lets the system choose one.

    Raises:
      UserError: the port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.split("?")[0] != "/":
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            try:
                self._answer(HTTPStatus.OK, "text/html", page())
            except UserError as error:
                self._answer(HTTPStatus.SERVICE_UNAVAILABLE, "text/plain", f"{error}\n")

        def _answer(self, status: HTTPStatus, kind: str, text: str) -> None:
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Silent."""

    try:
        return ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from error
