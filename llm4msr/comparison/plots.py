"""The plots of a comparison as PNG bytes: matplotlib's Agg, no display, no state shared between figures.

Colours are Okabe and Ito's, told apart with any colour vision; each variant has a marker of its own as well. matplotlib
is imported when something is drawn: it makes folders in the user's home.
"""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from llm4msr.comparison.results import SPLIT, Record
from llm4msr.comparison.tables import SLICE_NAMES
from llm4msr.schema import ALL_SCENARIOS

COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#8C6D1F")
MARKERS = "osD^vPX*"
DOTS_PER_INCH = 110
PANEL_WIDTH, PANEL_HEIGHT, MOST_COLUMNS = 3.6, 3.0, 4
Summaries = Sequence[Mapping[str, Any]]


def draw_plots(
    records: Sequence[Record],
    scenarios: Summaries,
    activity: Summaries,
    cold: Summaries,
    models: Sequence[tuple[str, str]],
    reference: str,
) -> dict[str, bytes]:
    """Draws all plots.

    Args:
        records: Of `results.read_records`.
        scenarios: Of `results.scenario_summaries`.
        activity: Of `results.slice_summaries`, kind "user activity".
        cold: The same, kinds "user" and "item".
        models: Backbone and variant, in order.
        reference: The variant that gains are measured against.

    Returns:
        PNG bytes by file name.
    """
    import matplotlib

    styles = _styles(dict.fromkeys(variant for _, variant in models))
    backbones = list(dict.fromkeys(backbone for backbone, _ in models))
    counted = records[0]["detail"]["counted"]
    of_user = f"training {counted} of the user"
    with matplotlib.rc_context({"text.parse_math": False}):  # names are shown as they are
        return {
            "auc_by_scenario.png": _by_scenario(scenarios, backbones, styles, None),
            "gain_by_scenario.png": _by_scenario(scenarios, backbones, styles, reference),
            "calibration.png": _calibration(records, backbones, styles),
            "training_curves.png": _curves(records, backbones, styles),
            "auc_by_user_activity.png": _by_slice(activity, backbones, styles, None, of_user),
            "gain_by_user_activity.png": _by_slice(activity, backbones, styles, reference, of_user),
            "gain_cold.png": _by_slice(cold, backbones, styles, reference, f"by training {counted}"),
        }


def _styles(variants: Any) -> dict[str, dict[str, str]]:
    return {
        name: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, name in enumerate(variants)
    }


