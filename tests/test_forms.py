"Further forms of sets and pairs, written by their own libraries: opened, checked, converted; hostile files, missing libraries, kills."
import io
import json
import os
import pickle
import random
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

datasets, lmdb, msgpack, pa, pq, webdataset = map(pytest.importorskip, ("datasets", "lmdb", "msgpack", "pyarrow", "pyarrow.parquet", "webdataset"))

from cemiface.cli.app import app
from cemiface.data import forms, shards
from cemiface.data.convert import convert
from cemiface.data.faceset import open_faces
from cemiface.data.images import encode_image
from cemiface.data.lint import lint
from cemiface.data.pairs import convert_pairs, is_pairs, open_pairs, PairImages
from cemiface.data.records import open_encoded, write_list

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
IMAGES = [encode_image(torch.from_numpy(p).permute(2, 0, 1)) for p in PIXELS]
LABELS = [k % 3 for k in range(12)]
NAMES = ["ann", "bob", "cho"]
FORMS = ("tar", "disk", "parquet", "lmdb")


class Attack:
    def __init__(self, target:Path): self.target = str(target)
    def __reduce__(self): return os.mkdir, (self.target,)


def write_tar(path, **parts): # extension -> value of image k
    path.parent.mkdir(exist_ok=True, parents=True)
    with webdataset.TarWriter(str(path)) as sink:
        for k in range(12): sink.write({"__key__": f"{k:04d}", **{name: value(k) for name, value in parts.items()}})
    return path


def write_lmdb(path, record, keys=True):
    with lmdb.open(str(path), subdir=False, map_size=1 << 24) as db, db.begin(write=True) as txn:
        for k in range(12): txn.put(f"{k}".encode(), record(k))
        if keys: txn.put(b"__keys__", msgpack.dumps([f"{k}".encode() for k in range(12)]))
    return path


def rows(names=None):
    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    return datasets.Dataset.from_dict(dict(image=[dict(bytes=b, path=None) for b in IMAGES], label=LABELS), features=datasets.Features(image=datasets.Image(), label=label))


def written(folder, form): # the set, by the form's own library
    if form == "tar": return write_tar(folder / "set.tar", png=lambda k: IMAGES[k], cls=lambda k: LABELS[k])
    if form == "lmdb": return write_lmdb(folder / "set.lmdb", lambda k: msgpack.dumps((IMAGES[k], LABELS[k])))
    path = folder / ("set" if form == "disk" else "set.parquet")
    rows().save_to_disk(path) if form == "disk" else rows().to_parquet(path)
    return path


def content(found): return sorted((found.subjects[k], found.read(i)) for i, k in enumerate(found.labels.tolist()))
def expected(names=("0", "1", "2")): return sorted((names[k], image) for k, image in zip(LABELS, IMAGES))


@pytest.mark.parametrize("form", FORMS)
def test_opened_checked_listed_converted(tmp_path, form):
    path = written(tmp_path, form)
    found = open_encoded(path)
    assert content(found) == expected() and found.skipped == [] and found.name == "set"
    assert lint(path).ok and lint(path).size == "12 images of 3 subjects"
    faces = open_faces(path, 16)
    assert torch.equal(faces.images.sum(0), torch.from_numpy(PIXELS).permute(0, 3, 1, 2).sum(0).to(faces.images.dtype)) or len(faces) == 12
    part = open_encoded(write_list(tmp_path / "few.txt", found, torch.arange(12) % 2 == 0))
    assert sorted(part.read(i) for i in range(6)) == sorted(found.read(i) for i in range(0, 12, 2))
    for to in ("records", "folder", "webdataset", "parquet"): assert content(convert(path, tmp_path / to, to)) == expected(), to
    for to in ("webdataset", "parquet"): assert content(convert(tmp_path / to, tmp_path / f"{to} again", "folder")) == expected()


@pytest.mark.parametrize("form", FORMS)
def test_trained_on(tmp_path, form):
    words = ["train-recogniser", "--data", str(written(tmp_path, form)), "--size", "16", "--set", "backbone=ir18", "--set", "width=8", "--epochs", "1", "--batch-size", "6", "--out", str(tmp_path / "r")]
    said = CliRunner().invoke(app, words)
    assert said.exit_code == 0 and "on 12 images of 3 subjects" in said.output, said.output


