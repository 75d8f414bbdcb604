"""Brings another checkpoint into a running deployment, or the one before back.

    python -m serve.rollout --checkpoint_uri s3://.../checkpoint             # all requests, from the next one on
    python -m serve.rollout --canary_uri s3://.../checkpoint --share 0.05    # a shadow for 5 % of the users
    python -m serve.rollout --back                                           # the checkpoint that was served before

No replica restarts and no request is lost: only the deployment's ``user_config`` changes (`serve.served.Choice`). The
checkpoint is loaded and asked its golden requests here first. Then the replicas do the same; should one refuse what the
others took, or not be ready in time, the configuration of before is put back.

Talks to the dashboard of the cluster, and to the endpoint itself to see who answers. ``RAY_AUTH_MODE=token`` and
LLM4MSR_TOKENS or LLM4MSR_TOKENS_FILE are honoured.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from jobs.session import user_message
from llm4msr import storage
from llm4msr.config import ConfigError
from serve.served import load_ranker, parse_choice
from serve.tokens import FILE_VARIABLE, TOKENS_VARIABLE, Tokens

PROG = "python -m serve.rollout"
DEPLOYMENT = "ranker"
POLL_S, ANSWER_TIMEOUT_S = 0.2, 10
ANSWERS_PER_REPLICA = 10  # with so many the same in a row, hardly a replica was not among those that gave them


class RolloutError(ValueError):
    """The deployment did not take what was asked; it serves what it served before."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        Exit status: 0 all replicas serve what was asked, 2 they do not; what was served before is still served.
    """
    options = _parse(argv)
    try:
        print(rollout(options))
    except Exception as error:
        message = str(error) if isinstance(error, RolloutError) else user_message(error)
        if message is None:
            raise
        print(f"{PROG}: {message}", file=sys.stderr)
        return 2
    return 0


def rollout(options: argparse.Namespace) -> str:
    """Changes what is served; returns what to tell the operator.

    Raises:
        ConfigError: What is asked for is not possible.
        StorageError: The checkpoint cannot be served.
        RolloutError: The replicas did not take it; the configuration of before is back.
    """
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    try:
        client = ServeSubmissionClient(options.address)
        details = client.get_serve_details()
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--address {options.address}: no dashboard of Ray answers there: {error}") from error
    before = current_choice(details, options.app)
    asked = next_choice(before, options)
    if asked == before:
        return f"{asked['checkpoint_uri']} is served already"
    for uri in filter(None, (asked["checkpoint_uri"], (asked.get("canary") or {}).get("checkpoint_uri"))):
        load_ranker(storage.absolute(uri))
    url = options.url or _endpoint(options.address, details, options.app)
    num_replicas = len(details["applications"][options.app]["deployments"][DEPLOYMENT]["replicas"])
    client.deploy_applications(changed_config(details, options.app, asked))
    try:
        version = wait_until_served(url, asked, max(num_replicas, 1), options.timeout_s)
    except RolloutError:
        client.deploy_applications(changed_config(details, options.app, before))
        raise
    beside = ""
    if canary := asked.get("canary"):
        beside = f", beside it {canary['checkpoint_uri']} ({canary['mode']}, {canary['share']:g} of the users)"
    return f"{version} is served{beside}. Back: {PROG} --address {options.address} --back"


def current_choice(details: dict[str, Any], app: str) -> dict[str, Any]:
    """Returns the ``user_config`` that is in force.

    Raises:
        ConfigError: There is no such application, or it is not one that ``serve deploy`` made.
    """
    found = details["applications"].get(app)
    if found is None:
        raise ConfigError(f"--app {app}: no such application; there are {', '.join(details['applications']) or 'none'}")
    if found.get("deployed_app_config") is None:
        raise ConfigError(f"--app {app}: it was not deployed from a file: start it with serve deploy serve/config.yaml")
    return found["deployments"][DEPLOYMENT]["deployment_config"]["user_config"]


def next_choice(before: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Returns the ``user_config`` that is asked for.

    Raises:
        ConfigError: Nothing was served before, or the values are not valid.
    """
    if options.back:
        if not before.get("previous_uri"):
            raise ConfigError("--back: this deployment has served no other checkpoint before")
        tree = {"checkpoint_uri": before["previous_uri"], "previous_uri": before["checkpoint_uri"]}
    elif options.checkpoint_uri:
        uri = storage.absolute(options.checkpoint_uri)
        tree = dict(before, canary=None)
        if uri != before["checkpoint_uri"]:
            tree |= {"checkpoint_uri": uri, "previous_uri": before["checkpoint_uri"]}
    else:
        canary = {"checkpoint_uri": storage.absolute(options.canary_uri), "share": options.share, "mode": options.mode}
        tree = dict(before, canary=canary)
    return parse_choice(tree).model_dump(exclude_none=True)


