"""Generated layers against the plain loop: one weight per row, written out."""

from __future__ import annotations

import pytest
import torch

from llm4msr.models import meta
from llm4msr.models.meta import KnowledgeTrunk, MetaLayer, SubjectRows


def apply(layer: MetaLayer, x_BD: torch.Tensor, z_UZ: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    return layer(x_BD, z_UZ, SubjectRows(index_B, *z_UZ.shape))


def per_row_loop(layer: MetaLayer, x_BD: torch.Tensor, z_UZ: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    """What a meta layer means: generate the row's own weight and bias, multiply."""
    out = []
    for x_D, u in zip(x_BD, index_B, strict=True):
        generated = layer.weight_head(z_UZ[u])
        if layer.full:
            weight_DH = generated.view(layer.input_dim, layer.output_dim)
        else:
            weight_DH = layer.down_DR @ generated.view(layer.rank, layer.rank) @ layer.up_RH
        out.append(x_D @ weight_DH + layer.bias_head(z_UZ[u]))
    return torch.stack(out)


@pytest.mark.parametrize("weight_form", ["full", "low_rank"])
@pytest.mark.parametrize(
    ("num_rows", "num_users"),
    [(64, 3), (64, 1), (17, 17), (64, 60), (1, 1)],
    ids=["few users", "one user", "all distinct", "mostly distinct", "one row"],
)
@pytest.mark.parametrize("weights_at_once", [1, 200, 2**20], ids=["one by one", "some", "all at once"])
def test_meta_layer_equals_the_per_row_loop_with_gradients(
    weight_form, num_rows, num_users, weights_at_once, monkeypatch
):
    monkeypatch.setattr(meta, "CPU_WEIGHTS", weights_at_once)
    torch.manual_seed(0)
    layer = MetaLayer(trunk_dim=5, input_dim=12, output_dim=7, weight_form=weight_form, rank=4).double()
    x_BD = torch.randn(num_rows, 12, dtype=torch.float64, requires_grad=True)
    z_UZ = torch.randn(num_users, 5, dtype=torch.float64, requires_grad=True)
    index_B = torch.randint(0, num_users, (num_rows,))
    target_BH = torch.randn(num_rows, 7, dtype=torch.float64)

    outputs, gradients = [], []
    for function in (apply, per_row_loop):
        layer.zero_grad()
        x_BD.grad = z_UZ.grad = None
        out_BH = function(layer, x_BD, z_UZ, index_B)
        (out_BH * target_BH).sum().backward()
        outputs.append(out_BH.detach())
        gradients.append([x_BD.grad, z_UZ.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("num_users", [1, 3, 100, 1000, 4096])
@pytest.mark.parametrize("hidden_share", [0.0, 0.1, 0.9, 1.0])
def test_slots_hold_every_row_with_little_padding_whatever_the_skew(num_users, hidden_share):
    torch.manual_seed(0)
    index_B = torch.randint(1, num_users + 1, (4096,))
    index_B[torch.rand(4096) < hidden_share] = 0
    rows = SubjectRows(index_B, num_users + 1, 32)
    assert rows.place_B.unique().shape == index_B.shape  # a place each,
    torch.testing.assert_close(rows.subject_N[rows.place_B // rows.length], index_B)  # in a slot of its subject
    assert rows.num_slots == len(rows.subject_N)
    # Multiplying padding and generating a weight more than once cost at most what is due anyway.
    assert rows.num_slots * (rows.length + 32) <= 2 * (len(index_B) + 32 * len(index_B.unique()))


@pytest.mark.parametrize("weight_form", ["full", "low_rank"])
def test_no_rows_give_zero_gradients(weight_form):
    layer = MetaLayer(5, 6, 4, weight_form, 3)
    z_UZ = torch.randn(2, 5, requires_grad=True)
    out_BH = apply(layer, torch.randn(0, 6), z_UZ, torch.zeros(0, dtype=torch.int64))
    assert out_BH.shape == (0, 4)
    out_BH.sum().backward()
    for tensor in (z_UZ, *layer.parameters()):
        assert tensor.grad.eq(0).all()


def test_weight_is_what_forward_multiplies_with():
    torch.manual_seed(0)
    for form in ("full", "low_rank"):
        layer = MetaLayer(5, 6, 4, form, 3)
        x_BD, z_UZ, index_B = torch.randn(9, 6), torch.randn(2, 5), torch.arange(9) % 2
        expected = torch.einsum("bd,bdh->bh", x_BD, layer.weight(z_UZ)[index_B]) + layer.bias_head(z_UZ)[index_B]
        torch.testing.assert_close(apply(layer, x_BD, z_UZ, index_B), expected)
        parts = torch.einsum("br,brh->bh", layer.shared_part(x_BD), layer.own_part(z_UZ)[index_B])
        torch.testing.assert_close(parts + layer.bias_head(z_UZ)[index_B], expected)


def test_trunk_standardises_and_row_zero_is_learned():
    trunk = KnowledgeTrunk(3, (4,), missing=True)
    trunk.set_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.0, 1.0]))
    knowledge_UK = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0]])
    z_UZ = trunk(knowledge_UK)
    torch.testing.assert_close(z_UZ[0], trunk.missing_Z)
    torch.testing.assert_close(z_UZ[1], torch.relu(trunk.dense[0].bias))  # a vector at the mean is all zeros
    z_UZ.sum().backward()
    assert trunk.missing_Z.grad.eq(1).all()
    assert torch.isfinite(trunk(torch.randn(5, 3))).all()  # a component without variance does not divide by zero


def test_low_rank_has_far_fewer_parameters():
    full = sum(p.numel() for p in MetaLayer(32, 256, 256, "full", 16).parameters())
    low_rank = sum(p.numel() for p in MetaLayer(32, 256, 256, "low_rank", 16).parameters())
    assert full > 2_000_000 > 30_000 > low_rank
