"""What kustomize makes of cluster/kuberay, for the tests."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERAY = REPOSITORY / "cluster" / "kuberay"
OVERLAYS = ("dev", "prod")
PARTS = ("common", "cluster", "jobs", "service")
VERBS = ("prepare", "extract", "train", "evaluate", "pipeline", "compare", "score")
# Where each kind holds the specification of a Ray cluster.
CLUSTER_FIELD = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, for its kustomize")


def pinned(package: str) -> str:
    """Returns the version of a package in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{package}=="))


def project() -> dict[str, Any]:
    """Returns the table `project` of pyproject.toml."""
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@functools.cache
def _built(folder: Path) -> tuple[dict[str, Any], ...]:
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


def built(overlay: str, part: str) -> list[dict[str, Any]]:
    """Returns the objects of a part of an overlay, fresh copies each time."""
    return deepcopy(list(_built(KUBERAY / "overlays" / overlay / part)))


def built_at(folder: Path) -> list[dict[str, Any]]:
    """Returns the objects of any folder with a kustomization."""
    return deepcopy(list(_built(folder)))


def one(overlay: str, part: str, kind: str, name: str | None = None) -> dict[str, Any]:
    """Returns the one object of a kind, and of a name where there are several."""
    found = [d for d in built(overlay, part) if d["kind"] == kind and name in (None, d["metadata"]["name"])]
    assert len(found) == 1, [d["metadata"]["name"] for d in found]
    return found[0]


def ray_objects(overlay: str) -> list[dict[str, Any]]:
    """Returns the objects of an overlay that hold a Ray cluster."""
    return [d for part in PARTS for d in built(overlay, part) if d["kind"] in CLUSTER_FIELD]


def cluster_of(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the specification of the Ray cluster of an object."""
    field = CLUSTER_FIELD[document["kind"]]
    return document["spec"] if field is None else document["spec"][field]


def groups_of(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the groups of an object's cluster by name; the head's is "head"."""
    cluster = cluster_of(document)
    return {"head": cluster["headGroupSpec"]} | {group["groupName"]: group for group in cluster["workerGroupSpecs"]}


def pods_of(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the pod templates of an object, each with a name to know it by."""
    name = document["metadata"]["name"]
    for group, spec in groups_of(document).items():
        yield f"{name}/{group}", spec["template"]
    if document["kind"] == "RayJob":
        yield f"{name}/submitter", document["spec"]["submitterPodTemplate"]


def all_pods(overlay: str) -> dict[str, dict[str, Any]]:
    """Returns every pod template of an overlay."""
    return {name: pod for document in ray_objects(overlay) for name, pod in pods_of(document)}


def amount(text: str | int) -> float:
    """Returns a quantity of processors or memory as a number."""
    for suffix, factor in (("Gi", 2**30), ("Mi", 2**20), ("m", 1e-3)):
        if str(text).endswith(suffix):
            return float(str(text).removesuffix(suffix)) * factor
    return float(text)
