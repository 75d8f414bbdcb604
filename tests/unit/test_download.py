"""Data sets from a real server: verified, unpacked, finished once; the catalogue and the job."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from file_server import FileServer, serving
from published import DATA, QUICK, data_set, tree, zipped

from jobs import download as job
from llm4msr import storage
from llm4msr.data import download as engine
from llm4msr.data.catalogue import DATA_SETS, DataSet, RemoteFile, find_data_set
from llm4msr.data.http import DownloadError
from llm4msr.data.source import DataError
from llm4msr.settings import load_config

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[FileServer]:
    with serving() as files:
        yield files


def test_download_verifies_unpacks_and_is_done_once(server, tmp_path):
    data = zipped(
        {"raw/u.data": b"1\t2\n", "raw/": b"", "raw/deep/x.csv": DATA, "__MACOSX/raw/._x": b"", ".DS_Store": b""}
    )
    md5 = hashlib.md5(data).hexdigest()
    tiny = data_set(server, "t.zip", data, checksum_url=f"{server.url}/t.zip.md5")
    server.files["/t.zip.md5"] = f"MD5 (t.zip) = {md5}\n".encode()
    place = engine.download(tiny, str(tmp_path / "to"), patience=QUICK)
    assert place == str(tmp_path / "to" / "tiny")
    found = tree(Path(place))
    manifest = json.loads(found.pop("manifest.json"))
    assert found == {"raw/u.data": b"1\t2\n", "raw/deep/x.csv": DATA}
    assert not (Path(place) / ".download").exists()
    assert manifest["files"] == {"raw/u.data": 4, "raw/deep/x.csv": len(DATA)}
    assert manifest["origins"] == [
        {
            "url": f"{server.url}/t.zip",
            "num_bytes": len(data),
            "md5": md5,
            "sha256": hashlib.sha256(data).hexdigest(),
            "compared_with": f"{server.url}/t.zip.md5",
            "verified_by": f"{server.url}/t.zip.md5",
        }
    ]
    num_requests = len(server.requests)
    assert engine.download(tiny, str(tmp_path / "to"), patience=QUICK) == place
    assert len(server.requests) == num_requests
    (Path(place) / "raw" / "u.data").unlink()  # half of it was deleted
    engine.download(tiny, str(tmp_path / "to"), patience=QUICK)
    assert (Path(place) / "raw" / "u.data").exists()


def test_wrong_bytes_are_deleted(server, tmp_path):
    good = zipped({"raw/a": b"right"})
    md5, sha256 = hashlib.md5(good).hexdigest(), hashlib.sha256(good).hexdigest()
    for known in ({"md5": md5}, {"sha256": sha256}, {"md5": md5, "sha256": sha256}):
        tiny = data_set(server, "t.zip", zipped({"raw/a": b"wrong"}), **known)
        with pytest.raises(
            DownloadError, match=r"t.zip: wrong bytes: (md5|sha256) [0-9a-f]+ found, .* by the catalogue;"
        ):
            engine.download(tiny, str(tmp_path), patience=QUICK)
        assert tree(tmp_path) == {}
    server.files["/t.zip"] = good
    engine.download(tiny, str(tmp_path), patience=QUICK)
    assert (tmp_path / "tiny" / "raw" / "a").read_bytes() == b"right"


def test_without_a_checksum_nothing_is_called_verified(server, tmp_path, caplog):
    data = zipped({"raw/a": b"1"})
    tiny = data_set(server, "t.zip", data, checksum_url=f"{server.url}/none.md5")
    place = engine.download(tiny, str(tmp_path), patience=QUICK)
    (origin,) = json.loads((Path(place) / "manifest.json").read_text())["origins"]
    assert origin["verified_by"] is origin["compared_with"] is None
    assert origin["sha256"] == hashlib.sha256(data).hexdigest()
    assert f"NOT verified, as no checksum is published; its sha256 is {origin['sha256']}" in caplog.text
    assert ": verified" not in caplog.text
    server.faults = [(500, {})] * 9
    with pytest.raises(DownloadError, match=r"none.md5: failed 4 times"):  # it may be there: no excuse
        engine.download(tiny, str(tmp_path / "again"), patience=QUICK)


def test_a_mirror_is_asked_for_everything_and_proves_nothing(server, tmp_path, caplog):
    data = zipped({"raw/a": b"1"})
    for path, content in (("/m/t.zip", data), ("/m/t.zip.md5", hashlib.md5(data).hexdigest().encode())):
        server.files[path] = content
    file = RemoteFile("https://publisher.invalid/files/t.zip?download=1", zenodo_record=1)
    tiny = DataSet("tiny", (file,), "free", "http://home")
    place = engine.download(tiny, str(tmp_path), mirror=f"{server.url}/m/", patience=QUICK)
    assert [path for path, _ in server.requests] == ["/m/t.zip.md5", "/m/t.zip"]
    (origin,) = json.loads((Path(place) / "manifest.json").read_text())["origins"]
    assert (origin["compared_with"], origin["verified_by"]) == (f"{server.url}/m/t.zip.md5", None)
    assert f"NOT verified, as the mirror alone says so ({server.url}/m/t.zip.md5)" in caplog.text
    known = DataSet("known", (RemoteFile(file.url, md5=hashlib.md5(data).hexdigest()),), "free", "http://home")
    place = engine.download(known, str(tmp_path), mirror=f"{server.url}/m/", patience=QUICK)
    (origin,) = json.loads((Path(place) / "manifest.json").read_text())["origins"]
    assert origin["verified_by"] == "the catalogue"


def test_checksums_as_published():
    md5 = "0E33842E24A9C977BE4E0107933C0723"
    for text in (
        f"MD5 (ml-100k.zip) = {md5}\n",
        f"{md5}  ml-100k.zip\n",
        f"{'1' * 32}  other.zip\n{md5} *./ml-100k.zip\r\n",
        f" \n{md5}\n".lstrip(" "),
    ):
        assert engine.parse_md5(text, "ml-100k.zip", "u") == md5.lower()
    for text in (f"MD5 (ml-1m.zip) = {md5}", f"{md5}  ml-1m.zip", f"{md5}0", "<html>not found</html>", ""):
        with pytest.raises(DownloadError, match=r"u: no MD5 of ml-100k.zip in it; found "):
            engine.parse_md5(text, "ml-100k.zip", "u")
    record = {
        "files": [{"key": "b", "size": 1, "checksum": "md5:" + "2" * 32}, {"key": "a", "size": 7, "checksum": ""}]
    }
    assert engine.parse_zenodo(json.dumps(record), "b", "u") == engine.Expected("2" * 32, None, 1, "u")
    for text, name in ((json.dumps(record), "c"), ("<html>", "b"), ("[]", "b"), ('{"files": 1}', "b")):
        with pytest.raises(DownloadError, match="u: does not describe a file "):
            engine.parse_zenodo(text, name, "u")
    with pytest.raises(DownloadError, match="an md5 was expected"):
        engine.parse_zenodo(json.dumps(record), "a", "u")


def test_a_wrong_size_is_told(server, tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    with pytest.raises(DownloadError, match="num_bytes 2 found, 3 expected by somebody"):
        engine.verify(tmp_path / "a", "u", engine.Expected(num_bytes=3, source="somebody"))
    assert not (tmp_path / "a").exists()


def test_a_target_with_something_else_is_refused(server, tmp_path):
    tiny = data_set(server, "t.zip", zipped({"raw/a": b"1"}))
    storage.write_manifest(str(tmp_path / "tiny"), {"kind": "prepared"})
    with pytest.raises(DownloadError, match=r"holds something else already \('prepared'\); choose another folder"):
        engine.download(tiny, str(tmp_path), patience=QUICK)


def test_the_catalogue():
    assert {"kuaisar-small", "kuaisar", "movielens-100k", "movielens-1m", "amazon-2018-5core"} <= set(DATA_SETS)
    for name, one in DATA_SETS.items():
        assert one.name == name and one.licence and one.homepage and (one.recipe or one.note)
        assert one.recipe is None or (REPOSITORY / "jobs" / "recipes" / one.recipe).is_file()
        names = [file.name for file in one.files]
        assert names and len(set(names)) == len(names)
        for file in one.files:
            assert file.url.startswith("https://") and (file.checksum_url or "https://").startswith("https://")
            assert urlsplit(file.url).path.endswith((".zip", ".tar.gz", ".json.gz"))
    assert find_data_set("kuaisar-small").files[0].sha256.startswith("ed8afa12196cbf18")
    with pytest.raises(DataError, match=r"no data set is named 'movielens-10k'; .* Did you mean 'movielens-100k'\?"):
        find_data_set("movielens-10k")


def test_recipes_look_where_the_download_lands():
    for recipe, name in (
        ("movielens_100k.toml", "movielens-100k"),
        ("compare_movielens.toml", "movielens-100k"),
        ("amazon_reviews.toml", "amazon-2018-5core"),
        ("kuaisar_small.toml", "kuaisar-small"),
        ("kuaisar.toml", "kuaisar"),
    ):
        path = REPOSITORY / "jobs" / "recipes" / recipe
        text, place = path.read_text(encoding="utf-8"), load_config(["--config", str(path)], environ={}).data.raw_uri
        assert place == storage.join("data", name, DATA_SETS[name].raw_folder).rstrip("/")
        assert f"python -m jobs.download {name} --to data" in text


def test_make_compare_takes_data_from_beside_the_repository_only_where_they_are(tmp_path):
    there = tmp_path / "shared" / "data" / "amazon-food-kitchen"
    clone = tmp_path / "clone"
    (clone / ".venv").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".venv/.installed"):
        (clone / name).touch()
    shutil.copy(REPOSITORY / "Makefile", clone)

    def command(*arguments: str) -> str:
        make = ["make", "--no-print-directory", "-n", "compare", *arguments]
        return subprocess.run(make, cwd=clone, capture_output=True, text=True, check=True).stdout

    assert "--config" in command() and "raw_uri" not in command()
    there.mkdir(parents=True)
    assert '--data.raw_uri "../shared/data/amazon-food-kitchen"' in command()
    assert "amazon-food-kitchen" in command("RECIPE=jobs/recipes/compare_ablations.toml")
    assert "raw_uri" not in command("RECIPE=jobs/recipes/compare_movielens.toml")
    assert '--data.raw_uri "s3://b/d"' in command("DATA=s3://b/d")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "jobs.download", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True)


def test_the_job(server, tmp_path):
    data = zipped({"ml-100k/u.data": b"1\t2\t3\t4\n"})
    server.files |= {"/ml-100k.zip": data, "/ml-100k.zip.md5": hashlib.md5(data).hexdigest().encode()}
    arguments = ("movielens-100k", "--to", str(tmp_path), "--mirror", server.url)
    for _ in range(2):
        result = run(*arguments)
        assert result.returncode == 0, result.stderr
        place = tmp_path / "movielens-100k"
        assert result.stdout.splitlines()[-1].strip() == (
            f"python -m jobs.prepare --config jobs/recipes/movielens_100k.toml --data.raw_uri {place}/ml-100k"
        )
        assert "licence: GroupLens" in result.stdout
    assert "is there already" in result.stderr and len(server.requests) == 2
    server.files["/ml-100k.zip"] = b"wrong"
    result = run("movielens-100k", "--to", str(tmp_path / "b"), "--mirror", server.url)
    assert result.returncode == 2 and "wrong bytes: md5" in result.stderr and "Traceback" not in result.stderr


def test_the_job_through_a_proxy(server, tmp_path):
    # A proxy is asked for whole addresses.
    server.files["http://publisher.invalid/files/ml-100k.zip"] = zipped({"ml-100k/u.data": b"1"})
    proxy = {"HTTP_PROXY": server.url, "http_proxy": server.url, "NO_PROXY": "", "no_proxy": ""}
    arguments = ("movielens-100k", "--to", str(tmp_path), "--mirror", "http://publisher.invalid/files")
    result = run(*arguments, **proxy)
    assert result.returncode == 0, result.stderr
    assert "NOT verified" in result.stderr
    assert [path for path, _ in server.requests] == [
        "http://publisher.invalid/files/ml-100k.zip.md5",
        "http://publisher.invalid/files/ml-100k.zip",
    ]


def test_the_list_and_wrong_arguments(capsys):
    assert job.main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in DATA_SETS) and "4.7 MiB" in shown and "CC BY-NC-SA 4.0" in shown
    assert job.main(["kuaisar-smal", "--to", "x"]) == 2
    assert "Did you mean 'kuaisar-small'?" in capsys.readouterr().err
    for wrong in (["kuaisar"], [], ["kuaisar", "--to", "x", "--mirror", "file:///etc"]):
        with pytest.raises(SystemExit):
            job.main(wrong)
