"""A capacity plan: sizes and unit costs in, machines, hours, money and storage out, with every step of the arithmetic.

Nothing is run, nothing is looked up but the unit costs. What is measured was measured on small machines: a plan for a
thousand times as much is an extrapolation, and says so by naming the sources of its numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from llm4msr.config.plan import PlanArgs
from llm4msr.planning import offline, online
from llm4msr.planning.hardware import GPUS, ModelShape, model_of
from llm4msr.planning.ledger import Ledger, Line, Quantity, Rule, number
from llm4msr.planning.online import Load

DEFINITIONS = {
    "s_per_h": (3600, "s / h"),
    "ms_per_s": (1000, "ms / s"),
    "h_per_month": (730, "h / month"),
    "bytes_per_gb": (10**9, "B / GB"),
    "bytes_per_gib": (2**30, "B"),
    "bytes_of_half": (2, "B / number"),
    "bytes_of_float": (4, "B / number"),
    "bytes_of_index": (8, "B / index"),
    "bytes_of_score": (16, "B / score"),
    "flop_per_weight": (2, "FLOP / weight / token"),
    "one_core": (1, "core"),
    "one_gpu": (1, "gpu"),
    "one_worker": (1, "worker"),
    "one_hour": (1, "h"),
    "gpus_of_worker": (1, "gpu / worker"),
    "gpus_of_node": (8, "gpu"),
    "num_to_keep": (2, "checkpoints"),
}
# Of what is asked; other fields are not numbers, or are in the plan under another name.
ASKED_UNITS = {
    "users": "users",
    "interactions": "rows",
    "items": "items",
    "scenarios": "scenarios",
    "users_asked": "1",
    "items_asked": "1",
    "rows_per_commit": "prompts / unit",
    "deadline_hours": "h",
    "users_changed_per_day": "1",
    "refresh_hours": "h",
    "train_share": "1",
    "epochs": "epochs",
    "runs": "runs",
    "embedding_dim": "numbers",
    "requests_per_s": "requests / s",
    "candidates": "candidates",
    "utilisation": "1",
    "score_candidates": "candidates",
    "top_k": "scores",
    "node_cores": "core",
    "node_memory_gb": "GB",
    "storage_usd_per_gb_month": "USD / GB / month",
    "core_usd_per_h": "USD / core / h",
}
PRICES = {"core_usd_per_h", "storage_usd_per_gb_month"}


@dataclass(frozen=True)
class Stage:
    """One row of the summary.

    Attributes:
        name: Of the stage.
        machines: What it runs on.
        hours: None where it always runs.
        usd: Price, once or a month.
        period: What the price is for: once, a day, a month.
    """

    name: str
    machines: str
    hours: float | None
    usd: float
    period: str


@dataclass(frozen=True)
class Plan:
    """A finished plan.

    Attributes:
        args: What was asked.
        sections: The arithmetic, by stage.
        stages: The summary.
        loads: How far each limit is used, the tightest first.
        costs: Everything that the arithmetic reads and does not compute.
        values: Every quantity by name.
    """

    args: PlanArgs
    sections: tuple[tuple[str, tuple[Line, ...]], ...]
    stages: tuple[Stage, ...]
    loads: tuple[Load, ...]
    costs: tuple[Quantity, ...]
    values: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types."""
        return {
            "asked": self.args.model_dump(mode="json"),
            "stages": [asdict(stage) for stage in self.stages],
            "limits": [
                {"what": load.limit.what, "needed": load.needed, "there": load.there, "unit": load.unit}
                | {"share": load.share, "remedy": load.limit.remedy}
                for load in self.loads
            ],
            "arithmetic": [
                {"stage": title, "name": line.rule.name, "meaning": line.rule.meaning}
                | {"expression": line.rule.expression, "formula": line.formula}
                | {"value": line.value, "unit": line.rule.unit}
                for title, lines in self.sections
                for line in lines
            ],
            "unit_costs": [asdict(cost) for cost in self.costs],
        }


def make_plan(args: PlanArgs, unit_costs: Iterable[Quantity]) -> Plan:
    """Computes a plan.

    Args:
        args: What is asked.
        unit_costs: As `unit_costs.read_unit_costs` returns them.
    """
    model = model_of(args)
    ledger = Ledger([*unit_costs, *given(args, model)])
    tokens = replace(ledger.quantities["mean_tokens_per_prompt"], name="tokens_per_prompt")
    if args.tokens_per_prompt is not None:
        tokens = _asked("tokens_per_prompt", args.tokens_per_prompt, tokens.unit)
    ledger.quantities[tokens.name] = tokens
    pool = Rule("extract_gpus", "gpu", "num_gpus" if args.num_gpus else "gpus_wanted", "GPUs of this plan")
    group = Rule("train_workers", "worker", "num_workers" if args.num_workers else "workers_wanted", "of this plan")
    extract = _with(offline.EXTRACT_ON_GPUS, pool) if model.on_gpu else offline.EXTRACT_ON_CORES
    on_gpu = args.train_device == "gpu"
    rows = offline.TRAIN_ON_GPUS if on_gpu else offline.TRAIN_ON_CORES
    memory = online.MEMORY_OF_GPUS if on_gpu else online.MEMORY_OF_CORES
    sections = [
        ("prepare", offline.PREPARE),
        ("extract", (*offline.PROMPTS, *extract, *offline.RESUME)),
        ("tables", offline.TABLES),
        ("train", (*rows, *_with(offline.TRAIN, group))),
        ("score", (*online.RANK, *offline.SCORE)),
        ("serve", online.SERVE),
        ("memory", (*online.NODE_MEMORY, *memory)),
        ("storage", offline.STORE),
    ]
    done = tuple((title, tuple(ledger.compute(rules))) for title, rules in sections)
    return Plan(
        args,
        done,
        tuple(_stages(args, model, ledger)),
        tuple(online.loads(ledger, model.on_gpu)),
        tuple(ledger.costs()),
        {name: quantity.value for name, quantity in ledger.quantities.items()},
    )


