"""Reads the stages of a workspace. What lies where is said in `llm4msr.workspace` and in the modules that write it.

Whether a job still runs is judged by its last write: an object store cannot tell more, and a job may run anywhere. A
job that fails leaves a trace only where it says why in a file; else it looks like one that was stopped.

Of finished places one small file is read each. Listings grow with the files in them, so the many staged files of
prepare are left out, and parts of the knowledge store are listed only while an extraction is unfinished.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from typing import Any

from llm4msr import storage
from llm4msr.data.prepared import ALL_SCENARIOS, REJECTS_FILE, USERS_FILE
from llm4msr.knowledge.place import ERRORS_FILE, PROMPTS_DIRECTORY
from llm4msr.status.listing import Entry, list_folder, list_tree
from llm4msr.status.planned import DETAIL_FILE, planned_runs
from llm4msr.status.rows import Row, State
from llm4msr.storage import MANIFEST

SEARCH, REJECTS, STAGING = "tune-", f".{REJECTS_FILE}", ".staging"
# Names that modules with torch or Ray own; a test compares.
PLAN_FILE, SCORE_PLAN_FILE, TRIAL_FILE = "plan.parquet", "plan.json", "trial.json"
COMPARE_PLAN_FILE, SUMMARY_FILE = "plan.json", "summary.json"
EVALUATION_FILE, SCENARIOS_FILE = "evaluation.json", "scenarios.npy"
# Kinds of staged files, by what each file is made of.
STAGED = {"users": "shards parsed", "fitted": "buckets fitted"}
THREADS = 16


@dataclass(frozen=True)
class Look:
    """One look at a workspace."""

    root: str
    now: float
    within_s: float

    def each(self, stage: str, folder: str, names: Iterable[str], read: Callable[[str], Row]) -> list[Row]:
        """Reads several places at once; one whose small files cannot be read does not hide the others."""

        def safely(name: str) -> Row:
            place = storage.join(folder, name) if folder else name
            try:
                return read(place)
            except (storage.StorageError, KeyError, TypeError, ValueError) as error:
                said = str(error) if isinstance(error, storage.StorageError) else f"{type(error).__name__}: {error}"
                return Row(stage, "failed", place, note=f"cannot be read: {said}")

        with ThreadPoolExecutor(THREADS) as pool:
            return list(pool.map(safely, names))

    def _uri(self, *parts: str) -> str:
        return storage.join(self.root, *parts)

    def _json(self, *parts: str) -> Any:
        return storage.read_json(self._uri(*parts))

    def _unfinished(self, times: Iterable[float | None]) -> tuple[State, float | None]:
        """Returns running or stopped, and the last write; None where no time is known."""
        last = max((one for one in times if one), default=None)
        return ("stopped" if last is None or self.now - last > self.within_s else "running"), last

    def prepare(self) -> list[Row]:
        """Reads prepared data sets: finished, staged, refused."""
        beside = list_folder(self._uri("prepared"))
        names = {name.removesuffix(STAGING) for name, entry in beside.items() if entry.is_folder}
        names |= {name.removesuffix(REJECTS) for name in beside if name.endswith(REJECTS)}
        return self.each("prepare", "prepared", sorted(names), partial(self._prepared, beside=beside))

    def _prepared(self, place: str, beside: dict[str, Entry]) -> Row:
        inside, name = list_folder(self._uri(place)), place.rsplit("/", 1)[-1]
        if MANIFEST in inside:
            manifest = self._json(place, MANIFEST)
            data = manifest["data"]
            counts = {f"{r['split']} rows": r["num_rows"] for r in data["rows"] if r["scenario"] == ALL_SCENARIOS}
            counts |= {what: data.get(f"num_{what}") for what in ("users", "items")}
            counts["rejected"] = sum(one["num_rows"] for one in data.get("rejected", ()))
            return Row("prepare", "complete", place, _known(counts), _made(manifest, inside[MANIFEST]))
        if f"{name}{REJECTS}" in beside:
            rejects = f"{place}{REJECTS}"
            counts = {"rejected": storage.parquet_metadata(self._uri(rejects)).num_rows}
            note = f"too many damaged rows: {rejects} has them"
            return Row("prepare", "failed", place, counts, beside[f"{name}{REJECTS}"].time, note)
        times, counts = [entry.time for entry in inside.values()], {}
        for kind, what in STAGED.items():
            staged = list_folder(self._uri(f"{place}{STAGING}", kind))
            counts[what] = len(staged) or None
            times += [entry.time for entry in staged.values()]
        encoded = list_folder(self._uri(place, "train"))
        counts["buckets encoded"] = len(encoded) or None
        times += [entry.time for entry in (*encoded.values(), *list_folder(self._uri(f"{place}{STAGING}")).values())]
        state, last = self._unfinished(times)
        return Row("prepare", state, place, _known(counts), last)

    def extract(self) -> list[Row]:
        """Reads extractions."""
        folders = [
            name for name, entry in list_folder(self._uri("knowledge")).items() if entry.is_folder and name != "store"
        ]
        return self.each("extract", "knowledge", folders, self._knowledge)

    def _knowledge(self, place: str) -> Row:
        inside = list_folder(self._uri(place))
        if MANIFEST in inside:
            manifest = self._json(place, MANIFEST)
            found = manifest.get("summary", {})
            names = ("prompts", "encoded", "failed", "users_with_knowledge", "items_with_knowledge")
            made = {name.replace("_", " "): found.get(f"num_{name}") for name in names}
            return Row("extract", "complete", place, _known(made), _made(manifest, inside[MANIFEST]))
        prompts = list_folder(self._uri(place, PROMPTS_DIRECTORY))
        times = [*(entry.time for entry in (*inside.values(), *prompts.values()) if not entry.is_folder)]
        times += [entry.time for entry in list_folder(self._uri(place, "tensorboard")).values()]
        counts: dict[str, float | None] = {"prompt files": len(prompts) or None}
        if MANIFEST in prompts:
            written = self._json(place, PROMPTS_DIRECTORY, MANIFEST)
            counts = {"prompts": sum(file["num_prompts"] for file in written["files"])}
        if PLAN_FILE in inside:
            # Without its manifest an extraction does not say what its encoder is: parts since its plan are its own.
            parts = [t for t in self._parts() if t >= inside[PLAN_FILE].time]
            planned = storage.parquet_metadata(self._uri(place, PLAN_FILE)).num_rows
            counts |= {"units done": min(len(parts), planned), "units planned": planned}
            times += parts
        state, last = self._unfinished(times)
        if ERRORS_FILE in inside and last == inside[ERRORS_FILE].time and SCENARIOS_FILE not in inside:
            # It is written when all is encoded, before the table: nothing after it means that the job ended there.
            failed = storage.parquet_metadata(self._uri(place, ERRORS_FILE)).num_rows
            if failed:
                note = f"prompts without a vector: {place}/{ERRORS_FILE} says why"
                return Row("extract", "failed", place, _known(counts | {"failed": failed}), last, note)
        return Row("extract", state, place, _known(counts), last)

    def _parts(self) -> list[float]:
        """Returns the times of the parts of all stores."""
        stores = list_folder(self._uri("knowledge", "store"))
        found = [
            list_folder(self._uri("knowledge", "store", name)) for name, entry in stores.items() if entry.is_folder
        ]
        return [entry.time for store in found for name, entry in store.items() if name.startswith("part-")]

    @cached_property
    def _runs(self) -> dict[str, dict[str, float]]:
        """Times of the files of each run and search, by their names below it."""
        runs: dict[str, dict[str, float]] = {}
        for name, written in list_tree(self._uri("runs")).items():
            run, _, inside = name.partition("/")
            if inside:
                runs.setdefault(run, {})[inside] = written
        return runs

    def train(self) -> list[Row]:
        """Reads runs, their evaluations, and searches, which one listing finds."""
        runs = dict(self._runs)
        searches = {name: runs.pop(name) for name in sorted(runs) if name.startswith(SEARCH)}
        rows = self.each("tune", "runs", searches, lambda place: self._search(place, searches[place.split("/")[1]]))
        if not runs:
            return rows
        of_runs = self.each("train", "runs", sorted(runs), lambda place: self._run(place, runs[place.split("/")[1]]))
        states = Counter(row.state for row in of_runs)
        counts: dict[str, float | None] = {
            one: states[one] or None for one in ("complete", "running", "stopped", "failed")
        }
        whole: State = "running" if states["running"] else "complete" if states["complete"] == len(runs) else "stopped"
        note = ""
        if planned := planned_runs(self._uri("runs"), runs):
            num_done, num_planned, command = planned
            counts["planned"] = num_planned
            note = f"{num_done} of the {num_planned} runs that the newest {command} asked for are complete"
            if command == "jobs.train" and whole == "complete" and num_done < num_planned:
                whole = "stopped"
        last = max(written for files in runs.values() for written in files.values())
        rows += [Row("train", whole, "runs", _known(counts), last, note), *of_runs]
        trained = [files for files in runs.values() if f"checkpoint/{MANIFEST}" in files]
        done = [files[EVALUATION_FILE] for files in trained if EVALUATION_FILE in files]
        if done:
            state = "complete" if len(done) == len(trained) else self._unfinished(done)[0]
            rows.append(Row("evaluate", state, "runs", {"evaluated": len(done), "trained": len(trained)}, max(done)))
        return rows

    def _run(self, place: str, files: dict[str, float]) -> Row:
        if f"checkpoint/{MANIFEST}" in files:
            found = self._json(place, "checkpoint", "metadata.json")
            counts = {"epochs": len(found["history"]) if "history" in found else None, "valid AUC": found["valid_auc"]}
            return Row("train", "complete", place, _known(counts), files[f"checkpoint/{MANIFEST}"])
        state, last = self._unfinished(files.values())
        saved = sorted(name for name in files if name.startswith("training/step-") and name.endswith(f"/{MANIFEST}"))
        if not saved:
            return Row("train", state, place, {}, last, "no checkpoint yet")
        manifest = self._json(place, saved[-1])
        found, most = manifest["state"], manifest["about"]["config"]["train"]["max_epochs"]
        counts = {
            "epochs": found["epoch"],
            "epochs at most": most,
            "steps": found["step"],
            "valid AUC": found["best_auc"],
        }
        return Row("train", state, place, _known(counts), last)

    def _search(self, place: str, files: dict[str, float]) -> Row:
        if MANIFEST in files:
            states = Counter(trial["state"] for trial in self._json(place, MANIFEST)["trials"])
            return Row("tune", "complete", place, {f"trials {s}": n for s, n in states.items()}, files[MANIFEST])
        begun = {name.split("/")[1] for name in files if name.startswith("trials/")}
        ended = [name for name in begun if f"trials/{name}/{TRIAL_FILE}" in files]
        state, last = self._unfinished(files.values())
        return Row("tune", state, place, {"trials ended": len(ended), "trials begun": len(begun)}, last)

    def comparison(self, place: str) -> Row:
        """Reads the report of a comparison; until it is written, its plan and the runs that the plan names."""
        inside = list_folder(self._uri(place))
        report, plan = inside.get(SUMMARY_FILE), inside.get(COMPARE_PLAN_FILE)
        # The report of a command that failed in part is older than the plan of the next, which is under way.
        if report is None or (plan is not None and plan.time > report.time and MANIFEST not in inside):
            return self._compared(place, inside)
        found = self._json(place, SUMMARY_FILE)
        runs = {run["run"]: run["state"] for model in found["models"] for run in model["runs"]}
        counts = {f"runs {state}": number for state, number in Counter(runs.values()).items()}
        written = _made(found, report)
        if MANIFEST in inside:
            return Row("compare", "complete", place, counts, written)
        first = found["failures"][0] if found["failures"] else None
        note = f"{first['run']}: {first['message']}" if first else ""
        state = "failed" if first else self._unfinished([written])[0]
        return Row("compare", state, place, counts, written, note)

    def _compared(self, place: str, inside: dict[str, Entry]) -> Row:
        times, counts = [entry.time for entry in inside.values()], {}
        if COMPARE_PLAN_FILE in inside:
            plan = self._json(place, COMPARE_PLAN_FILE)
            names = {run for m in plan["models"] for some in (m["tuning"], *m["runs"].values()) for run in some}
            runs = [files for name, files in self._runs.items() if name in names]
            done = sum({f"checkpoint/{MANIFEST}", EVALUATION_FILE, DETAIL_FILE} <= set(files) for files in runs)
            counts = {"runs done": min(done, plan["num_runs"]), "runs planned": plan["num_runs"]}
            times += [time for files in runs for time in files.values()]
        state, last = self._unfinished(times)
        return Row("compare", state, place, counts, last)

    def score(self) -> list[Row]:
        """Reads scored batches; those that went to a score.output_uri of their own are not here."""
        folders = [name for name, entry in list_folder(self._uri("scores")).items() if entry.is_folder]
        return self.each("score", "scores", folders, self._scores)

    def _scores(self, place: str) -> Row:
        inside = list_folder(self._uri(place))
        if MANIFEST in inside:
            found = self._json(place, MANIFEST)
            counts = {"rows": found["num_rows"], "failed": found["num_failed"], "files": found["num_files"]}
            return Row("score", "complete", place, counts, _made(found, inside[MANIFEST]))
        done = list_folder(self._uri(place, "scores"))
        times = [entry.time for entry in (*inside.values(), *done.values()) if not entry.is_folder]
        counts = {
            "units done": len(done),
            "units with failed rows": len(list_folder(self._uri(place, "errors"))) or None,
        }
        if SCORE_PLAN_FILE in inside:
            counts["units planned"] = self._units_planned(self._json(place, SCORE_PLAN_FILE))
        state, last = self._unfinished(times)
        return Row("score", state, place, _known(counts), last)

    def _units_planned(self, plan: dict[str, Any]) -> int | None:
        """Returns the units of a batch of all users of a run's checkpoint; None where the input lies elsewhere."""
        users = self._uri("runs", plan["identity"]["model_version"], "checkpoint", USERS_FILE)
        if plan["identity"]["kind"] != "users" or plan["identity"]["files"] is not None or not storage.exists(users):
            return None
        return -(-int(storage.parquet_metadata(users).num_rows) // int(plan["rows_per_unit"]))

    def report(self, place: str) -> Row:
        """Reads the pipeline's report."""
        found = self._json(place)
        counts = {"results": len(found["results"]), "runs": len(found["runs"])}
        there = storage.is_finished(self._uri(found["checkpoint"]))
        note = "" if there else f"names a checkpoint that is not there: {found['checkpoint']}"
        return Row("report", "complete", place, counts, _made(found, None), note)


def _known(counts: Mapping[str, float | None]) -> dict[str, float]:
    return {name: number for name, number in counts.items() if number is not None}


def _made(tree: dict[str, Any], entry: Entry | None) -> float | None:
    """Returns when something was finished: as it says, or else when its file was written."""
    created_at = tree.get("created_at")
    if created_at is not None:
        return datetime.fromisoformat(created_at).timestamp()
    return None if entry is None else entry.time
