"""What can be checked of infra without Docker or Kubernetes."""

import re
from pathlib import Path

import pytest
import yaml

from qlora_core.backends.ray_resources import share_out
from qlora_core.config import RunConfig
from tasks import places

INFRA = Path(__file__).parents[2] / "infra"


def documents(name: str) -> list[dict]:
    return [d for d in yaml.safe_load_all((INFRA / name).read_text()) if d]


@pytest.fixture
def services() -> dict[str, dict]:
    (compose,) = documents("compose.yaml")
    return compose["services"]


def test_every_port_of_compose_is_bound_to_loopback(services):
    ports = [port for service in services.values() for port in service.get("ports", [])]

    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_secret_stands_in_a_file(services):
    (compose,) = documents("compose.yaml")

    assert all("file" in secret for secret in compose["secrets"].values())
    assert "/secrets/" in (INFRA / ".gitignore").read_text()
    for service in services.values():
        assert not [n for n in service.get("environment", {}) if re.search("AUTH_STRING|TOKEN$", n)]


def test_every_ray_container_wants_the_token(services):
    ray = [s for s in services.values() if "ray start" in " ".join(map(str, s["command"]))]
    ray += [s for s in services.values() if s["command"][:2] == ["ray", "start"]]

    assert len(ray) >= 3
    assert all(s["environment"]["RAY_AUTH_MODE"] == "token" for s in ray)
    assert all("ray_token" in s["secrets"] for s in ray)


def test_whoever_is_waited_for_has_a_health_check(services):
    waited = {name for s in services.values() for name in s.get("depends_on", {})}

    assert waited == {"prefect", "mlflow", "ray-head"}
    assert all("healthcheck" in services[name] for name in waited)


def test_mlflow_runs_no_jobs(services):
    assert services["mlflow"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_what_the_image_copies_is_there():
    copied = re.findall(r"^COPY (?!--)(.+) \S+$", (INFRA / "Dockerfile").read_text(), re.MULTILINE)
    names = [name for line in copied for name in line.split()]

    assert "qlora_core" in names
    assert [name for name in names if not (INFRA.parent / name).exists()] == []


def test_kuberay_uses_the_tested_ray_with_a_token_and_asks_for_resources():
    cluster = documents("kuberay/raycluster.yaml")[0]
    pins = dict(
        line.split("==") for line in (INFRA / "constraints.txt").read_text().split() if "==" in line
    )
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    containers = [c for g in groups for c in g["template"]["spec"]["containers"]]

    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert cluster["spec"]["rayVersion"] == pins["ray"]
    assert all({"cpu", "memory"} <= set(c["resources"]["requests"]) for c in containers)


def in_ray_terms(group: dict) -> dict[str, float]:
    """What Ray counts in a pod: KubeRay tells it what the container gets, or `rayStartParams`."""
    (container,) = group["template"]["spec"]["containers"]
    resources = container["resources"]["requests"] | container["resources"]["limits"]
    cpus = group["rayStartParams"].get("num-cpus", resources["cpu"])
    return {"CPU": float(cpus), "GPU": float(resources.get("nvidia.com/gpu", 0))}


def test_the_recipe_in_kuberays_header_fits_on_the_pods_below_it():
    (told,) = re.findall(
        r"^#   recipe:  (.+)$", (INFRA / "kuberay/raycluster.yaml").read_text(), re.MULTILINE
    )
    parts = {"name": "r", "model": {"source": "m"}, "dataset": {"source": "d"}}
    recipe = RunConfig.model_validate(parts | yaml.safe_load(told))
    spec = documents("kuberay/raycluster.yaml")[0]["spec"]
    groups = spec["workerGroupSpecs"]
    pods = [in_ray_terms(group) for group in groups for _ in range(group["replicas"])]

    cpus, gpus = share_out(places.cluster(recipe), [in_ray_terms(spec["headGroupSpec"]), *pods])

    assert recipe.cluster.workers == len(pods)
    assert (cpus, gpus) == (pods[0]["CPU"], pods[0]["GPU"])


def test_infra_holds_no_python():
    assert not list(INFRA.rglob("*.py"))
