"""Visitors of the dashboard: who is let in, and what each is told, in a thread of its own.

A slow one gets fewer readings. One that does not take what it is sent, or does not say what it
wants, is hung up on: nobody waits for it, least of all the pool, which is only read.

What keeps others out: the page is served to this machine alone, unless another address is bound,
and then a token is asked for. The Host header must name this machine, so that a web site that
gives its own name our address (DNS rebinding) reads nothing; no other origin is let in (no CORS);
and there is nothing to do but read.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import socket
import socketserver
import threading
import time
from http import cookies
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Callable, Dict, NamedTuple, Set
from urllib.parse import parse_qs, urlsplit

from ..engine.descriptors import beyond_streams
from ..telemetry import DEBUG, remark
from .news import News, as_json
from .openmetrics import CONTENT_TYPE
from .page import POLICY, page

MOST_GUESTS = 64  # connections at a time; one more is hung up on
PATIENCE = 10.0  # seconds a visitor has to say what it wants, and to take each piece of it
_SILENT = 15.0  # seconds after which a stream without news says that it is there
_SHORT_POLICY = "default-src 'none'; frame-ancestors 'none'"


class _Guest(NamedTuple):
    thread: threading.Thread
    since: float  # monotonic


class Server(HTTPServer):
    """Listens at an address, and knows all its visitors, to be rid of them.

    Raises:
        OSError: the address is taken, or not this machine's.
    """

    allow_reuse_port = False  # two dashboards at one port would share the visitors
    timeout = 0.0

    def __init__(self, host: str, port: int, news: News, token: str | None) -> None:
        self.news = news
        self.streaming: Set[socket.socket] = set()
        self.choked = False  # a visitor could not be let in, for want of descriptors
        self._guests: Dict[socket.socket, _Guest] = {}
        if ":" in host:
            self.address_family = socket.AF_INET6
        beyond_streams(super().__init__, (host, port), Visit)
        self.socket.settimeout(PATIENCE)
        self.host = host.lower()
        self.loopback = is_loopback(str(self.server_address[0]))
        self.token = token or (None if self.loopback else secrets.token_urlsafe(24))

    def server_bind(self) -> None:
        """Bind without asking the name service, which HTTPServer does, and which may be ill."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.host_and_port()

    def host_and_port(self) -> tuple[str, int]:
        """Return the address that it listens at."""
        return str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Let a visitor in; note it if that cannot be done."""
        try:
            let_in: tuple[socket.socket, Any] = beyond_streams(super().get_request)
            return let_in
        except OSError:
            self.choked = True
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Tell whether there is room for one more."""
        return len(self._guests) < MOST_GUESTS

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, and remember it until it has ended."""

        def answer() -> None:
            try:
                self.finish_request(request, client_address)
            except Exception:  # it hung up, or was hung up on
                self.handle_error(request, client_address)
            finally:
                self.shutdown_request(request)
                self.streaming.discard(request)
                self._guests.pop(request, None)

        thread = threading.Thread(target=answer, name="minipool-visitor", daemon=True)
        self._guests[request] = _Guest(thread, time.monotonic())
        try:
            thread.start()
        except RuntimeError:  # no more threads: the caller hangs up
            del self._guests[request]
            raise

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Note a visitor who could not be answered."""
        remark(DEBUG, "a visitor of the dashboard was lost", exc_info=True)

    def hurry(self) -> None:
        """Hang up on who has been asking, or taking the answer, for too long."""
        now = time.monotonic()
        for request, guest in tuple(self._guests.items()):
            if request not in self.streaming and now - guest.since > PATIENCE:
                _hang_up(request)

    def server_close(self) -> None:
        """Hang up on everybody, and wait until their threads have ended."""
        super().server_close()
        guests = tuple(self._guests.items())
        for request, _ in guests:
            _hang_up(request)
        for _, guest in guests:
            guest.thread.join(PATIENCE)


