"Achieved similarity, control, separation and leakage against arithmetic written out; the page and the command."
import os
import re
import shutil
from math import comb

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import rankdata
from typer.testing import CliRunner

from cemiface.audit.similarity import (BUCKETS, LOOKS, achieved_similarity, class_cosines, control_curve, draw_pairs, first_rows, frechet_distance, frechet_of_moments,
                            label_share, look_table, plot_class_cosines, plot_control, plot_tsne, read_moments, share_error, tsne_points)
from cemiface.audit.page import PARTS, Audit, audit_findings, finite_embeddings
from cemiface.cli.app import app
from cemiface.data.faceset import FaceSet, open_faces
from cemiface.generation.shipped import shipped_models
from cemiface.data.images import write_folder
from cemiface.audit.leakage import (FMR, cut_offs, factor_table, fit_factors, leakage, least_noticed, nearest_others, rate_interval, same_cosine, template_images,
                              templates)
from cemiface.sets.stored import open_set
from cemiface.sets.synthesis import generate_set


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
@given(st.integers(3, 12), st.integers(2, 8), st.floats(0, 5), st.integers(0, 10**6))
def test_label_share_equals_sums_in_loops(S, K, apart, seed):
    rng = np.random.default_rng(seed)
    x = apart * rng.normal(size=(S, 1)) + rng.normal(size=(S, K))
    between = sum(K * (x[i].mean() - x.mean()) ** 2 for i in range(S)) / (S - 1)
    within = sum((x[i, k] - x[i].mean()) ** 2 for i in range(S) for k in range(K)) / (S * (K - 1))
    rho = label_share(torch.tensor(x)).item()
    assert rho == pytest.approx((between - within) / (between + (K - 1) * within)) and -1 / (K - 1) - 1e-9 <= rho <= 1
    assert rho == pytest.approx(label_share(torch.tensor(3 - 2 * x[::-1].copy())).item())  # another scale, another order
    left_out = [label_share(torch.tensor(np.delete(x, i, 0))).item() for i in range(S)]
    assert share_error(torch.tensor(x)) == pytest.approx(((S - 1) ** 2 / S * np.var(left_out, ddof=1)) ** .5)


def test_looks_of_light_that_goes_by_label():
    g = torch.Generator().manual_seed(0)
    anyhow = torch.randint(0, 256, (20, 6, 3, 8, 8), generator=g, dtype=torch.uint8)
    dim, dark_left = anyhow // torch.arange(1, 21, dtype=torch.uint8).view(20, 1, 1, 1, 1), anyhow.clone()
    dark_left[:10, ..., :4] //= 4
    table = look_table(dict(anyhow=anyhow, dim=dim, dark_left=dark_left)).set_index("set")
    assert table.loc["anyhow", [*LOOKS]].abs().max() < .2 and table.brightness["dim"] > .95 and table["side of the light"]["dark_left"] > .95 and abs(table["side of the light"]["dim"]) < .2
    assert table.images.tolist() == [120] * 3


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.integers(1, 4))
def test_first_rows_are_a_loop(labels, K):
    expected = [[i for i, y in enumerate(labels) if y == s][:K] for s in range(6) if labels.count(s) >= K]
    assert first_rows(torch.tensor(labels), K).tolist() == expected


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


# --- leakage

def loops(probes, gallery, labels, own):
    "Nearest other and all impostor cosines, one pair at a time."
    nearest, impostors = [], []
    for p, mine in zip(probes, own):
        cos = [float(p @ g / np.linalg.norm(p) / np.linalg.norm(g)) for g in gallery]
        others = [c for c, y in zip(cos, labels) if y != mine]
        nearest.append(max(others)); impostors += others
    return np.array(nearest), np.sort(impostors)[::-1]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(2, 30), st.integers(2, 5), st.integers(0, 10**6), st.sampled_from([1, 7, 60, 2**26]), st.booleans())
