"""jobs.status on an S3 server that throttles, breaks off or refuses: the same answer, or one clear line."""

from __future__ import annotations

import pytest
from s3_faults import DENIED, Fault, faulty_here, slow_down

from jobs import status as job
from llm4msr import storage
from llm4msr.status.look import read_status
from llm4msr.training.state import TrainState, newest_state, save_state


@pytest.fixture
def store(s3_server, monkeypatch):
    """The proxy, which all that this process reads goes through."""
    with faulty_here(monkeypatch) as running:
        yield running


@pytest.fixture
def root(bucket, store) -> str:
    """A workspace with a search that is under way, and a comparison of which a report is there."""
    root = f"s3://{bucket}/w"
    storage.write_json(f"{root}/runs/tune-7/trials/a/trial.json", {})
    summary = {"models": [{"runs": [{"run": "a", "state": "finished"}]}], "failures": []}
    storage.write_json(f"{root}/compare-9/summary.json", summary)
    return root


def test_a_store_that_throttles_and_breaks_off_is_asked_again(root, store):
    now = read_status(root).looked_at
    calm = read_status(root, now=now)
    assert {row.stage: row.state for row in calm.rows if row.place} == {"tune": "running", "compare": "running"}
    for fault in (slow_down(3, "ListObjects"), Fault("reset", ("ListObjects",), 2), Fault("cut", ("ListObjects",), 1)):
        store.faults, store.given = [fault], []
        assert read_status(root, now=now) == calm
        assert fault.times == 0 and store.given


def test_a_store_that_refuses_is_told_in_one_line(root, store, capsys):
    store.faults = [DENIED]
    with pytest.raises(storage.StorageError, match=r"cannot be listed; object store: .*Access ?Denied"):
        read_status(root)
    assert job.main(["--workspace_uri", root]) == 2
    said = capsys.readouterr().err
    assert root in said and "cannot be listed" in said and "Traceback" not in said


def test_states_of_a_training_are_listed_again_too(root, store):
    uri = f"{root}/runs/r/training"
    assert newest_state(uri, "r", "s") is None
    save_state(uri, TrainState("r", "s"), {}, {}, 2, {})
    store.faults = [slow_down(3, "ListObjects")]
    assert newest_state(uri, "r", "s") == f"{uri}/step-000000000-epoch-00000"
    assert store.given
