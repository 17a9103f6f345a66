"""What a caller may rightly meet while workers and processes are killed and the store is locked.

Each error is listed once, with what it says of the call that it came instead of. None of them
leaves anything of that call committed. An error that is not listed is a fault.
"""

from __future__ import annotations

from typing import Optional

from minipool import (
    CallTimeout,
    CheckoutTimeout,
    LeaseRevoked,
    PoolClosed,
    SessionBusy,
    SessionError,
    WorkerDied,
)

NOT_RUN, PERHAPS, RAN = "has not run", "may have run", "has run"

CHECKOUT, CALL = "checkout", "call"
#: Where, error, whether only of a pool that is being closed -> what it says of the call.
FATES = {
    (CHECKOUT, CheckoutTimeout, False): NOT_RUN,  # no worker, or the session in use, all the time
    (CHECKOUT, SessionBusy, False): NOT_RUN,  # a living process or pool has the session
    (CHECKOUT, SessionError, False): NOT_RUN,  # the store is locked
    (CHECKOUT, SessionError, True): NOT_RUN,  # the store is closed
    (CHECKOUT, PoolClosed, True): NOT_RUN,
    (CALL, CheckoutTimeout, False): NOT_RUN,  # its worker died before, and no other came free
    (CALL, WorkerDied, False): PERHAPS,  # but see `started`
    (CALL, CallTimeout, False): PERHAPS,  # but see `started`
    (CALL, SessionBusy, True): PERHAPS,  # at the commit: the session is another pool's by now
    (CALL, SessionError, False): PERHAPS,  # at the commit, mostly: the store is locked
    (CALL, SessionError, True): PERHAPS,  # the store is closed
    (CALL, LeaseRevoked, True): PERHAPS,
    (CALL, PoolClosed, True): NOT_RUN,  # its worker died before, and there will be no other
}


def fate_of(error: BaseException, where: str, closing: bool, again: bool) -> Optional[str]:
    """Return what an error says of its call; None: nobody should meet it there.

    With `again` the call may run twice, so one attempt may have run before the last did not.
    """
    wheres = (CALL, CHECKOUT) if again else (where,)  # such a call does both, and maybe twice
    listed = [(each, type(error), only) for each in wheres for only in {False, closing}]
    fate = next((FATES[each] for each in listed if each in FATES), None)
    if isinstance(error, (WorkerDied, CallTimeout)) and fate is not None and not error.started:
        fate = NOT_RUN
    return PERHAPS if fate == NOT_RUN and again else fate
