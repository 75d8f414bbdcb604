"""The arithmetic of serving, and the limits that a size meets first."""

from __future__ import annotations

from dataclasses import dataclass

from llm4msr.planning.ledger import Ledger, Rule

RANK = (
    Rule(
        "candidate_ms",
        "ms core / candidate",
        "(rank_1000_ms - rank_100_ms) / (1000 - 100)",
        "one candidate more in a request",
    ),
)
SERVE = (
    Rule(
        "request_ms",
        "ms core",
        "ms_per_s / serve_requests_per_s + (candidates - serve_candidates) * candidate_ms",
        "one request, HTTP included",
    ),
    Rule("replica_requests_per_s", "requests / s / core", "ms_per_s / request_ms", "of a replica that never waits"),
    Rule(
        "replicas",
        "core",
        "ceil(requests_per_s / (replica_requests_per_s * utilisation)) + one_core",
        "replicas of one core, one to spare",
    ),
    Rule("replica_gb", "GB", "embedding_gb + entities_gb + table_copies * table_gb", "memory of each replica"),
    Rule("node_table_gb", "GB", "(1 - table_copies) * table_gb", "memory-mapped once on each node"),
    Rule(
        "replicas_on_node",
        "core",
        "max(min(node_cores, floor((node_memory_gb - node_table_gb) / replica_gb) * one_core), one_core)",
        "replicas that a node holds, by its cores and its memory",
    ),
    Rule("serve_nodes", "nodes", "ceil(replicas / replicas_on_node)", "nodes"),
    Rule(
        "serve_usd",
        "USD / month",
        "serve_nodes * node_cores * core_usd_per_h * h_per_month",
        "price of the nodes, a month",
    ),
)


@dataclass(frozen=True)
class Limit:
    """Something that a size may use up.

    Attributes:
        what: The resource.
        needed: Name of the quantity that is needed.
        there: Name of the quantity that is there.
        remedy: What to do where it is not enough.
    """

    what: str
    needed: str
    there: str
    remedy: str


@dataclass(frozen=True)
class Load:
    """How far a limit is used: `share` above 1 cannot work as planned."""

    limit: Limit
    needed: float
    there: float
    unit: str

    @property
    def share(self) -> float:
        """Needed over there."""
        return self.needed / self.there


LIMITS = (
    Limit("memory of the extraction's driver", "driver_gb", "node_memory_gb", "a head node with more memory"),
    Limit(
        "units that the extraction's driver hands out",
        "units_per_s",
        "units_per_s_of_driver",
        "raise knowledge.rows_per_commit",
    ),
    Limit(
        "finding on s3:// what an extraction lacks, hours",
        "resume_h",
        "one_hour",
        "raise knowledge.rows_per_commit",
    ),
    Limit(
        "knowledge table on a node that trains",
        "train_table_gb",
        "node_memory_gb",
        "a narrower model, nodes with more memory, or fast local disks: the table is memory-mapped",
    ),
    Limit(
        "embeddings with optimizer in a worker",
        "optimized_gb",
        "worker_memory_gb",
        "embedding_optimizer rowwise_adagrad, or embedding_sharding sharded",
    ),
    Limit(
        "network of a worker: gradients of embeddings",
        "exchange_gb_per_s",
        "network_gb_per_s",
        "embedding_sharding sharded, or fewer workers",
    ),
    Limit(
        "memory of a node that serves one replica",
        "serve_memory_gb",
        "node_memory_gb",
        "a narrower model, min_count for rare users and items, nodes with more memory",
    ),
)
GPU_LIMIT = Limit("language model in a GPU", "weights_gb", "gpu_memory_gb", "a larger GPU, or vLLM over several")

NODE_MEMORY = (
    Rule("workers_together", "worker", "min(train_workers, workers_on_node)", "workers that share a node"),
    Rule(
        "train_table_gb",
        "GB",
        "table_gb * max(1, table_copies * workers_together / one_worker)",
        "knowledge tables on a node that trains",
    ),
    Rule("serve_memory_gb", "GB", "replica_gb + node_table_gb", "a node's memory with one replica"),
)
MEMORY_OF_CORES = (
    Rule("worker_memory_gb", "GB", "node_memory_gb / workers_together * one_worker", "memory of a worker"),
)
MEMORY_OF_GPUS = (Rule("worker_memory_gb", "GB", "gpu_memory_gb", "memory of a worker's GPU"),)


def loads(ledger: Ledger, with_gpu: bool) -> list[Load]:
    """Returns how far each limit is used, the tightest first."""
    limits = (*LIMITS, GPU_LIMIT) if with_gpu else LIMITS
    found = [Load(one, ledger[one.needed], ledger[one.there], ledger.quantities[one.there].unit) for one in limits]
    return sorted(found, key=lambda load: -load.share)
