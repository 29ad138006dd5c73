"Similarity groups against a loop over subjects."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.groups import cos_to_centre, group_samples, group_table, plot_groups, similarity_groups


@st.composite
def scored_subjects(draw, n_groups=None):
    G = n_groups or draw(st.integers(1, 7))
    counts = draw(st.lists(st.integers(G, 4 * G + 1), min_size=1, max_size=5))
    numbers = draw(st.permutations(range(0, 3 * len(counts), 3)))                 # labels need not be dense
    labels = draw(st.permutations([c for c, n in zip(numbers, counts) for _ in range(n)]))
    cos = draw(st.lists(st.one_of(st.floats(-1, 1, width=32), st.sampled_from([0., .5])), min_size=len(labels), max_size=len(labels)))
    return np.array(cos, np.float32), np.array(labels), G


@settings(max_examples=80, deadline=None)
@given(scored_subjects())
def test_groups_equal_a_loop_over_subjects(case):
    cos, labels, G = case
    groups = similarity_groups(torch.tensor(cos), torch.tensor(labels), G)
    assert groups.dtype == torch.int64 and torch.equal(groups, similarity_groups(cos, labels, G))
    for c in np.unique(labels):
        mine = sorted(np.flatnonzero(labels == c), key=lambda i: -cos[i])          # sorted() is stable
        for r, i in enumerate(mine): assert groups[i] == int((2 * r + 1) * G / (2 * len(mine)))
        sizes = np.bincount(groups[torch.tensor(labels == c)], minlength=G)
        assert len(sizes) == G and sizes.min() >= 1 and sizes.max() - sizes.min() <= 1
        for g in range(G - 1):
            here, there = (cos[(labels == c) & (groups.numpy() == k)] for k in (g, g + 1))
            assert here.min() >= there.max()


def test_extra_images_spread_evenly_over_groups():
    for G in (3, 5, 7):
        labels = np.repeat(np.arange(G), np.arange(G, 2 * G))                      # every remainder once
        cos = np.random.default_rng(0).random(len(labels))
        totals = np.bincount(similarity_groups(cos, labels, G))
        assert totals.max() == totals.min()


@settings(max_examples=30, deadline=None)
@given(scored_subjects(n_groups=5))
def test_table_equals_a_loop_over_subjects(case):
    cos, labels, _ = case
    groups = similarity_groups(cos, labels).numpy()
    table = group_table(cos, labels, groups)
    assert table["images"].sum() == len(cos) and table.index.tolist() == [0, 1, 2, 3, 4]
    for g in range(5):
        parts = [cos[(labels == c) & (groups == g)].astype(float) for c in np.unique(labels)]
        expected = [np.mean([f(p) for p in parts]) for f in (np.mean, np.max, np.min)]
        np.testing.assert_allclose(table.loc[g, ["avg_sim", "avg_largest_sim", "avg_lowest_sim"]].astype(float), expected, atol=1e-7)
    assert (table["avg_lowest_sim"].to_numpy()[:-1] >= table["avg_largest_sim"].to_numpy()[1:] - 1e-9).all()


def test_known_groups():
    cos, labels = [.9, .1, .5, .7, .3, .2, .4, .6, .8, 1.], [0] * 5 + [7] * 5
    assert similarity_groups(cos, labels).tolist() == [0, 4, 2, 1, 3, 4, 3, 2, 1, 0]
    table = group_table(cos, labels, similarity_groups(cos, labels))
    assert table["avg_sim"].tolist() == pytest.approx([.95, .75, .55, .35, .15])
    assert similarity_groups([.5] * 10, [3] * 10).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]   # ties keep their order


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_cosine_is_blockwise_and_takes_arrays_on_disk(tmp_path, block):
    rng = np.random.default_rng(0)
    emb, centres, labels = rng.normal(size=(50, 16)).astype(np.float32), rng.normal(size=(6, 16)), rng.integers(6, size=50)
    np.save(tmp_path / "emb.npy", emb)
    expected = [e @ centres[y] / np.linalg.norm(e) / np.linalg.norm(centres[y]) for e, y in zip(emb.astype(float), labels)]
    cos = cos_to_centre(np.load(tmp_path / "emb.npy", mmap_mode="r"), labels, centres, block=block)
    np.testing.assert_allclose(cos, expected, atol=1e-6)
    assert cos.abs().max() <= 1 and len(cos_to_centre(emb[:0], labels[:0], centres)) == 0


def test_bad_input_is_named():
    emb, labels = torch.ones(4, 8), torch.tensor([0, 1, 2, 3])
    with pytest.raises(ValueError, match="labels go from 0 to 3, but there are 3 centres"): cos_to_centre(emb, labels, torch.ones(3, 8))
    with pytest.raises(ValueError, match="do not fit"): cos_to_centre(emb, labels, torch.ones(4, 9))
    with pytest.raises(ValueError, match="NaN"): cos_to_centre(emb, labels, torch.full((4, 8), float("nan")))
    with pytest.raises(ValueError, match="4 of 4 subjects have fewer than 5 images, the first is subject 0.*min_per_subject=5"): similarity_groups(torch.rand(4), labels)
    with pytest.raises(ValueError, match="one label an image"): similarity_groups(torch.rand(5), labels)


class Lazy:
    "Images that are made when asked for, one batch at a time."
    def __len__(self): return 12
    def __getitem__(self, i): return (i * 20).to(torch.uint8)[:, None, None, None].expand(-1, 3, 16, 16)


def test_figure_shows_the_right_faces_and_leaves_gaps():
    cos, labels = torch.linspace(1, 0, 12), torch.tensor([0] * 12)
    groups = similarity_groups(cos, labels)
    picks = group_samples(cos, labels, groups, 0, 3)
    assert picks.shape == (5, 3) and all((groups[row[row >= 0]] == g).all() for g, row in enumerate(picks))
    assert sorted(picks[picks >= 0]) == list(range(12)) and (picks == -1).sum() == 3
    for images in (Lazy(), Lazy()[torch.arange(12)]):
        fig = plot_groups(images, cos, labels, groups, subjects=[0], per_group=3)
        texts = [t.get_text() for ax in fig.axes for t in ax.texts]
        assert texts == [f"{float(cos[i]):.2f}" for i in range(12)]
        shown = fig.axes[1].images[0].get_array()
        assert shown[0, 0, 0] == 20 * picks[1, 0] and fig.axes[1].get_title() == f"group 1: mean {cos[groups == 1].mean():.2f}"
        plt.close(fig)
