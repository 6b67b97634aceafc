"""The files of cluster/monitoring: a real Prometheus answers every expression of every panel.

It scrapes a real Ray during a real search and a real training.
"""

import json
import math
import re
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from tiny_training import prepared_dir, recipe_of

from longrope2_ray.recipe.loading import load_recipe
from longrope2_ray.report.metrics import (
    FAULT_COUNTERS,
    TRAINING_GAUGES,
    SearchMetrics,
    TrainingMetrics,
)
from longrope2_ray.search import job as search_job
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.training.job import open_training, prepare, run_training
from longrope2_ray.training.records import training_dir

FOLDER = Path(__file__).parents[2] / "cluster" / "monitoring"
DASHBOARDS = {
    path.stem: json.loads(path.read_text())
    for path in sorted((FOLDER / "dashboards").glob("*.json"))
}
PATIENCE_SECONDS = 180
# Metrics without data where there is no GPU: the expression must parse, and Ray declare the names.
GPU_METRICS = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}
MFU = "ray_longrope2_train_model_flops_utilization"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs Prometheus (Debian: prometheus)",
)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in panels(dashboard) for target in panel["targets"]]


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def needs_gpu(expression: str) -> bool:
    return bool(metrics_of(expression) & (GPU_METRICS | {MFU}))


# --- a Ray, a Prometheus that scrapes it, and what it answers


@dataclass
class Server:
    """A Prometheus at ``url``, and the Ray dashboard that was told of it."""

    url: str
    ray_dashboard: str = ""

    def get(self, path: str, **query: str) -> Any:
        """The data of an answer; a refusal raises ValueError with Prometheus's words."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=30
            ) as body:
                return json.load(body)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error)["error"]) from error

    def why_not(self, expression: str) -> str | None:
        """None if the expression answers with numbers, else what is wrong with it."""
        try:
            series = self.get("query", query=expression)["result"]
        except (ValueError, OSError) as error:  # refused, or not up yet
            return str(error)
        values = [float(one["value"][1]) for one in series]
        return None if values and all(map(math.isfinite, values)) else f"answers {values}"

    def unanswered(self, wanted: list[str]) -> dict[str, str]:
        """Expressions that do not answer, and why; after waiting for the scrapes that they need."""
        began, left = time.monotonic(), wanted
        while True:
            reasons = {expression: why for expression in left if (why := self.why_not(expression))}
            if not reasons or time.monotonic() - began > PATIENCE_SECONDS:
                return reasons
            left = list(reasons)
            time.sleep(1)

    def variables(self, dashboard: dict[str, Any]) -> dict[str, str]:
        """The dashboard's variables, each as its own query fills it."""
        values: dict[str, str] = {"__rate_interval": "1m"}
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
                assert match, variable["query"]
                selector, label = substitute(match[1], values), match[2]
                found = until(
                    partial(self.get, f"label/{label}/values", **{"match[]": selector}), selector
                )
                values[variable["name"]] = "|".join(found)
        return values


