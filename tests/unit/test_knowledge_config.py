"""What a knowledge configuration may not say, and that it is told what would be valid."""

from __future__ import annotations

import pytest

from llm4msr.config import ConfigError
from llm4msr.settings import config_from_dict

TABLE = {
    "kind": "table",
    "raw_uri": "x",
    "table": {"interactions": "i.csv", "position_column": "p"},
    "split": {"kind": "column", "column": "s"},
}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"knowledge": {"levels": []}}, "give at least one of scenario, user, item"),
        ({"knowledge": {"levels": ["user", "user"]}}, "each once"),
        ({"knowledge": {"levels": ["user"]}}, r"scenario_level is on, but knowledge.levels = \['user'\] lacks"),
        ({"knowledge": {"levels": ["scenario"]}}, r"user_level is on, but knowledge.levels"),
        ({"knowledge": {"state_from": "generated"}}, "needs generate = true"),
        ({"knowledge": {"num_actors": [3, 2]}}, r"give \[fewest, most\]"),
        ({"knowledge": {"gpus_per_actor": 1.5}}, "a share of one GPU, or whole GPUs"),
        ({"knowledge": {"gpus_per_actor": 2}}, "only engine = 'vllm' spreads a model over GPUs"),
        ({"knowledge": {"engine": "vllm", "device": "cpu"}}, "runs on GPUs"),
        ({"knowledge": {"batch_size": 16}}, "batch_size"),
        ({"knowledge": {"openai": {"base_url": "https://me:hunter2@host/v1"}}}, "variable OPENAI_API_KEY"),
        ({"data": TABLE, "knowledge": {"refresh_min_new_events": 2}}, "refresh_min_new_events needs data.split.kind"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as raised:
        config_from_dict(settings)
    assert "hunter2" not in str(raised.value)


def test_levels_alone_are_enough_where_the_model_reads_no_others():
    off = {"user_level": False, "scenario_level": False}
    config = config_from_dict({"knowledge": {"levels": ["item"]}, "model": {"meta": off}})
    assert config.knowledge.levels == ("item",)
    config_from_dict({"knowledge": {"levels": ["user"]}, "experiment": {"knowledge": ["none"]}})
    assert config_from_dict({"knowledge": {"num_actors": [1, 8]}}).knowledge.num_actors == (1, 8)
