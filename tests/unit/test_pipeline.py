import dataclasses
import functools
import itertools
import pickle
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqspipes_mp.errors import ConfigError
from sqspipes_mp.pipeline.domain import check_domain, derive_domain
from sqspipes_mp.pipeline.stages import build, fed, feedable
from sqspipes_mp.pipeline.task import Task


def gen():
    return 1


def yields():
    yield 1


class Yielding:
    def __call__(self):
        yield 1


def step(value):
    return value


def sink(value):
    return None


def make(tasks, *, domain="d", fifo=False, visibility=60.0):
    return build(tasks, domain=domain, fifo=fifo, visibility=visibility)


def test_stages_are_joined_by_queues():
    pipeline = make([Task(gen, priorities=3), Task(step, priorities=2), sink])
    first, second, last = pipeline.stages
    assert (first.inputs, first.outputs, first.dead) == ((), ("d-gen", "d-gen--p1", "d-gen--p2"), None)
    assert (second.inputs, second.outputs, second.dead) == (
        ("d-gen--p2", "d-gen--p1", "d-gen"),
        ("d-step", "d-step--p1"),
        "d-step--dead",
    )
    assert (last.inputs, last.outputs, last.dead) == (("d-step--p1", "d-step"), (), "d-sink--dead")
    assert [(s.index, s.name, s.is_source, s.is_first) for s in pipeline.stages] == [
        (0, "gen", True, True),
        (1, "step", False, False),
        (2, "sink", False, False),
    ]


def test_fifo_queues_end_in_fifo():
    pipeline = make([Task(step, input=True, priorities=2), sink], fifo=True)
    assert [(q.name, q.dead, q.fifo, q.owned, q.visibility) for q in pipeline.queues] == [
        ("d-step--dead.fifo", None, True, True, 60.0),
        ("d-sink--dead.fifo", None, True, True, 60.0),
        ("d--input.fifo", "d-step--dead.fifo", True, True, 60.0),
        ("d--input--p1.fifo", "d-step--dead.fifo", True, True, 60.0),
        ("d-step.fifo", "d-sink--dead.fifo", True, True, 60.0),
        ("d-step--p1.fifo", "d-sink--dead.fifo", True, True, 60.0),
    ]


def test_queues_redrive_to_who_receives_from_them():
    pipeline = make([gen, step, sink])
    assert {q.name: q.dead for q in pipeline.queues if q.dead} == {"d-gen": "d-step--dead", "d-step": "d-sink--dead"}


@pytest.mark.parametrize(
    "name",
    [
        "uploads",
        "uploads.fifo",
        "arn:aws:sqs:us-west-2:123:uploads",
        "https://sqs.eu-west-1.amazonaws.com/1/" + "u" * 80,
    ],
)
def test_a_queue_of_others_is_never_ours(name):
    pipeline = make([Task(step, input=name, priorities=2), sink], fifo=name.endswith(".fifo"))
    assert pipeline.stages[0].inputs == (name,)
    assert not pipeline.stages[0].is_source
    assert pipeline.stages[0].dead.removesuffix(".fifo") == "d-step--dead"
    (foreign,) = [q for q in pipeline.queues if not q.owned]
    assert (foreign.name, foreign.dead, foreign.fifo) == (name, None, name.endswith(".fifo"))
    assert name not in pipeline.queue_names()
    assert name not in pipeline.queue_names([0])
    assert name in [q.name for q in pipeline.specs_for([0])]


def test_a_single_source_needs_no_queue():
    pipeline = make([gen])
    assert pipeline.queues == ()
    assert pipeline.stages[0].is_source
    assert pipeline.stages[0].outputs == ()


