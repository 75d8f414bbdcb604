"""Plans machines, hours, money and storage for a size: ``python -m jobs.plan --users 100e6 --items 10e6 ...``.

Every line of the arithmetic is printed with its numbers, and every number with where it comes from: a dated result of
``benchmarks/``, a data sheet, a flag, or an assumption, which says so. Runs nothing; needs no Ray. ``--help`` lists all
flags. Defaults that are not yours, prices first, make a plan that is not yours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from llm4msr.config import ConfigError
from llm4msr.config.plan import PlanArgs
from llm4msr.planning.capacity import Plan, make_plan
from llm4msr.planning.ledger import number, readable
from llm4msr.planning.simulation import Pool, Simulated, simulate_extraction
from llm4msr.planning.unit_costs import read_unit_costs

PROG = "python -m jobs.plan"
BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
LENGTHS_FILE = "prompt_lengths.json"
WIDTH = 140  # off a terminal


def parse(argv: Sequence[str] | None) -> tuple[PlanArgs, argparse.Namespace]:
    """Reads the command line; what is wrong with it ends the program with status 2.

    Raises:
        ConfigError: A value cannot be used.
    """
    parser = argparse.ArgumentParser(PROG, description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    for name, field in PlanArgs.model_fields.items():
        default = "" if field.is_required() or field.default is None else f" (default {field.default})"
        parser.add_argument(
            f"--{name}",
            required=field.is_required(),
            metavar="VALUE",
            help=" ".join(f"{field.description}{default}".split()).replace("%", "%%"),
        )
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON; - for the terminal, and nothing else")
    parser.add_argument("--markdown", action="store_true", help="print the summary and the limits as Markdown alone")
    parser.add_argument(
        "--simulate_actors",
        metavar="N,N",
        help="simulate the extraction with so many actors each, and print a table of that alone",
    )
    parser.add_argument(
        "--losses_per_h", type=float, default=0.0, metavar="VALUE", help="simulated: how often an hour an actor is lost"
    )
    parser.add_argument(
        "--benchmarks", type=Path, default=BENCHMARKS, metavar="DIR", help="folder of unit_costs.toml and results/"
    )
    options = parser.parse_args(argv)
    asked = {name: getattr(options, name) for name in PlanArgs.model_fields if getattr(options, name) is not None}
    try:
        return PlanArgs.model_validate_strings(asked), options
    except ValidationError as error:
        raise ConfigError("\n".join(map(_explain, error.errors()))) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job.

    Returns:
        Exit status: 0 done, 2 the flags or the unit costs cannot be used (one clear message).
    """
    try:
        args, options = parse(argv)
        plan = make_plan(args, read_unit_costs(options.benchmarks))
        pools = _pools(plan, options)
    except ConfigError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2
    if pools:
        lengths = json.loads((options.benchmarks / LENGTHS_FILE).read_text(encoding="utf-8"))["num_prompts_by_tokens"]
        by_tokens = {int(length): count for length, count in lengths.items()}
        found = simulate_extraction(int(plan.values["prompts"]), args.rows_per_commit, pools, by_tokens)
        print("\n".join(simulation_lines(plan, zip(pools, found, strict=True))))
        return 0
    tree = json.dumps(plan.to_json(), indent=2, ensure_ascii=False)
    if options.json == "-":
        print(tree)
        return 0
    if options.json is not None:
        Path(options.json).write_text(tree + "\n", encoding="utf-8")
    if options.markdown:
        print("\n".join(markdown_lines(plan)))
    else:
        print_plan(plan)
    return 0


def print_plan(plan: Plan) -> None:
    """Prints the whole plan: summary, limits, arithmetic, sources."""
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDTH, highlight=False, markup=False)
    for title, rows in (("What it takes", summary_rows(plan)), ("What is used up first", limit_rows(plan))):
        table = Table(*rows[0], title=title, title_style="bold", title_justify="left", header_style="bold")
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    if plan.loads[0].share > 1:
        console.print("What is used by more than 100 % does not work as planned.", style="bold red")
    places = {cost.name: place for place, cost in enumerate(plan.costs, start=1)}
    console.print("\nThe arithmetic; [n] is a number of the list below", style="bold")
    for title, lines in plan.sections:
        console.print(f"\n{title}", style="bold")
        for line in lines:
            marks = "".join(f" [{places[name]}]" for name in line.rule.names if name in places)
            console.print(f"  {line.rule.name}: {line.rule.meaning}")
            console.print(f"    {readable(line.rule.expression)}")
            console.print(f"    = {line.formula} = {line.text}{marks}")
    console.print("\nWhere the numbers come from\n", style="bold")
    for cost in plan.costs:
        shown = f"{number(cost.value)} {cost.unit}".removesuffix(" 1")
        source = f": {cost.source}" if cost.source else ""
        console.print(f"  [{places[cost.name]}] {cost.name} = {shown}, {cost.kind}{source}")


