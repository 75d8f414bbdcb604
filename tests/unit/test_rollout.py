"""What a roll-out asks of the cluster, and how it tells that all replicas have it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llm4msr.config import ConfigError
from serve import rollout as module
from serve.rollout import RolloutError, changed_config, current_choice, main, next_choice, wait_until_served

OLD, NEW = "/models/old", "/models/new"


def details(user_config=None, deployments=None):
    config = {"name": "ranker", "import_path": "serve.app:build_app", "args": {"auth": "off"}}
    config |= {} if deployments is None else {"deployments": deployments}
    running = {"deployment_config": {"user_config": user_config or {"checkpoint_uri": OLD}}, "replicas": [{}, {}]}
    return {
        "proxy_location": "EveryNode",
        "http_options": {"port": 8000},
        "grpc_options": None,
        "proxies": {},
        "applications": {
            "ranker": {"deployed_app_config": config, "deployments": {"ranker": running}, "route_prefix": "/"},
            "other": {"deployed_app_config": {"name": "other", "import_path": "a:b"}, "deployments": {}},
            "by hand": {"deployed_app_config": None, "deployments": {}},
        },
    }


def options(*argv):
    return module._parse(argv)


def test_the_checkpoint_that_is_served_becomes_the_one_before():
    before = {"checkpoint_uri": OLD, "previous_uri": "/models/older"}
    new = next_choice(before, options("--checkpoint_uri", NEW))
    assert new == {"checkpoint_uri": NEW, "previous_uri": OLD}
    assert next_choice(new, options("--back")) == {"checkpoint_uri": OLD, "previous_uri": NEW}
    assert next_choice(new, options("--checkpoint_uri", NEW)) == new
    with pytest.raises(ConfigError, match="--back: this deployment has served no other checkpoint before"):
        next_choice({"checkpoint_uri": OLD}, options("--back"))


def test_a_canary_stands_beside_and_ends_with_the_next_checkpoint():
    with_canary = next_choice({"checkpoint_uri": OLD}, options("--canary_uri", NEW, "--share", "0.2"))
    assert with_canary == {
        "checkpoint_uri": OLD,
        "canary": {"checkpoint_uri": NEW, "share": 0.2, "mode": "shadow"},
    }
    assert next_choice(with_canary, options("--checkpoint_uri", NEW)) == {"checkpoint_uri": NEW, "previous_uri": OLD}
    assert next_choice(with_canary, options("--checkpoint_uri", OLD)) == {"checkpoint_uri": OLD}
    with pytest.raises(ConfigError, match=r"canary\.share: Input should be less than or equal to 1"):
        next_choice({"checkpoint_uri": OLD}, options("--canary_uri", NEW, "--share", "5"))


@pytest.mark.parametrize("deployments", [None, [], [{"name": "ranker", "num_replicas": 2, "user_config": {"x": 1}}]])
def test_only_our_user_config_changes(deployments):
    found = details(deployments=deployments)
    kept = json.dumps(found)
    config = changed_config(found, "ranker", {"checkpoint_uri": NEW})
    assert json.dumps(found) == kept
    ours, other = config.pop("applications")
    assert config == {"proxy_location": "EveryNode", "http_options": {"port": 8000}}
    assert other == {"name": "other", "import_path": "a:b"}
    (deployment,) = ours.pop("deployments")
    assert deployment == {
        **(deployments[0] if deployments else {"name": "ranker"}),
        "user_config": {"checkpoint_uri": NEW},
    }
    assert ours == {"name": "ranker", "import_path": "serve.app:build_app", "args": {"auth": "off"}}


def test_what_cannot_be_changed():
    assert current_choice(details(), "ranker") == {"checkpoint_uri": OLD}
    with pytest.raises(ConfigError, match="--app x: no such application; there are ranker, other, by hand"):
        current_choice(details(), "x")
    with pytest.raises(ConfigError, match="--app by hand: it was not deployed from a file"):
        current_choice(details(), "by hand")


def test_nobody_at_the_address(capsys):
    assert main(["--back", "--address", "http://127.0.0.1:9"]) == 2
    assert "--address http://127.0.0.1:9: no dashboard of Ray answers there" in capsys.readouterr().err


@pytest.fixture
def replicas():
    """A server whose answers to GET /v1/model come from a list, the last one for ever."""
    answers, asked = [], []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(dict(self.headers))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            if not isinstance(answer, int):
                self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", answers, asked
    server.shutdown()


def model(uri=NEW, canary=None, refused=None):
    return {"checkpoint_uri": uri, "model_version": uri[-3:], "canary": canary, "refused": refused}


def test_it_waits_until_nobody_gives_the_old_answer(replicas, monkeypatch):
    url, answers, asked = replicas
    monkeypatch.setenv("LLM4MSR_TOKENS", "a-valid-token-0123456")
    answers += [model(OLD), 503, *[model()] * 12, model(OLD), model()]
    assert wait_until_served(url, {"checkpoint_uri": NEW}, 2, 30) == "new"
    assert len(asked) == 1 + 1 + 12 + 1 + 20
    assert asked[0]["Authorization"] == "Bearer a-valid-token-0123456"


def test_a_canary_is_waited_for_too(replicas):
    url, answers, asked = replicas
    answers += [model(OLD), model(OLD, canary={"checkpoint_uri": NEW})]
    choice = {"checkpoint_uri": OLD, "canary": {"checkpoint_uri": NEW}}
    assert wait_until_served(url, choice, 1, 30) == "old" and len(asked) == 1 + 10


def test_a_refusal_and_a_replica_that_lags_end_it(replicas):
    url, answers, _ = replicas
    answers += [model(OLD, refused={"checkpoint_uri": "/models/other", "reason": "x"}), model(OLD)]
    with pytest.raises(RolloutError, match=r"not every replica served it after 1 s \(a replica still serves old\)"):
        wait_until_served(url, {"checkpoint_uri": NEW}, 1, 1)
    answers[:] = [model(OLD, refused={"checkpoint_uri": NEW, "reason": "it is damaged"})]
    with pytest.raises(RolloutError, match="/models/new was refused: it is damaged"):
        wait_until_served(url, {"checkpoint_uri": NEW}, 1, 5)
    answers[:] = [500]
    with pytest.raises(RolloutError, match="HTTP Error 500"):
        wait_until_served(url, {"checkpoint_uri": NEW}, 1, 0.5)
