"One door for data, resumable batches, and the augmentation against loops written out."
import colorsys
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.data.faceset import (AUGMENT_DRAWS, EncodedImages, FaceSet, augment, batches, choose, epoch_order, erase, flip_crop, jitter, lookups, open_faces, to_float, to_uint8,
                           turn_hue)
from cemiface.data.images import encode_image, write_folder
from cemiface.core.files import write_whole


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draws(seed, n):
    return torch.rand(n, AUGMENT_DRAWS, generator=seeded(seed))


def noise(n, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=seeded(seed))


@pytest.fixture
def folder(tmp_path):
    "Four subjects of 3, 4, 5 and 6 images."
    labels = torch.arange(4).repeat_interleave(torch.tensor([3, 4, 5, 6]))
    return write_folder(tmp_path/"set", noise(18), labels, subjects=["1", "2", "9", "10"])


# -- the door --

def test_a_folder_is_read_as_it_was_written(folder):
    faces = open_faces(folder, 16)
    assert torch.equal(faces.images, noise(18)) and faces.images.dtype == torch.uint8
    assert faces.labels.bincount().tolist() == [3, 4, 5, 6] and faces.subjects == ["1", "2", "9", "10"]
    assert (len(faces), faces.n_subjects, faces.size, faces.name, faces.skipped) == (18, 4, 16, "set", [])