def test_selected_stages_need_their_queues_and_all_dead_letter_queues_of_them():
    pipeline = make([gen, step, Task(sink, name="a"), Task(sink, name="b")])
    assert [q.name for q in pipeline.specs_for([1])] == ["d-step--dead", "d-a--dead", "d-gen", "d-step"]
    assert pipeline.queue_names([1]) == ("d-step--dead", "d-gen", "d-step")
    assert [q.name for q in pipeline.specs_for([0])] == ["d-step--dead", "d-gen"]
    assert [q.name for q in pipeline.specs_for([3])] == ["d-b--dead", "d-a"]
    assert pipeline.specs_for() == pipeline.queues
    assert pipeline.queue_names() == tuple(q.name for q in pipeline.queues)


def test_dead_letter_queues_come_before_what_redrives_to_them():
    pipeline = make([Task(step, input=True, priorities=3), Task(step, name="b", priorities=2), sink])
    for selected in (None, [0], [1], [2], [0, 2]):
        seen = set()
        for queue in pipeline.specs_for(selected):
            assert queue.dead is None or queue.dead in seen
            seen.add(queue.name)


def test_the_receivers_group_is_applied_by_the_sender():
    pipeline = make([gen, Task(step, group=str), sink], fifo=True)
    assert [s.next_group for s in pipeline.stages] == [str, None, None]


def test_ends_tells_generator_sources():
    assert make([yields, step]).stages[0].ends
    assert make([Yielding, step]).stages[0].ends
    assert make([Task(functools.partial(yields), name="y"), step]).stages[0].ends
    assert not make([gen, step]).stages[0].ends
    assert not make([Task(yields, input=True), step]).stages[0].ends
    assert not make([gen, yields]).stages[1].ends


def test_a_stage_is_found_by_name_or_index():
    pipeline = make([gen, step])
    assert pipeline.stage("step") is pipeline.stage(1) is pipeline.stages[1]
    for unknown in ("sink", 2, -1, True, None, 1.0):
        with pytest.raises(ConfigError) as caught:
            pipeline.stage(unknown)
        assert "'gen' (0), 'step' (1)" in str(caught.value)


def test_a_task_named_like_a_number_is_found_by_its_name():
    pipeline = make([Task(gen, name="1"), Task(step, name="0")])
    assert pipeline.stage("1").index == 0
    assert pipeline.stage(1).index == 1


def test_bands_keep_the_highest_first():
    pipeline = make([Task(gen, priorities=4), Task(step, priorities=1), sink])
    first, second, third = pipeline.stages
    assert pipeline.input_levels(second) == second.inputs
    assert pipeline.input_levels(second, 1, 2) == ("d-gen--p2", "d-gen--p1")
    assert pipeline.input_levels(second, 0, 0) == ("d-gen",)
    assert pipeline.input_levels(second, 3, 15) == ("d-gen--p3",)
    assert pipeline.input_levels(first, 2, 3) == ()
    assert pipeline.input_levels(third, 0, 9) == ("d-step",)


def test_a_band_above_all_levels_is_refused():
    pipeline = make([Task(gen, priorities=4), step])
    with pytest.raises(ConfigError, match=r"run\(min_priority\) must be at most 3"):
        pipeline.input_levels(pipeline.stages[1], 4)


@pytest.mark.parametrize(
    ("tasks", "cure"),
    [
        ([], "[function]"),
        ((), "[function]"),
        (None, "[function, function]"),
        ("gen", "[function, function]"),
        (3, "[function, function]"),
        (gen, "[gen]"),
        ({"method": gen}, "[task]"),
        (Task(gen), "[task]"),
        (iter([gen]), "list(...)"),
        ({gen, step}, "list(...)"),
    ],
    ids=range(10),
)
def test_what_is_no_list_of_tasks_is_refused(tasks, cure):
    with pytest.raises(ConfigError) as caught:
        make(tasks)
    assert caught.value.field == "Engine(tasks)"
    assert cure in caught.value.cure


def test_tuples_and_mixed_entries_are_fine():
    assert [s.name for s in make(({"method": gen}, step, Task(sink))).stages] == ["gen", "step", "sink"]


def test_names_are_unique():
    with pytest.raises(ConfigError, match=r"tasks\[2\]\.name.*tasks\[0\].*name='step-2'"):
        make([step, gen, step])
    make([step, gen, Task(step, name="Step")])


