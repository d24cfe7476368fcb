"""What deploy/ says is checked with the tools' own code; neither Docker nor Kubernetes runs here."""

import functools
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Gauge, Histogram

from tests.servers import missing
from tinsmith_api.cli import parser
from tinsmith_api.journal import metrics
from tinsmith_api.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "chart"
FILES = ("docker-compose.yml", "deploy/private-network.yml", "deploy/worker.yml")

POOL = {"name": "large", "baseModel": "org/large", "path": "org/large-8b", "replicas": 2}
VALUES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "everything": {
        "pools": [
            {
                **POOL,
                "resources": {"limits": {"nvidia.com/gpu": 1}},
                "nodeSelector": {"spot": "true"},
                "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
                "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
                "priorityClassName": "training",
                "graceSeconds": 25,
                "volume": {"persistentVolumeClaim": {"claimName": "models"}},
                "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                "autoscaling": {"enabled": True, "min": 0, "max": 4, "queuedPerWorker": 50},
            },
            {"name": "tiny", "baseModel": "tinsmith/tiny", "path": "tiny"},
            {"name": "asleep", "baseModel": "org/asleep", "path": "/data/asleep", "replicas": 0},
        ],
        "settings": {"deterministic": True, "lease_seconds": 7.5, "slot_bytes": 80_000_000_000},
        "s3": {"encryption": "aws:kms", "kmsKey": "key"},
        "monitoring": {"podMonitor": True, "alerts": True, "dashboard": True},
        "networkPolicy": {"enabled": True, "metricsFrom": [{"namespaceSelector": {}}]},
        "api": {
            "ingress": {
                "enabled": True,
                "className": "nginx",
                "tls": [{"hosts": ["h"], "secretName": "s"}],
                "annotations": {"a": "b"},
            },
            "autoscaling": {"enabled": True},
        },
        "images": {"pullSecrets": [{"name": "registry"}]},
        "serviceAccount": {"annotations": {"role": "bucket"}},
    },
    "nobody's account, no pool": {"serviceAccount": {"create": False}, "pools": []},
}


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        missing(f"{name} comes as a wheel for Linux on x86-64 only")
    return str(found)


def helm() -> Any:
    if importlib.util.find_spec("helm_python") is None:
        missing("Helm's library comes as a wheel for Linux on x86-64 only")
    import helm_python

    return helm_python


# -- compose -------------------------------------------------------------------------------------------


def filled(*, but: str = "", profiles: str = "cpu") -> str:
    """deploy/example.env with everything that it leaves to its reader, except `but`."""
    given = (DEPLOY / "example.env").read_text().replace("PRIVATE_ADDRESS=", "PRIVATE_ADDRESS=10.0.0.1")
    empty = re.compile(r"^(\w+(?:PASSWORD|SECRET))=$", re.M)
    given = empty.sub(lambda m: m[0] if m[1] == but else f"{m[1]}=x1", given)
    return given.replace("COMPOSE_PROFILES=cpu", f"COMPOSE_PROFILES={profiles}")


def run_compose(
    tmp_path: Path, told: str, files: tuple[str, ...], *more: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "env").write_text(told)
    command = [tool("docker-compose"), "--env-file", str(tmp_path / "env")]
    for file in files:
        command += ["-f", str(ROOT / file)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "GPU": "1"}
    return subprocess.run(
        [*command, *more, "config", "--format", "json"], capture_output=True, text=True, env=environment
    )


def compose(tmp_path: Path, *files: str) -> dict[str, Any]:
    """The files as compose itself reads them, with everything filled in."""
    done = run_compose(tmp_path, filled(profiles="cpu,gpu,monitoring"), files or FILES[:1], "-p", "demo")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_one_machine_has_all_processes_and_publishes_nothing_to_other_machines(tmp_path: Path) -> None:
    services = compose(tmp_path)
    ours = {"api", "worker", "worker-gpu", "jobs", "beat"}
    assert ours | {"proxy", "postgres", "redis", "s3", "prometheus", "grafana"} <= services.keys()
    assert services["api"]["deploy"]["replicas"] == 2
    published = {name: s["ports"] for name, s in services.items() if "ports" in s}
    assert published.keys() == {"grafana", "proxy"}
    assert {port["host_ip"] for ports in published.values() for port in ports} == {"127.0.0.1"}


