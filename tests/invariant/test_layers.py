"""The architecture as rules over the imports: one direction, and heavy libraries only where they belong.

The rules read every import with `ast`, those inside functions included; imports under ``if TYPE_CHECKING:`` are free.
Each rule is also run on a small tree with planted violations, so that it is known to find them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("llm4msr", "jobs", "serve")
MAX_LINES = 400
VAGUE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}

# Layer of a module: that of the longest prefix. A module imports its own layer and lower ones only.
LAYERS = {
    "llm4msr": 0,  # the version
    "llm4msr.config": 0,
    "llm4msr.settings": 0,
    "llm4msr.schema": 0,
    "llm4msr.storage": 0,
    "llm4msr.logs": 0,
    "llm4msr.remote": 0,
    "llm4msr.placement": 0,
    "llm4msr.workspace": 0,
    "llm4msr.data": 1,
    "llm4msr.knowledge": 1,
    "llm4msr.models": 1,
    "llm4msr.batch": 1,
    "llm4msr.request": 1,
    "llm4msr.lookup": 1,
    "llm4msr.training": 2,
    "llm4msr.ranker": 2,
    "llm4msr.golden": 2,
    "llm4msr.explaining": 2,
    "llm4msr.subjects": 2,
    "llm4msr.evaluation": 2,
    "llm4msr.comparison": 3,  # trains, evaluates and reports many runs
    "llm4msr.scoring": 3,
    "llm4msr.planning": 3,  # arithmetic over configuration alone
    "llm4msr.status": 3,  # reads what all stages leave
    "jobs": 4,
    "serve": 4,
}
# Inside one layer: what a package may not import, and exceptions from it.
FORBIDDEN = {
    "llm4msr.data": (("llm4msr.knowledge", "llm4msr.models", "llm4msr.batch"), ()),
    # Knowledge is made from prepared data alone; of `source` it uses the type of error.
    "llm4msr.knowledge": (
        ("llm4msr.data", "llm4msr.models", "llm4msr.batch"),
        ("llm4msr.data.prepared", "llm4msr.data.source", "llm4msr.data.splits"),
    ),
    "llm4msr.models": (("llm4msr",), ("llm4msr.config", "llm4msr.schema", "llm4msr.models")),
    "llm4msr.batch": (("llm4msr.data", "llm4msr.models"), ()),
}
# The only places of a library below jobs/ and serve/. The Ray shell is thin: everything else runs without it.
ONLY_IN = {
    "ray": {
        "llm4msr.data.pipeline",
        "llm4msr.knowledge.actors",
        "llm4msr.knowledge.pipeline",
        "llm4msr.knowledge.prompt_stage",
        "llm4msr.knowledge.engines.vllm",
        "llm4msr.training.gloo",
        "llm4msr.training.run",
        "llm4msr.training.stop",
        "llm4msr.training.tune",
        "llm4msr.comparison.run",
        "llm4msr.scoring.pipeline",
    },
    "transformers": {"llm4msr.knowledge.engines.encoder"},
    # An extra of its own, which nothing else may need.
    "matplotlib": {"llm4msr.comparison.plots"},
    "scipy": {"llm4msr.comparison.statistics"},
}
ONLY_TORCH = "llm4msr.models"


@dataclass(frozen=True)
class Import:
    """One imported module, as seen in the file of another."""

    importer: str
    module: str
    line: int


def module_files(root: Path) -> dict[str, Path]:
    """Returns the path of every module of the packages below `root`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def read_imports(importer: str, path: Path, modules: set[str]) -> list[Import]:
    """Returns the modules that one file imports outside of ``if TYPE_CHECKING:``."""
    package = importer if path.name == "__init__.py" else importer.rpartition(".")[0]

    def walk(node: ast.AST) -> Iterator[Import]:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.orelse:
                yield from walk(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(importer, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(part for part in (base, node.module) if part)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield Import(importer, inner if inner in modules else base, node.lineno)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return list(dict.fromkeys(walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))))


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int | None:
    """Returns the layer of one of our modules; None for one that no rule places."""
    prefixes = [name for name in LAYERS if inside(module, name) and (name != "llm4msr" or module == name)]
    return LAYERS[max(prefixes, key=len)] if prefixes else None


def find_violations(root: Path) -> list[str]:
    """Returns what breaks a rule, one line each: file, line and what is wrong."""
    files = module_files(root)
    found = []
    for module, path in files.items():
        place = path.relative_to(root).as_posix()
        if layer(module) is None:
            found.append(f"{place}: {module} has no layer; place it in LAYERS")
            continue
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_LINES:
            found.append(f"{place}: {num_lines} lines, at most {MAX_LINES} are allowed")
        if path.stem in VAGUE_NAMES:
            found.append(f"{place}: the name says nothing about what is inside")
        for item in read_imports(module, path, set(files)):
            found += [f"{place}:{item.line}: {wrong}" for wrong in check(item)]
    return found


