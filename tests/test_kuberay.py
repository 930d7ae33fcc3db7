"""The manifests for KubeRay: known fields only, a token, closed pods, and files that exist.

KubeRay's schema is in none of the packages that tests may install, so fields stand here by hand:
those of `ray.io/v1` in KubeRay 1.5 (`raycluster_types.go`, `rayjob_types.go`,
`rayservice_types.go`) and, of Kubernetes' own kinds, those that the manifests use.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
ITEMS = {
    item["kind"]: item
    for item in yaml.safe_load((ROOT / "cluster/kuberay.yaml").read_text())["items"]
}
CLUSTERS = {
    "RayCluster": ITEMS["RayCluster"]["spec"],
    "RayJob": ITEMS["RayJob"]["spec"]["rayClusterSpec"],
    "RayService": ITEMS["RayService"]["spec"]["rayClusterConfig"],
}
FIELDS = {
    "RayCluster": "authOptions autoscalerOptions enableInTreeAutoscaling gcsFaultToleranceOptions"
    " headGroupSpec headServiceAnnotations managedBy rayVersion suspend upgradeStrategy"
    " workerGroupSpecs",
    "RayJob": "activeDeadlineSeconds backoffLimit clusterSelector deletionStrategy entrypoint"
    " entrypointNumCpus entrypointNumGpus entrypointResources jobId managedBy metadata"
    " preRunningDeadlineSeconds rayClusterSpec runtimeEnvYAML shutdownAfterJobFinishes"
    " submissionMode submitterConfig submitterPodTemplate suspend ttlSecondsAfterFinished",
    "RayService": "deploymentUnhealthySecondThreshold excludeHeadPodFromServeSvc managedBy"
    " rayClusterConfig rayClusterDeletionDelaySeconds serveConfigV2 serveService"
    " serviceUnhealthySecondThreshold suspend upgradeStrategy",
    "authOptions": "mode",
    "autoscalerOptions": "env envFrom idleTimeoutSeconds image imagePullPolicy resources"
    " securityContext upscalingMode version volumeMounts",
    "headGroupSpec": "enableIngress headService labels rayStartParams resources serviceType"
    " template",
    "workerGroupSpecs": "groupName idleTimeoutSeconds labels maxReplicas minReplicas numOfHosts"
    " rayStartParams replicas resources scaleStrategy suspend template",
    "template": "metadata spec",
    "submitterPodTemplate": "metadata spec",
    "spec": "automountServiceAccountToken containers restartPolicy securityContext volumes",
    "containers": "env image name resources securityContext volumeMounts",
    "env": "name value",
    "volumeMounts": "mountPath name readOnly",
    "volumes": "name persistentVolumeClaim secret",
    "secret": "defaultMode secretName",
    "resources": "limits requests",
    "securityContext": "allowPrivilegeEscalation capabilities fsGroup runAsGroup runAsNonRoot"
    " runAsUser seccompProfile",
    "PersistentVolumeClaim": "accessModes resources storageClassName",
    "NetworkPolicy": "ingress podSelector policyTypes",
}


def unknown(value: Any, kind: str) -> list[str]:
    """Fields that a kind does not have, below `value` too."""
    if isinstance(value, list):
        return [field for entry in value for field in unknown(entry, kind)]
    if kind in ("rayClusterSpec", "rayClusterConfig"):
        kind = "RayCluster"
    if kind not in FIELDS or not isinstance(value, dict):
        return []
    own = [f"{kind}.{field}" for field in value if field not in FIELDS[kind].split()]
    return own + [field for name, part in value.items() for field in unknown(part, name)]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


@pytest.mark.parametrize("kind", ITEMS)
def test_fields_are_known(kind: str) -> None:
    spec = ITEMS[kind]["spec"]
    assert unknown(spec, kind) == []
    assert unknown({**spec, "colour": 1}, kind) == [f"{kind}.colour"]


def test_a_wrong_field_deep_inside_is_seen() -> None:
    spec = copy.deepcopy(ITEMS["RayJob"]["spec"])
    spec["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["container"] = []
    assert unknown(spec, "RayJob") == ["spec.container"]


def test_parts_are_chosen_by_label() -> None:
    labels = {kind: item["metadata"]["labels"]["part"] for kind, item in ITEMS.items()}
    base = {"PersistentVolumeClaim": "base", "NetworkPolicy": "base"}
    assert labels == {**base, "RayCluster": "cluster", "RayJob": "job", "RayService": "serve"}


@pytest.mark.parametrize("kind", CLUSTERS)
def test_every_ray_asks_for_a_token(kind: str) -> None:
    assert CLUSTERS[kind]["authOptions"] == {"mode": "token"}
    assert "serviceType" not in CLUSTERS[kind]["headGroupSpec"], "the default stays inside"


def test_dashboards_are_not_for_everybody() -> None:
    """The standing cluster's is on loopback; others are open to pods, which the policy counts."""
    hosts = {
        kind: cluster["headGroupSpec"]["rayStartParams"]["dashboard-host"]
        for kind, cluster in CLUSTERS.items()
    }
    assert hosts == {"RayCluster": "127.0.0.1", "RayJob": "0.0.0.0", "RayService": "0.0.0.0"}
    policy = ITEMS["NetworkPolicy"]["spec"]
    assert policy["policyTypes"] == ["Ingress"]
    own, operator, requests = policy["ingress"]
    assert requests["ports"] == [{"port": 8000}]
    assert own == {"from": [{"podSelector": policy["podSelector"]}]}
    assert operator["ports"] == [{"port": 8265}]
    submitter = ITEMS["RayJob"]["spec"]["submitterPodTemplate"]
    for pod in [submitter, *(pod for cluster in CLUSTERS.values() for pod in pods(cluster))]:
        assert pod["metadata"]["labels"] == policy["podSelector"]["matchLabels"]


