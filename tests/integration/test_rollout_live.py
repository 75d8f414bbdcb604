"""A cluster of its own, deployed as in production, changed under load through both kinds of proxy."""

from __future__ import annotations

import threading
import time
from collections import Counter

import httpx
import pytest
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from benchmarks.serve_sides import Cluster
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest

TOKEN = "a-valid-token-0123456"
BODY = {"user": 1000, "scenario": "rec", "items": [7000, 7001, 7002, 7003]}
NUM_CLIENTS = 4


AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}


class Load:
    """Clients that ask all the time, until the end of the block; then what they got."""

    def __init__(self, url: str) -> None:
        self.url, self.answers, self.stop = url, [], threading.Event()
        self.threads = [threading.Thread(target=self.ask) for _ in range(NUM_CLIENTS)]

    def ask(self) -> None:
        with httpx.Client(headers=AUTHORIZED, timeout=30) as client:
            while not self.stop.is_set():
                try:
                    answer = client.post(f"{self.url}/v1/rank", json=BODY)
                    found = answer.json() if answer.status_code == 200 else {}
                    self.answers.append((answer.status_code, found.get("model_version"), scores(found)))
                except httpx.HTTPError as error:
                    self.answers.append((type(error).__name__, None, ()))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join()


def scores(answer: dict) -> tuple:
    return tuple((r["item"], round(r["score"], 5)) for r in answer.get("results", ()))


@pytest.fixture(scope="module")
def uris(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    prepared = tiny_prepared(str(folder / "prepared"))
    uris = {
        name: tiny_checkpoint(str(folder / name), prepared, tiny_knowledge(), seed=seed)
        for seed, name in enumerate(("first", "second", "damaged"))
    }
    (folder / "damaged" / "model.safetensors").write_bytes(b"{}")
    return uris


@pytest.mark.parametrize("proxy", ["haproxy", "default"])
def test_nobody_notices_a_new_model_a_refused_one_and_the_way_back(uris, tmp_path_factory, proxy):
    expected = {}
    for name in ("first", "second"):
        answer = Ranker.from_checkpoint(uris[name]).rank(RankRequest(**BODY))
        expected[answer.model_version] = tuple((r.item, round(r.score, 5)) for r in answer.results)
    folder, two = tmp_path_factory.mktemp(proxy[:2]), {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.5}}
    with Cluster(folder, uris["first"], proxy == "haproxy", deployment=two, token=TOKEN) as cluster:

        def version() -> str:
            return httpx.get(f"{cluster.url}/v1/model", headers=AUTHORIZED, timeout=10).json()["model_version"]

        assert httpx.post(f"{cluster.url}/v1/rank", json=BODY, timeout=10).status_code == 401
        with Load(cluster.url) as load:
            assert "tiny-1 is served. Back: " in cluster.rollout("--checkpoint_uri", uris["second"])
            after_first = len(load.answers)
            refused = cluster.rollout("--checkpoint_uri", uris["damaged"], expected=2)
            assert "model.safetensors" in refused and version() == "tiny-1"
            assert "tiny-1 is served, beside it" in cluster.rollout("--canary_uri", uris["first"], "--share", "1")
            middle = len(load.answers)
            assert "tiny-0 is served" in cluster.rollout("--back")
            time.sleep(1)
    print(Counter((status, version) for status, version, _ in load.answers))
    assert {status for status, _, _ in load.answers} == {200}
    assert {version for _, version, _ in load.answers} == set(expected)
    assert all(found == expected[version] for _, version, found in load.answers)  # none is of two models
    assert {version for _, version, _ in load.answers[after_first:middle]} == {"tiny-1"}
    assert {version for _, version, _ in load.answers[-5:]} == {"tiny-0"}
