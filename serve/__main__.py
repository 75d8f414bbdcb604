"""Serves a checkpoint on this machine, in the foreground: ``python -m serve --workspace_uri workspace/demo``.

It starts a Ray of its own, which ends with it (Ctrl-C or SIGTERM). On a cluster, ``serve deploy serve/config.yaml``
is the way.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import Sequence
from typing import Any

from jobs.session import ray_session, tell, user_message
from llm4msr import logs
from llm4msr.config import ConfigError
from serve.tokens import FILE_VARIABLE, TOKENS_VARIABLE, Tokens

PROG = "python -m serve"
APP_NAME = "ranker"
ANSWER_TIMEOUT_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGINT or SIGTERM.

    Returns:
        Exit status: 0 stopped, 2 it cannot be served as asked (one clear message, no traceback).
    """
    options = _parse(argv)
    try:
        logs.set_up(logging.WARNING, logging.WARNING, logs.wanted_format() == "json", {"job": "serve"})
        _check_place(options.host, options.port)
        app = _build(options)
        token = None if options.auth == "off" else Tokens(os.environ).example(os.environ)
        print("Starting Ray Serve on this machine ...", flush=True)
        _stop_as_by_keyboard()
        with ray_session():
            _serve(app, options.host, options.port, token)
    except KeyboardInterrupt:
        return 0
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        tell(PROG, message)
        return 2
    return 0


def _build(options: argparse.Namespace) -> Any:
    from serve.app import build_app

    chosen = {name: getattr(options, name) for name in ("checkpoint_uri", "workspace_uri", "knowledge_uri")}
    # On a terminal the log would bury what is printed for people.
    chosen |= {"auth": options.auth, "access_log": options.access_log}
    return build_app({name: value for name, value in chosen.items() if value is not None})


def _serve(app: Any, host: str, port: int, token: str | None) -> None:
    from ray import serve as ray_serve

    _stop_as_by_keyboard()  # again: ray.init puts its own handler in place
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # importing ray.serve sets it to INFO
    ray_serve.start(http_options={"host": host, "port": port}, logging_config=quiet)
    ray_serve.run(app, name=APP_NAME, route_prefix="/", logging_config=quiet)
    try:
        _announce(host, port, token)
        threading.Event().wait()
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("Stopping.", flush=True)
        ray_serve.delete(APP_NAME)  # lets requests in flight end; what is left of Serve ends with Ray


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROG, description="Serve a ranker on this machine until Ctrl-C.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workspace_uri", help="serve the checkpoint that this workspace's report.json names")
    source.add_argument("--checkpoint_uri", help="serve this checkpoint, local or s3://")
    parser.add_argument(
        "--knowledge_uri", help="with --checkpoint_uri: where explanations find prompts, WORKSPACE/knowledge/NAME"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="default: 8000")
    parser.add_argument(
        "--auth",
        choices=["tokens", "off"],
        default="tokens",
        help=f"tokens (default): callers need one of those in {TOKENS_VARIABLE} or {FILE_VARIABLE}; off: everybody may",
    )
    parser.add_argument("--access_log", action="store_true", help="a JSON line for every request on stderr")
    return parser.parse_args(argv)


def _check_place(host: str, port: int) -> None:
    """Refuses what cannot work before Ray is started, which takes seconds."""
    if os.environ.get("RAY_ADDRESS"):
        raise ConfigError(
            f"RAY_ADDRESS={os.environ['RAY_ADDRESS']} names a cluster, and this command serves from a Ray of its own: "
            "unset it, or deploy there with: serve deploy serve/config.yaml"
        )
    if not 1 <= port <= 65535:
        raise ConfigError(f"--port {port}: a port is a number from 1 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as error:
        raise ConfigError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error.strerror}. Choose another port with --port, "
            f"for example: {PROG} ... --port {port + 1 if port < 65535 else 8000}"
        ) from error


def _stop_as_by_keyboard() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)


def _announce(host: str, port: int, token: str | None) -> None:
    """Asks the server what it serves and prints it, with a request that works."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{reachable}:{port}"
    asked = urllib.request.Request(f"{url}/v1/model")
    if token is not None:
        asked.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(asked, timeout=ANSWER_TIMEOUT_S) as answer:
        model: dict[str, Any] = json.load(answer)
    example = {name: value for name, value in model["example"].items() if value is not None}
    body = shlex.quote(json.dumps(example, ensure_ascii=False))
    who = "" if token is None else " -H 'authorization: Bearer YOUR-TOKEN'"
    print(
        f"Serving {model['model_version']} ({model['num_users']} users, {model['num_items']} items) at {url}\n"
        f"Scenarios: {', '.join(s['name'] for s in model['scenarios'])}\n"
        f"Look:      {url}/ in a browser\n"
        f"Describe:  curl -s {url}/v1/model{who}\n"
        f"Ask:       curl -s {url}/v1/rank{who} -H 'content-type: application/json' -d {body}\n"
        "Stop:      Ctrl-C",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
