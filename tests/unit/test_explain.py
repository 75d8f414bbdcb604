"""What is said of subjects whose neighbours are known by hand; see `explained_workspace`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from explained_workspace import ITEMS, USERS, build, letters, liked
from tiny import NUM_USERS, tiny_prepared

from jobs.explain import main
from llm4msr import storage
from llm4msr.knowledge.engines.fitting import fit
from llm4msr.knowledge.explain import MAX_IDS, Explanation, UnknownSubjectError, explain
from llm4msr.knowledge.extraction import Extraction
from llm4msr.knowledge.nearest import mean_vector, nearest_rows
from llm4msr.knowledge.prompts import user_prompt
from llm4msr.storage import StorageError

REPOSITORY = Path(__file__).resolve().parents[2]
COSINE_AD = round(-18 / math.sqrt(340), 6)
RAW_AB = round(10080 / 10100, 6)


def ask(root: object, level: str, subject_id: str, num: int = 5, name: str | None = None) -> Explanation:
    return explain(Extraction.open(str(root), name), level, subject_id, num)


def near(neighbours) -> list[tuple[tuple[str, ...], float]]:
    return [(n.ids, n.similarity) for n in neighbours]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    uri = str(tmp_path_factory.mktemp("explain") / "ws")
    build(uri, levels=("scenario", "user", "item"))
    return uri


def test_a_user_with_everything(root):
    found = ask(root, "user", "1000")
    assert (found.level, found.subject_id, found.text, found.num_train_rows) == ("user", "1000", "user 1000", 1)
    assert (found.knowledge, found.prepared, found.chosen) == ("k1", "data", "the only one")
    assert (found.created_at, found.model) == ("2025-01-01T00:00:00+00:00", "embedded")
    assert found.prompt == found.prompt_read == USERS[0][1].text()
    assert found.num_tokens == len(found.prompt) and (found.num_dropped_events, found.num_cut_characters) == (0, 0)
    assert (found.generated_text, found.num_generated_tokens) == ("likes 1000", 7)
    assert found.has_knowledge and found.reason is None
    assert near(found.nearest_users) == [(("1001", "1002"), 0.8), (("1003",), 0), (("1005",), COSINE_AD)]
    assert found.nearest_users[0].raw_similarity == RAW_AB
    assert [n.num_ids for n in found.nearest_users] == [2, 1, 1]
    assert [n.first_line for n in found.nearest_users] == [
        "Liked in rec (1): kettle",
        "User: a cook.",
        "Liked in rec (1): fork",
    ]
    assert near(found.nearest_items) == [
        (("7001",), 1),
        (("7000",), 0),
        ((str(2**53 + 1),), round(-math.sqrt(0.5), 6)),
    ]
    assert found.nearest_items[0].first_line == "Item: a pan."
    assert [(s.name, s.similarity) for s in found.scenarios] == [("rec", 1), ("search", -1)]
    raw = (5000 + 30) / math.sqrt(10100 * 2509)
    assert found.scenarios[0].raw_similarity == pytest.approx(raw, abs=1e-6)
    assert "mean of its level" in found.notes[0] and "two scenarios lie opposite" in found.notes[1]


def test_a_user_whose_prompt_is_shared_is_near_to_the_others_who_share_it(root):
    found = ask(root, "user", "1002", num=2)
    assert near(found.nearest_users) == [(("1001",), 1), (("1000",), 0.8)]
    assert found.generated_text == "likes 1001"  # the prompt was read once, for both


def test_items_and_scenarios_are_explained_too(root):
    item = ask(root, "item", str(2**53 + 1), num=2)
    assert item.prompt == ITEMS[2][1].text() and item.generated_text == f"likes {2**53 + 1}"
    assert near(item.nearest_items) == [(("7000",), -round(math.sqrt(0.5), 6)), (("7001",), -round(math.sqrt(0.5), 6))]
    # (-5, -5) against (0, -10) and (-18, 4)
    assert near(item.nearest_users) == [
        (("1003",), round(math.sqrt(0.5), 6)),
        (("1005",), round(70 / math.sqrt(50 * 340), 6)),
    ]
    scenario = ask(root, "scenario", "search", num=1)
    assert (scenario.text, scenario.num_train_rows) == ("Searched items.", None)
    assert scenario.prompt == "Scenario search\nWhat?" and scenario.has_knowledge
    assert near(scenario.nearest_users) == [(("1005",), -COSINE_AD)]  # (-2, 0) points where D does
    assert [(s.name, s.similarity) for s in scenario.scenarios] == [("rec", -1)]


def test_who_has_no_knowledge_is_told_why(root):
    failed = ask(root, "user", "1004")
    assert (failed.has_knowledge, failed.reason) == (False, "the tokenizer raised")
    assert failed.prompt == USERS[4][1].text() and failed.prompt_read is None and failed.generated_text is None
    silent = ask(root, "user", "1020")
    assert (silent.has_knowledge, silent.prompt) == (False, None)
    assert silent.reason == "no liked training row, so there is no prompt"
    assert ask(root, "item", "7005").reason == "no text, so there is no prompt"
    for found in (failed, silent):
        assert found.nearest_users == found.nearest_items == found.scenarios == ()


def test_a_level_that_was_not_extracted(tmp_path):
    build(str(tmp_path), levels=("user",), texts=False)
    found = ask(tmp_path, "user", "1000")
    assert (found.generated_text, found.num_generated_tokens) == (None, 0)
    assert found.scenarios == () and found.nearest_items == () and len(found.nearest_users) == 3
    for level, subject_id in (("item", "7000"), ("scenario", "rec")):
        other = ask(tmp_path, level, subject_id)
        assert not other.has_knowledge and other.reason == "not extracted: knowledge.levels was user"
        assert other.nearest_users == ()


@pytest.mark.parametrize("max_tokens", [140, 125, 110, 95, 85])
def test_a_prompt_that_was_cut_is_given_whole_and_as_it_was_read(tmp_path, max_tokens):
    build(str(tmp_path), max_tokens=max_tokens)
    prompt = USERS[0][1]
    fitted = fit([prompt], letters, max_tokens)[0]
    assert fitted.num_dropped_events and fitted.error is None
    found = ask(tmp_path, "user", "1000")
    assert found.prompt == prompt.text()
    assert found.prompt_read == "".join(map(chr, fitted.token_ids))
    assert (found.num_dropped_events, found.num_cut_characters) == (
        fitted.num_dropped_events,
        fitted.num_cut_characters,
    )


def test_many_who_share_one_prompt_are_counted(tmp_path):
    crowd = [(row, user_prompt(str(999 + row), "", liked("tea")), (1, 2, 3)) for row in range(2, NUM_USERS + 1)]
    build(str(tmp_path), users=[USERS[0], *crowd], texts=False)
    (only,) = ask(tmp_path, "user", "1000").nearest_users
    assert only.num_ids == NUM_USERS - 1 and only.ids == tuple(str(1001 + i) for i in range(MAX_IDS))
    (others, _) = ask(tmp_path, "user", "1003").nearest_users
    assert others.num_ids == NUM_USERS - 2 and "1003" not in others.ids and others.similarity == 1


def test_one_vector_alone_has_no_direction(tmp_path):
    build(str(tmp_path), users=USERS[:1])
    found = ask(tmp_path, "user", "1000")
    assert found.nearest_users == () and [s.similarity for s in found.scenarios] == [0, 0]
    assert "its vector is the mean of all users: it is equally near to everything" in found.notes


def test_a_store_that_was_emptied_costs_the_texts_only(tmp_path):
    build(str(tmp_path))
    storage.remove(str(tmp_path / "knowledge" / "store"))
    found = ask(tmp_path, "user", "1000")
    assert found.prompt and found.prompt_read is None and found.generated_text is None
    assert len(found.nearest_users) == 3 and "no longer has this prompt" in found.notes[0]


def test_text_ids(tmp_path):
    prepared = tiny_prepared(str(tmp_path / "prepared" / "data"), num_rows=40, user_key_type="string")
    users = [
        (1, user_prompt("u000", "", liked("tea")), (1, 2, 3)),
        (2, user_prompt("u001", "", liked("pan")), (3, 1, 2)),
    ]
    build(str(tmp_path), users=users, prepared=prepared)
    assert near(ask(tmp_path, "user", "u001").nearest_users) == [(("u000",), -1)]
    with pytest.raises(UnknownSubjectError, match=r"no user '1000' in .*; the nearest ids are u000, u001, u002, u003$"):
        ask(tmp_path, "user", "1000")


@pytest.mark.parametrize(
    ("level", "subject_id", "message"),
    [
        ("user", "999", r"no user '999' in .*/prepared/data; the nearest ids are 1000, 1001, 1002, 1003$"),
        ("user", "4000", r"nearest ids are 1036, 1037, 1038, 1039$"),
        ("item", "7030", r"no item '7030' in .* nearest ids are 7026, 7027, 7028, 9007199254740993$"),
        ("user", "u1", r"'u1' is no user id of this data: they are int64, such as 1000, 1001, 1002, 1003$"),
        ("user", "", r"'' is no user id"),
        ("user", "1" * 30, r"'1{30}' is no user id"),
        ("user", "10\udcff", r"is no user id"),
        ("scenario", "reco", r"no scenario 'reco'; the data has \['rec', 'search'\]$"),
    ],
)
def test_unknown_subjects(root, level, subject_id, message):
    with pytest.raises(UnknownSubjectError, match=message):
        ask(root, level, subject_id)


def test_which_knowledge_is_taken(tmp_path):
    with pytest.raises(StorageError, match=r"knowledge holds no finished knowledge: run jobs\.extract first"):
        Extraction.open(str(tmp_path))
    build(str(tmp_path), "b-old", "2025-01-01T00:00:00+00:00")
    build(str(tmp_path), "a-new", "2025-02-01T00:00:00+00:00")
    build(str(tmp_path), "c-unfinished", "2025-03-01T00:00:00+00:00")
    storage.remove(str(tmp_path / "knowledge" / "c-unfinished" / "manifest.json"))
    storage.write_manifest(str(tmp_path / "knowledge" / "d-other"), {"kind": "other", "created_at": "2026"})
    storage.write_json(str(tmp_path / "knowledge" / "pointer.json"), {"directory": "b-old"})
    newest = ask(tmp_path, "user", "1000")
    assert (newest.knowledge, newest.chosen) == ("a-new", "the newest of 2")
    asked = ask(tmp_path, "user", "1000", name="b-old")
    assert (asked.knowledge, asked.chosen) == ("b-old", "as asked")
    with pytest.raises(StorageError, match=r"no finished knowledge 'c-unfinished'; there is a-new of 2025-02-01T00"):
        Extraction.open(str(tmp_path), "c-unfinished")


def test_a_workspace_in_an_object_store(bucket):
    build(f"s3://{bucket}/ws")
    found = ask(f"s3://{bucket}/ws", "user", "1000")
    assert near(found.nearest_users)[0] == (("1001", "1002"), 0.8) and found.generated_text == "likes 1000"


def test_nearest_rows_are_those_of_a_full_comparison(monkeypatch):
    rng = np.random.default_rng(0)
    vectors = rng.normal(loc=[50, 0, -20, 3, 0, 7], size=(1001, 6)).astype(np.float16)
    vectors[0] = 0
    vectors[500] = vectors[37]  # ties go by row
    exact = vectors[1:].astype(np.float64)
    exact -= exact.mean(0)
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    cosine = exact @ exact[36]
    expected = [row + 1 for row in np.argsort(-cosine, kind="stable") if row != 36][:7]
    monkeypatch.setattr("llm4msr.knowledge.nearest.BLOCK_BYTES", 4 * 6 * 64)  # many blocks, the last one short
    mean = mean_vector(vectors, 1)
    np.testing.assert_allclose(mean, vectors[1:].astype(np.float64).mean(0), rtol=1e-6)
    found = nearest_rows(vectors, mean, vectors[37].astype(np.float32) - mean, 7, without_row=37)
    assert [row for row, _ in found] == expected and expected[0] == 500
    np.testing.assert_allclose([c for _, c in found], cosine[np.array(expected) - 1], atol=1e-5)
    assert [row for row, _ in nearest_rows(vectors, mean, vectors[37] - mean, 2)] == [37, 500]


def run_cli(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jobs.explain", *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def test_cli_text_and_json(root):
    shown = run_cli("--workspace_uri", root, "--user", "1000")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert max(map(len, shown.stdout.splitlines())) <= 100
    text = " ".join(shown.stdout.split())
    for part in (
        "user 1000",
        "k1 of 2025-01-01T00:00:00+00:00, the only one",
        "User: 24 years old. Liked in rec (2): green tea; [bold]steel[/bold] pan",
        "The model's words (7 tokens) likes 1000",
        "0.800 │ 0.998 │ 1001, 1002 │ Liked in rec (1): kettle",
        "1.000 │ 0.999 │ rec",
        "Note: similarity is the cosine after the mean",
    ):
        assert part in text, part
    raw = run_cli("--workspace_uri", root, "--user", "1000", "--json", "--neighbours", "1")
    assert (raw.returncode, raw.stderr) == (0, "")
    tree = json.loads(raw.stdout)
    assert list(tree) == list(Explanation.__dataclass_fields__)
    assert tree == json.loads(json.dumps(ask(root, "user", "1000", num=1).to_json()))
    assert tree["nearest_users"] == [
        {
            "ids": ["1001", "1002"],
            "num_ids": 2,
            "similarity": 0.8,
            "raw_similarity": RAW_AB,
            "first_line": "Liked in rec (1): kettle",
        }
    ]


def test_mistakes_are_one_clear_line(root, tmp_path, capsys):
    for workspace_uri, subject_id, message in (
        (root, "77", "no user '77' in "),
        (str(tmp_path), "1000", f"{tmp_path}/knowledge holds no finished knowledge"),
    ):
        assert main(["--workspace_uri", workspace_uri, "--user", subject_id]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"python -m jobs.explain: {message}") and err.count("\n") == 1


def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path, capsys):
    (tmp_path / "knowledge" / "k1" / "manifest.json").mkdir(parents=True)
    assert main(["--workspace_uri", str(tmp_path), "--user", "1000"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"python -m jobs.explain: cannot read {tmp_path}: IsADirectoryError: ")


@pytest.mark.parametrize(
    ("aws", "message"),
    [
        ({}, "NoCredentialsError: Unable to locate credentials; give all nodes the keys of this very store"),
        (
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
            'EndpointConnectionError: Could not connect to the endpoint URL: "http://127.0.0.1:9/bucket/x/knowledge"; '
            "the store or the way to it is disturbed: see that it answers from this node, then give the same command",
        ),
    ],
)
def test_an_object_store_that_cannot_be_read_is_one_clear_line(tmp_path, aws, message):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AWS_")} | aws
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_MAX_ATTEMPTS": "1", "HOME": str(tmp_path)}
    asked = ["--workspace_uri", "s3://bucket/x", "--user", "1000"]
    probe = f"import sys; from jobs.explain import main; sys.exit(main({asked}))"
    command = [sys.executable, "-c", probe]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")
    place = "s3://bucket/x/knowledge cannot be read"
    assert result.stderr == f"python -m jobs.explain: {place}; object store: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --user --item --scenario is required"),
        (["--user", "1000", "--item", "7000"], "not allowed with argument --user"),
        (["--user", "1000", "--neighbours", "0"], "--neighbours: found 0, needed 1 or more"),
    ],
)
def test_a_wrong_command_line_ends_with_status_2(root, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(["--workspace_uri", root, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_text_of_the_special_cases(tmp_path, capsys):
    crowd = [(row, user_prompt(str(999 + row), "", liked("tea\x1b[2J" + "x" * 200)), (1, 2, 3)) for row in range(2, 9)]
    build(str(tmp_path), users=[USERS[0], *crowd], max_tokens=110, preamble="An app\x1b[0m for cooks.")

    def shown(*arguments: str) -> str:
        assert main(["--workspace_uri", str(tmp_path), *arguments]) == 0
        out = capsys.readouterr().out
        assert "\x1b" not in out and max(map(len, out.splitlines())) <= 100
        return " ".join(out.split())

    user = shown("--user", "1000")
    assert "Read before every prompt An app[0m for cooks." in user
    assert "Prompt (110 tokens read)" in user and "without 2 events and 3 characters; --json has all of it" in user
    assert "-1.000 │ 0.319 │ 1001, 1002 and 5 more │ Liked in rec (1): tea[2Jxxx" in user
    missing = shown("--user", "1030")
    assert "no knowledge: no liked training row, so there is no prompt" in missing
    assert "Nearest" not in missing and "Scenarios" not in missing
    assert "Searched items." in shown("--scenario", "search")


def test_explaining_starts_neither_ray_nor_a_model(root):
    probe = (
        "import sys; from jobs.explain import main; "
        f"main(['--workspace_uri', {root!r}, '--scenario', 'rec', '--json']); "
        "print(sorted({n.split('.')[0] for n in sys.modules} & {'ray', 'torch', 'transformers'}), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", probe], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == "[]\n", result.stderr
