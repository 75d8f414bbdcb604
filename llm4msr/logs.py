"""How log lines look: text for people, or with ``LLM4MSR_LOG_FORMAT=json`` one JSON object a line, for collectors.

The object's fields, the same in jobs, extraction actors, training workers and replicas; null where there is nothing:

* time       seconds since 1970
* level      INFO, WARNING, ...
* logger     who says it
* message    what is said; exception: a traceback, where there is one
* job        such as jobs.train
* run        the run's name; before one has begun, the workspace
* stage      prepare, extract, train, evaluate, ...
* rank       of a training worker
* pid        of the process

A process learns by `set_up` how it shall log; Ray's workers from the hook that `jobs.session` gives them. What a
process does is one thing at a time, so `about` holds for all its threads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from llm4msr.config import ConfigError

FORMAT_VARIABLE = "LLM4MSR_LOG_FORMAT"
FORMATS = ("text", "json")
TEXT_FORMAT = "%(asctime)s %(name)s: %(message)s"
TIME_FORMAT = "%H:%M:%S"
CONTEXT = ("job", "run", "stage", "rank")
# Loggers of Ray that bring handlers of their own, each when it is first imported.
FOREIGN_LOGGERS = ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve")
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_context: dict[str, Any] = dict.fromkeys(CONTEXT)
_taken: list[logging.Handler] = []  # the handler of the root, once lines are JSON


def wanted_format() -> str:
    """Returns text or json, as the environment says.

    Raises:
        ConfigError: It says something else.
    """
    found = os.environ.get(FORMAT_VARIABLE) or FORMATS[0]
    if found not in FORMATS:
        raise ConfigError(f"{FORMAT_VARIABLE} = {found!r}: give one of {', '.join(FORMATS)}, or leave it unset")
    return found


def json_line(fields: Mapping[str, Any]) -> str:
    """Returns one line of JSON; what JSON does not know is written as text."""
    return json.dumps(fields, default=str)


class JsonFormatter(logging.Formatter):
    """One object a record. A record's attribute ``fields``, a mapping, stands in place of the message."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        fields = getattr(record, "fields", None)
        line = _line(record.levelname, record.name, None if fields else record.getMessage(), record.created)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json_line(line | (fields or {}))


def formatter(text_format: str = TEXT_FORMAT) -> logging.Formatter:
    """Returns what formats this process's lines: JSON where that is asked for, else text in the given format."""
    return JsonFormatter() if is_json() else logging.Formatter(text_format, TIME_FORMAT)


def is_json() -> bool:
    """Tells whether this process logs JSON."""
    return bool(_taken) or os.environ.get(FORMAT_VARIABLE) == "json"


def set_up(level: int, own_level: int, as_json: bool, context: Mapping[str, Any]) -> None:
    """Makes this process log to stderr.

    Args:
        level: Of everything but this project.
        own_level: Of this project.
        as_json: JSON or text.
        context: What is known of `CONTEXT` for as long as the process lives.
    """
    _context.update(context)
    if own_level != level:
        logging.getLogger("llm4msr").setLevel(own_level)
    if not as_json:
        logging.basicConfig(level=level, format=TEXT_FORMAT, datefmt=TIME_FORMAT, stream=sys.stderr)
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    _taken[:] = [handler]
    logging.root.setLevel(level)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    take_over()


def take_over() -> None:
    """Leads all lines through the one handler again; libraries that were imported since bring their own."""
    if not _taken:
        return
    for log in (logging.root, *map(logging.getLogger, FOREIGN_LOGGERS)):
        for handler in list(log.handlers):
            # What writes files stays.
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                log.removeHandler(handler)
                log.propagate = True
    logging.root.addHandler(_taken[0])


def describe(**fields: Any) -> None:
    """Says what the process does from now on, where it does nothing else until its end; some of `CONTEXT`."""
    assert set(fields) <= set(CONTEXT), fields
    _context.update(fields)
    take_over()


@contextlib.contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Says what the process does, in this block or, as a decorator, in this function; some of `CONTEXT`."""
    before = {name: _context[name] for name in fields}
    describe(**fields)
    try:
        yield
    finally:
        _context.update(before)


def context() -> dict[str, Any]:
    """Returns what the process is known to do now, for processes that it starts."""
    return dict(_context)


def worker_lines(data: Mapping[str, Any]) -> list[str]:
    """Returns the lines of another process, as Ray brings them to the driver: each one JSON, with its line end.

    Args:
        data: lines; pid; actor_name or task_name, where there is one.
    """
    out = []
    for text in data["lines"]:
        text = _COLOURS.sub("", text).rstrip()
        if not text:
            continue
        if not _is_ours(text):
            said_by = data.get("actor_name") or data.get("task_name") or "worker"
            text = json_line(_line("INFO", f"ray.{said_by}", text, time.time()) | {"pid": data.get("pid")})
        out.append(text + "\n")
    return out


def _is_ours(text: str) -> bool:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and {"time", "level", "logger"} <= set(found)


def _line(level: str, name: str, message: str | None, created: float) -> dict[str, Any]:
    said = {"time": round(created, 3), "level": level, "logger": name, "message": message}
    return said | _context | {"pid": os.getpid()}


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: Any) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("llm4msr").critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))
