"""jobs.status on workspaces that the project's own functions made: whole, interrupted, failed, damaged, on S3."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import explained_workspace as made
import numpy as np
import pyarrow as pa
import pytest
from module_constants import constant
from tiny import tiny_checkpoint, tiny_config, tiny_knowledge, tiny_prepared

from jobs import status as job
from llm4msr import storage, workspace
from llm4msr.data import synthetic
from llm4msr.data.adapters import build_adapter
from llm4msr.data.shards import Plan, parse_shard
from llm4msr.knowledge import table as knowledge_table
from llm4msr.knowledge.assemble import write_errors
from llm4msr.knowledge.place import knowledge_pointer_uri
from llm4msr.knowledge.plan import missing_prompts, open_plan, read_prompt_set
from llm4msr.knowledge.store import KnowledgeStore
from llm4msr.schema import REJECTS
from llm4msr.scoring import plan as score_plan
from llm4msr.scoring.units import ScoreUnit, Task
from llm4msr.status import stages
from llm4msr.status.look import read_status
from llm4msr.status.rows import STAGES
from llm4msr.training.run import plan_runs

LATER_S = 3600.0
KINDS = ["none", "llm", "shuffled"]


def asked(root: str, **changes):
    return tiny_config(workspace_uri=root, experiment={"knowledge": KINDS, "seeds": [0, 1]}, **changes)


def make(root: str, **changes):
    """A workspace whose data and knowledge are there, of six runs that are asked for."""
    made.build(root)
    config = asked(root, **changes)
    storage.write_json(workspace.prepared_pointer_uri(config), {"directory": "data"})
    storage.write_json(knowledge_pointer_uri(config), {"directory": "k1"})
    return config, plan_runs(config)


def finish(task) -> None:
    """A run as it is when it has been trained."""
    prepared = tiny_prepared(f"{task.run_uri}.data", num_rows=60)
    knowledge = None if task.knowledge == "none" else tiny_knowledge()
    tiny_checkpoint(task.checkpoint_uri, prepared, knowledge, **task.config.model_dump(mode="json"))
    storage.remove(prepared.uri)


def rows_of(root: str, stage: str, **options):
    return [row for row in read_status(root, **options).rows if row.stage == stage]


def row_of(root: str, stage: str, **options):
    (row,) = rows_of(root, stage, **options)
    return row


def later(root: str, stage: str):
    return row_of(root, stage, now=time.time() + LATER_S)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A workspace with something of each stage, all of it complete."""
    root = str(tmp_path_factory.mktemp("status") / "w")
    config, tasks = make(root)
    for task in tasks:
        finish(task)
        storage.write_json(storage.join(task.run_uri, "evaluation.json"), [])
    report = {"results": [{}, {}], "runs": [{}], "created_at": "2026-01-02T03:04:05+00:00"}
    checkpoint = tasks[0].checkpoint_uri.removeprefix(f"{root}/")
    storage.write_json(workspace.report_uri(config), report | {"checkpoint": checkpoint})
    done = {"kind": "scores", "num_rows": 40, "num_failed": 2, "num_files": 3, "created_at": report["created_at"]}
    storage.write_manifest(storage.join(root, "scores", "s"), done)
    summary = {"models": [{"runs": [{"run": f"r{i}", "state": "finished"} for i in range(3)]}], "failures": []}
    storage.write_json(storage.join(root, "compare-1", "summary.json"), summary | {"created_at": report["created_at"]})
    storage.write_manifest(storage.join(root, "compare-1"), {"kind": "comparison"})
    trials = [{"state": "finished"}, {"state": "stopped"}, {"state": "stopped"}]
    storage.write_manifest(storage.join(root, "runs", "tune-1"), {"kind": "search", "trials": trials})
    return root


def test_everything_complete(whole):
    status = read_status(whole)
    assert {row.stage for row in status.rows} == set(STAGES) and {row.state for row in status.rows} == {"complete"}
    found = {row.place: row for row in status.rows}
    assert found["prepared/data"].counts == {"train rows": 28, "valid rows": 6, "test rows": 6, "rejected": 0}
    assert found["knowledge/k1"].written_at == 1735689600  # as its manifest says: 2025-01-01
    assert len(rows_of(whole, "train")) == 7
    everything, evaluated = rows_of(whole, "train")[0], row_of(whole, "evaluate")
    assert everything.counts == {"complete": 6, "planned": 6} and everything.place == "runs"
    assert everything.note == "6 of the 6 runs that the newest jobs.train asked for are complete"
    assert evaluated.counts == {"evaluated": 6, "trained": 6}
    assert found["runs/tune-1"].counts == {"trials finished": 1, "trials stopped": 2}
    assert found["compare-1"].counts == {"runs finished": 3}
    assert found["scores/s"].counts == {"rows": 40, "failed": 2, "files": 3}
    assert found["report.json"].counts == {"results": 2, "runs": 1} and found["report.json"].note == ""
    assert status.age_s(found["report.json"]) == pytest.approx(time.time() - 1767323045, abs=100)


