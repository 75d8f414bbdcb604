"""What an extraction says while it runs and at its end."""

from __future__ import annotations

import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llm4msr import storage
from llm4msr.knowledge import progress
from llm4msr.knowledge.engines.interface import BatchDone, Hardware
from llm4msr.knowledge.progress import Monitor, Reading, progress_line, speed, write_scalars

CPU = Hardware("cpu", 1000)


@pytest.mark.parametrize(
    ("reading", "expected"),
    [
        (Reading(BatchDone(), 0, None, 0, 0), "loading the language model"),
        (Reading(BatchDone(), 3, CPU, 1, 1), "encoded 0/200 prompts"),
        (
            Reading(BatchDone(num_prompts=50, num_tokens=900, num_generated_tokens=100), 10, CPU, 1, 1),
            "encoded 50/200 prompts, 5.0 prompts/s, 100 tokens/s, 0 min 30 s left",
        ),
        (
            Reading(BatchDone(num_prompts=1, num_failed=1, num_tokens=3), 2, CPU, 1, 1),
            "encoded 1/200 prompts, 1 failed, 0.5 prompts/s, 2 tokens/s, 6 min 38 s left",
        ),
        # An actor that died repeats what it did not commit.
        (
            Reading(BatchDone(num_prompts=250), 10, CPU, 1, 1),
            "encoded 200/200 prompts, 20.0 prompts/s, 0 tokens/s, 0 min 0 s left",
        ),
    ],
)
def test_progress_line(reading, expected):
    assert progress_line(reading, 200) == expected


def test_who_waits_for_nodes_does_not_load_a_model():
    nothing = Reading(BatchDone(), 0, None, 0, 0)
    assert progress_line(nothing, 200) == "loading the language model"
    assert progress_line(nothing, 200, "waiting for nodes") == "waiting for nodes"
    assert progress_line(Reading(BatchDone(), 1, CPU, 1, 1), 200, "waiting for nodes") == "encoded 0/200 prompts"


def test_speed_is_what_the_sums_say():
    done = BatchDone(100, 1, num_tokens=9_000, num_computed_tokens=10_000, num_generated_tokens=2_000, busy_s=10)
    figures = speed(Reading(done, 8, Hardware("gpu", num_parameters=1_000_000, peak_flops=1e10), 2, 15))
    assert figures == {
        "num_actors": 2,
        "device": "gpu",
        "encode_seconds": 8,
        "actor_seconds": 15,
        "prompts_per_second": 12.5,
        "tokens_per_second": 1375.0,
        "num_tokens_read": 9_000,
        "num_tokens_written": 2_000,
        "padding_share": 0.1,
        "busy_share": 0.6667,
        # 2 x 10^6 weights x 11,000 tokens, without padding, in 10 busy seconds of a device that can do 10^10 a second
        "model_flop_utilisation": 0.22,
    }
    assert speed(Reading(done, 8, CPU, 2, 15))["model_flop_utilisation"] is None
    assert speed(Reading(BatchDone(), 0, None, 0, 0))["padding_share"] is None


def test_the_numbers_of_a_summary_go_to_tensorboard(tmp_path):
    write_scalars(
        str(tmp_path), {"num_prompts": 7, "share_encoded": 0.5, "device": "cpu", "failures": [], "padding": None}
    )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    found = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
    assert found == {"summary/num_prompts": 7, "summary/share_encoded": 0.5}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_progress_goes_to_the_log_and_to_tensorboard(where, tmp_path, request, monkeypatch, caplog):
    target = str(tmp_path / "tb") if where == "local" else f"s3://{request.getfixturevalue('bucket')}/tb"
    monkeypatch.setattr(progress, "PROGRESS_SECONDS", 0.01)
    started = time.monotonic()

    def read() -> Reading:
        seconds = time.monotonic() - started
        return Reading(BatchDone(num_prompts=max(1, int(50 * seconds)), num_tokens=70), seconds, CPU, 1, 1)

    with caplog.at_level("INFO", "llm4msr.knowledge"), Monitor(read, 100, target):
        time.sleep(0.2)
    assert "/100 prompts, " in caplog.text
    ((uri, size),) = storage.list_files(target)
    assert size > 0
    local = str(tmp_path / "copy" / uri.rsplit("/", 1)[-1])
    storage.copy(uri, local)
    events = EventAccumulator(str(tmp_path / "copy"))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {
        "extract/prompts_per_second",
        "extract/tokens_per_second",
        "extract/num_failed",
        "extract/share_done",
    } <= set(tags)
    shares = [event.value for event in events.Scalars("extract/share_done")]
    assert shares == sorted(shares) and 0 < shares[-1] <= 1
