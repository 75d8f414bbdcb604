"""cluster/prepare.sh and cluster/setup-node.sh, run for real: what is packed, what is secret, what a node gets.

The node's environment sees this environment's packages, so that nothing is fetched (pip is told to refuse).
"""

from __future__ import annotations

import os
import shutil
import site
import stat
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from cluster_files import CLUSTER, REPOSITORY, SET, locked, placeholders

PARTS = ("cluster", "llm4msr", "jobs", "serve", "pyproject.toml", "README.md", "LICENSE", "constraints.txt")


def run(*command: object, home: Path) -> subprocess.CompletedProcess:
    environment = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    return subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A home, and a checkout for which prepare.sh ran."""
    root = tmp_path_factory.mktemp("packed")
    home, checkout = root / "home", root / "checkout"
    home.mkdir()
    checkout.mkdir()
    for part in PARTS:
        source = REPOSITORY / part
        if source.is_dir():
            shutil.copytree(source, checkout / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, checkout)
    for name in ("aws.yaml", "gcp.yaml", "local.yaml"):
        text = (CLUSTER / name).read_text()
        for placeholder in sorted(placeholders(text), key=len, reverse=True):
            text = text.replace(placeholder, SET[placeholder])
        (root / name).write_text("# CHANGE-ME is only in this comment\n" + text)
    done = run(checkout / "cluster" / "prepare.sh", root / "aws.yaml", home=home)
    assert done.returncode == 0, done.stderr
    return root, home, checkout


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "local.yaml"])
def test_a_file_in_which_something_is_not_set_is_refused(tmp_path, name):
    done = run(CLUSTER / "prepare.sh", CLUSTER / name, home=tmp_path)
    assert done.returncode == 1
    assert placeholders(done.stderr) == {
        found for line in (CLUSTER / name).read_text().splitlines() for found in placeholders(line.split("#")[0])
    }
    assert not list(tmp_path.iterdir())
    assert run(CLUSTER / "prepare.sh", tmp_path / "none.yaml", home=tmp_path).returncode == 2


def test_the_package_is_the_checkout_and_no_more(packed):
    _, _, checkout = packed
    folder = checkout / "build" / "cluster"
    (wheel,) = folder.glob("*.whl")
    others = {file.name for file in folder.iterdir()} - {wheel.name}
    assert others == {"constraints.txt", "setup-node.sh", "node-env.sh"}
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(f.relative_to(checkout)) for p in ("llm4msr", "jobs", "serve") for f in (checkout / p).rglob("*.py")}
    assert sources <= names
    assert {"serve/config.yaml", "serve/static/index.html", "jobs/recipes/demo.toml"} <= names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "cluster/", "build/"))]
    # Ray reads every byte of it again and again.
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000


def test_tokens_are_made_once_and_are_nobody_elses(packed):
    root, home, checkout = packed
    secrets = home / ".llm4msr-cluster"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    before = {file.name: file.read_text() for file in secrets.iterdir()}
    assert set(before) == {"auth_token", "serve_tokens"} and len(set(before.values())) == 2
    assert all(len(token.strip()) == 64 for token in before.values())
    (secrets / "aws_config").write_text("[default]\n")
    (wheel,) = (checkout / "build" / "cluster").glob("*.whl")
    content = wheel.read_bytes()
    # Left by an earlier build: setuptools would take it into the wheel.
    stale = checkout / "build" / "lib" / "llm4msr"
    stale.mkdir(parents=True)
    (stale / "removed.py").write_text("")
    for name in ("gcp.yaml", "local.yaml"):
        done = run(checkout / "cluster" / "prepare.sh", root / name, home=home)
        assert done.returncode == 0, done.stderr
    assert {name: (secrets / name).read_text() for name in before} == before
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o600}
    # The same code is the same file, or `ray up` would set every node up again.
    assert wheel.read_bytes() == content


def test_a_node_is_set_up_by_the_lock(packed, tmp_path):
    _, _, checkout = packed
    package, environment = tmp_path / "llm4msr", tmp_path / "llm4msr-env"
    shutil.copytree(checkout / "build" / "cluster", package)
    venv.create(environment, symlinks=True)
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "borrowed.pth").write_text(site.getsitepackages()[0])
    (tmp_path / ".bashrc").write_text("export BEFORE=1\n")
    old = package / "llm4msr-0.0.1-py3-none-any.whl"  # of an earlier `ray up`
    old.write_bytes(b"")
    os.utime(old, (0, 0))
    installed, code = own / "llm4msr" / "storage.py", (checkout / "llm4msr" / "storage.py").read_text()
    for before in (None, "# other code of the same version\n"):
        if before:
            installed.write_text(before)
        done = run(package / "setup-node.sh", home=tmp_path)
        assert done.returncode == 0, done.stderr
        assert installed.read_text() == code
    assert (tmp_path / ".bashrc").read_text() == f'export BEFORE=1\n. "{package}/node-env.sh"\n'
    # As a command of `ray up` runs there: the environment's python, with the project in it.
    shell = run(
        "bash",
        "-c",
        ". ~/.bashrc; command -v python; echo $RAY_AUTH_MODE; cd /; python -c 'import jobs; print(jobs.__file__)'",
        home=tmp_path,
    )
    assert shell.stdout.split() == [f"{environment}/bin/python", "token", f"{own}/jobs/__init__.py"]

    # Another Ray than that of the lock is never left standing.
    lock = package / "constraints.txt"
    lock.write_text(lock.read_text().replace(f"ray=={locked()['ray']}", "ray==2.59.0"))
    assert run(package / "setup-node.sh", home=tmp_path).returncode != 0