def test_lazy_and_eager_give_the_same_batches(folder):
    eager, lazy = open_faces(folder, 16), open_faces(folder, 16, memory=18*3*16*16-1)
    assert isinstance(open_faces(folder, 16, memory=18*3*16*16).images, torch.Tensor) and isinstance(lazy.images, EncodedImages)
    for sets in ((eager, lazy), (eager.subset(eager.labels > 1), lazy.subset(lazy.labels > 1)),
                 (eager.subset([17, 0, 3]).subset([2, 0]), lazy.subset([17, 0, 3]).subset([2, 0]))):
        assert repr(sets[0]) == repr(sets[1]) and sets[0].images.shape == tuple(sets[1].images.shape)
        for one, two in zip(batches(sets[0], 2, 0, 0), batches(sets[1], 2, 0, 0), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert torch.equal(lazy.images[torch.tensor(4)], eager.images[4]) and lazy.images[torch.tensor([], dtype=torch.long)].shape == (0, 3, 16, 16)


def damage(folder):
    write_whole(folder/"2"/"cut.jpg", encode_image(noise(1)[0], "jpg")[:300])
    write_whole(folder/"9"/"empty.png", b"")
    write_whole(folder/"all bad"/"0.png", b"junk")


def test_damaged_files_are_skipped_and_named_or_raised(folder):
    damage(folder)
    with pytest.warns(UserWarning, match="3 of 21 images .* left out; the first: .*cut.jpg"):
        faces = open_faces(folder, 16)
    assert [m.split(":")[0].rsplit("/", 1)[1] for m in faces.skipped] == ["cut.jpg", "empty.png", "0.png"]
    assert faces.subjects == ["1", "2", "9", "10"] and faces.labels.max() == 3
    assert torch.equal(faces.images, noise(18))
    assert "3 files skipped" in repr(faces)
    with pytest.raises(ValueError, match="cut.jpg: damaged"):
        open_faces(folder, 16, on_bad="raise")


@pytest.mark.parametrize("workers", [0, 2])
def test_another_image_takes_a_damaged_ones_place_in_a_large_set(folder, workers):
    damage(folder)
    faces = open_faces(folder, 16, memory=0)
    faces.images.workers = workers
    names = [faces.images.encoded.where(k).rsplit("/", 2)[1:] for k in range(len(faces))]
    subject = torch.tensor([["1", "2", "9", "10", "all bad"].index(s) for s, _ in names])
    readable = [k for k in range(len(faces)) if subject[k] < 4]
    read = torch.cat(list(lookups(faces.images, torch.tensor(readable).split(5))))
    known = {row.numpy().tobytes(): k for k, row in enumerate(noise(18))}
    owner = torch.arange(4).repeat_interleave(torch.tensor([3, 4, 5, 6]))
    assert [owner[known[row.numpy().tobytes()]].item() for row in read] == subject[readable].tolist()     # of the same subject, always
    bad = torch.tensor([names.index(["all bad", "0.png"])])
    with pytest.raises(ValueError, match="^[^\n]*all bad/0.png: not one of[^\n]*$"): list(lookups(faces.images, [bad]))
    with pytest.warns(UserWarning, match="cut.jpg: damaged .* takes its place"): faces.images[torch.tensor(names.index(["2", "cut.jpg"]))]
    strict = open_faces(folder, 16, memory=0, on_bad="raise")
    with pytest.raises(ValueError, match="cut.jpg: damaged"): strict.images[torch.tensor(names.index(["2", "cut.jpg"]))]


def test_nothing_readable_is_an_error(tmp_path):
    write_whole(tmp_path/"a"/"0.png", b"junk")
    with pytest.raises(ValueError, match="none of the 1 images .*0.png: not one of"):
        open_faces(tmp_path, 16)


def test_a_file_lost_after_opening_is_named(folder):
    lazy = open_faces(folder, 16, memory=0, on_bad="raise")
    Path(lazy.images.encoded.where(5)).unlink()
    assert len(lazy.images[torch.tensor([4, 6])]) == 2
    with pytest.raises(OSError, match="could not read .*png"):
        lazy.images[torch.tensor([4, 5])]


def test_a_subject_of_one_image(folder):
    write_whole(folder/"lonely"/"0.png", encode_image(noise(1)[0]))
    assert open_faces(folder, 16).n_subjects == 5
    with pytest.raises(ValueError, match=r"1 of 5 subjects have fewer: lonely \(1\). Add images or remove"):
        open_faces(folder, 16, min_per_subject=2)
    with pytest.raises(ValueError, match=r"1 \(3\), 2 \(4\), lonely \(1\)"):
        open_faces(folder, 16, min_per_subject=5)


def test_a_part_of_a_folder(folder):
    faces = open_faces(folder, 16, subjects=2, per_subject=2, seed=3)
    assert faces.labels.tolist() == [0, 0, 1, 1] and torch.equal(faces.images, open_faces(folder, 16, 2, 2, seed=3).images)
    seen = {tuple(open_faces(folder, 16, 2, 2, seed=s).subjects) for s in range(12)}
    assert len(seen) > 2 and all(s in itertools.combinations(["1", "2", "9", "10"], 2) for s in seen)
    assert open_faces(folder, 16, per_subject=5).labels.bincount().tolist() == [3, 4, 5, 5]     # a cap, not a demand
    for asked in (dict(subjects=5), dict(subjects=0), dict(per_subject=0), dict(size=4)):
        with pytest.raises(ValueError, match="ask for|at least 8"):
            open_faces(folder, **dict(size=16) | asked)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=8), st.data())
def test_choose_draws_what_was_asked(counts, draw):
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    subjects, cap = draw.draw(st.integers(1, len(counts))), draw.draw(st.integers(1, 7))
    chosen = choose(labels, subjects, cap, seed=draw.draw(st.integers(0, 99)))
    assert (chosen.diff() > 0).all()
    got = labels[chosen].unique(return_counts=True)
    assert len(got[0]) == subjects and got[1].tolist() == [min(cap, counts[s]) for s in got[0].tolist()]


def test_choose_is_fair():
    labels = torch.zeros(5, dtype=torch.long)
    times = torch.stack([choose(labels, None, 2, seed=s) for s in range(500)]).view(-1).bincount(minlength=5)
    assert (times-200).abs().max() < 50     # 500 draws of 2 of 5: mean 200, standard deviation 11


