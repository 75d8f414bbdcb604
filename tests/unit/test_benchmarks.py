"""The benchmarks' framework, and a smoke run of what is cheap; nothing timed is asserted."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from benchmarks import extract_cpu, extract_gpu, extract_memory, extract_resume
from benchmarks.bare import BareModel, min_cosine, sentence_transformer
from benchmarks.harness import (
    REPOSITORY,
    Goal,
    Result,
    environment,
    goal_table,
    interleave,
    paired_ratio,
    rates,
    report,
)
from benchmarks.processes import Processes
from llm4msr import storage

TEXTS = ["green tea", "a steel pan and a kettle", "tea", "the last mixer that was made of steel", "a knife"]


def result(*goals: Goal, **fields) -> Result:
    values = {"config": {"benchmark": "x"}, "seconds": {"a": [1.0]}, "medians": {"a s": 1.0}, "ratios": {}} | fields
    return Result(goals=goals, environment={"date": "2026-01-01"}, **values)


def test_sides_run_in_turn_and_may_name_their_own_seconds():
    calls = []

    def side(name, own=None):
        return lambda: calls.append(name) or own

    seconds = interleave({"a": side("a"), "b": side("b", 2.5)}, rounds=2)
    assert calls == ["a", "b"] * 3  # the first round is not kept
    assert len(seconds["a"]) == 2 and all(0 <= s < 1 for s in seconds["a"])
    assert seconds["b"] == [2.5, 2.5]
    calls.clear()
    interleave({"a": side("a"), "b": side("b")}, rounds=1, warm_up=False)
    assert calls == ["a", "b"]
    with pytest.raises(ValueError, match="rounds = 0"):
        interleave({"a": side("a")}, rounds=0)


def test_a_ratio_pairs_what_ran_in_the_same_round():
    # The machine was three times slower in the second round and five times slower in the third: A was always twice B.
    a, b = rates([1.0, 3.0, 5.0], work=10), rates([2.0, 6.0, 10.0], work=10)
    assert a == pytest.approx([10, 10 / 3, 2])
    assert paired_ratio(a, b) == pytest.approx(2)
    # Not the ratio of the medians, which would be 3.
    assert paired_ratio([1, 3, 9], [1, 9, 1]) == 1


@pytest.mark.parametrize(
    ("measured", "comparison", "target", "met"),
    [
        (1.0, ">=", 1.0, True),
        (0.99, ">=", 1.0, False),
        (1.0, ">", 1.0, False),
        (1.0, "<", 1.0, False),
        (0.5, "<", 1.0, True),
        (1.0, "<=", 1.0, True),
        (float("nan"), "<", 1.0, False),
        (None, "<", 1.0, None),
    ],
)
def test_a_goal_compares_what_was_measured(measured, comparison, target, met):
    assert Goal("x", measured, comparison, target).met is met


def test_the_result_file_has_the_agreed_keys(tmp_path, capsys):
    good, bad, absent = Goal("g", 2.0, ">=", 1.0), Goal("b", 0.123456789, ">=", 1.0), Goal("u", None, ">=", 1.0)
    report(result(good), tmp_path / "deep" / "x.json")
    written = json.loads((tmp_path / "deep" / "x.json").read_text())
    assert list(written) == ["environment", "config", "seconds", "medians", "ratios", "goals", "met"]
    assert written["goals"] == [{"name": "g", "measured": 2.0, "comparison": ">=", "target": 1.0, "met": True}]
    assert written["met"] is True and written["seconds"] == {"a": [1.0]}
    assert "a s" in capsys.readouterr().out
    assert result(good, bad).met is False
    assert result(bad).to_json()["goals"][0]["measured"] == 0.12346
    # What was not measured is not reached.
    unmeasured = result(good, absent).to_json()
    assert unmeasured["met"] is False and [g["met"] for g in unmeasured["goals"]] == [True, False]


def test_a_run_that_does_not_judge_says_why_and_meets_nothing():
    written = result(Goal("g", 2.0, ">=", 1.0), not_judged="no GPU").to_json()
    assert written["met"] is None and written["goals"][0]["met"] is None
    assert written["config"]["not_judged"] == "no GPU"


def test_one_table_of_goal_measured_met():
    results = [result(Goal("fast", 12345.6, ">=", 1), Goal("small", 2.0, "<", 1.3)).to_json()]
    results.append(result(Goal("on a GPU", None, ">=", 0.5), not_judged="no GPU").to_json())
    text = io.StringIO()
    Console(file=text, width=120).print(goal_table(results))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.getvalue().splitlines() if "│" in line]
    assert rows == [
        ["x", "fast", "1.235e+04", ">= 1", "yes"],
        ["x", "small", "2", "< 1.3", "no"],
        ["x", "on a GPU", "-", ">= 0.5", "not judged: no GPU"],
    ]


def test_the_environment_is_dated_and_names_no_machine_and_no_place():
    found = environment()
    assert found["date"][:2] == "20" and found["torch"] == torch.__version__
    assert found["num_cores"] >= 1 and found["memory_gib"] > 0 and found["cpu"]
    text = json.dumps(found)
    assert socket.gethostname() not in text and str(REPOSITORY) not in text and str(Path.home()) not in text


@pytest.fixture(scope="module")
def bare() -> BareModel:
    extract_cpu.quiet()
    return BareModel(extract_cpu.model_path(), torch.float32, max_tokens=16)


def test_ready_batches_hold_every_prompt_once_within_the_budget(bare):
    lengths = [len(ids) for ids in bare.token_ids(TEXTS)]
    assert sorted(lengths) != lengths
    batches = bare.ready_batches(TEXTS, batch_tokens=20)
    assert len(batches) > 1 and all(b.ids_BT.numel() <= 20 for b in batches)
    rows = np.concatenate([b.rows_B for b in batches])
    assert sorted(rows) == list(range(len(TEXTS)))
    assert [lengths[i] for i in rows] == sorted(lengths)
    in_order = bare.ready_batches(TEXTS, batch_tokens=20, by_length=False)
    assert np.concatenate([b.rows_B for b in in_order]).tolist() == list(range(len(TEXTS)))
    assert all(b.ids_BT.numel() <= 20 for b in in_order)


def test_all_sides_of_the_cpu_benchmark_compute_the_same_vectors(bare):
    alone = bare.one_at_a_time(TEXTS)
    assert alone.shape == (len(TEXTS), 384)
    assert min_cosine(alone, bare.forward(bare.ready_batches(TEXTS, 20))) > 0.99999
    other = sentence_transformer(extract_cpu.model_path(), 16).encode(TEXTS, show_progress_bar=False)
    np.testing.assert_allclose(other, alone, atol=1e-5)  # scaled to unit length they would differ
    assert min_cosine(alone, alone[::-1]) < 0.99


def write_share(items, folder):
    """Runs in the processes of the next test."""
    return {"share": lambda: (Path(folder) / f"{items[0]}.json").write_text(json.dumps(items))}


def test_processes_share_the_work(tmp_path):
    with Processes(write_share, [1, 2, 3, 4, 5], str(tmp_path), 2) as processes:
        assert processes.run("share") > 0
        found = sorted(json.loads(path.read_text()) for path in tmp_path.iterdir())
        assert found == [[1, 3, 5], [2, 4]]
        with pytest.raises(RuntimeError, match="exit code 1"):
            processes.run("no such side")


def test_resume_finds_a_missing_part(tmp_path):
    extract_resume.write_store(str(tmp_path), num_keys=600, width=2)
    found = extract_resume.find_missing(str(tmp_path), 600)
    assert found["peak_bytes"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.9)
    parts = storage.list_files(str(tmp_path), ".parquet")
    assert len(parts) == 2
    storage.remove(parts[0][0])
    with pytest.raises(RuntimeError, match="of 600 keys of a finished store were found missing"):
        extract_resume.find_missing(str(tmp_path), 600)


def test_memory_is_sampled_per_kind_of_process():
    code = (
        "import subprocess, time; held = b'x' * 2**27; names = ['ray::MapWorker(MapBatches(EncodeUnit)).submit', "
        "'ray::task', 'raylet']; [c.wait() for c in [subprocess.Popen([n, '1.5'], executable='sleep') for n in names]]"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        sampler = extract_memory.Sampler(psutil.Process(process.pid))
        process.wait()
        peaks = sampler.stop()
    assert {kind for kind, _ in peaks} == set(extract_memory.KINDS)
    assert peaks["driver", "rss"] > 2**27 > peaks["actor", "rss"] > 0
    assert peaks["driver", "uss"] <= peaks["driver", "pss"] <= peaks["driver", "rss"]


@pytest.mark.parametrize(("size", "billion"), [("1.5B", 1.31), ("7B", 6.53)])
def test_gpu_shapes_have_the_published_number_of_weights(size, billion):
    model = extract_gpu.build(extract_gpu.SHAPES[size], "meta")
    assert extract_gpu.num_matmul_weights(model) / 1e9 == pytest.approx(billion, abs=0.005)
    small = extract_gpu.build(extract_gpu.scaled(extract_gpu.SHAPES[size], 0.02), "meta")
    assert extract_gpu.num_matmul_weights(small) < 3e6


def test_gpu_lengths_are_those_of_the_real_prompts():
    lengths = extract_gpu.real_lengths(500)
    assert len(lengths) == 500 and max(lengths) == 512 and lengths != sorted(lengths)
    assert np.mean(lengths) == pytest.approx(208.4, abs=1.5)


def test_gpu_smoke_run_needs_torch_and_transformers_alone(tmp_path):
    blocked = "import sys; sys.modules |= dict.fromkeys(('ray', 'pydantic', 'pyarrow', 'fsspec', 'psutil')); "
    call = f"sys.argv[1:] = ['--short', '--sizes', '7B', '--json', {str(tmp_path / 'g.json')!r}]; "
    code = blocked + call + "from benchmarks.extract_gpu import main; main()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    written = json.loads((tmp_path / "g.json").read_text())
    assert written["met"] is None and "smoke" in written["config"]["not_judged"]
    assert set(written["seconds"]) == {f"7B {s}" for s in ("matmul", "batched", "one_at_a_time", "generate")}
    assert written["medians"]["7B least cosine batched to one at a time"] > 0.99
    assert 0 < written["medians"]["7B padding share"] < 1 and written["ratios"]["7B share of the matmul rate"] > 0


def test_what_cannot_run_here_says_so_by_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM4MSR_SHARED", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["extract_cpu", "--json", str(tmp_path / "c.json")])
    assert extract_cpu.main() == 0
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["met"] is None and "amazon-food-kitchen" in written["config"]["not_judged"]
    assert "extract_cpu" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["extract_gpu", "--json", str(tmp_path / "g.json")])
    assert extract_gpu.main() == 0
    assert json.loads((tmp_path / "g.json").read_text())["config"]["not_judged"] == "no CUDA GPU on this machine"


def test_all_benchmarks_run_from_one_command_and_keep_no_file_that_does_not_judge(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--results", str(tmp_path)]
    done = subprocess.run([*command, "--short", "extract_gpu"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extract_gpu" in done.stdout and "not judged" in done.stdout and not list(tmp_path.iterdir())
    done = subprocess.run([*command, "extract_gup"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2 and "no benchmark extract_gup; there are extract_cpu" in done.stderr


def test_committed_results_are_complete_and_dated():
    for path in sorted((REPOSITORY / "benchmarks" / "results").glob("*.json")):
        written = json.loads(path.read_text())
        assert list(written) == ["environment", "config", "seconds", "medians", "ratios", "goals", "met"], path
        assert path.name == f"{written['config']['benchmark']}-{written['environment']['date'][:10]}.json"
        assert isinstance(written["met"], bool), path
