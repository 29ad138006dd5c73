"""Record files, lists and conversions against plain loops, kills, several processes and hostile bytes."""
import io, os, pickle, shutil, signal, struct, subprocess, sys, time, tracemalloc, warnings
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from cemiface.bench.recognition import bench_records
from cemiface.data.convert import convert, left_out
from cemiface.core.files import write_whole
from cemiface.data.joined import join
from cemiface.data.images import FORMATS, decode_image, encode_image, natural_key, write_folder
from cemiface.data.lint import lint
from cemiface.data.pairs import open_pairs
from cemiface.data.recordio import MAGIC, RecordFile, RecordWriter, pack_image, pack_record, read_payload, scan_records
from cemiface.data.records import Encoded, Files, dense, open_encoded, set_fingerprint, write_list

WORD = struct.pack("<I", MAGIC)
SLOW = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
payloads = st.lists(st.one_of(st.binary(max_size=9), st.just(WORD)), max_size=8).map(b"".join)


# Plain loops after dmlc's RecordIOWriter and RecordIOReader, mxnet's unpack and InsightFace's readers.
def plain_write(payload):
    out, start, whole = b"", 0, len(payload)//4*4
    for i in range(0, whole, 4):
        if payload[i:i+4] == WORD:
            out += WORD + struct.pack("<I", (1 if start == 0 else 2) << 29 | i-start) + payload[start:i]
            start = i+4
    out += WORD + struct.pack("<I", (3 if start else 0) << 29 | len(payload)-start) + payload[start:]
    return out + b"\0"*(-len(payload) % 4)


