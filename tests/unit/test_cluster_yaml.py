"""cluster/*.yaml without a cloud: what `ray up` and the clouds accept, refuse, and would start."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib

import pytest
import yaml
from cluster_files import AWS_RESOURCES, CLUSTER, REPOSITORY, SET, checked, locked, placeholders, read, started
from ray.serve.schema import ServeDeploySchema

from llm4msr.config import KnowledgeConfig
from llm4msr.knowledge.actors import MAX_CPUS_PER_ACTOR, plan_pool
from llm4msr.placement import Node
from llm4msr.settings import load_config
from llm4msr.training.run import MOST_CPUS_BESIDE_GPU

FILES = ["aws.yaml", "gcp.yaml", "local.yaml"]
CLOUDS = ["aws.yaml", "gcp.yaml"]


def pools(name: str) -> dict:
    found = checked(read(name))["available_node_types"]
    if name == "aws.yaml":
        for pool, resources in AWS_RESOURCES.items():
            found[pool]["resources"] = resources | found[pool]["resources"]
    return found


@pytest.mark.parametrize("name", FILES)
def test_ray_and_the_cloud_accept_the_file(name):
    checked(read(name))


def misspelt(config, key, wrong, *path):
    node = config
    for step in path:
        node = node[step]
    node[wrong] = node.pop(key)


POOL = ("available_node_types", "gpu")
NODE = (*POOL, "node_config")
DISK = (*NODE, "BlockDeviceMappings", 0, "Ebs")


def put(config, key, value, *path):
    node = config
    for step in path:
        node = node[step]
    node[key] = value


# File, what is changed in it, and what the error says.
REFUSED = [
    ("aws.yaml", misspelt, ("max_workers", "max_worker"), "'max_worker' was unexpected"),
    ("aws.yaml", misspelt, ("min_workers", "minWorkers", *POOL), "'minWorkers' was unexpected"),
    ("aws.yaml", put, ("head_node_type", "haed"), "`head_node_type` must be one of"),
    ("aws.yaml", put, ("min_workers", 5, *POOL), "gpu: min_workers 5 > max_workers 4"),
    ("aws.yaml", put, ("max_workers", 0), "smaller than the sum of `min_workers`"),
    ("aws.yaml", put, ("serve", 0.5, "available_node_types", "serve", "resources"), "0.5 is not of type 'integer'"),
    ("aws.yaml", misspelt, ("run_options", "run_option", "docker"), "'run_option' was unexpected"),
    ("aws.yaml", misspelt, ("container_name", "container", "docker"), "Must provide a container"),
    ("aws.yaml", misspelt, ("worker_image", "image", *POOL, "docker"), "'image' was unexpected"),
    ("aws.yaml", misspelt, ("GroupName", "Name", "provider", "security_group"), "'Name' was unexpected"),
    ("aws.yaml", misspelt, ("ImageId", "ImageID", *NODE), 'Unknown parameter in input: "ImageID"'),
    ("aws.yaml", misspelt, ("MarketType", "Market", *NODE, "InstanceMarketOptions"), "Unknown .*MarketOptions: .Mar"),
    ("aws.yaml", misspelt, ("Encrypted", "Encrypt", *DISK), 'Unknown .*Ebs: "Encrypt"'),
    ("aws.yaml", put, ("VolumeSize", "150", *DISK), "Invalid type for parameter .*VolumeSize"),
    ("aws.yaml", put, ("VolumeType", "gp33", *DISK), "no VolumeType 'gp33'"),
    ("aws.yaml", put, ("InstanceType", "g6.2xlrage", *NODE), "no InstanceType 'g6.2xlrage'"),
    ("gcp.yaml", misspelt, ("resources", "resource", *POOL), "'resource' was unexpected|'resources' is a required"),
    ("gcp.yaml", misspelt, ("serviceAccounts", "serviceAccount", *NODE), "'serviceAccount' was unexpected"),
    ("gcp.yaml", misspelt, ("email", "mail", *NODE, "serviceAccounts", 0), "'mail' was unexpected"),
    ("gcp.yaml", put, ("scheduling", [{"preemptible": True}], *NODE), "is not of type 'object'"),
    ("gcp.yaml", put, ("provisioningModel", "SPOTTY", *NODE, "scheduling"), "'SPOTTY' is not one of"),
    ("local.yaml", misspelt, ("file_mounts", "file_mount"), "'file_mount' was unexpected"),
    ("local.yaml", put, ("worker_ips", "10.0.0.2", "provider"), "'10.0.0.2' is not of type 'array'"),
]


@pytest.mark.parametrize(("name", "change", "arguments", "message"), REFUSED)
def test_a_broken_file_is_refused(name, change, arguments, message):
    config = read(name)
    change(config, *arguments)
    with pytest.raises(Exception, match=message):
        checked(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_images_hold_the_locked_ray_and_our_python(name):
    config = read(name)
    python = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["requires-python"]
    tag = f"rayproject/ray:{locked()['ray']}-py{python.removeprefix('>=').replace('.', '')}"
    assert config["docker"]["image"] == f"{tag}-cpu"
    assert config["available_node_types"]["gpu"]["docker"]["worker_image"] == f"{tag}-gpu"
    # Only the pool with GPUs has another image.
    assert [kind for kind, pool in config["available_node_types"].items() if "docker" in pool] == ["gpu"]


def test_versions_written_down_agree_with_the_lock():
    pins = locked()
    found = {}
    for file in [*CLUSTER.glob("*.yaml"), *CLUSTER.glob("*.sh"), REPOSITORY / "docs" / "cluster.md"]:
        for package, version in re.findall(r"([A-Za-z0-9_.-]+)==([0-9][0-9.]*)", file.read_text()):
            found[package] = version
            assert pins.get(package, version) == version, f"{file.name}: {package}"
    assert {"gcsfs", "google-api-python-client"} <= set(found)


@pytest.mark.parametrize("name", CLOUDS)
def test_each_stage_starts_its_own_pool(name):
    kinds, most = pools(name), read(name)["max_workers"]
    # prepare, evaluate and score ask for CPUs; training without a GPU for a group of them.
    assert started(kinds, most, *[{"CPU": 1}] * 40) == ({"cpu": 3}, 0)
    # extract, as the command of docs/cluster.md plans it on a cluster of which only the CPU pool's first node is there
    flags = {"device": "cuda", "num_actors": [1, 4]}
    plan = plan_pool(KnowledgeConfig(**flags), [Node(0, 0), Node(int(kinds["cpu"]["resources"]["CPU"]), 0)])
    actor = {"GPU": plan.num_gpus, "CPU": plan.num_cpus}
    assert plan.max_actors == kinds["gpu"]["max_workers"]
    assert started(kinds, most, *[actor] * plan.max_actors) == ({"gpu": 4}, 0)
    # What the code may ask beside a GPU at most, so that "auto" never waits for a node that cannot be.
    assert max(MAX_CPUS_PER_ACTOR, MOST_CPUS_BESIDE_GPU) <= kinds["gpu"]["resources"]["CPU"]


def serve_options() -> dict:
    """The lines that docs/cluster.md gives for serve/config.yaml."""
    text = (REPOSITORY / "docs" / "cluster.md").read_text()
    (block,) = [b for b in re.findall(r"```yaml\n(.*?)```", text, re.S) if "ray_actor_options" in b]
    return yaml.safe_load(block)["ray_actor_options"]


@pytest.mark.parametrize("name", CLOUDS)
def test_replicas_run_in_the_serve_pool_and_nothing_else_does(name):
    kinds, most = pools(name), read(name)["max_workers"]
    config = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    (deployment,) = config["applications"][0]["deployments"]
    deployment["ray_actor_options"] = serve_options()
    options = ServeDeploySchema(**config).applications[0].deployments[0].ray_actor_options
    demand = options.resources | ({"CPU": options.num_cpus} if options.num_cpus else {})
    replicas = deployment["autoscaling_config"]["max_replicas"]
    assert started(kinds, most, *[demand] * replicas) == ({"serve": 2}, 0)
    # A replica that also asked for a CPU, as serve/config.yaml does, could never start there ...
    assert started(kinds, most, demand | {"CPU": 1}) == ({}, 1)
    # ... and batch work never goes there, however much there is.
    assert "serve" not in started(kinds, most, *[{"CPU": 1}] * 1000)[0]


@pytest.mark.parametrize("name", CLOUDS)
def test_custom_resources_are_asked_for(name):
    offered = {resource for pool in pools(name).values() for resource in pool["resources"]}
    assert offered - {"CPU", "GPU"} == set(serve_options()["resources"])


@pytest.mark.parametrize("name", CLOUDS)
def test_the_number_of_nodes_is_bounded(name):
    config, kinds = read(name), pools(name)
    assert config["max_workers"] <= 12 < sum(pool["max_workers"] for pool in kinds.values())
    launched, _ = started(kinds, config["max_workers"], *[{"GPU": 1}, {"CPU": 16}, {"serve": 7}] * 100)
    assert sum(launched.values()) == config["max_workers"]
    assert kinds["head"]["max_workers"] == 0 and kinds["head"]["resources"] == {"CPU": 0}
    assert 0 < config["idle_timeout_minutes"] <= 30 and config["provider"].get("cache_stopped_nodes", False) is False


def test_workers_are_spot_but_what_must_stay_is_not():
    spot = {"cpu": True, "gpu": True, "head": False, "serve": False}
    for name, pool in pools("aws.yaml").items():
        assert (pool["node_config"].get("InstanceMarketOptions", {}).get("MarketType") == "spot") == spot[name]
    for name, pool in pools("gcp.yaml").items():
        assert (pool["node_config"].get("scheduling", {}).get("provisioningModel") == "SPOT") == spot[name]


def test_storage_is_reached_by_roles():
    aws, gcp = pools("aws.yaml"), pools("gcp.yaml")
    profiles = {name: pool["node_config"]["IamInstanceProfile"]["Name"] for name, pool in aws.items()}
    assert profiles == {name: "llm4msr-head" if name == "head" else "llm4msr-worker" for name in aws}
    assert all(pool["node_config"]["MetadataOptions"]["HttpTokens"] == "required" for pool in aws.values())
    accounts = [pool["node_config"].get("serviceAccounts") for name, pool in gcp.items() if name != "head"]
    assert all(a[0]["email"] == "llm4msr-worker@a-project.iam.gserviceaccount.com" for a in accounts)


@pytest.mark.parametrize("name", [*FILES, "aws-roles.yaml", "prepare.sh", "setup-node.sh", "node-env.sh"])
def test_no_file_holds_a_key_or_a_token(name):
    text = (CLUSTER / name).read_text()
    assert not re.search(r"AKIA|ASIA[A-Z0-9]{8}|PRIVATE KEY|secret_access_key|RAY_AUTH_TOKEN=|aws_credentials", text)
    assert not re.search(r"\b[0-9a-f]{32,}\b", text)


@pytest.mark.parametrize("name", FILES)
def test_tokens_go_to_every_node_and_the_dashboard_to_nobody(name):
    config = checked(read(name))
    assert config["file_mounts"] == {"~/llm4msr": "build/cluster", "~/llm4msr-secrets": "~/.llm4msr-cluster"}
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in head and "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    # merge_setup_commands of Ray puts the common ones before those of a kind.
    for kind in ("head_setup_commands", "worker_setup_commands"):
        assert "bash ~/llm4msr/setup-node.sh" in config[kind]
    if name == "local.yaml":
        assert head.index("export RAY_enable_autoscaler_v2=0;") < head.index("ray start")
    else:
        assert all("IpPermissions" not in str(part) for part in (config["provider"], config["docker"]))


def test_what_nodes_find_in_their_environment(tmp_path):
    def environment() -> dict[str, str]:
        command = ["bash", "-c", f". {CLUSTER / 'node-env.sh'}; env -0"]
        out = subprocess.run(command, env={"HOME": str(tmp_path), "PATH": "/bin"}, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        return dict(line.split("=", 1) for line in out.stdout.split("\0") if "=" in line)

    found = environment()
    assert found["PATH"] == f"{tmp_path}/llm4msr-env/bin:/bin"
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/llm4msr-secrets/auth_token"
    assert found["LLM4MSR_TOKENS_FILE"] == f"{tmp_path}/llm4msr-secrets/serve_tokens"
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == found["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert int(found["RAY_JOB_STOP_WAIT_TIME_S"]) >= 30
    assert "AWS_CONFIG_FILE" not in found
    (tmp_path / "llm4msr-secrets").mkdir()
    (tmp_path / "llm4msr-secrets" / "aws_config").write_text("[default]\n")
    assert environment()["AWS_CONFIG_FILE"] == f"{tmp_path}/llm4msr-secrets/aws_config"


def test_everything_that_a_user_must_set_is_in_the_docs():
    docs = placeholders((REPOSITORY / "docs" / "cluster.md").read_text())
    for name in FILES:
        used = placeholders((CLUSTER / name).read_text())
        assert used and used <= docs, f"{name}: {sorted(used - docs)}"
        assert used <= set(SET)


def commands() -> list[list[str]]:
    """The indented lines of docs/cluster.md, with continued ones joined and comments left out."""
    text = (REPOSITORY / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    return [shlex.split(line, comments=True) for line in lines]


def test_what_the_docs_tell_to_type_exists(monkeypatch):
    from ray.dashboard.modules.job.cli import job_cli_group
    from ray.scripts.scripts import cli as ray_cli
    from ray.serve.scripts import cli as serve_cli

    seen = set()
    for command in commands():
        name, *rest = command
        group = {"ray": ray_cli, "serve": serve_cli}.get(name)
        if group and rest[0] == "job":
            group, rest = job_cli_group, rest[1:]
        if group:
            seen.add(rest[0])
            own, _, entrypoint = " ".join(rest[1:]).partition(" -- ")
            options = {option for parameter in group.commands[rest[0]].params for option in parameter.opts}
            assert {word for word in own.split() if word.startswith("-")} <= options, command
            assert all((REPOSITORY / word).is_file() for word in own.split() if word.endswith(".yaml")), command
            if entrypoint:
                argv = command[command.index("--config") + 2 :]
                config = load_config(argv, environ={})
                assert (config.knowledge.device, config.knowledge.num_actors) == ("cuda", (1, 4))
                assert config.train.num_workers == (1, 4)
        elif "/" in name and not name.startswith("."):
            assert (REPOSITORY / name).is_file() and os.access(REPOSITORY / name, os.X_OK), command
    assert {"up", "exec", "dashboard", "submit", "stop", "deploy", "down"} <= seen