def check(item: Import) -> Iterator[str]:
    importer, module = item.importer, item.module
    library = module.split(".")[0]
    if library in PACKAGES:
        own, other = layer(importer), layer(module)
        if other is not None and other > own:
            yield f"{importer} (layer {own}) imports {module} (layer {other})"
    for package, (forbidden, allowed) in FORBIDDEN.items():
        if inside(importer, package) and any(inside(module, name) for name in forbidden):
            free = inside(module, package) or any(inside(module, name) for name in allowed)
            if not free:
                yield f"{importer} imports {module}"
    if library in ONLY_IN and inside(importer, "llm4msr") and importer not in ONLY_IN[library]:
        yield f"{importer} imports {module}; {library} belongs in {', '.join(sorted(ONLY_IN[library]))}"
    known = {*sys.stdlib_module_names, "torch", *PACKAGES}
    if inside(importer, ONLY_TORCH) and library not in known:
        yield f"{importer} imports {module}; models use torch and the standard library only"


def find_cycle(root: Path) -> list[str]:
    """Returns modules that import one another in a circle, or nothing."""
    files = module_files(root)
    edges = {m: {i.module for i in read_imports(m, p, set(files)) if i.module in files} for m, p in files.items()}
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for other in sorted(edges[module] - {module}):
                if cycle := visit(other, [*trail, module]):
                    return cycle
            done.add(module)
        return []

    return next((cycle for module in sorted(files) if (cycle := visit(module, []))), [])


def test_imports_go_one_way():
    assert find_violations(REPOSITORY) == []


def test_no_module_imports_itself_through_others():
    assert find_cycle(REPOSITORY) == []


def test_the_rules_see_the_whole_project():
    files = module_files(REPOSITORY)
    assert {"llm4msr.config", "llm4msr.data.synthetic", "llm4msr.models.meta", "jobs", "serve"} <= set(files)
    imports = read_imports("llm4msr.workspace", files["llm4msr.workspace"], set(files))
    assert {"llm4msr.storage", "llm4msr.config"} <= {item.module for item in imports}


PLANTED = {
    "llm4msr/storage.py": (
        "import llm4msr.data.csv\n",
        ["llm4msr.storage (layer 0) imports llm4msr.data.csv (layer 1)"],
    ),
    "llm4msr/data/csv.py": (
        "from llm4msr import knowledge\ndef f():\n    from llm4msr.training.loop import train\n",
        [
            "llm4msr.data.csv imports llm4msr.knowledge",
            "llm4msr.data.csv (layer 1) imports llm4msr.training.loop (layer 2)",
        ],
    ),
    "llm4msr/data/features.py": (
        "import ray.data as rd\n",
        [
            "llm4msr.data.features imports ray.data; ray belongs in llm4msr.comparison.run, llm4msr.data.pipeline, "
            "llm4msr.knowledge.actors, "
            "llm4msr.knowledge.engines.vllm, llm4msr.knowledge.pipeline, "
            "llm4msr.knowledge.prompt_stage, llm4msr.scoring.pipeline, llm4msr.training.gloo, "
            "llm4msr.training.run, llm4msr.training.stop, llm4msr.training.tune"
        ],
    ),
    "llm4msr/data/pipeline.py": ("import ray\nfrom llm4msr.data import csv\n", []),
    "llm4msr/data/prepared.py": ("from . import csv\nfrom ..schema import Feature\n", []),
    "llm4msr/knowledge/__init__.py": ("", []),
    "llm4msr/knowledge/engines/encoder.py": (
        "import transformers\nfrom llm4msr.data.prepared import PreparedData\n",
        [],
    ),
    "llm4msr/knowledge/store.py": (
        "from transformers import AutoModel\nfrom ..data import csv\n",
        [
            "llm4msr.knowledge.store imports transformers; transformers belongs in llm4msr.knowledge.engines.encoder",
            "llm4msr.knowledge.store imports llm4msr.data.csv",
        ],
    ),
    "llm4msr/models/meta.py": (
        "import math\nimport torch\nfrom typing import TYPE_CHECKING\nfrom llm4msr.config import MetaConfig\n"
        "import numpy as np\nif TYPE_CHECKING:\n    from llm4msr.batch import Batch\nelse:\n    import yaml\n"
        "from llm4msr import storage\n",
        [
            "llm4msr.models.meta imports numpy; models use torch and the standard library only",
            "llm4msr.models.meta imports yaml; models use torch and the standard library only",
            "llm4msr.models.meta imports llm4msr.storage",
        ],
    ),
    "llm4msr/schema.py": ("", []),
    "llm4msr/training/loop.py": (
        "from llm4msr.models import meta\nimport jobs.train\n",
        ["llm4msr.training.loop (layer 2) imports jobs.train (layer 4)"],
    ),
    "llm4msr/comparison/tables.py": (
        "import scipy.stats\nimport jobs.report\nfrom llm4msr import evaluation\n",
        [
            "llm4msr.comparison.tables imports scipy.stats; scipy belongs in llm4msr.comparison.statistics",
            "llm4msr.comparison.tables (layer 3) imports jobs.report (layer 4)",
        ],
    ),
    "llm4msr/newcomer.py": ("", ["llm4msr.newcomer has no layer; place it in LAYERS"]),
    "jobs/train.py": ("import ray\nfrom llm4msr.training import loop\n", []),
    "jobs/helpers.py": ("", ["the name says nothing about what is inside"]),
    "serve/app.py": ("x = 1\n" * 401, ["401 lines, at most 400 are allowed"]),
}


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_planted_violations_are_found(tmp_path):
    plant(tmp_path, {name: text for name, (text, _) in PLANTED.items()})
    found: dict[str, list[str]] = {name: [] for name in PLANTED}
    for line in find_violations(tmp_path):
        place, message = line.split(": ", 1)
        found[place.split(":")[0]].append(message)
    assert found == {name: messages for name, (_, messages) in PLANTED.items()}
    assert "llm4msr/data/csv.py:3: llm4msr.data.csv (layer 1)" in "\n".join(find_violations(tmp_path))


