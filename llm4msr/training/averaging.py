"""A running mean of the weights: what is validated, saved as the best and served, while training goes on without it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

WARM_UP_STEPS = 10


class WeightAverage:
    """Exponential mean of weights over their last steps (after Polyak and Juditsky, SIAM J. Control Optim. 1992).

    A constant learning rate leaves weights wandering about a good place; their mean is nearer to it. After step t the
    mean moves towards the weights by max(1 / horizon, 10 / (10 + t)), so that the first steps are forgotten soon.

    Args:
        parameters: By name; their mean begins at what they are.
        horizon: Steps.

    Attributes:
        mean: By the parameter's name.
        num_steps: t.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], horizon: int) -> None:
        self.parameters, self.horizon, self.num_steps = dict(parameters), horizon, 0
        self.mean = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights after a step."""
        self.num_steps += 1
        share = max(1 / self.horizon, WARM_UP_STEPS / (WARM_UP_STEPS + self.num_steps))
        torch._foreach_lerp_(list(self.mean.values()), [p.data for p in self.parameters.values()], share)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Gives the model the means within the block, and its own weights back after it."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, parameter in self.parameters.items():
            own = parameter.detach().clone()
            parameter.copy_(self.mean[name])
            self.mean[name] = own

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what `load` goes on from."""
        return self.mean | {"num_steps": torch.tensor(self.num_steps)}

    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        """Goes on from what `state` returned."""
        self.num_steps = int(state["num_steps"])
        for name, mean in self.mean.items():
            mean.copy_(state[name])