@pytest.mark.parametrize("profiles, worker", [("cpu", "worker"), ("gpu,monitoring", "worker-gpu")])
def test_either_worker_is_started_and_its_image_built_and_not_the_other(
    profiles: str, worker: str, tmp_path: Path
) -> None:
    done = run_compose(tmp_path, filled(profiles=profiles), FILES[:1])
    services = json.loads(done.stdout)["services"]
    assert [name for name in services if name.startswith("worker")] == [worker]
    assert ("grafana" in services) == ("monitoring" in profiles)


def test_every_service_comes_back_and_is_watched(tmp_path: Path) -> None:
    services = compose(tmp_path)
    once = services.pop("prepare")
    assert once["restart"] == "on-failure"
    for name, service in services.items():
        assert service["restart"] == "unless-stopped", name
        # Our own images bring a check of their own.
        assert "build" in service or "healthcheck" in service, name
    assert "HEALTHCHECK" in (DEPLOY / "Dockerfile").read_text().split("FROM base")[0]


@pytest.mark.parametrize("variable", ["POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET", "GRAFANA_PASSWORD"])
def test_nothing_begins_without_a_password(variable: str, tmp_path: Path) -> None:
    refused = run_compose(tmp_path, filled(but=variable), FILES[:1])
    assert refused.returncode != 0
    assert variable in refused.stderr
    assert "put one into .env" in refused.stderr


def test_other_machines_reach_the_first_by_its_private_address_only(tmp_path: Path) -> None:
    services = compose(tmp_path, *FILES[:2])
    for name in ("postgres", "redis", "s3"):
        assert [port["host_ip"] for port in services[name]["ports"]] == ["10.0.0.1"]
    elsewhere = compose(tmp_path, FILES[2])["worker"]
    first = compose(tmp_path)["worker"]
    assert elsewhere["environment"].keys() == first["environment"].keys()
    for name, value in first["environment"].items():
        there = re.sub(r"(?<=@)(postgres|redis)(?=:)|(?<=//)s3(?=:)", "10.0.0.1", value)
        assert elsewhere["environment"][name] == there
    assert elsewhere["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"] == ["1"]


# -- images -----------------------------------------------------------------------------------------


def test_the_dockerfile_has_nothing_a_linter_objects_to() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_no_image_runs_as_root_and_the_api_s_has_no_torch() -> None:
    _, _, api, worker = (DEPLOY / "Dockerfile").read_text().split("\nFROM ")
    assert "USER 10001" in api
    assert "USER 10001" in worker
    assert "torch" not in api
    assert "worker" not in api.split("AS api")[1]


def test_the_images_have_the_torch_that_the_project_asks_for_and_all_of_its_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (torch,) = [r for r in project["project"]["optional-dependencies"]["worker"] if r.startswith("torch")]
    assert f"'{torch}'" in (DEPLOY / "Dockerfile").read_text()
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    needed = {package.split("/")[0] for package in packages} | {"pyproject.toml"}
    needed |= {project["project"]["readme"], *project["project"]["license-files"]}
    assert let_in == needed


# -- the chart -----------------------------------------------------------------------------------------


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    with helm().Chart.load(str(CHART)) as chart:
        files = chart.render(values, name="demo", namespace="prod")
    texts = [text for name, text in files.items() if name.endswith(".yaml")]
    return [d for text in texts for d in yaml.safe_load_all(text) if d]


@functools.cache
def everything() -> list[dict[str, Any]]:
    return rendered(VALUES["everything"])


def named(kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m for m in everything() if m["kind"] == kind}


def containers() -> Iterator[dict[str, Any]]:
    for manifest in named("Deployment").values():
        yield from manifest["spec"]["template"]["spec"]["containers"]


# Of others' kinds: no schema of these is at hand.
OTHERS = {"ScaledObject", "PodMonitor", "PrometheusRule"}


@pytest.mark.parametrize("version", ["1.29", "1.37"])
@pytest.mark.parametrize("name", VALUES)
def test_the_chart_renders_to_what_kubernetes_knows(name: str, version: str) -> None:
    import kubernetes_validate

    manifests = [m for m in rendered(VALUES[name]) if m["kind"] not in OTHERS]
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= {m["kind"] for m in manifests}
    for manifest in manifests:
        kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_passes_helm_s_own_lint(name: str) -> None:
    report = helm().lint(str(CHART), VALUES[name], strict=True)
    assert [m for m in report["messages"] if m["severity"] > 1] == []
    assert report["errors"] == []


