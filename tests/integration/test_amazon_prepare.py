"""The recipe of the Amazon reviews on the real files, through Ray, against plain counts of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pytest

from llm4msr import storage
from llm4msr.data.pipeline import prepare
from llm4msr.settings import load_config

RECIPE = Path(__file__).resolve().parents[2] / "jobs" / "recipes" / "amazon_reviews.toml"
# Rows that differ from all before them, and those of them with 4 or 5 stars.
COUNTS = {"fashion": (3108, 2591), "beauty": (4242, 4005), "gift_cards": (2972, 2906), "magazines": (2333, 1881)}


@pytest.mark.shared
def test_recipe_on_the_real_files(shared, ray_cluster, tmp_path):
    raw_uri = str(shared / "data" / "amazon-2018-5core")
    flags = ["--config", str(RECIPE), "--workspace_uri", str(tmp_path), "--data.raw_uri", raw_uri]
    uri = prepare(load_config(flags))
    data = storage.read_manifest(uri, "prepared data")["data"]
    rows, positives = Counter(), Counter()
    for cell in data["rows"]:
        rows[cell["scenario"]] += cell["num_rows"]
        positives[cell["scenario"]] += cell["num_positives"]
    assert {name: (rows[name], positives[name]) for name in COUNTS} == COUNTS
    assert (data["raw_rows"], data["merged_rows"], data["rejected"]) == (13_792, 1_137, [])
    assert (data["num_users"], data["num_items"]) == (2197, 3989)
    items = storage.read_parquet(storage.join(uri, "items.parquet"))
    card = items.filter(pc.equal(items["key"], "B00AR51Y5I")).to_pylist()[0]
    assert card["num_train_rows"] > 0 and card["text"].endswith(": Gift Cards") and any(card["title"])
