"""Means over seeds and gains over a reference: plain numbers from plain records, nothing trained or read here.

A gain is paired: the run of a seed is compared with the other model's run of the same seed. Such runs share the split,
the order of rows and the seed of initialisation. They start from the same weights only where all their layers are
alike: item knowledge widens the input, and other widths draw other weights.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

METRICS = ("auc", "gauc", "log_loss", "calibration")
RANDOM_AUC = 0.5


@dataclass(frozen=True)
class Gain:
    """AUC against another model's, the reference, over the seeds that both have.

    Attributes:
        num_seeds: How many those are.
        mean: Mean of the differences.
        std: Standard deviation of the differences; None below two seeds.
        rela_impr: (AUC - 0.5) / (AUC of the reference - 0.5) - 1 of the means (Yan et al., ICML 2014); None where the
            reference does not rank better than chance.
        p: Of the two-sided paired t-test; None below two seeds, and where the differences do not vary.
    """

    num_seeds: int
    mean: float
    std: float | None
    rela_impr: float | None
    p: float | None


def paired_gain(value: Mapping[int, float], reference: Mapping[int, float]) -> Gain | None:
    """Compares two models' AUC by seed; None where they share no seed."""
    from scipy.stats import ttest_rel

    seeds = [seed for seed in value if seed in reference]
    if not seeds:
        return None
    ours, theirs = [value[seed] for seed in seeds], [reference[seed] for seed in seeds]
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    above = statistics.fmean(theirs) - RANDOM_AUC
    varies = len(set(differences)) > 1
    return Gain(
        num_seeds=len(seeds),
        mean=statistics.fmean(differences),
        std=statistics.stdev(differences) if len(seeds) > 1 else None,
        rela_impr=(statistics.fmean(ours) - RANDOM_AUC) / above - 1 if above > 0 else None,
        p=float(ttest_rel(ours, theirs).pvalue) if varies else None,
    )


def spread(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Returns mean and standard deviation; None without values, and below two."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def summarise(
    rows: Iterable[Mapping[str, Any]], models: Sequence[tuple[str, str]], reference: str
) -> list[dict[str, Any]]:
    """Averages the metrics of each model over its seeds, and compares its AUC with the reference's.

    Args:
        rows: One per seed of a model: `backbone`, `variant`, `seed`, `num_rows`, and the metrics, None where undefined.
            All are of the same rows of data.
        models: Backbone and variant, in the order wanted; those without a row are left out.
        reference: The variant that others are compared with, within their backbone.

    Returns:
        One row per model: backbone, variant, num_seeds, num_rows, each metric and <metric>_std, and gain: the fields of
        `Gain`, or None for the reference itself and where there is nothing to compare.
    """
    by_model, out = _by_model(rows), []
    for backbone, variant in models:
        found = by_model.get((backbone, variant))
        if not found:
            continue
        summary = {
            "backbone": backbone,
            "variant": variant,
            "num_seeds": len(found),
            "num_rows": found[0]["num_rows"],
        }
        for metric in METRICS:
            values = [row[metric] for row in found if row[metric] is not None]
            summary[metric], summary[f"{metric}_std"] = spread(values)
        gain = None
        if variant != reference:
            gain = paired_gain(_by_seed(found), _by_seed(by_model.get((backbone, reference), [])))
        out.append(summary | {"gain": gain and vars(gain)})
    return out


def compare_pairs(rows: Iterable[Mapping[str, Any]], pairs: Iterable[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """Compares the AUC of models with that of their controls.

    Args:
        rows: As for `summarise`.
        pairs: Backbone, variant and the variant that is its control.

    Returns:
        One row per pair: backbone, variant, control, and gain: the fields of `Gain`, or None without a common seed.
    """
    by_model, out = _by_model(rows), []
    for backbone, variant, control in pairs:
        ours, theirs = (_by_seed(by_model.get((backbone, name), [])) for name in (variant, control))
        gain = paired_gain(ours, theirs)
        out.append({"backbone": backbone, "variant": variant, "control": control, "gain": gain and vars(gain)})
    return out


def _by_model(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[Mapping[str, Any]]]:
    by_model: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_model.setdefault((row["backbone"], row["variant"]), []).append(row)
    return by_model


def _by_seed(rows: Iterable[Mapping[str, Any]]) -> dict[int, float]:
    return {row["seed"]: row["auc"] for row in rows if row["auc"] is not None}