@pytest.mark.parametrize(
    "values",
    [
        {"pools": [{**POOL, "name": "Not A Name"}]},
        {"pools": [{**POOL, "replica": 2}]},
        {"pools": [{**POOL, "autoscaling": {"enabled": True}}]},
        {"secret": ""},
        {"objects": "/data/objects"},
        {"setings": {}},
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(helm().HelmError, match="specifications of the schema"):
        rendered(values)


def test_everything_runs_without_rights() -> None:
    for deployment in named("Deployment").values():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert not pod["automountServiceAccountToken"]
        for container in pod["containers"]:
            assert container["securityContext"]["readOnlyRootFilesystem"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "livenessProbe" in container


def test_pools_scale_by_the_depth_of_their_own_queue() -> None:
    scaled = named("ScaledObject")["demo-worker-large"]["spec"]
    (trigger,) = scaled["triggers"]
    assert trigger["metadata"]["query"] == 'max(tinsmith_queued{base_model="org/large"})'
    assert scaled["scaleTargetRef"]["name"] == "demo-worker-large"
    deployments = named("Deployment")
    assert "replicas" not in deployments["demo-worker-large"]["spec"], "or Helm and KEDA would pull at it"
    assert "replicas" not in deployments["demo-api"]["spec"]
    assert deployments["demo-worker-tiny"]["spec"]["replicas"] == 1
    assert deployments["demo-worker-asleep"]["spec"]["replicas"] == 0


KUBECTL = """#!/bin/sh
echo "$@" >> "$0.log"
if [ "$1" = get ]; then
    for name in $FOUND; do echo "deployment.apps/$name"; done
fi
"""


def scale(tmp_path: Path, pool: str, found: str) -> tuple[int, str, list[str]]:
    """Run kubernetes-scale.sh with a kubectl that says it found these, and writes down what it was asked."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    command = [str(DEPLOY / "kubernetes-scale.sh"), pool, "3"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOUND": found}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr, (tmp_path / "kubectl.log").read_text().splitlines()


def test_workers_are_scaled_by_the_labels_that_the_chart_gives_them(tmp_path: Path) -> None:
    returned, said, asked = scale(tmp_path, "org/large", "demo-worker-large")
    assert (returned, said) == (0, "")
    assert asked[1] == "scale deployment.apps/demo-worker-large --replicas 3"
    selector = dict(part.split("=") for part in asked[0].split()[3].split(","))
    labelled = [
        n for n, d in named("Deployment").items() if selector.items() <= d["metadata"]["labels"].items()
    ]
    assert labelled == ["demo-worker-large"]


@pytest.mark.parametrize("found", ["", "one two"])
def test_a_pool_that_is_not_there_or_not_one_is_not_scaled(found: str, tmp_path: Path) -> None:
    returned, said, asked = scale(tmp_path, "org/large", found)
    assert returned == 1
    assert "org/large" in said
    assert len(asked) == 1


# -- what both name of ours ----------------------------------------------------------------------------


def test_every_command_is_one_of_ours(tmp_path: Path) -> None:
    commands = [c["args"] for c in containers()]
    services = compose(tmp_path)
    commands += [services[name]["command"] for name in ("api", "worker", "worker-gpu", "jobs", "beat")]
    commands.append(compose(tmp_path, FILES[2])["worker"]["command"])
    commands += [part.split()[1:] for part in services["prepare"]["entrypoint"][-1].split("&&")]
    images = re.findall(r"^CMD (\[.*)$", (DEPLOY / "Dockerfile").read_text(), re.M)
    commands += map(json.loads, images)
    assert len(commands) == 16
    for command in commands:
        parser().parse_args(command)


def test_every_setting_is_one_of_ours(tmp_path: Path) -> None:
    found = {e["name"] for c in containers() for e in c["env"]}
    found |= set(re.findall(r"TINSMITH_\w+", (DEPLOY / "Dockerfile").read_text()))
    for service in (*compose(tmp_path).values(), *compose(tmp_path, FILES[2]).values()):
        found |= service.get("environment", {}).keys()
    ours = {name.removeprefix("TINSMITH_").lower() for name in found if name.startswith("TINSMITH_")}
    assert {"database", "redis", "objects", "slot_bytes", "s3_kms_key"} <= ours
    assert ours - {"api_key"} <= Settings.model_fields.keys()


def test_settings_arrive_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in next(containers())["env"]:
        monkeypatch.setenv(variable["name"], variable["value"])
    settings = Settings()
    assert (settings.slot_bytes, settings.lease_seconds, settings.deterministic) == (
        80_000_000_000,
        7.5,
        True,
    )
    assert (settings.s3_encryption, settings.s3_kms_key) == ("aws:kms", "key")


def test_docs_list_every_setting_that_a_fleet_has() -> None:
    text = (ROOT / "docs/deploy.md").read_text() + (ROOT / "docs/service.md").read_text()
    missing_in_docs = [name for name in Settings.model_fields if f"`{name}`" not in text]
    assert missing_in_docs == []


# -- metrics -------------------------------------------------------------------------------------------


def known_metrics() -> dict[str, set[str]]:
    """Every series there is, with its labels."""
    ends = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
    known = {}
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            for family in metric.describe():
                for end in ends[family.type]:
                    more = {"le"} if end == "_bucket" else set()
                    known[family.name + end] = {*metric._labelnames, *more}
    return known


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((CHART / "files/dashboard.json").read_text())
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CHART / "files/alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def queries() -> list[str]:
    asked = [t["expr"] for panel in dashboard()["panels"] for t in panel["targets"]]
    asked += [rule["expr"] for rule in alerts()]
    triggers = itertools.chain.from_iterable(m["spec"]["triggers"] for m in named("ScaledObject").values())
    return asked + [t["metadata"]["query"] for t in triggers]


def series(query: str) -> set[str]:
    return set(re.findall(r"tinsmith_\w+", query))


def test_every_query_is_promql() -> None:
    import promql_parser

    for query in queries():
        promql_parser.parse(query)
    for rule in alerts():
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}


def test_every_query_asks_for_metrics_and_labels_there_are_and_no_metric_goes_unseen() -> None:
    known = known_metrics()
    for query in queries():
        assert series(query) <= known.keys(), query
        labels = set().union(*(known[name] for name in series(query)))
        groups = re.findall(r"\b(?:by|on|without) \(([^)]*)\)", query)
        named_labels = {label.strip() for group in groups for label in group.split(",")}
        named_labels |= set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)\s*\"", query))
        assert named_labels <= labels, query

    def family(name: str) -> str:
        return re.sub("_(total|bucket|count|sum)$", "", name)

    shown = {family(n) for p in dashboard()["panels"] for t in p["targets"] for n in series(t["expr"])}
    assert shown == {family(name) for name in known}


def test_what_prometheus_and_grafana_are_told_is_where_it_says(tmp_path: Path) -> None:
    services = compose(tmp_path)
    mounted = {
        v["target"]: Path(v["source"])
        for name in ("prometheus", "grafana", "proxy")
        for v in services[name]["volumes"]
        if v["type"] == "bind"
    }
    assert all(source.exists() for source in mounted.values())
    prometheus = yaml.safe_load(mounted["/etc/prometheus/prometheus.yml"].read_text())
    assert set(prometheus["rule_files"]) <= mounted.keys()
    (job,) = prometheus["scrape_configs"]
    (discovered,) = job["dns_sd_configs"]
    assert set(discovered["names"]) == {"api", "worker", "worker-gpu", "jobs", "beat"} & services.keys()
    provisioning = mounted["/etc/grafana/provisioning"]
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    assert {p["datasource"]["uid"] for p in dashboard()["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards/tinsmith.yml").read_text())["providers"]
    assert f"{provider['options']['path']}/tinsmith.json" in mounted


def test_the_chart_brings_the_same_alerts_and_dashboard() -> None:
    (rules,) = named("PrometheusRule").values()
    assert [r for g in rules["spec"]["groups"] for r in g["rules"]] == alerts()
    (config,) = named("ConfigMap").values()
    assert json.loads(config["data"]["tinsmith.json"]) == dashboard()
