"""The backbones that adapt to the scenario, against forwards written row by row, and what is special of each."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import leaky_relu, relu

from llm4msr.config import ModelConfig
from llm4msr.config.zoo import AdaptiveConfig
from llm4msr.models.backbones import InputLayout, build_backbone

LAYOUT = InputLayout(("genre", "item_id", "user_id"), embedding_dim=2, num_others=1)
ITEM, USER = slice(2, 4), slice(4, 6)
ADAPTIVE = AdaptiveConfig(hidden_dim=5, rank=3, adapter_dim=4, num_clusters=3)
CONFIG = ModelConfig(embedding_dim=4, hidden_dims=(8, 6), tower_dims=(5,), dropout=0.0, adaptive=ADAPTIVE)
NAMES = ("sar_net", "m2m", "adasparse", "adaptdhm", "epnet", "ppnet", "pepnet", "hamur")


def build(name: str, layout: InputLayout = LAYOUT, adaptive: dict | None = None, **changes):
    """In float64, in evaluation, every parameter and statistic at random."""
    torch.manual_seed(0)
    section = ADAPTIVE.model_copy(update=adaptive or {})
    config = CONFIG.model_copy(update={"backbone": name, "adaptive": section, **changes})
    model = build_backbone(layout, 3, config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
        for buffer in model.buffers():
            buffer.add_(torch.rand_like(buffer))
    return model


def batch(num_rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(num_rows, 7, dtype=torch.float64), torch.randint(0, 3, (num_rows,))


def linear(layer, x):
    return layer.weight @ x + layer.bias


def stack(dense, x):
    for layer in dense:
        if isinstance(layer, torch.nn.Linear):
            x = relu(linear(layer, x))
    return x


def expert(experts, n, x):
    for weight_NDH, bias_N1H in zip(experts.weights_NDH, experts.biases_N1H, strict=True):
        x = relu(x @ weight_NDH[n] + bias_N1H[n, 0])
    return x


def sar_net(model, x, s):
    h = model.scale_SD[s] * x + model.shift_SD[s]
    outputs = [expert(model.shared_experts, n, h) for n in range(4)] + [expert(model.own_experts[s], 0, h)]
    gate = torch.softmax(model.gates[s].linear.weight @ h, 0)
    mixed = sum(g * v for g, v in zip(gate, outputs, strict=True))
    return linear(model.tower.last, stack(model.tower.hidden, mixed))


def m2m(model, x, s):
    z = leaky_relu(linear(model.scenario_knowledge, model.scenario_embedding_SE[s]))

    def meta(unit, h):
        weight = (unit.weight_head.weight @ z + unit.weight_head.bias).view(6, 6)
        return h @ weight + unit.bias_head.weight @ z + unit.bias_head.bias

    outputs = [expert(model.experts, n, x) for n in range(4)]
    scores = [(model.query.weight @ leaky_relu(meta(model.attention, v)))[0] for v in outputs]
    h = sum(g * v for g, v in zip(torch.stack(scores).softmax(0), outputs, strict=True))
    for unit in model.tower:
        h = leaky_relu(meta(unit, h) + h)
    return linear(model.last, h)


def adasparse(model, x, s):
    for i, (layer, pruner) in enumerate(zip(model.layers, model.pruners, strict=True)):
        x = x if i == 0 else relu(x)
        factor = 2 * torch.sigmoid(linear(pruner, torch.cat([model.scenario_embedding_SE[s], x])))
        factor = torch.stack([f if f > 0.25 else f - f.detach() for f in factor])  # straight-through
        x = linear(layer, factor * x)
    return x


def adaptdhm(model, x, s):
    v = torch.cat([x, model.scenario_embedding_SE[s]])
    clusters = model.clusters
    k = int(torch.stack([torch.dot(v - clusters.mean_I, centre) for centre in clusters.centre_KI]).argmax())
    for i, shared in enumerate(model.shared):
        v = v if i == 0 else relu(v)
        v = (shared.weight * model.weights_KHD[i][k]) @ v + shared.bias + model.biases_KH[i][k]
    return v


def gate(unit, *seen):
    first, last = unit.dense[0][0], unit.dense[1]
    return 2 * torch.sigmoid(linear(last, relu(linear(first, torch.cat(seen)))))


def pepnet(model, x, s):
    e = model.scenario_embedding_SE[s]
    prior = torch.cat([x[USER], x[ITEM], e])
    if model.input_gate is not None:
        x = gate(model.input_gate, e, x.detach()) * x
    h = x
    for i, layer in enumerate(model.layers[:-1]):
        h = relu(linear(layer, h))
        if model.gates_hidden:
            h = gate(model.hidden_gates[i], prior, x.detach()) * h
    return linear(model.layers[-1], h)


def hamur(model, x, s):
    core = linear(model.hyper[1], stack(model.hyper[0], x)).view(3, 3)
    for layer, a in zip(model.layers[:-1], model.adapters, strict=True):
        x = relu(linear(layer, x))
        down = a.down_in_SHR[s] @ core @ a.down_out_SRA[s]
        up = a.up_in_SAR[s] @ core @ a.up_out_SRH[s]
        out = torch.sigmoid(x @ down + a.down_bias_SA[s]) @ up
        norm = a.norm
        out = (out - norm.mean_SD[s]) / (norm.var_SD[s] + norm.eps).sqrt()
        x = x + out * norm.gamma * norm.gamma_SD[s] + norm.beta + norm.beta_SD[s]
    return linear(model.layers[-1], x)


REFERENCES = {name: globals().get(name, pepnet) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_equal_the_equations_row_by_row(name):
    model, (x_BD, scenario_B) = build(name), batch()
    x_BD.requires_grad_()
    inputs = (x_BD, *model.parameters())
    out_B = model(x_BD, scenario_B)
    expected_B = torch.cat([REFERENCES[name](model, x, int(s)) for x, s in zip(x_BD, scenario_B, strict=True)])
    assert out_B.std() > 0.05
    torch.testing.assert_close(out_B, expected_B)
    for ours, plain in zip(
        torch.autograd.grad(out_B.square().sum(), inputs),
        torch.autograd.grad(expected_B.square().sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_at_all(name):
    assert build(name)(torch.empty(0, 7, dtype=torch.float64), torch.empty(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_scenarios_score_the_same_row_differently(name):
    model, (x_BD, _) = build(name), batch()
    scores = [model(x_BD, torch.full((40,), s)) for s in range(3)]
    assert all((scores[a] - scores[b]).abs().max() > 1e-2 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_sar_net_by_hand():
    model = build("sar_net", hidden_dims=(), tower_dims=())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.scale_SD[1, 0], model.shift_SD[1, 0] = 3.0, 0.5
        model.tower.last.weight[0, 0], model.tower.last.bias[0] = 2.0, 1.0
    x_BD = torch.zeros(2, 7, dtype=torch.float64)
    x_BD[:, 0] = 2.0
    # without layers each of the five experts is its input, and any gate mixes them to it: 2 * (3 * 2 + 0.5) + 1
    assert model(x_BD, torch.tensor([1, 0])).tolist() == [14.0, 1.0]


def test_m2m_scenarios_prefer_other_experts():
    model, (x_BD, _) = build("m2m"), batch()
    with torch.no_grad():
        for parameter in (model.attention.weight_head.weight, model.attention.bias_head.weight):
            parameter.zero_()
        for unit in model.tower:
            for parameter in unit.parameters():
                parameter.zero_()  # the tower passes on what attention mixes
        model.last.weight.fill_(1.0)
        model.last.bias.zero_()
        model.query.weight.zero_()
        by_average = model.experts(x_BD).sum(2).mean(0)
        torch.testing.assert_close(model(x_BD, torch.zeros(40, dtype=torch.int64)), by_average)
        # scenario 1's generated layer sums an expert's output, scenario 2's negates that: the largest and the smallest
        model.scenario_knowledge.weight.zero_()
        model.scenario_knowledge.bias.zero_()
        model.scenario_knowledge.weight[0, 0] = model.scenario_knowledge.weight[1, 1] = 1.0
        model.scenario_embedding_SE.zero_()
        model.scenario_embedding_SE[1, 0] = model.scenario_embedding_SE[2, 1] = 1.0
        model.attention.weight_head.bias.zero_()
        model.attention.bias_head.bias.zero_()
        weight_HHZ = model.attention.weight_head.weight.view(6, 6, 5)
        weight_HHZ[:, 0, 0], weight_HHZ[:, 0, 1] = 1e6, -1e6
        model.query.weight[0, 0] = 1.0
        sums_NB = model.experts(x_BD).sum(2)
        torch.testing.assert_close(model(x_BD, torch.full((40,), 1)), sums_NB.amax(0))
        torch.testing.assert_close(model(x_BD, torch.full((40,), 2)), sums_NB.amin(0))


class TestAdaSparse:
    def factors(self, kind: str, u) -> torch.Tensor:
        model = build("adasparse", adaptive={"pruning": kind})
        return model._factor(torch.as_tensor(u, dtype=torch.float64))

    def test_factors_by_hand(self):
        u = [[0.1, 0.2, 0.25, 0.3, 0.9]]
        assert self.factors("binary", u).tolist() == [[0, 0, 0, 1, 1]]
        assert self.factors("scale", u).tolist() == [[0.2, 0.4, 0.5, 0.6, 1.8]]
        assert self.factors("fusion", u).tolist() == [[0, 0.4, 0.5, 0.6, 1.8]]

    @pytest.mark.parametrize(("kind", "slope"), [("binary", 1), ("scale", 2), ("fusion", 2)])
    def test_a_pruned_neuron_still_gets_a_gradient(self, kind, slope):
        u = torch.tensor([[0.05, 0.9]], dtype=torch.float64, requires_grad=True)
        self.factors(kind, u).sum().backward()
        assert u.grad.tolist() == [[slope, slope]]

    def test_a_pruned_neuron_is_out(self):
        model, (x_BD, scenario_B) = build("adasparse"), batch()
        with torch.no_grad():
            model.pruners[1].weight[2], model.pruners[1].bias[2] = 0.0, -3.0  # 2 sigmoid(-3) = 0.09
            before = model(x_BD, scenario_B)
            model.layers[1].weight[:, 2] = 1e6
            assert torch.equal(model(x_BD, scenario_B), before)
            model.pruners[1].bias[2] = -1.5  # 2 sigmoid(-1.5) = 0.36
            assert not torch.equal(model(x_BD, scenario_B), before)

    def test_a_scenario_prunes_for_itself(self):
        model, (x_BD, _) = build("adasparse"), batch()
        with torch.no_grad():
            model.pruners[0].weight[:, :4], model.pruners[0].bias[:] = 0.0, 0.0
            model.pruners[0].weight[:, 4:] = 0.0
            model.pruners[0].weight[:, 0] = 1.0
            model.scenario_embedding_SE[:, 0] = torch.tensor([-9.0, 9.0, 0.0])
            # scenario 0 prunes all of x: its rows score the same; 1 doubles x, which 2 leaves as it is
            model.pruners[1].weight[:, :4] = 0.0
            model.pruners[2].weight[:, :4] = 0.0
            assert model(x_BD, torch.zeros(40, dtype=torch.int64)).std() < 1e-12
            doubled = model(2 * x_BD, torch.full((40,), 2))
            torch.testing.assert_close(model(x_BD, torch.ones(40, dtype=torch.int64)), doubled, rtol=1e-2, atol=1e-2)


class TestPEPNet:
    @pytest.mark.parametrize("name", ["epnet", "ppnet", "pepnet"])
    def test_gates_learn_from_the_prior_alone(self, name):
        # With the gates' last layer replaced by what only their input tells, x gets a gradient through a gate only
        # where it is the prior.
        model, (x_BD, scenario_B) = build(name), batch()
        with torch.no_grad():
            for layer in model.layers[:-1]:
                layer.weight.zero_()  # x reaches the logit through the gates alone
                layer.bias.fill_(1.0)
        x_BD.requires_grad_()
        model(x_BD, scenario_B).sum().backward()
        gradient_D = x_BD.grad.abs().sum(0)
        prior = torch.zeros(7, dtype=torch.bool)
        if name != "epnet":
            prior[USER] = prior[ITEM] = True
        assert (gradient_D > 0).tolist() == prior.tolist()

    def test_gates_of_neutral_weights_change_nothing(self):
        model, (x_BD, scenario_B) = build("pepnet"), batch()
        with torch.no_grad():
            for unit in (model.input_gate, *model.hidden_gates):
                unit.dense[1].weight.zero_()
                unit.dense[1].bias.zero_()
        expected = [linear(model.layers[-1], stack(model.layers[:-1], x)) for x in x_BD]
        torch.testing.assert_close(model(x_BD, scenario_B), torch.cat(expected))

    def test_gates_reach_from_0_to_2(self):
        model, (x_BD, scenario_B) = build("epnet"), batch()
        with torch.no_grad():
            model.input_gate.dense[1].weight.zero_()
            model.input_gate.dense[1].bias.fill_(50.0)
            twice = model(x_BD, scenario_B)
            model.input_gate.dense[1].bias.zero_()
            torch.testing.assert_close(model(2 * x_BD, scenario_B), twice)

    def test_data_without_user_or_item(self):
        layout = InputLayout(("genre", "item_id"), embedding_dim=2, num_others=3)
        model, (x_BD, scenario_B) = build("ppnet", layout), batch()
        assert model.hidden_gates[0].dense[0][0].in_features == 2 + 4 + 7
        assert model(x_BD, scenario_B).std() > 0.05
        bare = build("pepnet", InputLayout((), embedding_dim=2, num_others=7))
        assert bare.hidden_gates[0].dense[0][0].in_features == 4 + 7
        assert bare(x_BD, scenario_B).std() > 0.05

    @pytest.mark.parametrize("name", ["ppnet", "pepnet", "hamur"])
    def test_nothing_to_gate_is_refused(self, name):
        with pytest.raises(ValueError, match=rf"hidden_dims is empty: {name} .*give at least one width"):
            ModelConfig(backbone=name, hidden_dims=())

    @pytest.mark.parametrize("name", ["sar_net", "m2m", "adasparse", "adaptdhm", "epnet"])
    def test_others_do_without_hidden_layers(self, name):
        model, (x_BD, scenario_B) = build(name, hidden_dims=()), batch()
        model(x_BD, scenario_B).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is None] == []


class TestHAMUR:
    def test_without_cores_it_is_the_plain_network(self):
        model, (x_BD, scenario_B) = build("hamur"), batch()
        with torch.no_grad():
            model.hyper[1].weight.zero_()
            model.hyper[1].bias.zero_()
            for adapter in model.adapters:
                for tensor in (adapter.norm.mean_SD, adapter.norm.beta, adapter.norm.beta_SD):
                    tensor.zero_()
        expected = [linear(model.layers[-1], stack(model.layers[:-1], x)) for x in x_BD]
        torch.testing.assert_close(model(x_BD, scenario_B), torch.cat(expected))
        torch.testing.assert_close(model.train()(x_BD, scenario_B), torch.cat(expected))

    def test_cores_start_near_the_unit_matrix(self):
        torch.manual_seed(0)
        model = build_backbone(LAYOUT, 3, CONFIG.model_copy(update={"backbone": "hamur"}))
        core_RR = model.hyper(torch.zeros(1, 7)).view(3, 3)
        assert torch.equal(model.hyper[1].bias.view(3, 3), torch.eye(3))
        assert (core_RR - torch.eye(3)).abs().max() < 0.6

    def test_statistics_are_the_scenarios(self):
        model, (x_BD, scenario_B) = build("hamur").train(), batch()
        before = model.adapters[0].norm.mean_SD.clone()
        kept = scenario_B != 1
        model(x_BD[kept], scenario_B[kept])
        assert (model.adapters[0].norm.mean_SD != before).any(dim=1).tolist() == [True, False, True]