@pytest.mark.parametrize("to", ["records", "webdataset", "parquet"])
def test_names_that_are_no_text_are_kept(tmp_path, to):
    names = ["Jos\udce9_0", "M\udcfcller", "Zo\u00eb"]
    for k, label in enumerate(LABELS):
        (tmp_path / "odd" / names[label]).mkdir(parents=True, exist_ok=True)
        (tmp_path / "odd" / names[label] / f"{k}.png").write_bytes(IMAGES[k])
    convert(tmp_path / "odd", tmp_path / to, to)
    assert content(open_encoded(tmp_path / to)) == expected(names)


@pytest.mark.parametrize("form", FORMS)
def test_read_from_threads_forks_and_other_processes(tmp_path, form):
    found = open_encoded(written(tmp_path, form))
    whole = [found.read(i) for i in range(12)]
    with ThreadPoolExecutor(4) as pool: assert list(pool.map(found.read, range(12))) == whole
    for start in ("fork", "spawn"):
        with get_context(start).Pool(1) as pool: assert pool.map(found.read, range(12)) == whole
    assert pickle.loads(pickle.dumps(found)).read(5) == whole[5]


def test_batches_decoded_when_asked_for(tmp_path):
    faces = open_faces(written(tmp_path, "parquet"), 16, memory=0)
    assert torch.equal(faces.images[torch.arange(12)].permute(0, 2, 3, 1), torch.from_numpy(PIXELS)[[IMAGES.index(faces.encoded.read(i)) for i in range(12)]])


# -- names and labels --

@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_names_of_classes(tmp_path, form):
    rows(NAMES).save_to_disk(tmp_path / "set") if form == "disk" else rows(NAMES).to_parquet(tmp_path / "set.parquet")
    path = next(tmp_path.iterdir())
    assert content(open_encoded(path)) == expected(NAMES)
    assert content(convert(path, tmp_path / "web", "webdataset")) == expected(NAMES)
    assert content(convert(tmp_path / "web", tmp_path / "table", "parquet")) == expected(NAMES)


def test_labels_that_are_no_subjects_are_named(tmp_path):
    table = pa.table(dict(jpg=IMAGES[:6], label=pa.array([0, 1, -1, None, 1, 0])))
    pq.write_table(table, tmp_path / "set.parquet")
    with pytest.warns(UserWarning, match="2 left out, the first: .*row 2 of the set: label -1 is no subject's number"): found = open_encoded(tmp_path / "set.parquet")
    assert len(found) == 4 and "label None" in found.skipped[1]
    report = lint(tmp_path / "set.parquet")
    assert not report.ok and report.table.rule.tolist()[0] == "left out"


def test_a_column_is_never_guessed(tmp_path):
    pq.write_table(pa.table(dict(image=IMAGES, who=LABELS)), tmp_path / "who.parquet")
    with pytest.raises(ValueError, match="of its columns, image, who, none is known to hold the subject"): open_encoded(tmp_path / "who.parquet")
    assert content(open_encoded(tmp_path / "who.parquet", label_column="who")) == expected()
    pq.write_table(pa.table(dict(image=IMAGES, label=[0]*12, identity=LABELS)), tmp_path / "two.parquet")
    with pytest.raises(ValueError, match="label and identity could each be the subject"): open_encoded(tmp_path / "two.parquet")
    pq.write_table(pa.table(dict(a=IMAGES, b=IMAGES, label=LABELS)), tmp_path / "images.parquet")
    with pytest.raises(ValueError, match="a and b could be the image"): open_encoded(tmp_path / "images.parquet")
    write_tar(tmp_path / "notes.tar", png=lambda k: IMAGES[k], json=lambda k: {"yaw": 1})
    with pytest.raises(ValueError, match="notes.tar, .json: of its columns, yaw, none is known"): open_encoded(tmp_path / "notes.tar")