def snapshot(root: str) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(Path(root).rglob("*"))}


def test_nothing_is_written_and_json_says_the_same(whole, tmp_path, capsys):
    before = snapshot(whole)
    assert job.main(["--workspace_uri", whole, "--json", str(tmp_path / "s.json")]) == 0
    shown = capsys.readouterr().out
    assert job.main(["--workspace_uri", whole, "--json", "-"]) == 0
    assert snapshot(whole) == before
    tree, saved = json.loads(capsys.readouterr().out), json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    assert [(s["place"], s["state"], s["counts"]) for s in tree["stages"]] == [
        (s["place"], s["state"], s["counts"]) for s in saved["stages"]
    ]
    report = tree["stages"][-1]
    assert (report["stage"], report["written_at"]) == ("report", "2026-01-02T03:04:05+00:00") and report["age_s"] > 0
    for row in tree["stages"]:
        assert row["place"] in shown and row["state"] in shown
    assert "train rows 28, valid rows 6" in shown


def test_what_is_no_workspace_is_refused(tmp_path, capsys):
    for place, message in ((tmp_path / "nowhere", "no such folder"), (tmp_path, "is no workspace: it holds none of")):
        (tmp_path / "other").mkdir(exist_ok=True)
        assert job.main(["--workspace_uri", str(place)]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        job.parse(["--workspace_uri", "x", "--running_within_min", "0"])


def test_a_new_workspace_has_absent_stages(tmp_path):
    (tmp_path / "raw").mkdir()
    found = read_status(str(tmp_path)).rows
    assert [(row.stage, row.state) for row in found] == [(stage, "absent") for stage in STAGES if stage != "tune"]


def staged(root: str) -> Plan:
    """A prepare that has parsed one of its files when it ends."""
    small = {"num_users": 20, "num_items": 20, "rec_rows_per_user": 3, "search_rows_per_user": 2, "num_shards": 2}
    config = tiny_config(workspace_uri=root, data={"kind": "synthetic", "synthetic": small})
    raw_uri = workspace.synthetic_raw_uri(config)
    synthetic.generate(config.data.synthetic, raw_uri)
    adapter = build_adapter(config.data, raw_uri)
    events = tuple(shard for shard in adapter.shards() if adapter.is_events(shard))
    uri = storage.join(workspace.prepared_root(config), "half")
    plan = Plan(adapter, config.data, events, 2, f"{uri}.staging", uri)
    parse_shard(0, plan)
    return plan


def test_a_prepare_that_was_killed_and_one_that_refused_its_rows(tmp_path):
    root = str(tmp_path / "w")
    plan = staged(root)
    found = row_of(root, "prepare")
    assert (found.state, found.place) == ("running", "prepared/half")
    assert found.counts == {"shards parsed": 1} and later(root, "prepare").state == "stopped"
    storage.remove(plan.staging_uri)
    storage.write_parquet(f"{plan.uri}.rejects.parquet", pa.Table.from_pylist([{"file": "f"}] * 3, REJECTS))
    found = row_of(root, "prepare")
    assert (found.state, found.counts) == ("failed", {"rejected": 3})
    assert "prepared/half.rejects.parquet" in found.note


def half_extracted(root: str) -> tuple[str, KnowledgeStore, list]:
    """An extraction that has committed one of three units when it ends."""
    uri, store = f"{root}/knowledge/k2", KnowledgeStore(f"{root}/knowledge/store", made.IDENTITY)
    made.write_prompts(f"{uri}/prompts/bucket-00000.parquet", made.USERS)
    files = [{"file": "bucket-00000.parquet", "level": "user", "num_prompts": len(made.USERS)}]
    storage.write_manifest(f"{uri}/prompts", {"files": files, "counts": {}})
    prompts = read_prompt_set([(f"{uri}/prompts/bucket-00000.parquet", "user")])
    open_plan(f"{uri}/plan.parquet", prompts, missing_prompts(prompts, store.index()), 2)
    made.commit(store, made.USERS[:2], False, 10_000)
    return uri, store, [prompts]


def test_an_extraction_that_was_killed(tmp_path):
    root = str(tmp_path)
    uri, store, _ = half_extracted(root)
    found = row_of(root, "extract")
    assert (found.state, found.counts) == ("running", {"prompts": 6, "units done": 1, "units planned": 3})
    assert later(root, "extract").state == "stopped"
    # What an earlier extraction left in the store is not this one's.
    (part,) = Path(store.uri).glob("part-*")
    os.utime(part, (0, time.time() - LATER_S))
    assert row_of(root, "extract").counts["units done"] == 0
    storage.remove(f"{uri}/plan.parquet")
    storage.remove(f"{uri}/prompts/manifest.json")
    assert row_of(root, "extract").counts == {"prompt files": 1}


def test_an_extraction_that_failed_on_its_prompts(tmp_path):
    root = str(tmp_path)
    uri, store, (prompts,) = half_extracted(root)
    write_errors(f"{uri}/errors.parquet", store.index(), prompts)
    newest = time.time() + 1
    os.utime(f"{uri}/errors.parquet", (newest, newest))
    found = row_of(root, "extract")
    assert found.state == "failed" and found.counts["failed"] == 3 and "errors.parquet" in found.note
    np.save(f"{uri}/scenarios.npy", np.zeros(1))  # few enough errors: the table is being put together
    assert row_of(root, "extract").state == "running"


def test_a_batch_of_scores_that_was_killed(tmp_path):
    root = str(tmp_path / "w")
    config, tasks = make(root, score={"top_k": 2})
    task = next(task for task in tasks if task.knowledge == "llm")
    finish(task)
    name = json.loads(Path(task.checkpoint_uri, "metadata.json").read_text(encoding="utf-8"))["model_version"]
    os.rename(task.run_uri, Path(task.run_uri).with_name(name))
    settings = {**config.score.model_dump(), "checkpoint_uri": f"{root}/runs/{name}/checkpoint"}
    config = config.model_copy(update={"score": type(config.score)(**settings)})
    model = score_plan.open_model(config)
    rows = score_plan.open_input(config.score, model)
    uri, plan = score_plan.open_plan(config, model, rows, 16)
    units = score_plan.cut_units(rows, plan["rows_per_unit"]).to_pylist()
    asked_for = {"columns": rows.columns, "scenarios": model.schema.scenario_names, "top_k": 2}
    ScoreUnit(Task(uri, model.uri, model.version, "users", **asked_for), 1).run(units[0])
    found = row_of(root, "score")
    assert (found.state, found.counts) == ("running", {"units done": 1, "units planned": len(units)}) and len(
        units
    ) == 3
    assert later(root, "score").state == "stopped"


def test_a_report_whose_checkpoint_is_gone_and_damaged_files(tmp_path):
    root = str(tmp_path)
    storage.write_json(f"{root}/report.json", {"results": [], "runs": [], "checkpoint": "runs/x/checkpoint"})
    assert row_of(root, "report").note == "names a checkpoint that is not there: runs/x/checkpoint"
    made.build(root)
    (tmp_path / "knowledge" / "k1" / "manifest.json").write_text("{", encoding="utf-8")
    (tmp_path / "report.json").write_text("[]", encoding="utf-8")
    found = {row.stage: row for row in read_status(root).rows}
    assert (found["extract"].state, found["report"].state) == ("failed", "failed")
    assert "manifest.json: not JSON" in found["extract"].note and "TypeError" in found["report"].note
    assert found["prepare"].state == "complete"


def test_the_same_on_s3(whole, bucket, tmp_path):
    root = f"s3://{bucket}/w"
    for path in Path(whole).rglob("*"):
        if path.is_file():
            storage.copy(str(path), f"{root}/{path.relative_to(whole).as_posix()}")
    local, remote = read_status(whole), read_status(root)
    assert {(r.place, r.state) for r in remote.rows} == {(r.place, r.state) for r in local.rows}
    counts = {r.place: r.counts for r in local.rows}
    assert {r.place: r.counts for r in remote.rows} == counts
    assert [r for r in remote.rows if not r.written_at] == []
    half_extracted(f"s3://{bucket}/v")
    found = row_of(f"s3://{bucket}/v", "extract")
    assert (found.state, found.counts["units done"], found.counts["units planned"]) == ("running", 1, 3)
    with pytest.raises(storage.StorageError, match="no such folder"):
        read_status(f"s3://{bucket}/nothing")
    with pytest.raises(storage.StorageError, match=r"cannot be listed; .*NoSuchBucket"):
        read_status("s3://there-is-no-such-bucket/w")


def test_names_of_files_are_those_of_who_writes_them():
    assert constant("llm4msr/knowledge/pipeline.py", "PLAN_FILE") == stages.PLAN_FILE
    assert constant("llm4msr/scoring/plan.py", "PLAN_FILE") == stages.SCORE_PLAN_FILE
    assert knowledge_table.FILES["scenarios_SK"] == stages.SCENARIOS_FILE


@pytest.mark.parametrize(("age_s", "text"), [(None, ""), (0.4, "0 s"), (61, "1 min"), (7200, "2 h"), (1e6, "11 d")])
def test_ages_are_read_at_a_glance(age_s, text):
    assert job.age_text(age_s) == text
