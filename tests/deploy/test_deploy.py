"""What deploy/ says is checked with the tools' own code; neither Docker nor Kubernetes runs here."""

import importlib.util
import itertools
import json
import re
import shutil
import subprocess
import sys
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
                "volume": {"persistentVolumeClaim": {"claimName": "models"}},
                "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                "autoscaling": {"enabled": True, "min": 0, "max": 4, "queuedPerWorker": 50},
            },
            {"name": "tiny", "baseModel": "tinsmith/tiny", "path": "tiny"},
        ],
        "settings": {"deterministic": True, "lease_seconds": 10},
        "monitoring": {"serviceMonitor": True},
        "networkPolicy": {"enabled": True},
        "api": {"ingress": {"enabled": True, "className": "nginx", "tls": [{"hosts": ["h"], "secretName": "s"}]}},
        "images": {"pullSecrets": [{"name": "registry"}]},
        "serviceAccount": {"annotations": {"role": "bucket"}},
    },
    "nobody's account": {"serviceAccount": {"create": False}},
}  # fmt: skip


def tool(name: str) -> str:
    found = shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        missing(f"{name} comes as a wheel for Linux on x86-64 only")
    return str(found)


def compose(tmp_path: Path, *profiles: str) -> dict[str, Any]:
    """The file as compose itself reads it, with everything filled in."""
    told = tmp_path / "env"
    told.write_text(
        re.sub(r"^(\w+(PASSWORD|SECRET))=$", r"\1=x", (DEPLOY / "example.env").read_text(), flags=re.M)
    )
    command = [tool("docker-compose"), "--env-file", str(told), "-f", str(ROOT / "docker-compose.yml")]
    for profile in profiles:
        command += ["--profile", profile]
    done = subprocess.run([*command, "config", "--format", "json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    if importlib.util.find_spec("helm_python") is None:
        missing("Helm's library comes as a wheel for Linux on x86-64 only")
    import helm_python

    with helm_python.Chart.load(str(DEPLOY / "chart")) as chart:
        files = chart.render(values, name="demo", namespace="prod")
    return [d for text in files.values() for d in yaml.safe_load_all(text) if d]


def containers(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for manifest in rendered(values):
        if manifest["kind"] == "Deployment":
            yield from manifest["spec"]["template"]["spec"]["containers"]


def test_compose_reads_its_file_and_refuses_to_begin_without_passwords(tmp_path: Path) -> None:
    services = compose(tmp_path, "gpu", "monitoring")["services"]
    assert {"api", "worker", "jobs", "beat", "postgres", "redis", "s3", "prometheus"} <= services.keys()
    assert services["api"]["deploy"]["replicas"] == 2
    assert [s for s in services if "ports" in services[s]] == ["grafana", "proxy"], (
        "nothing else is published"
    )
    unfilled = [tool("docker-compose"), "--env-file", str(DEPLOY / "example.env")]
    refused = subprocess.run(
        [*unfilled, "-f", str(ROOT / "docker-compose.yml"), "config"], capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "put one into .env" in refused.stderr


def test_the_dockerfile_has_nothing_a_linter_objects_to() -> None:
    done = subprocess.run([tool("hadolint"), str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", VALUES)
def test_the_chart_renders_to_what_kubernetes_knows(name: str) -> None:
    import kubernetes_validate

    manifests = rendered(VALUES[name])
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= {m["kind"] for m in manifests}
    for manifest in manifests:
        if "." not in manifest["apiVersion"].split("/")[0] or manifest["apiVersion"].split("/")[0].endswith(
            "k8s.io"
        ):
            kubernetes_validate.validate(manifest, "1.31", strict=True)


def test_the_chart_passes_helm_s_own_lint() -> None:
    if importlib.util.find_spec("helm_python") is None:
        missing("Helm's library comes as a wheel for Linux on x86-64 only")
    import helm_python

    report = helm_python.lint(str(DEPLOY / "chart"))
    assert [m for m in report["messages"] if m["severity"] > 1] == []
    assert report["errors"] == []


def test_values_that_make_no_sense_are_refused() -> None:
    import helm_python

    with pytest.raises(helm_python.HelmError):
        rendered({"pools": [{**POOL, "name": "Not A Name"}]})


def test_pools_scale_by_the_depth_of_their_own_queue() -> None:
    scaled = [m for m in rendered(VALUES["everything"]) if m["kind"] == "ScaledObject"]
    (trigger,) = scaled[0]["spec"]["triggers"]
    assert trigger["metadata"]["query"] == 'max(tinsmith_queued{base_model="org/large"})'
    assert scaled[0]["spec"]["scaleTargetRef"]["name"] == "demo-worker-large"
    deployments = {
        m["metadata"]["name"]: m for m in rendered(VALUES["everything"]) if m["kind"] == "Deployment"
    }
    assert "replicas" not in deployments["demo-worker-large"]["spec"], "or Helm and KEDA would pull at it"
    assert deployments["demo-worker-tiny"]["spec"]["replicas"] == 1


def test_every_command_is_one_of_ours(tmp_path: Path) -> None:
    commands = [c["args"] for c in containers(VALUES["everything"])]
    services = compose(tmp_path, "gpu")["services"]
    commands += [services[name]["command"] for name in ("api", "worker", "worker-gpu", "jobs", "beat")]
    prepare = services["prepare"]["entrypoint"][-1]
    commands += [part.split()[1:] for part in prepare.split("&&")]
    assert len(commands) == 12
    for command in commands:
        parser().parse_args(command)


def test_every_setting_is_one_of_ours(tmp_path: Path) -> None:
    named = {e["name"] for c in containers(VALUES["everything"]) for e in c["env"]}
    for service in compose(tmp_path, "gpu")["services"].values():
        named |= service.get("environment", {}).keys()
    ours = {name.removeprefix("TINSMITH_").lower() for name in named if name.startswith("TINSMITH_")}
    assert {"database", "redis", "objects", "lease_seconds"} <= ours
    assert ours - {"api_key"} <= Settings.model_fields.keys()


def test_dashboards_alerts_and_scaling_ask_for_metrics_there_are() -> None:
    known = set()
    for metric in vars(metrics).values():
        if isinstance(metric, Counter | Gauge | Histogram):
            for family in metric.describe():
                ends = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}
                known |= {family.name + end for end in ends[family.type]}
    dashboard = json.loads((DEPLOY / "chart/files/dashboard.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    alerts = yaml.safe_load((DEPLOY / "chart/files/alerts.yml").read_text())
    asked += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    names = set(itertools.chain.from_iterable(re.findall(r"tinsmith_\w+", query) for query in asked))
    assert names <= known, names - known
    families = {re.sub("_(total|bucket|count|sum)$", "", name) for name in known}
    shown = {re.sub("_(total|bucket|count|sum)$", "", name) for name in names}
    assert shown == families, "a metric that nobody looks at"


def test_both_images_leave_out_what_they_do_not_run() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert "USER 10001" in text
    api = text.split("AS api")[1].split("FROM")[0]
    assert "worker]" not in api, "no torch in the API's image"
