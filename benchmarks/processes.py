"""The work of one side spread over processes of one thread each, as production spreads it over actors.

The processes live as long as the comparison and wait without using the processor while other sides run. Loading is
done before the first round, so that a round is encoding alone.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

# Given its share of the prompts, returns what it can run, by name. A module's function, so that it can be sent.
Build = Callable[[Sequence[Any], Any], Mapping[str, Callable[[], object]]]


class Processes:
    """Worker processes, each with its share of the prompts; a context manager.

    Args:
        build: Loads the models of one process; called there with its share and `options`.
        items: The prompts; neighbours go to different processes.
        options: Handed to `build`.
        num_processes: How many.
    """

    def __init__(self, build: Build, items: Sequence[Any], options: Any, num_processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers = []
        for number in range(num_processes):
            ours, theirs = context.Pipe()
            arguments = (theirs, build, items[number::num_processes], options)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            self._workers.append((process, ours))

    def __enter__(self) -> Processes:
        """Starts them and waits until all are ready."""
        for process, _ in self._workers:
            process.start()
        for process, connection in self._workers:
            _receive(process, connection)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Ends them."""
        for process, connection in self._workers:
            connection.close()
            process.join(10)
            if process.is_alive():
                process.terminate()

    def run(self, name: str) -> float:
        """Runs one side in all processes at once and returns the seconds until the last is done."""
        started = time.perf_counter()
        for _, connection in self._workers:
            connection.send(name)
        for process, connection in self._workers:
            _receive(process, connection)
        return time.perf_counter() - started


def _receive(process: Any, connection: Connection) -> None:
    try:
        message = connection.recv()
    except EOFError as error:
        process.join(10)
        raise RuntimeError(f"a worker process ended with exit code {process.exitcode}: see its output") from error
    assert message == "done", message


def _serve(connection: Connection, build: Build, items: Sequence[Any], options: Any) -> None:
    import torch

    torch.set_num_threads(1)
    sides = build(items, options)
    connection.send("done")
    while True:
        try:
            name = connection.recv()
        except EOFError:
            return
        sides[name]()
        connection.send("done")
