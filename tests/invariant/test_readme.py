"""What the README tells people to type exists and is accepted."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

from jobs import download, explain
from llm4msr.data.catalogue import DATA_SETS
from llm4msr.settings import load_config
from serve.schemas import RankBody

REPOSITORY = Path(__file__).resolve().parents[2]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    REPOSITORY / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "tests/README.md",
        "docs/architecture.md",
        "docs/lab-notes.md",
        "docs/results.md",
        "docs/scaling.md",
        "docs/serving.md",
    )
]
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ") and line.strip()]
CURL = [line for line in COMMANDS if line.startswith("curl ")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_make_targets_exist(document):
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", document.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets, f"the Makefile lacks {sorted(named - targets)}"


def test_the_two_commands_come_first_and_ci_calls_the_second():
    assert [line.split("#")[0].strip() for line in COMMANDS[:2]] == ["make demo", "make test"]
    assert re.search(r"^make test$", (REPOSITORY / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE)


JOBS = [line.split("#")[0].strip() for line in COMMANDS if line.startswith("python -m ")]


@pytest.mark.parametrize("command", JOBS)
def test_jobs_exist_and_their_flags_are_accepted(command, tmp_path, monkeypatch):
    _, _, module, *argv = shlex.split(command)
    assert importlib.util.find_spec(module)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(toml_example(), encoding="utf-8")
    argv = [str(recipe) if part in ("FILE.toml", "mine.toml") else part for part in argv]
    monkeypatch.chdir(REPOSITORY)
    if module == "jobs.explain":
        assert explain.parse(argv).user
    elif module in ("jobs.status", "jobs.plan"):
        assert importlib.import_module(module).parse(argv)
    elif module == "jobs.download":
        arguments = download.parse(argv)
        assert arguments.list or arguments.name in {*DATA_SETS, "NAME"}
    else:
        load_config(argv, environ={})


def toml_example() -> str:
    (block,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    return block


def test_flags_and_variables_in_the_text_are_accepted():
    flags = re.findall(r"`(--[a-z_.]+) ([^`]+)`", README)
    variables = re.findall(r"`(LLM4MSR_[A-Z_]+)=([^`]+)`", README)
    assert len(flags) >= 2 and variables
    load_config([part for flag in flags for part in flag], environ=dict(variables))


def test_requests_are_valid():
    bodies = [shlex.split(line)[-1] for line in CURL if " -d " in line]
    assert bodies
    for body in bodies:
        RankBody.model_validate(json.loads(body))
    assert {re.search(r"8000(/\S+)", line)[1] for line in CURL} == {"/v1/rank", "/v1/model", "/healthz"}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (document.parent / target.split("#")[0]).exists(), f"{document.name} links to {target}"


def test_every_recipe_is_listed():
    for recipe in (REPOSITORY / "jobs" / "recipes").glob("*.toml"):
        assert f"`{recipe.name}`" in README