def substitute(expression: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        expression = expression.replace(f"${name}", value)
    assert "$" not in expression, expression
    return expression


def until(look: Callable[[], Any], what: str) -> Any:
    began = time.monotonic()
    while not (found := look()):
        assert time.monotonic() - began < PATIENCE_SECONDS, f"there is no {what}"
        time.sleep(0.5)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def shipped_config(folder: Path, ray_folder: str) -> Path:
    """Write the shipped prometheus.yml with another folder for Ray and a pace for tests.

    A scrape may take as long as the pause between two.
    """
    text = (FOLDER / "prometheus.yml").read_text()
    paces = (("scrape_interval", "5s"), ("evaluation_interval", "5s"), ("refresh_interval", "1s"))
    for old, new in (
        ("/tmp/ray/", f"{ray_folder}/"),
        *((f"{name}: 10s", f"{name}: {pace}") for name, pace in paces),
    ):
        assert old in text
        text = text.replace(old, new)
    (folder / "prometheus.yml").write_text(text)
    shutil.copy(FOLDER / "rules.yml", folder)
    return folder / "prometheus.yml"


@pytest.fixture(scope="module")
def server(no_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Ray, and a Prometheus of its own that scrapes it."""
    folder, ray_folder = (
        tmp_path_factory.mktemp("prometheus"),
        tempfile.mkdtemp(prefix="lr", dir="/tmp"),
    )
    port = free_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_AUTH_MODE", "disabled")
    patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    patch.setenv("RAY_PROMETHEUS_HOST", f"http://127.0.0.1:{port}")
    log = (folder / "log").open("w")
    process = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={shipped_config(folder, ray_folder)}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log,
        stderr=log,
    )
    try:
        context = ray.init(
            address="local", include_dashboard=True, log_to_driver=False, _temp_dir=ray_folder,
            _system_config={"metrics_report_interval_ms": 2000},
        )  # fmt: skip
        found = Server(f"http://127.0.0.1:{port}", f"http://{context.dashboard_url}")
        until(
            lambda: found.why_not("ray_node_cpu_count") is None,
            "scrape of a Ray node; see " + log.name,
        )
        yield found
    finally:
        ray.shutdown()
        process.terminate()
        process.wait()
        log.close()
        patch.undo()
        shutil.rmtree(ray_folder, ignore_errors=True)


@pytest.fixture(scope="module")
def searched(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A finished search whose driver, this process, is still alive: its name, the tag ``run``."""
    small = ["--search.iterations", "1", "--needles.num-samples", "2", "--report.num-samples", "4"]
    prepared = search_job.prepare(load_recipe("debug", [*small, "--scorer.num-scorers", "2"]))
    run_dir = RunDir(str(tmp_path_factory.mktemp("search")))
    search_job.open_run(prepared, run_dir)
    metrics = SearchMetrics("debug")
    search_job.run_search(prepared, run_dir, [metrics])
    yield "debug"
    del metrics


@pytest.fixture(scope="module")
def trained(
    server: Server, model_dir: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """A finished training, likewise."""
    folder = prepared_dir(tmp_path_factory.mktemp("training"))
    run_dir = RunDir(str(folder))
    job = prepare(recipe_of(model_dir), run_dir)
    train_dir = training_dir(job.recipe, run_dir)
    open_training(job, train_dir)
    metrics = TrainingMetrics("test", job.recipe.train.checkpoint_steps)
    run_training(job, train_dir, metrics)
    yield "test"
    del metrics


def check(server: Server, dashboard: dict[str, Any], run: str) -> None:
    values = server.variables(dashboard)
    assert values["run"] == run
    asked = {expression: substitute(expression, values) for expression in expressions(dashboard)}
    with_data = [query for expression, query in asked.items() if not needs_gpu(expression)]
    assert not server.unanswered(with_data)
    for expression, query in asked.items():
        if needs_gpu(expression):
            server.get("query", query=query)  # it parses
    typos = [re.sub(r"\bray_(\w+)", r"ray_\1x", query) for query in with_data]
    assert [query for query in typos if server.why_not(query) is None] == [], (
        "a wrong name would not be noticed"
    )


@needs_prometheus
@pytest.mark.timeout(900)
def test_every_panel_of_the_search_dashboard_shows_a_real_search(
    server: Server, searched: str
) -> None:
    check(server, DASHBOARDS["search"], searched)
    for name in FAULT_COUNTERS:  # nothing was lost, and that is a 0, not nothing
        (series,) = server.get("query", query=f'ray_longrope2_{name}_total{{run="debug"}}')[
            "result"
        ]
        assert float(series["value"][1]) == 0
    (history,) = server.get("query", query='ray_longrope2_units_done{run="debug"}[1h]')["result"]
    done = [float(value) for _, value in history["values"]]
    assert done == sorted(done)
    assert done[-1] > done[0], "it was scraped while it ran"


@needs_prometheus
@pytest.mark.timeout(900)
def test_every_panel_of_the_training_dashboard_shows_a_real_training(
    server: Server, trained: str
) -> None:
    check(server, DASHBOARDS["training"], trained)


@needs_prometheus
@pytest.mark.timeout(900)
def test_a_wrong_expression_does_not_pass(server: Server) -> None:
    assert server.why_not("vector(1)") is None
    assert server.why_not('max(ray_longrope2_no_such_metric{run="debug"})') == "answers []"
    assert "parse error" in str(server.why_not("max(ray_longrope2_generation"))
    assert server.why_not("vector(0) / vector(0)") == "answers [nan]"


@needs_prometheus
@pytest.mark.timeout(900)
def test_the_ray_dashboard_finds_prometheus_by_the_variable_that_the_page_names(
    server: Server,
) -> None:
    assert "export RAY_PROMETHEUS_HOST=" in (FOLDER / "README.md").read_text()
    with urllib.request.urlopen(
        f"{server.ray_dashboard}/api/prometheus_health", timeout=60
    ) as answer:
        assert json.load(answer)["result"] is True


def test_every_metric_that_needs_a_gpu_is_declared() -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    assert {name.removeprefix("ray_") for name in GPU_METRICS} <= set(METRICS_GAUGES)
    assert MFU.removeprefix("ray_longrope2_train_") in TRAINING_GAUGES
    for dashboard in DASHBOARDS.values():
        for expression in filter(needs_gpu, expressions(dashboard)):
            assert metrics_of(expression) <= GPU_METRICS | {MFU}, (
                "it also asks for what every machine has: test that apart"
            )


# --- the files


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_has_no_overlapping_panels_no_double_ids_and_a_unit_and_words_for_each_panel(
    name: str,
) -> None:
    dashboard = DASHBOARDS[name]
    everything = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 39
    assert dashboard["uid"] == f"longrope2-{name}"
    assert len({panel["id"] for panel in everything}) == len(everything)
    taken: dict[tuple[int, int], str] = {}
    for panel in everything:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken, f"{panel['title']} lies over {taken[x, y]}"
                taken[x, y] = panel["title"]
    assert len(taken) == 24 * (1 + max(y for _, y in taken)), "there is a hole"
    for panel in panels(dashboard):
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        if panel["type"] == "timeseries":
            assert panel["options"]["legend"]["showLegend"]
            assert all(target["legendFormat"] for target in panel["targets"])


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_uses_its_variables_and_no_others(name: str) -> None:
    dashboard = DASHBOARDS[name]
    defined = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert used - {"__all", "__rate_interval"} == defined  # those two are Grafana's own
    assert {panel["datasource"]["uid"] for panel in panels(dashboard)} == {"${datasource}"}


@needs_prometheus
def test_promtool_accepts_the_configuration_and_the_rules(tmp_path: Path) -> None:
    subprocess.run(
        ["promtool", "check", "config", str(shipped_config(tmp_path, str(tmp_path)))], check=True
    )


@needs_prometheus
def test_each_alert_fires_on_what_it_is_for_and_on_nothing_else(tmp_path: Path) -> None:
    """``good`` goes well; ``bad`` commits nothing, its scorers die, and its disk is full."""
    shutil.copy(FOLDER / "rules.yml", tmp_path)
    series = {
        'ray_longrope2_last_commit_timestamp_seconds{run="good"}': "0+60x60",
        'ray_longrope2_last_commit_timestamp_seconds{run="bad"}': "0x60",
        'ray_longrope2_last_commit_timestamp_seconds{run="finished"}': "0x60",
        'ray_longrope2_eta_seconds{run="good"}': "100x60",
        'ray_longrope2_eta_seconds{run="bad"}': "100x60",
        'ray_longrope2_eta_seconds{run="finished"}': "0x60",
        'ray_longrope2_scorers{run="good",state="starting"}': "1x60",
        'ray_longrope2_scorers{run="good",state="busy"}': "1x60",
        'ray_longrope2_scorers{run="bad",state="starting"}': "2x60",
        'ray_longrope2_scorers{run="bad",state="busy"}': "0x60",
        'ray_longrope2_scorer_deaths_total{run="good"}': "0+1x60",
        'ray_longrope2_scorer_preemptions_total{run="good"}': "0+1x60",
        'ray_longrope2_scorer_deaths_total{run="bad"}': "0+1x60",
        'ray_longrope2_scorer_preemptions_total{run="bad"}': "0x60",
        'ray_node_disk_utilization_percentage{instance="good"}': "50x60",
        'ray_node_disk_utilization_percentage{instance="bad"}': "95x60",
    }
    names = [
        rule["alert"]
        for group in yaml.safe_load((tmp_path / "rules.yml").read_text())["groups"]
        for rule in group["rules"]
    ]
    expected = {
        "LongRoPE2NoCommit": "bad: no unit was committed for 1h 0m 0s",
        "LongRoPE2NoScorers": "bad: no scorer is up",
        "LongRoPE2ScorersDying": "bad: 15 scorers died in 15 minutes without being preempted",
        "LongRoPE2DiskFull": "bad: the disk is 95 % full",
    }
    assert names == list(expected)
    rules = {
        rule["alert"]: rule
        for rule in yaml.safe_load((tmp_path / "rules.yml").read_text())["groups"][0]["rules"]
    }
    alerts = [
        {
            "eval_time": "60m",
            "alertname": name,
            "exp_alerts": [
                {
                    "exp_labels": {
                        "severity": "warning",
                        "instance" if "Disk" in name else "run": "bad",
                    },
                    "exp_annotations": {
                        "summary": summary,
                        "description": rules[name]["annotations"]["description"],
                    },
                }
            ],
        }
        for name, summary in expected.items()
    ]
    inputs = [{"series": name, "values": values} for name, values in series.items()]
    case = {"interval": "1m", "input_series": inputs, "alert_rule_test": alerts}
    test = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [case]}
    (tmp_path / "test.yml").write_text(yaml.safe_dump(test))
    done = subprocess.run(
        ["promtool", "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_pod_monitor_selects_the_ray_pods_of_kuberay_by_their_metrics_port() -> None:
    monitor = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())
    assert (monitor["apiVersion"], monitor["kind"]) == ("monitoring.coreos.com/v1", "PodMonitor")
    pods = [
        {"ray.io/is-ray-node": "yes", "ray.io/node-type": kind, "ray.io/cluster": "c"}
        for kind in ("head", "worker")
    ]
    selector = monitor["spec"]["selector"]
    for pod in pods:
        assert selector["matchLabels"].items() <= pod.items()
        for rule in selector["matchExpressions"]:
            assert rule["operator"] == "In"
            assert pod[rule["key"]] in rule["values"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    assert endpoint["relabelings"][0]["targetLabel"] == "ray_io_cluster"


@pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")
def test_the_config_map_holds_the_dashboards_as_they_are() -> None:
    built = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=True
    ).stdout
    config_map, monitor = sorted(yaml.safe_load_all(built), key=lambda body: body["kind"])
    assert config_map["metadata"]["labels"] == {"grafana_dashboard": "1"}
    assert {
        Path(name).stem: json.loads(text) for name, text in config_map["data"].items()
    } == DASHBOARDS
    assert monitor["kind"] == "PodMonitor"


def test_every_dashboard_is_in_the_kustomization() -> None:
    kustomization = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
    (generator,) = kustomization["configMapGenerator"]
    assert {Path(file).stem for file in generator["files"]} == set(DASHBOARDS)


def test_grafana_is_provisioned_with_variables_that_the_page_explains() -> None:
    page = (FOLDER / "README.md").read_text()
    used: set[str] = set()
    for path in (FOLDER / "grafana").rglob("*.yml"):
        assert yaml.safe_load(path.read_text())["apiVersion"] == 1
        used |= set(re.findall(r"\$\{(\w+)\}", path.read_text()))
    assert used == {"RAY_PROMETHEUS_HOST", "LONGROPE2_DASHBOARDS"}
    assert all(f"export {name}=" in page for name in used)
    assert all(name in page for name in ("RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST"))
