"""The arithmetic of a capacity plan: small sums by hand, units, what must grow with what, defaults and shapes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from module_constants import constant

from llm4msr.config import KnowledgeConfig, TrainConfig
from llm4msr.config.plan import PlanArgs
from llm4msr.planning import capacity, offline, online
from llm4msr.planning.capacity import given as given_quantities
from llm4msr.planning.capacity import make_plan
from llm4msr.planning.hardware import GPUS, MODELS, model_of
from llm4msr.planning.ledger import Dimension, Quantity, Rule, dimension, evaluate, number, same_dimension
from llm4msr.planning.unit_costs import read_unit_costs

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
COSTS = read_unit_costs(BENCHMARKS)
SMALL = {"users": 1000, "interactions": 1e6, "items": 500}
LARGE = {"users": 1e8, "interactions": 5e10, "items": 1e7, "model": "qwen-7b", "train_device": "gpu"}


def plan(**asked):
    return make_plan(PlanArgs(**{**SMALL, **asked}), COSTS)


# Round numbers instead of measured ones, so that sums can be done in the head.
ROUND = {
    "raw_bytes_per_row": 100,
    "prepare_rows_per_s_per_core": 1000,
    "staged_bytes_per_row": 50,
    "prepared_bytes_per_row": 20,
    "mean_tokens_per_prompt": 200,
    "tokens_per_item_prompt": 20,
    "embedded_prompts_per_s": 50,
    "embedded_tokens_per_prompt": 200,
    "embedded_cores": 2,
    "pipeline_rate": 8,
    "engines_rate": 10,
    "matmul_share_of_peak": 0.5,
    "prefill_share_of_matmul": 0.5,
    "pool_share": 0.5,
    "units_per_s_of_driver": 100,
    "prompt_bytes": 500,
    "store_gib_of_keys": 1,
    "store_keys": 2**20,
    "store_width": 500,
    "driver_bytes_per_user": 2000,
    "resume_ms_per_part": 36,
    "train_rows_per_s_on_cpu": 10_000,
    "train_cores": 2,
    "feed_rows_per_s": 100_000,
    "train_rows_per_s_on_gpu": 400_000,
    "train_scaling": 0.5,
    "measured_batch": 1000,
    "distinct_items_in_batch": 600,
    "distinct_users_in_batch": 400,
    "serve_requests_per_s": 250,
    "serve_candidates": 100,
    "rank_1000_ms": 10,
    "rank_100_ms": 1,
    "entity_bytes": 36,
}


def by_hand(**asked) -> dict[str, float]:
    units = {cost.name: cost.unit for cost in COSTS}
    assert set(units) == set(ROUND)
    costs = [Quantity(name, value, units[name], "measured", "") for name, value in ROUND.items()]
    return make_plan(PlanArgs(**asked), costs).values


def test_a_plan_on_processors_by_hand():
    found = by_hand(
        **{"users": 360_000, "interactions": 72e6, "items": 40_000, "items_asked": 0.5, "deadline_hours": 10},
        **{"epochs": 2, "runs": 3, "train_share": 0.5, "requests_per_s": 1000, "candidates": 200, "utilisation": 0.5},
        **{"core_usd_per_h": 0.1, "users_changed_per_day": 0.1, "refresh_hours": 1, "rows_per_commit": 1000},
        **{"score_candidates": 100, "top_k": 10, "node_cores": 4, "node_memory_gb": 16},
    )
    expected = {
        "prepare_core_h": 72e6 / 1000 / 3600,  # 20
        "prepare_cores": 2,
        "prepare_h": 10,
        "prepare_usd": 2,
        "prompts": 380_002,
        "prompt_tokens": 360_002 * 200 + 20_000 * 20,
        "tokens_per_s_per_core": 5000,
        "extract_core_h": 4.02224444,
        "extract_cores": 1,  # 4.02 / 10 / 0.5 = 0.80
        "extract_h": 8.04448889,
        "refresh_cores": 1,
        "refresh_h": 0.804448889,
        "parts": 381,
        "resume_h": 381 * 36 / 3.6e6,
        "driver_gb": 0.72,
        "vectors": 380_002,
        "table_gb": 380_002 * 768 / 1e9,
        "embedding_gb": 400_000 * 64 / 1e9,
        "optimized_gb": 3 * 400_000 * 64 / 1e9,
        "row_passes": 216e6,
        "train_worker_h": 6,
        "train_workers": 2,  # 6 / 10 / 0.5 = 1.2
        "train_h": 6,
        "train_usd": 2.4,  # two workers of two cores
        "group_rows_per_s": 10_000,
        "exchange_gb_per_s": 10_000 * 1 * 72 / 1e9,
        "candidate_ms": 0.01,
        "score_core_h": 360_000 * 2 * 100 * 0.01 / 3.6e6,  # 0.2
        "score_cores": 1,
        "request_ms": 5,
        "replicas": 11,  # 1000 / (200 x 0.5) + 1
        "replicas_on_node": 4,
        "serve_nodes": 3,
        "serve_usd": 3 * 4 * 0.1 * 730,
        "raw_gb": 7.2,
        "key_bytes": 24,
        "store_gb": 380_002 * (768 + 24) / 1e9,
        "scores_gb": 360_000 * 2 * 10 * 16 / 1e9,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    kept = ["raw_gb", "prepared_gb", "prompts_gb", "store_gb", "table_gb", "scores_gb"]
    assert found["kept_gb"] == pytest.approx(sum(found[name] for name in kept) + 3 * found["checkpoint_gb"])


def test_a_plan_on_gpus_by_hand():
    found = by_hand(
        **{"users": 1e6, "interactions": 7.2e9, "items": 1e5, "model_params": 1e9, "knowledge_width": 1000},
        **{"gpu": "a100", "gpu_usd_per_h": 2, "deadline_hours": 2, "train_device": "gpu", "epochs": 1},
        **{"train_share": 1, "embedding_optimizer": "rowwise_adagrad", "table": "remote", "num_workers": 20},
    )
    flops = 312e12 * 0.5 * 0.5 * 0.8
    expected = {
        "gpu_flops": flops,
        "prompt_flop": 2e9 * 1_000_002 * 200,
        "extract_gpu_h": 2e9 * 1_000_002 * 200 / flops / 3600,  # 1.78
        "extract_gpus": 2,
        "extract_h": 2e9 * 1_000_002 * 200 / flops / 3600 / 2 / 0.5,
        "worker_rows_per_s": 100_000,  # the feed, not the GPU
        "train_worker_h": 20,
        "workers_wanted": 20,
        "train_h": 2,
        "train_usd": 80,
        "optimized_gb": 1.1e6 * 64 / 1e9 * 17 / 16,
        "table_gb": 1_000_002 * 2000 / 1e9,
        "replica_gb": 1.1e6 * 100 / 1e9 + 1_000_002 * 2000 / 1e9,
        "node_table_gb": 0,
        "workers_together": 8,
        "train_table_gb": 8 * 1_000_002 * 2000 / 1e9,
        "weights_gb": 2.2,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_given_machines_are_taken_and_the_hours_follow():
    free = plan(**LARGE)
    bound = plan(**LARGE, num_gpus=100, num_workers=4)
    assert bound.values["extract_gpus"] == 100 and bound.values["train_workers"] == 4
    assert bound.values["extract_h"] == pytest.approx(free.values["extract_h"] * free.values["extract_gpus"] / 100)
    assert bound.values["gpus_wanted"] == free.values["extract_gpus"]


EVERYTHING = [
    *(offline.PREPARE + offline.PROMPTS + offline.EXTRACT_ON_GPUS + offline.EXTRACT_ON_CORES + offline.RESUME),
    *(offline.TABLES + offline.TRAIN_ON_CORES + offline.TRAIN_ON_GPUS + offline.TRAIN + offline.SCORE + offline.STORE),
    *(online.RANK + online.SERVE + online.NODE_MEMORY + online.MEMORY_OF_CORES + online.MEMORY_OF_GPUS),
]


def known_dimensions() -> dict[str, Dimension]:
    args = PlanArgs(**SMALL, num_gpus=1, num_workers=1, tokens_per_prompt=1)
    known = {one.name: dimension(one.unit) for one in [*COSTS, *given_quantities(args, model_of(args))]}
    return known | {
        "tokens_per_prompt": Dimension(),
        "extract_gpus": dimension("gpu"),
        "train_workers": dimension("worker"),
    }


def check_units(rules) -> None:
    known = known_dimensions()
    same = {"ceil": lambda x: x, "floor": lambda x: x, "max": same_dimension, "min": same_dimension}
    for rule in [*EVERYTHING, *rules]:
        known.setdefault(rule.name, dimension(rule.unit))
    for rule in rules:
        found = evaluate(rule.expression, known, same)
        assert found == dimension(rule.unit), f"{rule.name}: {rule.expression} is {found}, not {rule.unit}"


def test_every_rule_gives_its_unit():
    check_units(EVERYTHING)
    for limit in (*online.LIMITS, online.GPU_LIMIT):
        values = known_dimensions() | {rule.name: dimension(rule.unit) for rule in EVERYTHING}
        assert values[limit.needed] == values[limit.there], limit.what


@pytest.mark.parametrize(
    ("unit", "expression"),
    [
        ("h", "interactions / prepare_rows_per_s_per_core"),
        ("GB", "users * width * bytes_of_half"),
        ("USD", "train_workers * core_usd_per_h * one_hour"),
        ("core", "replicas + 1"),
        ("GB", "min(table_gb, one_hour)"),
    ],
)
def test_wrong_units_are_found(unit, expression):
    with pytest.raises((AssertionError, ValueError)):
        check_units([Rule("wrong", unit, expression, "")])


def test_units_are_read():
    assert dimension("FLOP / s / gpu") == Dimension((("FLOP", 1), ("gpu", -1), ("s", -1)))
    assert dimension("ms core / candidate") == dimension("core ms")
    assert dimension("rows") == dimension("1") == Dimension()


@pytest.mark.parametrize("asked", [SMALL, LARGE, {**SMALL, "model": "qwen-1.5b", "table": "remote"}], ids=str)
def test_what_is_printed_is_what_was_computed(asked):
    found = plan(**asked)
    names = [line.rule.name for _, lines in found.sections for line in lines]
    assert len(names) == len(set(names)) > 50
    for _, lines in found.sections:
        for line in lines:
            shown = evaluate(line.formula.replace(" x ", " * "), {})
            # Numbers are printed with five digits: a difference of large ones keeps fewer, a step may fall over.
            assert shown == pytest.approx(line.value, rel=5e-3, abs=1), line
            assert line.text.split(" ")[0] == number(line.value)
    known = {cost.name for cost in found.costs} | set(names)
    assert {name for _, lines in found.sections for line in lines for name in line.rule.names} <= known
    for cost in found.costs:
        assert cost.source or cost.kind == "definition", cost
        assert cost.kind != "measured" or cost.source.startswith("benchmarks/")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *(
            (0, "0"),
            (1, "1"),
            (20_000, "20000"),
            (5e10, "5e10"),
            (6.5253e9, "6.5253e9"),
            (0.5, "0.5"),
            (208.4, "208.4"),
        ),
        *((123456.789, "123457"), (1 / 3, "0.33333"), (2.5e-7, "2.5e-7"), (12.5, "12.5"), (0.022, "0.022")),
    ],
)
def test_numbers_are_short_and_can_be_read_again(value, text):
    assert number(value) == text
    assert float(number(value)) == pytest.approx(value, rel=1e-4)


sizes = st.fixed_dictionaries(
    {
        "users": st.floats(10, 1e9),
        "interactions": st.floats(1e3, 1e12),
        "items": st.floats(10, 1e8),
        "model": st.sampled_from(["minilm", "qwen-1.5b", "qwen-7b"]),
        "train_device": st.sampled_from(["cpu", "gpu"]),
        "table": st.sampled_from(["local", "remote"]),
        "requests_per_s": st.floats(0.1, 1e6),
        "deadline_hours": st.floats(0.5, 1000),
        "items_asked": st.sampled_from([0, 0.5, 1]),
        "users_asked": st.sampled_from([0, 0.5, 1]),
    }
)
NEVER_LESS = ("usd", "gb", "replicas", "parts", "prompts", "row_passes", "cores", "gpus", "workers")
# Per node or share of one, not of the whole.
NOT_TOTALS = {"worker_memory_gb", "replicas_on_node", "workers_on_node", "node_memory_gb", "key_bytes"}


@settings(max_examples=30, deadline=None)
@given(sizes, st.sampled_from(["users", "interactions", "items", "requests_per_s"]), st.floats(1.01, 50))
def test_more_of_anything_never_takes_less(asked, grown, factor):
    small, large = plan(**asked), plan(**{**asked, grown: asked[grown] * factor})
    for name, value in small.values.items():
        total = name.endswith(NEVER_LESS) and name not in NOT_TOTALS and not name.endswith("_usd_per_h")
        assert not total or large.values[name] >= value * (1 - 1e-9), name
    assert all(load.share > 0 for load in small.loads)
    assert [load.share for load in small.loads] == sorted((load.share for load in small.loads), reverse=True)


@settings(max_examples=30, deadline=None)
@given(sizes)
@example({"users": 1e8, "interactions": 5e10, "items": 1e7, "model": "qwen-7b", "deadline_hours": 24})
def test_machines_keep_the_deadline_and_one_less_would_not(asked):
    found = plan(**asked).values
    deadline = found["deadline_hours"] * (1 + 1e-9)
    on_gpu = asked["model"] != "minilm"
    kinds = [("prepare", "cores", "core", 1), ("train", "workers", "worker", found["train_scaling"])]
    kinds.append(("extract", "gpus" if on_gpu else "cores", "gpu" if on_gpu else "core", found["pool_share"]))
    for stage, machines, unit, share in kinds:
        count, work_h = found[f"{stage}_{machines}"], found[f"{stage}_{unit}_h"]
        assert found[f"{stage}_h"] <= deadline, stage
        assert count == 1 or work_h / (count - 1) / share > found["deadline_hours"], stage


def test_a_slower_gpu_costs_more_and_a_larger_model_too():
    hours = {gpu: plan(**LARGE, gpu=gpu).values["extract_gpu_h"] for gpu in GPUS}
    assert hours["l4"] > hours["a100"] > hours["h100"] == hours["h200"]
    assert hours["a100"] / hours["h100"] == pytest.approx(989 / 312)
    seven, small = (plan(**{**LARGE, "model": m}).values["extract_gpu_h"] for m in ("qwen-7b", "qwen-1.5b"))
    assert seven / small == pytest.approx(6.525 / 1.310, rel=1e-3)


def test_models_and_cards_are_those_of_the_project():
    peaks = dict(constant("llm4msr/knowledge/engines/devices.py", "_PEAKS"))
    assert {name: kind.peak_flops for name, kind in GPUS.items()} == {name: peaks[name.upper()] for name in GPUS}
    for name, shape in constant("benchmarks/extract_gpu.py", "SHAPES").items():
        ours, hidden = MODELS[f"qwen-{name.lower()}"], shape["hidden_size"]
        kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * shape["intermediate_size"]
        words = shape["vocab_size"] * hidden * (1 if shape["tie_word_embeddings"] else 2)
        assert ours.matmul_params == layer * shape["num_hidden_layers"] and ours.width == hidden
        assert ours.all_params == pytest.approx(ours.matmul_params + words, rel=0.01)
    assert MODELS["minilm"].matmul_params == pytest.approx(10.6e6, rel=0.01)  # as docs/extraction.md says


def test_defaults_are_those_of_the_configuration():
    defaults = {name: field.default for name, field in PlanArgs.model_fields.items()}
    assert defaults["rows_per_commit"] == KnowledgeConfig().rows_per_commit
    assert defaults["embedding_optimizer"] == TrainConfig().embedding_optimizer
    assert capacity.DEFINITIONS["num_to_keep"][0] == TrainConfig().num_to_keep
