"""The files of `cluster/` as `ray up` would read them, checked as strictly as is possible without a cloud.

`checked` goes on where Ray's own schema ends: what stands under ``node_config`` is compared with the cloud's API, by
the definition that its client library carries.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil

REPOSITORY = Path(__file__).resolve().parents[1]
CLUSTER = REPOSITORY / "cluster"
# What a user sets. The image of AWS is one that the simulated EC2 knows.
SET = {
    "CHANGE-ME-REGION": "us-east-1",
    "CHANGE-ME-AMI": "ami-12c6146b",
    "CHANGE-ME-PROJECT": "a-project",
    "CHANGE-ME-ZONE": "us-central1-a",
    "CHANGE-ME-IMAGE": "projects/a-project/global/images/an-image",
    "CHANGE-ME-HEAD": "10.0.0.1",
    "CHANGE-ME-HOST-1": "10.0.0.2",
    "CHANGE-ME-HOST-2": "10.0.0.3",
    "CHANGE-ME-USER": "somebody",
}
# What Ray reads from the types of EC2's instances; tests/integration/test_cluster_aws.py asks a simulated EC2 for it.
AWS_RESOURCES = {"cpu": {"CPU": 16}, "gpu": {"CPU": 8, "GPU": 1}}


def placeholders(text: str) -> set[str]:
    return set(re.findall(r"CHANGE-ME(?:-[A-Z0-9]+)*", text))


def read(name: str) -> dict[str, Any]:
    """Returns a cluster file with everything set that a user sets."""
    text = (CLUSTER / name).read_text()
    for placeholder in sorted(placeholders(text), key=len, reverse=True):
        text = text.replace(placeholder, SET[placeholder])
    return yaml.safe_load(text)


def locked() -> dict[str, str]:
    """Returns the version of every package in constraints.txt."""
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration with Ray's defaults.

    Raises:
        Exception: Ray, or the cloud, would refuse it.
    """
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    provider = config["provider"]["type"]
    pools = prepared["available_node_types"]
    for name, pool in pools.items():
        if pool["min_workers"] > pool["max_workers"]:
            raise ValueError(f"{name}: min_workers {pool['min_workers']} > max_workers {pool['max_workers']}")
        if provider == "aws":
            _check_run_instances(name, pool["node_config"])
        if provider == "gcp":
            _compute_engine().validate(pool["node_config"])
    return prepared


def _check_run_instances(name: str, node_config: dict[str, Any]) -> None:
    from botocore.validate import ParamValidator

    service = _ec2()
    call = node_config | {"MinCount": 1, "MaxCount": 1}
    report = ParamValidator().validate(call, service.operation_model("RunInstances").input_shape)
    if report.has_errors():
        raise ValueError(f"{name}: EC2 RunInstances: {report.generate_report()}")
    enums = [
        (node_config["InstanceType"], "InstanceType"),
        (node_config.get("InstanceMarketOptions", {}).get("MarketType", "spot"), "MarketType"),
        *((disk["Ebs"]["VolumeType"], "VolumeType") for disk in node_config["BlockDeviceMappings"]),
    ]
    for value, shape in enums:
        if value not in service.shape_for(shape).enum:
            raise ValueError(f"{name}: EC2 has no {shape} {value!r}")


@functools.cache
def _ec2() -> Any:
    from botocore.session import get_session

    return get_session().get_service_model("ec2")


@functools.cache
def _compute_engine() -> jsonschema.Draft7Validator:
    """Returns a check of an instance of Compute Engine in which no unknown field is allowed."""
    document = files("googleapiclient") / "discovery_cache" / "documents" / "compute.v1.json"
    kinds = json.loads(document.read_text())["schemas"]
    definitions: dict[str, Any] = {}

    def define(kind: str) -> dict[str, str]:
        if kind not in definitions:  # of more than a thousand, the few dozen that an instance is made of
            definitions[kind] = {}
            definitions[kind].update(strict(kinds[kind]))
        return {"$ref": f"#/definitions/{kind}"}

    def strict(node: dict[str, Any]) -> dict[str, Any]:
        if "$ref" in node:
            return define(node["$ref"])
        out = {key: node[key] for key in ("type", "enum") if key in node}
        if "items" in node:
            out["items"] = strict(node["items"])
        if "properties" in node:
            out["properties"] = {key: strict(value) for key, value in node["properties"].items()}
            out["additionalProperties"] = False
        elif "additionalProperties" in node:
            out["additionalProperties"] = strict(node["additionalProperties"])
        if node.get("format") in ("int64", "uint64"):
            out["type"] = ["string", "integer"]  # as JSON has them: either
        return out

    return jsonschema.Draft7Validator(define("Instance") | {"definitions": definitions})


def started(pools: dict[str, Any], max_workers: int, *bundles: dict[str, float]) -> tuple[dict[str, int], int]:
    """Asks Ray's autoscaler what it would start for some demands, on a cluster that has only its head.

    Returns:
        Nodes of each pool, and how many of the demands can never be met.
    """
    types = {
        name: NodeTypeConfig(name, 0, pool["max_workers"], resources=pool["resources"]) for name, pool in pools.items()
    }
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=types,
        max_num_nodes=max_workers,
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(b) for b in bundles]),
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {launch.instance_type: launch.count for launch in reply.to_launch}, len(reply.infeasible_resource_requests)