def test_splits_are_never_joined(tmp_path):
    for split in ("train", "test"): write_tar(tmp_path / "tars" / f"{split}-000000.tar", png=lambda k: IMAGES[k], cls=lambda k: 0)
    with pytest.raises(ValueError, match="tars holds 2 sets, 'test', 'train'"): open_encoded(tmp_path / "tars")
    datasets.DatasetDict(train=rows(), test=rows()).save_to_disk(tmp_path / "dict")
    with pytest.raises(ValueError, match="dict holds the splits train, test: name one of them"): open_encoded(tmp_path / "dict")
    assert content(open_encoded(tmp_path / "dict" / "test")) == expected()
    datasets.DatasetDict(train=rows()).save_to_disk(tmp_path / "one")
    assert content(open_encoded(tmp_path / "one")) == expected()


def test_an_archive_beside_subjects_is_no_shard(tmp_path):
    convert(written(tmp_path / "x", "tar"), tmp_path / "set", "folder")
    (tmp_path / "set" / "original.tar").write_bytes((tmp_path / "x" / "set.tar").read_bytes())
    assert content(open_encoded(tmp_path / "set")) == expected() and "original" not in open_encoded(tmp_path / "set").where(0)


# -- hostile files --

def test_pickles_are_never_unpickled(tmp_path):
    target = tmp_path / "attacked"
    write_tar(tmp_path / "label.tar", png=lambda k: IMAGES[k], pyd=lambda k: Attack(target))
    with pytest.raises(ValueError, match="pickles are not read, since they could run code"): open_encoded(tmp_path / "label.tar")
    write_tar(tmp_path / "extra.tar", png=lambda k: IMAGES[k], cls=lambda k: LABELS[k], pyd=lambda k: Attack(target))
    assert content(open_encoded(tmp_path / "extra.tar")) == expected()
    write_lmdb(tmp_path / "all.lmdb", lambda k: pickle.dumps(Attack(target)))
    with pytest.raises(ValueError, match="key 0 is a pickle, which is not read, since it could run code"): open_encoded(tmp_path / "all.lmdb")
    write_lmdb(tmp_path / "some.lmdb", lambda k: pickle.dumps(Attack(target)) if k == 3 else msgpack.dumps((IMAGES[k], LABELS[k])))
    with pytest.warns(UserWarning, match="1 left out, the first: .*key 3 is a pickle"): assert len(open_encoded(tmp_path / "some.lmdb")) == 11
    assert not target.exists()


def test_a_shard_that_is_cut_off_or_damaged(tmp_path):
    data = written(tmp_path, "tar").read_bytes()
    member = len(data) // 2 // 512 * 512
    path = tmp_path / "cut.tar"
    for damaged in (data[:member], data[:member + 700], data[:member] + os.urandom(512) + data[member + 512:], data.rstrip(b"\0")):
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="cut.tar: damaged or cut off"): found = open_encoded(path)
        assert set(content(found)) <= set(expected())
    path.write_bytes(b"\x1f\x8b" + data)
    with pytest.raises(ValueError, match="cut.tar is compressed, .*: unpack it with gunzip"): open_encoded(path)
    for junk in (b"", b"junk", os.urandom(2000)):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="cut.tar"): open_encoded(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["tar", "disk", "parquet"])   # an LMDB file that is forged can end the process: see its notebook
def test_mutated_files_give_images_or_one_line(tmp_path, form):
    path = written(tmp_path, form)
    file = next(path.glob("*.arrow")) if form == "disk" else path
    data, rng = file.read_bytes(), random.Random(0)
    for trial in range(40):
        changed = bytearray(data[:rng.choice([len(data), rng.randrange(len(data))])])
        for _ in range(rng.choice([0, 1, 30])):
            if changed: changed[rng.randrange(len(changed))] = rng.randrange(256)
        file.unlink()                                           # the mapped one stays as it was
        file.write_bytes(changed)
        try: found = open_encoded(path)
        except (ValueError, OSError) as e: assert str(tmp_path) in str(e) and "\n" not in str(e); continue
        for i in range(len(found)):
            try: assert isinstance(found.read(i), bytes)
            except (ValueError, OSError) as e: assert str(tmp_path) in str(e)


