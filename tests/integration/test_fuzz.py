"""The endpoint under requests that nobody thought of: made by schemathesis of our own OpenAPI, sent over HTTP."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from live_site import Site
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from serve.api import Limits, build_api
from serve.explain import KnowledgeSource
from serve.gate import Gate, describe_tokens
from serve.served import Served
from serve.tokens import Tokens

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "unit"))
from explained_workspace import build_with_checkpoint

TOKEN = "a-token-of-the-fuzzer-1"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)
# What scenarios and ids the model has is no matter of the schema: what fits the schema may be refused (422). And the
# token is in every request, which the check of tokens takes for one of its own inventions; test_gate.py has those.
NOT_ASKED = [positive_data_acceptance, ignored_auth]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "ws"
    uri = build_with_checkpoint(str(root))
    served = Served()
    served.change({"checkpoint_uri": uri})
    limits = Limits(max_candidates=50, max_batch=3, candidate_sets={"new": [7003, 7001]})
    api = build_api(served, limits, KnowledgeSource(str(root / "knowledge" / "k1")))
    describe_tokens(api)
    site = Site(Gate(api, Tokens({"LLM4MSR_TOKENS": TOKEN}), 2**16, 64, lambda record: None))
    yield site
    site.close()


@pytest.fixture(scope="module")
def description(site):
    return httpx.get(f"{site.url}openapi.json", headers=AUTHORIZED).raise_for_status().json()


def own_names(description: dict) -> dict:
    """Narrows requests to users, items and scenarios of the model, so that most are answered; answers stay as wide."""
    known = {"user": [1000, 1001, 99], "scenario": ["rec", "search"], "item": [7000, 7001, 5]}
    description = copy.deepcopy(description)
    schemas = description["components"]["schemas"]
    for name in [name for name in schemas if name.endswith("Body")]:
        schemas[f"{name}Known"] = narrow = _to_known(schemas[name])
        fields = narrow["properties"]
        fields |= {field: {"enum": known[field]} for field in known.keys() & fields.keys()}
        if "scenarios" in fields:
            fields["scenarios"] = {"type": "array", "items": {"enum": known["scenario"]}, "minItems": 1, "maxItems": 2}
        if "items" in fields:
            fields["items"] = {"type": "array", "items": {"enum": known["item"]}, "minItems": 1, "maxItems": 5}
            narrow["required"] = [*narrow["required"], "items"]
            for field in ("candidate_set", "context", "knowledge"):  # which go with one model or another
                fields.pop(field, None)
    for operation in (operation for path in description["paths"].values() for operation in path.values()):
        if "requestBody" in operation:
            operation["requestBody"] = _to_known(operation["requestBody"])
        for parameter in operation.get("parameters", []):
            if parameter["name"] in known:
                parameter["schema"] = {"enum": known[parameter["name"]]}
    return description


def _to_known(tree: dict) -> dict:
    return json.loads(re.sub(r'(#/components/schemas/\w+Body)"', r'\1Known"', json.dumps(tree)))


def fuzz(site: Site, description: dict) -> Counter:
    """Sends what schemathesis makes of a description; returns the answers by path and status."""
    schema = schemathesis.openapi.from_dict(description)
    schema.config.update(base_url=site.url.rstrip("/"), headers=AUTHORIZED)
    answers = Counter()
    with httpx.Client() as client:
        assert client.get(f"{site.url}v1/model", headers=AUTHORIZED).status_code == 200
    for found in schema.get_all_operations():
        operation = found.ok()

        def send(case):
            response = case.call_and_validate(excluded_checks=NOT_ASKED)
            answers[case.operation.path, response.status_code] += 1

        FUZZ(given(operation.as_strategy())(send))()
    return answers


def test_whatever_the_schema_allows(site, description):
    answers = fuzz(site, description)

    assert {path for path, _ in answers} == set(description["paths"])
    assert not [status for _, status in answers if status >= 500]


def test_requests_that_are_answered(site, description):
    answers = fuzz(site, own_names(description))

    assert not [status for _, status in answers if status >= 500]
    for path in ("/v1/rank", "/v1/rank:batch", "/v1/compare", "/v1/explain"):
        assert answers[path, 200] >= 5, f"{path}: too few requests were answered to tell: {answers}"