def given(args: PlanArgs, model: ModelShape) -> list[Quantity]:
    """Returns what a plan knows without benchmarks: definitions, what was asked, the model, the machines."""
    gpu = GPUS[args.gpu]
    found = [Quantity(name, value, unit, "definition", "") for name, (value, unit) in DEFINITIONS.items()]
    found += [_asked(name, getattr(args, name), unit) for name, unit in ASKED_UNITS.items()]
    for name, unit in (("num_gpus", "gpu"), ("num_workers", "worker"), ("gpu_usd_per_h", "USD / gpu / h")):
        if getattr(args, name) is not None:
            found.append(_asked(name, getattr(args, name), unit))
    if args.gpu_usd_per_h is None:
        found.append(
            Quantity("gpu_usd_per_h", gpu.usd_per_h, "USD / gpu / h", "assumed", f"for {gpu.name}; prices move")
        )
    for name, value, unit in (
        ("matmul_params", model.matmul_params, "weights"),
        ("all_params", model.all_params, "weights"),
        ("width", model.width, "numbers"),
    ):
        found.append(Quantity(name, value, unit, "data sheet", model.source))
    for name, value, unit in (
        ("gpu_peak_flops", gpu.peak_flops, "FLOP / s / gpu"),
        ("gpu_memory_gb", gpu.memory_gb, "GB"),
    ):
        found.append(Quantity(name, value, unit, "data sheet", f"{gpu.name}, dense products of 16 bits"))
    factor, state = (
        (3, "two moments") if args.embedding_optimizer == "adam" else (1 + 1 / args.embedding_dim, "a sum a row")
    )
    network = f"--network_gbit_per_s {number(args.network_gbit_per_s)}, in bytes"
    return [
        *found,
        Quantity(
            "optimizer_factor", factor, "1", "asked", f"--embedding_optimizer {args.embedding_optimizer}: {state}"
        ),
        Quantity(
            "table_copies", float(args.table == "remote"), "1", "asked", f"--table {args.table}; 1: in each process"
        ),
        Quantity("network_gb_per_s", args.network_gbit_per_s / 8, "GB / s", "asked", network),
    ]


def _asked(name: str, value: float, unit: str) -> Quantity:
    """Returns a flag's value; a price that nobody gave is an assumption."""
    default = PlanArgs.model_fields[name].default == value
    if name in PRICES and default:
        return Quantity(name, value, unit, "assumed", f"--{name} says otherwise; prices move")
    return Quantity(name, value, unit, "asked", f"--{name}" + (", its default" if default else ""))


def _with(rules: tuple[Rule, ...], added: Rule) -> list[Rule]:
    """Returns the rules with another one before the first that reads it."""
    place = next(place for place, rule in enumerate(rules) if added.name in rule.names)
    return [*rules[:place], added, *rules[place:]]


def _stages(args: PlanArgs, model: ModelShape, ledger: Ledger) -> list[Stage]:
    def count(name: str, what: str) -> str:
        return f"{ledger[name]:,.0f} {what}{'' if ledger[name] == 1 else 's'}"

    kind, of = (f"{args.gpu.upper()} GPU", "gpus") if model.on_gpu else ("core", "cores")
    trained = count("train_workers", "worker") + (
        f" of one {args.gpu.upper()}" if args.train_device == "gpu" else f" of {ledger['train_cores']:.0f} cores"
    )
    where = f"{count('replicas', 'replica')} on {count('serve_nodes', 'node')}"
    once = [
        ("prepare", count("prepare_cores", "core"), "prepare", "once"),
        ("extract", count(f"extract_{of}", kind), "extract", "once"),
        ("refresh", count(f"refresh_{of}", kind), "refresh", "a day"),
        ("train", trained, "train", "once"),
        ("score", count("score_cores", "core"), "score", "once"),
    ]
    return [
        *(
            Stage(name, machines, ledger[f"{key}_h"], ledger[f"{key}_usd"], period)
            for name, machines, key, period in once
        ),
        Stage("serve", where, None, ledger["serve_usd"], "a month"),
        Stage("storage", f"{ledger['kept_gb']:,.1f} GB", None, ledger["storage_usd"], "a month"),
    ]