@pytest.mark.parametrize("kind", CLUSTERS)
def test_pods_are_closed_and_share_the_volume(kind: str) -> None:
    claim = ITEMS["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods(CLUSTERS[kind]):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["runAsUser"] > 0
        volume, *secrets = spec["volumes"]
        assert [s["secret"]["defaultMode"] for s in secrets] == [0o440] * (kind == "RayService")
        assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
        (container,) = spec["containers"]
        closed = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["securityContext"] == closed
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mount, *_ = container["volumeMounts"]
        values = {entry["name"]: entry["value"] for entry in container["env"]}
        assert values.pop("RSLLM_GPUS") == "1"
        assert all(value.startswith(mount["mountPath"]) for value in values.values())


@pytest.mark.parametrize("kind", CLUSTERS)
def test_gpu_workers_come_and_go(kind: str) -> None:
    (group,) = CLUSTERS[kind]["workerGroupSpecs"]
    assert CLUSTERS[kind]["enableInTreeAutoscaling"]
    assert (group["minReplicas"], group["replicas"]) == (0, 1)
    assert group["maxReplicas"] > 1
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_image_has_the_pinned_ray_and_the_script() -> None:
    text = (ROOT / "cluster/Dockerfile").read_text()
    (version,) = re.findall(r"^FROM rayproject/ray:([\d.]+)-py3(?:11|12)-gpu$", text, re.M)
    assert {cluster["rayVersion"] for cluster in CLUSTERS.values()} == {version}
    pinned = re.findall(r'"(ray\[.*?)"', (ROOT / "pyproject.toml").read_text())
    (specifier,) = {str(Requirement(text).specifier) for text in pinned}
    assert SpecifierSet(specifier).contains(version)
    copied = [line.split()[2:] for line in text.splitlines() if line.startswith("COPY")]
    assert all((ROOT / source).exists() for *sources, _ in copied for source in sources)
    script = ITEMS["RayJob"]["spec"]["entrypoint"].split()[1]
    assert (ROOT / script.removeprefix("/home/ray/")).is_file()
