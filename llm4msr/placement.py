"""How many equal processes fit on the nodes of a cluster: arithmetic over what Ray says that its nodes have.

A process lies on one node whole, so sums over the cluster do not tell. Of nodes that an autoscaler has yet to start
nothing is known: who waits for them must ask for what any of them has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Node:
    """What one node has, whether or not it is in use.

    Attributes:
        num_cpus: Whole processors.
        num_gpus: Whole GPUs.
    """

    num_cpus: int
    num_gpus: int


def alive_nodes(found: Iterable[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Returns the nodes that are there now.

    Args:
        found: As ``ray.nodes()`` returns them.
    """
    resources = [node["Resources"] for node in found if node["Alive"]]
    return tuple(Node(int(there.get("CPU", 0)), int(there.get("GPU", 0))) for there in resources)


def num_fitting(nodes: Iterable[Node], cpus: int, gpus: float) -> int:
    """Returns how many processes of so many CPUs and GPUs run at once.

    Args:
        nodes: Of the cluster.
        cpus: Of each process, at least 1.
        gpus: Of each process: 0, a share of one, or whole ones, of which it takes those of one node.
    """
    return sum(min(node.num_cpus // cpus, _on_gpus(node, gpus)) if gpus else node.num_cpus // cpus for node in nodes)


def most_cpus(nodes: Sequence[Node], num_processes: int, gpus: float, limit: int | None = None) -> int:
    """Returns the most CPUs per process, `limit` at most, with which so many run at once; 1 where no number does."""
    most = max([node.num_cpus for node in nodes], default=0)
    most = most if limit is None else min(most, limit)
    return max([c for c in range(1, most + 1) if num_fitting(nodes, c, gpus) >= num_processes], default=1)


def _on_gpus(node: Node, gpus: float) -> int:
    # Shares of one GPU are never put together from several.
    return int(node.num_gpus / gpus) if gpus >= 1 else node.num_gpus * int(1 / gpus)
