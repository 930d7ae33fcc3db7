"""The files that deploy and watch the endpoint on a cluster, by Ray's own schema."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray.serve
import yaml
from ray._common.utils import import_attr
from ray.serve.schema import ServeDeploySchema

from rsllm.config.plain import from_dict
from rsllm.errors import ConfigError
from rsllm.serve import LOOPBACK, deploy, guard
from rsllm.serve.deploy import Endpoint, build
from rsllm.serve.serve import AT_START

NAME = r"ray_(\w+?)(?:_total|_bucket|_sum|_count)?(?=[{\[)])"
CLUSTER = Path(__file__).parents[2] / "cluster"


def kuberay() -> Any:
    items = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())["items"]
    (service,) = (item for item in items if item["kind"] == "RayService")
    return yaml.safe_load(service["spec"]["serveConfigV2"])


FILES = {
    "serve.yaml": yaml.safe_load((CLUSTER / "serve.yaml").read_text()),
    "kuberay.yaml": kuberay(),
}


@pytest.mark.parametrize("name", FILES)
def test_ray_takes_the_file_and_the_application_its_arguments(name: str) -> None:
    config = ServeDeploySchema.model_validate(FILES[name])
    own = config.controller_options.runtime_env["env_vars"]
    assert own.items() <= AT_START.items()
    (application,) = config.applications
    assert import_attr(application.import_path) is build
    endpoint = from_dict(Endpoint, application.args)
    assert set(application.args) <= set(inspect.signature(Endpoint).parameters)
    assert endpoint.ranker != "auto"
    built = build(application.args)
    assert built._bound_deployment.name == "Api"
    with pytest.raises(ConfigError, match="colour"):
        build(application.args | {"colour": 1})
    with pytest.raises(ConfigError, match="name the ranker"):
        build(application.args | {"ranker": "auto"})


def test_outside_kubernetes_it_listens_on_loopback_alone() -> None:
    config = FILES["serve.yaml"]
    assert config["http_options"]["host"] in LOOPBACK
    assert from_dict(Endpoint, config["applications"][0]["args"]).hosts == LOOPBACK


def test_in_kubernetes_every_pod_mounts_the_token() -> None:
    items = yaml.safe_load((CLUSTER / "kuberay.yaml").read_text())["items"]
    (service,) = (item["spec"] for item in items if item["kind"] == "RayService")
    file = FILES["kuberay.yaml"]["applications"][0]["args"]["token_file"]
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        (mount,) = (m for m in container["volumeMounts"] if m["name"] == "token")
        assert Path(file).parent == Path(mount["mountPath"])
        assert mount["readOnly"]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    """By the names in our source and in Ray's, to which its exporter puts `ray_` and endings."""
    board = json.loads((CLUSTER / "grafana.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(
            r"ray_(\w+?)(?:_total|_bucket|_sum|_count)?(?=[{\[)])", target["expr"]
        )
    }
    source = inspect.getsource(deploy) + inspect.getsource(guard)
    source += "".join(p.read_text() for p in Path(ray.serve.__file__).parent.rglob("*.py"))
    assert len(asked) >= 6
    assert [name for name in asked if name not in source] == []
