"The verification protocol against plain loops, SciPy's interpolation and scikit-learn, on thresholds' edges too."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.interpolate import interp1d
from sklearn.metrics import auc, roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from cemiface.verification import (accept_counts, bootstrap_ci, evaluate, far_thresholds, figure_style, fold_index, m_colours,
                                   pair_distances, plot_verification, verify, verify_distances)


def rates(threshold, d, same):
    "True accepts, false accepts, accuracy, counted one pair at a time."
    tp = sum(1 for x, s in zip(d, same) if x < threshold and s)
    fp = sum(1 for x, s in zip(d, same) if x < threshold and not s)
    n0 = sum(1 for s in same if not s)
    return tp, fp, (tp + n0 - fp) / len(d)


def loop_accuracy(d, same, folds):
    grid, accuracy, best = np.arange(0, 4, .01), [], []
    for train, test in KFold(folds, shuffle=False).split(d):
        at, top = None, -1.
        for t in grid:
            a = rates(t, d[train], same[train])[2]
            if a > top: at, top = t, a
        best.append(at)
        accuracy.append(rates(at, d[test], same[test])[2])
    return accuracy, best


def loop_far_threshold(d, same, far):
    "Straight line between the last threshold with FAR <= far and the next one."
    grid, n0 = np.arange(0, 4, .001), max((~same).sum(), 1)
    fars = [(d[~same] < t).sum() / n0 for t in grid]
    if max(fars) < far: return 0.
    j = max(i for i, f in enumerate(fars) if f <= far)
    return grid[j] if fars[j] == far else grid[j] + (far - fars[j]) / (fars[j+1] - fars[j]) * (grid[j+1] - grid[j])


@st.composite
def scored_pairs(draw):
    folds = draw(st.integers(2, 5))
    n = draw(st.integers(max(folds, 4), 30))
    grid = np.arange(0, 4, .01)
    on_grid = st.integers(0, 399).map(lambda i: float(grid[i]))                  # ties, and distances equal to a threshold
    d = draw(st.lists(st.one_of(on_grid, st.floats(0, 4), st.sampled_from([0., .5, 4.])), min_size=n, max_size=n))
    same = draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2)) + [True, False]
    return np.array(d), np.array(same), folds


@settings(max_examples=60, deadline=None)
@given(scored_pairs())
def test_accuracy_equals_plain_loops(case):
    d, same, folds = case
    v = verify_distances(d, same, folds)
    accuracy, best = loop_accuracy(d, same, folds)
    assert v.fold_accuracy.tolist() == accuracy and v.threshold.tolist() == best
    assert v.accuracy == np.mean(accuracy) and v.std == np.std(accuracy)
    assert v.correct.tolist() == [bool((x < best[f]) == s) for x, s, f in zip(d, same, fold_index(len(d), folds))]


@settings(max_examples=15, deadline=None)
@given(scored_pairs(), st.sampled_from([1e-4, 1e-3, .05, .5, 1.]))
def test_tar_equals_plain_loops(case, far):
    d, same, folds = case
    fold = fold_index(len(d), folds)
    expected, tars = [], []
    for f in range(folds):
        t = loop_far_threshold(d[fold != f], same[fold != f], far)
        expected.append(t)
        if same[fold == f].any(): tars.append((d[(fold == f) & same] < t).mean())
    np.testing.assert_allclose(far_thresholds(d, same, fold, far), expected, rtol=0, atol=1e-12)
    assert verify_distances(d, same, folds, fars=(far,)).tar_at_far[far] == pytest.approx(np.mean(tars), abs=1e-12)


def test_tar_interpolates_as_scipy_does_where_the_far_has_no_plateau():
    grid = np.arange(0, 4, .001)
    d = np.concatenate([grid[:-1] + .0005] * 4)                                   # one different pair between any two thresholds
    same = np.zeros(len(d), bool)
    fold = np.arange(len(d)) % 4
    fars = [(d[fold != 0] < t).mean() for t in grid]
    for far in (1e-3, .0123, .7):
        assert far_thresholds(d, same, fold, far)[0] == pytest.approx(float(interp1d(fars, grid, kind="slinear")(far)), abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(scored_pairs())
def test_folds_and_auc_are_those_of_scikit_learn(case):
    d, same, folds = case
    fold = fold_index(len(d), folds)
    for f, (_, test) in enumerate(KFold(folds, shuffle=False).split(d)): assert np.flatnonzero(fold == f).tolist() == test.tolist()
    v = verify_distances(d, same, folds)
    far, tar, _ = roc_curve(same, -d)
    assert v.auc == pytest.approx(auc(far, tar)) == roc_auc_score(same, -d)
    wins = [(a < b) + .5 * (a == b) for a in d[same] for b in d[~same]]           # a same pair is closer than a different one
    assert v.auc == pytest.approx(np.mean(wins))


@settings(max_examples=30, deadline=None)
@given(scored_pairs(), st.lists(st.floats(0, 4), min_size=1, max_size=9).map(sorted))
def test_counts_are_strict_comparisons(case, thresholds):
    d, same, folds = case
    fold = fold_index(len(d), folds)
    counts = accept_counts(d, same, fold, np.array(thresholds))
    for f in range(folds):
        for kind in (0, 1):
            for t, n in zip(thresholds, counts[f, kind]): assert n == ((d < t) & (same == kind) & (fold == f)).sum()


def test_embeddings_to_accuracy_as_the_reference_computes_it():
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(240, 8)); raw[1::4] = raw[0::4] + .4 * raw[1::4]       # every other pair is one subject
    same = np.arange(120) % 2 == 0
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    d = np.sum((unit[0::2] - unit[1::2]) ** 2, 1)
    accuracy, best = loop_accuracy(d, same, 10)
    v = verify(raw, same)
    assert v.accuracy == np.mean(accuracy) > .8 and v.threshold.tolist() == best
    assert verify(torch.tensor(5 * raw), torch.tensor(same)).accuracy == v.accuracy


