"""What README.md and docs/ tell people to type is run somewhere, or says what it needs; and what it names exists.

How a command is marked is told in `documented_commands`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import documented_commands as documents
import pytest
from documented_commands import REPOSITORY, WALKED, Command

from jobs import download
from llm4msr.config import ConfigError
from llm4msr.data.catalogue import DATA_SETS
from llm4msr.settings import load_config

PAGES = documents.pages()
COMMANDS = [command for page in PAGES for command in documents.read_page(page)]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
CONFIG_KEYS = set(json.loads((REPOSITORY / "tests" / "golden" / "config_surface.json").read_text()))
# Every section; a key that ends in a star stands for several.
SECTIONS = {key.partition(".")[0] for key in CONFIG_KEYS if "." in key}
# Recipes that a page tells people to write, or that stand for any.
OWN_RECIPES = {"FILE.toml", "mine.toml"}
BUILTINS = {"cat", "export", "source"}
NEEDED_PAGES = {
    "quickstart",
    "own-data",
    "kuaisar",
    "extraction",
    "training",
    "serving",
    "cluster",
    "troubleshooting",
    "architecture",
}


def read(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


# ---------------------------------------------------------------- each command is known to work


def walked() -> set[str]:
    """The commands that tests/integration/test_docs_commands.py runs."""
    return {command.plain for command in COMMANDS if command.page in WALKED and command.mark is None}


def is_named(words: list[str], test: str) -> bool:
    """Tells whether a test's text has what a command runs: its module, its target, or its program and verb."""
    name = Path(words[0]).name
    if name.startswith("python") and "-m" in words:
        module = words[words.index("-m") + 1]
        package, _, last = module.rpartition(".")
        imported = rf"from {package} import [^\n]*\b{last}\b" if package else rf'"-m", "{last}"'
        return re.search(rf"{re.escape(module)}(?![\w.])|{imported}" if package else imported, test) is not None
    if name == "make":
        return re.search(rf"\bmake\W+{words[1]}(?![\w-])", test) is not None
    if name in BUILTINS:
        return True
    if name == "curl":
        return any(re.search(r"/v1/\w+", word) and re.search(r"/v1/\w+", word)[0] in test for word in words)
    verbs = [word for word in words[1:] if re.fullmatch(r"[a-z-]+", word)][:1]
    return all(re.search(rf"(?<![\w-]){re.escape(part)}(?![\w-])", test) for part in [name, *verbs])


def trouble(command: Command, known: set[str]) -> str | None:
    """Returns what is wrong with how a command is known to work."""
    if command.plain in known:
        return None
    if command.mark is None:
        return f"no test runs it and no mark says what it needs ({documents.__name__}.py has the marks)"
    if command.mark.kind == "needs":
        unknown = set(command.mark.names) - set(documents.NEEDS)
        return f"needs {sorted(unknown)}; known: {sorted(documents.NEEDS)}" if unknown else None
    missing = [name for name in command.mark.names if not (REPOSITORY / name).is_file()]
    if missing:
        return f"tested by {missing}: no such file"
    tests = "\n".join(read(name) for name in command.mark.names)
    lacking = [words for words in command.simple() if not is_named(words, tests)]
    return f"{list(command.mark.names)} do not run {lacking[0]}" if lacking else None


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_run_by_a_test_or_says_what_it_needs(page):
    known = walked()
    found = {str(c): trouble(c, known) for c in COMMANDS if c.page == page}
    assert {command: why for command, why in found.items() if why} == {}


def test_pages_are_walked():
    for page in WALKED:
        assert sum(c.page == page and c.mark is None for c in COMMANDS) >= 5, page


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("    make demo --quick\n", "no test runs it"),
        ("    ray job list\n", "no test runs it"),
        ("<!-- needs: cluod -->\n\n    ray job list\n", r"needs \['cluod'\]; known: \['cloud', "),
        ("<!-- tested by: tests/unit/test_none.py -->\n\n    ray job list\n", "no such file"),
        ("<!-- tested by: tests/unit/test_csv.py -->\n\n    python -m jobs.tune --config FILE.toml\n", "do not run"),
        ("<!-- tested by: tests/unit/test_csv.py -->\n\n    make setup\n", "do not run"),
        ("<!-- needs: cloud -->\n\nWords between.\n\n    ray up x.yaml\n", "no test runs it"),
        ("# A\n\n<!-- needs: cloud -->\n\n## B\n\n    ray up x.yaml\n\n# C\n\n```bash\nray up x.yaml\n```\n", "C"),
    ],
)
def test_mistakes_are_found(text, why):
    *marked, command = documents.read_text("docs/x.md", text)
    found = trouble(command, walked())
    assert all(trouble(one, set()) is None for one in marked)
    assert found is not None and (why == "C" or re.search(why, found))


def test_a_fence_of_an_unknown_language_is_found():
    with pytest.raises(ValueError, match="'shell'; known"):
        list(documents.read_text("docs/x.md", "```shell\nmake demo\n```\n"))


