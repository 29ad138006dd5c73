"The verification protocol against plain loops, SciPy's interpolation and scikit-learn, on thresholds' edges too."
import warnings

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.interpolate import BSpline, interp1d
from scipy.stats import ttest_1samp
from sklearn.metrics import auc, roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from cemiface.data.images import encode_image
from cemiface.data.pairs import pair_set
from cemiface.core.figures import figure_style
from cemiface.recognition.verification import _accept_counts, _far_thresholds, _fold_index, bootstrap_ci, check_sets, evaluate, table_over_seeds, pair_distances, plot_verification, reference_verification, results_table, verify, verify_distances, verify_sets
from cemiface.bench.recognition import bench_verification


@st.composite
def scored_pairs(draw):
    folds = draw(st.integers(2, 5))
    n = draw(st.integers(max(folds, 4), 30))
    grid = np.arange(0, 4, .01)
    on_grid = st.integers(0, 399).map(lambda i: float(grid[i]))                  # ties, and distances equal to a threshold
    d = draw(st.lists(st.one_of(on_grid, st.floats(0, 4), st.sampled_from([0., .5, 4.])), min_size=n, max_size=n))
    same = draw(st.lists(st.booleans(), min_size=n - 2, max_size=n - 2)) + [True, False]
    return np.array(d), np.array(same), folds


@settings(max_examples=40, deadline=None)
@given(scored_pairs(), st.sampled_from([(1e-3, 1e-4), (.05, .5), (1., .25)]))
def test_protocol_equals_plain_loops(case, fars):
    d, same, folds = case
    v, (accuracy, best, tars, cuts) = verify_distances(d, same, folds, fars), reference_verification(d, same, folds, fars)
    fold = _fold_index(len(d), folds)
    assert v.fold_accuracy.tolist() == accuracy.tolist() and v.threshold.tolist() == best.tolist()
    assert v.accuracy == np.mean(accuracy) and v.std == np.std(accuracy)
    assert v.correct.tolist() == [bool((x < best[f]) == s) for x, s, f in zip(d, same, fold)]
    np.testing.assert_allclose(_far_thresholds(d, same, fold, fars), [cuts[f] for f in fars], rtol=0, atol=1e-12)
    assert v.tar_at_far == pytest.approx(tars, abs=1e-12)


def test_the_plain_loops_give_what_is_counted_by_hand():
    "Two folds of four pairs; what a fold accepts is decided by the other."
    d = np.array([.105, .3, .5, 1.2, .2, .6, .7, .9])
    same = np.array([True, True, False, False, True, True, False, False])
    accuracy, best, tars, cuts = reference_verification(d, same, 2, (.5, 1e-9, 1.))
    assert best.tolist() == pytest.approx([.61, .31])                              # of the other fold: first of .61 ... .70, of .31 ... .50
    assert accuracy.tolist() == [.75, .75]
    assert cuts[.5] == pytest.approx([.9, 1.2])                                    # the FAR stays one half until the second stranger
    assert cuts[1.] == pytest.approx([3.999, 3.999]) and tars == pytest.approx({.5: 1., 1e-9: .75, 1.: 1.})


def test_tar_interpolates_as_scipy_does_where_the_far_has_no_plateau():
    grid = np.arange(0, 4, .001)
    d = np.concatenate([grid[:-1] + .0005] * 4)                                   # one different pair between any two thresholds
    same = np.zeros(len(d), bool)
    fold = np.arange(len(d)) % 4
    fars = [(d[fold != 0] < t).mean() for t in grid]
    for far in (1e-3, .0123, .7):
        assert _far_thresholds(d, same, fold, (far,))[0, 0] == pytest.approx(float(interp1d(fars, grid, kind="slinear")(far)), abs=1e-9)


