"""Choice of inquiries: the greedy rule to the last bit, whatever the block size and where the embeddings lie."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.sets import inquiries
from cemiface.sets.inquiries import choose_inquiries, select_inquiries


def plain(emb, threshold): # kept, and for each one left out the first kept one that is too near
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    kept, dropped = [], {}
    for i in range(len(emb)):
        near = next((j for j in kept if unit[i] @ unit[j] >= threshold), None)
        if near is None: kept.append(i)
        else: dropped[i] = near
    return kept, dropped


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.floats(-.9, .99), st.integers(1, 45), st.integers(0, 10**6), st.sampled_from([1, 7]))
def test_selection_is_the_plain_greedy_loop(n, d, threshold, block, seed, power): # power 7: a few large coordinates
    emb = np.random.default_rng(seed).standard_normal((n, d))**power
    kept, dropped = plain(emb, threshold)
    chosen = choose_inquiries(torch.from_numpy(emb), threshold, block)
    assert chosen.indices.tolist() == kept and chosen.dropped.neighbour.to_dict() == dropped
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    assert np.allclose(chosen.dropped.cosine, [unit[i] @ unit[j] for i, j in dropped.items()], atol=1e-12)
    assert select_inquiries(torch.from_numpy(emb), threshold, block).tolist() == kept


def test_pairs_at_the_threshold_are_decided_in_float64():
    rng = np.random.default_rng(0)
    axis = np.eye(64)[0]
    emb = np.zeros((600, 64)); emb[0] = axis
    side = rng.standard_normal((599, 64)); side[:, 0] = 0; side /= np.linalg.norm(side, axis=1, keepdims=True)
    cos = .3 + rng.uniform(-1e-9, 1e-9, 599)
    emb[1:] = cos[:, None]*axis + np.sqrt(1 - cos[:, None]**2)*side
    kept, dropped = plain(emb, .3)
    chosen = choose_inquiries(torch.from_numpy(emb), .3, 128)
    assert chosen.indices.tolist() == kept and chosen.dropped.neighbour.to_dict() == dropped
    near = np.abs((emb.astype(np.float32) @ emb[0].astype(np.float32))[1:] - np.float32(.3)) < 1e-6
    assert near.all() and 100 < sum(1 for j in dropped.values() if j == 0) < 500   # float32 could not tell them apart


def test_a_mapped_file_is_read_in_blocks(tmp_path, monkeypatch):
    emb = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    np.save(tmp_path/"emb.npy", emb)
    mapped, blocks, rows = np.load(tmp_path/"emb.npy", mmap_mode="r"), [], inquiries.unit_rows
    monkeypatch.setattr(inquiries, "unit_rows", lambda *a: blocks.append(a[1:]) or rows(*a))
    chosen = choose_inquiries(mapped, .3, block=64)
    assert chosen.indices.tolist() == plain(emb.astype(np.float64), .3)[0] and blocks == [(i, i+64) for i in range(0, 500, 64)]


def test_copies_and_what_has_no_direction():
    emb = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    chosen = choose_inquiries(torch.cat([emb, emb*2]), .999)
    assert chosen.indices.tolist() == list(range(6)) and chosen.dropped.neighbour.tolist() == list(range(6)) and np.allclose(chosen.dropped.cosine, 1)
    assert repr(chosen) == "Selection: 6 kept, 6 dropped by 6 of them"
    for bad in (torch.zeros(0, 4), torch.zeros(3), torch.tensor([[1., 0.], [float("nan"), 1.]]), np.array([[np.inf, 1.]])):
        with pytest.raises(ValueError): select_inquiries(bad)
    with pytest.raises(ValueError, match="candidate 1500"): select_inquiries(torch.cat([torch.ones(1500, 2), torch.zeros(1, 2)]))


def test_all_alike_needs_no_square_of_memory():
    chosen = choose_inquiries(torch.ones(20_000, 8))
    assert chosen.indices.tolist() == [0] and set(chosen.dropped.neighbour) == {0}
