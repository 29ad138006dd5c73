"""Choice of inquiries: the greedy rule to the last bit, whatever the precision of the products, the block size and where the embeddings lie."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.sets import inquiries
from cemiface.sets.inquiries import Candidates, bench_select, choose_inquiries, int8_exact, product_margin, product_speed, quick_dtype, select_inquiries

KINDS = [torch.float32, torch.bfloat16] + [torch.int8]*int8_exact(512, torch.device("cpu"))


def plain(emb, threshold): # kept, and for each one left out the first kept one that is too near
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    kept, dropped = [], {}
    for i in range(len(emb)):
        near = next((j for j in kept if unit[i] @ unit[j] >= threshold), None)
        if near is None: kept.append(i)
        else: dropped[i] = near
    return kept, dropped


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(2, 6), st.floats(-.9, .99), st.integers(1, 45), st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from([1, 7]))
def test_selection_is_the_plain_greedy_loop(n, d, threshold, block, seed, dtype, power): # power 7: a few large coordinates
    emb = np.random.default_rng(seed).standard_normal((n, d))**power
    kept, dropped = plain(emb, threshold)
    chosen = choose_inquiries(torch.from_numpy(emb), threshold, block, dtype)
    assert chosen.kept.tolist() == kept and chosen.dropped.neighbour.to_dict() == dropped
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    assert np.allclose(chosen.dropped.cosine, [unit[i] @ unit[j] for i, j in dropped.items()], atol=1e-12)
    assert select_inquiries(torch.from_numpy(emb), threshold, block).tolist() == kept


@pytest.mark.parametrize("dtype", KINDS)
def test_pairs_at_the_threshold_are_decided_in_float64(dtype):
    rng = np.random.default_rng(0)
    axis = np.eye(64)[0]
    emb = np.zeros((600, 64)); emb[0] = axis
    side = rng.standard_normal((599, 64)); side[:, 0] = 0; side /= np.linalg.norm(side, axis=1, keepdims=True)
    cos = .3 + rng.uniform(-1e-9, 1e-9, 599)
    emb[1:] = cos[:, None]*axis + np.sqrt(1 - cos[:, None]**2)*side
    kept, dropped = plain(emb, .3)
    chosen = choose_inquiries(torch.from_numpy(emb), .3, 128, dtype)
    assert chosen.kept.tolist() == kept and chosen.dropped.neighbour.to_dict() == dropped
    near = np.abs((emb.astype(np.float32) @ emb[0].astype(np.float32))[1:] - np.float32(.3)) < 1e-6
    assert near.all() and 100 < sum(1 for j in dropped.values() if j == 0) < 500   # float32 could not tell them apart


@pytest.mark.parametrize("dtype", KINDS[1:])
def test_without_the_second_look_the_answer_would_differ(monkeypatch, dtype):
    sets = [np.random.default_rng(s).standard_normal((400, 64)) for s in range(5)]
    right = [plain(emb, .3)[0] for emb in sets]
    chosen = lambda: [choose_inquiries(torch.from_numpy(emb), .3, dtype=dtype).kept.tolist() for emb in sets]
    assert chosen() == right
    monkeypatch.setattr(inquiries, "product_margin", lambda *a: 0.)
    assert chosen() != right


@pytest.mark.parametrize("dtype", KINDS)
def test_the_margin_holds_for_vectors_made_to_round_badly(dtype):
    for dim in (2, 64, 512):
        x = 1 + torch.rand(200, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim))     # all of one sign: errors add up
        half = torch.full((200, dim), 60.5, dtype=torch.float64)                                            # in int8, half way between two steps
        half[:, 0] = 127
        spike = torch.eye(200, dim, dtype=torch.float64)*1000 + x                                           # one coordinate decides the step of all
        for rows in (x, half, spike):
            found, unit = Candidates(rows, 64, dtype), rows / rows.norm(dim=1, keepdim=True)
            low, lost = found.rounded(slice(0, 200))
            back = low.double()*found.step
            assert lost == pytest.approx((unit - back).norm(dim=1).max().item(), abs=1e-12)
            wrong = (back @ back.T - unit @ unit.T).abs().max()
            margin = product_margin(dtype, torch.device("cpu"), dim, lost)
            assert wrong < margin and (inquiries.products(low, low).double()*found.step**2 - unit @ unit.T).abs().max() < margin
            if dtype == torch.int8: assert low.abs().max() == 127 and (inquiries.products(low, low) == low.long() @ low.long().T).all()


def test_the_margin_of_a_machine_that_shortens_floats():
    device, before = torch.device("cpu"), torch.get_float32_matmul_precision()
    assert product_margin(torch.float32, device, 8, 0.) < 2e-6
    torch.set_float32_matmul_precision("medium")
    try: assert product_margin(torch.float32, device, 8, 0.) > .007 and product_margin(torch.int8, device, 8, 0.) < 2e-6
    finally: torch.set_float32_matmul_precision(before)
    assert product_margin(torch.float32, torch.device("cuda"), 8, 0.) > .015


def test_int8_only_where_its_sums_are_right(monkeypatch):
    assert not int8_exact(64, torch.device("cuda"))
    products, emb = inquiries.products, torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    def saturating(a, b): # two products at a time in 16 bits, as CPUs before VNNI do it, a shifted to be unsigned
        if a.dtype != torch.int8: return products(a, b)
        pairs = ((a.int() + 128)[:, None] * b.int()[None]).unflatten(-1, (-1, 2)).sum(-1).clamp(-2**15, 2**15 - 1)
        return pairs.sum(-1, dtype=torch.int32) - 128*b.int().sum(1, dtype=torch.int32)[None]
    monkeypatch.setattr(inquiries, "products", saturating)
    monkeypatch.setattr(inquiries, "product_speed", lambda kind, dim, device: {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[kind])
    assert not int8_exact(64, torch.device("cpu")) and quick_dtype(10**5, 64, torch.device("cpu")) == torch.bfloat16
    with pytest.raises(ValueError, match="choose float32 or bfloat16"): choose_inquiries(emb, dtype=torch.int8)
    monkeypatch.setattr(inquiries, "products", products)
    if int8_exact(64, torch.device("cpu")): assert quick_dtype(10**5, 64, torch.device("cpu")) == torch.int8


def test_a_mapped_file_is_read_in_blocks(tmp_path):
    emb = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float16)
    np.save(tmp_path/"emb.npy", emb)
    mapped, seen = np.load(tmp_path/"emb.npy", mmap_mode="r"), []
    rows = inquiries.Candidates.rows
    inquiries.Candidates.rows = lambda self, i: seen.append(len(self.emb[i])) or rows(self, i)
    try: chosen = choose_inquiries(mapped, .3, block=64)
    finally: inquiries.Candidates.rows = rows
    assert chosen.kept.tolist() == plain(emb.astype(np.float64), .3)[0] and max(seen) <= 500 and seen.count(64) >= 14


def test_copies_and_what_has_no_direction():
    emb = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    chosen = choose_inquiries(torch.cat([emb, emb*2]), .999)
    assert chosen.kept.tolist() == list(range(6)) and chosen.dropped.neighbour.tolist() == list(range(6)) and np.allclose(chosen.dropped.cosine, 1)
    assert repr(chosen) == "Selection: 6 kept, 6 dropped by 6 of them"
    for bad in (torch.zeros(0, 4), torch.zeros(3), torch.tensor([[1., 0.], [float("nan"), 1.]]), np.array([[np.inf, 1.]])):
        with pytest.raises(ValueError): select_inquiries(bad)
    with pytest.raises(ValueError, match="candidate 1500"): select_inquiries(torch.cat([torch.ones(1500, 2), torch.zeros(1, 2)]))


def test_all_alike_needs_no_square_of_memory():
    chosen = choose_inquiries(torch.ones(20_000, 8))
    assert chosen.kept.tolist() == [0] and set(chosen.dropped.neighbour) == {0}


def test_the_bench_and_the_choice_of_products():
    assert quick_dtype(100, 8, torch.device("cpu")) == torch.float32 and quick_dtype(10**6, 8, torch.device("cpu")) in KINDS
    found = bench_select(3000, 64)
    assert found["kept"] + found["dropped"] == 3000 and found["seconds"] > 0 and found["peak_gflops"] > 0 and found["dtype"] == "float32"
    assert all(found["kept"] == bench_select(3000, 64, dtype)["kept"] for dtype in KINDS[1:])


def test_a_rate_is_operations_over_seconds(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(inquiries.time, "perf_counter", lambda: next(clock))
    assert product_speed(torch.float32, 4, torch.device("cpu")) == pytest.approx(2*1024**2*4/1e9)