def test_tar_interpolates_as_the_references_spline_on_plateaus_too():
    "SciPy's `slinear` is a spline of degree 1; it took repeated FARs before a check for them was added, and the spline itself still does."
    rng, grid = np.random.default_rng(0), np.arange(0, 4, .001)
    for pairs in (20, 300, 2000):
        d, same, fold = 3.9 * rng.random(pairs), rng.random(pairs) < .5, _fold_index(pairs)
        fars = (1e-4, 1e-3, .01, .1, .5)
        ours = _far_thresholds(d, same, fold, fars)
        for f in range(0, 10, 3):
            rate = np.searchsorted(np.sort(d[(fold != f) & ~same]), grid) / ((fold != f) & ~same).sum()
            spline = BSpline.construct_fast(np.r_[rate[0], rate, rate[-1]], grid, 1)
            np.testing.assert_allclose(ours[:, f], spline(np.array(fars)), rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(scored_pairs())
def test_folds_and_auc_are_those_of_scikit_learn(case):
    d, same, folds = case
    fold = _fold_index(len(d), folds)
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
    fold = _fold_index(len(d), folds)
    counts = _accept_counts(d, same, fold, np.array(thresholds))
    for f in range(folds):
        for kind in (0, 1):
            for t, n in zip(thresholds, counts[f, kind]): assert n == ((d < t) & (same == kind) & (fold == f)).sum()


def test_embeddings_to_accuracy_as_the_reference_computes_it():
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(240, 8)); raw[1::4] = raw[0::4] + .4 * raw[1::4]       # every other pair is one subject
    same = np.arange(120) % 2 == 0
    unit = raw / np.linalg.norm(raw, axis=1, keepdims=True)
    d = np.sum((unit[0::2] - unit[1::2]) ** 2, 1)
    accuracy, best, tars, _ = reference_verification(d, same)
    v = verify(raw, same)
    assert v.accuracy == np.mean(accuracy) > .8 and v.threshold.tolist() == best.tolist() and v.tar_at_far == tars
    long = rng.normal(size=(3000, 16))                                            # more than one block
    unit = long / np.sqrt((long ** 2).sum(1, keepdims=True))
    np.testing.assert_allclose(pair_distances(long), np.square(unit[0::2] - unit[1::2]).sum(1), rtol=1e-14)
    assert verify(torch.tensor(5 * raw), torch.tensor(same)).accuracy == v.accuracy


def test_limits():
    same = np.tile([True, False], 50)
    perfect = verify_distances(np.where(same, .1, 1.9), same)
    assert perfect.accuracy == perfect.auc == 1 and perfect.std == 0 and set(perfect.tar_at_far.values()) == {1.}
    assert perfect.threshold == pytest.approx(np.full(10, .11))                   # the first of the best: .1 < .11, while .1 < .1 is false
    constant = verify_distances(np.ones(100), same)
    assert constant.accuracy == constant.auc == .5
    assert set(constant.tar_at_far.values()) == {1.}                              # the FAR jumps from 0 to 1, and the threshold lies in the jump
    assert set(constant.far_reached.values()) == {1.} and set(perfect.far_reached.values()) == {0.}
    assert perfect.resolves(.02) and not perfect.resolves(.019)                   # fifty different pairs: steps of 1/50


def test_a_table_shows_no_tar_at_another_far():
    rng, same = np.random.default_rng(0), np.tile([True, False], 2000)
    with pytest.warns(UserWarning, match="no TAR at FAR 0.001: its threshold accepts 100% of the different pairs"):
        table = results_table({"collapsed": verify_distances(np.ones(4000), same)})
    assert np.isnan(table.loc["collapsed", "tar@0.001"]) and table.loc["collapsed", "accuracy"] == 50
    noisy = verify_distances(np.where(same, .8, 1.2) + rng.normal(0, .2, 4000), same)
    fold, cuts = _fold_index(4000, 10), _far_thresholds(noisy.distance, same, _fold_index(4000, 10), (1e-3,))[0]
    reached = np.mean([np.mean(noisy.distance[(fold == f) & ~same] < cuts[f]) for f in range(10)])
    assert noisy.far_reached[1e-3] == pytest.approx(reached) and 0 < reached < .01
    with warnings.catch_warnings(action="error"): assert results_table({"noisy": noisy}).loc["noisy", "tar@0.001"] > 0