def test_nearest_others_equals_loops(n_probes, n_images, dim, seed, block, with_own):
    rng = np.random.default_rng(seed)
    probes, gallery, labels = rng.normal(size=(n_probes, dim)), rng.normal(size=(n_images, dim)), rng.integers(0, 4, n_images)
    own = rng.integers(-1, 6, n_probes) if with_own else np.full(n_probes, -1)
    if any((labels == o).all() for o in own):
        with pytest.raises(ValueError, match="nobody else"): nearest_others(probes, gallery, labels, own)
        return
    nearest, impostors = loops(probes, gallery, labels, own)
    found = nearest_others(probes, gallery, labels, own if with_own else None, fmr=.2, block=block)
    np.testing.assert_allclose(found.cosine, nearest, atol=1e-5)
    chosen = gallery[found.row.numpy()]
    np.testing.assert_allclose((probes * chosen).sum(1) / np.linalg.norm(probes, axis=1) / np.linalg.norm(chosen, axis=1), nearest, atol=1e-5)
    assert found.pairs == len(impostors) and all(labels[r] != o for r, o in zip(found.row.tolist(), own))
    if .2 * len(impostors) < 10: assert np.isnan(found.threshold)
    else: assert found.threshold == pytest.approx(impostors[int(.2 * len(impostors))], abs=1e-5)


def test_hostile_embeddings():
    x, y = torch.randn(6, 4), torch.tensor([0, 0, 1, 1, 2, 2])
    for bad in (torch.nan, torch.inf, 0.):
        broken = x.clone(); broken[3] = bad
        with pytest.raises(ValueError, match="embedding 3 of the gallery"): nearest_others(x, broken, y)
        with pytest.raises(ValueError, match="embedding 3 of the probes"): nearest_others(broken, x, y)
    with pytest.raises(ValueError, match="nobody else"): nearest_others(x[:1], x[:2], y[:2], torch.tensor([0]))
    with pytest.raises(ValueError, match="nobody else"): nearest_others(x[:1], x[:0], y[:0])


def people(n, images=6, dim=32, spread=.6, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n).repeat_interleave(images)
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=g))[labels] + spread * torch.randn(n * images, dim, generator=g) / dim ** .5, labels


def test_a_set_leaks_from_itself_entirely_and_strangers_do_not():
    emb, labels = people(120)
    train, mine = templates(emb, labels), torch.arange(120)
    itself = leakage(train, train, emb, labels, people_own=mine)
    assert itself.table.generated.tolist() == [100] * 3 and itself.leaks and (emb[itself.generated.row] * train).sum(1).min() > .5
    new, which = people(120, seed=1)
    strangers = leakage(templates(new, which), train, emb, labels, people_own=mine)
    assert not strangers.leaks and strangers.real.threshold == itself.real.threshold
    copied = leakage(torch.cat([train[:12], templates(new, which)[12:]]), train, emb, labels, people_own=mine)
    assert copied.leaks and copied.least <= 12 and "nearer than real" in repr(copied)


def test_strangers_pass_the_threshold_about_as_often_as_chance_has_it():
    g, N = torch.Generator().manual_seed(2), 400
    gallery, probes, real = (torch.randn(n, 64, generator=g) for n in (N, 1500, 1500))
    found = leakage(probes, real, gallery, torch.arange(N))
    assert found.real.pairs == 1500 * N
    expected = 100 * (1 - (1 - FMR) ** N)                  # 33%, of the 40% that FMR x N would be without overlap
    assert abs(found.table.generated.iloc[0] - expected) < 5 and abs(found.table.real.iloc[0] - expected) < 5 and not found.leaks


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=30), st.lists(st.floats(-1, 1, width=16), min_size=1, max_size=30), st.integers(0, 99))
def test_cut_offs_count_and_do_not_depend_on_order(found, real, seed):
    found, real = torch.tensor(found), torch.tensor(real)
    table = cut_offs(found, real, .25)
    for cut, row in zip((.25, sorted(real.tolist())[::-1][int(.05 * len(real))], max(real.tolist())), table.itertuples()):
        k, r, n, m = sum(f > cut for f in found.tolist()), sum(x > cut for x in real.tolist()), len(found), len(real)
        assert (row.cosine, row.generated, row.real) == (pytest.approx(cut), pytest.approx(100 * k / n), pytest.approx(100 * r / m))
        tail = sum(comb(n, j) * comb(m, k + r - j) for j in range(k, min(n, k + r) + 1)) / comb(n + m, k + r)
        assert row.p == pytest.approx(tail, rel=1e-6) and row.low <= row.generated <= row.high
    shuffled = cut_offs(found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))], real.flip(0), .25)
    np.testing.assert_allclose(shuffled.to_numpy(), table.to_numpy())
    assert (cut_offs(found + .1, real, .25).p <= table.p + 1e-12).all()            # nearer is never less suspicious


