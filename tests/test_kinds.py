"What a file or folder is called: hostile content, texts that begin as another form does, and nothing that runs or fails."
import bz2
import io
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from safetensors.torch import save

from cemiface.core.kinds import kind_of, mistaken
from cemiface.data.pairs import write_bin
from cemiface.data.recordio import pack_image


def picture(form):
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, form)
    return out.getvalue()


def tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as f: f.addfile(tarfile.TarInfo("a/0.jpg"))
    return out.getvalue()


def zipped(*names):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as f:
        for name in names: f.writestr(name, b"")
    return out.getvalue()


def torch_file(**how):
    out = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, out, **how)
    return out.getvalue()


@pytest.mark.parametrize("kind, data", [
    *[("an image", picture(form)) for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")],
    ("a tar file", tar()), ("a packed file", bz2.compress(b"a")), ("a packed file that holds a, b", zipped("a", "b")), ("NumPy arrays", zipped("a.npy")), ("a TorchScript program", zipped("x/data.pkl", "x/constants.pkl")),
    ("a PyTorch checkpoint", torch_file()), ("a PyTorch checkpoint", torch_file(_use_new_zipfile_serialization=False)), ("a safetensors file", save({"a": torch.zeros(2)})),
    *[("a pickle", pickle.dumps(([b"1", b"2"], [True]), protocol=p)) for p in (2, 3, 4, 5)],
    ("a record file", pack_image(b"12345678", 0)), ("an empty file", b""), ("a web page", b"\n <!doctype html>"), ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\n")])
def test_files_by_their_content(tmp_path, kind, data):
    (tmp_path/"x").write_bytes(data)
    assert kind_of(tmp_path/"x").startswith(kind)


@pytest.mark.parametrize("text", ["BZhang/0.jpg 0\n", "PAR1/0.jpg,1\n", "Rar!/1.png\t2\n", "PKU/1.png 2\n", "BM/2.png 3\n", "GIF8/1.png 0\n", "12345678{", "a\u00e9\u4e2d/1.jpg 0\n", "x"*255+"\n   ustar\n"])
def test_a_text_is_a_text_however_it_begins(tmp_path, text):
    (tmp_path/"x").write_text(text, "utf-8")
    assert kind_of(tmp_path/"x") == "a text"


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([b"", b"PK\3\4", b"\x08\x07\x12", b"\x93NUMPY", b"\x80\x02", b"\xff\xd8\xff", b"\x1f\x8b", b"8\0\0\0\0\0\0\0{"]), st.binary(max_size=600))
def test_no_content_makes_it_fail(tmp_path_factory, start, data):
    path = tmp_path_factory.mktemp("k")/"x"
    path.write_bytes(start+data)
    assert isinstance(kind_of(path), str) and "\n" not in mistaken(path, "a recogniser", "give its folder")


@pytest.mark.parametrize("name, data, kind", [
    ("recogniser.json", b"{}", "a recogniser"), ("model_index.json", b"{}", "a generator"), ("pipeline/model_index.json", b"", "a generator"), ("set.json", b"{junk", "a set of cemiface generate"),
    (".shares/0.json", b"", "a set that is not finished"), ("train.rec", b"", "a folder of record files"), ("pairs.txt", b"", "verification pairs"), ("a/0.jpg", b"", "a folder of images"), ("config.json", b"{}", "a part of a saved model"),
    ("command.json", b'{"command": "train-generator"}', "the output of cemiface train-generator, not finished or of another kind"), ("command.json", b"[1]", ""), ("command.json", b"\xff", ""), ("notes/x", b"", "")])
def test_folders_by_what_is_in_them(tmp_path, name, data, kind):
    (tmp_path/"x"/name).parent.mkdir(parents=True)
    (tmp_path/"x"/name).write_bytes(data)
    assert kind_of(tmp_path/"x") == kind


def test_pairs_as_they_are_written(tmp_path):
    write_bin(tmp_path/"lfw.bin", [picture("PNG")]*2, [True])
    assert kind_of(tmp_path/"lfw.bin") == "a pickle, as verification pairs (.bin) are"


def test_the_message(tmp_path):
    (tmp_path/"empty").mkdir()
    (tmp_path/"loop").symlink_to(tmp_path/"loop")
    assert mistaken(tmp_path/"no", "a recogniser", "give its folder") == f"there is no {tmp_path/'no'}: give its folder"
    assert mistaken(tmp_path/"empty", "a recogniser", "give its folder") == f"{tmp_path/'empty'} is an empty folder, not a recogniser: give its folder"
    assert mistaken(tmp_path/"loop", "a recogniser", "give its folder").startswith("there is no ")
    np.save(tmp_path/"x.npy", np.zeros(2))
    assert "is a NumPy array (.npy), not a recogniser" in mistaken(str(tmp_path/"x.npy"), "a recogniser", "give its folder")
