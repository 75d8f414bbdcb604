"""docs/troubleshooting.md has a row for each error that a user can meet, and each row's message is one of the code.

A row stands for a message if the row's literal parts, those between its words in capitals, follow one another in it,
and are together as long as those of the message, or `DISTINCTIVE`. Both directions are also run on planted violations.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import BaseModel
from raised_messages import HOLE, Message, normalised, num_literal, parts, read_messages

from llm4msr.config import Config

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = REPOSITORY / "docs" / "troubleshooting.md"
PACKAGES = ("llm4msr", "jobs", "serve")
# Beside Python: what else prints messages of ours.
SCRIPTS = ("Makefile", "cluster/*.sh")
# First cells of the headings of tables about our own messages; of the others, about Ray's and those around it.
OUR_HEADINGS = {"message", "reason", "why"}
# So many literal characters tell a message from all others.
DISTINCTIVE = 22

TOLD = "the whole text is that of another error, which is looked at where it is made"
FOREIGN = "the words are those of pydantic or of a server"
CALLER = "only another caller of this function can meet it, no user of the jobs"
INSIDE = "shown inside `not a knowledge table: …`"
# Messages without a row, by file and function: how many there are, and why.
EXEMPT = {
    "llm4msr/config/base.py:_plain": (1, CALLER),
    "llm4msr/data/http.py:_continue": (2, "shown inside `failed N times in a row, the last time with`"),
    "llm4msr/data/http.py:_get": (4, FOREIGN),
    "llm4msr/data/pipeline.py:_run": (1, TOLD),
    "llm4msr/data/prepared.py:PreparedData.vocabulary": (1, CALLER),
    "llm4msr/data/prepared.py:_known_split": (1, CALLER),
    "llm4msr/data/shards.py:check_events": (3, "what a new adapter of raw data must keep to"),
    "llm4msr/knowledge/engines/encoder.py:Encoder.encode": (1, "ends the actor; Ray starts another one"),
    "llm4msr/knowledge/engines/endpoint_client.py:EndpointClient._refusal": (1, FOREIGN),
    "llm4msr/knowledge/folds.py:UserFolds.__post_init__": (3, INSIDE),
    "llm4msr/knowledge/pipeline.py:_encode": (1, "an assertion"),
    "llm4msr/knowledge/store.py:KnowledgeStore.commit": (2, "engines make such a vector a prompt's error before"),
    "llm4msr/knowledge/table.py:KnowledgeTable.__post_init__": (4, INSIDE),
    "llm4msr/models/backbones/__init__.py:build_backbone": (1, "the configuration takes known names only"),
    "llm4msr/planning/ledger.py:Dimension.__add__": (1, "a mistake in the rules of planning"),
    "llm4msr/planning/unit_costs.py:read_unit_costs": (1, FOREIGN),
    "llm4msr/schema.py:FeatureSchema.__post_init__": (5, "jobs.prepare refuses such names, and makes no such features"),
    "llm4msr/scoring/pipeline.py:_run": (1, TOLD),
    "llm4msr/settings.py:config_from_dict": (1, FOREIGN),
    "llm4msr/settings.py:load_config": (1, FOREIGN),
    "llm4msr/training/node_copy.py:map_checkpoint": (1, TOLD),
    "llm4msr/training/run.py:_train_group": (1, TOLD),
    "llm4msr/training/running.py:Run.__init__": (1, TOLD),
    "jobs/plan.py:parse": (1, FOREIGN),
    "serve/api.py:build_api.rank_batch": (1, TOLD),
    "serve/app.py:parse_args": (1, FOREIGN),
    "serve/candidates.py:_read": (1, TOLD),
    "serve/explain.py:_of_query": (1, TOLD),
}

# Where the installed Ray has the messages that the page quotes.
RAY_FILES = (
    "_private/authentication/authentication_constants.py",
    "_private/authentication/authentication_token_setup.py",
    "_private/authentication/http_token_authentication.py",
    "_private/runtime_env/packaging.py",
    "_private/services.py",
    "_private/utils.py",
    "autoscaler/_private/autoscaler.py",
    "dashboard/modules/dashboard_sdk.py",
    "dashboard/modules/job/job_manager.py",
    "exceptions.py",
    "scripts/scripts.py",
    "serve/_private/replica.py",
    "train/v2/_internal/execution/worker_group/worker_group.py",
)
# Those of Ray's compiled part, of Python, of torch, of the kernel, of the store's client.
NOT_IN_PYTHON = {
    "No module named ray",
    "No module named 'llm4msr'",
    "InvalidAuthToken: Authentication token is missing or incorrect",
    "cannot be scheduled right now",
    "worker(s) were killed due to the node running low on memory",
    "torch.OutOfMemoryError: CUDA out of memory",
    "No space left on device",
    "Too many open files",
    "object store: NoCredentialsError: Unable to locate credentials",
    "object store: EndpointConnectionError: Could not connect to the endpoint URL",
    "object store: ClientError: … (403)",
}


@dataclass(frozen=True)
class Row:
    """One row of a table: the messages of its first cell, and the other two cells."""

    line: int
    is_ours: bool
    messages: tuple[str, ...]
    cause: str
    cure: str


def rows(page: str) -> list[Row]:
    found, is_ours = [], False
    lines = page.splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.startswith("|") or is_rule(line):
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 3, f"line {number}: {len(cells)} cells, not message, cause and cure"
        if is_rule("".join(lines[number : number + 1])):
            is_ours = cells[0] in OUR_HEADINGS
        else:
            found.append(Row(number, is_ours, tuple(re.findall("`([^`]+)`", cells[0])), cells[1], cells[2]))
    return found


def is_rule(line: str) -> bool:
    return line.startswith("|--")


def matches(message: str, text: str) -> bool:
    """Tells whether the literal parts of a message of the page follow one another in a text of the code."""
    position = 0
    for part in parts(message):
        if (start := text.find(part, position)) < 0:
            return False
        position = start + len(part)
    return bool(parts(message))


def without_row(messages: Iterable[Message], page: list[Row]) -> list[Message]:
    """Returns the messages that no row of the page stands for."""
    ours = [(message, num_literal(message)) for row in page if row.is_ours for message in row.messages]
    return [
        one
        for one in messages
        if not any(size >= min(DISTINCTIVE, num_literal(one.text)) and matches(shown, one.text) for shown, size in ours)
    ]


def unfounded(page: list[Row], texts: list[str]) -> list[str]:
    """Returns the messages of the page that are nowhere in the code."""
    return [
        f"line {row.line}: {message}"
        for row in page
        if row.is_ours
        for message in row.messages
        if not any(matches(message, text) for text in texts)
    ]


@pytest.fixture(scope="module")
def page() -> list[Row]:
    return rows(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def code() -> tuple[list[Message], list[str]]:
    paths = [path for package in PACKAGES for path in sorted((REPOSITORY / package).rglob("*.py"))]
    messages, texts = read_messages({p.relative_to(REPOSITORY).as_posix(): p.read_text("utf-8") for p in paths})
    scripts = [path for pattern in SCRIPTS for path in sorted(REPOSITORY.glob(pattern))]
    return messages, texts + [normalised(path.read_text("utf-8")) for path in scripts]


@pytest.fixture(scope="module")
def left(code, page) -> list[Message]:
    return without_row(code[0], page)


def test_each_message_has_a_row_or_a_reason(left):
    places = Counter(message.place for message in left)
    new = [message for message in left if places[message.place] > EXEMPT.get(message.place, (0, ""))[0]]
    assert not new, f"{PAGE.name} has no row for:\n" + "\n".join(
        f"{message.place} (line {message.line}): {message.text.replace(HOLE, '…')!r}" for message in new
    )


def test_no_exemption_is_stale(left):
    places = Counter(message.place for message in left)
    assert {place: places[place] for place in EXEMPT} == {place: number for place, (number, _) in EXEMPT.items()}


def test_each_row_is_a_message_of_the_code(code, page):
    assert len(code[0]) > 390 and len(page) > 340
    assert not unfounded(page, code[1])


def test_a_cause_and_a_cure_are_given(page):
    assert not [row.line for row in page if row.is_ours and not (row.messages and row.cause and row.cure)]


def test_keys_jobs_and_files_that_cures_name_exist(page):
    spans = {span for row in page for span in re.findall("`([^`]+)`", f"{row.cause} {row.cure}")}
    sections = "|".join(name for name in Config.model_fields if name != "workspace_uri")
    keys = {found[0] for span in spans if (found := re.match(rf"({sections})(\.\w+)+", span))}
    assert len(keys) > 50
    assert not keys - set(fields(Config))
    jobs = {found[1] for span in spans if (found := re.match(r"(?:python -m )?jobs\.(\w+)", span))}
    assert len(jobs) > 4
    assert not {job for job in jobs if not (REPOSITORY / "jobs" / f"{job}.py").exists()}
    path = re.compile(r"(?<![\w/~])(?:cluster|serve|jobs/recipes)/[\w.-]+\w")
    files = {name for span in spans for name in path.findall(span)}
    assert len(files) > 3
    assert not {file for file in files if not (REPOSITORY / file).exists()}


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = PAGE.parent / name if name else PAGE
        headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
        places = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in places, target


def test_messages_of_ray_are_those_of_the_installed_ray(page):
    (package,) = find_spec("ray").submodule_search_locations
    texts = [normalised((Path(package) / name).read_text(encoding="utf-8")) for name in RAY_FILES]
    said = [message for row in page if not row.is_ours for message in row.messages if len(message.split()) > 3]
    known = [message for message in said if any(matches(message, text) for text in texts)]
    assert len(known) > 12
    assert set(said) - set(known) == NOT_IN_PYTHON


PLANTED = """
class ShapeError(ValueError):
    pass

