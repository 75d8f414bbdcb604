"""The commands that README.md and docs/ tell people to type, and how each of them is known to work.

A shell block is an indented block, or a fence of ``bash``. What other fences hold is no command. A comment before a
block, or below a heading for all that stands under it, says how the block is known to work:

    <!-- needs: cloud -->                             it cannot run here, and why
    <!-- tested by: tests/integration/test_x.py -->   that test runs it

A block without one, on a page of `WALKED`, is run by tests/integration/test_docs_commands.py as it stands there. The
same line elsewhere needs no mark.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

REPOSITORY = Path(__file__).resolve().parent.parent
# Run from top to bottom, page by page.
WALKED = ("docs/quickstart.md", "docs/own-data.md")
# What this suite cannot have, by the word that a page uses for it.
NEEDS = {
    "cloud": "an account at a cloud",
    "kubernetes": "a Kubernetes cluster",
    "docker": "a Docker engine",
    "hosts": "several hosts that are reached by ssh",
    "data": "files that nobody publishes in this form",
    "gpu": "an NVIDIA GPU",
    "network": "packages, data sets or databases of others",
    "hours": "hours",
}
SHELL = {"bash"}
NO_SHELL = {"", "html", "ini", "json", "mermaid", "text", "toml", "yaml"}

_MARK = re.compile(r"^\s*<!-- (needs|tested by): (.+?) -->\s*$", re.DOTALL)
_HEREDOC = re.compile(r"<<\s*'?(\w+)'?")
_OPERATORS = {"&&", "||", "|", ";", "&", "(", ")", ">", ">>", "<", "<<"}
_ASSIGNMENT = re.compile(r"\w+=")


@dataclass(frozen=True)
class Mark:
    """How a block is known to work: `kind` is "needs" or "tested by", with the names that follow it."""

    kind: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """One command of a page, whole: continued lines and a here-document belong to it.

    Attributes:
        page: Below the repository.
        line: Of its block, counted from 1.
        text: As it stands there.
        mark: Of its block, or of the heading above.
    """

    page: str
    line: int
    text: str
    mark: Mark | None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text.splitlines()[0]}"

    @property
    def plain(self) -> str:
        """The text without comments, continuations and repeated spaces; two equal ones do the same."""
        return self.text if _HEREDOC.search(self.text) else shlex.join(_tokens(self.text))

    def simple(self) -> list[list[str]]:
        """The words of each simple command in it, without assignments of variables, redirections and comments."""
        found: list[list[str]] = [[]]
        for token in _tokens(self.text):
            if token in _OPERATORS:
                found.append([])
            elif found[-1] or not _ASSIGNMENT.match(token):
                found[-1].append(token)
        return [words for words in found if words]


def pages() -> list[str]:
    """The pages with commands for people, below the repository."""
    found = sorted((REPOSITORY / "docs").rglob("*.md"))
    return ["README.md", *(path.relative_to(REPOSITORY).as_posix() for path in found)]


def read_page(page: str) -> list[Command]:
    """Returns the commands of a page, in order."""
    return list(read_text(page, (REPOSITORY / page).read_text(encoding="utf-8")))


def read_text(page: str, text: str) -> Iterator[Command]:
    """Yields the commands of a Markdown text.

    Raises:
        ValueError: A fence is of a language that is neither shell nor known to be none.
    """
    sections: list[tuple[int, Mark | None]] = []  # the headings above, by level
    previous = None
    for token in MarkdownIt().parse(text):
        if token.type == "heading_open":
            level = int(token.tag[1:])
            sections = [*(s for s in sections if s[0] < level), (level, None)]
        elif previous and previous.type == "heading_close" and (mark := _mark(token)):
            sections[-1] = (sections[-1][0], mark)
        elif token.type in ("fence", "code_block"):
            assert token.map is not None
            line = token.map[0] + 1
            language = token.info.split(" ")[0] if token.type == "fence" else "bash"
            if language not in SHELL | NO_SHELL:
                raise ValueError(f"{page}:{line}: a fence of {language!r}; known: {sorted(SHELL | NO_SHELL)}")
            marks = [mark for _, mark in sections if mark] + [mark for mark in [_mark(previous)] if mark]
            if language in SHELL:
                yield from (
                    Command(page, line, command, marks[-1] if marks else None) for command in split(token.content)
                )
        previous = token


def _mark(token: Token | None) -> Mark | None:
    found = _MARK.match(token.content) if token is not None and token.type == "html_block" else None
    return Mark(found[1], tuple(name.strip() for name in found[2].split(","))) if found else None


def split(block: str) -> Iterator[str]:
    """Yields the commands of a shell block, each with its continued lines and its here-document."""
    lines = iter(block.splitlines())
    for line in lines:
        whole = line
        while whole.endswith("\\"):
            whole += "\n" + next(lines)
        if found := _HEREDOC.search(whole):
            for more in lines:
                whole += "\n" + more
                if more.strip() == found[1]:
                    break
        if whole.strip() and not whole.lstrip().startswith("#"):
            yield whole.strip("\n")


def _tokens(text: str) -> list[str]:
    lexer = shlex.shlex(_HEREDOC.split(text)[0].replace("\\\n", " "), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)
