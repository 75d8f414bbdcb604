"""Extraction on a CPU: 1,000 real prompts through the pipeline, its engine, and what others do with the same weights.

The embedded encoder, prompts per second, in turn (the sides are in `embedded_sides`); then a causal LM of about 100 M
random weights (`benchmarks.cpu_causal`). Start-up is left out everywhere: models are loaded before the first round,
and the pipeline's time is the one in its own summary, which begins when its first actor is ready.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks import cpu_causal
from benchmarks.bare import NUM_ROWS_PER_BATCH, BareModel, min_cosine, sentence_transformer
from benchmarks.harness import Goal, Result, interleave, paired_ratio, parser, rates, report
from benchmarks.processes import Processes
from benchmarks.real_prompts import MAX_EVENTS_PER_SCENARIO, MAX_TOKENS, data_path, prepare_users, user_prompts
from jobs.session import ray_session
from llm4msr import storage, workspace
from llm4msr.config import Config, KnowledgeConfig
from llm4msr.knowledge.engines.encoder import Encoder
from llm4msr.knowledge.engines.model_files import EMBEDDED, find_local
from llm4msr.knowledge.prompts import Prompt
from llm4msr.settings import config_from_dict

NAME = "extract_cpu"
NUM_WARM_UP = 64
# Padding included; the engine's own default on a CPU, so that the floor runs batches of the same size.
BATCH_TOKENS = 2048
DTYPES = ("float32", "bfloat16")


def knowledge_config(dtype: str) -> KnowledgeConfig:
    """Returns the embedded encoder with everything but dtype and length as a user gets it."""
    return KnowledgeConfig(model=EMBEDDED, dtype=dtype, max_tokens=MAX_TOKENS, batch_tokens=BATCH_TOKENS)


def process_sides(prompts: Sequence[Prompt], dtypes: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Returns what one process of one thread runs; see `Processes`."""
    quiet()
    sides: dict[str, Callable[[], object]] = {}
    for dtype in dtypes:
        bare = BareModel(model_path(), getattr(torch, dtype), MAX_TOKENS)
        batches = bare.ready_batches([prompt.text() for prompt in prompts], BATCH_TOKENS)
        encoder = Encoder(knowledge_config(dtype), "cpu", 1)
        sides[f"floor_processes/{dtype}"] = lambda bare=bare, batches=batches: bare.forward(batches)
        sides[f"engine_processes/{dtype}"] = lambda encoder=encoder: encoder.encode(prompts)
        for side in (f"floor_processes/{dtype}", f"engine_processes/{dtype}"):
            sides[side]()  # the first pass of a model is slow
    return sides


