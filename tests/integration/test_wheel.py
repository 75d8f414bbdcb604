"""The wheel, installed into an environment of its own and used from a folder that is not the checkout.

What the checkout has and the wheel lacks would show: a recipe, a file of the page, a module, the deployment's file. The
packages that it needs are the suite's own, which the environment reads; nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest
from documented_commands import REPOSITORY

pytestmark = pytest.mark.slow
PACKAGES = ("llm4msr", "jobs", "serve")
TINY = {
    "data.synthetic.num_users": "60",
    "data.synthetic.num_items": "120",
    "knowledge.max_events_per_scenario": "2",
    "model.embedding_dim": "4",
    "model.hidden_dims": "[8]",
    "train.max_epochs": "1",
    "train.num_workers": "0",
    "train.batch_size": "256",
    "experiment.knowledge": '["llm"]',
}


class Installation:
    """An environment with the wheel, and an empty folder to work in."""

    def __init__(self, root: Path) -> None:
        self.folder, self._root = root / "elsewhere", root
        self.folder.mkdir()
        self.python = root / "venv" / "bin" / "python"
        self._ray_folder = tempfile.mkdtemp(prefix="w", dir="/tmp")  # sockets lie there: a short name
        taken = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RAY_ADDRESS"}
        self.environment = {name: value for name, value in os.environ.items() if name not in taken}
        self.environment["RAY_TMPDIR"] = self._ray_folder
        self._install(self._build())

    def _build(self) -> Path:
        """Builds the wheel of a copy of the packages, so that no build folder is left in the checkout."""
        source = self._root / "source"
        source.mkdir()
        for name in PACKAGES:
            shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(REPOSITORY / name, source)
        build = [
            "-m",
            "pip",
            "wheel",
            "--no-deps",
            "--no-index",
            "--no-build-isolation",
            "--wheel-dir",
            str(self._root),
        ]
        run([sys.executable, *build, str(source)], self._root, self.environment)
        shutil.rmtree(source)
        (wheel,) = self._root.glob("llm4msr-*.whl")
        return wheel

    def _install(self, wheel: Path) -> None:
        venv = self._root / "venv"
        run([sys.executable, "-m", "venv", "--without-pip", str(venv)], self._root, self.environment)
        install = ["--python", str(self.python), "install", "--no-deps", "--no-index", str(wheel)]
        run([sys.executable, "-m", "pip", *install], self._root, self.environment)
        # Only now, so that pip did not find the checkout installed there. A path in a .pth file brings the packages of
        # that folder, but none of its own .pth files, and so not the checkout.
        (own,) = venv.glob("lib/python3*/site-packages")
        (own / "suite.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def type(self, *argv: str) -> str:
        """Runs this environment's Python in the empty folder; returns what it printed."""
        return run([str(self.python), *argv], self.folder, self.environment)

    def close(self) -> None:
        shutil.rmtree(self._ray_folder, ignore_errors=True)


def run(command: list[str], folder: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    installation = Installation(tmp_path_factory.mktemp("wheel"))
    yield installation
    installation.close()


def test_the_packages_are_the_wheel_s(installed):
    names = ", ".join(PACKAGES)
    printed = installed.type("-c", f"import json, {names}; print(json.dumps([p.__file__ for p in ({names})]))")
    for file in json.loads(printed):
        assert str(installed.python.parents[1]) in file and str(REPOSITORY / "llm4msr") not in file
    version = installed.type(
        "-c", "import llm4msr, importlib.metadata as m; print(llm4msr.__version__, m.version('llm4msr'))"
    )
    assert len(set(version.split())) == 1


def test_files_that_are_no_modules_are_in_it(installed):
    said = installed.type(
        "-c",
        "from importlib.resources import files\n"
        "print(files('llm4msr').joinpath('py.typed').is_file())\n"
        "print(files('serve').joinpath('config.yaml').is_file())\n"
        "print(*sorted(f.name for f in files('jobs').joinpath('recipes').iterdir()))\n"
        "from fastapi import FastAPI; from serve.page import add_page; add_page(FastAPI()); print('page')",
    )
    typed, config, recipes, page = said.splitlines()
    assert (typed, config, page) == ("True", "True", "page")
    assert recipes.split() == sorted(path.name for path in (REPOSITORY / "jobs" / "recipes").glob("*.toml"))


@pytest.mark.parametrize(
    "module", ["jobs.prepare", "jobs.compare", "jobs.status", "jobs.download", "serve", "serve.rollout"]
)
def test_commands_explain_themselves(installed, module):
    assert "usage: python -m" in installed.type("-m", module, "--help")


def test_a_pipeline_runs_without_a_checkout(installed):
    recipe = installed.type(
        "-c", "from importlib.resources import files; print(files('jobs') / 'recipes' / 'demo.toml')"
    )
    flags = [part for key, value in TINY.items() for part in (f"--{key}", value)]
    printed = installed.type("-m", "jobs.pipeline", "--config", recipe.strip(), *flags)
    assert "star + LLM4MSR" in printed
    report = json.loads((installed.folder / "workspace" / "demo" / "report.json").read_text())
    assert (installed.folder / "workspace" / "demo" / report["checkpoint"] / "manifest.json").exists()
    assert "complete" in installed.type("-m", "jobs.status", "--workspace_uri", "workspace/demo")