@pytest.mark.parametrize("k,n", [(0, 5), (1, 1), (3, 40), (40, 40)])
def test_rate_interval_by_the_binomial(k, n):
    low, high = rate_interval(k, n)
    at_least = lambda p: sum(comb(n, j) * p ** j * (1 - p) ** (n - j) for j in range(k, n + 1))
    at_most = lambda p: sum(comb(n, j) * p ** j * (1 - p) ** (n - j) for j in range(0, k + 1))
    assert low == 0 if k == 0 else at_least(low) == pytest.approx(.025)
    assert high == 1 if k == n else at_most(high) == pytest.approx(.025)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60))
def test_least_noticed_is_the_least(n, m):
    chance = lambda k: 3 * comb(n, k) / comb(n + m, k)
    k = least_noticed(n, m)
    if k is None: assert chance(n) >= .01 - 1e-12 # 3 / C(25,2) is .01, and rounding decides
    else: assert chance(k) < .01 + 1e-12 and (k == 1 or chance(k - 1) >= .01 - 1e-12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(0, 999))
def test_templates_and_same_cosine_equal_loops(counts, seed):
    labels, rng = np.repeat(range(len(counts)), counts), np.random.default_rng(seed)
    emb = rng.normal(size=(len(labels), 3)).astype(np.float32)
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    means = np.stack([unit[labels == s].sum(0) for s in range(len(counts))])
    np.testing.assert_allclose(templates(torch.tensor(emb), torch.tensor(labels)), means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-4)
    each = [np.mean([unit[i] @ unit[j] for i in mine for j in mine if i != j]) for s in range(len(counts)) if len(mine := np.flatnonzero(labels == s)) > 1]
    found = same_cosine(torch.tensor(emb), torch.tensor(labels))
    assert found == pytest.approx(np.mean(each), abs=1e-5) if each else np.isnan(found)


def test_templates_are_equally_reliable():
    (a, la), (b, lb) = people(40, 8, spread=.2), people(40, 8, spread=1.5, seed=1)
    ours, theirs = template_images(a, la, b, lb)
    reliability = lambda k, rho: k * rho / (1 + (k - 1) * rho)
    ra, rb = same_cosine(a, la), same_cosine(b, lb)
    assert theirs == 8 and ours < 8 and (ours, theirs) == template_images(b, lb, a, la)[::-1]
    assert min(abs(reliability(k, ra) - reliability(8, rb)) for k in range(1, 9)) == abs(reliability(ours, ra) - reliability(8, rb))
    assert template_images(a, la, torch.randn(5, 32), torch.arange(5)) == (1, 1)


def test_factors_that_are_there_are_read_and_no_others():
    g = torch.Generator().manual_seed(0)
    truth, labels = 2 * torch.rand(80, 5, generator=g) - 1, torch.arange(80).repeat_interleave(4)
    mixing = torch.randn(3, 20, generator=g)
    emb = truth[labels][:, :3] @ mixing + .1 * torch.randn(320, 20, generator=g)           # the last two leave no trace
    reader = fit_factors(emb, labels, truth[labels])
    assert reader.readable.tolist() == [True] * 3 + [False] * 2 and reader.r2[:3].min() > .9
    table = factor_table(reader, reader.held_out[:10], truth[:10])
    spread = truth.std(0)
    by_hand = [[float(((reader.held_out[a] - truth[b]) / spread)[:3].square().mean().sqrt()) for b in range(80)] for a in range(80)]
    assert table["mean"].iloc[0] == pytest.approx(np.mean(np.diag(by_hand)), abs=1e-5)
    assert table["mean"].iloc[1] == pytest.approx(np.mean(np.min(by_hand + np.diag([np.inf] * 80), 1)), abs=1e-5)
    assert table["mean"].iloc[2] == pytest.approx(np.mean(np.diag(by_hand)[:10]), abs=1e-5) and table["mean"].iloc[3] <= table["mean"].iloc[2]
    units, known = torch.tensor([1000., 1, .01, 1, 1]), torch.cat([truth, torch.ones(80, 1)], 1)                   # other units, and one that never varies
    other = fit_factors(emb, labels, (known * torch.cat([units, torch.ones(1)]))[labels])
    assert other.readable.tolist() == [True] * 3 + [False] * 3
    assert factor_table(other, other.held_out[:10], other.truth[:10]).values == pytest.approx(table.values, rel=1e-3)
    with pytest.raises(ValueError, match="tells none"): fit_factors(torch.randn(320, 20, generator=g), labels, truth[labels])
    with pytest.raises(ValueError, match="at least 20"): fit_factors(emb[:40], labels[:40], truth[labels][:40])


# --- features from files