@pytest.mark.parametrize("domain", ["", "a b", "a.b", "größe", None, 3, "a\n", "a/b"])
def test_bad_domains_are_refused(domain):
    with pytest.raises(ConfigError, match=r"Engine\(domain\)"):
        make([gen], domain=domain)


@pytest.mark.parametrize(
    ("tasks", "queue"),
    [
        ([Task(gen, name="x", priorities=2), Task(step, name="x--p1"), sink], "d-x--p1"),
        ([Task(step, name="x", input=True), Task(step, name="x--dead"), sink], "d-x--dead"),
        ([Task(step, name="x--dead", input=True), Task(step, name="x")], "d-x--dead"),
        ([Task(step, name="x", input="d-x"), sink], "d-x"),
        ([Task(step, name="x", input="d-x--dead")], "d-x--dead"),
    ],
    ids=range(5),
)
def test_derived_names_do_not_collide(tasks, queue):
    with pytest.raises(ConfigError, match=f"queue '{queue}'"):
        make(tasks)


def test_names_that_only_look_derived_are_fine():
    make([Task(gen, name="x"), Task(step, name="x--p1"), Task(sink, name="y--dead")])


def test_eighty_characters_are_the_limit():
    fixed = len("d-") + len("--p15.fifo")
    fits = Task(gen, name="n" * (80 - fixed), priorities=16)
    assert max(map(len, make([fits, step], fifo=True).queue_names())) == 80
    with pytest.raises(ConfigError) as caught:
        make([Task(gen, name="n" * (81 - fixed), priorities=16), step], fifo=True)
    assert "81 characters" in str(caught.value)
    assert "Cut 1 characters" in str(caught.value)
    assert caught.value.field.endswith(".name")
    make([Task(gen, name="n" * (81 - fixed), priorities=10), step], fifo=True)


def test_dead_letter_and_input_queues_count_for_the_limit():
    with pytest.raises(ConfigError, match=r"--dead'.*81 characters"):
        make([gen, Task(step, name="n" * (81 - len("d---dead")))])
    with pytest.raises(ConfigError, match=r"--dead\.fifo'.*81 characters"):
        make([gen, Task(step, name="n" * (81 - len("d---dead.fifo")))], fifo=True)
    with pytest.raises(ConfigError, match=r"Engine\(domain\).*--input--p10'.*81 characters"):
        make([Task(step, name="n", input=True, priorities=11)], domain="d" * (81 - len("--input--p10")))


@given(
    st.lists(st.from_regex(r"[a-z0-9_][a-z0-9_-]{0,30}", fullmatch=True), min_size=1, max_size=4, unique=True),
    st.integers(1, 16),
    st.booleans(),
    st.booleans(),
    st.text("ab-", min_size=1, max_size=40),
)
def test_every_built_pipeline_has_distinct_valid_queue_names(names, priorities, fifo, fed, domain):
    tasks = [
        Task(step, name=name, priorities=priorities, input=True if fed and index == 0 else None)
        for index, name in enumerate(names)
    ]
    try:
        pipeline = make(tasks, domain=domain, fifo=fifo)
    except ConfigError as error:
        assert "characters" in error.allowed or "would also be" in error.allowed
        return
    queues = [q.name for q in pipeline.queues]
    assert len(set(queues)) == len(queues)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+(\.fifo)?", name) and len(name) <= 80 for name in queues)
    used = {q for s in pipeline.stages for q in (*s.inputs, *s.outputs, s.dead) if q is not None}
    assert used == set(queues)
    for sender, receiver in itertools.pairwise(pipeline.stages):
        assert receiver.inputs == sender.outputs[::-1]


