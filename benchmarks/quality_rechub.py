"""One training by torch-rechub for `quality_peers`, with its models and its trainer; run in an environment of its own.

The package has no multi-scenario models, but multi-task ones. They become multi-scenario ones as its users would do it:
one task per scenario, and a row is scored, and learnt from, by the output of its own scenario. The scenario is no
feature to them; it is one to the single-task models. `CTRTrainer` trains, with early stopping; its validation metric is
replaced by the mean of the scenarios' AUC, and the best weights are always taken, also where the epochs ran out.
Imports nothing of this project but the file beside it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from quality_batches import Batches, begin, finish, mean_scenario_auc, read_split
from torch import nn
from torch_rechub.basic.features import DenseFeature, SequenceFeature, SparseFeature
from torch_rechub.models.multi_task import AITM, MMOE, PLE, SharedBottom
from torch_rechub.models.ranking import DCNv2, DeepFM
from torch_rechub.trainers import CTRTrainer

NUM_CROSS_LAYERS = 3


class LabelledBatches(Batches):
    """Batches as the trainer takes them: columns and label."""

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        for columns in super().__iter__():
            yield columns, columns["label"]


class ByScenario(nn.Module):
    """A model of several tasks as one of several scenarios: each row gets the output of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns a score per row."""
        return self.model(x).gather(1, x["scenario"].long()[:, None]).squeeze(1)


def feature(described: dict[str, Any], embedding_dim: int) -> DenseFeature | SparseFeature | SequenceFeature:
    """Returns torch-rechub's own description of a feature."""
    name, kind = described["column"], described["kind"]
    if kind == "numeric":
        return DenseFeature(name)
    size, padding = described["num_embeddings"], described["padding_index"]
    if kind == "sequence":
        return SequenceFeature(name, vocab_size=size, embed_dim=embedding_dim, pooling="mean", padding_idx=padding)
    return SparseFeature(name, vocab_size=size, embed_dim=embedding_dim, padding_idx=padding)


def build_model(spec: dict[str, Any]) -> nn.Module:
    """Returns the model that the specification names, over columns to a score per row."""
    width, num_scenarios = spec["embedding_dim"], spec["num_scenarios"]
    features = [feature(described, width) for described in spec["features"]]
    deep = {"dims": spec["hidden_dims"], "activation": "relu", "dropout": spec["dropout"]}
    towers = [{"dims": spec["tower_dims"], "activation": "relu", "dropout": spec["dropout"]}] * num_scenarios
    tasks = ["classification"] * num_scenarios
    num_shared, num_own, num_levels = spec["num_experts"], spec["num_scenario_experts"], spec["num_levels"]
    with_scenario = [*features, SparseFeature("scenario", vocab_size=num_scenarios, embed_dim=width)]
    embedded = [f for f in with_scenario if not isinstance(f, DenseFeature)]
    builders = {
        "shared_bottom": lambda: ByScenario(SharedBottom(features, tasks, deep, towers)),
        "mmoe": lambda: ByScenario(MMOE(features, tasks, num_shared, deep, towers)),
        "ple": lambda: ByScenario(PLE(features, tasks, num_levels, num_own, num_shared, deep, towers)),
        "aitm": lambda: ByScenario(AITM(features, num_scenarios, deep, towers)),
        "deepfm": lambda: DeepFM(with_scenario, embedded, deep),
        "dcnv2": lambda: DCNv2(with_scenario, NUM_CROSS_LAYERS, deep, use_low_rank_mixture=False),
        "dcnv2_mix": lambda: DCNv2(with_scenario, NUM_CROSS_LAYERS, deep),
    }
    return builders[spec["model"]]()


def main() -> int:
    """Trains as the JSON file named on the command line says, and writes the scores of the best epoch."""
    spec = begin()
    valid = read_split(spec, "valid")
    trainer = CTRTrainer(
        build_model(spec),
        optimizer_params={"lr": spec["learning_rate"], "weight_decay": spec["weight_decay"]},
        regularization_params={"embedding_l2": spec["embedding_l2"]},
        n_epoch=spec["max_epochs"],
        earlystop_patience=spec["patience"],
        model_path=spec["folder"],
    )
    trainer.evaluate_fn = mean_scenario_auc(valid["scenario"].numpy())
    train = LabelledBatches(read_split(spec, "train"), spec["batch_size"], spec["seed"])
    trainer.fit(train, LabelledBatches(valid, spec["batch_size"]))
    trainer.model.load_state_dict(trainer.early_stopper.best_weights)
    finish(
        spec,
        lambda columns: trainer.predict(trainer.model, LabelledBatches(columns, spec["batch_size"])),
        train.num_passes,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