@pytest.mark.parametrize("emb,same,says", [
    (np.ones((5, 3)), [True, False], "even number"), (np.ones((0, 3)), [], "even number"), (np.ones((4, 3)), [True], "2 pairs but 1 labels"),
    (np.full((40, 3), np.nan), [True, False] * 10, "40 of 40 embeddings are not finite"),
    (np.ones((40, 3)), [True] * 20, "one kind"), (np.ones((6, 3)), [True, False, True], "3 pairs cannot be cut into 10 folds")])
def test_bad_input_is_named(emb, same, says):
    with pytest.raises(ValueError, match=says): verify(emb, np.array(same))


@pytest.mark.parametrize("n", [2, 41, 7000, 70_000])
def test_bootstrap_equals_a_plain_loop(n):
    correct, rng = np.random.default_rng(1).random(n) < .9, np.random.default_rng(3)
    means = [correct[rng.integers(n, size=n)].mean() for _ in range(50)]
    assert bootstrap_ci(correct, resamples=50, seed=3) == tuple(np.quantile(means, [.025, .975]))


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


def encoded_pairs(name="x", pairs=60):
    "A set in which pairs share images: 30 distinct ones."
    g = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (30, 3, 8, 8), generator=g, dtype=torch.uint8)
    index = torch.randint(0, 30, (2 * pairs,), generator=g)
    same = torch.arange(pairs) % 2 == 0
    index[1::4] = index[0::4]
    return pair_set(name, [encode_image(images[i]) for i in index], same.tolist()), (images[index], same)


def test_a_pair_set_gives_the_numbers_of_its_arrays_and_embeds_each_image_once():
    packed, arrays = encoded_pairs()
    model = Counting()
    ours = verify_sets(model, [packed], batch_size=7)["x"]
    assert model.seen == 2 * len(packed.images) <= 60 < 2 * 120
    theirs = verify_sets(model, {"y": arrays}, batch_size=7)["y"]
    assert np.array_equal(ours.distance, theirs.distance) and ours.accuracy == theirs.accuracy
    assert list(evaluate(model, {"a": packed, "b": arrays}).index) == ["a", "b", "AVG"]


WRONG = {"mine: 4 pairs cannot be cut into 10 folds": [True, False] * 2, "mine: all 30 pairs are of one kind": [True] * 30, "mine: all 12 pairs are of one kind": [False] * 12}

@pytest.mark.parametrize("says", WRONG)
@pytest.mark.parametrize("form", ["pairs", "arrays", "tensors"])
def test_a_set_that_cannot_be_used_is_named_before_anything_is_embedded(says, form):
    same, model, good = WRONG[says], Counting(), encoded_pairs()[0]
    images = torch.zeros(2 * len(same), 3, 8, 8, dtype=torch.uint8)
    bad = dict(pairs=pair_set("mine", [b"no image"] * 2 * len(same), same), arrays=(images, np.array(same)), tensors=(images, torch.tensor(same)))[form]
    with pytest.raises(ValueError, match=says): check_sets({"x": good, "mine": bad})
    with pytest.raises(ValueError, match=says): evaluate(model, [good, bad] if form == "pairs" else {"x": good, "mine": bad})
    assert model.seen == 0 and list(check_sets(iter([good]))) == ["x"]


def test_two_sets_of_one_name_are_told_apart():
    a, b = (pair_set("lfw", [b"a", b"b"] * 10, [True, False] * 5, [f"{folder}/lfw.bin, image {k}" for k in range(20)]) for folder in ("mine", "theirs"))
    with pytest.raises(ValueError, match="called lfw.* mine/lfw.bin.* theirs/lfw.bin.*: rename one"): check_sets([a, encoded_pairs()[0], b])
    with pytest.raises(ValueError, match="called lfw"): evaluate(Counting(), [a, b])
    with pytest.raises(ValueError, match="no benchmark"): evaluate(Counting(), [])


def test_embeddings_that_are_not_finite_name_the_set():
    model = Counting()
    model.scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="x: 120 of 120 embeddings are not finite"): evaluate(model, [encoded_pairs()[0]])


def test_a_pair_set_is_decoded_to_the_size_of_the_recogniser():
    packed, _ = encoded_pairs()
    model = Counting()
    model.config = type("config", (), {"size": 5})
    shapes = []
    model.register_forward_pre_hook(lambda _, x: shapes.append(tuple(x[0].shape[1:])))
    evaluate(model, [packed])
    assert set(shapes) == {(3, 5, 5)}


