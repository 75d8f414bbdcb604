"""What every multi-scenario backbone is: (x_BD, scenario_B) to logit_B. Also the template for a new one.

A backbone owns neither the embeddings nor the loss, and never sees knowledge: the LLM4MSR wrapper stands around it.
To add one:

1. Write ``class Mine(Backbone)`` in a file of this folder, from its paper's equations; the docstring cites them and
   says what was left out. Keep to these rules, which the tests of the zoo check for every backbone:

   * the forward pass returns logits: no activation and no normalisation after the last layer;
   * what it normalises, it normalises with running statistics per scenario (`layers.ScenarioNorm`), so that a row's
     score never depends on the rows beside it;
   * every parameter takes part in every step, also of a scenario without rows (`ScenarioRows.map` calls each scenario):
     distributed training relies on it;
   * what belongs to one scenario gets no gradient from another's rows;
   * widths come from the configuration; a constant of the paper that nobody would search stays in the class.

2. Name it in `BACKBONES` (``__init__.py``) and in ``config.model.Backbone``. Nothing else must change.

Axes: B rows, S scenarios, F embedded features, E embedding width, D input width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from llm4msr.config import ModelConfig


@dataclass(frozen=True)
class InputLayout:
    """What the columns of x_BD are: embedded features first, each E wide, then numbers and item knowledge.

    Attributes:
        fields: Names of the embedded features, in the order of their columns.
        embedding_dim: E.
        num_others: Columns after the embedded ones.
    """

    fields: tuple[str, ...]
    embedding_dim: int
    num_others: int = 0

    @property
    def embedded_dim(self) -> int:
        """F * E: where the other columns begin."""
        return len(self.fields) * self.embedding_dim

    @property
    def input_dim(self) -> int:
        """D."""
        return self.embedded_dim + self.num_others

    def columns(self, field: str) -> slice:
        """Returns the columns of one embedded feature."""
        first = self.fields.index(field) * self.embedding_dim
        return slice(first, first + self.embedding_dim)


class Backbone(nn.Module, ABC):
    """What every backbone is.

    Args:
        layout: What the columns of x are.
        num_scenarios: S.
        config: Widths and options.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B: no activation, no normalisation after it."""
