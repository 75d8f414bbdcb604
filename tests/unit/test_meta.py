"""Generated layers against the plain loop: one weight per row, written out."""

from __future__ import annotations

import pytest
import torch

from llm4msr.models.meta import KnowledgeTrunk, MetaLayer, apply_full


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
def test_meta_layer_equals_the_per_row_loop_with_gradients(weight_form, num_rows, num_users):
    torch.manual_seed(0)
    layer = MetaLayer(trunk_dim=5, input_dim=12, output_dim=7, weight_form=weight_form, rank=4).double()
    x_BD = torch.randn(num_rows, 12, dtype=torch.float64, requires_grad=True)
    z_UZ = torch.randn(num_users, 5, dtype=torch.float64, requires_grad=True)
    index_B = torch.randint(0, num_users, (num_rows,))
    target_BH = torch.randn(num_rows, 7, dtype=torch.float64)

    outputs, gradients = [], []
    for function in (layer, lambda *args: per_row_loop(layer, *args)):
        layer.zero_grad()
        x_BD.grad = z_UZ.grad = None
        out_BH = function(x_BD, z_UZ, index_B)
        (out_BH * target_BH).sum().backward()
        outputs.append(out_BH.detach())
        gradients.append([x_BD.grad, z_UZ.grad, *(p.grad for p in layer.parameters())])
    torch.testing.assert_close(outputs[0], outputs[1])
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


def test_both_orders_of_the_sum_are_taken_and_agree(monkeypatch):
    torch.manual_seed(0)
    head, bias = torch.randn(6 * 4, 3, dtype=torch.float64), torch.randn(6 * 4, dtype=torch.float64)
    x_BD = torch.randn(40, 6, dtype=torch.float64)
    batched, products = torch.bmm, []
    monkeypatch.setattr(torch, "bmm", lambda *args: products.append(1) or batched(*args))
    even, skewed = torch.arange(40) % 2, torch.cat([torch.zeros(20).long(), torch.arange(20)])
    for index_B, z_UZ, grouped in (
        (even, torch.randn(2, 3).double(), True),
        (skewed, torch.randn(20, 3).double(), False),
    ):
        products.clear()
        out = apply_full(x_BD, z_UZ, index_B, head, bias)
        assert bool(products) is grouped
        weight_UDH = (z_UZ @ head.T + bias).view(-1, 6, 4)
        torch.testing.assert_close(out, torch.einsum("bd,bdh->bh", x_BD, weight_UDH[index_B]))


def test_weight_is_what_forward_multiplies_with():
    torch.manual_seed(0)
    for form in ("full", "low_rank"):
        layer = MetaLayer(5, 6, 4, form, 3)
        x_BD, z_UZ, index_B = torch.randn(9, 6), torch.randn(2, 5), torch.arange(9) % 2
        expected = torch.einsum("bd,bdh->bh", x_BD, layer.weight(z_UZ)[index_B]) + layer.bias_head(z_UZ)[index_B]
        torch.testing.assert_close(layer(x_BD, z_UZ, index_B), expected)


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
