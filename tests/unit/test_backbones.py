"""Backbones against hand-computed values, and the properties every one of them must have."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from llm4msr.config import ModelConfig
from llm4msr.models.backbones import BACKBONES, InputLayout, build_backbone
from llm4msr.models.layers import Dropout, Order, ScenarioNorm, ScenarioRows

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(embedding_dim=4, hidden_dims=(16, 12), tower_dims=(10,), dropout=0.2)
NUM_SCENARIOS = 3
# What belongs to one scenario: names that begin so, {s} being the scenario; of the others, row s of the first axis.
PRIVATE = {
    "shared_bottom": ("towers.{s}.",),
    "star": ("norm.gamma_SD", "norm.beta_SD", "weights_SHD.", "biases_SH.", "scenario_embedding"),
    **dict.fromkeys(("mlp", "deepfm", "dcnv2"), ("scenario_embedding",)),
    "mmoe": ("gates.{s}.", "towers.{s}."),
    "omoe": ("towers.{s}.",),
    "ple": (*(f"levels.{i}.{part}.{{s}}." for i in range(2) for part in ("own", "gates")), "towers.{s}."),
    "hinet": ("scenario_embedding", "towers.{s}."),
    "m3oe": ("star_weight_SHD", "star_bias_SH", "gates.{s}.", "towers.{s}."),
    "aitm": ("heads.{s}.",),
    "sar_net": ("scale_SD", "shift_SD", "own_experts.{s}.", "gates.{s}."),
    **dict.fromkeys(("m2m", "adasparse", "adaptdhm", "epnet", "ppnet", "pepnet"), ("scenario_embedding",)),
    "hamur": tuple(
        f"adapters.{i}.{part}" for i in range(2) for part in ("down_", "up_", "norm.gamma_SD", "norm.beta_SD")
    ),
}
# The same of the last scenario alone: no other comes after it in the chain.
PRIVATE_OF_LAST = {"aitm": ("towers.2.", "messages.1.")}


def normalise(norm: ScenarioNorm, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
    rows = ScenarioRows(scenario_B, len(norm.gamma_SD))
    return rows.map(norm(rows.sort(x_BD), rows), lambda s, x: x)


LAYOUT = InputLayout(("user_id", "item_id", "genre"), embedding_dim=2, num_others=1)


def build(name: str, num_scenarios: int = NUM_SCENARIOS, **changes):
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

    @pytest.mark.parametrize("s", range(NUM_SCENARIOS))
    def test_what_learns_from_one_scenario_alone(self, name, s):
        model = build(name, dropout=0.0)
        torch.manual_seed(1)
        x_BD, scenario_B = torch.randn(300, 7), torch.randint(0, NUM_SCENARIOS, (300,))
        with_s, without_s = (
            gradients(model, x_BD[rows], scenario_B[rows]) for rows in (scenario_B >= 0, scenario_B != s)
        )
        found, expected = {}, {}
        for n, p in model.named_parameters():
            alive = with_s[n] > 0
            private = alive & (without_s[n] == 0)
            # Of a shared parameter some hidden units may be zero but for rows of s: that makes none of it private.
            if torch.equal(private, alive) or (len(private) == NUM_SCENARIOS and private.nonzero().tolist() == [[s]]):
                found[n] = private.nonzero().flatten().tolist()
            if rows := private_rows(name, s, n, p):
                expected[n] = [row for row in rows if alive[row]]
        assert found == expected

    def test_order_of_rows_does_not_matter(self, name):
        model = build(name, dropout=0.0)
        x_BD, scenario_B, order_B = torch.randn(40, 7), torch.randint(0, NUM_SCENARIOS, (40,)), torch.randperm(40)
        logit_B = model(x_BD, scenario_B)
        torch.testing.assert_close(model(x_BD[order_B], scenario_B[order_B]), logit_B[order_B])

    def test_dropout_in_training_alone(self, name):
        model = build(name, dropout=0.5)
        x_BD, scenario_B = torch.randn(30, 7), torch.randint(0, NUM_SCENARIOS, (30,))
        assert not torch.allclose(model(x_BD, scenario_B), model(x_BD, scenario_B))
        model.eval()
        torch.testing.assert_close(model(x_BD, scenario_B), model(x_BD, scenario_B), rtol=0, atol=0)

    def test_one_scenario_is_enough(self, name):
        model = build(name, num_scenarios=1)
        model(torch.randn(20, 7), torch.zeros(20, dtype=torch.int64)).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []

    def test_bfloat16(self, name):
        model = build(name, dropout=0.0).eval()
        x_BD, scenario_B = torch.randn(60, 7), torch.randint(0, NUM_SCENARIOS, (60,))
        logit_B = model(x_BD, scenario_B)
        with torch.autocast("cpu", torch.bfloat16):
            rounded_B = model(x_BD, scenario_B)
        torch.testing.assert_close(rounded_B.float(), logit_B, atol=0.05, rtol=0.05)
        rounded_B.sum().backward()
        assert [n for n, p in model.named_parameters() if not p.grad.isfinite().all()] == []


def gradients(model, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> dict[str, torch.Tensor]:
    """The size of each parameter's gradient, for each row of its first axis."""
    model.zero_grad()
    model(x_BD, scenario_B).square().sum().backward()
    return {n: p.grad.abs().reshape(len(p) if p.ndim else 1, -1).sum(1) for n, p in model.named_parameters()}


def private_rows(name: str, s: int, parameter_name: str, parameter: torch.Tensor) -> list[int]:
    """The rows of a parameter that belong to scenario s, by the table."""
    prefixes = PRIVATE.get(name, ())
    whole = tuple(prefix.format(s=s) for prefix in prefixes if "{s}" in prefix)
    if s == NUM_SCENARIOS - 1:
        whole += PRIVATE_OF_LAST.get(name, ())
    if parameter_name.startswith(whole):
        return list(range(len(parameter)))
    return [s] if parameter_name.startswith(tuple(prefix for prefix in prefixes if "{s}" not in prefix)) else []


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
    assert get_args(ModelConfig.model_fields["backbone"].annotation) == tuple(BACKBONES)


def test_the_table_of_the_docs_is_true():
    """docs/backbones.md lists every backbone, with the parameters that it has on the demo's input."""
    lines = (REPOSITORY / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `")][1:]
    layout = InputLayout(("user_id", "item_id", *(f"feature_{i}" for i in range(13))), embedding_dim=16)
    counts = {
        name: sum(p.numel() for p in build_backbone(layout, 2, ModelConfig(backbone=name)).parameters())
        for name in BACKBONES
    }
    assert {row[0].strip("`"): row[3] for row in rows} == {name: f"{count:,}" for name, count in counts.items()}


def test_unknown_backbone_names_the_valid_ones():
    with pytest.raises(ValueError, match=f"no backbone 'starr'; valid: {', '.join(sorted(BACKBONES))}"):
        build("starr")
