"""What fields of a configuration must hold together: each cross-field check and its message."""

from __future__ import annotations

import re

import pytest
from test_config import load

from llm4msr.config import ConfigError

TABLE = ["--data.kind", "table", "--data.raw_uri", "raw", "--data.table.timestamp_column", "time"]
SHARDED = ["--model.embedding_sharding=sharded", "--train.embedding_optimizer=rowwise_adagrad"]
FEATURE = '[{"name": "x", "source": "user", "kind": "numeric"}]'


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.split.valid_from=2023-01-01"], "data.split: valid_from and test_from go together"),
        (
            ["--data.split.valid_fraction=0.6", "--data.split.test_fraction=0.4"],
            "data.split: valid_fraction 0.6 + test_fraction 0.4 leave nothing to train on",
        ),
        ([*TABLE, "--data.split.kind=column"], "data.split: kind = 'column' with column = None"),
        ([*TABLE, "--data.split.column=part"], "data.split: kind = 'time' with column = 'part'"),
        (["--data.split.timezone=Mars/Base"], "data.split: timezone 'Mars/Base' is not an IANA time zone"),
        (
            ["--data.history", '[{"name": "x"}, {"name": "y"}, {"name": "x"}]'],
            "data.history: the name 'x' is given to more than one feature",
        ),
        (
            [*TABLE, "--data.table.label_column=a", "--data.table.rating_column=b"],
            "data.table: label_column 'a' and rating_column 'b': give one",
        ),
        (
            ["--data.kind=table", "--data.raw_uri=raw", "--data.table.user_column=u"],
            "data.table: timestamp_column or position_column is needed",
        ),
        ([*TABLE, "--data.table.features", FEATURE], "data.table: columns ['x'] need table.users, which is not set"),
        (
            [*TABLE, '--data.table.item_text_columns=["title"]'],
            "data.table: columns ['title'] need table.items, which is not set",
        ),
        (["--data.kind=kuaisar"], "data: raw_uri is needed for kind = 'kuaisar'"),
        (["--data.negatives_per_positive=2"], "data: kind = 'synthetic' has labels and times of its own"),
        (
            ["--data.split.kind=column", "--data.split.column=part"],
            "data: kind = 'synthetic' has labels and times of its own",
        ),
        (
            ["--data.kind=table", "--data.raw_uri=raw", "--data.table.position_column=p"],
            "data: split.kind = 'time' needs table.timestamp_column",
        ),
        (
            ["--train.batch_size=100", "--train.accumulate_steps=2"],
            "train: batch_size 100 is not divisible by num_lanes x accumulate_steps = 8 x 2 = 16; "
            "the nearest that is: 96",
        ),
        (
            ["--train.num_workers=3"],
            "train: num_lanes 8 is not divisible by num_workers 3: workers would take unequal parts of each step; "
            "set num_lanes to 9",
        ),
        (["--train.num_workers=[1, 16]"], "train: num_lanes 8 is less than the 16 workers of num_workers: "),
        (["--train.num_workers=[3, 2]"], "train: num_workers = [3, 2]: the first is the fewest, the second the most"),
        (
            ["--model.embedding_sharding=sharded"],
            "configuration: model.embedding_sharding = 'sharded' needs train.embedding_optimizer 'rowwise_adagrad', "
            "found 'adam'",
        ),
        (
            [*SHARDED, "--train.num_workers=0"],
            "configuration: model.embedding_sharding = 'sharded' needs train.num_workers workers of Ray Train, found 0",
        ),
        (
            ["--train.embedding_weight_decay=0.001"],
            "configuration: train.embedding_weight_decay = 0.001 needs train.embedding_optimizer 'dense_adam', found "
            "'adam'",
        ),
        (["--experiment.seeds=[1, 1]"], "experiment: seeds = [1, 1]: give at least one value, each once"),
        (["--experiment.knowledge=[]"], "experiment: knowledge = []: give at least one value, each once"),
    ],
)
def test_cross_field_check(flags, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load(*flags)


def test_what_the_cross_field_checks_allow():
    load(*TABLE, "--data.split.kind=column", "--data.split.column=part")
    load(*TABLE, "--data.negatives_per_positive=4")
    load("--data.split.valid_from=2023-05-28", "--data.split.test_from=2023-05-29")
    load("--data.kind=table", "--data.raw_uri=r", "--data.table.position_column=p", "--data.split.kind=per_user_last")
    load("--train.batch_size=8", "--train.num_workers=4")
    load("--train.num_workers=[1, 3]")  # unequal shares for a while beat no training
