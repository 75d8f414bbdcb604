"""What one training run is: its task, the errors that end it, and the knowledge it trains with."""

from __future__ import annotations

from dataclasses import dataclass

from llm4msr import storage
from llm4msr.config import Config
from llm4msr.knowledge.table import KnowledgeTable


class TrainingError(RuntimeError):
    """Training that cannot go on, found by all workers at the same step; the message says where and what to change."""


class TrainingDiverged(TrainingError):
    """A loss, weights or scores that are not finite, or a loss above ``train.max_loss``."""


class TrainingInterrupted(RuntimeError):
    """Training that was asked to stop and left a checkpoint; the same command goes on from there."""

    exit_status = 143  # as a process that SIGTERM ended


@dataclass(frozen=True)
class TrainTask:
    """One run.

    Attributes:
        config: The resolved configuration.
        prepared_uri: Finished prepared data.
        knowledge_uri: Finished knowledge table; None trains the backbone alone.
        knowledge: none, llm, shuffled or random.
        seed: Of initialisation, dropout, order of rows, and of the knowledge of a control.
        run_uri: Where checkpoint/, training/ and tensorboard/ go.
        name: Of the run; the model's version.
    """

    config: Config
    prepared_uri: str
    knowledge_uri: str | None
    knowledge: str
    seed: int
    run_uri: str
    name: str

    @property
    def checkpoint_uri(self) -> str:
        """The place of the finished checkpoint."""
        return storage.join(self.run_uri, "checkpoint")

    @property
    def training_uri(self) -> str:
        """The place of the checkpoints that a running training writes."""
        return storage.join(self.run_uri, "training")


def load_knowledge(task: TrainTask) -> KnowledgeTable | None:
    """Returns the knowledge table that the run trains with."""
    if task.knowledge_uri is None:
        return None
    table = KnowledgeTable.load(task.knowledge_uri)
    if task.knowledge == "shuffled":
        return table.shuffled(task.seed)
    return table.random(task.seed) if task.knowledge == "random" else table