def test_a_procedural_world_and_a_folder_are_one_set(tmp_path):
    world = open_faces("proc:casia", 16, subjects=11, per_subject=2)
    again = open_faces(write_folder(tmp_path/"set", world.images, world.labels), 16)
    assert torch.equal(world.images, again.images) and torch.equal(world.labels, again.labels) and world.subjects == again.subjects
    part = world.subset(world.labels == 7)
    assert part.subjects == ["7"] and torch.equal(part.factors["person"], world.factors["person"][14:16])
    for bad, says in (("proc:atlantis", "choose one of casia"), ("proc:", "choose one of")):
        with pytest.raises(ValueError, match=says): open_faces(bad, 16, 2, 2)
    with pytest.raises(FileNotFoundError, match="written proc:casia"): open_faces("casia", 16)
    for few in (dict(subjects=2), dict(per_subject=2), {}):
        with pytest.raises(ValueError, match="say how many subjects"): open_faces("proc:casia", 16, **few)


def test_the_seed_is_the_worlds():
    one, two, other = (open_faces("proc:casia", 16, 2, 2, seed=s).images for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_a_set_refuses_labels_that_do_not_fit():
    with pytest.raises(ValueError, match="3 images but 2 labels"): FaceSet(noise(3), torch.tensor([0, 1]), ["a", "b"], "x")
    for labels in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="0 to 1"): FaceSet(noise(2), torch.tensor(labels), ["a", "b"], "x")


# -- batches --

@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**40), st.integers(0, 50), st.data())
def test_resuming_anywhere_gives_the_rest(n, size, seed, epoch, draw):
    faces = FaceSet(noise(n, 8), torch.arange(n) % 3 % n, ["a", "b", "c"], "x")
    whole = list(batches(faces, size, seed, epoch, drop_last=False))
    start = draw.draw(st.integers(0, len(whole)))
    rest = list(batches(faces, size, seed, epoch, drop_last=False, start=start))
    assert len(rest) == len(whole)-start
    assert all(torch.equal(a, b) for one, two in zip(whole[start:], rest) for a, b in zip(one, two))
    i = torch.cat([i for _, _, i in whole])
    assert torch.equal(i.sort()[0], torch.arange(n)) and all(torch.equal(x, faces.images[i]) and torch.equal(y, faces.labels[i]) for x, y, i in whole)
    if n >= size: assert len(list(batches(faces, size, seed, epoch))) == n//size


def test_orders_differ_between_epochs_and_seeds_and_are_pinned():
    orders = {tuple(epoch_order(50, s, e).tolist()) for s in range(6) for e in range(6)}
    assert len(orders) == 36                # (0, 1) is not (1, 0)
    torch.manual_seed(0)
    first = epoch_order(8, 0, 0)
    torch.manual_seed(1); torch.rand(3)
    assert torch.equal(first, epoch_order(8, 0, 0))
    with pytest.raises(ValueError, match="x has 3 images, not one batch of 4: lower"):
        next(batches(FaceSet(noise(3), torch.zeros(3, dtype=torch.long), ["a"], "x"), 4, 0, 0))


# -- numbers --

def test_bytes_to_float_and_back():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)
    assert to_float(every).dtype == torch.float32
    assert torch.allclose(to_float(every).double(), (torch.arange(256).double()/255-.5)/.5, atol=1e-6)     # as recognisers' papers write it
    assert torch.equal(to_uint8(to_float(every).double()), every) and to_uint8(torch.tensor([-2., 2.])).tolist() == [0, 255]


# -- augmentation --

def slow_flip_crop(x, u, scale):
    "One image, one output pixel at a time, in numpy."
    mirror, area, log_ratio, left, top = u
    area = scale[0]+(scale[1]-scale[0])*area
    ratio = math.exp(-math.log(area)*(2*log_ratio-1))
    w, h = math.sqrt(area*ratio), math.sqrt(area/ratio)
    left, top, S = left*(1-w), top*(1-h), x.shape[-1]
    out = np.zeros_like(x)
    for i in range(S):
        for j in range(S):
            py = min(max((top+h*(i+.5)/S)*S-.5, 0), S-1)
            px = min(max((left+w*((S-1-j if mirror < .5 else j)+.5)/S)*S-.5, 0), S-1)
            y0, x0 = min(int(py), S-2), min(int(px), S-2)
            fy, fx = py-y0, px-x0
            out[:, i, j] = ((1-fy)*((1-fx)*x[:, y0, x0]+fx*x[:, y0, x0+1])+fy*((1-fx)*x[:, y0+1, x0]+fx*x[:, y0+1, x0+1]))
    return out


