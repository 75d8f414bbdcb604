"""Writes checkpoints (`llm4msr.training.checkpoint`), with the requests by which whoever loads one can check it."""

from __future__ import annotations

from typing import Any

from llm4msr import storage
from llm4msr.config import Config
from llm4msr.data.prepared import (
    HISTORY_DIRECTORY,
    ITEMS_FILE,
    SCHEMA_FILE,
    USERS_FILE,
    VOCAB_DIRECTORY,
    PreparedData,
)
from llm4msr.golden import write_golden
from llm4msr.knowledge.table import KnowledgeTable
from llm4msr.training.checkpoint import KNOWLEDGE_DIRECTORY, MODEL_FILE


def save_checkpoint(
    uri: str,
    config: Config,
    prepared: PreparedData,
    knowledge: KnowledgeTable | None,
    weights_uri: str,
    metadata: dict[str, Any],
) -> None:
    """Writes a checkpoint to a fresh place; what an unfinished attempt left there is removed.

    Args:
        uri: The directory.
        config: The run's configuration.
        prepared: The data it was trained on.
        knowledge: What the model was trained with (shuffled, if it was), or None.
        weights_uri: A file of `write_tensors` with the model's state dict.
        metadata: JSON values; must hold "model_version".
    """
    storage.remove(uri)
    for name in (SCHEMA_FILE, USERS_FILE, ITEMS_FILE):
        storage.copy(storage.join(prepared.uri, name), storage.join(uri, name))
    for folder in (VOCAB_DIRECTORY, HISTORY_DIRECTORY):
        for source, _ in storage.list_files(storage.join(prepared.uri, folder), ".parquet"):
            storage.copy(source, storage.join(uri, folder, source.rsplit("/", 1)[-1]))
    if knowledge is not None:
        knowledge.save(storage.join(uri, KNOWLEDGE_DIRECTORY))
    storage.copy(weights_uri, storage.join(uri, MODEL_FILE))
    storage.write_json(storage.join(uri, "config.json"), config.model_dump(mode="json"))
    storage.write_json(storage.join(uri, "metadata.json"), metadata)
    write_golden(uri)
    storage.write_manifest(uri, {"kind": "checkpoint", "model_version": metadata["model_version"]})
