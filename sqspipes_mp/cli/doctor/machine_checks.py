"""Checks of the machine: Python, start method, memory, CPUs, limits, disk. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from sqspipes_mp.cli.doctor.facts import Facts
from sqspipes_mp.cli.doctor.findings import Finding, fail, ok, warn
from sqspipes_mp.cli.doctor.gain_checks import cpu_seconds
from sqspipes_mp.supervisor.run import descriptors_needed

_MIB, _GIB = 1 << 20, 1 << 30
#: Share of the memory that workers may be expected to fill.
_FULL = 0.85
#: Bytes on the disk below which a run stops soon, and below which it is to be looked at.
_NO_ROOM, _LITTLE_ROOM = 64 * _MIB, 512 * _MIB
#: Threads of a worker: its main thread, intake, and the outbox's carriers.
_THREADS = 4
#: Workers for each CPU from which calls that compute only take turns.
_CROWDED = 2
#: File systems whose locks or shared memory are not those of one machine (SQLite, "Write-Ahead Logging", section 1).
_NETWORK = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.ceph", "glusterfs", "fuse.glusterfs", "lustre",
     "beegfs", "gpfs", "ocfs2", "gfs2", "ncpfs", "fuse.sshfs", "fuse.s3fs", "fuse.rclone", "fuse.gcsfuse",
     "fuse.mount-s3", "fuse.juicefs"}
)  # fmt: skip
#: File systems that are gone after a restart of the machine.
_IN_MEMORY = frozenset({"tmpfs", "ramfs"})


def python(facts: Facts) -> Iterator[Finding]:
    """Tell the Python, and whether its system starts workers by a fork."""
    seen = f"{facts.machine.python} on {facts.machine.system}"
    if facts.machine.system.startswith("linux"):
        yield ok("python", seen)
        return
    yield warn(
        "python",
        seen,
        "without fork each worker imports the program anew, and limits of control groups are not known",
        "run it on Linux where speed counts",
    )


def start_method(facts: Facts) -> Iterator[Finding]:
    """Tell whether workers can be started as it is asked for, and whether a fork would copy held locks."""
    wanted, machine = facts.plan.settings.start_method, facts.machine
    fresh = wanted if wanted != "fork" else None
    if fresh is None and not machine.system.startswith("linux"):
        fresh = "spawn"
    if machine.unloadable is not None and fresh is not None:
        yield fail(
            "start method",
            f"{fresh}, but a fresh process cannot load the tasks: {machine.unloadable}",
            "no worker can start",
            'define the functions at module level, or write Engine(start_method="fork") on Linux',
        )
    elif machine.threads and (wanted == "fork" or machine.unloadable is not None):
        why_not = "" if machine.unloadable is None else f" (forkserver is not possible: {machine.unloadable})"
        yield warn(
            "start method",
            f"fork, with threads alive once the module is loaded: {', '.join(machine.threads[:5])}{why_not}",
            "a lock that one of them holds stays locked in the workers, which then hang",
            "start threads in setup= instead of at import, and define the functions at module level",
        )
    else:
        yield ok("start method", fresh or ("forkserver" if machine.threads else "fork"))


def memory(facts: Facts) -> Iterator[Finding]:
    """Compare the memory of all workers with the container's, or the machine's."""
    machine, stages = facts.machine, facts.plan.pipeline.stages
    measured = _measured(facts)
    needed = sum(
        count * (measured.get(stages[index].name) or stages[index].task.max_memory or machine.own_memory)
        for index, count in facts.plan.workers.items()
    )
    known = all(stages[index].name in measured for index in facts.plan.workers)
    how = "as measured now" if known else "measured, Task(max_memory=), or as this process has"
    where = "the container" if machine.contained else "the machine"
    seen = f"{facts.workers} workers x their memory = {_size(needed)} ({how}); {where} has {_size(machine.memory)}"
    if not machine.memory or needed <= _FULL * machine.memory:
        yield ok("memory", seen)
        return
    judge = fail if needed > machine.memory and (known or machine.contained) else warn
    yield judge(
        "memory",
        seen,
        "the kernel kills what does not fit, and each kill counts as a failed attempt of the message that ran",
        f"fewer workers (sqspipes-mp run {facts.target} --workers NAME=N), Task(max_memory=), or a larger limit",
    )


def _measured(facts: Facts) -> dict[str, int]:
    """Return the private bytes of each stage's largest worker, of the stages that run here."""
    found: dict[str, int] = {}
    for worker in [] if facts.state is None else facts.state["workers"]:
        if worker["memory"]:
            found[worker["stage"]] = max(found.get(worker["stage"], 0), worker["memory"])
    return found