def changed_config(details: dict[str, Any], app: str, choice: dict[str, Any]) -> dict[str, Any]:
    """Returns the configuration of all applications with another ``user_config`` of ours."""
    applications = []
    for name, found in details["applications"].items():
        if (deployed := copy.deepcopy(found.get("deployed_app_config"))) is None:
            continue
        if name == app:
            deployments = deployed.setdefault("deployments", [])
            ours = next((one for one in deployments if one["name"] == DEPLOYMENT), None)
            if ours is None:
                ours = {"name": DEPLOYMENT}
                deployments.append(ours)
            ours["user_config"] = choice
        applications.append(deployed)
    kept = {name: details[name] for name in ("proxy_location", "http_options", "grpc_options") if details.get(name)}
    return {**kept, "applications": applications}


def wait_until_served(url: str, choice: dict[str, Any], num_replicas: int, timeout_s: float) -> str:
    """Asks until so many answers in a row are of the checkpoint that all replicas must have it; returns its version.

    Raises:
        RolloutError: A replica refused it, or not all have it in time.
    """
    deadline, same, version, error = time.monotonic() + timeout_s, 0, "", "no answer"
    wanted = (choice["checkpoint_uri"], (choice.get("canary") or {}).get("checkpoint_uri"))
    while time.monotonic() < deadline:
        try:
            model = _get_model(url)
        except (OSError, ValueError) as problem:
            same, error = 0, str(problem)
            time.sleep(POLL_S)
            continue
        refused = model["refused"]
        if refused is not None and refused["checkpoint_uri"] in wanted:
            raise RolloutError(f"{refused['checkpoint_uri']} was refused: {refused['reason']}; nothing has changed")
        served = (model["checkpoint_uri"], model["canary"] and model["canary"]["checkpoint_uri"])
        same = same + 1 if served == wanted else 0
        version, error = model["model_version"], f"a replica still serves {model['model_version']}"
        if same >= ANSWERS_PER_REPLICA * num_replicas:
            return version
        if not same:
            time.sleep(POLL_S)
    raise RolloutError(f"not every replica served it after {timeout_s:g} s ({error}); put back what was there before")


def _get_model(url: str) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/v1/model")
    if TOKENS_VARIABLE in os.environ or FILE_VARIABLE in os.environ:
        request.add_header("Authorization", f"Bearer {Tokens(os.environ).example(os.environ)}")
    with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as answer:
        return json.load(answer)


def _endpoint(address: str, details: dict[str, Any], app: str) -> str:
    port = (details.get("http_options") or {}).get("port") or 8000
    prefix = (details["applications"][app].get("route_prefix") or "/").rstrip("/")
    return f"http://{urlsplit(address).hostname}:{port}{prefix}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROG, description="Change the checkpoint of a running deployment.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint_uri", help="serve this one; ends a canary or shadow")
    what.add_argument("--canary_uri", help="put this one beside the one that is served")
    what.add_argument("--back", action="store_true", help="serve what was served before")
    parser.add_argument("--share", type=float, default=0.05, help="of the users who meet the canary (default: 0.05)")
    parser.add_argument(
        "--mode",
        choices=["shadow", "answer"],
        default="shadow",
        help="shadow: compared only (default); answer: it answers",
    )
    default = os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265")
    parser.add_argument("--address", default=default, help=f"dashboard of the cluster (default: {default})")
    parser.add_argument("--url", help="the endpoint (default: the address's host and the deployment's port)")
    parser.add_argument("--app", default="ranker", help="application (default: ranker)")
    parser.add_argument("--timeout_s", type=float, default=300, help="longest wait for the replicas (default: 300)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
