"""One training by fuxictr for `quality_peers`, with its layers and its training; run in an environment of its own.

The package carries its building blocks, but of its zoo only models of long histories. MLP (its DNN), DeepFM and DCNv2
are therefore put together from its `FeatureEmbedding`, `MLP_Block`, `FactorizationMachine` and `CrossNetV2` under its
`BaseModel`, as its zoo does. Mixtures of experts would be this project's code and not fuxictr's, so there are none.
The scenario is a feature. `fit` trains as it comes: a learning rate divided by ten after an epoch that did not help,
clipped gradients, early stopping, the best weights at the end; its validation metric is replaced by the mean of the
scenarios' AUC. Imports nothing of this project but the file beside it.

Axes: B rows, F features, E embedding width.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuxictr.features import FeatureMap
from fuxictr.pytorch.layers import CrossNetV2, FactorizationMachine, FeatureEmbedding, MLP_Block
from fuxictr.pytorch.models import BaseModel
from quality_batches import Batches, begin, finish, mean_scenario_auc, read_split
from torch import nn

DATASET = "quality"
NUM_CROSS_LAYERS = 3


class Mlp(BaseModel):
    """Embeddings of all features and one stack of dense layers."""

    def __init__(self, feature_map: FeatureMap, spec: dict[str, Any]) -> None:
        # Its regularizer takes half of the weight times the squared norm.
        super().__init__(
            feature_map,
            model_id=spec["model"],
            verbose=0,
            model_root=spec["folder"],
            metrics=["AUC"],
            early_stop_patience=spec["patience"],
            embedding_regularizer=2.0 * spec["embedding_l2"] or None,
        )
        self.embedding_layer = FeatureEmbedding(feature_map, spec["embedding_dim"])
        self.input_dim = feature_map.sum_emb_out_dim()
        self.build(feature_map, spec)
        self.compile("adam", "binary_crossentropy", spec["learning_rate"])
        self.reset_parameters()
        self.model_to_device()

    def dense(self, spec: dict[str, Any], output_dim: int | None) -> MLP_Block:
        """Returns the dense stack."""
        return MLP_Block(
            input_dim=self.input_dim,
            hidden_units=spec["hidden_dims"],
            output_dim=output_dim,
            dropout_rates=spec["dropout"],
        )

    def build(self, feature_map: FeatureMap, spec: dict[str, Any]) -> None:
        """Makes all but the embeddings."""
        self.mlp = self.dense(spec, 1)

    def logit(self, x: dict[str, torch.Tensor], embedded_BFE: torch.Tensor) -> torch.Tensor:
        """Returns (B, 1)."""
        return self.mlp(embedded_BFE.flatten(1))

    def forward(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns y_pred, (B, 1)."""
        x = self.get_inputs(inputs)
        return {"y_pred": self.output_activation(self.logit(x, self.embedding_layer(x)))}

    def evaluate_metrics(self, y_true: Any, y_pred: Any, metrics: Any, group_id: Any = None) -> dict[str, float]:
        """Returns the mean of the scenarios' AUC under the name by which training stops."""
        return {"AUC": self.mean_auc(y_true, y_pred)}


class DeepFm(Mlp):
    """A factorisation machine beside the dense stack."""

    def build(self, feature_map: FeatureMap, spec: dict[str, Any]) -> None:
        """Makes all but the embeddings."""
        self.mlp = self.dense(spec, 1)
        self.fm = FactorizationMachine(feature_map)

    def logit(self, x: dict[str, torch.Tensor], embedded_BFE: torch.Tensor) -> torch.Tensor:
        """Returns (B, 1)."""
        return self.fm(x, embedded_BFE) + self.mlp(embedded_BFE.flatten(1))


class DcnV2(Mlp):
    """Crosses beside the dense stack."""

    def build(self, feature_map: FeatureMap, spec: dict[str, Any]) -> None:
        """Makes all but the embeddings."""
        self.crosses = CrossNetV2(self.input_dim, NUM_CROSS_LAYERS)
        self.mlp = self.dense(spec, None)
        self.last = nn.Linear(self.input_dim + spec["hidden_dims"][-1], 1)

    def logit(self, x: dict[str, torch.Tensor], embedded_BFE: torch.Tensor) -> torch.Tensor:
        """Returns (B, 1)."""
        x_BD = embedded_BFE.flatten(1)
        return self.last(torch.cat([self.crosses(x_BD), self.mlp(x_BD)], dim=1))


MODELS = {"mlp": Mlp, "deepfm": DeepFm, "dcnv2": DcnV2}


def make_feature_map(spec: dict[str, Any]) -> FeatureMap:
    """Returns the description of the features, in the form in which fuxictr's preprocessing leaves it."""
    features = []
    for f in spec["features"]:
        described = {"source": "", "type": f["kind"]}
        if f["kind"] != "numeric":
            described |= {"vocab_size": f["num_embeddings"], "padding_idx": f["padding_index"]}
        if f["kind"] == "sequence":
            described |= {"max_len": f["max_length"], "feature_encoder": "layers.MaskedAveragePooling()"}
        features.append({f["column"]: described})
    features.append({"scenario": {"source": "", "type": "categorical", "vocab_size": spec["num_scenarios"]}})
    path = Path(spec["folder"]) / "feature_map.json"
    tree = {"dataset_id": DATASET, "labels": ["label"], "features": features}
    path.write_text(json.dumps(tree), encoding="utf-8")
    made = FeatureMap(DATASET, spec["folder"])
    made.load(str(path), {"embedding_dim": spec["embedding_dim"]})
    return made


def main() -> int:
    """Trains as the JSON file named on the command line says, and writes the scores of the best epoch."""
    spec = begin()
    (Path(spec["folder"]) / DATASET).mkdir(exist_ok=True)
    valid = read_split(spec, "valid")
    model = MODELS[spec["model"]](make_feature_map(spec), spec)
    model.mean_auc = mean_scenario_auc(valid["scenario"].numpy())
    train = Batches(read_split(spec, "train"), spec["batch_size"], spec["seed"])
    model.fit(train, epochs=spec["max_epochs"], validation_data=Batches(valid, spec["batch_size"]))

    def predict(columns: dict[str, torch.Tensor]) -> np.ndarray:
        return model.predict(Batches(columns, spec["batch_size"]))

    finish(spec, predict, train.num_passes)
    return 0


if __name__ == "__main__":
    sys.exit(main())
