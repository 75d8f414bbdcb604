"""What every job does around its work: configuration, logging, Ray, and errors a person can read."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from llm4msr import logs, storage
from llm4msr.config import Config, ConfigError
from llm4msr.settings import load_config

logger = logging.getLogger("llm4msr.jobs")
# Ray's own defaults suit clusters: 32 processes that read Parquet footers, progress bars that overwrite log lines.
LOCAL_RAY_ENVIRONMENT = {
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's coming default: a worker without GPUs keeps what it was given
}
# What these say at their usual level, the jobs' own lines say better.
QUIET_LOGGERS = {
    "ray.data._internal.execution.streaming_executor": logging.WARNING,
    "ray.data._internal.progress": logging.ERROR,
    "ray.train": logging.WARNING,
    "ray.serve": logging.WARNING,
}


@contextmanager
def ray_session() -> Iterator[None]:
    """Connects to the cluster of RAY_ADDRESS (set inside ``ray job submit``), or starts one on this machine."""
    # Without an address, ray.init would join any cluster that "ray start" left on this machine.
    address = os.environ.get("RAY_ADDRESS") or "local"
    for name, value in LOCAL_RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if address == "local":  # a private cluster on the loopback address; others say themselves what they ask for
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    for name, level in QUIET_LOGGERS.items():
        logging.getLogger(name).setLevel(level)
    if ray.is_initialized():
        yield
        return
    options = {} if address != "local" else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    runtime_env = {"worker_process_setup_hook": worker_set_up() if logs.is_json() else quiet_workers}
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=True, runtime_env=runtime_env, **options)
    if logs.is_json():
        logs.take_over()
        bring_lines_as_json()
    try:
        yield
    except BaseException as error:
        let_go(error)
        raise
    finally:
        ray.shutdown()


def let_go(error: BaseException) -> None:
    """Forgets the local variables of where `error` came from, and of the errors behind it.

    Among them can be a half-read Ray data set, whose thread goes on until its iterator is gone. A thread that asks Ray
    for something after ``ray.shutdown`` ends the whole process with status 1, and nothing is said of `error`.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            queue += [found.__cause__, found.__context__]


def quiet_workers() -> None:
    """Runs in each new worker: Ray Train's cleaner asks the dashboard, which a private cluster does not have."""
    name = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(name).setLevel(logging.ERROR)


def worker_set_up() -> Callable[[], None]:
    """Returns what runs in each new worker where log lines are JSON: they are the same there as here."""
    context = logs.context()

    def set_up_worker() -> None:
        quiet_workers()
        logs.set_up(logging.WARNING, logging.INFO, True, context)

    return set_up_worker


def bring_lines_as_json() -> None:
    """Lets the driver pass on what workers say as it is, in place of Ray's own way, which puts their names before it.

    Ray has no public place for it; a Ray that works otherwise goes on with its own way.
    """
    from ray._private import ray_logging

    dispatcher = ray_logging.global_worker_stdstream_dispatcher
    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler("ray_print_logs", lambda data: sys.stderr.writelines(logs.worker_lines(data)))


def tell(prog: str, message: object) -> None:
    """Tells a person, or who collects log lines, why a job ends."""
    if logs.is_json():
        logger.error("%s", message)
    else:
        print(f"{prog}: {message}", file=sys.stderr)


def run_job(job: Callable[[Config], object], prog: str, argv: Sequence[str] | None = None) -> int:
    """Runs one job from the command line.

    Returns:
        Exit status: 0 done; 2 the configuration or the input cannot be used (one clear message, no traceback); 143
        SIGTERM came, and training left a checkpoint to go on from. Anything else that goes wrong is raised.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        as_json = logs.wanted_format() == "json"
        logs.set_up(logging.INFO, logging.INFO, as_json, {"job": prog.removeprefix("python -m ")})
        if not any(part.split("=", 1)[0] in ("--config", "--help", "-h") for part in argv):
            raise ConfigError("--config FILE.toml is needed; recipes are in jobs/recipes/, --help lists every key")
        config = load_config(argv, prog)
    except ConfigError as error:
        tell(prog, error)
        return 2
    for name in ("httpx", "botocore", "aiobotocore", "fsspec", "s3fs"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with logs.about(run=storage.absolute(config.workspace_uri)), ray_session():
            job(config)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        tell(prog, message)
        return getattr(error, "exit_status", 2)
    return 0


def user_message(error: BaseException) -> str | None:
    """Returns the message of the user's error inside `error`, or None when the fault is the program's own.

    Ray wraps what a task raised, at times more than once; the first error of this project inside is what matters. An
    object store that cannot be reached, or refuses, is told as well.
    """
    seen: set[int] = set()
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        if type(found).__module__.startswith("llm4msr."):
            return str(found)
        if type(found).__module__.startswith("botocore."):
            return f"object store: {type(found).__name__}: {' '.join(str(found).split())}"
        queue += [getattr(found, "cause", None), found.__cause__, found.__context__]
        failures = getattr(found, "worker_failures", None)
        if isinstance(failures, dict):
            queue += list(failures.values())
    return None


def reading_message(error: BaseException, uri: str) -> str | None:
    """Returns `user_message`, or what a file system said when a person's own place was read; None as there."""
    message = user_message(error)
    if message is None and isinstance(error, OSError):
        return f"cannot read {uri}: {type(error).__name__}: {error}"
    return message