def cpus(facts: Facts) -> Iterator[Finding]:
    """Compare the workers, threads and I/O apart, with the CPUs."""
    machine = facts.machine
    quota = "" if machine.quota is None else f" (quota {machine.quota:g})"
    seen = f"{facts.workers} workers on {machine.cpus} CPUs{quota}"
    if machine.quota is not None and machine.quota < 1:
        yield warn(
            "cpus",
            seen,
            "with less than one CPU the kernel stops all processes for most of each 0.1 s, heartbeats too",
            "give the container a CPU limit of at least 1, or none",
        )
    elif facts.workers > _CROWDED * machine.cpus + len(facts.plan.selected) and not _waits_much(facts):
        yield warn(
            "cpus",
            seen,
            "calls that compute take turns, and each worker costs memory; for calls that wait, threads cost less",
            'Task(workers="auto"), or Task(threads=) where calls wait for a network or a disk',
        )
    else:
        yield ok("cpus", seen)


def _waits_much(facts: Facts) -> bool:
    """Tell whether the engine that runs here uses less than half a CPU for each second in its functions."""
    stages = [] if facts.state is None else facts.state["stages"]
    busy = sum(stage["busy_seconds"] for stage in stages)
    return bool(busy) and sum(cpu_seconds(facts.state or {}, stage) for stage in stages) < busy / 2


def open_files(facts: Facts) -> Iterator[Finding]:
    """Compare the descriptors of the supervisor with the limit; those of a worker are fewer."""
    found = facts.machine.files
    if found is None:
        yield ok("open files", "no limit")
        return
    opened, most = found
    needed = opened + descriptors_needed(facts.workers)
    seen = f"{needed} needed for {facts.workers} workers, {most} allowed"
    allowed, usual = facts.examined.at_once or (0, 0)
    if needed > most:
        why = "the run is refused: its last workers could not start"
        yield fail("open files", seen, why, f"ulimit -n {2 * needed}")
    elif allowed < usual:
        seen += f"; a worker may have {allowed} requests of a kind under way, not {usual}"
        why = "each has a connection of its own, and far from SQS fewer requests carry fewer messages"
        yield warn("open files", seen, why, f"ulimit -n {max(1024, 2 * needed)}")
    else:
        yield ok("open files", seen)


def processes(facts: Facts) -> Iterator[Finding]:
    """Compare the processes and threads of a run with the limit."""
    found = facts.machine.processes
    if found is None:
        yield ok("processes", "no limit")
        return
    used, most = found
    lanes = sum(count * facts.plan.calls_of(index) for index, count in facts.plan.workers.items())
    needed = used + lanes + _THREADS * (facts.workers + 1)
    seen = f"{needed} processes and threads needed, {used} of them there now, {most} allowed"
    if needed <= most:
        yield ok("processes", seen)
        return
    yield fail(
        "processes",
        seen,
        "the kernel refuses further processes and threads, of other programs too",
        f"ulimit -u {2 * needed}, or pids.max of the container (docker run --pids-limit {2 * needed})",
    )


def disk(facts: Facts) -> Iterator[Finding]:
    """Tell the room that is left for the queues' file."""
    place = facts.place
    if place is None:
        return
    seen = f"{_size(place.free)} left in {place.folder}"
    if place.free_files == 0:
        seen += ", and no file can be made"
    cure = "make room there, or name a file elsewhere: --broker sqlite:////PATH/queues.db"
    why = "a full disk stops every send and delete; what was sent stays, and calls wait until there is room"
    if place.free < _NO_ROOM or place.free_files == 0:
        yield fail("disk", seen, why, cure)
    elif place.free < _LITTLE_ROOM:
        yield warn("disk", seen, why, cure)
    else:
        yield ok("disk", seen)


def file_system(facts: Facts) -> Iterator[Finding]:
    """Tell whether the queues' file is on a disk of this machine."""
    place = facts.place
    if place is None:
        if facts.temporary:
            yield warn(
                "file",
                "a temporary file",
                "its messages end with the engine, and no other process sees them",
                f'Engine(broker="sqlite:///{facts.plan.pipeline.domain}.db"), or --broker URL',
            )
        return
    seen = f"{place.folder} is on {place.kind or 'an unknown file system'}"
    if place.kind in _NETWORK:
        yield fail(
            "file",
            seen,
            "SQLite's log needs memory that all its processes share: over a network messages are lost or run twice",
            "name a file on a local disk, or use SQS: --broker sqs://REGION",
        )
    elif place.kind in _IN_MEMORY:
        yield warn(
            "file", seen, "its messages are gone after a restart of the machine, and fill its memory",
            "name a file on a disk: --broker sqlite:////PATH/queues.db",
        )  # fmt: skip
    else:
        yield ok("file", seen)


def _size(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


CHECKS = (python, start_method, memory, cpus, open_files, processes, disk, file_system)
