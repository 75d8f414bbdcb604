"""cluster/aws.yaml against a simulated AWS: the roles, what `ray up` makes first, nodes started and ended.

What a real AWS would still have to show: image, ssh, set-up of the nodes, conditions of policies, spot capacity.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import boto3
import pytest
import requests
import yaml
from botocore.config import Config as BotoConfig
from botocore.exceptions import ClientError
from cluster_files import AWS_RESOURCES, CLUSTER, REPOSITORY, SET, read, started

REGION = SET["CHANGE-ME-REGION"]


@pytest.fixture(scope="module")
def roles(s3_server):
    """The stack of cluster/aws-roles.yaml."""
    # Asked once and waited for: a busy machine's second request would find the stack there already.
    patient = BotoConfig(read_timeout=600, retries={"total_max_attempts": 1})
    stacks = boto3.client("cloudformation", region_name=REGION, config=patient)
    stacks.create_stack(
        StackName="llm4msr-roles",
        TemplateBody=(CLUSTER / "aws-roles.yaml").read_text(),
        Parameters=[{"ParameterKey": "Bucket", "ParameterValue": "a-bucket"}],
        Capabilities=["CAPABILITY_NAMED_IAM"],
    )
    (stack,) = stacks.describe_stacks(StackName="llm4msr-roles")["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    yield boto3.client("iam", region_name=REGION)
    stacks.delete_stack(StackName="llm4msr-roles")


@pytest.fixture(scope="module")
def cluster(roles, tmp_path_factory):
    """The configuration as `ray up` completes it, and the home in which it left its key."""
    from moto.ec2.models.instance_types import InstanceTypeBackend
    from ray.autoscaler._private.commands import _bootstrap_config

    # Ray asks for every type that there is, and this EC2 takes seconds to write down all eight hundred.
    few = [kind for kind in InstanceTypeBackend.instance_types if kind.name.startswith(("g6.", "m6i."))]
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InstanceTypeBackend, "instance_types", few)
        patch.setenv("HOME", str(home))
        yield _bootstrap_config(read("aws.yaml"), no_config_cache=True), home


def tags(config: dict, pool: str) -> dict[str, str]:
    from ray.autoscaler import tags as names

    return {
        names.TAG_RAY_NODE_KIND: names.NODE_KIND_HEAD if pool == "head" else names.NODE_KIND_WORKER,
        names.TAG_RAY_USER_NODE_TYPE: pool,
        names.TAG_RAY_NODE_NAME: f"ray-{config['cluster_name']}-{pool}",
        names.TAG_RAY_LAUNCH_CONFIG: "a-digest",
        names.TAG_RAY_NODE_STATUS: names.STATUS_UNINITIALIZED,
    }


def describe(ids: list[str]) -> list[dict]:
    reservations = boto3.client("ec2", region_name=REGION).describe_instances(InstanceIds=ids)["Reservations"]
    return [instance for reservation in reservations for instance in reservation["Instances"]]


def test_what_ray_up_makes_first(cluster):
    config, home = cluster
    key = Path(config["auth"]["ssh_private_key"])
    assert key.parent == home / ".ssh" and stat.S_IMODE(key.stat().st_mode) == 0o600
    pools = config["available_node_types"]
    (group,) = {group for pool in pools.values() for group in pool["node_config"]["SecurityGroupIds"]}
    rules = boto3.resource("ec2", region_name=REGION).SecurityGroup(group).ip_permissions
    # From everywhere ssh alone; all else, the dashboard and Serve too, from the cluster's own nodes.
    public = [(rule["FromPort"], rule["ToPort"]) for rule in rules if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert public == [(22, 22)]
    assert [rule["UserIdGroupPairs"][0]["GroupId"] for rule in rules if rule["UserIdGroupPairs"]] == [group]


def test_ec2s_own_figures_are_those_that_pools_are_planned_with(cluster):
    config, _ = cluster
    pools = config["available_node_types"]
    for name, resources in AWS_RESOURCES.items():
        assert {kind: pools[name]["resources"][kind] for kind in resources} == resources
    assert pools["gpu"]["resources"]["accelerator_type:L4"] == 1
    assert pools["head"]["resources"]["CPU"] == pools["serve"]["resources"]["CPU"] == 0
    most = config["max_workers"]
    assert started(pools, most, {"CPU": 1}, {"CPU": 8, "GPU": 1}, {"serve": 1}) == ({"cpu": 1, "gpu": 1, "serve": 1}, 0)


def test_nodes_of_every_pool_start_and_end(cluster):
    from ray.autoscaler._private.providers import _get_node_provider

    config, _ = cluster
    provider = _get_node_provider(config["provider"], config["cluster_name"])
    ids = {}
    for pool, what in config["available_node_types"].items():
        node_config = config["head_node"] | what["node_config"] if pool == "head" else what["node_config"]
        (ids[pool],) = provider.create_node(node_config, tags(config, pool), 1)
    assert sorted(provider.non_terminated_nodes({})) == sorted(ids.values())
    for pool, instance in zip(ids, describe(list(ids.values())), strict=True):
        role = "head" if pool == "head" else "worker"
        assert instance["InstanceType"] == config["available_node_types"][pool]["node_config"]["InstanceType"]
        assert instance["IamInstanceProfile"]["Arn"].endswith(f":instance-profile/llm4msr-{role}")
        assert instance.get("InstanceLifecycle") == ("spot" if pool in ("cpu", "gpu") else None)
        assert instance["MetadataOptions"]["HttpTokens"] == "required"
        found = {tag["Key"]: tag["Value"] for tag in instance["Tags"]}
        assert found["project"] == "llm4msr" and found["ray-cluster-name"] == "llm4msr"
        (disk,) = instance["BlockDeviceMappings"]
        volume = boto3.resource("ec2", region_name=REGION).Volume(disk["Ebs"]["VolumeId"])
        assert (volume.size, volume.volume_type, volume.encrypted) == (150, "gp3", True)
    provider.terminate_nodes(list(ids.values()))
    # Ended, not stopped: a stopped node goes on costing its disk.
    assert {instance["State"]["Name"] for instance in describe(list(ids.values()))} == {"terminated"}


class Template(yaml.SafeLoader):
    """Reads CloudFormation's own tags (!Sub, !Ref) as what stands behind them."""


