"""The single-scenario controls against their equations, row by row in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones import BACKBONES, InputLayout
from llm4msr.models.backbones.controls import NUM_CROSS_LAYERS

LAYOUT = InputLayout(("user_id", "item_id", "genre"), embedding_dim=4, num_others=2)
WIDTH, NUM_SCENARIOS = LAYOUT.embedding_dim, 3
CONTROLS = ("mlp", "deepfm", "dcnv2")


def build(name: str, layout: InputLayout = LAYOUT, hidden_dims: tuple[int, ...] = (8, 6)) -> nn.Module:
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=WIDTH, hidden_dims=hidden_dims, dropout=0.0)
    return BACKBONES[name](layout, NUM_SCENARIOS, config).double()


def deep(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for layer in model.hidden:
        if isinstance(layer, nn.Linear):
            x = (layer.weight @ x + layer.bias).clamp(min=0)
    return x


def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return layer.weight[0] @ x + layer.bias[0]


def mlp(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(model.last, deep(model, x))


def deepfm(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    fields = [x[i * WIDTH : (i + 1) * WIDTH] for i in range(1 + len(LAYOUT.fields))]
    pairs = sum(a @ b for a, b in itertools.combinations(fields, 2))
    return linear(model.first_order, x) + pairs + linear(model.last, deep(model, x))


def dcnv2(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    crossed = x
    for layer in model.crosses:
        crossed = x * (layer.weight @ crossed + layer.bias) + crossed
    assert len(model.crosses) == NUM_CROSS_LAYERS
    return linear(model.last, torch.cat([crossed, deep(model, x)]))


REFERENCES = {"mlp": mlp, "deepfm": deepfm, "dcnv2": dcnv2}


@pytest.mark.parametrize("hidden_dims", [(8, 6), (5,), ()])
@pytest.mark.parametrize("name", CONTROLS)
def test_row_by_row(name, hidden_dims):
    model = build(name, hidden_dims=hidden_dims)
    x_BD, scenario_B = torch.randn(30, LAYOUT.input_dim).double(), torch.randint(0, NUM_SCENARIOS, (30,))
    embedding_SE = model.scenario_embedding_SE
    expected = [REFERENCES[name](model, torch.cat([embedding_SE[s], x])) for x, s in zip(x_BD, scenario_B, strict=True)]
    torch.testing.assert_close(model(x_BD, scenario_B), torch.stack(expected))


def test_second_order_by_hand():
    """Two features and the scenario: <(1, 2), (3, 4)> + <(1, 1), (1, 2)> + <(1, 1), (3, 4)> = 11 + 3 + 7."""
    model = build("deepfm", InputLayout(("user_id", "item_id"), embedding_dim=2, num_others=1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.scenario_embedding_SE[1] = 1.0
    x_BD = torch.tensor([[1.0, 2.0, 3.0, 4.0, 100.0]], dtype=torch.float64)
    torch.testing.assert_close(model(x_BD, torch.tensor([1])), torch.tensor([21.0], dtype=torch.float64))
    torch.testing.assert_close(model(x_BD, torch.tensor([0])), torch.tensor([11.0], dtype=torch.float64))


@pytest.mark.parametrize("name", CONTROLS)
def test_scenarios_differ_by_their_embedding_alone(name):
    model = build(name)
    x_BD = torch.randn(10, LAYOUT.input_dim).double()
    logits = [model(x_BD, torch.full((10,), s)) for s in range(2)]
    assert not torch.allclose(*logits)
    with torch.no_grad():
        model.scenario_embedding_SE[1] = model.scenario_embedding_SE[0]
    torch.testing.assert_close(model(x_BD, torch.ones(10, dtype=torch.int64)), logits[0])
