"""SIGTERM as an event: a process that is asked to end finishes its step and writes a checkpoint first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("llm4msr.training")


@contextmanager
def sigterm_event() -> Iterator[threading.Event]:
    """Yields an event that SIGTERM sets; what SIGTERM did before comes back at the end.

    A second SIGTERM does what the first would have done without this: nothing waits for ever for a step that does not
    come. Outside the main thread Python cannot take signals: the event is then never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_sigterm(*_: object) -> None:
        logger.warning("SIGTERM: stopping; what was done is kept")
        stop.set()
        signal.signal(signal.SIGTERM, before)

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, before)