class PlainReader:
    def __init__(self, folder):
        self.f, self.idx = open(folder/"train.rec", "rb"), {}
        for line in open(folder/"train.idx"):
            key, offset = line.strip().split("\t")
            self.idx[int(key)] = int(offset)

    def read(self, key):
        self.f.seek(self.idx[key])
        out = b""
        while True:
            magic, word = struct.unpack("<II", self.f.read(8))
            assert magic == MAGIC
            out += self.f.read((word & 2**29-1)+3 & ~3)[:word & 2**29-1]
            if word >> 29 in (0, 3): break
            out += WORD
        flag, label, key, _ = struct.unpack("<IfQQ", out[:24])
        return flag, list(struct.unpack(f"<{flag}f", out[24:24+4*flag])) if flag else label, out[24+4*flag:], key


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    images = torch.randint(0, 255, (36, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return write_folder(tmp_path_factory.mktemp("sets")/"faces", images, torch.arange(12).repeat_interleave(3), "jpg")


def record(folder, images, labels, **kw):
    with RecordWriter(folder, **kw) as writer:
        for data, label in zip(images, labels): writer.add(data, label)
    return Path(folder)


def loose(folder, framed, keys=None, name="train"):
    "Frames as they are under NAME.rec, with an index unless `keys` is False."
    Path(folder).mkdir(exist_ok=True)
    (folder/f"{name}.rec").write_bytes(b"".join(framed))
    offsets = np.cumsum([0]+[len(f) for f in framed[:-1]]).tolist()
    if keys is not False: (folder/f"{name}.idx").write_text("".join(f"{k}\t{o}\n" for k, o in zip(keys or range(len(framed)), offsets)))
    return folder


def quietly(f, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return f(*args)


# ---- the format

@SLOW
@given(payloads)
def test_framing_equals_dmlc(payload):
    assert pack_record(payload) == plain_write(payload)


@SLOW
@given(st.lists(payloads.filter(len), min_size=2, max_size=6), st.booleans())
def test_write_then_read(tmp_path_factory, images, indexed):
    folder = record(tmp_path_factory.mktemp("r")/"set", images, [k//2+(k > 0) for k in range(len(images))])
    if not indexed: (folder/"train.idx").unlink()
    found = quietly(open_encoded, folder)
    assert [found.read(i) for i in range(len(found))] == images and not found.skipped


def test_insightface_reads_what_is_written(tmp_path):
    images, labels = [b"jpg%d" % k + WORD*(k % 3) for k in range(10)], [0, 0, 0, 1, 3, 3, 3, 3, 4, 4]
    folder = record(tmp_path/"set", images, labels, subjects=list("abcde"), size=64)
    plain = PlainReader(folder)
    flag, header, _, _ = plain.read(0)
    assert flag > 0 and header == [11, 16]
    for k in range(1, int(header[0])):                                  # MXFaceDataset
        flag, label, image, key = plain.read(k)
        assert (label, image, key) == (labels[k-1], images[k-1], k)
    for label, k in enumerate(range(int(header[0]), int(header[1]))):   # FaceImageIter
        _, (start, end), image, _ = plain.read(k)
        assert image == b"" and list(range(int(start), int(end))) == [i+1 for i, other in enumerate(labels) if other == label]
    assert (folder/"property").read_text() == "5,64,64\n"
    assert len(plain.idx) == 1+10+5
    found = quietly(open_encoded, folder)
    assert found.subjects == list("abde") and found.labels.tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 3, 3]


def test_array_labels_and_no_header(tmp_path):
    frames = [plain_write(struct.pack("<IfQQ", 2, 0, k, 0)+struct.pack("<2f", 9-k//2, 77)+b"image%d" % k) for k in range(6)]
    with pytest.warns(UserWarning, match="3 subjects have labels between 7 and 9: numbered again"): found = open_encoded(loose(tmp_path/"a", frames))
    assert found.subjects == ["7", "8", "9"]
    assert [found.read(i) for i in range(6)] == [b"image%d" % k for k in range(6)] and found.labels.tolist() == [2, 2, 1, 1, 0, 0]


def test_magic_inside_the_image_header(tmp_path):
    as_float = struct.unpack("<f", WORD)[0]                             # a label whose four bytes are the magic number
    frames = [plain_write(struct.pack("<IfQQ", 0, 1, 0, 0)+b"a"), plain_write(struct.pack("<IfQQ", 1, 0, MAGIC, 0)+struct.pack("<f", 2)+b"b"),
              plain_write(struct.pack("<IfQQ", 0, as_float, 2, 0)+b"c")]
    store = RecordFile(loose(tmp_path/"a", frames)/"train.rec")
    assert store.labels.tolist() == [1, 2, as_float] and [store.read(i) for i in range(3)] == [b"a", b"b", b"c"]


@pytest.mark.parametrize("ids", [True, False])
def test_keys_come_back_without_index(tmp_path, ids):
    order = [3, 0, 2, 1]
    folder = loose(tmp_path/"a", [pack_image(b"image%d" % k, k, k if ids else 0) for k in order], keys=order)
    (folder/"train.idx").unlink()
    with pytest.warns(UserWarning, match="train.idx.*4 records found"): store = RecordFile(folder/"train.rec")
    assert [store.read(i) for i in range(4)] == [b"image%d" % k for k in (range(4) if ids else order)]


def test_scan_across_pieces(tmp_path):
    frames = [pack_record(bytes([k])*k) for k in range(40)]
    (tmp_path/"x").write_bytes(b"".join(frames))
    with open(tmp_path/"x", "rb") as f:
        for piece in (4, 8, 64, 2**26): assert scan_records(f, piece).tolist() == np.cumsum([0]+[len(x) for x in frames[:-1]]).tolist()


def _read_all(found): return [found.read(i) for i in range(len(found))]

def test_threads_fork_and_spawn(tmp_path):
    images = [os.urandom(50+k) for k in range(40)]
    found = open_encoded(record(tmp_path/"set", images, [k//4 for k in range(40)]))
    with ThreadPoolExecutor(8) as pool: assert list(pool.map(found.read, list(range(40))*20)) == images*20
    for how in ("fork", "spawn"):
        with get_context(how).Pool(1) as pool: assert pool.apply(_read_all, (found,)) == images
    assert _read_all(pickle.loads(pickle.dumps(found))) == images


# ---- lists

LISTS = {"CVLface": ["0\tb/1.jpg\t1", "1\ta/1.jpg\t0", "2\tb/2.jpg\t1", "3\tc/1.jpg\t10"], "DCFace": ["0\t1/1.jpg", "1\t0/1.jpg", "2\t1/2.jpg", "3\t10/1.jpg"],
         "im2rec": ["0\t1.000000\tb/1.jpg", "1\t0.000000\ta/1.jpg", "2\t1.000000\tb/2.jpg", "3\t10.000000\tc/1.jpg"],
         "InsightFace": ["1\tb/1.jpg\t1", "1\ta/1.jpg\t0", "1\tb/2.jpg\t1", "1\tc/1.jpg\t10"], "spaces": ["b/1.jpg 1", "a/1.jpg   0", "b/2.jpg 1", "c/1.jpg 10"],
         "commas": ['"b/1.jpg",1', "a/1.jpg, 0", "b/2.jpg,1", "c/1.jpg,10"], "header": ["label,image,split", "1,b/1.jpg,x", "0,a/1.jpg,x", "1,b/2.jpg,y", "10,c/1.jpg,x"],
         "label first": ["1 b/1.jpg", "0 a/1.jpg", "1 b/2.jpg", "10 c/1.jpg"], "backslashes": ["1\\1.jpg", "0\\1.jpg", "1\\2.jpg", "10\\1.jpg"]}

@pytest.mark.parametrize("kind", LISTS)
def test_list_layouts(tmp_path, kind, recwarn):
    for name in ("a/1", "b/1", "b/2", "c/1", "0/1", "1/1", "1/2", "10/1"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/f"{name}.jpg").write_bytes(name.encode())
    (tmp_path/"list.txt").write_text("\ufeff"*(kind == "commas")+"\r\n".join(LISTS[kind])+"\r\n\n")
    for source in (tmp_path, tmp_path/"list.txt"):
        found = open_encoded(source)
        assert found.subjects == ["0", "1", "10"] and found.labels.tolist() == [1, 0, 1, 2]
        assert [found.read(i)[-2:] for i in range(4)] == [b"/1", b"/1", b"/2", b"/1"]
    assert any("numbered again" in str(w.message) for w in recwarn) == (kind not in ("DCFace", "backslashes"))


def test_dcface_release(tmp_path):
    folder = loose(tmp_path/"record", [pack_image(b"image%d" % k, 0, k) for k in range(6)], name="file")
    with pytest.raises(ValueError, match="each of its 6 labels is 0.*list.txt"): open_encoded(folder)
    (folder/"list.txt").write_text("".join(f"{k}\t{name}/{k}.jpg\n" for k, name in enumerate(["10", "10", "2", "2", "0", "0"])))
    for source in (folder, folder/"file.rec", folder/"list.txt"):
        found = open_encoded(source)
        assert found.subjects == ["0", "2", "10"] and found.labels.tolist() == [2, 2, 1, 1, 0, 0] and found.read(5) == b"image5" and found.name == "record"


@pytest.mark.parametrize("kind", ["record", "folder"])
def test_index_file_selects_from_another_set(tmp_path, faces, kind):
    source = faces if kind == "folder" else quietly(convert, faces, tmp_path/"set").store.path
    whole = open_encoded(source)
    pick = torch.tensor([35, 3, 30, 4, 7])
    (tmp_path/"groups").mkdir()
    part = open_encoded(write_list(tmp_path/"groups"/"g1.txt", whole, pick))
    assert [part.read(i) for i in range(5)] == [whole.read(i) for i in pick.tolist()]
    assert part.subjects == ["1", "2", "10", "11"] and part.labels.tolist() == [3, 0, 2, 0, 1]
    again = quietly(open_encoded, write_list(tmp_path/"g2.txt", part, part.labels == 0))                # a list of a list names the first source
    assert [again.read(i) for i in range(2)] == [whole.read(3), whole.read(4)]
    assert quietly(open_encoded, write_list(tmp_path/"g3.txt", whole, pick, torch.arange(5)+7)).subjects == ["7", "8", "9", "10", "11"]
    assert not os.path.isabs((tmp_path/"groups"/"g1.txt").read_text().split("\n")[0][10:])
    if kind == "record":
        (tmp_path/"set"/"keys.txt").write_text("36\n4\n")
        assert _read_all(open_encoded(tmp_path/"set"/"keys.txt")) == [whole.read(35), whole.read(3)]


HOSTILE_LISTS = {"": "names no image", "# source: x\n": "names no image", "a/1.jpg\t\n": "subject ''", "a/1.jpg\tnan\n": "subject 'nan'", "a/1.jpg\t-1\n": "subject '-1'",
                 "a/1.jpg\t1\na/2.jpg\n": "line 2", "my photos/1.jpg 2\na/1.jpg 1\nb\n": "line 1.*put tabs", "a/1.jpg 1\na/1.jpg 1\nb\n": "line 3.*put tabs", "1\t2\n": "holds no record file", "1.jpg\n": "subject ''", "b/9.jpg\t1\n": "there is no"}

@pytest.mark.parametrize("text", HOSTILE_LISTS)
def test_hostile_lists(tmp_path, text):
    (tmp_path/"a").mkdir()
    for name in ("a/1.jpg", "1.jpg"): (tmp_path/name).write_bytes(b"x")
    (tmp_path/"mine.txt").write_text(text)
    with pytest.raises((ValueError, OSError), match=HOSTILE_LISTS[text]) as e: open_encoded(tmp_path/"mine.txt")
    assert "mine.txt" in str(e.value)


def test_list_that_names_missing_records(tmp_path):
    folder = loose(tmp_path/"r", [pack_image(b"image", k//2, k) for k in range(6)])
    (folder/"some.txt").write_text("1\tx\n99\tx\n2\ty\n")
    with pytest.warns(UserWarning, match="1 left out.*record 99"): found = open_encoded(folder/"some.txt")
    assert len(found) == 2
    (folder/"none.txt").write_text("77\tx\n99\tx\n")
    with pytest.raises(ValueError, match="none.txt.*record 77.*nor any other"): open_encoded(folder/"none.txt")
    (folder/"odd.txt").write_text("1.5\tx\nb\ty\n")
    with pytest.raises(ValueError, match="odd.txt.*keys of train.rec"): open_encoded(folder/"odd.txt")


names = st.one_of(st.text(st.characters(exclude_characters="/\0"), min_size=1, max_size=8), st.from_regex(r"[0-9]{1,3}(\.0*)?", fullmatch=True),
                  st.sampled_from(["#1", "# 2", "# source: x", "nan", "NaN", "-1", "-dash", "a,comma", '"quoted"', "my subj", " ", "a ", " a", "ünï", "\ufeffa", "b\\c", "k.jpg", "a\tb", "a\rb", "a\nb", "\x0b", "\u2028", "\udcff"]))

@SLOW
@given(st.lists(names, min_size=2, max_size=6, unique=True), st.sampled_from(["folder", "record"]), st.data())
def test_a_written_list_reads_back_or_is_refused(tmp_path_factory, subjects, kind, data):
    tmp = tmp_path_factory.mktemp("n")
    subjects = sorted(subjects, key=natural_key)
    labels = torch.tensor(data.draw(st.permutations([*range(len(subjects))]*2)))
    if kind == "folder": store = Files(tmp/"a set", [f"{subjects[k]}/{i}.jpg" for i, k in enumerate(labels.tolist())])
    else: store = RecordFile(loose(tmp/"set", [pack_image(b"%d" % i, k, i) for i, k in enumerate(labels.tolist())])/"train.rec")
    whole = Encoded("whole", labels, subjects, store, np.arange(len(labels)))
    refused = any(c in name for name in subjects for c in "\t\r\n") or any(0xd800 <= ord(c) < 0xe000 for name in subjects for c in name)
    if kind == "folder" and not refused:
        for i in range(len(store)): (Path(store.where(i)).parent.mkdir(parents=True, exist_ok=True), Path(store.where(i)).write_bytes(b"%d" % i))
    if refused:
        with pytest.raises(ValueError, match="cannot be empty, or hold tabs, line breaks.*rename"): write_list(tmp/"list.txt", whole)
        assert not (tmp/"list.txt").exists()
        return
    found = quietly(open_encoded, write_list(tmp/"list.txt", whole))
    assert found.subjects == subjects and torch.equal(found.labels, labels) and not found.skipped
    assert _read_all(found) == _read_all(whole) == [b"%d" % i for i in range(len(labels))]
    half = labels < len(subjects)//2
    again = quietly(open_encoded, write_list(tmp/"half.txt", found, half))                          # a list of a list
    assert again.subjects == subjects[:len(subjects)//2] and _read_all(again) == [b"%d" % i for i in half.nonzero()[:, 0].tolist()]


def test_a_folder_of_odd_names_keeps_its_subjects_in_a_list(tmp_path):
    odd = ["1", "1.0", "#hash", "my subj", "ünï", "a,comma", "nan", "-dash"]
    write_folder(tmp_path/"f", torch.randint(0, 255, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(8).repeat_interleave(2), subjects=odd)
    whole = open_encoded(tmp_path/"f")
    found = convert(tmp_path/"f", tmp_path/"all.txt", "list")
    assert sorted(found.subjects) == sorted(odd) and torch.equal(found.labels, whole.labels) and _read_all(found) == _read_all(whole)


def test_a_list_may_name_an_image_twice(tmp_path, faces):
    for whole in (open_encoded(faces), quietly(convert, faces, tmp_path/"set")):
        pick = torch.tensor([4, 4, 0, 4])
        found = quietly(open_encoded, write_list(tmp_path/f"{whole.name}.txt", whole, pick))
        assert _read_all(found) == [whole.read(i) for i in pick.tolist()]


def test_lists_that_are_not_written(tmp_path, faces):
    whole = open_encoded(faces)
    first = write_list(tmp_path/"a.txt", whole)
    before = first.read_bytes()
    assert write_list(first, whole) == first and convert(faces, first, "list").subjects == whole.subjects        # the same again
    for call in (lambda: write_list(first, whole, torch.arange(3)), lambda: convert(whole.subset(torch.arange(3)), first, "list")):
        with pytest.raises(FileExistsError, match="a.txt exists and holds something else: choose another name"): call()
    assert first.read_bytes() == before
    with pytest.raises(FileExistsError, match="holds something else"): write_list(tmp_path/"d.txt", whole) if (tmp_path/"d.txt").mkdir() is None else None
    with pytest.raises(ValueError, match="name of a list ends in .txt"): write_list(tmp_path/"a.list", whole)
    with pytest.raises(ValueError, match="label -1: labels start at 0"): write_list(tmp_path/"b.txt", whole, torch.arange(2), torch.tensor([0, -1]))
    with pytest.raises(ValueError, match="0 images but 0 labels"): write_list(tmp_path/"b.txt", whole, torch.arange(0))
    with pytest.raises(ValueError, match="size=24: a list names images as they are"): convert(faces, tmp_path/"b.txt", "list", size=24)
    assert not (tmp_path/"a.list").exists() and not (tmp_path/"b.txt").exists()


@pytest.mark.parametrize("text, count", [("# made by hand\n#\n\n#1/0.jpg\t5\nb/0.jpg\t6\n", 2), ("# path label\nb/0.jpg 6\n#1/0.jpg 5\n", 2)])
def test_only_the_lines_before_the_first_image_are_comments(tmp_path, text, count):
    for name in ("#1", "b"): (tmp_path/name).mkdir(); (tmp_path/name/"0.jpg").write_bytes(b"x")
    (tmp_path/"mine.txt").write_text(text)
    assert quietly(open_encoded, tmp_path/"mine.txt").subjects == ["5", "6"]
    (tmp_path/"mine.txt").write_text(text.replace(" ", "\t")+"# the end\n")
    with pytest.raises(ValueError, match="mine.txt, line"): open_encoded(tmp_path/"mine.txt")


@pytest.mark.parametrize("text", ["sp/my subj/im 0.jpg 3\n", "a/1.jpg 1\nmy subj/1.jpg 2\n", "my subj/1.jpg\nmy subj/2.jpg\n", "a/1.jpg,1\na, b/1.jpg,2\n"])
def test_spaces_in_paths_call_for_tabs(tmp_path, text):
    for name in ("a", "my subj"): (tmp_path/name).mkdir(); (tmp_path/name/"1.jpg").write_bytes(b"x"); (tmp_path/name/"2.jpg").write_bytes(b"x")
    (tmp_path/"mine.txt").write_text(text)
    with pytest.raises((ValueError, OSError), match="mine.txt.*put tabs between path and label"): open_encoded(tmp_path/"mine.txt")


def test_the_current_folder(tmp_path, faces, monkeypatch):
    convert(faces, tmp_path/"mine", "folder"); convert(faces, tmp_path/"set")
    for name, source in (("mine", "."), ("mine", "../mine"), ("set", "."), ("set", "train.rec")):
        monkeypatch.chdir(tmp_path/name)
        assert open_encoded(source).name == name
    for to in ("records", "folder", "list"):
        with pytest.raises(ValueError, match="a name of its own: give a new"): convert(faces, ".", to)


# ---- headers and encodings

TABLES = {"path,person_id\n{0},anna\n{1},boris\n": 2, ",path,label\n0,{0},anna\n1,{1},boris\n": 2, "Unnamed: 0,image_path,label\n0,{0},1\n1,{1},2\n": 2,
          "file_name,width,identity\n{0},112,anna\n{1},112,boris\n": 2, "PATH\tLabel\tx1\n{0}\ta\t1.5\n{1}\tb\t2.5\n": 2, "path\n{0}\n{1}\n": 1, ",path\n0,{0}\n1,{1}\n": 1}

@pytest.mark.parametrize("text", TABLES)
def test_headers_that_are_known(tmp_path, text):
    for k in range(2): write_whole(tmp_path/"1999"/f"{k}.jpg", b"%d" % k)
    (tmp_path/"mine.csv").write_text(text.format("1999/0.jpg", "1999/1.jpg"))
    found = quietly(open_encoded, tmp_path/"mine.csv")
    assert len(found.subjects) == TABLES[text] and _read_all(found) == [b"0", b"1"]


UNKNOWN = {"path,who\n{0},anna\n": "line 1: the columns who are not known.*--label-column NAME", "path,who,when\n{0},anna,1999\n": "the columns who, when are not known",
           "img,label\n{0},anna\n": "img, label, is known to hold paths.*--path-column NAME", "path,label,person_id\n{0},1,anna\n": "label and person_id could each be the label.*--label-column label",
           "image_path,file_name,label\n{0},x,1\n": "image_path and file_name could each be the path", "path,label\n": "names no image below its first line, path,label"}

@pytest.mark.parametrize("text", UNKNOWN)
def test_headers_that_are_not_known_are_named(tmp_path, text):
    write_whole(tmp_path/"1999"/"0.jpg", b"0")
    (tmp_path/"mine.csv").write_text(text.format("1999/0.jpg"))
    with pytest.raises(ValueError, match=f"mine.csv.*{UNKNOWN[text]}"): open_encoded(tmp_path/"mine.csv")


def test_columns_that_are_named(tmp_path):
    for k in range(2): write_whole(tmp_path/"1999"/f"{k}.jpg", b"%d" % k)
    (tmp_path/"mine.csv").write_text("label,Who,img,path\n7,anna,1999/0.jpg,x\n7,boris,1999/1.jpg,y\n")
    found = open_encoded(tmp_path/"mine.csv", path_column="img", label_column="who")
    assert found.subjects == ["anna", "boris"] and _read_all(found) == [b"0", b"1"]
    with pytest.raises(ValueError, match="no column 'face'.*label, Who, img, path"): open_encoded(tmp_path/"mine.csv", path_column="face")
    for source, how in ((tmp_path, dict(label_column="who")), (tmp_path/"mine.csv", dict(depth=2))):
        with pytest.raises(ValueError, match="columns are for list files|a depth is for nested folders"): open_encoded(source, **how)


@pytest.mark.parametrize("encoding, name", [("utf-16", "UTF-16,"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE"), ("utf-32", "UTF-32"), ("cp1252", "byte 0xe9 in line 2.*Windows-1252"), ("gbk", "line 2 is no UTF-8.*GBK")])
def test_other_encodings_are_named(tmp_path, encoding, name):
    person = "张伟" if encoding == "gbk" else "José"
    for file, text in (("mine.csv", f"path,label\na/0.jpg,{person}\n"), ("pairs.txt", f"a/0.jpg\tb/0.jpg\t1\n{person}/0.jpg\ta/0.jpg\t0\n")):
        (tmp_path/file).write_bytes(text.encode(encoding))
        with pytest.raises(ValueError, match=f"{file}: .*{name}.*iconv") as e: (open_pairs if file == "pairs.txt" else open_encoded)(tmp_path/file)
        assert str(e.value).count(file) == 1


def test_pictures_left_out_of_a_folder_are_in_the_set_s_account(tmp_path):
    write_folder(tmp_path/"set", torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]))
    write_whole(tmp_path/"set"/"2"/"deep"/"0.jpg", b"x")
    with pytest.warns(UserWarning, match="2 left out, the first: .*set/2: no image of this subject"): found = open_encoded(tmp_path/"set")
    assert len(found) == 4 and len(found.skipped) == 2
    with pytest.raises(ValueError, match="set/2: no image"): convert(tmp_path/"set", tmp_path/"out", strict=True)
    assert len(quietly(convert, tmp_path/"set", tmp_path/"out").skipped) == 2


@pytest.mark.parametrize("form, suffix", [("TIFF", ".tif"), ("PPM", ".ppm"), ("AVIF", ".avif"), ("WEBP", ".webp"), ("GIF", ".png")])
def test_less_usual_formats_are_converted_under_their_suffix(tmp_path, form, suffix):
    if form not in FORMATS: pytest.skip(f"this Pillow reads no {form}")
    for k in range(2):
        Image.new("RGB", (16, 16), (200, 100, 50*k)).save(data := io.BytesIO(), form)
        write_whole(tmp_path/"set"/str(k)/"0.jpg", data.getvalue())
    found = quietly(convert, tmp_path/"set", tmp_path/"out", "folder")
    assert [found.where(i) for i in range(2)] == [f"{tmp_path}/out/{k}/0{suffix}" for k in range(2)]


# ---- damage

def test_each_fault_is_named_and_the_rest_read(tmp_path):
    good = [pack_image(b"image%d" % k, k//2, k) for k in range(12)]
    bad = {3: b"\0\0\0\0"+good[3][4:],                                                   # flipped magic
           4: good[4][:4]+struct.pack("<I", 2**29-1)+good[4][8:],                        # a length that lies
           5: pack_record(struct.pack("<IfQQ", 2**31, 0, 5, 0)+b"image"),                # more labels than bytes
           6: good[6][:4]+struct.pack("<I", 3 << 29 | 30)+good[6][8:],                   # the middle of a record
           7: pack_image(b"", 3, 7), 8: pack_image(b"image", float("nan"), 8), 9: pack_image(b"image", -1, 9), 10: pack_image(b"image", 1e30, 10), 11: pack_image(b"image", .5, 11)}
    folder = loose(tmp_path/"a", [bad.get(k, frame) for k, frame in enumerate(good)])
    with pytest.warns(UserWarning, match="9 left out"): found = open_encoded(folder)
    assert found.labels.tolist() == [0, 0, 1] and _read_all(found) == [b"image0", b"image1", b"image2"]
    for line, (key, why) in zip(found.skipped, [(3, "no record"), (4, "longer than the file"), (5, "labels are longer"), (6, "middle"), (7, "empty image"),
                                                (8, "label nan"), (9, "label -1"), (10, r"label 1e\+30"), (11, "label 0.5")]):
        assert f"train.rec, record {key}:" in line and why.replace("\\", "") in line


@pytest.mark.parametrize("text, why", [("0\tx\n1\t2\n", "not two whole numbers"), ("0\t0\n0\t40\n", "same key twice"), ("", "empty"), ("1\n2\n", "1 columns"),
                                       ("0\t999999\n1\t-5\n", "another file"), ("0\t99999999999999999999999\n", "not two whole numbers"), ("\x00\xff", "not two")])
def test_damaged_index_is_rebuilt(tmp_path, text, why):
    folder = loose(tmp_path/"a", [pack_image(b"image%d" % k, k, k) for k in range(5)])
    (folder/"train.idx").write_bytes(text.encode("latin1"))
    with pytest.warns(UserWarning, match=f"train.idx: .*{why}.*5 records found"): found = open_encoded(folder)
    assert len(found) == 5 and found.read(4) == b"image4"


@pytest.mark.parametrize("data", [b"", b"\0"*100, b"<html>404</html>", WORD, WORD*10, pack_record(b""), pack_record(b"x"*23), pack_image(b"", [1, 2])])
def test_no_record_at_all(tmp_path, data):
    (tmp_path/"train.rec").write_bytes(data)
    with pytest.raises(ValueError, match="train.rec.*copy"): quietly(open_encoded, tmp_path)


def test_truncated_file(tmp_path):
    folder = record(tmp_path/"set", [b"image%02d" % k for k in range(20)], [k//2 for k in range(20)])
    with open(folder/"train.rec", "r+b") as f: f.truncate(700)
    with pytest.warns(UserWarning, match="train.rec: cut off: 17 of 31 records are whole: copy it again"): found = open_encoded(folder)
    assert len(found) == 16 and _read_all(found) == [b"image%02d" % k for k in range(16)]
    assert [line.partition("record ")[2] for line in found.skipped] == ["17: longer than the file", *(f"{k}: beyond the end of the file" for k in (18, 19, 20))]
    with open(folder/"train.rec", "r+b") as f: f.truncate(100)                             # after it was opened
    for key in (2, 11):                                                                    # half there, and beyond the end
        with pytest.raises(ValueError, match=f"train.rec, record {key}: .*copy"): found.read(key-1)


@pytest.mark.parametrize("share", [.2, .5, .8, .97])
@pytest.mark.parametrize("header", [True, False])
def test_every_image_beyond_the_cut_is_counted(tmp_path, faces, share, header):
    images = [p.read_bytes() for p in sorted(faces.rglob("*.jpg"))]
    if header: folder = record(tmp_path/"set", images, [k//3 for k in range(36)])
    else: folder = loose(tmp_path/"set", [pack_image(data, k//3, k) for k, data in enumerate(images)])
    rec = folder/"train.rec"
    with open(rec, "r+b") as f: f.truncate(int(share*rec.stat().st_size))
    with pytest.warns(UserWarning) as said: found = open_encoded(folder)
    assert len(found)+len(found.skipped) == 36 and 0 < len(found) < 36 and _read_all(found) == images[:len(found)]
    assert sum(f"{len(found)+header} of {36+13*header} records are whole" in str(w.message) for w in said) == 1
    assert not any("another file" in str(w.message) for w in said) and lint(folder).table.set_index("rule")["count"]["left out"] == len(found.skipped)
    made = quietly(convert, folder, tmp_path/"again")
    assert len(made) == len(found) and made.skipped == found.skipped


def test_an_index_of_another_file_is_still_told(tmp_path):
    for name, size in (("a", 30), ("b", 47)): record(tmp_path/name, [b"%03d" % k + bytes(size) for k in range(40)], [k//2 for k in range(40)])
    for mine, other in (("a", "b"), ("b", "a")):
        index = (tmp_path/mine/"train.idx").read_text()
        (tmp_path/mine/"train.idx").write_text((tmp_path/other/"train.idx").read_text())
        with pytest.warns(UserWarning, match="train.idx: belongs to another file: 61 records found"): assert len(open_encoded(tmp_path/mine)) == 40
        (tmp_path/mine/"train.idx").write_text(index)


def test_later_parts_that_lie(tmp_path):
    first = WORD+struct.pack("<I", 1 << 29 | 28)+struct.pack("<IfQQ", 0, 1, 0, 0)+b"abcd"
    ends = {"good": struct.pack("<I", 3 << 29 | 2)+b"xy\0\0", "lies": struct.pack("<I", 3 << 29 | 2**29-1)+b"xy\0\0", "flag": struct.pack("<I", 2)+b"xy\0\0", "cut": b""}
    for name, end in ends.items():
        store = RecordFile(loose(tmp_path/name, [first+WORD+end], keys=[0])/"train.rec")
        tracemalloc.start()
        if name == "good": assert store.read(0) == b"abcd"+WORD+b"xy"
        else:
            with pytest.raises(ValueError, match="train.rec, record 0: .*copy"): store.read(0)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        tracemalloc.stop()


def test_padding_after_any_part(tmp_path):
    frame = WORD+struct.pack("<I", 1 << 29 | 25)+struct.pack("<IfQQ", 0, 1, 0, 0)+b"a\0\0\0"+WORD+struct.pack("<I", 3 << 29 | 1)+b"b\0\0\0"
    assert RecordFile(loose(tmp_path/"a", [frame], keys=[0])/"train.rec").read(0) == b"a"+WORD+b"b"


@pytest.mark.parametrize("text, done, kept", [("", 5, []), ("3\ta\n4\tb\n", 3, ["3\ta", "4\tb"]), ("3\ta\n5\tb\n", 3, ["3\ta"]), ("0\ta\n9\tb\n1", 2, ["0\ta"])])
def test_lines_beyond_the_last_image_are_forgotten(tmp_path, text, done, kept):
    (tmp_path/"skipped.txt").write_text(text)
    assert left_out(tmp_path/"skipped.txt", done) == kept == (tmp_path/"skipped.txt").read_text().split("\n")[:-1]


@pytest.mark.parametrize("promise", [float("nan"), -3., 1e30, 3., 0.])
def test_header_that_lies(tmp_path, promise):
    frames = [pack_image(b"", [promise, 9])]+[pack_image(b"image%d" % k, k, k) for k in range(1, 7)]
    with pytest.warns(UserWarning) as said: found = open_encoded(loose(tmp_path/"a", frames))
    assert any("6 are there" in str(w.message) for w in said)
    assert len(found) == (2 if promise == 3 else 6)


def _probe(folder): # bytes
    "Open and read everything, and return the most memory used; only ValueError and OSError that name the file may come."
    tracemalloc.start()
    try:
        found = quietly(open_encoded, folder)
        for i in range(len(found)):
            try: assert len(found.read(i)) <= os.path.getsize(folder/"train.rec")
            except (ValueError, OSError) as e: assert "train.rec, record" in str(e)
    except (ValueError, OSError) as e: assert "train" in str(e)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


VALID = b"".join([pack_image(b"", [8, 12])]+[pack_image(b"im%d" % k + WORD*(k % 2), k//2 if k % 3 else [k//2, 5], k) for k in range(1, 8)]+[pack_image(b"", [1, 3])])
edits = st.lists(st.tuples(st.integers(0, len(VALID)+20), st.one_of(st.binary(max_size=8), st.just(WORD), st.sampled_from([b"\xff\xff\xff\xff", b"\0\0\0\x20", b"\0\0\0\x60"]))), max_size=6)

@SLOW
@given(edits, st.integers(0, len(VALID)), st.booleans(), st.text("0123456789\t\n -.e", max_size=40))
def test_mutated_files(tmp_path_factory, edits, cut, indexed, idx):
    folder, data = tmp_path_factory.mktemp("m"), bytearray(VALID)
    for at, new in edits: data[at:at+len(new)] = new
    (folder/"train.rec").write_bytes(bytes(data[:cut or None]))
    if indexed: (folder/"train.idx").write_text(idx)
    else: (folder/"train.idx").write_text("".join(f"{k}\t{k*40}\n" for k in range(9)))
    assert _probe(folder) < 2_000_000


@SLOW
@given(st.binary(max_size=200), st.binary(max_size=60))
def test_random_bytes(tmp_path_factory, data, idx):
    folder = tmp_path_factory.mktemp("m")
    (folder/"train.rec").write_bytes(data)
    (folder/"train.idx").write_bytes(idx)
    assert _probe(folder) < 2_000_000


@SLOW
@given(st.one_of(st.binary(max_size=80), st.text(alphabet="a/1.jpg\t\n, \"#-\0source:", max_size=80).map(str.encode)))
def test_random_lists(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("l")
    (folder/"list.txt").write_bytes(data)
    try: found = quietly(open_encoded, folder/"list.txt")
    except (ValueError, OSError) as e: assert "list.txt" in str(e)      # and nothing else comes
    else: assert len(found) and found.labels.unique().tolist() == list(range(len(found.subjects)))


# ---- writer and conversion

def test_writer_refuses(tmp_path):
    with pytest.raises(ValueError, match="label 1 of image 2.*subject by subject"), RecordWriter(tmp_path/"a") as w: w.add(b"x", 2); w.add(b"x", 1)
    with pytest.raises(ValueError, match="0 images"), RecordWriter(tmp_path/"b"): pass
    assert not (tmp_path/"a").exists() and not (tmp_path/"b").exists()
    record(tmp_path/"a", [b"y"], [0])                                                      # starts afresh
    assert open_encoded(tmp_path/"a").read(0) == b"y"
    with pytest.raises(FileExistsError, match="not empty"): RecordWriter(tmp_path/"a")


def test_converting_keeps_every_byte(tmp_path, faces):
    first = open_encoded(faces)
    as_record = convert(faces, tmp_path/"rec")
    as_list = convert(as_record, tmp_path/"all.txt", "list")
    as_folder = convert(tmp_path/"all.txt", tmp_path/"folder", "folder")
    for found in (as_record, as_list, as_folder):
        assert _read_all(found) == _read_all(first) and torch.equal(found.labels, first.labels) and found.subjects == first.subjects and not found.skipped
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.txt", "folder", "rec"]
    assert (tmp_path/"rec"/"property").read_text() == "12,16,16\n"


def test_writer_goes_on_only_if_asked(tmp_path):
    images = [b"image%d" % k + WORD*(k % 2) for k in range(9)]
    whole = record(tmp_path/"whole", images, [k//3 for k in range(9)])
    for resume, kept in ((True, 4), (False, 0)):                        # of five images the last may be torn
        first = RecordWriter(tmp_path/"set")
        for k in range(5): first.add(images[k], k//3)
        first.f.close()
        with RecordWriter(tmp_path/"set", resume=resume) as w:
            assert w.done == kept
            for k in range(kept, 9): w.add(images[k], k//3)
        for name in ("train.rec", "train.idx", "property"): assert (tmp_path/"set"/name).read_bytes() == (whole/name).read_bytes()
        for p in (tmp_path/"set").iterdir(): p.unlink()


def test_killed_after_the_last_image(tmp_path):
    images = [b"image%d" % k for k in range(4)]
    whole = record(tmp_path/"whole", images, [0, 0, 1, 1])
    (tmp_path/".set.part").mkdir()
    (tmp_path/".set.part"/"train.rec").write_bytes((whole/"train.rec").read_bytes()[:-3])  # identities half written
    with RecordWriter(tmp_path/"set", resume=True) as w: assert w.done == 4
    assert (tmp_path/"set"/"train.rec").read_bytes() == (whole/"train.rec").read_bytes()


def test_names_survive_a_record_file(tmp_path):
    write_folder(tmp_path/"f", torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), subjects=["anna", "boris"])
    convert(tmp_path/"f", tmp_path/"r")
    assert convert(tmp_path/"r", tmp_path/"g", "folder").subjects == ["anna", "boris"]
    (tmp_path/"r"/"subjects.txt").write_text("anna\n")
    with pytest.raises(ValueError, match="subjects.txt: 1 names"): open_encoded(tmp_path/"r")
    (tmp_path/"r"/"subjects.txt").write_text("anna\nanna\n")
    with pytest.raises(ValueError, match="subjects.txt: two subjects have one name"): open_encoded(tmp_path/"r")
    for name in ("a\nb", "a\rb"):
        with pytest.raises(ValueError, match="line break"): RecordWriter(tmp_path/"s", ["anna", name])


@pytest.mark.parametrize("to", ["records", "folder"])
def test_damaged_images_are_named(tmp_path, faces, to):
    source = convert(faces, tmp_path/"mine", "folder").store.path
    for name in ("0/0.jpg", "5/1.jpg", "11/2.jpg"): (source/name).write_bytes(b"<html>")
    found = convert(source, tmp_path/"out", to)
    assert len(found) == 33 and [("0/0.jpg" in line) for line in found.skipped] == [True, False, False]
    assert len((tmp_path/"out"/"skipped.txt").read_text().split("\n")) == 4
    with pytest.raises(ValueError, match="0/0.jpg"): convert(source, tmp_path/"out2", to, strict=True)
    assert not (tmp_path/"out2").exists()


def test_size_encodes_only_what_differs(tmp_path):
    (tmp_path/"f"/"a").mkdir(parents=True)
    fits, wide = (torch.randint(0, 255, (3, 16, w), dtype=torch.uint8) for w in (16, 24))
    for k, im in enumerate((fits, wide)): (tmp_path/"f"/"a"/f"{k}.png").write_bytes(encode_image(im))
    with pytest.warns(UserWarning, match="all its 2 images are of one subject"): found = convert(tmp_path/"f", tmp_path/"g", "folder", size=16)
    assert found.read(0) == encode_image(fits) and decode_image(found.read(1)).shape == (3, 16, 16) and found.where(1).endswith("1.jpg")


def test_conversion_refuses(tmp_path, faces):
    with pytest.raises(ValueError, match="to='tar'"): convert(faces, tmp_path/"x", "tar")
    with pytest.raises(FileNotFoundError, match="check the path"): convert(tmp_path/"nowhere", tmp_path/"x")
    (tmp_path/"x").mkdir(); (tmp_path/"x"/"file").write_text("")
    with pytest.raises(FileExistsError, match="not empty"): convert(faces, tmp_path/"x")


KILLED = """
import sys, time, torch
import cemiface.data.convert as c
torch.set_num_threads(1)
plain = c.fitted
c.fitted = lambda *args: (time.sleep(.02), plain(*args))[1]
c.convert(*sys.argv[1:])
"""

@pytest.mark.parametrize("to", ["records", "folder"])
def test_killed_conversion_goes_on(tmp_path, faces, to):
    source = convert(faces, tmp_path/"mine", "folder").store.path
    for name in ("2/0.jpg", "3/1.jpg", "11/2.jpg"): (source/name).write_bytes(b"<html>")
    whole = convert(source, tmp_path/"whole", to)
    part, kills = tmp_path/".out.part", 0
    written = lambda: sum(p.stat().st_size for p in part.rglob("*") if p.is_file()) if part.exists() else 0
    for limit in (3_000, 15_000):
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(source), str(tmp_path/"out"), to], stderr=subprocess.DEVNULL)
        while child.poll() is None and written() < limit: time.sleep(.005)
        kills += child.poll() is None
        child.send_signal(signal.SIGKILL); child.wait()
    assert kills and not (tmp_path/"out").exists()
    if to == "records":
        with open(part/"train.rec", "r+b") as f: f.truncate(f.seek(0, 2)-5)              # a torn last record
    with pytest.raises(ValueError, match="beginning of another conversion"): convert(source, tmp_path/"out", to, size=20)
    found = convert(source, tmp_path/"out", to)
    assert found.skipped == whole.skipped and len(found.skipped) == 3
    for p in (tmp_path/"whole").rglob("*"):
        if p.is_file(): assert (tmp_path/"out"/p.relative_to(tmp_path/"whole")).read_bytes() == p.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "out", "whole"] and not (tmp_path/"out"/".from").exists()
    assert len(list((tmp_path/"out").rglob("*"))) == len(list((tmp_path/"whole").rglob("*")))


def test_benchmark_runs(tmp_path):
    found = bench_records(2000, tmp_path)
    assert found["images"] == 2000 and all(v > 0 for v in found.values()) and not list(tmp_path.iterdir())


@given(st.lists(st.lists(st.sampled_from(["a", "b", "7", "b-a", "\u00e9"]), min_size=1, max_size=5), min_size=1, max_size=3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_join_keeps_every_image_and_subject(sets, match):
    made = []
    for k, names in enumerate(sets):
        labels, subjects = dense(names)
        made.append(Encoded(f"set{k % 2}", labels, subjects, Files(Path(f"/{k}"), [f"{name}/{i}.jpg" for i, name in enumerate(names)]), np.arange(len(names)), [f"left out of {k}"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        joined = join(made, match)
    flat = [(k, name, i) for k, names in enumerate(sets) for i, name in enumerate(names)]
    assert [joined.where(i) for i in range(len(joined))] == [f"/{k}/{name}/{i}.jpg" for k, name, i in flat]
    by_label = {}
    for i, label in enumerate(joined.labels.tolist()): by_label.setdefault(label, set()).add(flat[i][1] if match else flat[i][:2])
    assert all(len(people) == 1 for people in by_label.values()) and len(by_label) == len(joined.subjects) == len(set().union(*by_label.values()))
    assert joined.subjects == sorted(joined.subjects, key=natural_key) and len(joined.skipped) == len(sets)


def test_a_join_in_processes_and_under_a_filter(tmp_path, faces):
    for name in ("one", "two"): shutil.copytree(faces, tmp_path/name)
    joined = open_encoded(f"{tmp_path}/one,{tmp_path}/two")
    again = pickle.loads(pickle.dumps(joined.subset(joined.labels % 2 == 0)))
    assert [again.read(i) for i in range(len(again))] == [joined.read(i) for i in (joined.labels % 2 == 0).nonzero()[:, 0].tolist()]
    before = set_fingerprint(joined)
    assert set_fingerprint(open_encoded(f"{tmp_path}/one,{tmp_path}/two")) == before
    os.remove(tmp_path/"two"/joined.store.sets[1].store.paths[-1])
    assert set_fingerprint(open_encoded(f"{tmp_path}/one,{tmp_path}/two")) != before


def test_two_subjects_of_one_name_are_refused(tmp_path):
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    write_folder(tmp_path/"a", image, torch.zeros(1, dtype=torch.long), subjects=["b-c"])
    write_folder(tmp_path/"a-b", image, torch.zeros(1, dtype=torch.long), subjects=["c"])
    with pytest.raises(ValueError, match="a-b-c would name two subjects: rename one of the sets"): open_encoded(f"{tmp_path}/a,{tmp_path}/a-b")


# ---- what a list's columns may be, and where lists are not looked for

def photos_of(folder, names):
    for name in names:
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(name.encode())
    return folder

DATES = [f"2024-01-{day}/{k}.jpg" for day in (11, 12) for k in range(3)]
GUESSES = {"path,split,label": "{0},train,{1}", "key, path, split, label": "{1}\t{0}\ttrain\tanna", "a name first": "anna,{0},7", "split in front": "train,{1},{0}",
           "two labels": "{1}\t0\t5\t{0}", "few numbers behind": "1\t{0}\t{1}\t30.5", "key, label and more": "{1}\t0\t7"}

@pytest.mark.parametrize("layout", GUESSES)
def test_a_list_without_header_is_read_by_known_layouts_only(tmp_path, layout):
    photos_of(tmp_path, DATES)
    (tmp_path/"mine.txt").write_text("".join(GUESSES[layout].format(path, k)+"\n" for k, path in enumerate(DATES)))
    with pytest.raises(ValueError, match="mine.txt, line 1: . columns and no header, so that .* could be the subject: write a first line"): open_encoded(tmp_path/"mine.txt")

KNOWN = {"{0}\t{1}": 6, "{1}\t{0}": 2, "x{1}\t{0}": 6, "{1}\t{0}\tanna": 1, "{1}\t7.000\t{0}": 1, "1\t{0}\t{1}\t1\t2\t3\t4": 6, "{0}": 2, "{0};{1}": 6, "\"{0}\";\"{1}\"": 6}

@pytest.mark.parametrize("layout", KNOWN)
def test_known_layouts(tmp_path, layout):
    photos_of(tmp_path, DATES)
    (tmp_path/"mine.txt").write_text("".join(layout.format(path, k)+"\n" for k, path in enumerate(DATES)))
    assert len(quietly(open_encoded, tmp_path/"mine.txt").subjects) == KNOWN[layout]

def test_a_list_of_pairs_is_no_list_of_faces(tmp_path):
    photos_of(tmp_path, DATES)
    (tmp_path/"mine.txt").write_text(f"{DATES[0]},{DATES[1]},1\n")
    with pytest.raises(ValueError, match="are both images: a list of faces names one a line; lists of pairs are for --benchmarks"): open_encoded(tmp_path/"mine.txt")

def test_comments_below_a_header(tmp_path):
    photos_of(tmp_path, DATES)
    (tmp_path/"mine.csv").write_text("path,label\n# made by hand\n# twice checked\n"+"".join(f"{path},{k//2}\n" for k, path in enumerate(DATES)))
    assert len(open_encoded(tmp_path/"mine.csv")) == 6
    (tmp_path/"mine.csv").write_text("path,label\n# made by hand\n")
    with pytest.raises(ValueError, match="names no image below its first line"): open_encoded(tmp_path/"mine.csv")

def test_paths_of_another_machine(tmp_path):
    for path in ("/mnt/faces/a/0.jpg", "C:\\\\faces\\\\a\\\\0.jpg"):
        (tmp_path/"mine.txt").write_text(f"{path}\t1\n")
        with pytest.raises(FileNotFoundError, match="cut the paths down to what lies below the list's folder"): open_encoded(tmp_path/"mine.txt")

def test_metadata_of_hugging_face_is_a_list_where_it_holds_labels(tmp_path):
    photos_of(tmp_path, DATES)
    rows = [f"{path},{'anna' if k % 2 else 'boris'}" for k, path in enumerate(DATES)]
    (tmp_path/"metadata.csv").write_text("\n".join(["file_name,label", *rows]))
    assert open_encoded(tmp_path).subjects == ["anna", "boris"]
    (tmp_path/"metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    with pytest.warns(UserWarning, match="metadata.csv is not read, since folders are taken as the subjects"): found = open_encoded(tmp_path)
    assert found.subjects == ["2024-01-11", "2024-01-12"]

@pytest.mark.parametrize("name", ["labels.csv", "identity.txt", "people.tsv", "metadata.jsonl"])
def test_a_list_beside_folders_is_told_of(tmp_path, name):
    photos_of(tmp_path, DATES)
    sep = "," if name.endswith("csv") else "\t"
    lines = [f'{{"file_name": "{path}", "label": {k}}}' if name.endswith("jsonl") else f"{path}{sep}person{k}" for k, path in enumerate(DATES)]
    (tmp_path/name).write_text("\n".join(lines))
    with pytest.warns(UserWarning, match=f"{name} is not read, since folders are taken as the subjects.*name it in the folder's place"): open_encoded(tmp_path)
    found = quietly(lint, tmp_path).table.set_index("rule")
    assert found.loc["unread list", "severity"] == "warning" and name in found.loc["unread list", "example"]
    # in a folder that holds no set, the list is what to name
    for path in DATES: (tmp_path/path).rename(tmp_path/path.replace("/", "_"))
    for day in (11, 12): (tmp_path/f"2024-01-{day}").rmdir()
    with pytest.raises(ValueError, match=f"no folders of subjects.*or name the list that lies there, .*{name}"): open_encoded(tmp_path)

def test_a_list_that_says_what_the_folders_say_is_passed_over(tmp_path):
    photos_of(tmp_path, DATES)
    (tmp_path/"labels.csv").write_text("path,label\n"+"".join(f"{path},{path[8:10]}\n" for path in DATES))
    (tmp_path/"README.txt").write_text("Faces, drawn in 2024\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_encoded(tmp_path).subjects) == 2

@pytest.mark.parametrize("name", ["", "train.rec", "list.txt", "../elsewhere.txt"])
def test_an_unfinished_set_is_no_set(tmp_path, faces, name):
    out = tmp_path/"set"
    convert(faces, out, "folder" if name.endswith("txt") or not name else "records")
    if name.endswith("txt"): write_list(out/name, open_encoded(out))
    (out/".shares").mkdir()
    for act in (lambda: open_encoded(out/name), lambda: lint(out/name), lambda: convert(out/name, tmp_path/"copy")):
        with pytest.raises(ValueError, match="set is a set that is not whole yet: give the command again that began it, or cemiface set merge"): act()
    (out/"set.json").write_text("{}")
    assert len(open_encoded(out/name)) == 36

@pytest.mark.parametrize("name", ["set.zip", "set.tar.gz", "set.tgz", "set.7z"])
def test_archives(tmp_path, name):
    (tmp_path/name).write_bytes(b"PK")
    with pytest.raises(ValueError, match="is packed: unpack it"): open_encoded(tmp_path/name)

def test_where_a_set_is_not_written(tmp_path, faces):
    for name in ("out.tar", "out.parquet", "out.rec", "out.zip"):
        with pytest.raises(ValueError, match="a set is written into a folder, whatever its form: leave .* out of its name"): convert(faces, tmp_path/name)
        assert not (tmp_path/name).exists()
    with pytest.raises(ValueError, match="lies in the set that it is made from"): convert(faces, faces/"records")
    assert not (faces/"records").exists()
    assert len(convert(faces, tmp_path/"v1.2", "folder")) == 36            # a dot in a name is no form