def test_moments_from_files(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(40, 6)), 2 * rng.normal(size=(30, 6)) + 1
    np.save(tmp_path / "a.npy", a.astype(np.float32)), np.savez(tmp_path / "b.npz", mu=b.mean(0), sigma=np.cov(b.T), other=np.ones(2))
    near = frechet_of_moments(*read_moments(tmp_path / "a.npy"), *read_moments(tmp_path / "b.npz"))
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    assert near == pytest.approx(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root), rel=1e-5)
    np.save(tmp_path / "one.npy", np.ones((5, 1)) * np.arange(5.)[:, None])
    assert read_moments(tmp_path / "one.npy")[1].shape == (1, 1)


class Bomb:
    def __reduce__(self): return os.system, ("touch exploded",)


@pytest.mark.parametrize("name,write,says", [
    ("x.npy", lambda p: np.save(p, np.array([Bomb()], object), allow_pickle=True), "no array of numbers .but Python objects."), ("x.npz", lambda p: np.savez(p, mu=np.array([Bomb()], object), sigma=np.ones((1, 1))), "no array"),
    ("x.npz", lambda p: p.write_bytes(b"PK\x03\x04junk"), "x.npz is not an array of numbers"), ("x.npy", lambda p: p.write_bytes(b""), "is an empty file, not an array of numbers"),
    ("x.npy", lambda p: p.mkdir(), "is an empty folder, not an array of numbers"), ("x.npy", lambda p: None, "there is no .*x.npy: give a file .npy or .npz"), ("x.npy", lambda p: p.write_bytes(b"\x08\x07\x12\x07pytorch"), "is an ONNX graph, not an array"), ("x.npz", lambda p: np.savez(p, features=np.ones(3)), "no mu"),
    ("x.npy", lambda p: np.save(p, np.ones(3)), "shape"), ("x.npy", lambda p: np.save(p, np.ones((3, 2), int)), "shape"), ("x.npz", lambda p: np.savez(p, mu=np.ones(3), sigma=np.eye(2)), "do not fit"),
    ("x.npy", lambda p: np.save(p, np.full((3, 2), np.nan)), "not finite"), ("x.npz", lambda p: np.savez(p, mu=np.array("a"), sigma=np.eye(2)), "no array")])
