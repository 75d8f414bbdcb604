"""What can go wrong before anything is deployed, and the deployment file."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.schema import ServeDeploySchema
from tiny import tiny_checkpoint, tiny_prepared

from llm4msr import storage
from llm4msr.config import ConfigError
from serve.__main__ import main
from serve.app import ServeArgs, build_app, find_checkpoint, parse_args

CONFIG = Path(__file__).resolve().parents[2] / "serve" / "config.yaml"


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """What a pipeline leaves, as far as serving is concerned."""
    folder = tmp_path_factory.mktemp("workspace")
    prepared = tiny_prepared(str(folder / "prepared"))
    tiny_checkpoint(str(folder / "runs" / "x" / "checkpoint"), prepared, None)
    storage.write_json(str(folder / "report.json"), {"checkpoint": "runs/x/checkpoint"})
    return folder


class TestArgs:
    def test_text_from_the_command_line_is_converted(self):
        args = parse_args({"checkpoint_uri": "c", "max_candidates": "50", "num_cpus": "0.5", "num_replicas": "3"})

        assert args == ServeArgs(checkpoint_uri="c", max_candidates=50, num_cpus=0.5, num_replicas=3)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({}, "give either checkpoint_uri or workspace_uri"),
            ({"checkpoint_uri": "c", "workspace_uri": "w"}, "give either checkpoint_uri or workspace_uri"),
            ({"checkpoint_uri": "c", "max_candidate": 5}, "max_candidate: no such argument; valid: checkpoint_uri, w"),
            ({"checkpoint_uri": "c", "max_candidates": 0}, "max_candidates: .*greater than or equal to 1 .found 0."),
            ({"checkpoint_uri": "c", "num_cpus": "many"}, "num_cpus: .*valid number.* .found 'many'."),
            ({"checkpoint_uri": "c", "min_replicas": 2}, "min_replicas and max_replicas go together"),
            ({"checkpoint_uri": "c", "min_replicas": 3, "max_replicas": 2}, "min_replicas 3 is more than max_repli"),
            ({"checkpoint_uri": "c", "min_replicas": 1, "max_replicas": 2, "num_replicas": 2}, "for a fixed number"),
        ],
    )
    def test_refuses(self, args, message):
        with pytest.raises(ConfigError, match=message):
            parse_args(args)


class TestCheckpoint:
    def test_the_report_names_it(self, workspace):
        uri = find_checkpoint(ServeArgs(workspace_uri=str(workspace)))

        assert uri == str(workspace / "runs" / "x" / "checkpoint")

    def test_a_moved_workspace_is_served_from_where_it_is_now(self, workspace, tmp_path):
        moved = shutil.copytree(workspace, tmp_path / "moved")

        assert find_checkpoint(ServeArgs(workspace_uri=str(moved))) == str(moved / "runs" / "x" / "checkpoint")

    def test_a_relative_place_is_made_absolute(self, monkeypatch, tmp_path):
        """Replicas have another working directory."""
        monkeypatch.chdir(tmp_path)

        assert find_checkpoint(ServeArgs(checkpoint_uri="runs/c")) == str(tmp_path / "runs" / "c")
        assert find_checkpoint(ServeArgs(checkpoint_uri="s3://b/c")) == "s3://b/c"

    def test_no_report(self, tmp_path):
        with pytest.raises(
            storage.StorageError, match=r"report.json: no such file.* run make demo, or .*jobs.pipeline"
        ):
            build_app({"workspace_uri": str(tmp_path)})

    def test_a_report_of_something_else(self, tmp_path):
        storage.write_json(str(tmp_path / "report.json"), {"results": []})

        with pytest.raises(storage.StorageError, match="names no checkpoint:"):
            build_app({"workspace_uri": str(tmp_path)})

    def test_a_bad_checkpoint_is_found_before_it_is_deployed(self, workspace, tmp_path):
        with pytest.raises(storage.StorageError, match="nowhere does not exist"):
            build_app({"checkpoint_uri": str(tmp_path / "nowhere")})
        with pytest.raises(storage.StorageError, match="not a checkpoint"):
            build_app({"checkpoint_uri": str(workspace / "prepared")})

    def test_options_reach_the_deployment(self, workspace):
        fixed = build_app({"workspace_uri": str(workspace), "num_replicas": 3, "num_cpus": 2})
        scaled = build_app({"workspace_uri": str(workspace), "min_replicas": 2, "max_replicas": 5})

        assert isinstance(fixed, Application)
        deployment = fixed._bound_deployment
        assert (deployment.num_replicas, deployment.ray_actor_options["num_cpus"]) == (3, 2)
        assert deployment._deployment_config.max_surge_percent == 100
        scaling = scaled._bound_deployment._deployment_config.autoscaling_config
        assert (scaling.min_replicas, scaling.max_replicas) == (2, 5)


class TestCommand:
    def refusal(self, capsys, *argv: str) -> str:
        assert main(argv) == 2
        return capsys.readouterr().err

    def test_a_port_in_use(self, capsys, workspace):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]

            message = self.refusal(capsys, "--workspace_uri", str(workspace), "--port", str(port))

        assert f"cannot listen on 127.0.0.1:{port}: Address already in use. Choose another port with --port" in message

    def test_no_such_port_or_host(self, capsys, workspace):
        source = ("--workspace_uri", str(workspace))
        assert "a port is a number from 1 to 65535" in self.refusal(capsys, *source, "--port", "70000")
        assert "--host 300.1.1.1: " in self.refusal(capsys, *source, "--host", "300.1.1.1")

    def test_a_cluster_is_not_what_this_command_is_for(self, capsys, monkeypatch, workspace):
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")

        message = self.refusal(capsys, "--workspace_uri", str(workspace))

        assert "RAY_ADDRESS=10.0.0.1:6379 names a cluster" in message
        assert "serve deploy serve/config.yaml" in message

    def test_nothing_to_serve(self, capsys, tmp_path):
        """Found before Ray is started."""
        message = self.refusal(capsys, "--workspace_uri", str(tmp_path))

        assert "report.json: no such file, so there is nothing to serve: run make demo" in message


def unknown_keys(model: Any, value: Any, place: str = "") -> list[str]:
    """Lists keys that Ray Serve's schema would ignore."""
    if get_origin(model) in (Union, UnionType):
        options = [unknown_keys(member, value, place) for member in get_args(model) if member is not type(None)]
        return min(options, key=len)
    if get_origin(model) is list and isinstance(value, list):
        return [u for i, v in enumerate(value) for u in unknown_keys(get_args(model)[0], v, f"{place}[{i}]")]
    if not (isinstance(model, type) and issubclass(model, BaseModel) and isinstance(value, dict)):
        return []
    found = [f"{place}.{key}" for key in value if key not in model.model_fields]
    for name, field in model.model_fields.items():
        if name in value:
            # Ray declares this one as any dictionary.
            nested = AutoscalingConfig if name == "autoscaling_config" else field.annotation
            found += unknown_keys(nested, value[name], f"{place}.{name}")
    return found


