"""AdaptDHM's routing: where rows go, how the centres move, that workers agree."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.functional import normalize

from llm4msr.config import ModelConfig
from llm4msr.config.zoo import AdaptiveConfig
from llm4msr.models.backbones import InputLayout
from llm4msr.models.backbones.adaptdhm import AdaptDHM, DirectionClusters


def build() -> tuple[AdaptDHM, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=4, hidden_dims=(8, 6), dropout=0.0, adaptive=AdaptiveConfig(num_clusters=3))
    model = AdaptDHM(InputLayout(("user_id",), embedding_dim=2, num_others=5), 3, config)
    return model.eval(), torch.randn(40, 7), torch.randint(0, 3, (40,))


def _clusters() -> DirectionClusters:
    torch.manual_seed(0)
    return DirectionClusters(3, 4)


def _batches() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(30, 4) + 1 for _ in range(5)]


def _worker(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    clusters = _clusters()
    for rows_BI in _batches():
        clusters(rows_BI[:7] if rank == 0 else rows_BI[7:])
    torch.save(dict(clusters.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_rows_go_to_the_nearest_centre():
    clusters = DirectionClusters(3, 2).eval()
    clusters.mean_I[:] = torch.tensor([1.0, 1.0])
    clusters.centre_KI[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    rows = torch.tensor([[9.0, 2.0], [1.1, 1.2], [0.9, 1.0], [-5.0, 0.0]])
    assert clusters(rows).tolist() == [0, 1, 2, 2]


def test_centres_and_mean_move_by_hand():
    clusters = DirectionClusters(2, 2)
    clusters.centre_KI[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    clusters(torch.tensor([[5.0, 0.0], [4.0, 3.0]]))  # both nearest to centre 0: directions (1, 0), (0.8, 0.6)
    moved = normalize(torch.tensor([0.9 * 1 + 0.1 * 0.9, 0.1 * 0.3]), dim=0)
    torch.testing.assert_close(clusters.centre_KI, torch.stack([moved, torch.tensor([0.0, 1.0])]))
    torch.testing.assert_close(clusters.mean_I, torch.tensor([0.45, 0.15]))


def test_groups_that_are_apart_are_found():
    torch.manual_seed(0)
    clusters, group_B = DirectionClusters(2, 6), torch.arange(400) % 2
    mean_2I = torch.randn(2, 6) * 3 + 20
    for _ in range(60):
        clusters(mean_2I[group_B] + torch.randn(400, 6) * 0.3)
    found_B = clusters.eval()(mean_2I[group_B] + torch.randn(400, 6) * 0.3)
    assert found_B.eq(group_B).float().mean().item() in (0.0, 1.0)


def test_rows_of_a_cluster_train_its_network_alone():
    model, x_BD, scenario_B = build()
    v_BI = torch.cat([x_BD, model.scenario_embedding_SE[scenario_B]], dim=1)
    cluster_B = model.clusters(v_BI)
    assert cluster_B.unique().tolist() == [0, 1, 2]
    kept = cluster_B != 1
    model(x_BD[kept], scenario_B[kept]).sum().backward()
    for parameter in (*model.weights_KHD, *model.biases_KH):
        assert parameter.grad[1].abs().sum() == 0
        assert parameter.grad[0].abs().sum() > 0


def test_evaluation_moves_nothing():
    model, x_BD, scenario_B = build()
    before = {n: b.clone() for n, b in model.named_buffers()}
    model(x_BD, scenario_B)
    assert all(torch.equal(before[n], b) for n, b in model.named_buffers())
    model.train()(x_BD, scenario_B)
    assert not any(torch.equal(before[n], b) for n, b in model.named_buffers())


def test_workers_agree(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    alone = _clusters()
    for rows_BI in _batches():
        alone(rows_BI)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, dict(alone.state_dict()))
    assert not torch.equal(alone.centre_KI, _clusters().centre_KI)