def test_an_lmdb_file_that_is_cut_off_or_none(tmp_path):
    data = written(tmp_path, "lmdb").read_bytes()
    (tmp_path / "cut.lmdb").write_bytes(data[:-4096])
    with pytest.raises(ValueError, match=f"cut.lmdb: cut off at {len(data) - 4096} of {len(data)} bytes"): open_encoded(tmp_path / "cut.lmdb")
    (tmp_path / "junk.lmdb").write_bytes(b"junk" * 3000)
    with pytest.raises(ValueError, match="junk.lmdb: .*not an LMDB file"): open_encoded(tmp_path / "junk.lmdb")
    write_lmdb(tmp_path / "odd.lmdb", lambda k: msgpack.dumps({"image": 1}))
    with pytest.raises(ValueError, match="odd.lmdb, key 0 is no record of an image and a label"): open_encoded(tmp_path / "odd.lmdb")
    assert content(open_encoded(write_lmdb(tmp_path / "bare.lmdb", lambda k: msgpack.dumps((IMAGES[k], b"feature", LABELS[k])), keys=False))) == expected()


def test_an_image_that_is_only_a_path(tmp_path):
    image = pa.array([dict(bytes=None, path="a.jpg")] + [dict(bytes=b, path=None) for b in IMAGES[1:]], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table(dict(image=image, label=LABELS)), tmp_path / "set.parquet")
    report = lint(tmp_path / "set.parquet")
    assert "unreadable" in report.table.rule.tolist() and "row 0 of the set: holds no image, only the path a.jpg" in str(report)


@pytest.mark.parametrize("form, missing, extra", [("disk", "pyarrow", "parquet"), ("parquet", "pyarrow.parquet", "parquet"), ("lmdb", "lmdb", "lmdb"), ("lmdb", "msgpack", "lmdb")])
def test_a_missing_library_is_one_line(tmp_path, monkeypatch, form, missing, extra):
    path = written(tmp_path, form)
    monkeypatch.setitem(sys.modules, missing, None)
    done = CliRunner().invoke(app, ["data", "lint", str(path)])
    assert done.exit_code == 3 and f"pip install 'cemiface[{extra}]'" in done.output and len(done.output.strip().splitlines()) == 1


# -- writing --

def test_shards_go_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 5)
    convert(written(tmp_path, "tar"), tmp_path / "mine", "folder")
    (tmp_path / "mine" / "1" / "1.png").write_bytes(b"no image")
    for to in ("webdataset", "parquet"):
        whole = convert(tmp_path / "mine", tmp_path / f"{to} whole", to)
        for at in range(1, 4):
            count, write = [], shards.write_whole
            def killed(path, data):
                count.append(path)
                if len(count) == at: raise KeyboardInterrupt
                return write(path, data)
            with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
                m.setattr(shards, "write_whole", killed)
                convert(tmp_path / "mine", tmp_path / f"{to} {at}", to)
            assert not (tmp_path / f"{to} {at}").exists()
            again = convert(tmp_path / "mine", tmp_path / f"{to} {at}", to)
            assert again.skipped == whole.skipped and len(again.skipped) == 1
            files = [{p.name: p.read_bytes() for p in folder.iterdir() if p.name != "README.md"} for folder in (tmp_path / f"{to} whole", tmp_path / f"{to} {at}")]
            assert files[0] == files[1] and sum(name.startswith("train-") for name in files[0]) == 3