@pytest.mark.parametrize(
    ("tasks", "fifo", "field"),
    [
        ([gen, Task(step, input=True)], False, "input"),
        ([gen, Task(step, input="q", decode=str)], False, "input"),
        ([Task(yields, workers=2), step], False, "workers"),
        ([Task(yields, workers="auto"), step], False, "workers"),
        ([Task(yields, threads=2), step], False, "threads"),
        ([Task(gen, threads=2), step], False, "threads"),
        ([Task(Yielding, workers=2), step], False, "workers"),
        ([gen, Task(step, group=str)], False, "group"),
        ([Task(gen, group=str), step], True, "group"),
        ([Task(step, input="q.fifo", group=str), sink], True, "group"),
        ([Task(gen, batch=5), step], False, "batch"),
        ([Task(gen, batch=1), step], False, "batch"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_its_place_is_refused(tasks, fifo, field):
    with pytest.raises(ConfigError) as caught:
        make(tasks, fifo=fifo)
    assert caught.value.field.endswith(f".{field}")
    assert caught.value.cure


@pytest.mark.parametrize(
    ("tasks", "fifo"),
    [
        ([gen, Task(step, interval=0.5), Task(sink, interval=lambda: 1)], False),
        ([gen, Task(step, args=("keep",))], False),
        ([gen, Task(step, batch=5)], False),
        ([Task(step, batch=5, input=True), sink], False),
        ([Task(step, group=str, input=True), Task(sink, group=str)], True),
        ([Task(yields, workers=4, input=True), sink], False),
        ([gen, Task(yields, workers=4)], False),
        ([Task(gen, workers=32), Task(sink, threads=2)], False),
    ],
    ids=range(8),
)
def test_what_fits_its_place_is_taken(tasks, fifo):
    assert len(make(tasks, fifo=fifo).stages) == len(tasks)


def test_a_pipeline_is_a_frozen_value_that_pickles():
    pipeline = make([gen, step])
    assert pickle.loads(pickle.dumps(pipeline)) == pipeline
    with pytest.raises(dataclasses.FrozenInstanceError):
        pipeline.domain = "x"


@pytest.mark.parametrize(
    ("filename", "domain"),
    [
        ("/home/me/shop.py", "shop"),
        ("shop.py", "shop"),
        ("/home/me/shop/__main__.py", "shop"),
        ("/home/me/shop/__init__.py", "shop"),
        ("/home/me/my-app_2", "my-app_2"),
    ],
)
def test_domains_come_from_the_file(filename, domain):
    assert derive_domain(filename) == domain


@pytest.mark.parametrize(
    "filename",
    [
        None,
        "",
        "<stdin>",
        "<string>",
        "<ipython-input-3-abc>",
        "/tmp/ipykernel_123/456.py",  # noqa: S108  (nothing is opened)
        "/srv/my.app.py",
        "/srv/two words.py",
        "__main__.py",
        "/__main__.py",
    ],
)
def test_without_a_usable_file_the_cure_names_both_ways(filename):
    with pytest.raises(ConfigError, match=r"domain=.*SQSPIPES_DOMAIN") as caught:
        derive_domain(filename)
    assert caught.value.field.startswith("Engine(domain)")


def test_domains_are_checked_on_their_own_too():
    check_domain("SQSPIPES_DOMAIN", "my-app")
    with pytest.raises(ConfigError, match="SQSPIPES_DOMAIN"):
        check_domain("SQSPIPES_DOMAIN", "my app")


def test_a_source_that_map_feeds_has_an_input_queue_too() -> None:
    pipeline = make([gen, step])
    assert feedable(pipeline) == fed(pipeline)
    assert set(feedable(pipeline).queue_names()) - set(pipeline.queue_names()) == {"d--input", "d-gen--dead"}
    declared = make([Task(step, input=True)])
    assert feedable(declared) is fed(declared) is declared


def test_a_source_whose_input_queue_cannot_be_named_has_none() -> None:
    pipeline = make([Task(gen, name="n" * 75), step])
    assert feedable(pipeline) is pipeline
    with pytest.raises(ConfigError, match="SQS allows 80"):
        fed(pipeline)


def test_map_does_not_feed_a_queue_of_others() -> None:
    pipeline = make([Task(step, input="theirs")])
    assert feedable(pipeline) is pipeline
    with pytest.raises(ConfigError, match="map feeds it itself"):
        fed(pipeline)
