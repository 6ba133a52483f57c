"""The files under docs/alerts and docs/deploy: each is what its reader takes, and names only what there is."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import yaml
from botocore.validate import ParamValidator
from prometheus_client.parser import text_string_to_metric_families

from sqspipes_mp import Task
from sqspipes_mp.cli.exits import Exit
from sqspipes_mp.cli.main import command_line
from sqspipes_mp.ipc.statistics import ERROR_KINDS, OPERATIONS, QUEUE_STATES, RESTART_REASONS
from sqspipes_mp.observer.metrics import METRICS
from tests.gates import ROOT, Background, Gate, Log, engine_at, eventually
from tests.process.test_http import held, served, sink

DOCS = Path(ROOT, "docs")
ALERTS = DOCS / "alerts"
DEPLOY = DOCS / "deploy"
FILES = sorted(path for folder in (ALERTS, DEPLOY) for path in folder.rglob("*") if path.is_file())

#: A metric with its selector.
_SELECTOR = re.compile(r"\b(sqspipes_[a-z_]+)\b(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'([a-z_]+)\s*(?:=~|!=|!~|=)\s*\\?"([^"\\]*)')
#: Labels that Prometheus adds.
_ADDED = {"instance", "job"}
#: The values of labels that are fixed.
_VALUES = {
    "outcome": {"done", "retried", "dead_lettered", "continued", "cancelled", "sent", "dropped"},
    "reason": {*RESTART_REASONS, "exception", "rejected"},
    "operation": set(OPERATIONS),
    "kind": set(ERROR_KINDS),
    "state": {*QUEUE_STATES},
}


def used() -> Iterator[tuple[str, str, str]]:
    """Yield file, metric and selector of each use of a metric."""
    for path in FILES:
        if path.name != "index.rst":
            text = path.read_text()
            for name, selector in _SELECTOR.findall(text):
                if name != "sqspipes_mp":
                    yield path.name, name, selector


PROMTOOL = shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed (Debian's package prometheus)")


def promtool(*words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([str(PROMTOOL), *words], cwd=folder, capture_output=True, text=True, check=False)


def rules() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = yaml.safe_load((ALERTS / "rules.yml").read_text())["groups"][0]["rules"]
    return found


@pytest.fixture(autouse=True)
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SQSPIPES_RUN_DIR", str(tmp_path / "registry"))


# -- metrics ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(db: Path, gate: Gate, log: Log) -> str:
    """Return /metrics of an engine that runs one message while another one waits, its queues counted."""
    engine = engine_at(db, [Task(held, name="work", input=True, prefetch=0, args=(gate, log)), sink])
    engine.put_many(["a", "b"])
    engine.close()
    with Background(engine, until="drained", idle=0.0, http="127.0.0.1:0"):
        log.wait_for(1)
        server, found = served(), [""]

        def look() -> bool:
            found[0] = server.ask("/metrics")[2]
            return bool(re.search(r'sqspipes_queue_messages{[^}]*stage="work",state="waiting"} 1', found[0]))

        eventually(look, "the queue is counted")
        gate.open()
    return found[0]


def test_every_metric_that_is_used_is_exported(recorded: str) -> None:
    families = re.findall(r"^# TYPE (\S+) (\S+)", recorded, re.MULTILINE)
    exported = {name for name, _ in families}
    for name, kind in families:
        if kind == "histogram":
            exported |= {f"{name}_{suffix}" for suffix in ("bucket", "sum", "count")}
    missing = {(file, name) for file, name, _ in used() if name not in exported}
    assert not missing
    assert len({name for _, name, _ in used()}) > 20


@needs_promtool
def test_what_an_engine_tells_raises_the_alert_that_it_should(tmp_path: Path, recorded: str) -> None:
    """An engine that tells the same for an hour, with a message waiting: it is stalled, and nothing else."""
    shutil.copy(ALERTS / "rules.yml", tmp_path)
    series = [
        {"series": f"{sample.name}{{{','.join(f'{key}={json.dumps(text)}' for key, text in sample.labels.items())}}}",
         "values": f"{sample.value}x60"}
        for family in text_string_to_metric_families(recorded)
        for sample in family.samples
    ]  # fmt: skip
    rule = {each["alert"]: each for each in rules()}
    stalled = {
        "exp_labels": {"domain": "t", "stage": "work", "severity": "critical"},
        "exp_annotations": {
            **rule["Stalled"]["annotations"],
            "summary": "t: 1 messages wait for work, and none is done",
            "cure": "sqspipes-mp top t; then sqspipes-mp stack --stage work",
        },
    }
    cases = [
        {"eval_time": "40m", "alertname": name, "exp_alerts": [stalled] if name == "Stalled" else []} for name in rule
    ]
    told = {
        "rule_files": ["rules.yml"],
        "tests": [{"interval": "1m", "input_series": series, "alert_rule_test": cases}],
    }
    (tmp_path / "recorded.yml").write_text(json.dumps(told))
    done = promtool("test", "rules", "recorded.yml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_label_that_is_used_exists() -> None:
    labels = {metric.name: {*metric.labels, *_ADDED} for metric in METRICS}
    for metric in METRICS:
        if metric.kind == "histogram":
            labels |= {f"{metric.name}_{suffix}": {*labels[metric.name], "le"} for suffix in ("bucket", "sum", "count")}
    for file, name, selector in used():
        for label, value in _MATCHER.findall(selector):
            assert label in labels[name], (file, name, label)
            known = _VALUES.get(label)
            if known is not None and not value.startswith("$"):
                assert set(value.split("|")) <= known, (file, name, label, value)


# -- alerts -----------------------------------------------------------------------------------------------------------


def test_the_alerts_have_a_cure_and_are_explained() -> None:
    names = {rule["alert"] for rule in rules()}
    assert names == {
        "DeadLettersGrowing", "Stalled", "QueueWaitHigh", "StuckCall", "CrashLoop", "LeasesLost", "BrokerErrors",
        "EngineAbsent",
    }  # fmt: skip
    page = (ALERTS / "index.rst").read_text()
    tests = yaml.safe_load((ALERTS / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    silent = {case["alertname"] for test in tests for case in test["alert_rule_test"] if not case["exp_alerts"]}
    assert fired == silent == names
    for rule in rules():
        assert {"summary", "cure"} <= set(rule["annotations"])
        assert re.search(rf"^{rule['alert']}\b", page, re.MULTILINE)


@needs_promtool
def test_the_alerts_are_raised_by_the_samples_and_not_without_trouble(tmp_path: Path) -> None:
    text = (ALERTS / "rules.yml").read_text()
    shutil.copy(ALERTS / "rules_test.yml", tmp_path)
    (tmp_path / "rules.yml").write_text(text)
    done = promtool("test", "rules", "rules_test.yml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    # A depth that is summed over machines counts twice.
    wrong = text.replace("max by (domain, stage, priority)", "sum by (domain, stage, priority)")
    (tmp_path / "rules.yml").write_text(wrong)
    assert promtool("test", "rules", "rules_test.yml", folder=tmp_path).returncode != 0


def expressions() -> list[str]:
    """Return the dashboard's expressions."""
    panels = json.loads((ALERTS / "dashboard.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_the_dashboard_uses_its_own_variables_and_counts_no_depth_twice() -> None:
    dashboard = json.loads((ALERTS / "dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    for expression in expressions():
        assert set(re.findall(r"\$(\w+)", expression)) <= {*variables, "__rate_interval"}
        for depth in ("sqspipes_queue_messages", "sqspipes_dead_letters"):
            before = expression.partition(depth)[0]
            assert depth not in expression or before.rpartition("by (")[0].endswith("max "), expression


@needs_promtool
def test_prometheus_understands_the_expressions_of_dashboard_and_scaler(tmp_path: Path) -> None:
    found = [expression.replace("$__rate_interval", "5m") for expression in expressions()]
    scaled = next(each for _, each in manifests() if each["kind"] == "ScaledObject")
    found.append(scaled["spec"]["triggers"][1]["metadata"]["query"])
    records = [{"record": f"expression{number}", "expr": text} for number, text in enumerate(found)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": records}]}))
    done = promtool("check", "rules", "--lint=none", "rules.yml", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


# -- deployment -------------------------------------------------------------------------------------------------------


def manifests() -> Iterator[tuple[str, Any]]:
    for path in sorted((DEPLOY / "kubernetes").iterdir()):
        for each in yaml.safe_load_all(path.read_text()):
            yield path.name, each


def pods() -> Iterator[tuple[str, Any]]:
    """Yield the pod of each manifest that makes some."""
    for name, manifest in manifests():
        spec = manifest.get("spec", {})
        template = spec.get("template") or spec.get("jobTargetRef", {}).get("template")
        if template is not None:
            yield name, template["spec"]


def commands() -> Iterator[list[str]]:
    """Yield every command line in the files."""
    for _, pod in pods():
        container = pod["containers"][0]
        yield container["command"]
        probes = [container.get(name) for name in ("livenessProbe", "readinessProbe", "startupProbe")]
        yield from (probe["exec"]["command"] for probe in probes if probe and "exec" in probe)
    task = json.loads((DEPLOY / "ecs/task-definition.json").read_text())["containerDefinitions"][0]
    yield task["command"]
    yield task["healthCheck"]["command"][1:]
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["words"]
    yield compose["command"]
    yield compose["healthcheck"]["test"][1:]
    yield shlex.split(unit()["Service"]["ExecStart"])


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(DEPLOY / "systemd/words.service")
    return parser


def test_every_command_line_is_understood() -> None:
    found = list(commands())
    for command in found:
        words = command[3:] if command[:3] == ["python", "-m", "sqspipes_mp"] else command[1:]
        assert command[0].endswith(("python", "sqspipes-mp"))
        flags = command_line().parse_args(words)
        assert words[0] == "health" or flags.target == "words:engine"


def test_the_grace_is_longer_than_the_engine_s() -> None:
    graces = [pod["terminationGracePeriodSeconds"] for _, pod in pods()]
    graces.append(
        json.loads((DEPLOY / "ecs/task-definition.json").read_text())["containerDefinitions"][0]["stopTimeout"]
    )
    graces.append(int(unit()["Service"]["TimeoutStopSec"]))
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]["words"]
    graces.append(int(compose["stop_grace_period"].removesuffix("s")))
    assert min(graces) >= 25 + 5
    assert unit()["Service"]["RestartPreventExitStatus"] == str(int(Exit.USAGE))


def test_kubernetes_takes_the_manifests() -> None:
    kinds = [manifest["kind"] for _, manifest in manifests()]
    for kind in ("Deployment", "Job", "ScaledObject", "ScaledJob", "TriggerAuthentication"):
        assert kind in kinds
    deployment = next(manifest for _, manifest in manifests() if manifest["kind"] == "Deployment")["spec"]
    assert deployment["selector"]["matchLabels"].items() <= deployment["template"]["metadata"]["labels"].items()
    validator = pytest.importorskip("kubernetes_validate", reason="the schemas (kubernetes-validate) are not installed")
    version = validator.latest_version()
    for _, manifest in manifests():
        if manifest["apiVersion"] != "keda.sh/v1alpha1":
            validator.validate(manifest, version, strict=True)
    for _, pod in pods():
        validator.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": pod}, version, strict=True
        )


def test_keda_takes_the_manifests() -> None:
    """By the rules of its resource definitions that are easily broken; their schemas are not at hand."""
    named = {manifest["metadata"]["name"] for _, manifest in manifests() if manifest["kind"] == "TriggerAuthentication"}
    known = {
        "aws-sqs-queue": {"queueURL", "awsRegion", "queueLength", "activationQueueLength", "scaleOnInFlight"},
        "prometheus": {"serverAddress", "threshold", "query", "ignoreNullValues"},
    }
    for _, manifest in manifests():
        spec = manifest["spec"] if manifest["kind"] in {"ScaledObject", "ScaledJob"} else {"triggers": []}
        assert "scaleTargetRef" in spec or manifest["kind"] != "ScaledObject"
        assert "jobTargetRef" in spec or manifest["kind"] != "ScaledJob"
        for trigger in spec["triggers"]:
            assert set(trigger["metadata"]) <= known[trigger["type"]]
            assert all(isinstance(value, str) for value in trigger["metadata"].values())
            assert trigger.get("authenticationRef", {}).get("name", "words") in named


@pytest.mark.parametrize(
    ("file", "operation"), [("task-definition", "RegisterTaskDefinition"), ("service", "CreateService")]
)
def test_ecs_takes_the_requests(file: str, operation: str) -> None:
    model = botocore.session.Session().get_service_model("ecs").operation_model(operation)
    request = json.loads((DEPLOY / f"ecs/{file}.json").read_text())
    report = ParamValidator().validate(request, model.input_shape)
    assert not report.has_errors(), report.generate_report()


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("systemd-analyze is not installed")
    text = (DEPLOY / "systemd/words.service").read_text()
    # The program must be there.
    (tmp_path / "words.service").write_text(text.replace("/opt/words/venv/bin/sqspipes-mp", sys.executable))
    done = subprocess.run(
        [verify, "verify", "--man=no", str(tmp_path / "words.service")], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if "words.service" in line]
    assert not said


@pytest.mark.parametrize("folder", [ALERTS, DEPLOY], ids=["alerts", "deploy"])
def test_the_pages_tell_of_every_file(folder: Path) -> None:
    page = (folder / "index.rst").read_text()
    for path in FILES:
        if path.is_relative_to(folder) and path.name != "index.rst":
            assert str(path.relative_to(folder)) in page
    for name in re.findall(r"^\.\. include:: (\S+)", page, re.MULTILINE):
        assert (folder / name).is_file()
