"""minipool: a pool of long-lived, stateful worker processes. Start reading at `pool.Pool`.

    from minipool import Pool

    with Pool(Model, args=("weights.bin",), size=4) as pool:
        with pool.checkout() as w:
            w.call("predict", x)

Names are imported when they are first used, so that a worker process, which needs few of them,
does not pay for the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Pool": "pool",
    "PoolConfig": "config",
    "Lease": "lease",
    "Backoff": "backoff",
    "CircuitBreaker": "breaker",
    "RetryPolicy": "retry",
    "Hooks": "telemetry",
    **dict.fromkeys(("WarmUpReport", "CommandReport"), "warmup"),
    "EVENTS": "telemetry",
    "PoolStats": "status",
    "WorkerInfo": "status",
    "HealthReport": "status",
    "Death": "engine.inquest",
    "current_worker": "engine.child",
    "current_session": "engine.child",
    "Session": "engine.conversation",
    "SessionInfo": "status",
    **dict.fromkeys(("Programs", "ProgramInfo"), "programs"),
    **dict.fromkeys(("Metrics", "Snapshot"), "observe.metrics"),
    "WorkerSnapshot": "observe.reading",
    "recommended_size": "observe.optimizer",
    **dict.fromkeys(("Signature", "Field"), "signatures"),
    **dict.fromkeys(
        (
            "MinipoolError", "ConfigError", "CallMismatch", "PoolError", "CheckoutTimeout",
            "TooManyWaiters", "PoolClosed", "PoolForked", "PoolStartError", "CircuitOpen",
            "LeaseError", "LeaseReleased", "LeaseRevoked", "SessionError", "SessionNotFound",
            "SessionExists", "SessionLost", "SessionBusy", "ProgramError", "ProgramExists",
            "ProgramNotFound", "ProgramMismatch", "WorkerError", "WorkerDied", "WorkerStartError",
            "CallTimeout", "ProtocolError", "RemoteError",
        ),
        "errors",
    ),
}  # fmt: skip

__all__ = list(_HOME)

if TYPE_CHECKING:
    from .backoff import Backoff as Backoff
    from .breaker import CircuitBreaker as CircuitBreaker
    from .config import PoolConfig as PoolConfig
    from .engine.child import current_session as current_session
    from .engine.child import current_worker as current_worker
    from .engine.conversation import Session as Session
    from .engine.inquest import Death as Death
    from .errors import CallMismatch as CallMismatch
    from .errors import CallTimeout as CallTimeout
    from .errors import CheckoutTimeout as CheckoutTimeout
    from .errors import CircuitOpen as CircuitOpen
    from .errors import ConfigError as ConfigError
    from .errors import LeaseError as LeaseError
    from .errors import LeaseReleased as LeaseReleased
    from .errors import LeaseRevoked as LeaseRevoked
    from .errors import MinipoolError as MinipoolError
    from .errors import PoolClosed as PoolClosed
    from .errors import PoolError as PoolError
    from .errors import PoolForked as PoolForked
    from .errors import PoolStartError as PoolStartError
    from .errors import ProgramError as ProgramError
    from .errors import ProgramExists as ProgramExists
    from .errors import ProgramMismatch as ProgramMismatch
    from .errors import ProgramNotFound as ProgramNotFound
    from .errors import ProtocolError as ProtocolError
    from .errors import RemoteError as RemoteError
    from .errors import SessionBusy as SessionBusy
    from .errors import SessionError as SessionError
    from .errors import SessionExists as SessionExists
    from .errors import SessionLost as SessionLost
    from .errors import SessionNotFound as SessionNotFound
    from .errors import TooManyWaiters as TooManyWaiters
    from .errors import WorkerDied as WorkerDied
    from .errors import WorkerError as WorkerError
    from .errors import WorkerStartError as WorkerStartError
    from .lease import Lease as Lease
    from .observe.metrics import Metrics as Metrics
    from .observe.metrics import Snapshot as Snapshot
    from .observe.optimizer import recommended_size as recommended_size
    from .observe.reading import WorkerSnapshot as WorkerSnapshot
    from .pool import Pool as Pool
    from .programs import ProgramInfo as ProgramInfo
    from .programs import Programs as Programs
    from .retry import RetryPolicy as RetryPolicy
    from .signatures import Field as Field
    from .signatures import Signature as Signature
    from .status import HealthReport as HealthReport
    from .status import PoolStats as PoolStats
    from .status import SessionInfo as SessionInfo
    from .status import WorkerInfo as WorkerInfo
    from .telemetry import EVENTS as EVENTS
    from .telemetry import Hooks as Hooks
    from .warmup import CommandReport as CommandReport
    from .warmup import WarmUpReport as WarmUpReport


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
    import importlib

    value = getattr(importlib.import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
