"""What is said of a workspace: a row for each thing that a stage made or is making."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

State = Literal["complete", "running", "stopped", "failed", "absent"]
STAGES = ("prepare", "extract", "train", "evaluate", "tune", "compare", "score", "report")


@dataclass(frozen=True)
class Row:
    """One thing that a stage made, or is making.

    Attributes:
        stage: One of `STAGES`.
        state: running: unfinished, with a recent write; stopped: unfinished, without; failed: a file says why.
        place: Below the workspace; empty where there is nothing.
        counts: What is in it, by name.
        written_at: When it was finished, else its last write; seconds since 1970.
        note: What else there is to say.
    """

    stage: str
    state: State
    place: str = ""
    counts: Mapping[str, float | None] = field(default_factory=dict)
    written_at: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Status:
    """A workspace as it was looked at.

    Attributes:
        workspace_uri: A local one as an absolute path.
        looked_at: Seconds since 1970.
        rows: In the order of `STAGES`, in each the newest first; one at least of each stage but tune.
    """

    workspace_uri: str
    looked_at: float
    rows: tuple[Row, ...]

    def age_s(self, row: Row) -> float | None:
        """Returns the seconds since a row was written; 0 where the store's clock is ahead of this one."""
        return None if row.written_at is None else max(self.looked_at - row.written_at, 0.0)

    def to_json(self) -> dict[str, Any]:
        """Returns plain JSON types; times as text in UTC."""
        rows = []
        for row in self.rows:
            age_s = self.age_s(row)
            times = {
                "written_at": None if row.written_at is None else _text(row.written_at),
                "age_s": None if age_s is None else round(age_s, 1),
            }
            rows.append(asdict(row) | times)
        return {"workspace_uri": self.workspace_uri, "looked_at": _text(self.looked_at), "stages": rows}


def _text(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