class Visit(BaseHTTPRequestHandler):
    """One question and its answer."""

    server: Server
    server_version, sys_version = "minipool", ""
    timeout = PATIENCE  # of each read and each write

    def do_GET(self) -> None:
        """Answer, if it may ask."""
        where = urlsplit(self.path)
        query = {key: values[-1] for key, values in parse_qs(where.query).items()}
        if not self._host_is_ours():
            return self._text(403, "The Host header does not name this machine.\n")
        if not self._has_token(query):
            return self._text(401, "A token is asked for.\n", {"WWW-Authenticate": "Bearer"})
        answers: Dict[str, Callable[[Dict[str, str]], None]] = {
            "/": self._page, "/events": self._events, "/metrics": self._metrics,
            "/api/pools": self._pools, "/healthz": self._health,
        }  # fmt: skip
        answer = answers.get(where.path)
        if answer is None:
            return self._text(404, f"There are: {', '.join(answers)}\n")
        answer(query)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Refuse: there is nothing to change here."""
        self._text(405, "The dashboard only looks.\n", {"Allow": "GET, HEAD"})

    do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    # -- who may ask -------------------------------------------------------------------------

    def _host_is_ours(self) -> bool:
        named = self.headers.get_all("Host") or []
        try:
            host = urlsplit(f"//{named[0]}").hostname if len(named) == 1 else None
        except ValueError:
            return False
        if not host:
            return False
        if host in ("localhost", self.server.host):
            return True
        # What an address means, nobody else can change; what a name means, its owner can.
        return is_loopback(host) if self.server.loopback else is_address(host)

    def _has_token(self, query: dict[str, str]) -> bool:
        token = self.server.token
        if token is None:
            return True
        kind, _, bearer = self.headers.get("Authorization", "").partition(" ")
        jar: cookies.SimpleCookie = cookies.SimpleCookie()
        with contextlib.suppress(cookies.CookieError):
            jar.load(self.headers.get("Cookie", ""))
        kept = jar.get(self._cookie)
        shown = [
            bearer if kind.lower() == "bearer" else "",
            query.get("token", ""),
            kept.value if kept else "",
        ]
        return any(hmac.compare_digest(one.encode(), token.encode()) for one in shown)

    @property
    def _cookie(self) -> str:
        return f"minipool-{self.server.server_port}"  # the cookies of all ports are in one jar

    # -- answers -----------------------------------------------------------------------------

    def _page(self, query: dict[str, str]) -> None:
        if "token" in query and self.server.token:  # out of the address, where it would be seen
            kept = f"{self._cookie}={self.server.token}; HttpOnly; SameSite=Strict; Path=/"
            return self._text(303, "", {"Location": "./", "Set-Cookie": kept})
        nonce = secrets.token_urlsafe(16)
        self._send(200, "text/html; charset=utf-8", page(nonce).encode(),
                   {"Content-Security-Policy": POLICY.format(nonce=nonce)})  # fmt: skip

    def _events(self, query: dict[str, str]) -> None:
        """Send the newest reading, again and again, until it hangs up or we do."""
        pool_id, window = query.get("pool", ""), _seconds(query.get("window", ""))
        self._head(200, "text/event-stream")
        if self.command == "HEAD":
            return
        self.server.streaming.add(self.connection)
        self.wfile.write(b"retry: 2000\n\n")
        news, seen = self.server.news, 0
        while True:
            turn = news.wait(seen, _SILENT)
            if news.over:
                return
            body = b": no news\n\n"
            if turn > seen:
                body = b"data: " + news.draw(turn, pool_id, window) + b"\n\n"
            self.wfile.write(body)
            seen = turn

    def _metrics(self, query: dict[str, str]) -> None:
        text = self.server.news.board.exposition()
        if text is None:
            return self._text(404, "Not all of them can be seen from outside.\n")
        self._send(200, CONTENT_TYPE, text.encode())

    def _pools(self, query: dict[str, str]) -> None:
        self._send(200, "application/json", as_json(self.server.news.board.pools()))

    def _health(self, query: dict[str, str]) -> None:
        serves, particulars = self.server.news.board.health()
        self._send(200 if serves else 503, "application/json", as_json(particulars))

    # -- sending -----------------------------------------------------------------------------

    def _text(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, "text/plain; charset=utf-8", text.encode(), headers)

    def _send(
        self, status: int, kind: str, body: bytes, headers: dict[str, str] | None = None
    ) -> None:
        self._head(status, kind, {"Content-Length": str(len(body)), **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        common = {
            "Content-Type": kind, "Cache-Control": "no-store",
            "Content-Security-Policy": _SHORT_POLICY, "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }  # fmt: skip
        for name, value in {**common, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()

    def version_string(self) -> str:
        """Tell nobody which Python this is."""
        return self.server_version

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: stderr is the program's, not the dashboard's."""


def is_address(host: str) -> bool:
    """Tell whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether a host is an IP address that only this machine has."""
    return is_address(host) and ipaddress.ip_address(host.partition("%")[0]).is_loopback


def _seconds(text: str) -> float:
    """Return the window asked for, within what is kept; a minute if it is no number."""
    return min(3600.0, max(1.0, float(text))) if text.isdecimal() else 60.0


def _hang_up(request: socket.socket) -> None:
    with contextlib.suppress(OSError):
        request.shutdown(socket.SHUT_RDWR)
