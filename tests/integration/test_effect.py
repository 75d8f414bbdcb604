"""The claim of the project: on data with a planted effect, knowledge helps in every scenario; the control does not."""

from __future__ import annotations

from test_jobs import RECIPE

from jobs.evaluate import evaluate
from jobs.extract import extract
from jobs.prepare import prepare
from jobs.train import train
from llm4msr.settings import load_config

MIN_GAIN = 0.01


def test_knowledge_beats_the_backbone_and_shuffled_knowledge_does_not(ray_cluster, tmp_path):
    """The demo's recipe with fewer users; the full one is what `make demo` prints."""
    flags = ["--workspace_uri", str(tmp_path), "--data.synthetic.num_users", "800", "--train.num_workers", "0"]
    config = load_config(["--config", RECIPE, *flags], environ={})
    prepare(config)
    extract(config)
    train(config)
    auc = {
        (r["knowledge"], r["scenario"]): r["auc"] for r in evaluate(config) if r["split"] == "test" and r["seed"] == 0
    }
    for scenario in ("recommendation", "search"):
        assert auc["llm", scenario] >= auc["none", scenario] + MIN_GAIN, auc
        assert auc["shuffled", scenario] < auc["none", scenario] + MIN_GAIN, auc