def test_other_libraries_read_what_is_written(tmp_path):
    path = tmp_path / "named.parquet"
    rows(NAMES).to_parquet(path)
    convert(path, tmp_path / "web", "webdataset"), convert(path, tmp_path / "table", "parquet")
    samples = [s for s in webdataset.WebDataset(str(tmp_path / "web" / "train-00000.tar"), shardshuffle=False)]
    assert sorted((NAMES[int(s["cls"])], s["png"]) for s in samples) == expected(NAMES)
    assert [int(s["cls"]) for s in samples] != sorted(LABELS)                      # mixed
    table = datasets.load_dataset(str(tmp_path / "table"), split="train", cache_dir=str(tmp_path / "cache"))
    assert table.features["label"].names == NAMES and table[0]["image"].size == (16, 16)
    hub = datasets.load_dataset(str(tmp_path / "web"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(hub) == 12 and sorted(hub["cls"]) == sorted(LABELS)
    assert tarfile.open(tmp_path / "web" / "train-00000.tar").getmembers()[0].mtime == 0


def test_the_command_line(tmp_path):
    run = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    path = written(tmp_path, "tar")
    done = run("data", "convert", path, tmp_path / "table", "--to", "parquet")
    assert done.exit_code == 0 and f"{tmp_path / 'table'} holds 12 images of 3 subjects" in done.output
    assert "12 images of 3 subjects, nothing found" in run("data", "lint", tmp_path / "table").output
    done = run("data", "convert", path, tmp_path / "x", "--images", tmp_path)
    assert done.exit_code == 2 and "--images is for lists of pairs" in done.output
    (tmp_path / "set.zip").write_bytes(b"PK")
    assert "set.zip is packed: unpack it" in run("data", "lint", tmp_path / "set.zip").output
    (tmp_path / "set.npy").write_bytes(b"PK")
    assert "a .tar, .parquet or .lmdb file" in run("data", "lint", tmp_path / "set.npy").output


# -- pairs --

SAME = [True, False, True, False, True, False]

@pytest.mark.parametrize("form", ["disk", "parquet"])
def test_pairs_in_a_table(tmp_path, form):
    order = np.random.default_rng(1).permutation(12)
    features = datasets.Features(image=datasets.Image(), index=datasets.Value("int32"), is_same=datasets.Value("bool"))
    def table(same): return datasets.Dataset.from_dict(dict(image=[dict(bytes=IMAGES[i], path=None) for i in order], index=order, is_same=[same[i] for i in order]), features=features)
    path = tmp_path / ("lfw" if form == "disk" else "lfw.parquet")
    write = lambda t, p: t.save_to_disk(p) if form == "disk" else t.to_parquet(p)
    write(table(np.repeat(SAME, 2)), path)
    found = open_pairs(path)
    assert is_pairs(path) and found.encoded() == IMAGES and found.issame.tolist() == SAME and found.name == "lfw"
    assert convert_pairs(path, tmp_path / "lfw.bin").encoded() == open_pairs(tmp_path / "lfw.bin").encoded() == IMAGES
    assert lint(path).size == "6 pairs of 12 images"
    with pytest.raises(ValueError, match="these are verification pairs"): open_encoded(path)
    odd = path.with_name("odd" + path.suffix)
    write(table([*np.repeat(SAME, 2)[:11], True]), odd)
    with pytest.raises(ValueError, match="pair 5 has not two rows of one is_same"): open_pairs(odd)


def test_memfiles_keep_every_pixel(tmp_path):
    folder = tmp_path / "lfw" / "memfile"
    folder.mkdir(parents=True)
    values = ((PIXELS.astype(np.float32) / 255 - .5) / .5)[..., ::-1].transpose(0, 3, 1, 2)            # as torchvision makes them, in BGR
    np.memmap(folder / "mem_file.dat", np.float32, "w+", shape=values.shape)[:] = values
    (folder / "mem_file.dat.conf").write_text(json.dumps(dict(shape=values.shape, dtype="float32")))
    np.save(tmp_path / "lfw_list.npy", np.array(SAME))
    for path in (tmp_path / "lfw", folder / "mem_file.dat"):
        found = open_pairs(path)
        assert is_pairs(path) and found.name == "lfw" and found.issame.tolist() == SAME
        assert np.array_equal(PairImages(found)[found.index].permute(0, 2, 3, 1).numpy(), PIXELS)
    for conf, says in (('{"shape": [99, 3, 16, 16], "dtype": "float32"}', "bytes, not the"), ('{"shape": [12, 3, 16, 16], "dtype": "O"}', "of O, not"), ("[]", "damaged"), ('{"shape": [1e99], "dtype": "float32"}', "damaged")):
        (folder / "mem_file.dat.conf").write_text(conf)
        with pytest.raises(ValueError, match=f"mem_file.dat: damaged.*{says}|mem_file.dat: damaged"): open_pairs(tmp_path / "lfw")
    (tmp_path / "lfw_list.npy").unlink()
    with pytest.raises(FileNotFoundError, match="there is no .*lfw_list.npy"): open_pairs(tmp_path / "lfw")


# -- packed folders, and lists of chosen columns --

def packed(path, names):
    with tarfile.open(path, "w") as tar:
        for k, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(IMAGES[k % 12])
            tar.addfile(member, io.BytesIO(IMAGES[k % 12]))
    return path


SUBJECTS = [f"{name}/{k}.jpg" for name in ("ann", "bo") for k in range(3)]
BESIDE = {"sheet.png": 0, "cover.jpg": "cover.jpg: lies in no subject's folder", "bo/old/1.jpg": "bo/old/1.jpg: lies deeper than SUBJECT/NAME",
          "bo/v1.2.jpg": "bo/v1.2.jpg: a second dot in its name", "._1.jpg": 0, "ann/._1.jpg": 0, "README.md": 0}

@pytest.mark.parametrize("name", BESIDE)
@pytest.mark.parametrize("top", ["", "set/", "./", "a/b/"])
def test_what_lies_beside_the_subjects_of_a_packed_folder(tmp_path, name, top):
    path = packed(tmp_path / "set.tar", [top+n for n in SUBJECTS+[name]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = open_encoded(path)
    assert (found.subjects, found.labels.tolist()) == (["ann", "bo"], [0]*3+[1]*3)
    assert len(found.skipped) == bool(BESIDE[name]) and all(BESIDE[name] in line for line in found.skipped)


def test_a_packed_set_of_this_package(tmp_path):
    from cemiface.sets.rendered import render_set
    render_set("casia", 3, 2, tmp_path / "set", 32, progress=False)
    with tarfile.open(tmp_path / "set.tar", "w") as tar: tar.add(tmp_path / "set", "set")
    assert (tmp_path / "set" / "sheet.png").exists()
    folder, tar = open_encoded(tmp_path / "set"), open_encoded(tmp_path / "set.tar")
    assert tar.subjects == folder.subjects and not tar.skipped
    of = lambda found: sorted((found.subjects[k], found.read(i)) for i, k in enumerate(found.labels.tolist()))
    assert of(tar) == of(folder)


def test_two_packed_folders_of_one_name_are_not_one_person(tmp_path):
    path = packed(tmp_path / "set.tar", [f"{name}/{day}/{k}.jpg" for name in ("ann", "bo") for day in ("monday", "friday") for k in range(2)])
    with pytest.raises(ValueError, match="ann/monday and bo/monday are both called monday"): open_encoded(path)


@pytest.mark.parametrize("form", ["parquet", "disk", "tar"])
def test_a_list_of_a_set_whose_column_was_named(tmp_path, form):
    path = {"parquet": tmp_path / "t.parquet", "disk": tmp_path / "t", "tar": tmp_path / "t.tar"}[form]
    rows = [dict(image=photo, who=f"p{label}") for photo, label in zip(IMAGES, LABELS)]
    if form == "parquet": pq.write_table(pa.Table.from_pylist(rows), path)
    if form == "disk": datasets.Dataset.from_list(rows).save_to_disk(path)
    if form == "tar":
        with webdataset.TarWriter(str(path)) as sink:
            for k, row in enumerate(rows): sink.write({"__key__": f"{k:06d}", "png": row["image"], "json": {"who": row["who"]}})
    run = lambda *words: CliRunner().invoke(app, [str(w) for w in words])
    refused = run("data", "lint", path)
    assert refused.exit_code == 2 and "--label-column NAME, which data lint has, and data convert, whose list every command takes" in refused.output
    done = run("data", "convert", path, tmp_path / "t.txt", "--label-column", "who")
    assert done.exit_code == 0, done.output
    found = open_encoded(tmp_path / "t.txt")
    assert found.subjects == sorted({f"p{k}" for k in LABELS}) and [found.read(i) for i in range(12)] == IMAGES