class TestConfigFile:
    def test_ray_serve_takes_it(self):
        config = yaml.safe_load(CONFIG.read_text())

        ServeDeploySchema.model_validate(config)
        assert unknown_keys(ServeDeploySchema, config) == []

    @pytest.mark.parametrize(
        ("path", "key"),
        [
            ((), "proxy_locations"),
            (("http_options",), "request_timeout"),
            (("applications", 0), "import"),
            (("applications", 0, "deployments", 0), "max_ongoing_request"),
            (("applications", 0, "deployments", 0, "ray_actor_options"), "num_cpu"),
            (("applications", 0, "deployments", 0, "autoscaling_config"), "min_replica"),
        ],
    )
    def test_a_typing_error_would_be_found(self, path, key):
        config = yaml.safe_load(CONFIG.read_text())
        node = config
        for part in path:
            node = node[part]
        node[key] = 1

        assert [found.rsplit(".", 1)[-1] for found in unknown_keys(ServeDeploySchema, config)] == [key]

    def test_it_names_what_exists(self, workspace):
        (application,) = yaml.safe_load(CONFIG.read_text())["applications"]
        (deployment,) = application["deployments"]

        assert application["import_path"] == f"{build_app.__module__}:{build_app.__name__}"
        assert parse_args(application["args"]).max_candidates == 2000
        assert deployment["name"] == build_app({"workspace_uri": str(workspace)})._bound_deployment.name
