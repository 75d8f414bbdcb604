"""What two processes compute together equals what one computes alone: sparse gradients, statistics, gradients."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import SEQUENCES, tiny_config, tiny_knowledge, tiny_prepared
from torch.nn.parallel import DistributedDataParallel

from llm4msr.batch import Collator, EntityFeatures
from llm4msr.data.history import read_logs
from llm4msr.data.prepared import PreparedData
from llm4msr.models.llm4msr import build_model
from llm4msr.training.reader import list_row_groups, read_row_group
from llm4msr.training.sparse import average_sparse_gradients, embedding_parameters

ROWS = 80


def gradients(uri: str, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """One step's gradients and running statistics on this worker's slice of the same 80 rows."""
    prepared = PreparedData.open(uri)
    entities = [
        EntityFeatures.from_table(t, prepared.schema, s)
        for t, s in ((prepared.users(), "user"), (prepared.items(), "item"))
    ]
    logs = read_logs(prepared.uri, prepared.schema)
    collator = Collator(prepared.schema, *entities, tiny_knowledge(), logs)
    rows = read_row_group(list_row_groups(prepared.files("train"))[0])
    size = ROWS // world_size
    batch = collator({k: v[rank * size : (rank + 1) * size] for k, v in rows.items()})
    torch.manual_seed(0)
    config = tiny_config(model={"dropout": 0.0, "meta": {"knowledge_dropout": 0.0}})
    model = build_model(prepared.schema, config.model, 8).double()
    batch = batch._map(lambda t: t.double() if t.is_floating_point() else t)
    embeddings = embedding_parameters(model)
    step_model = model
    if world_size > 1:
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(embeddings))
        step_model = DistributedDataParallel(model, forward_sync_buffers=False)
    logit_B, _ = step_model(batch)
    torch.nn.functional.binary_cross_entropy_with_logits(logit_B, batch.label_B.double()).backward()
    average_sparse_gradients(embeddings.values())
    out = {name: p.grad.to_dense() if p.grad.is_sparse else p.grad for name, p in model.named_parameters()}
    return out | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def work(rank: int, uri: str, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.save(gradients(uri, rank, 2), f"{out}{rank}")
    dist.destroy_process_group()


def test_two_halves_equal_one_whole(tmp_path):
    uri = str(tmp_path / "prepared")
    tiny_prepared(uri, more=SEQUENCES)
    whole = gradients(uri, 0, 1)
    mp.spawn(work, (uri, str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    halves = [torch.load(tmp_path / f"out{rank}", weights_only=True) for rank in range(2)]
    assert whole.keys() == halves[0].keys()
    for name, expected in whole.items():
        torch.testing.assert_close(halves[0][name], expected, msg=lambda m, n=name: f"{n}: {m}", atol=1e-10, rtol=1e-8)
        torch.testing.assert_close(halves[0][name], halves[1][name], atol=0, rtol=0)
    assert whole["embedding.tables.0.weight"].abs().sum() > 0
