"""What a peer's program is told by ``benchmarks.peers``, in one environment variable that its processes inherit."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass

from benchmarks.hop import Call

_VARIABLE = "SQSPIPES_MP_BENCH_SETUP"
REGION, KEY = "us-west-2", "bench"
#: The stages' queues where a peer lets them be named: the backlog waits in the first.
HOP, AFTER = "hop", "after"


@dataclass(frozen=True, slots=True)
class Setup:
    """``url``: of the stand-in. ``path``: where calls are noted. ``ready``: a file of one byte per ready process."""

    url: str
    path: str
    ready: str
    units: int
    calls: int

    @property
    def call(self) -> Call:
        """The function that every subject runs."""
        return Call(self.path, self.units, self.calls)

    def environment(self) -> dict[str, str]:
        """Return the environment of a peer's program: boto3 finds the stand-in by it."""
        return {
            **os.environ,
            "AWS_ENDPOINT_URL_SQS": self.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": KEY,
            _VARIABLE: json.dumps(dataclasses.asdict(self)),
        }

    def tell_ready(self) -> None:
        """Tell that this process waits for messages."""
        with open(self.ready, "ab") as file:  # noqa: PTH123  (one write, unbuffered or not)
            file.write(b".")


def given() -> Setup:
    """Return what this program was told."""
    return Setup(**json.loads(os.environ[_VARIABLE]))
