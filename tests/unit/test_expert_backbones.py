"""Backbones made of experts, and AITM, against their equations written out row by row in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.config.zoo import ExpertsConfig
from llm4msr.models.backbones import BACKBONES, InputLayout
from llm4msr.models.backbones.experts import Experts, Gate
from llm4msr.models.layers import dense_stack

LAYOUT = InputLayout(("user_id", "item_id"), embedding_dim=3, num_others=1)
NUM_SCENARIOS = 3


def build(name: str, num_scenarios: int = NUM_SCENARIOS, experts: dict | None = None, **changes) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_experts": 4, "num_scenario_experts": 2, **(experts or {})}
    widths = {"embedding_dim": 5, "hidden_dims": (8, 6), "tower_dims": (4,), "dropout": 0.0, **changes}
    model = BACKBONES[name](LAYOUT, num_scenarios, ModelConfig(experts=ExpertsConfig(**sizes), **widths)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # nothing stays at its start: ones, zeros
    return model


class State(dict):
    """A model's parameters by name, and the few operations that the equations are made of, for one row."""

    def last_of(self, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self[f"{prefix}weight"], self[f"{prefix}bias"]

    def linear(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.last_of(prefix)
        return weight @ x + bias

    def dense(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        i = 0
        while f"{prefix}{i}.weight" in self:
            x = self.linear(f"{prefix}{i}.", x).relu()
            i += 3  # Linear, ReLU, Dropout
        return x

    def expert(self, prefix: str, n: int, x: torch.Tensor) -> torch.Tensor:
        i = 0
        while f"{prefix}weights_NDH.{i}" in self:
            x = (x @ self[f"{prefix}weights_NDH.{i}"][n] + self[f"{prefix}biases_N1H.{i}"][n, 0]).relu()
            i += 1
        return x

    def experts(self, prefix: str, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.expert(prefix, n, x) for n in range(len(self[f"{prefix}weights_NDH.0"]))]

    def gate(self, prefix: str, x: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
        scores = [(row @ x).exp() for row in self[f"{prefix}linear.weight"]]
        assert len(scores) == len(experts)
        return sum(score / sum(scores) * expert for score, expert in zip(scores, experts, strict=True))

    def mixture(self, prefix: str, x: torch.Tensor) -> torch.Tensor:
        return self.gate(f"{prefix}gate.", x, self.experts(f"{prefix}experts.", x))

    def tower(self, s: int, x: torch.Tensor) -> torch.Tensor:
        return self.linear(f"towers.{s}.last.", self.dense(f"towers.{s}.hidden.", x))


def mmoe(state: State, x: torch.Tensor, s: int) -> torch.Tensor:
    return state.tower(s, state.gate(f"gates.{s}.", x, state.experts("experts.", x)))


def omoe(state: State, x: torch.Tensor, s: int) -> torch.Tensor:
    return state.tower(s, state.mixture("mixture.", x))


def ple(state: State, x: torch.Tensor, s: int) -> torch.Tensor:
    own, shared, i = x, x, 0
    while f"levels.{i}.gates.0.linear.weight" in state:
        experts = state.experts(f"levels.{i}.own.{s}.", own) + state.experts(f"levels.{i}.shared.", shared)
        own_next = state.gate(f"levels.{i}.gates.{s}.", own, experts)
        if f"levels.{i + 1}.gates.0.linear.weight" in state:
            shared = state.gate(f"levels.{i}.shared_gate.", shared, experts)
        else:
            assert f"levels.{i}.shared_gate.linear.weight" not in state
        own, i = own_next, i + 1
    return state.tower(s, own)


def hinet(state: State, x: torch.Tensor, s: int) -> torch.Tensor:
    scores = state.linear("attention.", state["scenario_embedding_SE"][s]).exp()
    own = [state.mixture(f"own.{j}.", x) for j in range(len(scores))]
    others = sum(scores[j] / scores.sum() * own[j] for j in range(len(scores)) if j != s)
    return state.tower(s, torch.cat([others, own[s], state.mixture("shared.", x)]))


def m3oe(state: State, x: torch.Tensor, s: int) -> torch.Tensor:
    weight, bias = state.last_of("star_shared.")
    star = (weight * state["star_weight_SHD"][s]) @ x + bias + state["star_bias_SH"][s]
    h = state.dense("dense.", star) + state.dense("skip.", x)
    experts = state.experts("scenario_experts.", h)
    b, f = state["balance"].sigmoid(), state["fusion"].sigmoid()
    others = [expert for j, expert in enumerate(experts) if j != s]
    own = b * experts[s] + (1 - b) * torch.stack(others).mean(0)
    return state.tower(s, state.gate(f"gates.{s}.", h, state.experts("experts.", h)) + f * own)


def aitm(state: State, x: torch.Tensor, s: int) -> torch.Tensor:
    z = state.dense("towers.0.", x)
    for t in range(1, s + 1):
        pair = state.dense(f"messages.{t - 1}.", z), state.dense(f"towers.{t}.", x)
        scores = [
            (state.linear("transfer.query.", u) @ state.linear("transfer.key.", u) / len(u) ** 0.5).exp() for u in pair
        ]
        z = sum(w / sum(scores) * state.linear("transfer.value.", u) for w, u in zip(scores, pair, strict=True))
    return state.linear(f"heads.{s}.", z)


REFERENCES = {function.__name__: function for function in (mmoe, omoe, ple, hinet, m3oe, aitm)}


def check(name: str, model: nn.Module, num_scenarios: int = NUM_SCENARIOS) -> None:
    torch.manual_seed(1)
    x_BD, scenario_B = torch.randn(40, LAYOUT.input_dim).double(), torch.randint(0, num_scenarios, (40,))
    state = State(model.state_dict())
    expected = [REFERENCES[name](state, x, int(s)) for x, s in zip(x_BD, scenario_B, strict=True)]
    torch.testing.assert_close(model(x_BD, scenario_B), torch.cat(expected))


@pytest.mark.parametrize("name", REFERENCES)
class TestEquations:
    def test_row_by_row(self, name):
        check(name, build(name))

    @pytest.mark.parametrize("num_scenarios", [2, 5])
    def test_other_numbers_of_scenarios(self, name, num_scenarios):
        check(name, build(name, num_scenarios), num_scenarios)

    def test_other_widths(self, name):
        check(name, build(name, experts={"num_experts": 2}, hidden_dims=(7,), tower_dims=()))


@pytest.mark.parametrize("num_levels", [1, 3])
def test_ple_with_other_levels(num_levels):
    model = build("ple", experts={"num_levels": num_levels})
    assert len(model.levels) == num_levels
    check("ple", model)


def test_sizes_come_from_the_configuration():
    sizes = {"num_experts": 5, "num_scenario_experts": 3}
    ple_level = build("ple", experts=sizes).levels[0]
    found = {
        "mmoe": build("mmoe", experts=sizes).experts.num_experts,
        "omoe": build("omoe", experts=sizes).mixture.experts.num_experts,
        "m3oe": build("m3oe", experts=sizes).experts.num_experts,
        "hinet": build("hinet", experts=sizes).own[0].experts.num_experts,
        "hinet shared": build("hinet", experts=sizes).shared.experts.num_experts,
        "ple": ple_level.shared.num_experts,
    }
    assert set(found.values()) == {5}, found
    assert [own.num_experts for own in ple_level.own] == [3] * NUM_SCENARIOS


def test_experts_are_dense_stacks_side_by_side():
    experts = Experts(3, 7, (8, 6), 0.0)
    stacks = [dense_stack(7, (8, 6)) for _ in range(3)]
    with torch.no_grad():
        for n, stack in enumerate(stacks):
            for i, linear in enumerate((stack[0], stack[3])):
                linear.weight.copy_(experts.weights_NDH[i][n].T)
                linear.bias.copy_(experts.biases_N1H[i][n, 0])
    x_BD = torch.randn(9, 7)
    torch.testing.assert_close(experts(x_BD), torch.stack([stack(x_BD) for stack in stacks]))
    assert experts.output_dim == 6


def test_experts_start_as_linear_layers_do():
    torch.manual_seed(0)
    experts, linear = Experts(20, 64, (50,), 0.0), nn.Linear(64, 1000)
    for ours, torchs in ((experts.weights_NDH[0], linear.weight), (experts.biases_N1H[0], linear.bias)):
        assert ours.std().item() == pytest.approx(torchs.std().item(), rel=0.05)
        assert 0.12 < ours.abs().max() <= 64**-0.5


def test_a_gate_mixes_by_hand():
    gate = Gate(1, 2)
    with torch.no_grad():
        gate.linear.weight[:] = torch.tensor([[0.0], [1.0]])
    expert_NBH = torch.tensor([[[2.0, 0.0]], [[6.0, 8.0]]])
    # softmax(0, ln 3) = (1/4, 3/4)
    mixed = gate(torch.tensor([[3.0]]).log(), expert_NBH)
    torch.testing.assert_close(mixed, torch.tensor([[5.0, 6.0]]))


def test_one_gate_is_many_equal_gates():
    mmoe, omoe = build("mmoe"), build("omoe")
    omoe.mixture.experts.load_state_dict(mmoe.experts.state_dict())
    omoe.towers.load_state_dict(mmoe.towers.state_dict())
    for gate in mmoe.gates:
        gate.load_state_dict(omoe.mixture.gate.state_dict())
    x_BD, scenario_B = torch.randn(20, LAYOUT.input_dim).double(), torch.arange(20) % NUM_SCENARIOS
    torch.testing.assert_close(mmoe(x_BD, scenario_B), omoe(x_BD, scenario_B))


def test_aitm_tells_a_scenario_about_those_before_it_alone():
    model = build("aitm")
    x_BD = torch.randn(10, LAYOUT.input_dim).double()
    before = [model(x_BD, torch.full((10,), s)) for s in range(NUM_SCENARIOS)]
    with torch.no_grad():
        for parameter in model.towers[1].parameters():
            parameter.mul_(-1.5)
    after = [model(x_BD, torch.full((10,), s)) for s in range(NUM_SCENARIOS)]
    changed = [not torch.allclose(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == [False, True, True]
