"What a result was made of is told by content: a set drawn again under one path, with as many images, is another one."
import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cemiface.core import fingerprints
from cemiface.core.fingerprints import fingerprint_of, remembered
from cemiface.data import convert as converting
from cemiface.data.convert import convert
from cemiface.data.faceset import faces_fingerprint, open_faces
from cemiface.data.pairs import open_pairs, write_bin
from cemiface.data.records import files_of, open_encoded, set_fingerprint
from cemiface.study.user_files import PaperData
from test_cli import TINY, error, ok

SMALL = ("--preset", "smoke", "--steps", 2, "--batch-size", 8)


def draw(root, seed=0, subjects=4, each=8): # bitmaps: every one has as many bytes
    rng = np.random.default_rng(seed)
    for s in range(subjects):
        for k in range(each):
            (root/f"p{s}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path := root/f"p{s}"/f"{k}.bmp")
            os.utime(path, (1e9, 1e9))
    return root


def contents(folder): # of a model: what is not written again
    files = (p for p in folder.rglob("*") if p.is_file() and p.name not in ("command.json", "history.png"))
    return {p: p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory): # a recogniser, and the faces that it learned
    root = tmp_path_factory.mktemp("teacher")
    ok("train-recogniser", "--data", draw(root/"faces"), "--out", root/"model", *TINY)
    return root


def copy(teacher, tmp_path): # what a test may change
    shutil.copytree(teacher, tmp_path/"t")
    return tmp_path/"t"/"faces", tmp_path/"t"/"model"


def train_there(teacher, tmp_path): # a copy of both, whose note names the copy
    faces, model = copy(teacher, tmp_path)
    note = json.loads((model/"command.json").read_text()) | dict(data=str(faces))
    (model/"command.json").write_text(json.dumps(note))
    return faces, model


def test_a_recogniser_is_not_given_back_for_faces_drawn_again(teacher, tmp_path):
    faces, model = train_there(teacher, tmp_path)
    words, before = ("train-recogniser", "--data", faces, "--out", model, *TINY), contents(model)
    assert "holds the recogniser" in ok(*words)      # copied, with other times: the content decides
    draw(faces, seed=1)
    said = error(2, *words)
    assert f"{model} was made of other data: the images or labels of faces changed since" in said
    assert "choose another folder (--out), or delete this one" in said and contents(model) == before
    draw(faces)
    assert "holds the recogniser" in ok(*words)      # as it was
    first, second = faces/"p0"/"0.bmp", faces/"p0"/"1.bmp"
    a, b = first.read_bytes(), second.read_bytes()
    first.write_bytes(b), second.write_bytes(a)
    assert "changed since" in error(2, *words)       # the same images in another order
    shutil.rmtree(model)
    assert "holds the recogniser" in ok(*words)


def test_a_half_finished_recogniser_does_not_go_on_with_faces_drawn_again(tmp_path, monkeypatch):
    faces, out = draw(tmp_path/"faces"), tmp_path/"out"
    words = ("train-recogniser", "--data", faces, "--out", out, *TINY)
    with monkeypatch.context() as m:
        def stop(*_, **__): raise RuntimeError("power cut")
        m.setattr("cemiface.recognition.training.save_recogniser", stop)
        assert "power cut" in error(3, *words)
    state = torch.load(out/"state.pt", weights_only=True)
    draw(faces, seed=1)
    assert "changed since" in error(2, *words)

    del state["run"]["faces"]["fingerprint"]         # as an earlier release left it
    torch.save(state, out/"state.pt")
    assert "holds the recogniser" in ok(*words)      # its images are older: it goes on


def test_a_recogniser_of_an_earlier_release(teacher, tmp_path):
    faces, model = train_there(teacher, tmp_path)
    words, path = ("train-recogniser", "--data", faces, "--out", model, *TINY), model/"recogniser.json"
    note = json.loads(path.read_text())
    del note["faces"]["fingerprint"]
    path.write_text(json.dumps(note))
    assert "holds the recogniser" in ok(*words)
    os.utime(faces/"p2"/"3.bmp")                     # written after the training ended
    os.utime(path, (1.1e9, 1.1e9))
    said = error(2, *words)
    assert f"{faces}/p2/3.bmp was written after it" in said and f"touch {path}" in said
    path.touch()
    assert "holds the recogniser" in ok(*words)


def test_benchmarks_drawn_again(teacher, tmp_path):
    faces, out, bench = teacher/"faces", tmp_path/"out", tmp_path/"lfw.bin"
    images = [p.read_bytes() for p in sorted(faces.rglob("*.bmp"))]
    write_bin(bench, (images*2)[:40], [True, False]*10)
    words = ("train-recogniser", "--data", faces, "--out", out, "--benchmarks", bench, *TINY)
    ok(*words)
    pairs = open_pairs(bench)
    write_bin(bench, pairs.encoded(), pairs.issame.tolist())
    ok(*words)                                       # written again, the same
    write_bin(bench, pairs.encoded(), (~pairs.issame).tolist())
    assert f"{out} was made of other data: what --benchmarks lfw names changed since" in error(2, *words)


@pytest.mark.slow
def test_a_generator_is_told_by_faces_recogniser_and_start(teacher, tmp_path):
    faces, model = copy(teacher, tmp_path)
    words = ("train-generator", "--data", faces, "--recogniser", model, *SMALL, "--out")
    ok(*words, tmp_path/"a")
    before = contents(tmp_path/"a")
    draw(faces, seed=1)
    said = error(2, *words, tmp_path/"a")
    assert f"{tmp_path}/a/train was made of other data: the images or labels of faces changed since" in said
    draw(faces)
    ok(*words, tmp_path/"b", "--init", tmp_path/"a"), ok(*words, tmp_path/"b", "--init", tmp_path/"a")

    draw(tmp_path/"others", seed=2)                  # the recogniser is trained again in its place
    shutil.rmtree(model)
    ok("train-recogniser", "--data", tmp_path/"others", "--out", model, *TINY)
    assert "the recogniser changed since" in error(2, *words, tmp_path/"a")
    assert contents(tmp_path/"a") == before
    shutil.rmtree(tmp_path/"a"), ok(*words, tmp_path/"a")
    shutil.rmtree(model), shutil.copytree(teacher/"model", model)
    assert "the UNet to start from changed since" in error(2, *words, tmp_path/"b", "--init", tmp_path/"a")


@pytest.mark.slow
def test_a_generator_of_an_earlier_release(teacher, tmp_path):
    faces, model = copy(teacher, tmp_path)
    words = ("train-generator", "--data", faces, "--recogniser", model, *SMALL, "--out", tmp_path/"a")
    ok(*words)
    state = tmp_path/"a/train/state.safetensors"
    with safe_open(state, "pt") as f: about = {k: v for k, v in f.metadata().items() if k != "content"}
    save_file(load_file(state), state, about)
    assert "holds the generator" in ok(*words)
    os.utime(faces/"p2"/"3.bmp", (4e9, 4e9))
    assert "p2/3.bmp was written after it" in error(2, *words)


@pytest.mark.parametrize("to", ["records", "folder"])
def test_a_conversion_does_not_end_with_another_set(tmp_path, monkeypatch, to):
    faces = draw(tmp_path/"faces", each=80)
    whole = converting.fitted
    def cut(data, where, size):
        if where.endswith("p3/70.bmp"): raise RuntimeError("power cut")
        return whole(data, where, size)
    with monkeypatch.context() as m, pytest.raises(RuntimeError):
        m.setattr(converting, "fitted", cut)
        convert(faces, tmp_path/"out", to)
    draw(faces, seed=1, each=80)
    with pytest.raises(ValueError, match="images or labels of faces changed since"): convert(faces, tmp_path/"out", to)
    note = tmp_path/".out.part"/".from"
    note.write_text(note.read_text().partition("\n")[0]) # as an earlier release left it: the images are older
    assert len(convert(faces, tmp_path/"out", to)) == 320


def test_one_image_of_many_counts(tmp_path):
    faces = draw(tmp_path/"casia", subjects=40, each=10)
    before, found = set_fingerprint(open_encoded(faces)), PaperData(tmp_path, 16)["casia"].data
    assert {found, *(faces_fingerprint(open_faces(faces, 16, memory=m)) for m in (0, 1 << 30))} == {before}
    Image.new("RGB", (16, 16)).save(path := faces/"p7"/"3.bmp")
    os.utime(path, (1e9, 1e9))
    after = {set_fingerprint(open_encoded(faces)), faces_fingerprint(open_faces(faces, 24))} # at another size, too
    assert len(after) == 1 and before not in after
    assert PaperData(tmp_path, 16)["casia"].data != found


def test_forms_of_one_set_have_one_fingerprint(tmp_path, monkeypatch):
    faces = open_encoded(draw(tmp_path/"faces"))
    record = convert(faces, tmp_path/"record")
    others = [convert(record, tmp_path/"all.txt", "list"), convert(record, tmp_path/"again", "folder")]
    every = {set_fingerprint(e) for e in (faces, record, *others)}
    assert len(every) == 1
    monkeypatch.chdir(tmp_path)
    assert set_fingerprint(open_encoded("record")) in every and files_of(open_encoded("record")) == [str(tmp_path/"record/train.rec")]


def test_a_large_set_is_read_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path/"home"))
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: 2**62)  # everything was written long ago
    faces, reads = draw(tmp_path/"faces"), []
    files = [str(p) for p in sorted(faces.rglob("*.bmp"))]
    def read():
        reads.append(1)
        return fingerprint_of(open(f, "rb").read() for f in files)
    first = remembered(files, "", read, small=0)
    assert remembered(files, "", read, small=0) == first and len(reads) == 1
    draw(faces, seed=1)                                               # as many bytes, dated back to the same second
    assert remembered(files, "", read, small=0) != first and len(reads) == 2
    draw(faces)
    assert remembered(files, "", read, small=0) == first and len(reads) == 3
    (tmp_path/"home").rename(tmp_path/"gone"), (tmp_path/"home").write_text("")  # nowhere to remember
    assert remembered(files, "", read, small=0) == first and len(reads) == 4
