"""The dashboard: a web page that shows pools, and never holds one up.

One thread takes a reading every second, lets visitors in, and hangs up on those who take too
long; see `visitors` for what they get, `news` for how readings come to them, `inside` for what
is read.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import threading
import time
import weakref

from .._sync import Guard, guarded
from ..engine.descriptors import beyond_streams
from ..engine.shortage import in_words
from ..engine.sigpipe import block_here, unsignalled
from ..telemetry import logger
from .board import Board
from .news import News
from .visitors import PATIENCE, Server

INTERVAL = 1.0  # seconds between two readings


class Dashboard:
    """Serves the page at `url` until `close()`; also usable in a `with`. Closes the board.

    Where another address than this machine's own is bound (`host="0.0.0.0"`), visitors must show
    `token`; one is made up if none is given, and `url` contains it. Any thread may call any method.

    Raises:
        OSError: the address is taken, or not this machine's. Nothing was started.
        ValueError: the token could not be part of an address.
    """

    def __init__(
        self,
        board: Board,
        host: str = "127.0.0.1",
        port: int = 0,
        token: str | None = None,
    ) -> None:
        self._board, self._interval = board, INTERVAL
        self._news = News(board)
        self._closing = Guard()
        self._thread = threading.Thread(target=self._run, name="minipool-dashboard", daemon=True)
        with contextlib.ExitStack() as undoing:
            undoing.callback(board.close)
            _check(token)
            self._bell, self._clapper = beyond_streams(socket.socketpair)
            undoing.callback(self._bell.close)
            undoing.callback(self._clapper.close)
            self._server = Server(host, port, self._news, token)
            undoing.callback(self._server.server_close)
            try:
                self._thread.start()
            except RuntimeError as problem:
                raise RuntimeError(f"the dashboard: {in_words(problem)}") from problem
            undoing.pop_all()
        _dashboards.add(self)

    @property
    def url(self) -> str:
        """Where the page is; with the token, if one is asked for."""
        host, port = self._server.host_and_port()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        query = f"?token={self._server.token}" if self._server.token else ""
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/{query}"

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._news.over

    def close(self) -> None:
        """Hang up on everybody and end; no thread, socket or descriptor is left."""
        self._end_news()
        if threading.current_thread() is not self._thread:
            self._thread.join(PATIENCE)

    @guarded("_closing")
    def _end_news(self) -> None:
        if not self._news.over:
            unsignalled(self._clapper.send, b"!")  # first: it is closed by who finds the news over
            self._news.end()

    def __enter__(self) -> Dashboard:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "closed" if self.closed else f"at {self.url.partition('?')[0]}"
        return f"<Dashboard {where}>"

    def _abandon(self) -> None:
        """Let go of everything in a forked child, which must answer nobody in our name."""
        for part in (self._server.socket, self._bell, self._clapper):
            part.close()
        self._news.over = True

    # -- the thread --------------------------------------------------------------------------

    def _run(self) -> None:
        block_here()  # visitors hang up as they like; their threads are started from this one
        with contextlib.ExitStack() as leaving:
            leaving.callback(self._clapper.close)
            leaving.callback(self._bell.close)
            leaving.callback(self._board.close)
            leaving.callback(self._server.server_close)
            selector = leaving.enter_context(beyond_streams(selectors.DefaultSelector))
            selector.register(self._bell, selectors.EVENT_READ)
            due = time.monotonic()
            while not self._news.over:
                if time.monotonic() >= due:
                    self._tick(selector)
                    due = max(due + self._interval, time.monotonic())  # what is late stays late
                for key, _ in selector.select(max(0.0, due - time.monotonic())):
                    if key.fileobj is self._server.socket:
                        self._let_in(selector)

    def _tick(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(KeyError):  # it is there already
            selector.register(self._server.socket, selectors.EVENT_READ)
        self._server.hurry()
        try:
            self._news.turn()
        except Exception:
            logger().exception("the dashboard missed a reading and goes on")

    def _let_in(self, selector: selectors.BaseSelector) -> None:
        self._server.choked = False
        self._server.handle_request()
        if self._server.choked:  # somebody is at the door still, and would be seen at once
            selector.unregister(self._server.socket)  # until the next tick


def _check(token: str | None) -> None:
    if token is not None and not re.fullmatch(r"[A-Za-z0-9._~-]+", token):
        raise ValueError("the token is empty, or has more in it than letters, digits and ._~-")


_dashboards: weakref.WeakSet[Dashboard] = weakref.WeakSet()


def _abandon_all() -> None:
    for dashboard in tuple(_dashboards):
        if not dashboard.closed:
            dashboard._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)