def test_files_that_are_no_features(tmp_path, monkeypatch, name, write, says):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    with pytest.raises(ValueError, match=says): read_moments(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


# --- the page and the command

@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    "A set drawn by the shipped generator, one more as records, real people as a folder."
    root = tmp_path_factory.mktemp("sets")
    asked = open_faces("proc:webface_1shot", 64, 6, 1)
    for name, form in (("drawn", "folder"), ("records", "records")):
        generate_set(shipped_models(), asked, [1., -1.], 2, root / name, steps=2, oversample=1, form=form, progress=False)
    generate_set(shipped_models(), asked, 0., 2, root / "bare", steps=1, oversample=0, progress=False)
    real = open_faces("proc:casia", 64, 24, 4)
    write_folder(root / "real", real.images, real.labels)
    write_folder(root / "copied", real.images[:48].flip(-1), real.labels[:48])
    return root


def run(*words): return CliRunner(env=dict(NO_COLOR="1", TERM="dumb")).invoke(app, ["audit", *map(str, words)])

def error(*words):
    answer = run(*words)
    assert answer.exit_code == 2 and "Traceback" not in answer.output, answer.output
    assert (line := answer.output.strip().splitlines()[-1]).startswith("cemiface audit: "), answer.output
    return line


def test_a_page_of_a_generated_set_in_either_form(sets, tmp_path):
    said = run(sets / "drawn", "--against", sets / "real", "--out", tmp_path / "a")
    assert said.exit_code == 0, said.output
    assert run(sets / "records", "--against", sets / "real", "--out", tmp_path / "b").exit_code == 0
    for table in ("leakage", "inquiries", "subjects"): assert (tmp_path / f"a/tables/{table}.csv").read_bytes() == (tmp_path / f"b/tables/{table}.csv").read_bytes()
    lines = said.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == [t.split(":")[0] for t, _ in PARTS.values()]
    assert "rendered: nobody knows" in said.stdout.replace("not rendered", "rendered") and "m = 1" in (tmp_path / "a/tables/similarity.csv").read_text()
    page = (tmp_path / "a/index.html").read_text()
    assert page.count("data:image/png;base64,") == 8 and not re.search(r'(?:src|href)="(?!data:|#)', page) and 'class="bad">Left out' in page
    assert len(pd.read_csv(tmp_path / "a/tables/subjects.csv")) == 6 and not list((tmp_path / "a").rglob("*.part"))
    assert "begun with another against" in error(sets / "drawn", "--against", sets / "copied", "--out", tmp_path / "a")


def test_copies_end_in_an_alarm(sets, tmp_path):
    said = run(sets / "copied", "--against", sets / "real", "--out", tmp_path / "a")
    assert said.exit_code == 1 and "Leakage: LEAK" in said.stdout and "Achieved similarity: Left out: no inquiries" in said.stdout, said.output
    assert (pd.read_csv(tmp_path / "a/tables/subjects.csv").eval("subject == nearest")).mean() > .9


def test_too_few_people_have_a_status_of_their_own(sets, tmp_path):
    said = run(sets / "drawn", "--against", sets / "real", "--subjects", 3, "--out", tmp_path / "a")
    assert said.exit_code == 4 and "Leakage: Too few to tell" in said.stdout, said.output
    said = run(sets / "drawn", "--against", sets / "real", "--subjects", 1, "--out", tmp_path / "b")
    assert said.exit_code == 4 and "Leakage: Left out" in said.stdout, said.output


def test_inquiries_held_out_people_and_features(sets, tmp_path):
    np.save(tmp_path / "f.npy", np.random.default_rng(0).normal(size=(9, 4)))
    said = run(sets / "bare", "--against", "proc:casia", "--subjects", 24, "--per-subject", 3, "--inquiries", "proc:webface_1shot", "--held-out", "proc:vggface2", "--features", tmp_path / "f.npy", tmp_path / "f.npy", "--out", tmp_path / "a")
    assert said.exit_code == 0 and "people of proc:vggface2" in said.stdout and "by 0.000 in Inception features from f.npy" in said.stdout.replace("-0", "0"), said.output
    assert "generated subjects to their inquiry" in (tmp_path / "a/tables/identity.csv").read_text()


def test_errors_in_one_line(sets, tmp_path):
    to = ("--against", sets / "real", "--out", tmp_path / "a")
    np.save(tmp_path / "e.npy", np.ones((6, 512), np.float32))
    assert "embeddings" in error(sets / "drawn", *to, "--inquiries", tmp_path / "e.npy")
    assert "not the 6 inquiries" in error(sets / "drawn", *to, "--inquiries", "proc:ddpm")
    assert "there is no" in error(tmp_path / "nothing", *to) and "there is no" in error(sets / "drawn", "--against", tmp_path / "nothing", "--out", tmp_path / "b")
    assert "no recogniser" in error(sets / "drawn", *to, "--recogniser", tmp_path / "m")
    shutil.copytree(sets / "drawn", tmp_path / "broken")
    (tmp_path / "broken/000001/0000.png").write_bytes(b"junk")
    assert "row" in error(tmp_path / "broken", *to) and not (tmp_path / "a/index.html").exists()
    (tmp_path / "broken/set.json").rename(tmp_path / "broken/.shares")
    assert "not a finished set" in error(tmp_path / "broken", *to)


def test_a_recogniser_of_another_size(sets): # and one that makes no numbers
    with pytest.raises(ValueError, match="pixels, the recogniser takes 112"): open_set(sets / "drawn", 112)
    class Broken(torch.nn.Linear):
        def forward(self, x): return torch.full((len(x), 4), torch.nan)
    with pytest.raises(ValueError, match="real: some embeddings are not finite"): finite_embeddings(Broken(1, 1), open_faces(sets / "real", 32))


def test_degenerate_sets_get_a_page():
    g = torch.Generator().manual_seed(0)
    def noise(counts, name): return FaceSet(torch.randint(256, (sum(counts), 3, 32, 32), dtype=torch.uint8, generator=g), torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)), [str(i) for i in range(len(counts))], name)
    for ours, theirs in (([1], [1]), ([3], [2, 2]), ([1, 1], [1, 1, 1]), ([2, 5], [4])):
        a, b = noise(ours, "a"), noise(theirs, "b")
        found = audit_findings(Audit(a, torch.randn(len(a), 8, generator=g), b, torch.randn(len(b), 8, generator=g)))
        assert list(found) == list(PARTS) and isinstance(found["similarity"], str)
        assert isinstance(found["leakage"], str) == (len(theirs) < 2)
        if len(theirs) > 1: assert found["leakage"].text.startswith("Too few to tell")
