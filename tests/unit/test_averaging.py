"""The running mean of the weights."""

import pytest
import torch
from torch import nn

from llm4msr.training.averaging import WeightAverage


def test_the_mean_by_hand():
    weight = nn.Parameter(torch.tensor([0.0, 8.0]))
    average = WeightAverage({"w": weight}, horizon=4)
    expected = weight.detach().clone()
    for step in range(1, 60):
        with torch.no_grad():
            weight.add_(torch.tensor([1.0, -0.5]))
        average.update()
        expected += (weight.detach() - expected) * max(1 / 4, 10 / (10 + step))
        torch.testing.assert_close(average.mean["w"], expected)
    # A weight that moves by 1 a step is followed three steps behind: (1 - 1/4) / (1/4).
    torch.testing.assert_close(weight.detach() - average.mean["w"], torch.tensor([3.0, -1.5]), rtol=1e-4, atol=1e-4)


def test_the_weights_come_back_after_the_block_also_after_an_error():
    weight = nn.Parameter(torch.zeros(2))
    average = WeightAverage({"w": weight}, horizon=100)
    with torch.no_grad():
        weight.add_(11.0)
    average.update()
    mean = average.mean["w"].clone()
    assert mean.tolist() == pytest.approx([10.0, 10.0])
    with pytest.raises(KeyError), average.applied():
        assert torch.equal(weight, mean)
        raise KeyError
    assert weight.tolist() == [11.0, 11.0] and torch.equal(average.mean["w"], mean)


def test_going_on_from_its_state_is_as_never_having_stopped():
    def moved(average, weight, steps):
        for step in steps:
            with torch.no_grad():
                weight.mul_(0.9).add_(step)
            average.update()

    straight_weight = nn.Parameter(torch.ones(3))
    straight = WeightAverage({"w": straight_weight}, horizon=5)
    moved(straight, straight_weight, range(20))
    first_weight = nn.Parameter(torch.ones(3))
    first = WeightAverage({"w": first_weight}, horizon=5)
    moved(first, first_weight, range(7))
    second_weight = nn.Parameter(first_weight.detach().clone())
    second = WeightAverage({"w": second_weight}, horizon=5)
    second.load({name: tensor.clone() for name, tensor in first.state().items()})
    moved(second, second_weight, range(7, 20))
    assert torch.equal(second.mean["w"], straight.mean["w"]) and second.num_steps == straight.num_steps == 20
