"""A cluster of its own, deployed as in production, changed under load through both kinds of proxy."""

from __future__ import annotations

import time

import httpx
import pytest
from serve_load import AUTHORIZED, BODY, TOKEN, Load
from tiny import tiny_checkpoint, tiny_knowledge, tiny_prepared

from benchmarks.serve_sides import Cluster
from llm4msr.ranker import Ranker
from llm4msr.request import RankRequest


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


@pytest.mark.slow
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
    answers = load.answers
    print(load.counts())
    assert {a.status for a in answers} == {200}
    assert {a.version for a in answers} == set(expected)
    assert all(a.scores == expected[a.version] for a in answers)  # none is of two models
    assert {a.version for a in answers[after_first:middle]} == {"tiny-1"}
    assert {a.version for a in answers[-5:]} == {"tiny-0"}
