"""A checkpoint: one directory that is enough to evaluate, serve or inspect a model.

* config.json           the whole resolved configuration of the run
* schema.json           features and scenarios
* users.parquet, items.parquet, vocab/, history/   feature tables, vocabularies and logs of likes, as prepared
* knowledge/            the knowledge table (absent for a backbone alone)
* model.safetensors     weights and buffers
* metadata.json         version, seed, knowledge, what it was trained on, versions of the libraries
* golden.json           requests and the scores that they get (`llm4msr.golden`)
* manifest.json         written last

Written by `llm4msr.training.saving`. Only safetensors, plain .npy, Parquet and JSON are read: nothing in a checkpoint
can run code. The model is rebuilt from schema and configuration; weights that do not fit are refused by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import Config
from llm4msr.data.history import read_logs
from llm4msr.data.prepared import ITEMS_FILE, SCHEMA_FILE, USERS_FILE, VOCAB_DIRECTORY
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.models.llm4msr import MultiScenarioModel, build_model
from llm4msr.schema import FeatureSchema
from llm4msr.settings import config_from_dict
from llm4msr.training.tensors import read_tensors

MODEL_FILE = "model.safetensors"
KNOWLEDGE_DIRECTORY = "knowledge"


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint.

    Attributes:
        uri: Where it lies.
        config: The run's configuration.
        schema: Features and scenarios.
        model: In evaluation mode, on the CPU.
        users: Feature table with keys; record i is table row i + 1.
        items: The same for items.
        collator: Encodes rows for `model`.
        knowledge: The knowledge table, or None for a backbone alone.
        metadata: How it was trained; holds "model_version".
    """

    uri: str
    config: Config
    schema: FeatureSchema
    model: MultiScenarioModel
    users: pa.Table
    items: pa.Table
    collator: Collator
    knowledge: KnowledgeTable | None
    metadata: dict[str, Any]

    def vocabulary(self, feature_name: str) -> pa.Array:
        """Returns the values of a context feature; the value at position r has index r + 2."""
        place = storage.join(self.uri, VOCAB_DIRECTORY, f"{feature_name}.parquet")
        return storage.read_parquet(place)["value"].combine_chunks()


def load_checkpoint(uri: str) -> Checkpoint:
    """Loads a checkpoint from anywhere.

    Raises:
        StorageError: It is missing, unfinished or damaged, or its weights do not fit its configuration.
    """
    manifest = storage.read_manifest(uri, "a checkpoint is written by jobs.train")
    if manifest.get("kind") != "checkpoint":
        raise storage.StorageError(f"{uri}: a {manifest.get('kind')!r} directory, not a checkpoint")
    return read_checkpoint(uri)


def read_checkpoint(uri: str) -> Checkpoint:
    """Reads a checkpoint that may lack its manifest: one that is being written.

    Raises:
        StorageError: It is damaged, or its weights do not fit its configuration.
    """
    config = config_from_dict(storage.read_json(storage.join(uri, "config.json")))
    schema = FeatureSchema.from_json(storage.read_json(storage.join(uri, SCHEMA_FILE)))
    users = storage.read_parquet(storage.join(uri, USERS_FILE))
    items = storage.read_parquet(storage.join(uri, ITEMS_FILE))
    metadata = storage.read_json(storage.join(uri, "metadata.json"))
    if metadata["knowledge"] == "none":
        knowledge, model = None, build_model(schema, config.model, None)
    else:
        knowledge = KnowledgeTable.load(storage.join(uri, KNOWLEDGE_DIRECTORY))
        model = build_model(schema, config.model, knowledge.width, knowledge.has_items)
    _load_weights(model, uri)
    collator = Collator(
        schema,
        EntityFeatures.from_table(users, schema, "user"),
        EntityFeatures.from_table(items, schema, "item"),
        knowledge,
        read_logs(uri, schema),
    )
    return Checkpoint(uri, config, schema, model.eval(), users, items, collator, knowledge, metadata)


def _load_weights(model: MultiScenarioModel, uri: str) -> None:
    place = storage.join(uri, MODEL_FILE)
    try:
        model.load_state_dict(read_tensors(place))
    except RuntimeError as error:
        raise storage.StorageError(f"{place}: the weights do not fit config.json and schema.json: {error}") from error
