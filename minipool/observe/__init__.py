"""How a pool is watched: from here the table and the hooks are read, and nothing is held up.

Nothing below this package imports what is in it. What a pool starts with itself is started from
here, by those who ask for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..pool import Pool
    from .dashboard import Dashboard as Dashboard


def fit_to_load(pool: Pool[Any]) -> None:
    """Fit a pool's size to its load, from its opening to its end."""
    from .autoscale import Autoscaler

    Autoscaler(pool)  # the pool's hooks keep it


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
