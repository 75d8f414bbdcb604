"""Backbones against hand-computed values, and the properties every one of them must have."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from llm4msr.config import ModelConfig
from llm4msr.models.backbones import BACKBONES, InputLayout, build_backbone
from llm4msr.models.layers import Dropout, Order, ScenarioNorm, ScenarioRows

CONFIG = ModelConfig(embedding_dim=4, hidden_dims=(8, 6), tower_dims=(5,), dropout=0.2)


def normalise(norm: ScenarioNorm, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
    rows = ScenarioRows(scenario_B, len(norm.gamma_SD))
    return rows.map(norm(rows.sort(x_BD), rows), lambda s, x: x)


LAYOUT = InputLayout(("user_id", "item_id", "genre"), embedding_dim=2, num_others=1)


def build(name: str, num_scenarios: int = 3, **changes):
    torch.manual_seed(0)
    return build_backbone(LAYOUT, num_scenarios, CONFIG.model_copy(update={"backbone": name, **changes}))


@pytest.mark.parametrize("name", BACKBONES)
class TestEveryBackbone:
    def test_shape_and_missing_scenarios(self, name):
        model = build(name)
        for scenario_B in (torch.tensor([0, 2, 1, 0]), torch.tensor([1, 1, 1, 1]), torch.tensor([2])):
            assert model(torch.randn(len(scenario_B), 7), scenario_B).shape == scenario_B.shape

    def test_score_alone_equals_score_in_a_batch(self, name):
        model = build(name)
        x_BD, scenario_B = torch.randn(50, 7) * 3, torch.randint(0, 3, (50,))
        for _ in range(5):
            model(x_BD, scenario_B)  # training moves the running statistics
        model.eval()
        together = model(x_BD, scenario_B)
        alone = torch.cat([model(x_BD[i : i + 1], scenario_B[i : i + 1]) for i in range(50)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        assert together.std() > 0.01

    def test_gradient_reaches_every_parameter(self, name):
        model = build(name, dropout=0.0)
        torch.manual_seed(1)
        x_BD, scenario_B = torch.randn(200, 7), torch.randint(0, 3, (200,))
        model(x_BD, scenario_B).square().sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []

    def test_every_parameter_has_a_gradient_when_a_scenario_is_missing(self, name):
        model = build(name)
        model(torch.randn(20, 7), torch.zeros(20, dtype=torch.int64)).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []

    def test_private_parameters_get_no_gradient_from_other_scenarios(self, name):
        model = build(name)
        scenario_B = torch.randint(0, 2, (60,))  # scenario 2 has no rows
        model(torch.randn(60, 7), scenario_B).sum().backward()
        private = {
            n: p.grad[2] if p.grad.shape[0] == 3 else p.grad
            for n, p in model.named_parameters()
            if (p.shape[0] == 3 and not n.startswith("bottom")) or n.startswith("towers.2")
        }
        assert private
        assert [n for n, gradient in private.items() if gradient.abs().sum() > 0] == []


def test_shared_bottom_forward_by_hand():
    model = build("shared_bottom", num_scenarios=2, hidden_dims=(2,), tower_dims=(), dropout=0.0)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.bottom[0].weight[:, :2] = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
        model.bottom[0].bias[:] = torch.tensor([0.5, 0.0])
        model.towers[0][1].weight[:] = torch.tensor([[1.0, 1.0]])
        model.towers[1][1].weight[:] = torch.tensor([[2.0, -1.0]])
        model.towers[1][1].bias[:] = 0.25
    x_BD = torch.zeros(2, 7)
    x_BD[:, 0], x_BD[:, 1] = 1.0, 3.0
    # bottom: relu(1 + 6 + 0.5, -1 + 3) = (7.5, 2); towers: 9.5 and 15 - 2 + 0.25
    torch.testing.assert_close(model(x_BD, torch.tensor([0, 1])), torch.tensor([9.5, 13.25]))


def test_star_multiplies_weights_and_adds_biases():
    model = build("star", num_scenarios=2, hidden_dims=(2,), scenario_norm=False, dropout=0.0)
    with torch.no_grad():
        for p in model.auxiliary.parameters():
            p.zero_()
        model.shared[0].weight.zero_()
        model.shared[0].weight[:, :2] = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        model.shared[0].bias[:] = torch.tensor([1.0, -1.0])
        model.shared[1].weight[:] = torch.tensor([[1.0, 0.5]])
        model.shared[1].bias[:] = 0.0
        model.weights_SHD[0][1, :, :2] = torch.tensor([[2.0, 1.0], [1.0, 5.0]])
        model.biases_SH[0][1] = torch.tensor([0.5, 0.0])
        model.biases_SH[1][1] = -1.0
    x_BD = torch.zeros(2, 7)
    x_BD[:, 0], x_BD[:, 1] = 2.0, 1.0
    # scenario 0: (2 + 2 + 1, 6 - 1) -> 5 + 2.5; scenario 1: (4 + 2 + 1.5, 6 - 1) -> 7.5 + 2.5 - 1
    torch.testing.assert_close(model(x_BD, torch.tensor([0, 1])), torch.tensor([7.5, 9.0]))


def test_scenario_norm_by_hand():
    norm = ScenarioNorm(2, 1, momentum=0.5, eps=0.0)
    x_BD, scenario_B = torch.tensor([[1.0], [3.0], [10.0]]), torch.tensor([0, 0, 1])
    out = normalise(norm, x_BD, scenario_B)
    # scenario 0: mean 2, variance 1; scenario 1 has one row and keeps the running mean 0 and variance 1
    torch.testing.assert_close(out, torch.tensor([[-1.0], [1.0], [10.0]]))
    torch.testing.assert_close(norm.mean_SD, torch.tensor([[1.0], [0.0]]))
    torch.testing.assert_close(norm.var_SD, torch.tensor([[1.5], [1.0]]))  # unbiased 2, half way from 1
    norm.eval()
    torch.testing.assert_close(normalise(norm, x_BD, scenario_B)[:2], (x_BD[:2] - 1) / 1.5**0.5)


def test_scenario_norm_matches_batch_norm_per_scenario():
    torch.manual_seed(0)
    norm, reference = ScenarioNorm(2, 4), [torch.nn.BatchNorm1d(4) for _ in range(2)]
    for _ in range(3):
        x_BD, scenario_B = torch.randn(64, 4) * 5 + 100, torch.arange(64) % 2
        out = normalise(norm, x_BD, scenario_B)
        for s in range(2):
            torch.testing.assert_close(out[scenario_B == s], reference[s](x_BD[scenario_B == s]), atol=1e-3, rtol=1e-3)
    for s in range(2):
        torch.testing.assert_close(norm.mean_SD[s], reference[s].running_mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(norm.var_SD[s], reference[s].running_var, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("counts", [(30, 25), (40, 1), (17, 0)])
@pytest.mark.parametrize("training", [True, False])
def test_scenario_norm_gradient_is_autograd_of_the_formula(counts, training):
    torch.manual_seed(0)
    norm = ScenarioNorm(2, 3).double().train(training)
    for tensor in (norm.gamma, norm.beta, norm.gamma_SD, norm.beta_SD, norm.mean_SD):
        tensor.data.normal_()
    scenario_B = torch.tensor([0] * counts[0] + [1] * counts[1])[torch.randperm(sum(counts))]
    x_BD = torch.randn(len(scenario_B), 3, dtype=torch.float64, requires_grad=True)
    target_BD = torch.randn_like(x_BD)
    inputs = (x_BD, *norm.parameters())
    expected_BD = torch.empty_like(x_BD)
    for s, count in enumerate(counts):
        rows_B = scenario_B == s
        x = x_BD[rows_B]
        batch = training and count >= 2
        mean_D, var_D = (x.mean(0), x.var(0, correction=0)) if batch else (norm.mean_SD[s].clone(), norm.var_SD[s])
        standard = (x - mean_D) / (var_D + norm.eps).sqrt()
        expected_BD[rows_B] = standard * norm.gamma * norm.gamma_SD[s] + norm.beta + norm.beta_SD[s]
    expected = torch.autograd.grad((expected_BD * target_BD).sum(), inputs)
    out_BD = normalise(norm, x_BD, scenario_B)
    torch.testing.assert_close(out_BD, expected_BD)
    for ours, plain in zip(torch.autograd.grad((out_BD * target_BD).sum(), inputs), expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_rows_are_sorted_by_scenario_and_put_back():
    x_BD, scenario_B = torch.arange(10.0).unsqueeze(1), torch.tensor([1, 0, 2, 1, 1, 0, 2, 2, 0, 1])
    x_BD.requires_grad_()
    rows = ScenarioRows(scenario_B, 4)
    assert rows.sizes == [3, 4, 3, 0] == rows.count_S.tolist()
    out = rows.map(rows.sort(x_BD), lambda s, x: x.squeeze(1) * 10**s + s)
    torch.testing.assert_close(out, x_BD.squeeze(1) * 10**scenario_B + scenario_B)
    out.sum().backward()
    torch.testing.assert_close(x_BD.grad.squeeze(1), (10**scenario_B).float())


def test_sorted_rows_are_not_copied():
    x_BD = torch.randn(6, 3)
    for scenario_B in (torch.tensor([0, 0, 1, 1, 1, 3]), torch.full((6,), 2)):
        rows = ScenarioRows(scenario_B, 4)
        assert rows.sort(x_BD) is x_BD
        torch.testing.assert_close(rows.map(x_BD, lambda s, x: x + s), x_BD + scenario_B.unsqueeze(1))
    assert ScenarioRows(torch.tensor([0, 1, 0]), 2).sort(x_BD[:3]) is not x_BD


def test_order_sorts_stably_and_restores():
    scenario_B = torch.tensor([1, 0, 2, 1, 0])
    order, x_B = Order(scenario_B), torch.arange(5)
    assert order.sort(x_B).tolist() == [1, 4, 0, 3, 2]
    assert torch.equal(order.restore(order.sort(x_B)), x_B)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_zeroes_a_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    dropout, x = Dropout(p), torch.ones(1001, 301, requires_grad=True)
    out = dropout(x)
    assert out.eq(0).float().mean().item() == pytest.approx(p, abs=0.005)
    assert out.mean().item() == pytest.approx(1, abs=0.01)
    torch.testing.assert_close(out[out > 0].mean().item(), 1 / (1 - p), rtol=1e-4, atol=0)
    kept = out.detach().ne(0).float()
    assert abs(torch.corrcoef(kept[:, :2].T)[0, 1]) < 0.1  # neighbours share a random number, not their fate
    out.sum().backward()
    assert torch.equal(x.grad, out)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), out)
    assert not torch.equal(dropout(x), out)
    assert dropout.eval()(x) is x


def test_configuration_offers_exactly_these_backbones():
    assert set(get_args(ModelConfig.model_fields["backbone"].annotation)) == set(BACKBONES)


def test_unknown_backbone_names_the_valid_ones():
    with pytest.raises(ValueError, match=r"no backbone 'starr'; valid: shared_bottom, star"):
        build("starr")
