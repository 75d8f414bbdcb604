"""Real prompts to measure with: users of the Amazon food and kitchen reviews, through the project's own code.

The users are the same in every run: those whose ids have the smallest hashes. Their purchases are prepared with the
recipe of this data set into a temporary workspace; nothing of the data is kept.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from benchmarks.harness import REPOSITORY, shared_path
from jobs.prepare import prepare
from llm4msr import storage, workspace
from llm4msr.config import Config
from llm4msr.data.prepared import PreparedData
from llm4msr.knowledge import profiles
from llm4msr.knowledge.prompts import Prompt
from llm4msr.settings import load_config

RECIPE = REPOSITORY / "jobs" / "recipes" / "amazon_food_kitchen.toml"
INTERACTIONS, ITEMS = "interactions.csv.gz", "items.csv.gz"
# With these a prompt has about 210 tokens of the embedded encoder, which reads 512 at most.
MAX_EVENTS_PER_SCENARIO = 24
MAX_TOKENS = 512


def data_path() -> Path | None:
    """Returns the folder of the raw data; None where this machine has none."""
    shared = shared_path()
    path = shared and shared / "data" / "amazon-food-kitchen"
    return path if path and (path / INTERACTIONS).is_file() else None


def prepare_users(raw_path: Path, workspace_path: Path, num_users: int) -> Config:
    """Prepares the data of `num_users` users below a temporary workspace; Ray is initialised by the caller.

    Returns:
        The configuration that this data was prepared with, ready for extraction.
    """
    subset = workspace_path / "raw"
    subset.mkdir(parents=True)
    rows = csv.read_csv(raw_path / INTERACTIONS)
    users = pc.unique(rows["user_id"]).to_pylist()
    chosen = sorted(users, key=lambda user: hashlib.sha256(str(user).encode()).digest())[:num_users]
    rows = rows.filter(pc.is_in(rows["user_id"], value_set=pa.array(chosen)))
    with pa.output_stream(subset / INTERACTIONS, compression="gzip") as file:
        csv.write_csv(rows, file)
    (subset / ITEMS).write_bytes((raw_path / ITEMS).read_bytes())
    flags = {
        "workspace_uri": workspace_path,
        "data.raw_uri": subset,
        "knowledge.max_events_per_scenario": MAX_EVENTS_PER_SCENARIO,
        "knowledge.max_tokens": MAX_TOKENS,
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    config = load_config(["--config", str(RECIPE), *arguments], environ={})
    prepare(config)
    return config


def user_prompts(config: Config) -> list[Prompt]:
    """Returns the user prompts of prepared data, in order of the files, as `extract` would make them."""
    prepared = PreparedData.open(workspace.prepared_uri(config))
    users = prepared.users()
    user_texts, items = (profiles.clean_texts(table["text"]) for table in (users, prepared.items()))
    prompts = []
    for uri, _ in prepared.files("train"):
        liked = profiles.LikedRows.select(storage.read_parquet(uri, profiles.COLUMNS), items)
        found = profiles.user_profiles(
            liked,
            users["key"].combine_chunks(),
            user_texts,
            items,
            prepared.schema.scenarios,
            config.knowledge.max_events_per_scenario,
        )
        prompts += [profile.prompt for profile in found]
    return prompts
