"""The report of a comparison: tables as Markdown and HTML, and plots that are images."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from llm4msr.comparison import tables
from llm4msr.comparison.html import POLICY, write_html
from llm4msr.comparison.plots import draw_plots
from llm4msr.comparison.results import control_summaries, scenario_summaries, slice_summaries

NAMES = [("star", "none"), ("star", "llm"), ("m&m", "none"), ("m&m", "<b>$x_1$|y</b>")]


def record(backbone, variant, seed, rng):
    def metrics(shift=0.0):
        auc = float(0.6 + shift + rng.normal() / 100)
        return {"auc": auc, "gauc": auc, "log_loss": 0.5, "calibration": 1.0, "num_rows": 12_345, "num_positives": 9}

    gain = 0.0 if variant == "none" else 0.05
    places = [(split, scenario) for split in ("valid", "test") for scenario in ("all", "food", "home")]
    slices = [("user activity", "0"), ("user activity", "1-3"), ("user activity", "4+")]
    slices += [(kind, name) for kind in ("user", "item") for name in ("cold", "warm")]
    score = np.arange(10) / 10
    return {
        **{"run": f"{backbone}-{variant}-{seed}", "backbone": backbone, "variant": variant, "knowledge": "llm"},
        **{"seed": seed, "learning_rate": 0.01, "chosen": True, "best_epoch": 1},
        "evaluation": [{"split": s, "scenario": c, **metrics(gain)} for s, c in places],
        "detail": {
            "counted": "positives",
            "slices": [
                {"split": s, "scenario": c, "kind": k, "slice": n, **metrics(gain)}
                for s, c in places
                for k, n in slices
            ],
            "reliability": [
                {"split": s, "scenario": c, "mean_score": x, "mean_label": x**2, "num_rows": 7}
                for s, c in places
                for x in score.tolist()
            ],
        },
        "history": [{"epoch": e, "valid_auc": 0.6 + e / 100} for e in range(3)],
    }


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    records = [record(b, v, seed, rng) for b, v in NAMES for seed in range(3)]
    return {
        "records": records,
        "scenarios": scenario_summaries(records, NAMES, "none"),
        "activity": slice_summaries(records, NAMES, "none", ["user activity"]),
        "cold": slice_summaries(records, NAMES, "none", ["user", "item"]),
        "models": NAMES,
        "reference": "none",
    }


# ---------------------------------------------------------------- tables


def test_cells_of_gain():
    gain = {"num_seeds": 3, "mean": 0.0123, "std": 0.004, "rela_impr": 0.0581, "p": 0.0317}
    assert tables.gain_cells(gain) == ("+0.0123 ± 0.0040", "+5.8%", "0.032 (3)")
    assert tables.gain_cells(gain | {"p": 1e-5, "mean": -0.2})[::2] == ("-0.2000 ± 0.0040", "< 0.001 (3)")
    single = {"num_seeds": 1, "mean": 0.1, "std": None, "rela_impr": None, "p": None}
    assert tables.gain_cells(single) == ("+0.1000", "–", "– (1)")
    assert tables.gain_cells(None) == ("", "", "")


def test_a_table_per_scenario_all_of_them_last(world):
    grids = tables.scenario_grids(world["scenarios"], {("star", "none"): 0.001, ("star", "llm"): None})
    assert [grid.title for grid in grids] == ["Scenario food", "Scenario home", "All scenarios together"]
    food = grids[0]
    assert food.remark == "12,345 rows of test"
    assert [row[:2] for row in food.rows] == NAMES
    assert all(len(row) == len(food.headings) for row in food.rows)
    cells = dict(zip(food.headings, food.rows[0], strict=True))
    aucs = [r["evaluation"][4]["auc"] for r in world["records"][:3]]
    assert cells["AUC"] == f"{np.mean(aucs):.4f} ± {np.std(aucs, ddof=1):.4f}"
    assert (cells["gain"], cells["learning rate"], cells["seeds"]) == ("", "0.001", "3")
    cells = dict(zip(food.headings, food.rows[1], strict=True))
    assert cells["gain"].startswith("+0.0") and cells["learning rate"] == "–"
    assert re.fullmatch(r"(0\.\d{3}|< 0\.001) \(3\)", cells["p (n)"])


def test_gains_of_all_scenarios_stand_side_by_side(world):
    grid = tables.gain_grid(world["scenarios"], "none")
    assert grid.headings == ("backbone", "variant", "food", "home", "all scenarios")
    gains = {(r["backbone"], r["variant"], r["scenario"]): r["gain"] for r in world["scenarios"]}
    assert [row[:2] for row in grid.rows] == [name for name in NAMES if name[1] != "none"]
    for backbone, variant, *cells in grid.rows:
        for scenario, cell in zip(("food", "home", "all"), cells, strict=True):
            gain = gains[backbone, variant, scenario]
            mark = " *" if gain["p"] < 0.05 else ""
            assert cell == f"{gain['mean']:+.4f} ± {gain['std']:.4f}{mark}"
    changed = [{**row, "gain": row["gain"] and {**row["gain"], "p": 0.05}} for row in world["scenarios"]]
    assert "*" not in str(tables.gain_grid(changed, "none").rows)
    changed = [{**row, "gain": None if row["scenario"] == "home" else row["gain"]} for row in world["scenarios"]]
    assert tables.gain_grid(changed, "none").rows[0][3] == "–"


def test_cold_and_warm_apart(world):
    grids = tables.slice_grids(world["cold"])
    assert [grid.title for grid in grids] == ["Cold users", "Warm users", "Cold items", "Warm items"]
    empty = [row | {"num_rows": 0} if row["slice"] == "cold" else row for row in world["cold"]]
    assert [grid.title for grid in tables.slice_grids(empty)] == ["Warm users", "Warm items"]


def test_learning_rates_show_choice_and_failure():
    tuning = [
        {"learning_rate": 0.1, "valid_auc": 0.61234, "state": "finished"},
        {"learning_rate": 0.2, "valid_auc": None, "state": "failed"},
    ]
    model = {"backbone": "star", "variant": "llm", "learning_rate": 0.1, "tuning": tuning, "num_parameters": 1234}
    grid = tables.tuning_grid([model | {"at_edge": False}, model | {"at_edge": True}])
    assert grid.headings == ("backbone", "variant", "0.1", "0.2", "parameters")
    assert grid.rows == (
        ("star", "llm", "0.6123 *", "failed", "1,234"),
        ("star", "llm", "0.6123 * edge", "failed", "1,234"),
    )


def test_gains_over_controls_have_a_row_per_scenario(world):
    pairs = [("star", "llm", "none"), ("star", "llm", "shuffled")]
    grid = tables.control_grid(control_summaries(world["records"], pairs))
    assert [row[:4] for row in grid.rows] == [(s, *pair) for s in ("food", "home", "all") for pair in pairs]
    assert all(len(row) == len(grid.headings) for row in grid.rows)
    aucs = [[r["evaluation"][4]["auc"] for r in world["records"][i : i + 3]] for i in (0, 3)]
    differences = np.subtract(*aucs[::-1])
    assert grid.rows[0][4] == f"{differences.mean():+.4f} ± {differences.std(ddof=1):.4f}"
    assert grid.rows[0][6].endswith(" (3)") and grid.rows[1][4:] == ("–", "–", "–")


def test_what_weakens_the_figures_is_said():
    summary = {
        "models": [{}] * 5,
        "num_learning_rates_at_edge": 0,
        "trained_otherwise": [],
        "config": {"compare": {"cpus_per_run": 1}},
    }
    assert tables.cautions(summary) == []
    (edge,) = tables.cautions(summary | {"num_learning_rates_at_edge": 2})
    assert edge.startswith("The chosen learning rate of 2 of 5 models is at the edge of those tried")
    runs = [{"run": "a", "world_size": 2, "num_threads": 3}, {"run": "b", "world_size": 1, "num_threads": None}]
    (otherwise,) = tables.cautions(summary | {"trained_otherwise": [*runs, runs[1]]})
    assert "(workers: 1, threads: 1): 1 with workers: 2, threads: 3; 2 with workers: 1, threads not known." in otherwise


def test_one_seed_is_told_to_be_too_few():
    assert any("at least two" in line for line in tables.how_to_read("none", [0], 3, "rows", True))
    several = tables.how_to_read("none", [0, 1], 3, "positives", False)
    assert not any("at least two" in line for line in several)
    assert any("No model has a control" in line for line in several)
    assert any("at most 3 training positives; drawn negatives do not count" in line for line in several)


def test_markdown_is_a_table_whatever_the_names(world):
    text = tables.markdown("H", ["one"], tables.scenario_grids(world["scenarios"], {}))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    widths = {len(re.split(r"(?<!\\)\|", line)) for line in lines}
    assert widths == {13}
    assert len(lines) == 3 * (2 + len(NAMES))


# ---------------------------------------------------------------- plots


@pytest.fixture(scope="module")
def plots(world):
    return draw_plots(**world)


def test_plots_are_images_of_sane_size(plots):
    assert sorted(plots) == [
        *("auc_by_scenario.png", "auc_by_user_activity.png", "calibration.png"),
        *("gain_by_scenario.png", "gain_by_user_activity.png", "gain_cold.png", "training_curves.png"),
    ]
    for name, image in plots.items():
        with Image.open(io.BytesIO(image)) as opened:
            opened.load()
            assert opened.format == "PNG"
            assert 600 <= opened.width <= 2500 and 300 <= opened.height <= 2500, (name, opened.size)
            colours = opened.convert("RGB").getcolors(maxcolors=1 << 20)
            shades = {colour for _, colour in colours}
            assert {(0, 114, 178), (230, 159, 0)} & shades, name  # two of the variants
            assert max(count for count, _ in colours) > 0.5 * opened.width * opened.height  # the white around them
    assert len(set(plots.values())) == 7


def test_plots_follow_the_figures(world, plots):
    better = [row | {"auc": row["auc"] + 0.1} if row["variant"] == "llm" else row for row in world["scenarios"]]
    after = draw_plots(**(world | {"scenarios": better}))
    assert plots["auc_by_scenario.png"] != after["auc_by_scenario.png"]
    assert plots["calibration.png"] == after["calibration.png"]
    assert plots["gain_by_scenario.png"] == after["gain_by_scenario.png"]  # of the gains, which are the same
    better = [row | {"auc": row["auc"] + 0.1} if row["variant"] == "llm" else row for row in world["activity"]]
    after = draw_plots(**(world | {"activity": better}))
    assert plots["auc_by_user_activity.png"] != after["auc_by_user_activity.png"]
    assert plots["gain_by_user_activity.png"] == after["gain_by_user_activity.png"]  # of the gains, which are the same


def test_plots_of_many_models_stay_readable():
    rng = np.random.default_rng(1)
    names = [(f"backbone_{b}", v) for b in range(9) for v in ("none", "llm")]
    records = [record(b, v, 0, rng) for b, v in names]
    reference = {"models": names, "reference": "none"}
    plots = draw_plots(
        records,
        scenario_summaries(records, *reference.values()),
        slice_summaries(records, *reference.values(), ["user activity"]),
        slice_summaries(records, *reference.values(), ["user", "item"]),
        **reference,
    )
    for image in plots.values():
        with Image.open(io.BytesIO(image)) as opened:
            assert opened.width <= 2500 and 500 <= opened.height <= 2500


def test_a_variant_without_runs_leaves_a_gap(world):
    records = [r for r in world["records"] if r["variant"] != "llm"]
    assert len(draw_plots(**(world | {"records": records}))) == 7


# ---------------------------------------------------------------- HTML


class Page(HTMLParser):
    """Collects tags with their attributes, and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def page(world, plots):
    plots = {name: (f"{name} & more", image) for name, image in plots.items()}
    grids = tables.scenario_grids(world["scenarios"], {})
    failures = tables.failure_grid([{"run": "r", "message": 'died: <script>alert("x")</script>'}])
    facts = {"seeds": "0, 1", "place": "s3://bucket/a&b"}
    return write_html("A <comparison>", ["a < b"], grids, plots, [failures], "python -m x --y '<z>'", facts)