def test_limits():
    same = np.tile([True, False], 50)
    perfect = verify_distances(np.where(same, .1, 1.9), same)
    assert perfect.accuracy == perfect.auc == 1 and perfect.std == 0 and set(perfect.tar_at_far.values()) == {1.}
    assert perfect.threshold == pytest.approx(np.full(10, .11))                   # the first of the best: .1 < .11, while .1 < .1 is false
    constant = verify_distances(np.ones(100), same)
    assert constant.accuracy == constant.auc == .5
    assert set(constant.tar_at_far.values()) == {1.}                              # the FAR jumps from 0 to 1, and the threshold lies in the jump
    assert perfect.resolves(.02) and not perfect.resolves(.019)                   # fifty different pairs: steps of 1/50


@pytest.mark.parametrize("emb,same,says", [
    (np.ones((5, 3)), [True, False], "even number"), (np.ones((4, 3)), [True], "2 pairs but 1 labels"),
    (np.full((40, 3), np.nan), [True, False] * 10, "40 of 40 embeddings are not finite"),
    (np.ones((40, 3)), [True] * 20, "one kind"), (np.ones((6, 3)), [True, False, True], "3 pairs cannot be cut into 10 folds")])
def test_bad_input_is_named(emb, same, says):
    with pytest.raises(ValueError, match=says): verify(emb, np.array(same))


def test_bootstrap_covers_the_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low <= .9 <= high for low, high in (bootstrap_ci(rng.random(300) < .9, level=.9, resamples=200, seed=s) for s in range(200))]
    assert .8 < np.mean(hits) < .97
    narrow, wide = (np.ptp(bootstrap_ci(rng.normal(size=200), level=level)) for level in (.5, .99))
    assert narrow < wide and bootstrap_ci([True] * 9) == (1., 1.)
    with pytest.raises(ValueError, match="finite"): bootstrap_ci([1., np.nan])


class Counting(torch.nn.Module):
    "Embeds an image as its first row of pixels and counts the images it is shown."
    def __init__(self):
        super().__init__()
        self.scale, self.seen = torch.nn.Parameter(torch.ones(1)), 0
    def forward(self, x):
        self.seen += len(x)
        return x[:, 0, 0] * self.scale


def test_evaluate_embeds_each_image_and_its_mirror_once():
    g = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 3, 8, 8), generator=g, dtype=torch.uint8); images[1:40:2] = images[0:40:2]
    same = torch.arange(40) < 20
    mixed = torch.randperm(40, generator=g)
    sets = {"a": (images.view(40, 2, 3, 8, 8)[mixed].flatten(0, 1), same[mixed]), "b": (images[20:60], same[10:30])}
    model = Counting()
    table = evaluate(model, sets, batch_size=7)
    assert model.seen == 2 * (80 + 40)
    assert table["pairs"].tolist() == [40, 20, 60]
    first = sets["a"][0].float() / 127.5 - 1
    mirrored = first[:, 0, 0] + first[:, 0, 0].flip(1)
    assert table.loc["a", "accuracy"] == pytest.approx(100 * verify(mirrored, sets["a"][1]).accuracy)
    assert table.loc["AVG", "accuracy"] == pytest.approx(table["accuracy"].iloc[:2].mean()) and table["tar@0.001"].isna().all()
    assert (table["ci_low"] <= table["accuracy"] + 1e-9)[:2].all() and (table["ci_high"] >= table["accuracy"] - 1e-9)[:2].all()


def test_figures_leave_the_users_settings_alone():
    before = dict(plt.rcParams)
    same = np.tile([True, False], 50)
    fig = plot_verification({"x": verify_distances(np.where(same, .5, 1.5), same), "y": verify_distances(np.linspace(0, 4, 100), same)})
    assert len(fig.axes) == 2 and len(fig.axes[1].get_legend().get_texts()) == 2
    with figure_style(): assert not plt.rcParams["axes.spines.top"]
    assert dict(plt.rcParams) == before
    plt.close(fig)
    light, dark = (m_colours(m)[:3] @ np.array([.3, .6, .1]) for m in (-1, 1))
    assert dark < light
