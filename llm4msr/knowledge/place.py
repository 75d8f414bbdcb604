"""Where the knowledge of a configuration lies, for those who only look it up: no Ray, no language model.

What an encoder is (the commit of a Hugging Face id, the digests of its files, the dtype of its device) is known where
it runs. So `jobs.extract` leaves a small file that names what it finished, as `jobs.prepare` does, and training reads
that.
"""

from __future__ import annotations

from llm4msr import storage, workspace
from llm4msr.config import Config, digest
from llm4msr.knowledge.prompts import PROMPT_VERSION

# Fields of `KnowledgeConfig` that say how fast the work is done, not what comes out.
_SPEED_FIELDS = {"batch_size", "num_actors", "rows_per_commit"}


def store_root(config: Config) -> str:
    """Returns the directory of all knowledge stores."""
    return storage.join(workspace.knowledge_root(config), "store")


def knowledge_pointer_uri(config: Config) -> str:
    """Returns the small file that names the current knowledge of this configuration's prepared data.

    Raises:
        StorageError: The data was not prepared yet.
    """
    prepared = workspace.prepared_uri(config).rsplit("/", 1)[-1]
    settings = config.knowledge.model_dump(mode="json", exclude=_SPEED_FIELDS)
    name = digest({"prepared": prepared, "knowledge": settings, "prompt_version": PROMPT_VERSION})
    return storage.join(workspace.knowledge_root(config), f"{name}.json")


def knowledge_uri(config: Config) -> str:
    """Returns the finished knowledge of this configuration: where `KnowledgeTable.load` finds its files.

    Raises:
        StorageError: The data was not prepared, or its knowledge not extracted yet.
    """
    pointer = knowledge_pointer_uri(config)
    if not storage.exists(pointer):
        raise storage.StorageError(
            f"{workspace.knowledge_root(config)} holds no knowledge extracted from {workspace.prepared_uri(config)} "
            f"with this knowledge configuration (model {config.knowledge.model!r}): "
            "run jobs.extract with the same configuration first"
        )
    uri = storage.join(workspace.knowledge_root(config), storage.read_json(pointer)["directory"])
    storage.read_manifest(uri, "run jobs.extract again")
    return uri