def summary_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Returns heading and rows of the summary."""
    return [
        ("stage", "machines", "hours", "USD"),
        *(
            (
                stage.name,
                stage.machines,
                "always" if stage.hours is None else _short(stage.hours),
                _short(stage.usd) + ("" if stage.period == "once" else f" {stage.period}"),
            )
            for stage in plan.stages
        ),
    ]


def limit_rows(plan: Plan) -> list[tuple[str, ...]]:
    """Returns heading and rows of the limits, the tightest first; a share above 100 % does not work as planned."""
    return [
        ("limit", "what helps", "needed", "there", "used"),
        *(
            (
                load.limit.what,
                load.limit.remedy,
                f"{_short(load.needed)} {load.unit}",
                f"{_short(load.there)} {load.unit}",
                f"{_short(100 * load.share)} %",
            )
            for load in plan.loads
        ),
    ]


def markdown_lines(plan: Plan) -> list[str]:
    """Returns the summary, and the limits that are used by a hundredth at least, or else the tightest."""
    limits = limit_rows(plan)
    used = [row for row, load in zip(limits[1:], plan.loads, strict=True) if load.share >= 0.01]
    return [*_markdown(summary_rows(plan)), "", *_markdown([limits[0], *(used or limits[1:2])])]


def simulation_lines(plan: Plan, found: Iterable[tuple[Pool, Simulated]]) -> list[str]:
    """Returns a Markdown table of simulated extractions beside the arithmetic."""
    rows = [
        ("actors", "units", "prompts a unit", "hours by arithmetic", "hours simulated", "busy", "lost work", "losses")
    ]
    for pool, one in found:
        tokens = plan.values["prompt_tokens"]
        rows.append(
            (
                f"{pool.num_actors:,}",
                f"{one.num_units:,}",
                f"{one.rows_per_unit:,}",
                _short(tokens / pool.prompt_tokens_per_s / pool.num_actors / 3600),
                _short(one.hours),
                f"{100 * one.busy_share:.1f} %",
                f"{100 * one.lost_share:.1f} %",
                f"{one.num_losses:,}",
            )
        )
    return _markdown(rows)


def _pools(plan: Plan, options: argparse.Namespace) -> list[Pool]:
    """Returns the pools to simulate.

    Raises:
        ConfigError: The numbers of actors, or the losses, cannot be used.
    """
    if options.simulate_actors is None:
        return []
    values = plan.values
    if "gpu_flops" in values:
        tokens_per_s = values["prompt_tokens"] / values["prompt_flop"] * values["gpu_flops"]
    else:
        tokens_per_s = values["tokens_per_s_per_core"]
    numbers = options.simulate_actors.split(",")
    if not all(text.strip().isdigit() and int(text) > 0 for text in numbers):
        raise ConfigError(f"simulate_actors: numbers of actors are needed, such as 10,1000 (found {numbers})")
    if not 0 <= options.losses_per_h <= 10:
        raise ConfigError(f"losses_per_h: a number from 0 to 10 is needed (found {options.losses_per_h:g})")
    dispatch_s = 1 / values["units_per_s_of_driver"]
    return [Pool(int(text), tokens_per_s, dispatch_s=dispatch_s, losses_per_h=options.losses_per_h) for text in numbers]


def _markdown(rows: Sequence[tuple[str, ...]]) -> list[str]:
    head, *rest = rows
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rest)]


def _short(value: float) -> str:
    """Returns a number with three digits that count, and its thousands parted."""
    if value >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return f"{value:.2g}" if "e" in text else text


def _explain(error: Any) -> str:
    name = ".".join(map(str, error["loc"]))
    found = "" if isinstance(error["input"], dict) else f" (found {error['input']!r})"
    return f"{name + ': ' if name else ''}{error['msg'].removeprefix('Value error, ')}{found}"


if __name__ == "__main__":
    sys.exit(main())
