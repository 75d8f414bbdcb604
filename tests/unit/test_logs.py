"""Log lines as text and as JSON: fields, context, tracebacks, lines of libraries and of other processes."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm4msr import logs
from llm4msr.config import ConfigError
from serve.app import log_to_stderr

REPOSITORY = Path(__file__).resolve().parents[2]
FIELDS = {"time", "level", "logger", "message", "job", "run", "stage", "rank", "pid"}


def run(script: str, **environment: str) -> tuple[list[str], str]:
    """Runs Python in a process of its own; returns the lines of its stderr, and its stdout."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    return done.stderr.splitlines(), done.stdout


SCRIPT = """
import logging, sys, warnings
from llm4msr import logs
logs.set_up(logging.WARNING, logging.INFO, logs.is_json(), {"job": "jobs.train"})
log = logging.getLogger("llm4msr.training")
log.info("loss %.1f", 0.5)
with logs.about(run="star-llm", stage="train", rank=1):
    log.warning("line one\\nline two")
    library = logging.getLogger("ray.train")  # as an import in the middle of a job does
    library.addHandler(logging.StreamHandler())
    library.propagate = False
    with logs.about(rank=2):
        library.warning("from a library")
logging.getLogger("other").info("below the level")
logging.getLogger("other").error("seen")
warnings.warn("careful")
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it failed")
raise KeyError("nobody catches it")
"""


def test_each_line_is_one_object_with_the_same_fields():
    lines, _ = run(SCRIPT, LLM4MSR_LOG_FORMAT="json")
    found = [json.loads(line) for line in lines]
    assert all(set(line) - {"exception"} == FIELDS for line in found)
    first, second, library, other, warning, handled, uncaught = found
    assert (first["level"], first["logger"], first["message"]) == ("INFO", "llm4msr.training", "loss 0.5")
    assert (first["job"], first["run"], first["stage"], first["rank"]) == ("jobs.train", None, None, None)
    assert first["time"] > 1.7e9 and isinstance(first["pid"], int)
    assert second["message"] == "line one\nline two"
    assert (second["run"], second["stage"], second["rank"]) == ("star-llm", "train", 1)
    assert (library["logger"], library["message"], library["rank"]) == ("ray.train", "from a library", 2)
    assert (other["logger"], other["message"], other["run"]) == ("other", "seen", None)
    assert "careful" in warning["message"] and warning["level"] == "WARNING"
    assert handled["message"] == "it failed" and "ZeroDivisionError" in handled["exception"]
    assert uncaught["level"] == "CRITICAL" and "KeyError: 'nobody catches it'" in uncaught["exception"]


def test_text_stays_as_it_was():
    lines, _ = run(SCRIPT)
    assert lines[0][8:] == " llm4msr.training: loss 0.5" and lines[0][2] == ":"
    assert lines[3] == "from a library"
    assert any(line.endswith(" other: seen") for line in lines)
    assert lines[-1] == "KeyError: 'nobody catches it'"


def test_another_format_is_refused(monkeypatch):
    monkeypatch.setenv("LLM4MSR_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match=r"LLM4MSR_LOG_FORMAT = 'xml': give one of text, json"):
        logs.wanted_format()
    monkeypatch.setenv("LLM4MSR_LOG_FORMAT", "")
    assert logs.wanted_format() == "text" and not logs.is_json()


def test_lines_of_other_processes():
    own = logs.json_line({"time": 1.5, "level": "INFO", "logger": "llm4msr.training", "message": "epoch", "rank": 1})
    said = ["\x1b[36m" + own + "\x1b[0m", "", "  tensors\x1b[0m are large  ", '{"not": "ours"}', "[1]", '{"half']
    found = [json.loads(line) for line in logs.worker_lines({"lines": said, "pid": 7, "actor_name": "EncodeUnit"})]
    assert found[0] == json.loads(own)
    assert [line["message"] for line in found[1:]] == ["  tensors are large", '{"not": "ours"}', "[1]", '{"half']
    assert all(set(line) == FIELDS and line["logger"] == "ray.EncodeUnit" and line["pid"] == 7 for line in found[1:])
    (line,) = logs.worker_lines({"lines": ["x"], "pid": "raylet"})
    assert json.loads(line)["logger"] == "ray.worker" and line.endswith("\n")


def test_a_request_of_a_replica_is_one_object(monkeypatch):
    record = {"time": 1.5, "path": "/v1/rank", "status": 200}

    def line(name: str) -> str:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        log = logging.getLogger(name)
        log_to_stderr(log)
        log.info("%s", logs.json_line(record), extra={"fields": record})
        return sys.stderr.getvalue()

    assert line("test.bare") == '{"time": 1.5, "path": "/v1/rank", "status": 200}\n'
    monkeypatch.setenv("LLM4MSR_LOG_FORMAT", "json")
    found = json.loads(line("test.json"))
    assert set(found) == FIELDS | {"path", "status"} and found["logger"] == "test.json"
    assert (found["time"], found["path"], found["message"]) == (1.5, "/v1/rank", None)
