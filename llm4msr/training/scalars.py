"""TensorBoard scalars of a run, local or remote, across restarts."""

from __future__ import annotations

import tempfile
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from llm4msr import storage


class Scalars:
    """Scalars below run_uri/tensorboard.

    Args:
        run_uri: The run.
        first_step: Steps already taken: 0 begins anew; what an earlier process wrote of later steps counts no more.
    """

    def __init__(self, run_uri: str, first_step: int) -> None:
        self.uri = storage.join(run_uri, "tensorboard")
        if first_step == 0:
            storage.remove(self.uri)
        self.folder = None if storage.is_local(self.uri) else tempfile.TemporaryDirectory()
        place = self.folder.name if self.folder else str(storage.local_path(self.uri))
        self.writer = SummaryWriter(place, purge_step=first_step + 1 if first_step else None)

    def write(self, step: int, scalars: dict[str, float]) -> None:
        """Writes one point of each scalar."""
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Brings what was written so far to its place."""
        self.writer.flush()
        if self.folder:
            for path in sorted(Path(self.folder.name).iterdir()):
                storage.copy(str(path), storage.join(self.uri, path.name))

    def close(self, error: BaseException | None = None) -> None:
        """Ends the log, whatever ended the run."""
        self.flush()
        self.writer.close()
        if self.folder:
            self.folder.cleanup()