Template.add_multi_constructor("!", lambda loader, tag, node: loader.construct_scalar(node))


def keys_of_a_copy(iam, role: str) -> dict[str, str]:
    """Returns the keys of a role that may do the same to anything at any time: all that this IAM can tell apart."""
    resources = yaml.load((CLUSTER / "aws-roles.yaml").read_text(), Template)["Resources"]
    described = resources[f"{role.capitalize()}Role"]["Properties"]
    assert described["ManagedPolicyArns"] == ["BucketPolicy"]
    documents = [policy["PolicyDocument"] for policy in described.get("Policies", [])]
    documents.append(resources["BucketPolicy"]["Properties"]["PolicyDocument"])
    statements = [statement for document in documents for statement in document["Statement"]]
    assert {statement["Effect"] for statement in statements} == {"Allow"}
    alike = [{"Effect": "Allow", "Action": statement["Action"], "Resource": "*"} for statement in statements]
    trust = iam.get_role(RoleName=f"llm4msr-{role}")["Role"]["AssumeRolePolicyDocument"]
    copy = iam.create_role(RoleName=f"{role}-copy", AssumeRolePolicyDocument=json.dumps(trust))["Role"]
    document = {"Version": "2012-10-17", "Statement": alike}
    iam.put_role_policy(RoleName=copy["RoleName"], PolicyName="alike", PolicyDocument=json.dumps(document))
    given = boto3.client("sts", region_name=REGION).assume_role(RoleArn=copy["Arn"], RoleSessionName=role)
    return {
        "aws_access_key_id": given["Credentials"]["AccessKeyId"],
        "aws_secret_access_key": given["Credentials"]["SecretAccessKey"],
        "aws_session_token": given["Credentials"]["SessionToken"],
    }


def test_the_roles_are_enough_and_no_more(cluster, roles):
    """With the rights of the head alone nodes start and end; a worker may not start any, and nobody may do more."""
    from ray.autoscaler._private.providers import _get_node_provider

    config, _ = cluster
    keys = {role: keys_of_a_copy(roles, role) for role in ("head", "worker")}
    node_config = config["available_node_types"]["gpu"]["node_config"]
    check = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    assert requests.post(check, data="0").ok  # from now on nobody gets in without the right to it
    try:
        provider = _get_node_provider(config["provider"] | {"aws_credentials": keys["head"]}, config["cluster_name"])
        (node,) = provider.create_node(node_config, tags(config, "gpu"), 1)
        assert provider.non_terminated_nodes({}) == [node]
        provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
        provider.terminate_node(node)
        for role, client, call, arguments in [
            ("head", "iam", "create_user", {"UserName": "somebody"}),
            ("head", "ec2", "stop_instances", {"InstanceIds": [node]}),
            ("worker", "ec2", "run_instances", {"MinCount": 1, "MaxCount": 1, "ImageId": SET["CHANGE-ME-AMI"]}),
            ("worker", "ec2", "terminate_instances", {"InstanceIds": [node]}),
        ]:
            with pytest.raises(ClientError, match=r"UnauthorizedOperation|AccessDenied"):
                getattr(boto3.client(client, region_name=REGION, **keys[role]), call)(**arguments)
    finally:
        assert requests.post(check, data="inf").ok


def test_hosts_without_a_role_take_keys_and_address_from_the_file(bucket, tmp_path):
    """As on a host of one's own: nothing but aws_config among the secrets says where the storage is."""
    secrets = tmp_path / "llm4msr-secrets"
    secrets.mkdir()
    (secrets / "aws_config").write_text(
        "[default]\naws_access_key_id = testing\naws_secret_access_key = testing\nregion = us-east-1\n"
        f"endpoint_url = {os.environ['AWS_ENDPOINT_URL']}\n"
    )
    code = "from llm4msr import storage; storage.write_json('s3://{0}/a.json', 1); print(storage.read_json('s3://{0}/a.json'))"
    done = subprocess.run(
        ["bash", "-c", f'. {CLUSTER / "node-env.sh"}; "$0" -c "$1"', sys.executable, code.format(bucket)],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "1", done.stderr
