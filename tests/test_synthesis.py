"""Sets on disk: seeds, kill and resume, refusals, full and read-only disks."""
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import diffusers
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler, UniPCMultistepScheduler
from safetensors.torch import save_file

from cemiface.core import files
from cemiface.sets import synthesis
from cemiface.generation.conditioning import GENERATORS
from cemiface.data.faceset import FaceSet, open_faces
from cemiface.generation.pipeline import untrained_pipeline
from cemiface.data.images import list_folder, read_image
from cemiface.sets.layout import image_file, image_seed
from cemiface.sets.pictures import contact_sheet, plot_m_grid, save_contact_sheet
from cemiface.sets.synthesis import draw_m_grid, model_hash
from cemiface.generation.diffusion import image_noise
from small import SIZE, content, inquiries, make

diffusers.utils.logging.disable_progress_bar()


def pixels(out): return {name: read_image(out/name) for name in content(out) if name.endswith(".png")}


def test_seeds_and_noise():
    seeds = {image_seed(s, i, k) for s in range(3) for i in range(60) for k in range(30)}
    assert len(seeds) == 3*60*30 and 0 <= min(seeds) and max(seeds) < 2**63
    assert image_seed(0, 1, 23) != image_seed(0, 12, 3)
    assert image_seed(7, 8, 9) == int.from_bytes(hashlib.blake2b(b"7,8,9", digest_size=8).digest(), "big") >> 1
    noise = image_noise([5, 6, 5 + 2**32], 16)
    assert noise.shape == (3, 3, 16, 16) and noise.dtype == torch.float32
    assert torch.equal(noise[0], image_noise([5], 16)[0]) and not torch.allclose(noise[0], noise[2])


def test_a_set_holds_what_it_says(pipe, tmp_path):
    out = make(pipe, tmp_path/"set", licence={"inquiries": "CC0"})
    paths, labels, subjects, _ = list_folder(out)
    table = pd.read_csv(out/"manifest.csv", dtype={"subject": int}, keep_default_na=False)
    assert list(table.columns) == ["file", "subject", "k", "seed", "m", "sampler", "sha256"]
    assert {str(p.relative_to(out)) for p in paths} == set(table.file) and len(table) == 5*(3 + 2)
    assert dict(zip(table.file, table.subject)) == {str(p.relative_to(out)): label for p, label in zip(paths, labels.tolist())}
    drawn = table[table.sampler == "DDIMScheduler"]
    assert [int(s) for s in drawn.seed] == [image_seed(0, i, k) for i in range(5) for k in range(3)] and set(drawn.m) == {"0.2"}
    assert all(hashlib.sha256((out/f).read_bytes()).hexdigest() == s for f, s in zip(table.file, table.sha256))
    record = json.loads((out/"set.json").read_text())
    assert record["config"]["model"] == model_hash(pipe) and record["licence"] == {"inquiries": "CC0", "generator": "not stated", "images": "not stated"}
    assert {"torch", "diffusers", "cemiface", "device"} <= set(record["environments"][0]) and record["names"] == inquiries().subjects
    faces = open_faces(out, SIZE, per_subject=None)
    assert faces.n_subjects == 5 and len(faces) == 25
    assert torch.equal(read_image(out/"000003"/"inquiry_1.png"), inquiries().images[3])


def test_images_are_those_of_the_pipeline(pipe, tmp_path):
    out, faces = make(pipe, tmp_path/"set", oversample=0, batch_size=3), inquiries()
    with synthesis.quiet(pipe):
        alone = pipe(faces.images[[2]*3].float()/127.5 - 1, m=.2, noise=image_noise([image_seed(0, 2, k) for k in range(3)], SIZE), num_inference_steps=2, output_type="np").images
    for k in range(3):
        saved = read_image(out/image_file(2, k)).permute(1, 2, 0).numpy().astype(int)
        assert abs(saved - alone[k]).max() <= 1


def test_embeddings_make_the_same_set(pipe, tmp_path):
    emb, _ = synthesis.inquiry_embeddings(pipe, inquiries(), 4)
    a, b = make(pipe, tmp_path/"a", oversample=0), make(pipe, tmp_path/"b", emb, oversample=0)
    assert all((pixels(a)[f].int() - x.int()).abs().max() <= 1 for f, x in pixels(b).items())