FIVE = ["lfw", "cfp_fp", "agedb_30", "calfw", "cplfw"]


def test_gap_to_real_stands_only_beside_all_five():
    v = verify(np.random.default_rng(0).normal(size=(200, 8)), np.arange(100) % 2 == 0)
    table = results_table({**{n: v for n in FIVE}, "mine": v})
    assert table.loc["AVG", "GtR"] == pytest.approx(94.26 - 100 * v.accuracy) and table["GtR"].isna().sum() == 6
    assert "GtR" not in results_table({n: v for n in FIVE[1:]}) and "GtR" not in results_table({f"proc-{n}": v for n in FIVE})


def test_the_interval_of_the_average_is_that_of_independent_sets():
    rng = np.random.default_rng(2)
    sets = {n: verify(rng.normal(size=(2 * n, 4)), np.arange(n) % 2 == 0) for n in (100, 400, 1600)}
    table = results_table(sets)
    variance = sum(v.correct.var() / len(v.correct) for v in sets.values()) / 9
    assert table.loc["AVG", "ci_high"] - table.loc["AVG", "ci_low"] == pytest.approx(100 * 2 * 1.96 * variance ** .5, rel=.1)
    assert table.loc["AVG", "ci_low"] < table.loc["AVG", "accuracy"] < table.loc["AVG", "ci_high"]


def test_over_seeds_is_the_t_interval():
    tables = [pd.DataFrame({"accuracy": [a, b], "auc": [1., 2.]}, index=["x", "AVG"]) for a, b in ((80, 80), (82, 80), (87, 80))]
    out = table_over_seeds(tables)
    assert out.loc["x", "mean"] == 83 and out.loc["x", "std"] == pytest.approx(np.std([80, 82, 87], ddof=1))
    low, high = ttest_1samp([80, 82, 87], 0).confidence_interval(.95)
    assert (out.loc["x", "ci_low"], out.loc["x", "ci_high"]) == pytest.approx((low, high))
    assert out.loc["AVG", ["mean", "std", "ci_low", "ci_high", "seeds"]].tolist() == [80, 0, 80, 80, 3]
    assert table_over_seeds(tables, "auc", .5)["mean"].tolist() == [1, 2]
    wide = [pd.DataFrame({"accuracy": [a, 100 - a], "GtR": [a - 100, a]}, index=["high", "low"]) for a in (90., 99.9, 100.)]
    assert table_over_seeds(wide).loc["high", "ci_high"] == 100 and table_over_seeds(wide).loc["low", "ci_low"] == 0
    assert table_over_seeds(wide, "GtR").loc["high", "ci_low"] < -10 and table_over_seeds(wide, "GtR").loc["high", "ci_high"] > 0
    with pytest.raises(ValueError, match="two seeds"): table_over_seeds(tables[:1])
    with pytest.raises(ValueError, match="different sets"): table_over_seeds([tables[0], tables[1].iloc[:1]])


def test_the_benchmark_compares_equal_results():
    assert bench_verification(pairs=400, dim=8, repeats=1)["equal"] is True


def test_figures_leave_the_users_settings_alone():
    before = dict(plt.rcParams)
    same = np.tile([True, False], 50)
    many = {n: verify_distances(np.where(same, .5, 1.5), same) for n in "abcde"}
    many["b"] = verify_distances(np.linspace(0, 4, 100), same)
    for n, shown in ((1, 2), (2, 3), (3, 4), (5, 6)):
        fig = plot_verification(dict(list(many.items())[:n]))
        visible = [ax for ax in fig.axes if ax.get_visible()]
        assert len(visible) == shown and len(visible[-1].lines) == n and visible[0].get_title() == "a: 100.00%, AUC 1.000"
        assert visible[0].title.get_bbox_patch().get_facecolor()[:3] == pytest.approx(visible[-1].lines[0].get_color()[:3])
        plt.close(fig)
    with figure_style(): assert not plt.rcParams["axes.spines.top"]
    assert dict(plt.rcParams) == before
