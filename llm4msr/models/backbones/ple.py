"""PLE: levels of shared experts and experts of each scenario's own.

Axes: B rows, S scenarios, N experts, D input width, H width of an expert's output.
"""

from __future__ import annotations

import torch
from torch import nn

from llm4msr.config import ModelConfig
from llm4msr.models.backbones.base import Backbone, InputLayout
from llm4msr.models.backbones.experts import Experts, Gate, towers
from llm4msr.models.layers import ScenarioRows


class PLE(Backbone):
    """PLE, progressive layered extraction (Tang et al., RecSys 2020, sections 4.1 and 4.2), scenarios for tasks.

    Each level (the paper's CGC) has experts that all scenarios share, on the shared path, and experts of each
    scenario's own, on its path. A scenario's gate, fed by its path, mixes its own and the shared experts; the shared
    gate, fed by the shared path, does the same for the next level. The last level has no shared gate. A tower per
    scenario follows. ``config.experts.num_levels`` = 1 is CGC.

    Differs from the paper: there every task's experts see every row, and the shared gate mixes the experts of all
    tasks. Here a row has one scenario and meets that scenario's experts and the shared ones only, so what belongs to
    a scenario learns from its rows alone and a row costs the same however many scenarios there are.
    """

    def __init__(self, layout: InputLayout, num_scenarios: int, config: ModelConfig) -> None:
        super().__init__(layout, num_scenarios, config)
        num_levels, input_dim = config.experts.num_levels, layout.input_dim
        self.levels = nn.ModuleList()
        for i in range(num_levels):
            level = Level(input_dim, num_scenarios, config, is_last=i == num_levels - 1)
            self.levels.append(level)
            input_dim = level.output_dim
        self.towers = towers(num_scenarios, input_dim, config)

    def forward(self, x_BD: torch.Tensor, scenario_B: torch.Tensor) -> torch.Tensor:
        """Returns logit_B."""
        rows = ScenarioRows(scenario_B, len(self.towers))
        own_BD = shared_BD = rows.sort(x_BD)
        for level in self.levels:
            own_BD, shared_BD = level(own_BD, shared_BD, rows.sizes)
        return rows.map(own_BD, lambda s, x: self.towers[s](x))


class Level(nn.Module):
    """One level of PLE, on rows sorted by scenario.

    Attributes:
        output_dim: H.
    """

    def __init__(self, input_dim: int, num_scenarios: int, config: ModelConfig, is_last: bool) -> None:
        super().__init__()
        num_shared, num_own = config.experts.num_experts, config.experts.num_scenario_experts
        self.shared = Experts(num_shared, input_dim, config.hidden_dims, config.dropout)
        self.own = nn.ModuleList(
            Experts(num_own, input_dim, config.hidden_dims, config.dropout) for _ in range(num_scenarios)
        )
        self.gates = nn.ModuleList(Gate(input_dim, num_own + num_shared) for _ in range(num_scenarios))
        self.shared_gate = None if is_last else Gate(input_dim, num_own + num_shared)
        self.output_dim = self.shared.output_dim

    def forward(
        self, own_BD: torch.Tensor, shared_BD: torch.Tensor, sizes: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Returns both paths' next (B, H); the shared one is None after the last level.

        Args:
            own_BD: The scenarios' paths.
            shared_BD: The shared path.
            sizes: Rows of each scenario.
        """
        shared_parts = zip(torch.split(shared_BD, sizes), self.shared(shared_BD).split(sizes, dim=1), strict=True)
        next_own, next_shared = [], []
        for s, (own, (shared, shared_NBH)) in enumerate(zip(torch.split(own_BD, sizes), shared_parts, strict=True)):
            expert_NBH = torch.cat([self.own[s](own), shared_NBH])
            next_own.append(self.gates[s](own, expert_NBH))
            if self.shared_gate is not None:
                next_shared.append(self.shared_gate(shared, expert_NBH))
        return torch.cat(next_own), torch.cat(next_shared) if next_shared else None
