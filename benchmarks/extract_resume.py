"""What a rerun costs where nothing is left to do: a finished store of 1 M keys, recognised as such.

A store is written with the project's own commits (parts of 512 rows, as extraction makes them). Then a fresh process
is given all keys in another order and finds out, as extraction does, which of them the store lacks: time of that step,
and the peak resident memory of the whole process. The file system's cache is warm: the parts were just written.

The same against an S3 API server on this machine (moto), with fewer parts: it shows the cost per part there, not that
of a real object store.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from benchmarks.harness import Goal, Result, interleave, parser, report
from llm4msr import storage
from llm4msr.knowledge.engines.interface import EncodedBatch
from llm4msr.knowledge.plan import PromptSet, missing_prompts
from llm4msr.knowledge.store import KEY_BYTES, KEY_DTYPE, KnowledgeStore

NAME = "extract_resume"
IDENTITY = {"model": "benchmark"}
ROWS_PER_COMMIT = 512


def random_keys(num_keys: int) -> np.ndarray:
    """Returns (N,) distinct keys, the same in every call."""
    keys = np.frombuffer(np.random.default_rng(0).bytes(num_keys * KEY_BYTES), KEY_DTYPE)
    assert len(np.unique(keys)) == num_keys
    return keys


def write_store(uri: str, num_keys: int, width: int) -> None:
    """Commits `num_keys` keys with random vectors of `width` numbers."""
    store, rng = KnowledgeStore(uri, IDENTITY), np.random.default_rng(1)
    keys = random_keys(num_keys)
    for start in range(0, num_keys, ROWS_PER_COMMIT):
        part = keys[start : start + ROWS_PER_COMMIT]
        count = len(part)
        zeros = np.zeros(count, np.int32)
        vectors = rng.standard_normal((count, width), np.float32)
        store.commit(part, EncodedBatch(vectors, zeros + 210, zeros, zeros, (None,) * count, (None,) * count, zeros))


def find_missing(uri: str, num_keys: int) -> dict[str, float]:
    """Finds out, in this process, that the store has all keys; returns seconds and the process's peak memory."""
    keys = np.random.default_rng(2).permutation(random_keys(num_keys))
    prompts = PromptSet(("users",), ("user",), np.array([num_keys]), keys, np.arange(num_keys, dtype=np.int32))
    started = time.perf_counter()
    num_missing = len(missing_prompts(prompts, KnowledgeStore(uri, IDENTITY).index()))
    seconds = time.perf_counter() - started
    if num_missing:
        raise RuntimeError(f"{num_missing} of {num_keys} keys of a finished store were found missing")
    return {"seconds": seconds, "peak_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Returns the peak resident memory of this process; getrusage would count the parent's that started it, too."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def in_fresh_process(uri: str, num_keys: int) -> dict[str, float]:
    """Runs `find_missing` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.extract_resume", "--find", uri, "--num_keys", str(num_keys)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@contextmanager
def s3_bucket() -> Iterator[str]:
    """Yields the URI of an empty bucket of an S3 API server; the AWS settings of this process name it meanwhile."""
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    try:
        boto3.client("s3").create_bucket(Bucket="benchmark")
        yield "s3://benchmark"
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def run(num_keys: int, num_s3_keys: int, width: int, rounds: int, not_judged: str | None) -> Result:
    """Measures everything.

    Args:
        num_keys: Of the local store.
        num_s3_keys: Of the store on S3.
        width: Numbers per vector.
        rounds: Of each side.
        not_judged: As of `Result`.
    """
    peaks: dict[str, list[float]] = {"local": [], "s3": []}

    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder, s3_bucket() as bucket:
        places = {"local": (storage.join(folder, "store"), num_keys), "s3": (bucket, num_s3_keys)}
        for uri, count in places.values():
            write_store(uri, count, width)

        def find(side: str) -> float:
            found = in_fresh_process(*places[side])
            peaks[side].append(found["peak_bytes"] / 2**30)
            return found["seconds"]

        seconds = interleave({side: lambda side=side: find(side) for side in places}, rounds, warm_up=False)
        local_files = storage.list_files(places["local"][0], ".parquet")
    medians = {f"{side} s": statistics.median(values) for side, values in seconds.items()}
    medians |= {f"{side} peak GiB": max(values) for side, values in peaks.items()}
    medians |= {
        "local us per key": 1e6 * medians["local s"] / num_keys,
        "s3 ms per part": 1e3 * medians["s3 s"] / max(1, -(-num_s3_keys // ROWS_PER_COMMIT)),
        "local store GiB": sum(size for _, size in local_files) / 2**30,
    }
    config = {
        "benchmark": NAME,
        "num_keys": num_keys,
        "num_s3_keys": num_s3_keys,
        "num_parts": len(local_files),
        "rows_per_commit": ROWS_PER_COMMIT,
        "width": width,
        "rounds": rounds,
    }
    goals = (
        Goal(f"{num_keys:,} keys of a finished store recognised, s", medians["local s"], "<", 20),
        Goal("peak memory of the process that does, GiB", medians["local peak GiB"], "<", 1),
    )
    return Result(config, seconds, medians, {}, goals, not_judged)


def main() -> int:
    """Runs the benchmark from the command line."""
    options = parser(NAME, __doc__.splitlines()[0])
    options.add_argument("--num_keys", type=int, help="default 1,000,000, short 20,000")
    options.add_argument("--width", type=int, default=384, help="numbers per vector")
    options.add_argument("--rounds", type=int, default=3, help="of each side")
    options.add_argument("--find", metavar="URI", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    num_keys = chosen.num_keys or (20_000 if chosen.short else 1_000_000)
    if chosen.find:
        print(json.dumps(find_missing(chosen.find, num_keys)))
        return 0
    result = run(num_keys, num_keys // 10, chosen.width, chosen.rounds, "short form" if chosen.short else None)
    report(result, chosen.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