def _by_scenario(
    rows: Summaries, backbones: list[str], styles: Mapping[str, Mapping[str, str]], reference: str | None
) -> bytes:
    """One panel per scenario; a line of dots per backbone, one dot per variant: AUC, or AUC minus the reference's."""
    scenarios = list(dict.fromkeys(row["scenario"] for row in rows))
    shown = {variant: style for variant, style in styles.items() if variant != reference}
    height = 2.0 + len(backbones) * max(0.16 * len(shown), 0.45)
    figure, axes = _figure(1, len(scenarios), 3.9, height, sharey=True)
    for axis, scenario in zip(axes, scenarios, strict=True):
        for place, (variant, style) in enumerate(shown.items()):
            shift = 0.7 * ((place + 0.5) / len(shown) - 0.5)
            found = [r for r in rows if (r["scenario"], r["variant"]) == (scenario, variant)]
            values = [(row, *value) for row in found if (value := _value(row, reference))]
            axis.errorbar(
                [mean for _, mean, _ in values],
                [backbones.index(row["backbone"]) + shift for row, _, _ in values],
                xerr=[std for _, _, std in values],
                label=variant,
                linestyle="none",
                markersize=5,
                capsize=2.5,
                **style,
            )
        if reference is not None:
            axis.axvline(0, color="#888888", linewidth=1, zorder=0)
        axis.set_title("all scenarios" if scenario == ALL_SCENARIOS else scenario)
        axis.set_xlabel("AUC on test" if reference is None else f"AUC gain over {reference}")
        axis.locator_params(axis="x", nbins=4)
        axis.set_yticks(range(len(backbones)), backbones)
        axis.set_ylim(len(backbones) - 0.5, -0.5)
        for edge in range(1, len(backbones)):
            axis.axhline(edge - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    what = "AUC" if reference is None else f"AUC gain over “{reference}”"
    return _finish(figure, axes, f"{what} on test by scenario: mean and standard deviation over seeds")


def _value(row: Mapping[str, Any], reference: str | None) -> tuple[float, float] | None:
    """Returns mean and deviation of a row's AUC, or of its gain over the reference; None where it is not defined."""
    if reference is None:
        return None if row["auc"] is None else (row["auc"], row["auc_std"] or 0.0)
    return (row["gain"]["mean"], row["gain"]["std"] or 0.0) if row["gain"] else None


def _calibration(records: Sequence[Record], backbones: list[str], styles: Mapping[str, Mapping[str, str]]) -> bytes:
    """A panel per backbone: share of positives over mean score in ten bins of equally many rows, mean over seeds."""
    figure, axes = _panels(backbones)
    for axis, backbone in zip(axes, backbones, strict=False):
        highest = 0.0
        for variant, style in styles.items():
            bins: dict[int, list[tuple[float, float]]] = {}
            for record in _of(records, backbone, variant):
                curve = [
                    r for r in record["detail"]["reliability"] if (r["split"], r["scenario"]) == (SPLIT, ALL_SCENARIOS)
                ]
                for number, row in enumerate(curve):
                    bins.setdefault(number, []).append((row["mean_score"], row["mean_label"]))
            points = [tuple(map(statistics.fmean, zip(*values, strict=True))) for values in bins.values()]
            if points:
                highest = max(highest, *map(max, points))
                axis.plot(*zip(*points, strict=True), label=variant, markersize=4, linewidth=1.2, **style)
        axis.plot([0, highest], [0, highest], color="#888888", linestyle="--", linewidth=1, zorder=0)
        axis.set_title(backbone)
        axis.set_xlabel("mean score")
        axis.set_ylabel("share of positives")
    return _finish(figure, axes, "Calibration on test, all scenarios: ten bins of equally many rows (dashed: perfect)")


def _curves(records: Sequence[Record], backbones: list[str], styles: Mapping[str, Mapping[str, str]]) -> bytes:
    """A panel per backbone: a thin line per seed, the kept epoch marked."""
    figure, axes = _panels(backbones)
    for axis, backbone in zip(axes, backbones, strict=False):
        for variant, style in styles.items():
            for number, record in enumerate(_of(records, backbone, variant)):
                values = [epoch["valid_auc"] for epoch in record["history"]]
                axis.plot(
                    range(1, len(values) + 1),
                    values,
                    label=variant if number == 0 else None,
                    linewidth=1.1,
                    alpha=0.75,
                    markevery=[record["best_epoch"]],
                    markersize=6,
                    **style,
                )
        axis.set_title(backbone)
        axis.set_xlabel("epoch")
        axis.set_ylabel("mean scenario AUC on valid")
        axis.xaxis.get_major_locator().set_params(integer=True)
    return _finish(figure, axes, "Training curves: a line per seed, the kept epoch marked")


def _by_slice(
    rows: Summaries,
    backbones: list[str],
    styles: Mapping[str, Mapping[str, str]],
    reference: str | None,
    label: str,
) -> bytes:
    """A panel per backbone: AUC in each slice, or AUC minus the reference's; bars of one deviation over seeds."""
    slices = list(dict.fromkeys((r["kind"], r["slice"]) for r in rows if r["num_rows"]))
    sizes = {(r["kind"], r["slice"]): r["num_rows"] for r in rows}
    names = [f"{SLICE_NAMES.get(key, key[1])}\n({_short(sizes[key])} rows)" for key in slices]
    shown = {variant: style for variant, style in styles.items() if variant != reference}
    figure, axes = _panels(backbones, max(PANEL_WIDTH, 0.95 * len(slices)))
    for axis, backbone in zip(axes, backbones, strict=False):
        for place, (variant, style) in enumerate(shown.items()):
            shift = 0.6 * ((place + 0.5) / len(shown) - 0.5)
            found = [r for r in rows if (r["backbone"], r["variant"]) == (backbone, variant)]
            values = [(row, *value) for row in found if (value := _value(row, reference))]
            axis.errorbar(
                [slices.index((row["kind"], row["slice"])) + shift for row, _, _ in values],
                [mean for _, mean, _ in values],
                yerr=[std for _, _, std in values],
                label=variant,
                linestyle="none",
                markersize=5,
                capsize=2.5,
                **style,
            )
        if reference is not None:
            axis.axhline(0, color="#888888", linewidth=1, zorder=0)
        axis.set_title(backbone)
        axis.set_xticks(range(len(slices)), names, fontsize=7.5)
        axis.set_xlim(-0.5, len(slices) - 0.5)
        axis.set_xlabel(label)
        axis.set_ylabel("AUC on test" if reference is None else f"AUC gain over {reference}")
    what = "AUC" if reference is None else f"AUC gain over “{reference}”"
    return _finish(figure, axes, f"{what} on test, all scenarios: mean and standard deviation over seeds")


def _of(records: Sequence[Record], backbone: str, variant: str) -> list[Record]:
    return [r for r in records if r["chosen"] and (r["backbone"], r["variant"]) == (backbone, variant)]


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"


def _panels(backbones: Sequence[str], width: float = PANEL_WIDTH) -> tuple[Any, list[Any]]:
    columns = min(len(backbones), max(int(MOST_COLUMNS * PANEL_WIDTH / width), 1))
    rows = math.ceil(len(backbones) / columns)
    figure, axes = _figure(rows, columns, width, rows * PANEL_HEIGHT + 0.8)
    for axis in axes[len(backbones) :]:
        axis.set_visible(False)
    return figure, axes


def _figure(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width * columns, 6.0), height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for axis in axes:
        axis.grid(color="#eeeeee", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure, axes


def _finish(figure: Any, axes: Sequence[Any], title: str) -> bytes:
    entries: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        entries |= {label: handle for label, handle in zip(labels, handles, strict=True) if label not in entries}
    figure.suptitle(title, fontsize=11)
    if entries:
        figure.legend(
            entries.values(),
            entries.keys(),
            loc="outside lower center",
            ncols=min(len(entries), 6),
            frameon=False,
            fontsize=9,
        )
    out = io.BytesIO()
    figure.savefig(out, format="png", facecolor="white", metadata={"Software": None})
    return out.getvalue()
