"""Session stores: where sessions are kept so that they outlive the application."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .sqlite_store import SQLiteStore as SQLiteStore

__all__ = ["SQLiteStore"]


def __getattr__(name: str) -> Any:
    if name != "SQLiteStore":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .sqlite_store import SQLiteStore  # sqlite3 is imported by those who use it

    return SQLiteStore
