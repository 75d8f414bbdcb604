"""jobs.plan: its flags, what it prints, where its numbers come from, and the tables of docs/scaling.md."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
from pathlib import Path

import pytest
from pydantic import ValidationError

from jobs import plan as job
from llm4msr.config import ConfigError
from llm4msr.config.plan import PlanArgs
from llm4msr.planning.capacity import make_plan
from llm4msr.planning.ledger import number
from llm4msr.planning.unit_costs import newest_result, read_unit_costs

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
DOCUMENT = REPOSITORY / "docs" / "scaling.md"
SMALL = {"users": 1000, "interactions": 1e6, "items": 500}
LARGE = {"users": 1e8, "interactions": 5e10, "items": 1e7, "model": "qwen-7b", "train_device": "gpu"}

# ---- unit costs

MEASURED = ("extract_cpu", "extract_memory", "extract_resume", "train_throughput", "train_vocabulary")


def test_measured_costs_are_read_from_the_results():
    costs = {cost.name: cost for cost in read_unit_costs(BENCHMARKS)}
    for name, benchmark, section, figure in (
        ("embedded_prompts_per_s", "extract_cpu", "medians", "pipeline/bfloat16 prompts/s"),
        ("driver_bytes_per_user", "extract_memory", "medians", "driver rss growth, bytes a user"),
        ("resume_ms_per_part", "extract_resume", "medians", "s3 ms per part"),
        ("train_rows_per_s_on_cpu", "train_throughput", "medians", "loop llm4msr(star): rows/s"),
        ("measured_batch", "train_vocabulary", "config", "batch_size"),
    ):
        path = newest_result(BENCHMARKS, benchmark)
        tree = json.loads(path.read_text(encoding="utf-8"))
        assert (costs[name].value, costs[name].kind) == (tree[section][figure], "measured")
        assert f"results/{path.name}" in costs[name].source and tree["environment"]["date"][:10] in costs[name].source
    # What an assumption may stand in for is named as it is in the benchmark that will measure it.
    for name, benchmark in (("rank_100_ms", "ranker"), ("serve_requests_per_s", "serve_latency")):
        if newest_result(BENCHMARKS, benchmark) is None:
            assert costs[name].kind == "assumed" and benchmark in costs[name].source
    for benchmark, written in (
        ("ranker", 'f"{form}, {number}, kept"'),
        ("ranker", 'f"{name}: ms"'),
        ("serve_latency", '"{side}: requests/s at p99 < 50 ms"'),
        ("serve_latency", '"candidates": num_candidates'),
        ("extract_gpu", '"ratio share of the matmul rate"'),
        ("train_gpu", '"low_rank, rowwise_adagrad, bfloat16": ('),
        ("train_gpu", 'f"{side}: rows/s"'),
        ("train_workers", 'f"scaling efficiency {few} -> {many}, batch {batch_size}"'),
    ):
        assert written in (BENCHMARKS / f"{benchmark}.py").read_text(encoding="utf-8"), benchmark


def copied(tmp_path: Path) -> Path:
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    for name in ("unit_costs.toml", "prompt_lengths.json"):
        (folder / name).write_bytes((BENCHMARKS / name).read_bytes())
    for benchmark in MEASURED:
        path = newest_result(BENCHMARKS, benchmark)
        (folder / "results" / path.name).write_bytes(path.read_bytes())
    return folder


def write_result(folder: Path, name: str, **sections) -> None:
    tree = {"environment": {"date": f"{name[-10:]}T00:00:00+00:00"}, **sections}
    (folder / "results" / f"{name}.json").write_text(json.dumps(tree), encoding="utf-8")


def test_a_new_result_takes_an_assumptions_place(tmp_path):
    folder = copied(tmp_path)
    before = {cost.name: cost for cost in read_unit_costs(folder)}
    assert before["serve_requests_per_s"].kind == "assumed"
    figures = {"haproxy: requests/s at p99 < 50 ms": 512.0}
    write_result(folder, "serve_latency-2027-01-01", medians=dict.fromkeys(figures, 1.0), config={"candidates": 100})
    write_result(folder, "serve_latency-2027-02-03", medians=figures, config={"candidates": 150})
    after = {cost.name: cost for cost in read_unit_costs(folder)}
    assert (after["serve_requests_per_s"].value, after["serve_candidates"].value) == (512, 150)
    assert after["serve_requests_per_s"].kind == "measured" and "(2027-02-03)" in after["serve_requests_per_s"].source
    assert after["rank_100_ms"] == before["rank_100_ms"]


def test_a_result_without_its_figure_is_refused(tmp_path, capsys):
    folder = copied(tmp_path)
    write_result(folder, "train_throughput-2099-01-01", medians={})
    with pytest.raises(
        ConfigError, match=r"2099-01-01.json: lacks medians / loop llm4msr\(star\): rows/s, which train_"
    ):
        read_unit_costs(folder)
    assert job.main([*flags(SMALL), "--benchmarks", str(folder)]) == 2
    assert "train_rows_per_s_on_cpu is read from" in capsys.readouterr().err


@pytest.mark.parametrize("value", [0, -1, None, "7", True, math.inf])
def test_a_figure_must_be_a_number_above_0(tmp_path, value):
    folder = copied(tmp_path)
    write_result(folder, "ranker-2099-01-01", medians={"low_rank, 1000, kept: ms": value, "low_rank, 100, kept: ms": 1})
    with pytest.raises(ConfigError, match="rank_1000_ms needs a number above 0"):
        read_unit_costs(folder)


def test_a_missing_result_without_an_assumption_is_refused(tmp_path):
    folder = copied(tmp_path)
    newest_result(folder, "extract_resume").unlink()
    with pytest.raises(
        ConfigError, match=r"no extract_resume-YYYY-MM-DD.json, and .* run python -m benchmarks extract_resume"
    ):
        read_unit_costs(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a]\nunit = '1'\n", "a: Value error, neither a figure nor an assumption"),
        ("[a]\nunit = '1'\nassumed = 1\n", "needs assumed and reason"),
        ("[a]\nunit = '1'\nassumed = 0\nreason = 'x'\n", "greater than 0"),
        ("[a]\nunit = '1'\nbenchmark = 'x'\n", "belong together"),
        ("[a]\nunit = '1'\nbenchmark = 'x'\nfile = 'y'\nfigure = ['z']\n", "give one"),
        ("[a]\nunits = '1'\n", "units: Extra inputs"),
        ("[a\n", "not TOML"),
    ],
)
def test_wrong_unit_costs_are_refused(tmp_path, text, message):
    (tmp_path / "unit_costs.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_unit_costs(tmp_path)
    with pytest.raises(ConfigError, match="lie in benchmarks/ of a checkout"):
        read_unit_costs(tmp_path / "nowhere")


# ---- the command


def flags(asked: dict) -> list[str]:
    return [part for name, value in asked.items() for part in (f"--{name}", str(value))]


def test_the_command_prints_everything_and_its_json(tmp_path, capsys):
    path = tmp_path / "plan.json"
    assert job.main([*flags({**SMALL, "users": "1e3"}), "--json", str(path)]) == 0
    shown = capsys.readouterr().out
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert job.main([*flags(SMALL), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == tree
    assert [stage["name"] for stage in tree["stages"]] == [
        *("prepare", "extract", "refresh", "train", "score", "serve", "storage")
    ]
    flat = " ".join(shown.split())
    for line in tree["arithmetic"]:
        assert f"= {line['formula']} = {number(line['value'])}" in flat, line
    for cost in tree["unit_costs"]:
        assert f"{cost['name']} = {number(cost['value'])}" in flat and " ".join(cost["source"].split()) in flat
    assert "measured: benchmarks/results/extract_cpu-" in flat and "assumed: no benchmark of jobs.prepare yet" in flat


def test_what_is_over_its_limit_is_said(capsys):
    assert job.main(flags(LARGE)) == 0
    shown = capsys.readouterr().out
    assert "does not work as planned" in shown
    assert job.main(flags(SMALL)) == 0
    assert "does not work as planned" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"users": "many"}, "users: Input should be a valid number"),
        ({"users": 0}, "users: Input should be greater than or equal to 1 (found '0')"),
        ({"train_share": 0}, "train_share: Input should be greater than 0"),
        ({"model": "gpt"}, "model: Input should be 'minilm', 'qwen-1.5b' or 'qwen-7b' (found 'gpt')"),
        ({"model_params": 7e9}, "model_params and knowledge_width describe another model together"),
        ({"deadline_hours": "nan"}, "deadline_hours: Input should be"),
        ({"simulate_actors": "10,x"}, "simulate_actors: numbers of actors are needed"),
        ({"simulate_actors": "10", "losses_per_h": -1}, "losses_per_h: a number from 0 to 10"),
    ],
)
def test_wrong_flags_are_refused_with_a_message(asked, message, capsys):
    assert job.main(flags({**SMALL, **asked})) == 2
    assert message in capsys.readouterr().err


def test_unknown_and_missing_flags_end_the_program(capsys):
    for argv in (["--users", "1"], [*flags(SMALL), "--user", "1"]):
        with pytest.raises(SystemExit):
            job.main(argv)
    assert "--user" in capsys.readouterr().err
    with pytest.raises(ValidationError):
        PlanArgs(**SMALL, user=1)


# ---- the document

COMMAND = re.compile(r"^    python -m jobs\.plan (.*(?:\\\n.*)*)\n\n((?:\|.*\n|\n(?=\|))*)\n?", re.MULTILINE)


def refreshed(text: str) -> str:
    """Returns the document with what its commands print now."""

    def printed(found: re.Match[str]) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert job.main(shlex.split(found[1].replace("\\\n", " "))) == 0
        return f"    python -m jobs.plan {found[1]}\n\n{out.getvalue()}\n"

    return COMMAND.sub(printed, text)


def test_the_tables_of_the_document_are_what_the_command_prints():
    text = DOCUMENT.read_text(encoding="utf-8")
    assert len(COMMAND.findall(text)) >= 6
    script = Path(__file__).relative_to(REPOSITORY)
    assert refreshed(text) == text, f"docs/scaling.md is behind; refresh it: PYTHONPATH=. python {script}"


def test_figures_in_the_words_of_the_document():
    text = DOCUMENT.read_text(encoding="utf-8")
    values = make_plan(PlanArgs(**LARGE, num_gpus=1000), read_unit_costs(BENCHMARKS)).values
    assert f"for {values['units_per_s']:.0f} units a second" in text
    assert f"more than the {values['units_per_s_of_driver']:.0f} that" in text
    assert f"{values['key_bytes']:.0f} bytes beside the numbers" in text
    assert f"{values['feed_rows_per_s'] / 1000:.0f},000 rows/s" in text
    figures = [float(n) for n in re.search(r"= ([\d.e]+) / ([\d.e]+) / 3600 = ([\d.]+) gpu h", text).groups()]
    names = ("prompt_flop", "gpu_flops", "extract_gpu_h")
    assert figures == pytest.approx([values[name] for name in names], rel=1e-3)


if __name__ == "__main__":
    DOCUMENT.write_text(refreshed(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
