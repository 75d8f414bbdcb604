"""The driver's wish to stop, as processes elsewhere learn of it: a flag in an actor, which threads set and ask.

Threads, because a signal handler must not call Ray, and because a task that waits for Ray in its main thread gives its
processor away meanwhile.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

STOP_POLL_S = 0.5


@ray.remote(num_cpus=0)
class StopFlag:
    """Tells others that the driver was asked to stop."""

    def __init__(self) -> None:
        self.value = False

    def set(self) -> None:
        """Says so from now on."""
        self.value = True

    def get(self) -> bool:
        """Returns whether the driver was asked to stop."""
        return self.value


def start_flag() -> Any:
    """Starts a flag on the node of the driver, whose end ends the job anyway; returns the actor's handle."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = StopFlag  # ray.remote's types leave the class as it was
    return actor.options(scheduling_strategy=here).remote()


@contextlib.contextmanager
def forwarded(stop: threading.Event, flag: Any) -> Iterator[None]:
    """Sets the flag once the event is set, for as long as this lasts."""
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if stop.wait(STOP_POLL_S):
                ray.get(flag.set.remote())
                return

    thread = threading.Thread(target=watch, name="stop-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def asking(flag: Any) -> Iterator[Callable[[], bool]]:
    """Yields a question about the flag that costs nothing: a thread asks, the first time before this goes on."""
    stop, asked, done = threading.Event(), threading.Event(), threading.Event()

    def ask() -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the driver is gone, and this process soon will be
            while not stop.is_set():
                if ray.get(flag.get.remote()):
                    stop.set()
                asked.set()
                if done.wait(STOP_POLL_S):
                    break
        asked.set()

    thread = threading.Thread(target=ask, name="stop-ask", daemon=True)
    thread.start()
    asked.wait()
    try:
        yield stop.is_set
    finally:
        done.set()
        thread.join()
