"Achieved similarity, control and separation against arithmetic written out."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import rankdata

from cemiface.audit import (BUCKETS, achieved_similarity, class_cosines, control_curve, draw_pairs, frechet_distance, plot_class_cosines, plot_control,
                            plot_tsne, tsne_points)


def at_cosines(cos):
    "Unit vectors in the plane at given cosines to (1, 0)."
    cos = np.asarray(cos, float)
    return np.stack([cos, np.sqrt(1 - cos ** 2)], 1)


def test_achieved_similarity_of_known_cosines():
    cos = [.05, .07, .25, .35, .6, .8, -.3, -.1]
    row = achieved_similarity(at_cosines(cos), np.repeat([0, 1, 2, 3], 2), np.tile([[2., 0]], (4, 1)), name="known").loc["known"]
    assert row["avg_sim"] == pytest.approx(100 * np.mean(cos), abs=1e-4) and row["std"] == pytest.approx(100 * np.std(cos), abs=1e-4)
    assert row["std_subjects"] == pytest.approx(100 * np.std([.06, .3, .7, -.2]), abs=1e-4)
    assert row[list(BUCKETS)].tolist() in ([1, 1, 0, 0, 1, 0, 1], [1, 1, 0, 1, 0, 0, 1])      # .3 lies on a bound, up to rounding


def test_buckets_leave_no_gap():
    bounds = [b for pair in BUCKETS.values() for b in pair]
    assert bounds[1:-1:2] == bounds[2::2] and bounds[0] == -np.inf and bounds[-1] == np.inf
    cos = np.random.default_rng(0).uniform(-1, 1, 500)
    row = achieved_similarity(at_cosines(cos), np.arange(500), np.tile([[1., 0]], (500, 1))).iloc[0]
    assert row[list(BUCKETS)].sum() == 500 and row["below 0"] == (cos < 0).sum() and row["above 0.5"] == (cos >= .5).sum()


def test_subjects_without_images_do_not_count():
    row = achieved_similarity(at_cosines([.5, .7]), [2, 2], np.tile([[1., 0]], (4, 1))).iloc[0]
    assert row[list(BUCKETS)].sum() == 1 and row["std_subjects"] == 0
    with pytest.raises(ValueError, match="the set is empty"): achieved_similarity(np.ones((0, 2)), [], np.ones((1, 2)))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-1., -.5, 0., .3, 1.]), st.floats(-1, 1, width=16)), min_size=4, max_size=40))
def test_control_curve_equals_loops(pairs):
    m, achieved = np.array(pairs).T
    values = sorted(set(m))
    if len(values) < 2:
        with pytest.raises(ValueError, match="two or more values"): control_curve(m, achieved)
        return
    curve = control_curve(torch.tensor(m), torch.tensor(achieved))
    means = [np.mean(achieved[m == v]) for v in values]
    np.testing.assert_allclose(curve.table["mean"], means, atol=1e-12)
    np.testing.assert_allclose(curve.table["std"], [np.std(achieved[m == v]) for v in values], atol=1e-9)
    np.testing.assert_allclose(curve.table["low"], [np.quantile(achieved[m == v], .05) for v in values], atol=1e-12)
    assert curve.table["images"].tolist() == [(m == v).sum() for v in values] and curve.span == pytest.approx(means[-1] - means[0])
    exact = curve.table["mean"].tolist()
    if len(set(exact)) == 1: assert np.isnan(curve.spearman) and np.isnan(curve.spearman_images)
    else:
        assert curve.spearman == pytest.approx(np.corrcoef(values, rankdata(exact))[0, 1] if len(values) == 2 else np.corrcoef(rankdata(values), rankdata(exact))[0, 1])
        assert curve.spearman_images == pytest.approx(np.corrcoef(rankdata(m), rankdata(achieved))[0, 1])


def test_control_limits_and_errors():
    m = np.tile([-1, 0, 1], 20)
    assert control_curve(m, m / 3).spearman == 1 and control_curve(m, -m / 3).spearman == -1
    assert np.isnan(control_curve(m, np.full(60, .2)).spearman) and control_curve(m, np.full(60, .2)).span == 0
    assert len(control_curve(np.float32([.1, .1, .3]), [0, 0, 1]).table) == 2
    with pytest.raises(ValueError, match="not finite"): control_curve(m, np.full(60, np.nan))
    with pytest.raises(ValueError, match="both for each image"): control_curve(m, m[:-1])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=30), st.integers(0, 99))
