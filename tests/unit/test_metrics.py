"""Metrics against hand-computed tables and scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from llm4msr.training.metrics import auc, auc_by_group, calibration, gauc, log_loss, scenario_rows

# Two users; three rows tie at 0.5.
USER = np.array([1, 1, 1, 2, 2, 2, 3])
LABEL = np.array([1, 0, 0, 1, 1, 0, 1])
SCORE = np.array([0.9, 0.5, 0.1, 0.5, 0.2, 0.5, 0.3])


def test_auc_by_hand():
    # positives .9 .5 .2 .3, negatives .5 .1 .5: .9 beats 3, .5 beats 1 and ties 2, .2 beats 1, .3 beats 1
    assert auc(LABEL, SCORE) == pytest.approx((3 + 2 + 1 + 1) / 12)


def test_gauc_by_hand():
    # user 1: AUC 1, 3 rows; user 2: pairs (.5,.5) tie and (.2,.5) lost: 0.25, 3 rows; user 3 has one class: left out
    assert gauc(LABEL, SCORE, USER) == pytest.approx((3 * 1 + 3 * 0.25) / 6)


def test_log_loss_and_calibration_by_hand():
    label, score = np.array([1, 0]), np.array([0.8, 0.4])
    assert log_loss(label, score) == pytest.approx(-(np.log(0.8) + np.log(0.6)) / 2)
    assert calibration(label, score) == pytest.approx(1.2)
    assert np.isfinite(log_loss(np.array([1, 0]), np.array([0.0, 1.0])))


def test_one_class_has_no_auc():
    ones = np.ones(3)
    assert np.isnan(auc(ones, SCORE[:3]))
    assert np.isnan(gauc(ones, SCORE[:3], USER[:3]))
    assert np.isnan(calibration(np.zeros(3), SCORE[:3]))


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 1), st.sampled_from([0.01, 0.2, 0.5, 0.50001, 0.99])),
        min_size=2,
        max_size=60,
    )
)
def test_against_scikit_learn(rows):
    user, label, score = (np.array(column) for column in zip(*rows, strict=True))
    if 0 < label.sum() < len(label):
        assert auc(label, score) == pytest.approx(roc_auc_score(label, score))
        assert log_loss(label, score) == pytest.approx(sklearn_log_loss(label, score))
    users = [u for u in np.unique(user) if 0 < label[user == u].sum() < (user == u).sum()]
    if users:
        aucs = [roc_auc_score(label[user == u], score[user == u]) for u in users]
        weights = [(user == u).sum() for u in users]
        assert gauc(label, score, user) == pytest.approx(np.average(aucs, weights=weights))
    else:
        assert np.isnan(gauc(label, score, user))


def test_auc_by_group_names_the_groups_that_have_one():
    group, by_group, rows = auc_by_group(LABEL, SCORE, USER)
    assert group.tolist() == [1, 2] and by_group.tolist() == [1.0, 0.25] and rows.tolist() == [3, 3]
    assert [len(column) for column in auc_by_group(LABEL[:0], SCORE[:0], USER[:0])] == [0, 0, 0]
    assert np.isnan(gauc(LABEL[:0], SCORE[:0], USER[:0]))


def test_scenario_rows_report_all_and_each():
    scenario = np.array([0, 0, 0, 1, 1, 1, 1])
    rows = scenario_rows(("rec", "search", "empty"), scenario, USER, LABEL, SCORE)
    assert [(r["scenario"], r["num_rows"], r["num_positives"]) for r in rows] == [
        ("all", 7, 4),
        ("rec", 3, 1),
        ("search", 4, 3),
        ("empty", 0, 0),
    ]
    assert rows[1]["auc"] == 1.0
    assert rows[3]["auc"] is None and rows[3]["log_loss"] is None