def quiet() -> None:
    """Keeps the library from drawing bars and from reporting the head that is left out."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def model_path() -> Path:
    """Returns the folder of the embedded encoder."""
    local = find_local(EMBEDDED)
    assert local is not None, EMBEDDED
    return local.path


def pipeline_side(config: Config, dtype: str) -> Callable[[], float]:
    """Returns a side that runs the whole extraction on an empty store and returns its seconds of encoding."""
    from llm4msr.knowledge.pipeline import extract

    tree = config.model_dump(mode="json")
    tree["knowledge"] |= {"dtype": dtype, "batch_tokens": BATCH_TOKENS, "levels": ["user"]}
    tree["model"]["meta"]["scenario_level"] = False  # needs no scenario prompts: all sides read the same
    config = config_from_dict(tree)

    def run() -> float:
        storage.remove(workspace.knowledge_root(config))
        summary = storage.read_json(storage.join(extract(config), "summary.json"))
        return float(summary["actor_seconds"]) / summary["num_actors"]

    return run


def embedded_sides(
    prompts: Sequence[Prompt], processes: Processes, config: Config, vectors: dict[str, np.ndarray]
) -> dict[str, Callable[[], float | None]]:
    """Returns the sides of the embedded encoder.

    Args:
        prompts: What all of them encode.
        processes: Of `process_sides`.
        config: Of the prepared data of the same prompts.
        vectors: Filled with what the sides in this process return, (N, K) float32 each.
    """
    texts = [prompt.text() for prompt in prompts]
    bare = {dtype: BareModel(model_path(), getattr(torch, dtype), MAX_TOKENS) for dtype in DTYPES}
    ready = bare["float32"].ready_batches(texts, BATCH_TOKENS)
    in_order = bare["float32"].ready_batches(texts, BATCH_TOKENS, by_length=False)
    other = sentence_transformer(model_path(), MAX_TOKENS)
    engines = {dtype: Encoder(knowledge_config(dtype), "cpu", len(os.sched_getaffinity(0))) for dtype in DTYPES}
    keep: dict[str, Callable[[], np.ndarray]] = {
        "one_at_a_time/float32": lambda: bare["float32"].one_at_a_time(texts),
        "one_at_a_time/bfloat16": lambda: bare["bfloat16"].one_at_a_time(texts),
        "floor/float32": lambda: bare["float32"].forward(ready),
        "floor_in_order/float32": lambda: bare["float32"].forward(in_order),
        "floor/bfloat16": lambda: bare["bfloat16"].forward(ready),
        "sentence_transformers/float32": lambda: other.encode(
            texts, batch_size=NUM_ROWS_PER_BATCH, show_progress_bar=False
        ),
        "engine/float32": lambda: engines["float32"].encode(prompts).vectors,
        "engine/bfloat16": lambda: engines["bfloat16"].encode(prompts).vectors,
    }

    def kept(name: str) -> Callable[[], None]:
        def run() -> None:
            vectors[name] = keep[name]()

        return run

    sides: dict[str, Callable[[], float | None]] = {name: kept(name) for name in keep}
    for dtype in DTYPES:
        for kind in ("floor_processes", "engine_processes"):
            sides[f"{kind}/{dtype}"] = lambda name=f"{kind}/{dtype}": processes.run(name)
        sides[f"pipeline/{dtype}"] = pipeline_side(config, dtype)
    for dtype in DTYPES:  # the first passes of a model are slow
        bare[dtype].one_at_a_time(texts[:NUM_WARM_UP])
        bare[dtype].forward(bare[dtype].ready_batches(texts[:NUM_WARM_UP], BATCH_TOKENS))
        engines[dtype].encode(prompts[:NUM_WARM_UP])
    return sides


def embedded_ratios(speed: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Returns the ratios of interest from the prompts/s of each side, one entry a round."""
    pairs = {
        "pipeline / floor, float32": ("pipeline/float32", "floor_processes/float32"),
        "pipeline / floor, bfloat16": ("pipeline/bfloat16", "floor_processes/bfloat16"),
        "pipeline / floor of one process, float32": ("pipeline/float32", "floor/float32"),
        "pipeline / sentence-transformers, float32": ("pipeline/float32", "sentence_transformers/float32"),
        "pipeline float32 / one at a time float32": ("pipeline/float32", "one_at_a_time/float32"),
        "pipeline bfloat16 / one at a time float32": ("pipeline/bfloat16", "one_at_a_time/float32"),
        "engine / floor, float32": ("engine/float32", "floor/float32"),
        "engine / floor, bfloat16": ("engine/bfloat16", "floor/bfloat16"),
        "engine / sentence-transformers, float32": ("engine/float32", "sentence_transformers/float32"),
        "engine / floor, processes of one thread, float32": ("engine_processes/float32", "floor_processes/float32"),
        "bfloat16 / float32, engine": ("engine/bfloat16", "engine/float32"),
        "bfloat16 / float32, one at a time": ("one_at_a_time/bfloat16", "one_at_a_time/float32"),
        "processes of one thread / one process, float32": ("engine_processes/float32", "engine/float32"),
        "processes of one thread / one process, bfloat16": ("engine_processes/bfloat16", "engine/bfloat16"),
        "sorted by length / in order, floor": ("floor/float32", "floor_in_order/float32"),
    }
    return {name: paired_ratio(speed[a], speed[b]) for name, (a, b) in pairs.items()}