def test_drawn_pairs_are_what_they_say(labels, seed):
    labels, rng = np.array(labels), np.random.default_rng(seed)
    if len(set(labels)) < 2 or np.bincount(labels).max() < 2:
        with pytest.raises(ValueError, match="at least two subjects"): draw_pairs(labels, 9, rng)
        return
    same, different = draw_pairs(labels, 60, rng)
    assert (labels[same[0]] == labels[same[1]]).all() and (same[0] != same[1]).all()
    assert (labels[different[0]] != labels[different[1]]).all() and same.shape == different.shape == (2, 60)


def test_every_pair_is_drawn_equally_often():
    labels = np.array([0, 1, 0, 1, 2, 0])
    same, different = draw_pairs(labels, 60000, np.random.default_rng(0))
    count = np.zeros((6, 6)); np.add.at(count, tuple(same), 1)
    for i in (0, 1, 2, 3, 5):
        partners = [j for j in range(6) if j != i and labels[j] == labels[i]]
        np.testing.assert_allclose(count[i, partners], 60000 / 5 / len(partners), rtol=.05)
    count[:] = 0; np.add.at(count, tuple(different), 1)
    for i in range(6): np.testing.assert_allclose(count[i, labels != labels[i]], 10000 / (labels != labels[i]).sum(), rtol=.06)


def test_class_cosines_of_orthogonal_subjects():
    emb = np.repeat(np.eye(4), 3, 0) * np.arange(1, 13)[:, None]
    same, different = class_cosines(emb, np.repeat(np.arange(4), 3), pairs=100)
    assert same == pytest.approx(np.ones(100)) and different == pytest.approx(np.zeros(100))
    torch.testing.assert_close(class_cosines(torch.tensor(emb), np.repeat(np.arange(4), 3), 100)[0], same)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.integers(2, 12), st.integers(1, 6), st.integers(0, 10**6))
def test_frechet_distance_is_a_distance_that_no_rotation_changes(n, m, d, seed):
    g = torch.Generator().manual_seed(seed)
    a, b, shift = torch.randn(n, d, generator=g).double(), 2*torch.randn(m, d, generator=g).double(), torch.randn(d, generator=g).double()
    turn = torch.linalg.qr(torch.randn(d, d, generator=g).double())[0]
    there = frechet_distance(a, b)
    assert there >= -1e-9 and there == pytest.approx(frechet_distance(b, a), abs=1e-9) == pytest.approx(frechet_distance(a @ turn, b @ turn), abs=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9) and frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), abs=1e-9)


def test_tsne_is_seeded_and_keeps_clusters_together():
    rng = np.random.default_rng(0)
    emb = np.repeat(np.eye(3, 16), 12, 0) + .05 * rng.normal(size=(36, 16))
    a, b, c = (tsne_points(emb, perplexity=5, seed=s) for s in (0, 0, 1))
    assert (a == b).all() and a.shape == (36, 2) and np.isfinite(c).all()
    gaps = np.linalg.norm(a[:, None] - a[None], axis=-1) + np.diag(np.full(36, np.inf))
    assert (gaps.argmin(1) // 12 == np.arange(36) // 12).all()                     # every point's neighbour is of its cluster
    with pytest.raises(ValueError, match="at least 4"): tsne_points(emb[:3])
    with pytest.raises(ValueError, match="not finite"): tsne_points(emb * np.nan)


def test_figures_show_what_they_are_given():
    m = np.tile([-1., 0., 1.], 12)
    curve = control_curve(m, .3 + .2 * m + .01 * np.arange(36) / 36)
    fig = plot_control({"a": curve, "b": curve})
    marks = fig.axes[1].collections[-1].get_offsets()
    np.testing.assert_allclose(marks[:, 1], curve.table["mean"]); plt.close(fig)
    points = np.random.default_rng(0).normal(size=(36, 2))
    fig = plot_tsne(points, m, np.arange(36) // 3)
    assert "12 subjects" in fig.axes[1].get_title() and all(len(ax.collections[0].get_offsets()) == 36 for ax in fig.axes[:2]); plt.close(fig)
    fig = plot_class_cosines({"x": (np.full(50, .8), np.zeros(50)), "y": (np.full(50, .4), np.zeros(50))})
    assert ["mean 0.80" in t.get_text() for t in fig.axes[0].get_legend().get_texts()] == [False, True]; plt.close(fig)
