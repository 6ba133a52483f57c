import pytest

from sqspipes_mp.supervisor.memory import Fill, has_large_part, has_most, pressure

_V2 = {
    "/proc/self/cgroup": "0::/box\n",
    "/proc/self/mountinfo": "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n",
}
_V1 = {
    "/proc/self/cgroup": "4:memory:/box\n",
    "/proc/self/mountinfo": "33 23 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
}


def _v2(folder, limit, used, stat=""):
    base = f"/sys/fs/cgroup{folder}"
    return {f"{base}/memory.max": limit, f"{base}/memory.current": used, f"{base}/memory.stat": stat}


def test_the_used_share_without_droppable_cache():
    files = _V2 | _v2("/box", "1000\n", "900\n", "anon 600\ninactive_file 200\nactive_file 100\n")
    assert pressure(files.get).share == pytest.approx(0.7)


def test_the_tightest_ancestor_counts():
    files = _V2 | _v2("/box", "max\n", "900\n") | _v2("", "1000\n", "950\n")
    assert pressure(files.get).share == pytest.approx(0.95)


def test_version_one_is_read_too():
    base = "/sys/fs/cgroup/memory/box"
    files = _V1 | {
        f"{base}/memory.limit_in_bytes": "2000\n",
        f"{base}/memory.usage_in_bytes": "1500\n",
        f"{base}/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
    }
    assert pressure(files.get).share == pytest.approx(0.5)


@pytest.mark.parametrize("limit", ["max\n", "9223372036854771712\n", "", "nonsense"])
def test_no_limit_is_no_pressure(limit):
    assert pressure((_V2 | _v2("/box", limit, "900\n")).get) is None


def test_this_machine_can_be_asked():
    fill = pressure()
    assert fill is None or fill.used >= 0


def test_a_part_is_large_from_a_quarter_or_half_an_even_share_and_most_over_half():
    fill = Fill(960, 1000)
    assert [has_large_part(gained, fill, 1) for gained in (239, 240)] == [False, True]
    assert [has_large_part(gained, fill, 2) for gained in (239, 240)] == [False, True]
    # Sixteen that leak alike have little each, and no other has more.
    assert [has_large_part(gained, fill, 16) for gained in (29, 30)] == [False, True]
    assert [has_most(gained, fill) for gained in (480, 481)] == [False, True]
