"""Explains a user, an item or a scenario: ``python -m jobs.explain --workspace_uri URI --user ID``.

Prints the prompt, the language model's words (where `knowledge.generate` was on) and the nearest users, items and
scenarios in knowledge space. ``--json`` prints one JSON object instead; its fields are those of
`llm4msr.knowledge.explain.Explanation`, in that order. Reads the workspace alone: no configuration, no Ray, no model.
"""

from __future__ import annotations

import argparse
import json
import sys
import unicodedata
from collections.abc import Sequence

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from jobs.session import reading_message
from llm4msr.knowledge.explain import Explanation, Neighbour, explain
from llm4msr.knowledge.extraction import Extraction

PROG = "python -m jobs.explain"
LEVELS = ("user", "item", "scenario")
WIDTH = 100  # off a terminal
NUM_SHOWN_IDS = 2


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what is wrong with it ends the program with status 2."""
    parser = argparse.ArgumentParser(PROG, description="Explains one subject by the knowledge extracted of it.")
    parser.add_argument("--workspace_uri", required=True, metavar="URI", help="the workspace, a folder or s3://")
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--user", metavar="ID", help="raw id of a user, as in the logs")
    subject.add_argument("--item", metavar="ID", help="raw id of an item, as in the logs")
    subject.add_argument("--scenario", metavar="NAME", help="name of a scenario")
    parser.add_argument("--neighbours", type=int, default=5, metavar="N", help="users and items to list (default 5)")
    parser.add_argument("--knowledge", metavar="DIGEST", help="a directory below knowledge/ (default: the newest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    if arguments.neighbours < 1:
        parser.error(f"argument --neighbours: found {arguments.neighbours}, needed 1 or more")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job.

    Returns:
        Exit status: 0 done, 2 the subject or the workspace is not there or cannot be read (one clear message).
    """
    arguments = parse(argv)
    level = next(level for level in LEVELS if getattr(arguments, level) is not None)
    try:
        extraction = Extraction.open(arguments.workspace_uri, arguments.knowledge)
        found = explain(extraction, level, getattr(arguments, level), arguments.neighbours)
    except Exception as error:
        message = reading_message(error, arguments.workspace_uri)
        if message is None:
            raise
        print(f"{PROG}: {message}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(found.to_json(), indent=2, ensure_ascii=False))
    else:
        print_explanation(found)
    return 0


def print_explanation(found: Explanation) -> None:
    """Prints what people want to read of an explanation."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    facts = Table.grid(padding=(0, 2))
    facts.add_row(found.level, _plain(found.subject_id, "bold"))
    facts.add_row("known", _plain(found.text or "nothing"))
    if found.num_train_rows is not None:
        facts.add_row("training rows", f"{found.num_train_rows:,}")
    facts.add_row("knowledge", _plain(f"{found.knowledge} of {found.created_at}, {found.chosen}"))
    facts.add_row("model", _plain(found.model))
    facts.add_row("prepared data", _plain(found.prepared))
    if not found.has_knowledge:
        facts.add_row("missing", _plain(f"no knowledge: {found.reason}", "bold red"))
    console.print(facts)
    if found.prompt is not None:
        _print_prompt(console, found)
    if found.generated_text is not None:
        _print_section(console, f"The model's words ({found.num_generated_tokens} tokens)", found.generated_text)
    for title, heading, neighbours in (
        ("Nearest users", "user", found.nearest_users),
        ("Nearest items", "item", found.nearest_items),
    ):
        if neighbours:
            _print_neighbours(console, title, heading, neighbours)
    if found.scenarios:
        table = _similarity_table("Scenarios", "scenario")
        for scenario in found.scenarios:
            table.add_row(f"{scenario.similarity:.3f}", f"{scenario.raw_similarity:.3f}", _plain(scenario.name))
        console.print(table)
    for note in found.notes:
        console.print(_plain(f"Note: {note}.", "dim"))


def _print_prompt(console: Console, found: Explanation) -> None:
    title = "Prompt"
    if found.prompt_read is not None:
        title += f" ({found.num_tokens} tokens read)"
    if found.preamble:
        _print_section(console, "Read before every prompt", found.preamble)
    _print_section(console, title, found.prompt_read or found.prompt or "")
    if found.prompt_read not in (None, found.prompt):
        console.print(
            f"  Cut to the model's limit: without {found.num_dropped_events} events and {found.num_cut_characters} "
            "characters; --json has all of it.",
            style="dim",
        )


def _print_section(console: Console, title: str, text: str) -> None:
    console.print()
    console.print(_plain(title, "bold"))
    console.print(Padding(_plain(text), (0, 0, 0, 2), expand=False))


def _print_neighbours(console: Console, title: str, heading: str, neighbours: Sequence[Neighbour]) -> None:
    table = _similarity_table(title, heading)
    table.add_column("prompt begins")
    for one in neighbours:
        ids = ", ".join(one.ids[:NUM_SHOWN_IDS])
        if one.num_ids > NUM_SHOWN_IDS:
            ids += f" and {one.num_ids - NUM_SHOWN_IDS:,} more"
        line = _plain(one.first_line)
        line.no_wrap, line.overflow = True, "ellipsis"  # set on the column, it would take the width of the others
        table.add_row(f"{one.similarity:.3f}", f"{one.raw_similarity:.3f}", _plain(ids), line)
    console.print(table)


def _similarity_table(title: str, heading: str) -> Table:
    table = Table(title=f"\n{title}", title_style="bold", title_justify="left", header_style="bold")
    table.add_column("similarity", justify="right", no_wrap=True)
    table.add_column("raw", justify="right", no_wrap=True)
    table.add_column(heading, max_width=36)
    return table


def _plain(text: str, style: str = "") -> Text:
    """Returns text from outside as it is: no markup, and no control characters, which a terminal would obey."""
    return Text("".join(c for c in text if c == "\n" or unicodedata.category(c) != "Cc"), style)


if __name__ == "__main__":
    sys.exit(main())
