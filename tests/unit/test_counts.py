"""Counts of scenarios against exact metrics: within the stated bound, and the same however rows are shared out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from llm4msr.training.counts import ScenarioCounts
from llm4msr.training.metrics import gauc, log_loss

S = 3
# Many ties, logits that share a bin without being equal, and logits beyond the bins.
LOGITS = st.one_of(
    st.sampled_from([0.0, 1e-5, 2e-5, -1e-5, 1.0, 1.00001, -3.0]),
    st.floats(-20, 20, width=32),
    st.floats(-1e6, 1e6, width=32),
)
ROWS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, S - 1), st.integers(0, 1), LOGITS), max_size=60)


def columns(rows):
    user, scenario, label, logit = np.array(rows, np.float64).reshape(-1, 4).T
    return user.astype(np.int32), scenario.astype(np.int64), label, logit.astype(np.float32)


def count(user, scenario, label, logit, batch_size=16):
    counts = ScenarioCounts(S)
    for i in range(0, len(user), batch_size):
        counts.update(*(torch.from_numpy(c[i : i + batch_size]) for c in (scenario, label, logit)))
    counts.update_users(user, scenario, label, logit)
    return counts


def added(parts):
    total = ScenarioCounts(S)
    for part in parts:
        for tensor, more in zip(total.tensors(), part.tensors(), strict=True):
            tensor += more
    return total


@settings(deadline=None)
@given(ROWS)
def test_against_exact_metrics(rows):
    user, scenario, label, logit = columns(rows)
    metrics = count(user, scenario, label, logit).compute()
    for s in range(S):
        mine = scenario == s
        y, x = label[mine], logit[mine].astype(np.float64)
        if 0 < y.sum() < len(y):
            bound = metrics["auc_bound"][s]
            assert 0 <= bound <= 0.5
            assert abs(metrics["auc"][s] - roc_auc_score(y, x)) <= bound + 1e-12
        else:
            assert np.isnan(metrics["auc"][s]) and np.isnan(metrics["auc_bound"][s])
        if len(y):
            exact = np.mean(np.logaddexp(0, np.where(y > 0, -x, x)))
            assert metrics["log_loss"][s] == pytest.approx(exact, rel=1e-9, abs=1e-300)
        else:
            assert np.isnan(metrics["log_loss"][s])
        assert metrics["gauc"][s] == pytest.approx(gauc(y, x, user[mine]), rel=1e-12, nan_ok=True)


@settings(deadline=None)
@given(ROWS, st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_any_shares_of_users_and_any_order_give_the_whole(rows, num_workers, seed):
    everything = columns(rows)
    rng = np.random.default_rng(seed)
    worker_of_user, order = rng.integers(0, num_workers, 6), rng.permutation(len(rows))
    parts = []
    for worker in range(num_workers):
        mine = order[worker_of_user[everything[0][order]] == worker]
        parts.append(count(*(column[mine] for column in everything), batch_size=int(rng.integers(1, 20))))
    whole, total = count(*everything), added(parts)
    assert torch.equal(total.tensors()[0], whole.tensors()[0])
    for name, value in whole.compute().items():
        assert total.compute()[name] == pytest.approx(value, rel=1e-12, abs=1e-300, nan_ok=True), name
        if name.startswith("auc"):
            np.testing.assert_array_equal(total.compute()[name], value)  # bit for bit


def test_the_bound_is_small_for_scores_as_models_give_them():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=20_000).astype(np.float32)
    label = (rng.random(20_000) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    user, scenario = rng.integers(0, 2000, 20_000), rng.integers(0, S, 20_000)
    metrics = count(user, scenario, label, logit, 4096).compute()
    for s in range(S):
        assert metrics["auc_bound"][s] < 1e-4
        exact = roc_auc_score(label[scenario == s], logit[scenario == s])
        assert abs(metrics["auc"][s] - exact) <= metrics["auc_bound"][s]


def test_many_equal_scores_are_ties_not_errors():
    label = np.arange(1000) % 2
    metrics = count(np.zeros(1000, int), np.zeros(1000, int), label, np.full(1000, 0.7, np.float32)).compute()
    assert metrics["auc"][0] == metrics["gauc"][0] == 0.5
    assert metrics["auc_bound"][0] == 0.5


def test_logits_beyond_the_bins_count():
    counts = ScenarioCounts(1)
    logit_B = torch.tensor([99.0, -1e9, 15.9, 30.0, 31.0, 1e9])
    counts.update(torch.zeros(6, dtype=torch.int64), torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]), logit_B)
    assert counts.compute()["auc"] == [7 / 8]  # of eight pairs only (15.9, 30) is in the wrong order
    assert int(counts.tensors()[0].sum()) == 6


def test_log_loss_is_the_exact_one_until_scores_are_clipped():
    label, logit = np.array([1, 0, 1, 0]), np.array([3.0, -2.0, -1.0, 16.0])
    zeros = np.zeros(4, int)
    score = 1 / (1 + np.exp(-logit))
    assert count(zeros, zeros, label, logit).compute()["log_loss"][0] == pytest.approx(log_loss(label, score), rel=1e-9)
    wrong = count(zeros, zeros, label, np.array([3.0, -2.0, -1.0, 100.0])).compute()["log_loss"][0]
    assert wrong > 25  # the last row alone is 100 nats, where the clipped one is 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_nan_logit_shows_in_its_scenario_alone(dtype):
    counts = ScenarioCounts(2)
    scenario_B, label_B = torch.tensor([0, 0, 1, 1]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    counts.update(scenario_B, label_B, torch.tensor([1.0, float("nan"), -1.0, 2.0], dtype=dtype, requires_grad=True))
    metrics = counts.compute()
    assert np.isnan(metrics["auc"][0]) and np.isnan(metrics["log_loss"][0])
    assert metrics["auc"][1] == 1.0 and metrics["log_loss"][1] == pytest.approx(0.22, abs=0.01)


def test_state_is_all_in_the_tensors():
    counts = count(*columns([(1, 0, 1, 0.5), (1, 0, 0, 0.1), (2, 1, 1, 0.2)]))
    tensors = counts.tensors()
    for tensor in tensors:
        tensor.zero_()  # in place, as all_reduce writes
    assert all(np.isnan(v) for values in counts.compute().values() for v in values)
    assert sum(t.numel() * t.element_size() for t in tensors) == S * (2 * 65_536 * 8 + 3 * 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_of_any_device_are_taken():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 6, 500), rng.integers(0, S, 500), rng.integers(0, 2, 500), rng.normal(size=500)
    expected = count(*rows).compute()
    for device in ("cpu", "cuda"):
        counts = ScenarioCounts(S, device)
        counts.update(*(torch.from_numpy(column).cuda() for column in rows[1:]))
        counts.update_users(*rows)
        assert all(t.device.type == device for t in counts.tensors())
        for name, values in counts.compute().items():
            assert values == pytest.approx(expected[name], rel=1e-9)
