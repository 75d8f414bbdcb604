"""Looks at a whole workspace, whoever wrote it: no configuration, no Ray, no torch, and nothing is written."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llm4msr import storage
from llm4msr.status.listing import list_folder
from llm4msr.status.rows import STAGES, Row, Status
from llm4msr.status.stages import Look

RUNNING_WITHIN_S = 900.0
# What makes a folder a workspace; or a comparison.
MARKS = ("raw", "prepared", "knowledge", "runs", "scores", "report.json")
COMPARISON = "compare-"


def read_status(workspace_uri: str, running_within_s: float = RUNNING_WITHIN_S, now: float | None = None) -> Status:
    """Looks at a workspace.

    Args:
        workspace_uri: A local folder or s3://.
        running_within_s: An unfinished place written so recently counts as running.
        now: Seconds since 1970; this moment where None.

    Raises:
        StorageError: It does not exist, or is no workspace.
    """
    root = storage.absolute(workspace_uri)
    names = list_folder(root)
    if not names:
        raise storage.StorageError(f"{root}: no such folder, or an empty one")
    if not any(name in MARKS or name.startswith(COMPARISON) for name in names):
        raise storage.StorageError(
            f"{root} is no workspace: it holds none of {', '.join(MARKS)}; give the workspace_uri of a recipe"
        )
    look = Look(root, time.time() if now is None else now, running_within_s)
    readers: tuple[Callable[[], list[Row]], ...] = (
        look.prepare,
        look.extract,
        look.train,
        lambda: look.each("compare", "", [name for name in names if name.startswith(COMPARISON)], look.comparison),
        look.score,
        lambda: look.each("report", "", [name for name in names if name == "report.json"], look.report),
    )
    with ThreadPoolExecutor(len(readers)) as pool:
        rows = [row for found in pool.map(lambda reader: reader(), readers) for row in found]
    rows += [Row(stage, "absent") for stage in STAGES if stage != "tune" and not any(r.stage == stage for r in rows)]
    # A stage's own row, of a whole folder, stands before those of what is in it.
    rows.sort(key=lambda row: (STAGES.index(row.stage), "/" in row.place, -(row.written_at or 0.0), row.place))
    return Status(root, look.now, tuple(rows))
