import os

import pytest

from sqspipes_mp.host.cpus import cpus, quota

V2_MOUNT = "29 22 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNTS = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
    "34 31 0:31 / /sys/fs/cgroup/cpuset rw,relatime - cgroup cgroup rw,cpuset\n"
)
HYBRID_MOUNTS = V1_MOUNTS + "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
DOCKER_V1_MOUNT = (
    "812 801 0:29 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro,nosuid master:9 - cgroup cgroup rw,cpu,cpuacct\n"
)
V1_GROUPS = "9:name=systemd:/\n4:memory:/job\n3:cpuset:/\n2:cpu,cpuacct:/job/one\n0::/\n"

CASES = {
    "systemd service v2": (
        {
            "/proc/self/cgroup": "0::/system.slice/app.service\n",
            "/proc/self/mountinfo": V2_MOUNT,
            "/sys/fs/cgroup/system.slice/app.service/cpu.max": "250000 100000\n",
            "/sys/fs/cgroup/system.slice/cpu.max": "max 100000\n",
        },
        2.5,
    ),
    "an ancestor is tighter": (
        {
            "/proc/self/cgroup": "0::/a/b/c\n",
            "/proc/self/mountinfo": V2_MOUNT,
            "/sys/fs/cgroup/a/b/c/cpu.max": "max 100000\n",
            "/sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
            "/sys/fs/cgroup/a/cpu.max": "75000 50000\n",
        },
        1.5,
    ),
    "container with its own namespace": (
        {
            "/proc/self/cgroup": "0::/\n",
            "/proc/self/mountinfo": V2_MOUNT,
            "/sys/fs/cgroup/cpu.max": "50000 100000\n",
        },
        0.5,
    ),
    "outside of the namespace's root": (
        {
            "/proc/self/cgroup": "0::/../other\n",
            "/proc/self/mountinfo": V2_MOUNT,
            "/sys/fs/cgroup/cpu.max": "200000 100000\n",
        },
        2.0,
    ),
    "v1": (
        {
            "/proc/self/cgroup": V1_GROUPS,
            "/proc/self/mountinfo": V1_MOUNTS,
            "/sys/fs/cgroup/cpu,cpuacct/job/one/cpu.cfs_quota_us": "-1\n",
            "/sys/fs/cgroup/cpu,cpuacct/job/one/cpu.cfs_period_us": "100000\n",
            "/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "300000\n",
            "/sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        },
        3.0,
    ),
    "v1 in docker without a namespace": (
        {
            "/proc/self/cgroup": "2:cpu,cpuacct:/docker/abc\n",
            "/proc/self/mountinfo": DOCKER_V1_MOUNT,
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "150000\n",
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        1.5,
    ),
    "hybrid without limits": (
        {
            "/proc/self/cgroup": V1_GROUPS,
            "/proc/self/mountinfo": HYBRID_MOUNTS,
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
        None,
    ),
    "no /proc": ({}, None),
    "garbage": (
        {
            "/proc/self/cgroup": "x\n::\n0\n0::relative\n",
            "/proc/self/mountinfo": "- cgroup2\n1 2 3\n\n 1 2 3 4 5 - \n" + V2_MOUNT,
            "/sys/fs/cgroup/cpu.max": "lots of\n",
            "/sys/fs/cgroup/relative/cpu.max": "",
        },
        None,
    ),
    "zero period": (
        {"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": V2_MOUNT, "/sys/fs/cgroup/cpu.max": "100000 0\n"},
        None,
    ),
    "quota without a period": (
        {"/proc/self/cgroup": "0::/\n", "/proc/self/mountinfo": V2_MOUNT, "/sys/fs/cgroup/cpu.max": "300000\n"},
        3.0,
    ),
}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tightest_quota_counts(case):
    files, limit = CASES[case]
    assert quota(files.get) == limit


def test_at_least_one_and_at_most_what_affinity_allows():
    assert 1 <= cpus() <= len(os.sched_getaffinity(0))


def test_one_cpu_by_affinity_is_one_worker():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert cpus() == 1
    finally:
        os.sched_setaffinity(0, before)


def test_python_cpu_count_is_honoured(monkeypatch):
    monkeypatch.setattr(os, "process_cpu_count", lambda: 7, raising=False)
    monkeypatch.setattr("sqspipes_mp.host.cpus.read_file", lambda path: None)
    assert cpus() == 7
    monkeypatch.setattr(os, "process_cpu_count", lambda: None, raising=False)
    assert cpus() == 1


def test_a_part_of_a_cpu_is_rounded_up(monkeypatch):
    files, _ = CASES["an ancestor is tighter"]
    monkeypatch.setattr(os, "process_cpu_count", lambda: 8, raising=False)
    monkeypatch.setattr("sqspipes_mp.host.cpus.read_file", files.get)
    assert cpus() == 2
