"""Downloads a data set: ``python -m jobs.download NAME --to URI``; ``--list`` shows what there is.

Broken connections are gone on with, checksums are compared, archives are unpacked with care to URI/NAME, and the
command to run next is printed. A second run finds the data there and does nothing. Proxies: HTTPS_PROXY and NO_PROXY.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.session import tell, user_message
from llm4msr import logs, storage
from llm4msr.data.catalogue import DATA_SETS, DataSet, find_data_set
from llm4msr.data.download import DEFAULT_CACHE, download

PROG = "python -m jobs.download"
INTERRUPTED = 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line; what is wrong with it ends the program with status 2."""
    parser = argparse.ArgumentParser(PROG, description="Downloads, verifies and unpacks a published data set.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the data set; --list shows all")
    parser.add_argument("--to", metavar="URI", help="a folder or s3://; the data set lands in URI/NAME")
    parser.add_argument("--list", action="store_true", help="show the data sets and end")
    parser.add_argument(
        "--mirror",
        metavar="URL",
        help="http(s) folder with the files, and NAME.md5 beside each, instead of the publisher's",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help=f"local folder of files on their way (default: URI/NAME/.download; for s3:// {DEFAULT_CACHE})",
    )
    arguments = parser.parse_args(argv)
    if not arguments.list and (arguments.name is None or arguments.to is None):
        parser.error("NAME and --to URI are needed; --list shows the names")
    if arguments.mirror and not arguments.mirror.startswith(("http://", "https://")):
        parser.error(f"argument --mirror: found {arguments.mirror!r}, needed http://... or https://...")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job.

    Returns:
        Exit status: 0 done; 2 the data set cannot be had (one clear message); 130 interrupted, to be gone on with.
    """
    arguments = parse(argv)
    if arguments.list:
        print_list()
        return 0
    try:
        as_json = logs.wanted_format() == "json"
        logs.set_up(logging.WARNING, logging.INFO, as_json, {"job": PROG.removeprefix("python -m ")})
        data_set = find_data_set(arguments.name)
        place = download(data_set, arguments.to, mirror=arguments.mirror, cache=arguments.cache)
    except KeyboardInterrupt:
        tell(PROG, "interrupted; run the same command again to go on")
        return INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None and isinstance(error, OSError):
            message = f"{type(error).__name__}: {error}"
        if message is None:
            raise
        tell(PROG, message)
        return 2
    print(next_step(data_set, place))
    return 0


def next_step(data_set: DataSet, place: str) -> str:
    """Returns what to do with a downloaded data set, as lines for people."""
    lines = [f"{place}: licence: {data_set.licence} ({data_set.homepage})"]
    raw_uri = storage.join(place, data_set.raw_folder) if data_set.raw_folder else place
    if data_set.recipe is None:
        lines.append(f"data.raw_uri = {raw_uri!r}; {data_set.note}")
    else:
        recipe = f"jobs/recipes/{data_set.recipe}"
        command = ["python", "-m", "jobs.prepare", "--config", recipe, "--data.raw_uri", raw_uri, *data_set.options]
        lines += ["Next:", f"  {shlex.join(command)}"]
    return "\n".join(lines)


def print_list() -> None:
    """Prints the catalogue."""
    table = Table(header_style="bold", box=None)
    for heading in ("name", "size", "licence", "recipe"):
        table.add_column(heading, no_wrap=heading == "name")
    for data_set in DATA_SETS.values():
        sizes = [file.num_bytes for file in data_set.files]
        size = "" if None in sizes else f"{sum(filter(None, sizes)) / 2**20:.1f} MiB"
        table.add_row(data_set.name, size, data_set.licence, data_set.recipe or "")
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


if __name__ == "__main__":
    sys.exit(main())
