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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from llm4msr import storage
from llm4msr.batch import Collator, EntityFeatures
from llm4msr.config import Config
from llm4msr.data.history import read_logs
from llm4msr.data.prepared import ITEMS_FILE, SCHEMA_FILE, USERS_FILE, VOCAB_DIRECTORY
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.lookup import HashOrder
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
        text_orders: Of "user" and "item", where ids are text and the order of their hashes was made before.
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
    text_orders: Mapping[str, HashOrder | None] = field(default_factory=dict)

    def vocabulary(self, feature_name: str) -> pa.Array:
        """Returns the values of a context feature; the value at position r has index r + 2."""
        place = storage.join(self.uri, VOCAB_DIRECTORY, f"{feature_name}.parquet")
        return storage.read_parquet(place)["value"].combine_chunks()


def load_checkpoint(uri: str) -> Checkpoint:
    """Loads a checkpoint from anywhere.

    Raises:
        StorageError: It is missing, unfinished or damaged, or its weights do not fit its configuration.
    """
    check_manifest(uri)
    return read_checkpoint(uri)


def check_manifest(uri: str) -> None:
    """Raises StorageError unless a finished checkpoint is there."""
    manifest = storage.read_manifest(uri, "a checkpoint is written by jobs.train")
    if manifest.get("kind") != "checkpoint":
        raise storage.StorageError(f"{uri}: a {manifest.get('kind')!r} directory, not a checkpoint")


def read_checkpoint(uri: str) -> Checkpoint:
    """Reads a checkpoint that may lack its manifest: one that is being written.

    Raises:
        StorageError: It is damaged, or its weights do not fit its configuration.
    """
    schema = FeatureSchema.from_json(storage.read_json(storage.join(uri, SCHEMA_FILE)))
    users = storage.read_parquet(storage.join(uri, USERS_FILE))
    items = storage.read_parquet(storage.join(uri, ITEMS_FILE))
    features = EntityFeatures.from_table(users, schema, "user"), EntityFeatures.from_table(items, schema, "item")
    return assemble(uri, uri, users, items, *features)


def assemble(
    uri: str,
    place: str,
    users: pa.Table,
    items: pa.Table,
    user_features: EntityFeatures,
    item_features: EntityFeatures,
    mapped: bool = False,
) -> Checkpoint:
    """Puts a checkpoint together from its tables and its other files.

    Args:
        uri: The checkpoint's own place.
        place: Where its other files are: there, or in a copy.
        users: Feature table.
        items: Feature table.
        user_features: Of the users.
        item_features: Of the items.
        mapped: The embedding tables stay in their file, mapped into memory: nobody may change it.

    Raises:
        StorageError: It is damaged, or its weights do not fit its configuration.
    """
    config = config_from_dict(storage.read_json(storage.join(place, "config.json")))
    schema = FeatureSchema.from_json(storage.read_json(storage.join(place, SCHEMA_FILE)))
    metadata = storage.read_json(storage.join(place, "metadata.json"))
    if metadata["knowledge"] == "none":
        knowledge, model = None, build_model(schema, config.model, None, materialize=not mapped)
    else:
        knowledge = KnowledgeTable.load(storage.join(place, KNOWLEDGE_DIRECTORY))
        model = build_model(schema, config.model, knowledge.width, knowledge.has_items, materialize=not mapped)
    _load_weights(model, uri, storage.join(place, MODEL_FILE), mapped)
    collator = Collator(schema, user_features, item_features, knowledge, read_logs(place, schema))
    return Checkpoint(uri, config, schema, model.eval(), users, items, collator, knowledge, metadata)


def _load_weights(model: MultiScenarioModel, uri: str, place: str, mapped: bool) -> None:
    weights = read_tensors(place)
    if mapped:  # but for the tables, whose memory is worth it: a product's last bit depends on where its factors lie
        tables = {name for name, parameter in model.named_parameters() if parameter.is_meta}
        weights = {name: tensor if name in tables else tensor.clone() for name, tensor in weights.items()}
    try:
        model.load_state_dict(weights, assign=mapped)
    except RuntimeError as error:
        own = storage.join(uri, MODEL_FILE)
        raise storage.StorageError(f"{own}: the weights do not fit config.json and schema.json: {error}") from error