def test_batch_size_and_number_of_images_change_no_image_by_more_than_a_grey_level(pipe, tmp_path):
    a, b, c = (pixels(make(pipe, tmp_path/str(i), oversample=0, **kw)) for i, kw in enumerate((dict(batch_size=4), dict(batch_size=7), dict(per_subject=4))))
    assert len(a) == len(b) == 15 and len(c) == 20
    assert all((a[f].int() - other[f].int()).abs().max() <= 1 for other in (b, c) for f in a)


def test_at_one_batch_size_a_smaller_set_is_part_of_the_larger(pipe, tmp_path):
    whole, part = make(pipe, tmp_path/"whole", oversample=0), make(pipe, tmp_path/"part", inquiries().subset(torch.arange(3)), oversample=0)
    assert all(content(whole)[f] == data for f, data in content(part).items() if f.endswith(".png"))


def test_seed_and_m_change_the_images(pipe, tmp_path):
    a, b, c = (pixels(make(pipe, tmp_path/str(i), oversample=0, **kw)) for i, kw in enumerate(({}, dict(seed=1), dict(m=-.8))))
    assert not any(torch.equal(a[f], other[f]) for other in (b, c) for f in a)


def test_samplers_that_draw_noise_are_reproducible(pipe, tmp_path):
    other = untrained_pipeline(GENERATORS["smoke"])
    for cls in (DDPMScheduler, UniPCMultistepScheduler):
        other.scheduler = cls.from_config(pipe.scheduler.config)
        a, b = (content(make(other, tmp_path/f"{cls.__name__}{i}")) for i in range(2))
        assert a == b and cls.__name__.encode() in a["manifest.csv"]
    assert model_hash(other) != model_hash(pipe)


CHILD = """
import sys, time, torch
from safetensors.torch import load_file
from cemiface.sets import synthesis
from cemiface.generation.conditioning import GENERATORS
from cemiface.data.faceset import FaceSet
from cemiface.generation.pipeline import untrained_pipeline
draw = synthesis.draw
synthesis.draw = lambda *a: time.sleep(.05) or draw(*a)
images = load_file(sys.argv[1])["images"]
faces = FaceSet(images, torch.arange(len(images)), [f"p{i}" for i in range(len(images))], "noise")
synthesis.generate_set(untrained_pipeline(GENERATORS["smoke"]), faces, out=sys.argv[2], m=.2, per_subject=3, steps=2, batch_size=4, oversample=2, progress=False)
"""


