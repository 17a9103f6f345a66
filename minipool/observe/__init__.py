"""How a pool is watched: from here the table and the hooks are read, and nothing is held up.

Nothing below this package knows it; what it starts with a pool is asked for by name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dashboard import Dashboard as Dashboard


def serve(pool: Any, manager: Any, host: str, port: int, token: str | None) -> Dashboard:
    """Start the dashboard of this process, with this pool first; it ends with the pool."""
    from .dashboard import Dashboard
    from .inside import Inside

    board = Inside()
    board.place(pool)
    dashboard = Dashboard(board, host, port, token)
    manager.closers.append(dashboard.close)
    if manager.closed_ns is not None:  # meanwhile
        dashboard.close()
    return dashboard
