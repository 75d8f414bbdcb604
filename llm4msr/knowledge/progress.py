"""Says how far an extraction is: log lines and TensorBoard while it runs, figures for the summary at its end.

Knows no Ray: it asks a function for the sums so far.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm4msr import storage
from llm4msr.knowledge.engines.interface import BatchDone, Hardware

PROGRESS_SECONDS = 5.0
LOADING = "loading the language model"

logger = logging.getLogger("llm4msr.knowledge")


@dataclass(frozen=True)
class Reading:
    """The sums over all actors at one moment.

    Attributes:
        done: What was achieved; work that an actor lost and another repeated counts twice.
        seconds: Since the first actor was ready, 0 before that.
        hardware: Of the first actor; None before it was ready.
        num_actors: Actors that were ready at some time, replaced ones included.
        actor_seconds: Sum over the actors of the seconds since each was ready.
    """

    done: BatchDone
    seconds: float
    hardware: Hardware | None
    num_actors: int
    actor_seconds: float


def progress_line(reading: Reading, total: int, until_ready: str = LOADING) -> str:
    """Returns how far the encoding is, how fast, how much went wrong, and when it should end.

    Args:
        reading: The sums so far.
        total: Prompts to encode.
        until_ready: What is said before the first actor is ready.
    """
    done = min(reading.done.num_prompts, total)
    if not done:
        return until_ready if reading.hardware is None else f"encoded 0/{total} prompts"
    seconds = max(reading.seconds, 1e-9)
    left = round((total - done) * seconds / done)
    failed = f", {reading.done.num_failed} failed" if reading.done.num_failed else ""
    return (
        f"encoded {done}/{total} prompts{failed}, {done / seconds:.1f} prompts/s, "
        f"{_tokens(reading.done) / seconds:.0f} tokens/s, {left // 60} min {left % 60} s left"
    )


def speed(reading: Reading) -> dict[str, Any]:
    """Returns the figures of a finished encoding.

    Returns:
        num_actors; device; encode_seconds: from the first actor's readiness, model loading excluded; actor_seconds:
        summed over the actors, each from its own readiness; prompts_per_second; tokens_per_second: tokens read and
        written; padding_share: of the tokens that went through the model, negative where a shared prefix saved more
        than padding cost; busy_share: of the actors' seconds; model_flop_utilisation: two operations per weight and
        token, padding not counted, over the device's peak while it was busy, None where that peak is unknown.
    """
    done, seconds, hardware = reading.done, max(reading.seconds, 1e-9), reading.hardware
    useful = min(done.num_tokens, done.num_computed_tokens) + done.num_generated_tokens
    utilisation = None
    if hardware is not None and hardware.num_parameters and hardware.peak_flops and done.busy_s:
        utilisation = 2 * hardware.num_parameters * useful / done.busy_s / hardware.peak_flops
    return {
        "num_actors": reading.num_actors,
        "device": hardware.device if hardware else None,
        "encode_seconds": round(seconds, 3),
        "actor_seconds": round(reading.actor_seconds, 3),
        "prompts_per_second": round(done.num_prompts / seconds, 2),
        "tokens_per_second": round(_tokens(done) / seconds, 1),
        "num_tokens_read": done.num_tokens,
        "num_tokens_written": done.num_generated_tokens,
        "padding_share": round(1 - done.num_tokens / done.num_computed_tokens, 4) if done.num_computed_tokens else None,
        "busy_share": round(done.busy_s / reading.actor_seconds, 4) if reading.actor_seconds else None,
        "model_flop_utilisation": round(utilisation, 4) if utilisation is not None else None,
    }


def write_scalars(target_uri: str, summary: dict[str, Any]) -> None:
    """Writes the numbers of a summary to TensorBoard."""
    from torch.utils.tensorboard import SummaryWriter

    with _published(target_uri) as folder, SummaryWriter(folder) as writer:
        for name, value in summary.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(f"summary/{name}", value, 0)


@contextmanager
def _published(target_uri: str) -> Iterator[str]:
    """Gives a local folder whose files are those of the target, at the end of the block at the latest."""
    if storage.is_local(target_uri):
        yield str(storage.local_path(target_uri))
        return
    with tempfile.TemporaryDirectory(prefix="llm4msr-") as folder:
        yield folder
        for path in sorted(Path(folder).iterdir()):
            storage.copy(str(path), storage.join(target_uri, path.name))


class Monitor:
    """Logs the progress of an encoding and writes it to TensorBoard until the block ends.

    Args:
        read: Returns the sums so far.
        total: Prompts to encode.
        target_uri: Directory for TensorBoard's files, local or remote.
        until_ready: As of `progress_line`.
    """

    def __init__(self, read: Callable[[], Reading], total: int, target_uri: str, until_ready: str = LOADING) -> None:
        self._read, self._total, self._target, self._until_ready = read, total, target_uri, until_ready
        self._ended = threading.Event()
        self._stack = ExitStack()

    def __enter__(self) -> Monitor:
        """Starts watching."""
        folder = self._stack.enter_context(_published(self._target))
        self._thread = threading.Thread(target=self._watch, args=(folder,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops watching and publishes TensorBoard's files."""
        self._ended.set()
        self._thread.join()
        self._stack.close()

    def _watch(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, because it takes seconds

        with SummaryWriter(folder) as self._writer:
            while not self._ended.wait(PROGRESS_SECONDS):
                reading = self._read()
                logger.info(progress_line(reading, self._total, self._until_ready))
                self._record(reading)
            self._record(self._read())

    def _record(self, reading: Reading) -> None:
        if not reading.done.num_prompts:
            return
        figures = speed(reading)
        step = reading.done.num_prompts
        for name in ("prompts_per_second", "tokens_per_second", "padding_share", "model_flop_utilisation"):
            if figures[name] is not None:
                self._writer.add_scalar(f"extract/{name}", figures[name], step)
        self._writer.add_scalar("extract/num_failed", reading.done.num_failed, step)
        self._writer.add_scalar("extract/share_done", step / self._total, step)


def _tokens(done: BatchDone) -> int:
    return done.num_tokens + done.num_generated_tokens
