"""What a comparison trains and where it lies: models, extractions, changes that are refused; without Ray."""

from __future__ import annotations

import pytest
from tiny import tiny_config

from llm4msr import storage, workspace
from llm4msr.comparison.plan import extractions, model_configs, plan_comparison
from llm4msr.comparison.results import control_pairs
from llm4msr.config import ConfigError
from llm4msr.knowledge.place import knowledge_pointer_uri
from llm4msr.settings import with_values
from llm4msr.training.run import plan_runs


def make(root, **compare):
    """A configuration whose data and knowledge are there."""
    section = {"backbones": ["star"], "knowledge": ["none", "llm"], "learning_rates": [0.01, 0.1]} | compare
    config = tiny_config(workspace_uri=str(root), experiment={"seeds": [0, 1]}, compare=section)
    for pointer_uri, each in ((workspace.prepared_pointer_uri, [config]), (knowledge_pointer_uri, extractions(config))):
        for one in each:
            pointer = pointer_uri(one)
            folder = "-".join(one.knowledge.levels)
            storage.write_json(pointer, {"directory": folder})
            storage.write_manifest(storage.join(pointer.rsplit("/", 1)[0], folder), {"kind": "made"})
    return config


def test_models_are_backbones_times_variants(tmp_path):
    variant = {"name": "user level only", "set": {"model.meta.scenario_level": False}}
    config = make(
        tmp_path,
        backbones=["star", "shared_bottom"],
        variants=[variant],
        backbone_settings={"shared_bottom": {"model.tower_dims": [4], "model.dropout": 0.5}},
    )
    planned = plan_comparison(config)
    names = [(m.backbone, m.variant, m.knowledge) for m in planned.models]
    kinds = [("none", "none"), ("llm", "llm"), ("user level only", "llm")]
    assert names == [(backbone, *kind) for backbone in ("star", "shared_bottom") for kind in kinds]
    for model in planned.models:
        assert list(model.tuning) == list(model.runs) == [0.01, 0.1]
        for rate, task in model.tuning.items():
            assert task.run_uri == model.runs[rate][0].run_uri  # the same run, so it is trained once
            assert [other.seed for other in model.runs[rate]] == [0, 1]
            changed = task.config
            assert (changed.train.learning_rate, changed.train.num_workers) == (rate, 0)
            assert changed.model.backbone == model.backbone
            assert changed.model.dropout == (0.5 if model.backbone == "shared_bottom" else 0.1)
            assert changed.model.meta.scenario_level == (model.variant != "user level only")
    everything = {task.name for m in planned.models for tasks in m.runs.values() for task in tasks}
    assert len(everything) == 6 * 2 * 2

    # jobs.train of the same configuration is the same run.
    same = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 0.1})})
    same = same.model_copy(update={"experiment": same.experiment.model_copy(update={"knowledge": ("llm",)})})
    assert [task.name for task in plan_runs(same)] == [task.name for task in planned.models[1].runs[0.1]]


def test_the_embedding_rate_keeps_its_ratio(tmp_path):
    config = make(tmp_path)
    train = config.train.model_copy(update={"learning_rate": 0.02, "embedding_learning_rate": 0.1})
    (none, _) = plan_comparison(config.model_copy(update={"train": train})).models
    rates = [task.config.train.embedding_learning_rate for task in none.tuning.values()]
    assert rates == pytest.approx([0.05, 0.5])


def test_place_follows_from_what_the_result_depends_on(tmp_path):
    place = plan_comparison(make(tmp_path)).uri
    assert place.startswith(f"{tmp_path}/compare-")
    same = [{"max_concurrent": 1}, {"cpus_per_run": 2}, {"gpus_per_run": 0.5}]
    assert {plan_comparison(make(tmp_path, **other)).uri for other in same} == {place}
    others = [
        {"learning_rates": [0.01]},
        {"tuning_seed": 3},
        {"reference": "llm"},
        {"cold_max_rows": 5},
        {"backbones": ["shared_bottom"]},
        {"variants": [{"name": "x", "set": {"train.weight_decay": 0.5}}]},
    ]
    found = {plan_comparison(make(tmp_path, **other)).uri for other in others}
    assert len(found | {place}) == 7


def test_other_evaluations_have_another_place(tmp_path, monkeypatch):
    place = plan_comparison(make(tmp_path)).uri
    monkeypatch.setattr("llm4msr.comparison.plan.EVALUATION_VERSION", 99)
    assert plan_comparison(make(tmp_path)).uri != place