def test_html_needs_nothing_beside_it(world, plots):
    text = page(world, plots)
    found = Page(text)
    assert found.open == []
    tags = {tag for tag, _ in found.tags}
    assert not tags & {"script", "link", "iframe", "object", "base", "form", "a", "svg", "video"}
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "action", "background", "style", "data", "poster"):
            value = attributes.get(name)
            assert value is None or (tag, name) == ("img", "src"), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in text and "@import" not in text and "http://" not in text and "https://" not in text
    policy = [a["content"] for t, a in found.tags if t == "meta" and "http-equiv" in a]
    assert policy == [POLICY] and POLICY.startswith("default-src 'none'")
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert [base64.b64decode(i["src"].removeprefix("data:image/png;base64,")) for i in images] == list(plots.values())
    assert all(image["alt"] for image in images)


def test_html_shows_names_as_they_are_and_suits_phone_and_dark(world, plots):
    text = page(world, plots)
    found = Page(text)
    shown = "".join(found.texts)
    for name in ("A <comparison>", "a < b", "<b>$x_1$|y</b>", '<script>alert("x")</script>', "--y '<z>'", "a&b"):
        assert name in shown
    meta = [attributes for tag, attributes in found.tags if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in meta
    assert "prefers-color-scheme: dark" in text and "overflow-x: auto" in text
    num_rows = sum(tag == "tr" for tag, _ in found.tags)
    assert num_rows == 3 * (1 + len(NAMES)) + 2