@pytest.mark.parametrize("scale", [(.9, 1.), (.3, .8)])
def test_flip_crop_against_a_loop(scale):
    x, u = torch.randn(6, 3, 12, 12, generator=seeded(1)), torch.rand(6, 5, generator=seeded(2))
    want = np.stack([slow_flip_crop(a, b, scale) for a, b in zip(x.double().numpy(), u.double().numpy())])
    assert np.abs(flip_crop(x, u, scale).numpy()-want).max() < 1e-4


def test_flip_crop_stays_inside_the_image():
    u = torch.rand(2000, 5, generator=seeded(0))
    ramp = torch.linspace(-1, 1, 16)[None, None, None].expand(2000, 1, 16, 16)
    out = flip_crop(ramp, u)[:, 0, 0]
    assert out.abs().max() <= 1+1e-6
    assert 900 < (out.diff().sum(1) < 0).sum() < 1100                      # mirrored: half
    extent = (out[:, 12]-out[:, 3]).abs()/(ramp[0, 0, 0, 12]-ramp[0, 0, 0, 3])
    assert .9-1e-4 < extent.min() and extent.max() < 1+1e-4                # a side of an area of .9 at any ratio that fits


def test_zero_strength_is_the_identity():
    x, g = to_float(noise(32)), seeded(5)
    for _ in range(3):
        u = torch.rand(32, 5, generator=g)
        still = flip_crop(x, torch.cat([torch.ones(32, 1), u[:, 1:]], 1), scale=(1, 1))
        assert (still-x).abs().max() < 1e-5
        assert (flip_crop(x, torch.cat([torch.zeros(32, 1), u[:, 1:]], 1), scale=(1, 1))-x.flip(-1)).abs().max() < 1e-5
        assert torch.equal(erase(x, u, p=0), x)
        assert (jitter(x, u[:, :4], strength=0)-x).abs().max() < 1e-5
        assert (jitter(x, torch.full((32, 4), .5), strength=.7)-x).abs().max() < 1e-5


def slow_jitter(x, u, strength):
    "One image in [0,1], pixel by pixel, the hue by Python's own colorsys."
    b, k, s = (1+strength*(2*v-1) for v in u[:3])
    grey = lambda c: .299*c[0]+.587*c[1]+.114*c[2]
    y = x*b
    mean = np.mean([grey(y[:, i, j]) for i in range(y.shape[1]) for j in range(y.shape[2])])
    out = np.zeros_like(y)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            c = k*y[:, i, j]+(1-k)*mean
            c = np.clip(s*c+(1-s)*grey(c), 0, 1)
            h, sat, v = colorsys.rgb_to_hsv(*c)
            out[:, i, j] = colorsys.hsv_to_rgb((h+strength*(2*u[3]-1)) % 1, sat, v)
    return out


@pytest.mark.parametrize("strength", [.1, .5])
def test_jitter_against_a_loop(strength):
    x, u = to_float(noise(8, 8)), torch.rand(8, 4, generator=seeded(3))
    want = np.stack([slow_jitter(a, b, strength) for a, b in zip((x.double().numpy()+1)/2, u.double().numpy())])
    assert np.abs((jitter(x, u, strength).numpy()+1)/2-want).max() < 1e-4


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.floats(0, 1, width=32)]*3), st.floats(-3, 3, width=32))
def test_hue_of_any_colour_is_that_of_colorsys(colour, turn):
    got = turn_hue(torch.tensor(colour).view(1, 3, 1), torch.tensor([turn])).flatten().tolist()
    h, s, v = colorsys.rgb_to_hsv(*colour)
    if s*v > 1e-4: assert np.allclose(got, colorsys.hsv_to_rgb((h+turn) % 1, s, v), atol=1e-3)
    assert max(got) == pytest.approx(max(colour), abs=1e-5) or s*v <= 1e-4


