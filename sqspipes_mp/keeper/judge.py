"""What becomes of a dead worker's leases. Pure (keeper)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sqspipes_mp.lease import Lease, LeaseState
from sqspipes_mp.region import Cause


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


def judge(leases: Iterable[Lease], cause: Cause, late: int | None) -> Judgement:
    """Sort the leases of a worker that is dead for certain.

    Of those that were running one is charged: the late one for a timeout, the only one for any other death; where
    several ran (in threads, or as one batch), none can be blamed. What had failed is charged for that, whatever its
    worker died of.
    """
    release: list[Lease] = []
    delete: list[Lease] = []
    running: list[Lease] = []
    failed: list[Lease] = []
    for lease in leases:
        if lease.state is LeaseState.RUNNING:
            running.append(lease)
        elif lease.lost:
            continue
        elif lease.state is LeaseState.SENT:
            delete.append(lease)
        elif lease.state is LeaseState.FAILED:
            failed.append(lease)
        else:
            release.append(lease)
    if cause in _BLAMELESS:
        guilty = []
    elif cause is Cause.TIMEOUT:
        guilty = [lease for lease in running if lease.index == late and not lease.company]
    else:
        guilty = running if len(running) == 1 and not running[0].company else []
    suspects = [] if cause in _BLAMELESS else [lease for lease in running if lease not in guilty]
    # A lost one ran as well as the others, but is somebody else's to give back.
    release += [lease for lease in running if lease not in guilty and not lease.lost]
    charge = [*failed, *(lease for lease in guilty if not lease.lost)]
    return Judgement(tuple(release), tuple(delete), tuple(charge), tuple(suspects))
