"""An HTTP proxy that spoils chosen requests: between a real client and a real server, over TCP."""

import http.client
import re
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "s3cr3t-never-shown"
_ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>quotes AKIATEST and " + SECRET + "</Message></Error>"


@dataclass
class Fault:
    """What happens to the next ``times`` requests whose "METHOD path" matches ``where``.

    Kinds: ``drop`` (never reaches the server), ``lose`` (the response is lost), ``slow`` (the response comes after
    ``seconds``), ``status`` (answered with ``status`` and ``code``), ``truncate`` and ``corrupt`` (the response's body),
    ``corrupt_upload`` (the request's body), ``first`` (``action`` runs before the request is passed on).
    """

    kind: str
    where: str = ""
    times: int = 1
    status: int = 0
    code: str = ""
    seconds: float = 0.0
    action: Callable[[], Any] = field(default=lambda: None)


class FaultProxy:
    """Listens on a free loopback port and passes requests on to ``upstream`` ("http://host:port")."""

    def __init__(self, upstream: str) -> None:
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self._upstream = upstream.removeprefix("http://")
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: Any) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):
                    self.close_connection = True

            def _serve(self) -> None:
                proxy._serve(self)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def inject(self, *faults: Fault) -> None:
        with self._lock:
            self.faults += faults

    def clear(self) -> None:
        with self._lock:
            self.faults.clear()
            self.log.clear()

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.log)

    def _next_fault(self, line: str) -> Fault | None:
        with self._lock:
            self.log.append(line)
            for fault in self.faults:
                if fault.times and re.search(fault.where, line):
                    fault.times -= 1
                    return fault
        return None

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        fault = self._next_fault(f"{handler.command} {handler.path}")
        kind = fault.kind if fault else ""
        if fault and kind == "drop":
            _hang_up(handler)
            return
        if fault and kind == "status":
            _answer(handler, fault.status, [("Content-Type", "application/xml")], _ERROR.format(fault.code).encode())
            return
        if fault and kind == "first":
            fault.action()
        if kind == "corrupt_upload":
            body = _flipped(body)
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.request(handler.command, handler.path, body=body, headers=dict(handler.headers))
            response = connection.getresponse()
            content = response.read()
            headers = [
                (name, value)
                for name, value in response.getheaders()
                if name.lower() not in ("transfer-encoding", "connection", "content-length")
            ]
            length = response.getheader("Content-Length")
        finally:
            connection.close()
        if fault and kind == "slow":
            time.sleep(fault.seconds)
        if kind == "lose":
            _hang_up(handler)
            return
        if kind == "corrupt":
            content = _flipped(content)
        announced = int(length) if handler.command == "HEAD" and length else len(content)
        if kind == "truncate":
            content = content[: len(content) // 2]
        _answer(handler, response.status, headers, content, announced)
        if kind == "truncate":
            _hang_up(handler)


def _answer(
    handler: BaseHTTPRequestHandler,
    status: int,
    headers: list[tuple[str, str]],
    content: bytes,
    announced: int | None = None,
) -> None:
    handler.send_response_only(status)
    for name, value in headers:
        handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content) if announced is None else announced))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(content)


def _hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.flush()
    handler.close_connection = True
    handler.connection.shutdown(socket.SHUT_RDWR)


def _flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content