def test_here_documents_and_continued_lines_are_one_command():
    block = "cat > x <<'EOF'\na && b\n\n# c\nEOF\nray job \\\n  list | sort  # all\n# only words\n"
    first, second = documents.read_text("docs/x.md", f"```bash\n{block}```\n")
    assert first.text.endswith("\nEOF") and second.text.startswith("ray job \\\n")
    assert second.simple() == [["ray", "job", "list"], ["sort"]]
    assert second.plain == next(documents.read_text("y.md", "    ray job list  |  sort\n")).plain


# ---------------------------------------------------------------- what commands name exists


def modules() -> Iterator[tuple[Command, str, list[str]]]:
    """Each `python -m` of this project: the command, the module and what follows it."""
    for command in COMMANDS:
        for words in command.simple():
            if "-m" in words and (module := words[words.index("-m") + 1]).split(".")[0] in {
                "jobs",
                "serve",
                "benchmarks",
            }:
                yield command, module, words[words.index("-m") + 2 :]


MODULES = list(modules())


@pytest.mark.parametrize(("command", "module", "argv"), MODULES, ids=[str(c) for c, *_ in MODULES])
def test_modules_recipes_and_flags_exist(command, module, argv, monkeypatch):
    assert importlib.util.find_spec(module), module
    monkeypatch.chdir(REPOSITORY)
    argv = list(argv)
    for place, word in enumerate(argv):
        if word == "--config" and argv[place + 1] in OWN_RECIPES | {"/etc/llm4msr/recipe.toml"}:
            argv[place + 1] = "jobs/recipes/demo.toml"
    if "--help" in argv or module.startswith("benchmarks"):
        return
    if module in ("jobs.status", "jobs.plan", "jobs.explain"):
        assert importlib.import_module(module).parse(argv)
    elif module == "jobs.download":
        arguments = download.parse(argv)
        assert arguments.list or arguments.name in {*DATA_SETS, "NAME"}
    elif module.startswith("serve"):
        name = module if module != "serve" else "serve.__main__"
        assert importlib.import_module(name)._parse(argv)
    else:
        load_config(argv, environ={})


def test_a_flag_that_does_not_exist_is_found(monkeypatch):
    with pytest.raises(ConfigError, match="no such configuration key"):
        test_modules_recipes_and_flags_exist(
            None, "jobs.train", ["--config", "FILE.toml", "--train.x", "1"], monkeypatch
        )
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        test_modules_recipes_and_flags_exist(None, "jobs.status", ["--workspaces", "x"], monkeypatch)


def test_make_targets_and_variables_exist():
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z]+) \?=", MAKEFILE, re.MULTILINE))
    seen = set()
    for command in COMMANDS:
        for words in (words for words in command.simple() if words[0] == "make"):
            given = {word.partition("=")[0] for word in words[1:] if "=" in word}
            named = {word for word in words[1:] if "=" not in word}
            assert named and named <= targets and given <= variables, str(command)
            seen |= named
    assert {"demo", "serve", "setup"} <= seen


def test_recipes_in_the_text_exist():
    for page in PAGES:
        for name in re.findall(r"jobs/recipes/[\w.]+\.toml", read(page)):
            assert (REPOSITORY / name).is_file(), f"{page} names {name}"


# ---------------------------------------------------------------- what the text names exists


@pytest.mark.parametrize("page", PAGES)
def test_configuration_keys_in_the_text_exist(page):
    """Those in backquotes, `train.num_workers = 4` or `--train.num_workers 4`, and those of TOML blocks."""
    text = read(page)
    named = set(re.findall(rf"`(?:--)?((?:{'|'.join(sorted(SECTIONS))})(?:\.[a-z_]+)+)(?=[ `=])", text))
    for block in re.findall(r"^```toml\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        named |= set(flat(tomllib.loads(block)))
    groups = {key.rpartition(".")[0] for key in CONFIG_KEYS}
    assert {key for key in named if not known(key, groups)} == set()


def known(key: str, groups: set[str]) -> bool:
    """Tells whether a key, or the table of free names that it lies in, is configuration."""
    return key == "extends" or key in CONFIG_KEYS | groups or (key.rpartition(".")[0] in CONFIG_KEYS)


def flat(tree: dict, prefix: str = "") -> Iterator[str]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_pages_and_headings(page):
    here = REPOSITORY / page
    for target in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        place, _, anchor = target.partition("#")
        if place.startswith(("http", "mailto")):
            continue
        path = (here.parent / place).resolve() if place else here
        assert path.exists(), f"{page} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{page} links to {target}"


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_every_page_can_be_found_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", read("README.md")))
    there = {page for page in PAGES if re.fullmatch(r"docs/[\w-]+\.md", page)}
    assert there >= {f"docs/{name}.md" for name in NEEDED_PAGES}
    assert there <= linked, f"README.md does not lead to {sorted(there - linked)}"
