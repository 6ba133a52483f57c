"""Sorts a dead worker's leases: charge, release, delete, or run alone next time. Pure (keeper)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqspipes_mp.ipc.leases import Blame, Cause, Lease, LeaseState, crashed_in


@dataclass(frozen=True, slots=True)
class Judgement:
    """A dead worker's leases, sorted. A lost lease is in ``alone`` at most: its message has another receiver."""

    #: Messages that go back at once, uncharged.
    release: tuple[Lease, ...]
    #: Messages whose outputs were accepted.
    delete: tuple[Lease, ...]
    #: Messages that failed: they ran when the worker died, or had failed before.
    charge: tuple[Lease, ...]
    #: Messages that ran beside others when the worker died: none is to blame, and each runs alone next time.
    alone: tuple[Lease, ...] = ()
    #: The message whose call a person cancelled; at most one.
    cancel: tuple[Lease, ...] = ()


#: Causes for which no message is to blame.
_BLAMELESS = frozenset({Cause.CLEAN, Cause.CUT, Cause.ROOM, Cause.CANCEL})
#: States in which a call with the mark is charged; until its outputs are accepted it does not count as done.
_CHARGEABLE = frozenset({LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED, LeaseState.CHARGING})


def judge(leases: Iterable[Lease], cause: Cause, blamed: Blame | None, *, known: bool = False) -> Judgement:
    """Sort the leases of a worker that is dead for certain.

    The ``blamed`` call is charged, even where it ended meanwhile. Without one, the only running call is charged with a
    crash; where several ran (in threads, or as one batch), none is to blame. A failed call is charged, whatever the
    cause of the death. A cancelled call is not charged, and neither are those beside it. ``known``: the worker was
    killed for one call, which may have come back since; the calls beside it are no suspects.
    """
    release: list[Lease] = []
    delete: list[Lease] = []
    running: list[Lease] = []
    failed: list[Lease] = []
    blame: list[Lease] = []
    cancel: list[Lease] = []
    for lease in leases:
        means = blamed is not None and blamed.means(lease) and lease.state in _CHARGEABLE
        if means and cause is Cause.CANCEL:
            cancel.append(lease)
        elif means and not lease.company:
            blame.append(lease)
        elif lease.state is LeaseState.RUNNING:
            running.append(lease)
        elif lease.lost:
            continue
        elif lease.state is LeaseState.SENT:
            delete.append(lease)
        elif lease.state in {LeaseState.FAILED, LeaseState.CHARGING}:
            failed.append(lease)
        else:
            release.append(lease)
    only = crashed_in(running) if cause is Cause.CRASH and not blame else None
    guilty = [] if only is None else [only]
    # Where one call is to blame, the others are no suspects.
    suspects = [] if cause in _BLAMELESS or blame or known else [lease for lease in running if lease not in guilty]
    # A lost message ran beside the others too, but its new receiver has it.
    release += [lease for lease in running if lease not in guilty and not lease.lost]
    charge = [*failed, *(lease for lease in [*blame, *guilty] if not lease.lost)]
    lost_too = tuple(lease for lease in cancel if not lease.lost)
    return Judgement(tuple(release), tuple(delete), tuple(charge), tuple(suspects), lost_too)