def test_controls_differ_in_the_kind_of_knowledge_alone(tmp_path):
    full = {"model.meta.weight_form": "full"}
    variants = [
        {"name": "full", "set": full},
        {"name": "full, shuffled", "knowledge": "shuffled", "set": full},
        {"name": "user level only", "set": {"model.meta.scenario_level": False}},
    ]
    kinds = ["none", "llm", "shuffled", "random"]
    settings = {"star": {"model.dropout": 0.3}}
    backbones = ["star", "shared_bottom"]
    planned = plan_comparison(
        make(tmp_path, backbones=backbones, knowledge=kinds, variants=variants, backbone_settings=settings)
    )
    of_each = [("llm", "shuffled"), ("llm", "random"), ("full", "full, shuffled")]
    assert control_pairs(planned) == [(backbone, *pair) for backbone in backbones for pair in of_each]
    assert control_pairs(plan_comparison(make(tmp_path))) == []


def test_values_at_dotted_keys_leave_the_tree_as_it_was():
    tree = {"model": {"dropout": 0.1, "meta": {"rank": 2}}, "name": 1}
    changed = with_values(tree, {"model.meta.rank": 3, "model.meta.new": 4, "name.x": 5, "train.seed": 6})
    assert changed == {
        "model": {"dropout": 0.1, "meta": {"rank": 3, "new": 4}},
        "name": {"x": 5},
        "train": {"seed": 6},
    }
    assert tree == {"model": {"dropout": 0.1, "meta": {"rank": 2}}, "name": 1}


def test_each_extraction_is_listed_once_those_of_most_levels_first(tmp_path):
    items = {"knowledge.levels": ["scenario", "user", "item"]}
    variants = [
        {"name": "items", "set": items},
        {"name": "items alone", "set": items | {"model.meta.user_level": False, "model.meta.scenario_level": False}},
        {"name": "full", "set": {"model.meta.weight_form": "full"}},
        {"name": "none without", "knowledge": "none", "set": {"knowledge.max_tokens": 99}},
    ]
    config = make(tmp_path, variants=variants)
    assert [c.knowledge.levels for c in extractions(config)] == [("scenario", "user", "item"), ("scenario", "user")]
    by_name = {model.variant: model.tuning[0.01] for model in plan_comparison(config).models}
    assert by_name["items"].knowledge_uri == by_name["items alone"].knowledge_uri != by_name["full"].knowledge_uri
    assert by_name["none"].name == by_name["none without"].name
    assert extractions(make(tmp_path, knowledge=["none"])) == []


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        ({"backbones": []}, "backbones = []: give at least one value, each once"),
        ({"learning_rates": [0.1, 0.1]}, "learning_rates = [0.1, 0.1]: give at least one value, each once"),
        ({"learning_rates": [0.0]}, "greater than 0"),
        ({"knowledge": ["none", "none"]}, "'none' is there twice"),
        ({"knowledge": ["none", "llm"], "variants": [{"name": "llm"}]}, "'llm' is there twice"),
        ({"reference": "llm"}, "reference = 'llm': no such variant; valid: none"),
        (
            {"backbones": ["mmoe"], "backbone_settings": {"star": {"model.dropout": 0.3}}},
            "backbone_settings has 'star', which is not compared: backbones = ['mmoe']",
        ),
        ({"variants": [{"name": "x", "sett": {}}]}, "Did you mean compare.variants.0.set?"),
        ({"variants": [{"name": "x", "knowledge": "lm"}]}, "compare.variants.0.knowledge"),
    ],
)
def test_a_section_that_cannot_be_used(compare, message):
    with pytest.raises(ConfigError) as error:
        tiny_config(compare={"knowledge": ["none"]} | compare)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("compare", "message"),
    [
        (
            {"variants": [{"name": "x", "set": {"data.seed": 3}}]},
            r"compare\.variants\.0\.set: 'data\.seed' cannot be changed by it: give dotted keys of model, train or",
        ),
        ({"variants": [{"name": "x", "set": {"train.learning_rate": 3}}]}, r"'train\.learning_rate' cannot be changed"),
        (
            {"backbone_settings": {"star": {"model.backbone": "x"}}},
            r"backbone_settings\.star: 'model\.backbone' cannot",
        ),
        (
            {"variants": [{"name": "x", "set": {"model.meta.rankk": 3}}]},
            r"with variant 'x' of jobs\.compare: model\.meta\.rankk: no such .* Did you mean model\.meta\.rank\?",
        ),
        ({"variants": [{"name": "x", "set": {"model.mta.rank": 3}}]}, r"model\.mta: no such configuration key"),
        ({"variants": [{"name": "x", "set": {"model.dropout.x": 3}}]}, r"with variant 'x' of jobs\.compare: model"),
        ({"variants": [{"name": "x", "set": {"model.dropout": 3}}]}, r"model\.dropout: .*less than 1"),
    ],
)
def test_changes_that_are_refused(compare, message):
    with pytest.raises(ConfigError, match=message):
        model_configs(tiny_config(compare=compare))


def test_sharded_tables_are_refused():
    train = {"num_workers": 2, "batch_size": 64, "embedding_optimizer": "rowwise_adagrad"}
    with pytest.raises(ConfigError, match=r"a run of jobs\.compare is one process"):
        model_configs(tiny_config(model={"embedding_sharding": "sharded"}, train=train))
