"""Where each stage's output lies below ``workspace_uri``: places follow from content, so nothing is overwritten.

* prepared/<data digest>.json       names the directory that the last prepare of this configuration finished
* prepared/<digest>/                one prepared data set (configuration + version of every raw file)
* prepared/raw-files.json           what the local raw files' contents were found to be, by size and time
* knowledge/store/<identity>/       content-addressed vectors of one encoder
* knowledge/<digest>.json          names the directory that the last extract of this configuration finished
* knowledge/<digest>/               prompts and knowledge table of one prepared data set
* runs/<name>-<digest>/             one training run with its checkpoint
* runs/tune-<digest>/               one search of jobs.tune: its trials, and best.toml
* compare-<digest>/                 one comparison of jobs.compare: rows, tables, plots and report.html
* scores/<digest>/                  one batch of jobs.score
* report.json                       the last pipeline's report
"""

from __future__ import annotations

from llm4msr import storage
from llm4msr.config import Config, digest


def prepared_root(config: Config) -> str:
    """Returns the directory that holds prepared data sets."""
    return storage.join(storage.absolute(config.workspace_uri), "prepared")


def prepared_pointer_uri(config: Config) -> str:
    """Returns the small file that names the current prepared directory of this data configuration."""
    return storage.join(prepared_root(config), f"{digest(config.data)}.json")


def file_versions_uri(config: Config) -> str:
    """Returns the file that notes the contents of raw files, so that they are not read for it again."""
    return storage.join(prepared_root(config), "raw-files.json")


def prepared_uri(config: Config) -> str:
    """Returns the prepared data set of this configuration.

    Raises:
        StorageError: It was not prepared yet.
    """
    pointer = prepared_pointer_uri(config)
    if not storage.exists(pointer):
        raise storage.StorageError(
            f"{prepared_root(config)} holds no data prepared with this data configuration ({digest(config.data)}): "
            "run jobs.prepare with the same configuration first"
        )
    uri = storage.join(prepared_root(config), storage.read_json(pointer)["directory"])
    storage.read_manifest(uri, "run jobs.prepare again")
    return uri


def synthetic_raw_uri(config: Config) -> str:
    """Returns where generated raw files go when data.raw_uri is unset."""
    return storage.join(storage.absolute(config.workspace_uri), "raw", digest(config.data.synthetic))


def knowledge_root(config: Config) -> str:
    """Returns the directory that holds the store and the knowledge tables."""
    return storage.join(storage.absolute(config.workspace_uri), "knowledge")


def runs_root(config: Config) -> str:
    """Returns the directory that holds the training runs."""
    return storage.join(storage.absolute(config.workspace_uri), "runs")


def report_uri(config: Config) -> str:
    """Returns the place of the report."""
    return storage.join(storage.absolute(config.workspace_uri), "report.json")


def scores_root(config: Config) -> str:
    """Returns the directory that holds scored batches."""
    return storage.join(storage.absolute(config.workspace_uri), "scores")


def reported_checkpoint_uri(workspace_uri: str) -> str:
    """Returns the checkpoint that a workspace's report names, a local one as an absolute path.

    Raises:
        StorageError: The workspace holds no report, or one without a checkpoint.
    """
    root = storage.absolute(workspace_uri)
    place = storage.join(root, "report.json")
    if not storage.exists(place):
        raise storage.StorageError(
            f"{place}: no such file, so there is nothing to serve: run make demo, or python -m jobs.pipeline "
            "with this workspace_uri, first"
        )
    report = storage.read_json(place)
    if not isinstance(report, dict) or "checkpoint" not in report:
        raise storage.StorageError(f"{place}: names no checkpoint: it was not written by jobs.pipeline")
    return storage.join(root, report["checkpoint"])