def slow_erase(x, u, p, scale, ratio):
    x, S = x.copy(), x.shape[-1]
    if u[0] >= p: return x
    area, r = scale[0]+(scale[1]-scale[0])*u[1], math.exp(math.log(ratio[0])+math.log(ratio[1]/ratio[0])*u[2])
    h, w = round(math.sqrt(area*r)*S), round(math.sqrt(area/r)*S)
    top, left = int((S-h+1)*u[4]), int((S-w+1)*u[3])
    x[:, top:top+h, left:left+w] = 0
    return x


def test_erase_against_a_loop():
    x, u = torch.randn(200, 3, 20, 20, generator=seeded(4)), torch.rand(200, 5, generator=seeded(6))
    want = np.stack([slow_erase(a, b, .5, (.02, .1), (.3, 3.3)) for a, b in zip(x.numpy(), u.numpy())])
    assert np.array_equal(erase(x, u).numpy(), want)


@pytest.mark.parametrize("corner", list(itertools.product([0., 1-2**-24], repeat=2)))
def test_erase_reaches_every_edge_and_never_crosses_it(corner):
    for size in (16, 17, 112):
        u = torch.tensor([[0., .5, .5, *corner]])
        hole = erase(torch.ones(1, 1, size, size), u)[0, 0] == 0
        rows, cols = hole.any(1).nonzero().flatten(), hole.any(0).nonzero().flatten()
        ratio = math.sqrt(.3*3.3)              # half way on the logarithmic scale
        assert (len(rows), len(cols)) == (round(math.sqrt(.06*ratio)*size), round(math.sqrt(.06/ratio)*size))
        assert (cols[0] == 0) if corner[0] == 0 else (cols[-1] == size-1)
        assert (rows[0] == 0) if corner[1] == 0 else (rows[-1] == size-1)


def test_augment_is_a_function_of_its_draws_alone():
    x, u = to_float(noise(16)), draws(7, 16)
    kept = x.clone(), u.clone()
    torch.manual_seed(0); a = augment(x, u)
    torch.manual_seed(9); b = augment(x, u)
    assert torch.equal(a, b) and torch.equal(x, kept[0]) and torch.equal(u, kept[1])    # and the input is left alone
    assert not torch.equal(a, augment(x, draws(8, 16)))
    for rank in range(3): assert torch.allclose(augment(x[rank::3], u[rank::3]), a[rank::3], atol=1e-6)    # whoever works on it
    assert not torch.equal(a[0], augment(x[:1].expand(16, -1, -1, -1), u)[1])            # each image has its own draw


@pytest.mark.parametrize("size", [8, 17, 112])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_augment_keeps_shape_range_and_type(size, dtype):
    x = to_float(noise(4, size)).to(dtype)
    y = augment(x, draws(0, 4))
    assert y.shape == x.shape and y.dtype == dtype and y.abs().max() <= 1 and y.isfinite().all()
    assert augment(x[:0], draws(0, 0)).shape == (0, 3, size, size)


def test_augment_of_a_constant_face_stays_constant_outside_the_box():
    x = torch.full((64, 3, 16, 16), .2)
    y = augment(x, draws(1, 64))
    erased = (y == 0).all(1)
    assert 16 < erased.flatten(1).any(1).sum() < 48
    assert (y-torch.where(erased[:, None], 0, y.flatten(2).median(2)[0][..., None, None])).abs().max() < 1e-5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_augment_on_a_gpu_agrees_with_the_cpu():
    x = to_float(noise(16, 64))
    y = augment(x.cuda(), draws(0, 16).cuda())
    assert y.device.type == "cuda" and (augment(x, draws(0, 16))-y.cpu()).abs().max() < 1e-3