def run(num_prompts: int, rounds: int, raw_path: Path, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        num_prompts: Users.
        rounds: Of each side.
        raw_path: The real data.
        not_judged: As of `Result`.
    """
    quiet()
    num_cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(num_cores)
    vectors: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        with ray_session():
            config = prepare_users(raw_path, Path(folder) / "workspace", num_prompts)
            prompts = user_prompts(config)
            with Processes(process_sides, prompts, DTYPES, num_cores) as processes:
                sides = embedded_sides(prompts, processes, config, vectors)
                seconds = interleave(sides, rounds, warm_up=False)
        causal = cpu_causal.measure(Path(folder), prompts, rounds, short=not_judged is not None)
    speed = {side: rates(values, len(prompts)) for side, values in seconds.items()}
    exact = vectors.pop("one_at_a_time/float32")
    medians = {f"{side} prompts/s": statistics.median(values) for side, values in speed.items()}
    ids = token_ids(prompts)
    # What is too long is cut in our way (oldest events first) or in theirs (the end): other texts, other vectors.
    whole = np.array([len(of) < MAX_TOKENS for of in ids])
    medians |= {
        f"{side} least cosine to one_at_a_time/float32": min_cosine(exact[whole], v[whole])
        for side, v in vectors.items()
    }
    cosine = min_cosine(vectors["engine/float32"], vectors["engine/bfloat16"])
    medians["engine/bfloat16 least cosine to engine/float32"] = cosine
    ratios = embedded_ratios(speed)
    lengths = np.array([len(of) for of in ids])
    return Result(
        config={
            "benchmark": NAME,
            "num_prompts": len(prompts),
            "rounds": rounds,
            "max_events_per_scenario": MAX_EVENTS_PER_SCENARIO,
            "max_tokens": MAX_TOKENS,
            "batch_tokens": BATCH_TOKENS,
            "mean_tokens": round(float(lengths.mean()), 1),
            "tokens_at_10_50_90_percent": np.percentile(lengths, [10, 50, 90]).tolist(),
            "num_processes": num_cores,
            "causal": causal.config,
        },
        seconds=seconds | causal.seconds,
        medians=medians | causal.medians,
        ratios=ratios | causal.ratios,
        goals=goals_of(ratios | causal.ratios, cosine),
        not_judged=not_judged,
    )


def goals_of(ratios: Mapping[str, float], cosine: float | None) -> tuple[Goal, ...]:
    """Returns the goals with what was measured.

    Args:
        ratios: By name; without the one of a goal, it was not measured.
        cosine: The smallest between vectors in bfloat16 and in float32.
    """
    # bfloat16 wins only where it is exact enough.
    fastest = "pipeline bfloat16" if cosine is None or cosine >= 0.999 else "pipeline float32"
    targets = {
        "pipeline / floor, float32": 0.9,
        "pipeline / floor, bfloat16": 0.9,
        "pipeline / sentence-transformers, float32": 1.0,
        f"{fastest} / one at a time float32": 1.5,
        cpu_causal.GOAL: 20.0,
    }
    goals = [Goal(name, ratios.get(name), ">=", target) for name, target in targets.items()]
    return (*goals, Goal("bfloat16: least cosine to float32", cosine, ">=", 0.999))


def token_ids(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Returns the token ids of the embedded encoder's tokenizer, cut to `MAX_TOKENS`."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model_path())
    return tokenizer([prompt.text() for prompt in prompts], truncation=True, max_length=MAX_TOKENS)["input_ids"]


def write_lengths(raw_path: Path, target: Path, num_prompts: int) -> None:
    """Writes how many of the prompts have how many tokens, for benchmarks that run where the data is not."""
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder, ray_session():
        prompts = user_prompts(prepare_users(raw_path, Path(folder) / "workspace", num_prompts))
    lengths, counts = np.unique([len(ids) for ids in token_ids(prompts)], return_counts=True)
    content = {
        "source": f"{len(prompts)} users of amazon-food-kitchen; tokens of the embedded encoder, at most {MAX_TOKENS}",
        "mean_tokens": round(float((lengths * counts).sum() / counts.sum()), 1),
        "num_prompts_by_tokens": dict(zip(map(str, lengths.tolist()), counts.tolist(), strict=True)),
    }
    target.write_text(json.dumps(content) + "\n", encoding="utf-8")


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--lengths", type=Path, metavar="FILE", help="only write the lengths of the prompts here")
    options.add_argument("--num_prompts", type=int, help="users; default 1000, short 60")
    options.add_argument("--rounds", type=int, help="of each side; default 3, short 1")
    chosen = options.parse_args()
    raw_path = data_path()
    if raw_path is None:
        reason = "no real data: LLM4MSR_SHARED names no folder with data/amazon-food-kitchen"
        report(Result({"benchmark": NAME}, {}, {}, {}, goals_of({}, None), reason), chosen.json)
        return 0
    num_prompts = chosen.num_prompts or (60 if chosen.short else 1000)
    rounds = chosen.rounds or (1 if chosen.short else 3)
    if chosen.lengths:
        write_lengths(raw_path, chosen.lengths, num_prompts)
        return 0
    report(run(num_prompts, rounds, raw_path, "short form" if chosen.short else None), chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
