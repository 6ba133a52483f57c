"""What becomes of a dead worker's leases. Pure (keeper)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqspipes_mp.ipc.leases import Blame, Cause, Lease, LeaseState


@dataclass(frozen=True, slots=True)
class Judgement:
    """``release``: back at once, uncharged; ``delete``: outputs were accepted; ``charge``: was running when it died,
    or had failed before; ``alone``: ran beside others then, so that none can be blamed: each runs alone next time.
    """

    release: tuple[Lease, ...]
    delete: tuple[Lease, ...]
    charge: tuple[Lease, ...]
    alone: tuple[Lease, ...] = ()


#: Deaths that are nobody's fault.
_BLAMELESS = frozenset({Cause.CLEAN, Cause.CUT, Cause.ROOM})
#: States in which a call that was blamed is charged: until its outputs are accepted it never counts as done.
_CHARGEABLE = frozenset({LeaseState.RUNNING, LeaseState.DONE, LeaseState.FAILED, LeaseState.CHARGING})


def judge(leases: Iterable[Lease], cause: Cause, blamed: Blame | None) -> Judgement:
    """Sort the leases of a worker that is dead for certain.

    The ``blamed`` call is charged, whether it ran to its end meanwhile or not. Without one the only running call is
    charged with a crash; where several ran (in threads, or as one batch), none can be blamed. What had failed is
    charged for that, whatever its worker died of.
    """
    release: list[Lease] = []
    delete: list[Lease] = []
    running: list[Lease] = []
    failed: list[Lease] = []
    blame: list[Lease] = []
    for lease in leases:
        if blamed is not None and blamed.means(lease) and lease.state in _CHARGEABLE and not lease.company:
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
    only = cause is Cause.CRASH and not blame and len(running) == 1 and not running[0].company
    guilty = running if only else []
    # Where it is known who is to blame, its companions are no suspects.
    suspects = [] if cause in _BLAMELESS or blame else [lease for lease in running if lease not in guilty]
    # A lost one ran as well as the others, but is somebody else's to give back.
    release += [lease for lease in running if lease not in guilty and not lease.lost]
    charge = [*failed, *(lease for lease in [*blame, *guilty] if not lease.lost)]
    return Judgement(tuple(release), tuple(delete), tuple(charge), tuple(suspects))