def test_killed_and_called_again_ends_as_if_uninterrupted(pipe, tmp_path):
    out = tmp_path/"cut"
    save_file({"images": inquiries(20).images}, tmp_path/"inquiries.safetensors")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path/"inquiries.safetensors"), str(out)])
    drawn = lambda: len(list(out.glob("*/*.png")))
    deadline = time.time() + 60
    while drawn() < 9 and child.poll() is None and time.time() < deadline: time.sleep(.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert 9 <= drawn() < 60 and not (out/"manifest.csv").exists()
    (out/"000001").mkdir(exist_ok=True)
    (out/"000001"/".0002.png.1.part").write_bytes(b"half a file")
    make(pipe, out, inquiries(20))
    assert content(out) == content(make(pipe, tmp_path/"whole", inquiries(20)))


def test_finished_nothing_is_drawn_again_and_a_lost_file_is(pipe, tmp_path, monkeypatch):
    out = make(pipe, tmp_path/"set")
    before, calls, draw = content(out), [], synthesis.draw
    monkeypatch.setattr(synthesis, "draw", lambda *a: calls.append(1) or draw(*a))
    make(pipe, out)
    assert not calls and content(out) == before
    (out/image_file(1, 1)).unlink(); (out/"000004"/"inquiry_0.png").unlink(); (out/"manifest.csv").unlink()
    make(pipe, out)
    assert len(calls) == 1 and content(out) == before


@pytest.mark.parametrize("change", [dict(m=.3), dict(seed=1), dict(per_subject=4), dict(steps=3), dict(oversample=1), dict(batch_size=5)])
def test_another_configuration_is_refused(pipe, tmp_path, change):
    out = make(pipe, tmp_path/"set")
    before = content(out)
    with pytest.raises(ValueError, match=f"another configuration.*{next(iter(change))} is"): make(pipe, out, **change)
    assert content(out) == before


def test_other_weights_or_inquiries_are_refused(pipe, tmp_path):
    out = make(pipe, tmp_path/"set")
    with pytest.raises(ValueError, match="model is"): make(untrained_pipeline(GENERATORS["smoke"], seed=1), out)
    other = inquiries()
    other.images[4, 0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="inquiries is"): make(pipe, out, other)


def test_what_is_refused_leaves_no_trace(pipe, tmp_path):
    twice = FaceSet(inquiries(2).images, torch.tensor([0, 0]), ["one"], "twice")
    empty = FaceSet(inquiries().images[:0], torch.zeros(0, dtype=torch.int64), [], "empty")
    for faces, kw, says in ((None, dict(m=1.2), "outside"), (None, dict(m=[0., -3.]), "outside"), (None, dict(per_subject=0), "at least 1"), (None, dict(oversample=-1), "at least 0"),
                            (empty, {}, "no inquiry"), (twice, {}, "one image per subject"), (torch.randn(2, 512), {}, "oversample=0")):
        with pytest.raises(ValueError, match=says): make(pipe, tmp_path/"new", faces, **kw)
    assert not (tmp_path/"new").exists()
    (tmp_path/"photos").mkdir(); (tmp_path/"photos"/"mine.jpg").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not empty"): make(pipe, tmp_path/"photos")
    assert content(tmp_path/"photos") == {"mine.jpg": b"mine"}


def test_a_full_disk_is_told_and_the_run_goes_on_after_it(pipe, tmp_path, monkeypatch):
    out, writes, fsync = tmp_path/"set", [], os.fsync
    def full(fd):
        writes.append(1)
        if len(writes) > 6: raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device.*free some space") as e: make(pipe, out)
    assert e.value.errno == errno.ENOSPC and 0 < len(list(out.glob("*/*.png"))) < 15
    monkeypatch.undo()
    assert content(make(pipe, out)) == content(make(pipe, tmp_path/"whole"))


def test_a_read_only_folder_is_told_before_anything_is_drawn(pipe, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(synthesis, "draw", lambda *a: calls.append(1))
    def read_only(*a, **kw): raise OSError(errno.EROFS, "Read-only file system")
    monkeypatch.setattr(files.os, "replace", read_only)
    with pytest.raises(OSError, match="Read-only file system"): make(pipe, tmp_path/"set")
    assert not calls


def test_the_bar_is_one_and_can_be_silent(pipe, tmp_path, capsys):
    make(pipe, tmp_path/"silent")
    assert capsys.readouterr().err == ""
    make(pipe, tmp_path/"loud", progress=True)
    shown = capsys.readouterr().err
    assert "15/15" in shown and "2/2" not in shown


def test_m_grid_and_its_figure(pipe, tmp_path):
    faces, ms, seeds = inquiries(2).images, [1., 0., -1.], [4, 5]
    grid = draw_m_grid(pipe, faces, ms, seeds, steps=2)
    assert grid.shape == (2, 3, 3, SIZE, SIZE) and grid.dtype == torch.uint8
    alone = draw_m_grid(pipe, faces[1], ms, seeds[1:], steps=2)[0]
    assert (grid[1].int() - alone.int()).abs().max() <= 1  # another batch size may round another way
    with pytest.raises(ValueError, match="2 inquiries for 3 seeds"): draw_m_grid(pipe, faces, ms, [1, 2, 3], steps=2)
    ax, = plot_m_grid(grid, faces, ms, torch.tensor([[.5, .25, -.5], [.7, .25, 0.]]), side=32).axes
    assert [t.get_text() for t in ax.get_xticklabels()] == ["inquiry", "m = 1", "m = 0", "m = \N{MINUS SIGN}1"]
    assert [t.get_text() for t in ax.texts] == ["cos 0.6", "cos 0.25", "cos \N{MINUS SIGN}0.25"]
    assert torch.equal(read_image(save_contact_sheet(grid, tmp_path/"sheet.png")), contact_sheet(grid))