def test_a_planted_cycle_is_found(tmp_path):
    plant(tmp_path, {"jobs/a.py": "import jobs.b\n", "jobs/b.py": "from jobs import c\n", "jobs/c.py": "import jobs.a"})
    assert find_cycle(tmp_path) == ["jobs.a", "jobs.b", "jobs.c", "jobs.a"]
    plant(tmp_path, {"jobs/c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jobs.a\n"})
    assert find_cycle(tmp_path) == []


# Imports the modules named on the command line and reports what that did.
PROBE = """
import importlib, logging, os, signal, sys, threading
handlers, environment, handler = logging.root.handlers[:], dict(os.environ), signal.getsignal(signal.SIGTERM)
for name in sys.argv[1:]:
    importlib.import_module(name)
print("ray" in sys.modules and sys.modules["ray"].is_initialized())
print(logging.root.handlers == handlers, signal.getsignal(signal.SIGTERM) == handler)
print(sorted(name for name in os.environ if name.startswith("LLM4MSR_")))
print(sorted(t.name for t in threading.enumerate() if not t.daemon))
print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "ray", "transformers"}))
"""


def run_probe(folder: Path, *modules: str) -> list[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(REPOSITORY), "HOME": str(folder)}
    environment["RAY_AUTH_MODE"] = "disabled"
    command = [sys.executable, "-c", PROBE, *modules]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


def test_importing_everything_has_no_side_effects(tmp_path):
    modules = sorted(module_files(REPOSITORY))
    initialized, untouched, environment, threads, _ = run_probe(tmp_path, *modules)
    assert initialized == "False"
    assert untouched == "True True"  # root logger, SIGTERM
    assert environment == "[]"
    assert threads == "['MainThread']"
    assert list(tmp_path.iterdir()) == []


def test_light_modules_load_no_heavy_library(tmp_path):
    light = ("config", "schema", "workspace", "data.adapters", "data.synthetic", "knowledge.table", "knowledge.prompts")
    assert run_probe(tmp_path, *(f"llm4msr.{name}" for name in light))[-1] == "[]"
    assert run_probe(tmp_path, "llm4msr.models.llm4msr", "llm4msr.ranker")[-1] == "['torch']"


def test_planted_side_effects_are_seen(tmp_path):
    noisy = (
        "import logging, os, signal, threading, time\n"
        "logging.basicConfig()\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "os.environ['LLM4MSR_X'] = '1'\n"
        "open('left_behind', 'w').close()\n"
        "threading.Thread(target=time.sleep, args=(0.5,), name='busy').start()\n"
    )
    plant(tmp_path, {"noisy.py": noisy})
    _, *rest = run_probe(tmp_path, "noisy")
    assert rest == ["False False", "['LLM4MSR_X']", "['MainThread', 'busy']", "[]"]
    assert (tmp_path / "left_behind").exists()