def one(path):
    raise ShapeError(f"{path}: has no shape that is known here, of {len(path)}")

class Two:
    def make(self, number):
        what = "is too large" if number else "is too small"
        return ShapeError(f"the number {number} {what}: " "give another one")

def three(lines):
    lines = []
    lines.append(f"{len(lines)} lines are wrong in this file")
    raise ShapeError("\\n".join(lines))
"""
TABLE = "| message | cause | cure |\n|---|---|---|\n"


def test_planted_errors_are_found():
    messages, texts = read_messages({"planted.py": PLANTED})
    assert [(message.place, message.text.replace(HOLE, "…")) for message in messages] == [
        ("planted.py:one", "…: has no shape that is known here, of …"),
        ("planted.py:Two.make", "the number … is too large: give another one"),
        ("planted.py:Two.make", "the number … is too small: give another one"),
        ("planted.py:three", "… lines are wrong in this file"),
    ]
    assert len(without_row(messages, [])) == 4
    whole = rows(
        f"{TABLE}| `FILE: has no shape that is known here` | a | b |\n| `N lines are wrong in this file` | a | b |\n"
        "| `the number N is too …: give another one` | a | b |"
    )
    assert not without_row(messages, whole)
    assert not unfounded(whole, texts)


@pytest.mark.parametrize(
    ("row", "num_unfounded"),
    [
        ("| `FILE: has no shape that is known there` | a | b |", 1),  # reworded in the code
        ("| `known here, of N, has no shape that is` | a | b |", 1),  # parts in another order
        ("| `FILE: has no shape` | a | b |", 0),  # too little to know it by
        ("| has no shape that is known here | a | b |", 0),  # not marked as a message
    ],
)
def test_a_row_that_does_not_fit_stands_for_nothing(row, num_unfounded):
    messages, texts = read_messages({"planted.py": PLANTED})
    found = rows(TABLE + row)
    assert len(without_row(messages, found)) == 4
    assert len(unfounded(found, texts)) == num_unfounded


def test_tables_about_others_stand_for_nothing_of_ours():
    messages, texts = read_messages({"planted.py": PLANTED})
    found = rows(TABLE.replace("message", "message of Ray") + "| `has no shape that is known here, of N` | a | b |")
    assert len(found) == 1
    assert len(without_row(messages, found)) == 4
    assert not unfounded(rows(TABLE.replace("message", "message of Ray") + "| `nowhere at all` | a | b |"), texts)
