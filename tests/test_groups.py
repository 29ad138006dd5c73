"Similarity groups against a loop over subjects, centres in the wrong order, groups written and trained on."
import warnings

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.bench.recognition import bench_groups
from cemiface.recognition.groups import check_centres, cos_to_centre, group_samples, group_table, class_centres, plot_groups, similarity_groups, subject_groups, write_groups
from cemiface.data.images import encode_image
from cemiface.core.files import write_whole
from cemiface.data.records import open_encoded


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


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_class_centres_equal_a_loop_over_subjects(tmp_path, block):
    rng = np.random.default_rng(1)
    emb, labels = rng.normal(size=(60, 8)).astype(np.float32), rng.permutation(np.arange(60) % 7)
    np.save(tmp_path / "emb.npy", emb)
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    means = np.stack([unit[labels == c].mean(0) for c in range(7)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                             # a read-only file on disk is no reason to warn
        for e in (emb, torch.tensor(emb), np.load(tmp_path / "emb.npy", mmap_mode="r"), 9 * emb.astype(np.float64)):
            np.testing.assert_allclose(class_centres(e, labels, block), expected, atol=1e-6)


def subjects_around(C, per, noise=1., seed=0):
    rng = np.random.default_rng(seed)
    centres, labels = rng.normal(size=(C, 32)), rng.permutation(np.repeat(np.arange(C), per))
    return centres[labels] + noise * rng.normal(size=(len(labels), 32)), labels, centres


@pytest.mark.parametrize("C", [12, 40, 300])
def test_centres_in_the_order_of_text_are_told(C):
    emb, labels, centres = subjects_around(C, 20)
    text = sorted(range(C), key=str)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_centres(emb, labels, centres) > .95 and check_centres(emb, labels, centres, sample=50) > .9
    for wrong in (centres[text], centres[np.argsort(text)]):
        with pytest.warns(UserWarning, match="sorted as text"): check_centres(emb, labels, wrong)
    for wrong in (centres[::-1].copy(), np.random.default_rng(5).normal(size=centres.shape)):
        with pytest.warns(UserWarning, match="other subjects, in another order") as said: check_centres(emb, labels, wrong)
        assert "text" not in str(said[0].message)
    with pytest.raises(ValueError, match=f"but there are {C - 1} centres"): check_centres(emb, labels, centres[1:])


def test_one_call_checks_given_centres_and_makes_missing_ones():
    emb, labels, centres = subjects_around(12, 10)
    cos, groups = subject_groups(emb, labels)
    assert torch.equal(cos, cos_to_centre(emb, labels, class_centres(emb, labels))) and torch.equal(groups, similarity_groups(cos, labels))
    assert torch.equal(subject_groups(emb, labels, centres, 3)[1], similarity_groups(cos_to_centre(emb, labels, centres), labels, 3))
    with pytest.warns(UserWarning, match="other subjects"): subject_groups(emb, labels, centres[::-1].copy())


@pytest.fixture
def whole(tmp_path):
    for name in ("2", "10", "anna"):
        for k in range(6): write_whole(tmp_path / "faces" / name / f"{k}.png", encode_image(torch.full((3, 8, 8), 10 * k + len(name), dtype=torch.uint8)))
    return open_encoded(tmp_path / "faces")


@pytest.mark.parametrize("to", ["list", "records", "folder"])
def test_written_groups_hold_the_same_bytes_under_the_same_labels(tmp_path, whole, to):
    groups = torch.arange(18) % 3
    write_groups(whole, groups, tmp_path / "out", to)
    for g in range(3):
        part = open_encoded(tmp_path / "out" / (f"group_{g}.txt" if to == "list" else f"group_{g}"))
        mine = [(int(whole.labels[i]), whole.read(i)) for i in range(18) if groups[i] == g]
        assert sorted((int(part.labels[i]), part.read(i)) for i in range(len(part))) == sorted(mine)
        assert part.subjects == whole.subjects == ["2", "10", "anna"]
    assert len(list((tmp_path / "out").iterdir())) == 3


@pytest.mark.parametrize("to", ["list", "records", "folder"])
def test_the_same_call_finishes_what_a_killed_one_began(tmp_path, whole, to, monkeypatch):
    import cemiface.recognition.groups as module
    groups, made = torch.arange(18) % 3, []
    plain = module.convert
    def killed(part, place, *args, **kw):
        if len(made) == 2: raise KeyboardInterrupt
        made.append(place.name)
        return plain(part, place, *args, **kw)
    monkeypatch.setattr(module, "convert", killed)
    with pytest.raises(KeyboardInterrupt): write_groups(whole, groups, tmp_path / "out", to)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "out").rglob("*") if p.is_file() and to != "list"}
    monkeypatch.setattr(module, "convert", plain)
    for _ in range(2):
        found = write_groups(whole, groups, tmp_path / "out", to)
        assert [sorted(part.read(i) for i in range(6)) for part in found] == [sorted(whole.read(i) for i in range(18) if groups[i] == g) for g in range(3)]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before


@pytest.mark.parametrize("to", ["list", "records", "folder"])
def test_groups_of_other_images_are_left_alone(tmp_path, whole, to):
    groups = torch.arange(18) % 3
    write_groups(whole, groups, tmp_path / "out", to)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    swapped, renamed = torch.tensor([0, 2, 1])[groups], open_encoded(tmp_path / "faces")
    renamed.subjects[0] = "1"
    for other, g in ((whole, swapped), (renamed, groups)):
        with pytest.raises(FileExistsError, match="group_[01].* holds something else.*: choose"): write_groups(other, g, tmp_path / "out", to)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_a_place_that_holds_no_set_is_left_alone(tmp_path, whole):
    write_whole(tmp_path / "out" / "group_2" / "notes.txt", b"mine")
    with pytest.raises(FileExistsError, match="group_2 holds something else than this group"): write_groups(whole, torch.arange(18) % 3, tmp_path / "out", "folder")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["group_2"]           # told before anything is written


def test_groups_that_would_change_labels_are_refused(tmp_path, whole):
    groups = torch.arange(18) % 3
    groups[:6] = 0                                                                 # subject 2 in the first group only
    with pytest.raises(ValueError, match="group 1 has no image of subject 2"): write_groups(whole, groups, tmp_path / "out")
    with pytest.raises(ValueError, match="17 groups for the 18 images"): write_groups(whole, groups[1:], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_benchmark_runs_in_a_process_of_its_own():
    small = bench_groups(images=600, subjects=20, dim=16, on_disk=True)
    assert (small["images"], small["subjects"], small["dim"]) == (600, 20, 16) and 0 < small["cosines"] < small["total"] and small["peak_gb"] > .05
    with pytest.raises(RuntimeError, match="fewer than 5 images"): bench_groups(images=60, subjects=20, dim=16)


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
