"Verification pairs on disk: pickles of Python 2 and 3, hostile ones, and lists that lie."
import os
import pickle
import random
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from cemiface.data.images import encode_image
from cemiface.data.pairs import (convert_pairs, damaged_pairs, open_pairs, pair_set, PairImages, read_plain_pickle, without_damaged, write_bin,
                            write_pairs_folder)
from cemiface.data import pairs as module

PIXELS = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
PNGS = [encode_image(torch.from_numpy(p).permute(2, 0, 1)) for p in PIXELS]
SAME = [True, False]


def decoded(pairs, size=None):
    "Every distinct image."
    return PairImages(pairs, size)[torch.arange(len(pairs.images))]


def opened(tmp_path, data:bytes):
    (tmp_path / "x.bin").write_bytes(data)
    return open_pairs(tmp_path / "x.bin")


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("images", [
    PNGS, tuple(PNGS), [np.frombuffer(p, np.uint8) for p in PNGS], [np.frombuffer(p, np.uint8)[:, None] for p in PNGS],   # encoded
    list(PIXELS), [p.transpose(2, 0, 1) for p in PIXELS], [np.ascontiguousarray(p.transpose(2, 0, 1)) for p in PIXELS],  # pixels
    [np.asfortranarray(p) for p in PIXELS], [np.flip(p, 1)[:, ::-1] for p in PIXELS],
    PIXELS, np.ascontiguousarray(PIXELS.transpose(0, 3, 1, 2)), np.array(PNGS, object), np.array([*PIXELS, None], object)[:4]])   # in one array
@pytest.mark.parametrize("same", [SAME, [1, 0], np.array(SAME), list(np.array(SAME)), np.array([1, 0]), [1., 0.], np.array([1., 0.]), np.array([1, 0], np.float16),
    np.array([1, 0], np.uint8), list(np.array([1., 0.], np.float32)), np.array(SAME, object)])
def test_every_protocol_and_form(tmp_path, protocol, images, same):
    p = opened(tmp_path, pickle.dumps((images, same), protocol))
    assert p.issame.tolist() == SAME and p.issame.dtype == torch.bool and p.index.tolist() == [0, 1, 2, 3]
    assert np.array_equal(decoded(p).permute(0, 2, 3, 1).numpy(), PIXELS)
    if isinstance(images[0], bytes): assert p.images == PNGS and p.name == "x" and len(p) == 2


def python2(protocol:int, images:list[bytes])->bytes:
    "The pickle that Python 2 writes: strings, not bytes; bools as I00 and I01 below protocol 2."
    def string(b): return b"S'" + b"".join(b"\\x%02x" % c if c > 126 or c < 32 or c in b"'\\" else bytes([c]) for c in b) + b"'\n"
    if protocol == 0:
        return b"((lp0\n" + b"".join(string(b) + b"p%d\na" % (k + 1) for k, b in enumerate(images)) + b"a(lp90\nI01\naI00\natp91\n.".removeprefix(b"a")
    text = b"".join((b"U" + bytes([len(b)]) if len(b) < 256 else b"T" + struct.pack("<I", len(b))) + b + b"q" + bytes([k + 1]) for k, b in enumerate(images))
    labels = b"I01\nI00\n" if protocol == 1 else b"\x88\x89"
    return (b"(" if protocol == 1 else b"\x80\x02") + b"]q\x00(" + text + b"e]q\x5a(" + labels + b"e" + (b"tq\x5b." if protocol == 1 else b"\x86q\x5b.")


@pytest.mark.parametrize("protocol", range(3))
def test_python_2(tmp_path, protocol):
    data = python2(protocol, PNGS)
    assert pickle.loads(data, encoding="bytes") == (PNGS, SAME)                    # the stream is a real one
    assert opened(tmp_path, data).images == PNGS


@pytest.mark.parametrize("protocol", [0, 2])
def test_arrays_of_python_2(tmp_path, protocol):
    raw = bytes(range(97, 97 + 12)) * 16                                           # [8,8,3] of printable pixels, no escapes needed
    if protocol == 0:
        dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
        array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I8\nI8\nI3\nt" + dtype + b"I00\nS'" + raw + b"'\ntb"
        data = b"((l" + array + b"a" + array + b"a(lI01\nat."
    else:
        dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x08K\x08K\x03\x87" + dtype + b"\x89U" + bytes([len(raw)]) + raw + b"tb"
        data = b"\x80\x02](" + array + array + b"e](\x88e\x86."
    expected = np.frombuffer(raw, np.uint8).reshape(8, 8, 3)
    p = opened(tmp_path, data)
    assert len(p.images) == 1 and p.index.tolist() == [0, 0] and np.array_equal(decoded(p)[0].permute(1, 2, 0), expected)


def test_more_pairs_than_one_batch_of_a_pickle(tmp_path):
    images = [b"image %d" % (i // 3) for i in range(3400)]
    same = [i % 3 == 0 for i in range(1700)]
    for data in (pickle.dumps((images, same), 2), pickle.dumps((images, same), 5)):
        p = opened(tmp_path, data)
        assert p.encoded() == images and p.issame.tolist() == same and len(p.images) == len(set(images))
    write_bin(tmp_path / "y.bin", images, same)
    assert pickle.loads((tmp_path / "y.bin").read_bytes(), encoding="bytes") == (images, same)
    with pytest.raises(UnicodeDecodeError): pickle.loads(write_bin(tmp_path / "z.bin", PNGS, SAME).read_bytes())      # what InsightFace's loader falls back on


class Call:
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: ([x], [True]), lambda x: (PNGS, [x, x]), lambda x: (PNGS, SAME, x)])
def test_nothing_runs(tmp_path, monkeypatch, protocol, wrap):
    ran = tmp_path / "ran"
    for f, args in ((os.system, (f"touch {ran}",)), (eval, (f"open({str(ran)!r}, 'w')",)), (open, (str(ran), "w")), (exec, (f"open({str(ran)!r}, 'w')",)),
                    (getattr, (os, "system")), (np.fromfile, (str(ran),)), (bytearray, (10**9,))):
        try: data = pickle.dumps(wrap(Call(f, *args)), protocol)
        except (TypeError, pickle.PicklingError): continue                         # modules cannot be pickled
        with pytest.raises(ValueError, match="x.bin: not a plain pickle, at byte .* which was not run"): opened(tmp_path, data)
    assert not ran.exists()


def doubled(n:int)->bytes: # a tuple of tuples of ..., 2**n deep, in 4n bytes
    return b")" + b"".join(b"\x94h" + bytes([k]) + b"\x86" for k in range(n))


@pytest.mark.parametrize("data", [
    b"", b".", b"\x80", b"0.", b"N.", b"\x80\x02N.", b"((.", b"\x94.", b"e.", b"a.", b"t.", b"\x85.", b"R.", b"b.", b"h\x01.", b"\x80\x04\x93.",
    b"\x8e" + b"\xff" * 8 + b".", b"\x96" + b"\xff" * 7 + b"\x0f.", b"\x95" + b"\xff" * 8, b"T\xff\xff\xff\xff.", b"\x8b\xff\xff\xff\x7f.", b"r\xff\xff\xff\xff.",   # lengths that lie
    b"](" + b"N" * 50 + b"e" + b"r\xff\xff\xff\xff.",                                   # a memo of four thousand million places
    b"Nr\xff\xff\xff\x07.",                                                             # a place that Python's own unpickler makes 2 GiB for
    b"}" + doubled(60) + b"Ns.", doubled(60) + b"\x8f(h\x3b\x90.",                      # a key and a member that take 2**60 steps to hash
    b"I" + b"9" * 10**5 + b"\n.", b"L" + b"9" * 10**5 + b"L\n.", b"F1e999\n.",
    doubled(60) + b".", doubled(60) + b"}\x94h\x01h\x01s.", b"cnumpy\ndtype\n" + doubled(60) + b"\x85R.",                 # exponential to hash or print
    doubled(60) + b"\x94](U\x01aU\x01be](h\x3ce\x86.",                                 # so is this label
    doubled(60) + doubled(9) + b"\x93.", b"cnumpy\ndtype\n(S'O'\ntR.", b"cnumpy\ndtype\n(S'u1'\ntR(I3\nS'>'\ntb.",
    b"cnumpy.core.multiarray\n_reconstruct\n(tR(I1\n(I99999999999\ntcnumpy\ndtype\n(S'u1'\ntRI00\nS'abc'\ntb.",           # a shape that lies
    b"cnumpy\ndtype\n(tb.", b"c__builtin__\nbytes\n(I9999999999\ntR.", b"cnumpy\nndarray\n(I9999999999\ntR.",
    b"c_codecs\nencode\n(Vabc\nVrot13\ntR.", b"c" + b"x" * 10**6 + b"\ny\n."])
def test_hostile_streams(tmp_path, data):
    tracemalloc.start()
    with pytest.raises(ValueError, match="x.bin: ") as e: opened(tmp_path, data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(e.value)) < 400 + len(str(tmp_path)) and peak < 20 * len(data) + 200_000


def test_what_is_used_again_and_again_is_bounded(tmp_path):
    text = b"c_codecs\nencode\nq\x00X" + struct.pack("<I", 10**6) + b"a" * 10**6 + b"q\x01" + b"X\x06\x00\x00\x00latin1q\x02" + b"\x86q\x03"
    tracemalloc.start()
    with pytest.raises(ValueError, match="builds more than the file holds"): opened(tmp_path, b"]0".replace(b"0", b"(") + text + b"Rh\x00h\x03R" * 5000 + b"e.")
    array = pickle.dumps(np.zeros((1000, 300, 3), np.uint8), 2)[2:-1]
    views = b"".join(b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01(M\xe8\x03M\x2c\x01K\x03tj\x01\x00\x00\x00\x89j\x02\x00\x00\x00tb" for _ in range(3000))
    dtype = b"cnumpy\ndtype\n(U\x02u1tRr\x01\x00\x00\x00"
    raw = b"T" + struct.pack("<I", 900_000) + bytes(900_000) + b"r\x02\x00\x00\x00"
    with pytest.raises(ValueError, match="more comes out than the file holds"): opened(tmp_path, b"\x80\x02" + dtype + raw + b"](" + views + b"e](" + b"\x88" * 1500 + b"e\x86.")
    assert tracemalloc.get_traced_memory()[1] < 40 * len(array)
    tracemalloc.stop()


def test_instructions_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_STEPS", 1000)
    with pytest.raises(ValueError, match="more than 1000 instructions"): opened(tmp_path, b"](" + b"]" * 10**5 + b"e.")


@pytest.mark.parametrize("data,says", [
    (b"(" * 4_000_000, "nested more than 100 deep"), (b"](" + b"]" * 4_000_000, "more than 1000000 instructions"),
    (b"\x80\x02](U\x01aq\x00" + b"h\x00" * 399_999 + b"e](" + b"\x88" * 200_000 + b"e\x86.", "400000 images, more than those of 100000 pairs")])
def test_a_few_megabytes_take_a_few_seconds(tmp_path, data, says):
    start = time.process_time()
    with pytest.raises(ValueError, match=says): opened(tmp_path, data)
    assert time.process_time() - start < 10


VALID = [pickle.dumps((PNGS, SAME), p) for p in range(6)] + [pickle.dumps((list(PIXELS), np.array(SAME)), p) for p in (0, 2, 5)] + [python2(p, PNGS) for p in range(3)]


@pytest.mark.filterwarnings("ignore:invalid escape")
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=60), st.tuples(st.sampled_from(VALID), st.randoms(use_true_random=False), st.integers(1, 8))))
def test_random_and_mutated_files_raise_only_what_is_promised(tmp_path, monkeypatch, case):
    if not isinstance(case, bytes):
        data, rng, changes = bytearray(case[0]), case[1], case[2]
        for _ in range(changes):
            at, op = rng.randrange(len(data)), rng.choice("flip cut insert drop opcode".split())
            if op == "flip": data[at] ^= 1 << rng.randrange(8)
            elif op == "cut": del data[at + 1:]
            elif op == "insert": data[at:at] = bytes(rng.choices(range(256), k=rng.randrange(1, 5)))
            elif op == "drop" and len(data) > 10: del data[at:at + rng.randrange(1, 5)]
            else: data[min(at, rng.randrange(40)) % len(data)] = rng.choice(b"cR\x93btl()]ejrhq\x94\x85\x86\x87TUXBCSI.")
        case = bytes(data)
    for name in ("system", "popen", "remove"): monkeypatch.setattr(os, name, lambda *_: pytest.fail("code ran"))
    try: p = opened(tmp_path, case)
    except (ValueError, OSError) as e: assert "x.bin" in str(e)
    else:
        assert len(p.index) == 2 * len(p) == len(p.encoded()) and len(p.images) == len(set(p.images))
        assert set(damaged_pairs(p)) <= set(range(len(p)))


@pytest.mark.parametrize("content,says", [
    (PNGS, "it holds bytes and bytes and bytes ..., not one of"), ((PNGS, SAME, SAME), "it holds list and list and list, not one of"), (7, "it holds int, not one of"), ((PNGS, "10"), "it holds list and str"),
    ((SAME, PNGS), "its first list holds numbers: the images come first"), ((np.array(SAME), PNGS), "its first list holds numbers"), ((PNGS, SAME[:1]), "4 images and 1 labels"), ((PNGS, SAME*2), "4 images and 4 labels"), ((PNGS[:3], SAME), "3 images and 2 labels"), (([], []), "at least one pair"),
    (([*PNGS[:3], None], SAME), r"image 3 \(pair 1\) is NoneType"), (([*PNGS[:3], "text"], SAME), "is str"),
    (([*PNGS[:3], np.zeros((8, 8), np.uint8)], SAME), r"image 3 \(pair 1\) is an array uint8 \[8, 8\]"), (([*PNGS[:3], np.zeros((8, 8, 3), np.int64)], SAME), "is an array int64"),
    (([*PNGS[:3], np.zeros((8, 8, 3))], SAME), r"image 3 \(pair 1\) is an array float64"), (([*PNGS[:3], np.zeros(3, complex)], SAME), "array of c16"),
    ((PNGS, [1., .7]), "label of pair 1"), ((PNGS, np.array([float("nan"), 1.])), "label of pair 0"), ((PNGS, [True, 2]), "label of pair 1"), ((PNGS, [True, b"maybe"]), "label of pair 1 is 'maybe', neither True nor False: labels are 1 and 0"), ((PNGS, [None, True]), "label of pair 0 is 'NoneType'"),
    ((PNGS, [-1, 0]), "label of pair 1 is '0', after '-1': labels are"), ((PNGS, [True, "False"]), "label of pair 1 is 'false', after '1'"), ((PNGS, [True, "1"*99]), "label of pair 1"),
    (dict(images=PNGS, issame=SAME), "it holds a dictionary"), ({}, "it holds a dictionary"), ((PNGS, dict(a=1)), "it holds a dictionary"), ((PNGS, [10**300, 1]), "label of pair 0 is 'int'"), ((PNGS, np.array([[1, 0, 1]])), "4 images and 3 labels")])
def test_other_pickles(tmp_path, content, says):
    with pytest.raises(ValueError, match=says): opened(tmp_path, pickle.dumps(content))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.lists(st.sampled_from([*PNGS, b"\xff\xd8jpeg", b"RIFF", b"?", b""]), min_size=2 * n, max_size=2 * n), st.lists(st.booleans(), min_size=n, max_size=n))))
@pytest.mark.filterwarnings("ignore:.*. of .* pairs, ")
def test_bin_to_folder_and_back_keeps_every_byte(tmp_path_factory, case):
    images, same = case
    root = tmp_path_factory.mktemp("pairs")
    write_bin(root / "a.bin", images, same)
    there = convert_pairs(root / "a.bin", root / "folder")
    convert_pairs(root / "folder", root / "b.bin")
    assert (root / "a.bin").read_bytes() == (root / "b.bin").read_bytes()
    assert there.encoded() == open_pairs(root / "folder").encoded() == images and open_pairs(root / "folder" / "pairs.txt").issame.tolist() == same
    assert len(list((root / "folder" / "images").iterdir())) == len(set(images))


def test_lfw_list(tmp_path):
    "Two folds of two pairs per kind, as LFW's own file has ten of 300."
    for s in "A_B", "C", "D_E_F":
        (tmp_path / s).mkdir()
        for n in 1, 2, 13: (tmp_path / s / f"{s}_{n:04d}.{'png' if n == 13 else 'jpg'}").write_bytes(f"{s} {n}".encode())
    lines = ["2\t2", "A_B\t1\t2", "C\t2\t13", "A_B\t1\tC\t1", "C\t1\tD_E_F\t13", "D_E_F\t1\t2", "C\t1\t2", "C\t13\tA_B\t2", "D_E_F\t1\tA_B\t1"]
    for text in ("\n".join(lines), "\n".join(lines).replace("\t", " "), "\r\n".join([*lines, ""])):
        (tmp_path / "pairs.txt").write_text(text)
        p = open_pairs(tmp_path)
        assert p.issame.tolist() == [True, True, False, False] * 2
        assert p.encoded()[:8] == [b"A_B 1", b"A_B 2", b"C 2", b"C 13", b"A_B 1", b"C 1", b"C 1", b"D_E_F 13"]
    (tmp_path / "dev.txt").write_text("\n".join(["4", *lines[1:]]))                # one number: no folds to count
    assert len(open_pairs(tmp_path / "dev.txt")) == 8


@pytest.mark.parametrize("text,says", [
    ("", "it names no pair"), ("img1,img2,label\n", "it names no pair"), ("2 2\nA 1 1\n", "2 2, promises 8 pairs, but 1 follow"), ("4\nA 1 1\n", "4, promises 8 pairs, but 1 follow"), ("a.png b.png\n", "line 1: should be IMAGE IMAGE 0|1"), ("a.png b.png perhaps", "line 1"),
    ("\n\na.png b.png 2", "line 3"), ("1\nA 1\nA 1 2", "line 2: should be NAME"), ("1\nA one two\nA 1 2", "line 2"), ("\na.png b.png 1\na.png c.png 1", r"1 of 4 images are missing, the first is .*c.png \(line 3\): put them there"),
    ("a.png a\0.png 1", "missing"), ("A\t1\tB\t1", "2 of 2 images are missing"),
    # labels in two ways, or none
    ("a.png b.png 1\na.png b.png 0\na.png b.png -1", "label of line 3 is '-1', after '1' and '0': labels are"), ("a.png b.png True\na.png b.png 0", "label of line 2 is '0', after 'true'"),
    ("a.png,b.png,1\na.png,b.png,nan", "label of line 2 is 'nan', neither True nor False"), ("a.png,b.png,1\na.png,b.png,", "line 2: should be"),
    ("a.png b.png y", "label of line 1 is 'y'"), ("0 a.png 0", "line 1: should be"),
    # columns that could mean something else
    ("img1,img2,different\na.png,b.png,1", "its columns are img1, img2, different: two should be images and one, called label or same"),
    ("img1,img2,distance\na.png,b.png,1", "its columns are img1, img2, distance"), ("img1,img2,label,split\na.png,b.png,1,test", "its columns are img1, img2, label, split"),
    ("img1,img2\na.png,b.png", "line 1: should be"), ("7 a.png b.png 1\n3 a.png b.png 1", "line 1: should be"),
    ("a|b|1", "line 1: .* between tabs, commas, semicolons or spaces"), ("a.png,b.png,1\na.png;b.png;1", "line 1: should be"), ('"' + "x"*200_000 + '",b.png,1', "line 1: field larger"),
    # absolute paths of another machine
    ("a.png,C:\\faces\\b.png,1", "C:/faces/b.png .*: the list was written where the images lay elsewhere"), ("/gone/a.png b.png 1", "elsewhere"),
    # lists of faces, and of templates
    ("p/0.png 0\np/1.png 0\nq/0.png 1\nq/1.png 1", "look like those of subjects"), ("a.png 11\nb.png 11", "up to 11, look like those of subjects"),
    ("a.png 3\nb.png 2", "line 2: the two images of a pair have the numbers 3 and 2"), ("1 11065 1\n1 11066 0", "it names no images: IJB"), ("1,11\n1,12", "it names no images"),
    ("ENROLL_TEMPLATE_ID,VERIF_TEMPLATE_ID\n1,2", "it names no images"), ("1.jpg 1 69544\n2.jpg 1 69544", "line 1: 1.jpg is an image"), ("1,1\n2,1\n", "name the folder Protocol/Split/FP")])
def test_lists_that_do_not_fit(tmp_path, text, says):
    for n in "ab": (tmp_path / f"{n}.png").write_bytes(PNGS[0])
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=f"list.txt: .*{says}.*correct the list"): open_pairs(tmp_path / "list.txt")


def test_other_lists(tmp_path):
    for n in "ab": (tmp_path / f"{n} 1.png").write_bytes(n.encode())
    for suffix, mark in (("csv", ","), ("csv", ", "), ("tsv", "\t"), ("txt", "\t")):
        (tmp_path / f"list.{suffix}").write_bytes(b"\xef\xbb\xbf" + f"a 1.png{mark}b 1.png{mark}1\n".encode())
        assert open_pairs(tmp_path / f"list.{suffix}").encoded() == [b"a", b"b"]
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="bad.txt"): open_pairs(tmp_path / "bad.txt")
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no pairs.txt"): open_pairs(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="could not read .*gone.bin"): open_pairs(tmp_path / "gone.bin")
    with pytest.raises(FileExistsError, match="not empty"): write_pairs_folder(tmp_path, pair_set("x", PNGS, SAME))


def test_a_damaged_image_is_never_passed_over(tmp_path):
    data = PNGS[3][:100]
    p = pair_set("x", [PNGS[0], PNGS[1], data, PNGS[2], PNGS[0], data], [True, False, True])
    with pytest.raises(ValueError, match=r"^x, image 2: .*copy it again, or leave out the pairs that show it, \[1, 2\]: --skip-damaged on the command line, without_damaged\(pairs\) in Python$"): decoded(p)
    assert list(damaged_pairs(p)) == [1, 2] and damaged_pairs(p)[1].startswith("x, image 2: ")
    with pytest.warns(UserWarning, match=r"^x: 2 of 3 pairs are left out, \[1, 2\]: x, image 2: damaged[^;]*$"): left = without_damaged(p)
    assert left.name == "x without 2 pairs" and left.encoded() == PNGS[:2] and left.issame.tolist() == [True]
    assert decoded(left).shape == (2, 3, 16, 16)
    assert without_damaged(left) is left
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="numbered 0 to 2"): p.without([bad])
    with pytest.raises(ValueError, match="x: all 1 pairs are damaged, the first: x, image 1: an empty file"): without_damaged(pair_set("x", [PNGS[0], b""], [True]))


def test_a_damaged_image_of_a_file_is_found_by_the_files_name(tmp_path):
    write_bin(tmp_path / "lfw.bin", [*PNGS[:3], b"cut"], SAME)
    with pytest.raises(ValueError, match=f"^{tmp_path / 'lfw.bin'}, image 3: not one of"): decoded(open_pairs(tmp_path / "lfw.bin"))
    convert_pairs(tmp_path / "lfw.bin", tmp_path / "folder")
    with pytest.raises(ValueError, match=f"^{tmp_path / 'folder' / 'images' / '000003.img'}: not one of"): decoded(open_pairs(tmp_path / "folder"))


@pytest.mark.parametrize("at", [0, 2, 4])                                          # at the first image, within, at the list
def test_a_folder_appears_whole_and_is_begun_anew_after_a_kill(tmp_path, monkeypatch, at):
    write_bin(tmp_path / "a.bin", PNGS, SAME)
    written = []
    def killed(path, data):
        if len(written) == at: raise KeyboardInterrupt
        written.append(path)
        return module_write(path, data)
    module_write = module.write_whole
    monkeypatch.setattr(module, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt): convert_pairs(tmp_path / "a.bin", tmp_path / "folder")
    assert not (tmp_path / "folder").exists() and len(written) == at
    monkeypatch.setattr(module, "write_whole", module_write)
    (tmp_path / ".folder.part" / "images").mkdir(exist_ok=True)
    (tmp_path / ".folder.part" / "images" / "999999.png").write_bytes(b"of another set")
    convert_pairs(tmp_path / "a.bin", tmp_path / "folder")
    assert open_pairs(tmp_path / "folder").encoded() == PNGS
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "folder"] and len(list((tmp_path / "folder" / "images").iterdir())) == 4


def test_nothing_that_is_there_is_overwritten(tmp_path):
    write_bin(tmp_path / "a.bin", PNGS, SAME)
    (tmp_path / "b.bin").write_bytes(b"precious")
    for target in ("a.bin", "b.bin"):
        with pytest.raises(FileExistsError, match=f"{target} is there already: choose another name"): convert_pairs(tmp_path / "a.bin", tmp_path / target)
    assert (tmp_path / "b.bin").read_bytes() == b"precious" and open_pairs(tmp_path / "a.bin").encoded() == PNGS


def test_progress_is_shown_when_asked_for(tmp_path, capsys):
    write_bin(tmp_path / "a.bin", PNGS, SAME)
    convert_pairs(tmp_path / "a.bin", tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    convert_pairs(tmp_path / "a.bin", tmp_path / "loud", progress=True)
    assert "4/4" in capsys.readouterr().err


def test_images_of_any_size_need_one_said(tmp_path):
    small = encode_image(torch.zeros(3, 9, 12, dtype=torch.uint8))
    p = pair_set("x", [PNGS[0], small], [True])
    with pytest.raises(ValueError, match="12 x 9 and 16 x 16 pixels: give one size="): decoded(p)
    assert decoded(p, size=16).shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="12 x 9"): decoded(pair_set("x", [small, small], [True]))
    lazy = PairImages(pair_set("x", PNGS, SAME), threads=2)
    assert len(lazy) == 4 and np.array_equal(lazy[torch.tensor([2, 0, 2])].permute(0, 2, 3, 1).numpy(), PIXELS[[2, 0, 2]])


# ---- what people write

@pytest.mark.parametrize("labels", [[1, -1], [1., -1.], [1., -0.], [True, 0], ["1", "0"], ["+1", "-1"], [b"True", b"False"], ["yes", "no"], ["genuine", "impostor"], ["same", "different"], np.array([1, -1]), np.array([True, False])])
def test_labels_that_mean_yes_and_no(tmp_path, labels):
    p = opened(tmp_path, pickle.dumps((PNGS, labels)))
    assert p.issame.tolist() == [True, False]


LISTS = {"backslashes": ("pairs.txt", "a\\0.png a\\1.png 1\na\\0.png b\\0.png 0\n"), "semicolons": ("pairs.csv", "img1;img2;label\na/0.png;a/1.png;1\na/0.png;b/0.png;0\n"),
         "pandas": ("pairs.csv", ",img1,img2,label\n0,a/0.png,a/1.png,1\n1,a/0.png,b/0.png,0\n"), "pandas, renamed": ("pairs.csv", "Unnamed: 0,path1,path2,same\n0,a/0.png,a/1.png,True\n1,a/0.png,b/0.png,False\n"),
         "pandas, tabs": ("pairs.tsv", "\timg1\timg2\tlabel\n0\ta/0.png\ta/1.png\t1\n1\ta/0.png\tb/0.png\t0\n"),
         "quotes": ("pairs.csv", '"img1","img2","issame"\n"a/0.png","a/1.png","1"\n"a/0.png","b/0.png","0"\n'), "mark and line ends": ("pairs.csv", "\ufeffimg1,img2,label\r\na/0.png,a/1.png,1\r\na/0.png,b/0.png,0\r\n\r\n"),
         "R": ("pairs.csv", '"img1","img2","label"\n"1","a/0.png","a/1.png","1"\n"2","a/0.png","b/0.png","0"\n'), "an index without a header": ("pairs.csv", "0,a/0.png,a/1.png,1\n1,a/0.png,b/0.png,0\n"),
         "pandas, filtered": ("pairs.csv", ",left,right,is_same\n7,a/0.png,a/1.png,1.0\n3,a/0.png,b/0.png,0.0\n"), "label column first": ("pairs.csv", "label,img1,img2\n1,a/0.png,a/1.png\n0,a/0.png,b/0.png\n"),
         "words": ("pairs.csv", "a/0.png;a/1.png;same\na/0.png;b/0.png;different\n"), "words below a header": ("pairs.txt", "one two answer\na/0.png a/1.png same\na/0.png b/0.png different\n"),
         "blank lines": ("pairs.CSV", "# written by hand\na/0.png, a/1.png, yes\n\n,,\na/0.png, b/0.png, no\n , , \n"), "spaces in a .csv": ("pairs.csv", "a/0.png a/1.png +1\na/0.png b/0.png -1\n"),
         "header between tabs": ("pairs.txt", "img1\timg2\tlabel\na/0.png  a/1.png  1\na/0.png  b/0.png  0\n"), "two lines": ("pairs.tsv", "a/0.png\t1\na/1.png\t1\na/0.png\t0\nb/0.png\t0\n"),
         "label first": ("pairs.txt", "1 a/0.png a/1.png\n-1 a/0.png b/0.png\n")}

@pytest.mark.parametrize("form", LISTS)
def test_lists_of_pairs_as_people_write_them(tmp_path, form):
    for name, data in zip(("a/0.png", "a/1.png", "b/0.png"), PNGS):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_bytes(data)
    name, text = LISTS[form]
    (tmp_path/name).write_bytes(text.encode())
    p = open_pairs(tmp_path/name)
    assert p.issame.tolist() == [True, False] and p.encoded() == [PNGS[0], PNGS[1], PNGS[0], PNGS[2]]


@pytest.mark.parametrize("text,name", [
    ('"x,1.png",b.png,1\n', "x,1.png"), ('"y;2.png";b.png;1\n', "y;2.png"), ("y;2.png,b.png,1\n", "y;2.png"), ("x,1.png b.png 1\n", "x,1.png"),
    ("x,1.png\tb.png\t1\n", "x,1.png"), ('"z 3.png" b.png 1\n', "z 3.png"), ("z 3.png,b.png,1\n", "z 3.png"), ("z 3.png;b.png;1\n", "z 3.png")])
def test_marks_in_names(tmp_path, text, name):
    for n in ("x,1.png", "y;2.png", "z 3.png", "b.png"): (tmp_path/n).write_bytes(n.encode())
    (tmp_path/"pairs.txt").write_text(text)
    assert open_pairs(tmp_path/"pairs.txt").encoded() == [name.encode(), b"b.png"]


def test_a_first_pair_is_no_header(tmp_path):
    for n in "abcd": (tmp_path/n).write_bytes(n.encode())
    (tmp_path/"pairs.txt").write_text("a b same\nc d different\n")                   # same is a column's name, too
    assert open_pairs(tmp_path).encoded() == [b"a", b"b", b"c", b"d"]


def test_calfw_in_its_folds(tmp_path):
    "As distributed: 3,000 pairs of one person with their fold, then 3,000 of two with 0. Each fold gets both kinds, in order."
    lines = [f"{kind}{i}{side}.jpg {fold if kind == 's' else 0}" for kind in "sd" for i, fold in enumerate([1, 1, 2, 2, 3, 3]) for side in "ab"]
    for line in lines: (tmp_path/line.split()[0]).write_bytes(line.split()[0].encode())
    (tmp_path/"pairs_CALFW.txt").write_text("\r\n".join(lines) + "\r\n\r\n")
    p = open_pairs(tmp_path/"pairs_CALFW.txt")
    assert [x.decode()[:2] for x in p.encoded()[::2]] == "s0 s1 d0 d1 s2 s3 d2 d3 s4 s5 d4 d5".split() == [x.decode()[:2] for x in p.encoded()[1::2]]
    assert p.issame.tolist() == [True, True, False, False] * 3
    # CPLFW's are 1 and 0, and stay as they come
    (tmp_path/"pairs_CPLFW.txt").write_text("".join(line.split()[0] + f" {int(line[0] == 's')}\n" for line in lines))
    assert open_pairs(tmp_path/"pairs_CPLFW.txt").issame.tolist() == [True] * 6 + [False] * 6


@pytest.mark.parametrize("text", ["A\t1\t2\nA\t1\tB\t1\n", "A 1 A 2\nA 1 B 1\n", "name,imagenum1,imagenum2,\nA,1,2,\nA,1,B,1\n", "enroll,n1,verify,n2\nA,1,A,2\nA,1,B,1\n",
                                  ",name,imagenum1,imagenum2,Unnamed: 3\n0,A,1,2,\n1,A,1,B,1\n"])
def test_names_say_who_is_who_in_lfws_lists(tmp_path, text):
    for name in ("A/A_0001", "A/A_0002", "B/B_0001"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/f"{name}.jpg").write_bytes(name.encode())
    (tmp_path/"pairs.csv").write_text(text)
    p = open_pairs(tmp_path)
    assert p.issame.tolist() == [True, False] and p.encoded() == [b"A/A_0001", b"A/A_0002", b"A/A_0001", b"B/B_0001"]


@pytest.mark.filterwarnings("ignore:cfp_fp. of")
def test_cfp_as_distributed(tmp_path):
    for kind, side in ("F", "frontal"), ("P", "profile"):
        for who in "001", "002":
            (tmp_path/"Data"/"Images"/who/side).mkdir(parents=True)
            (tmp_path/"Data"/"Images"/who/side/"01.jpg").write_bytes(f"{who} {side}".encode())
        (tmp_path/"Protocol").mkdir(exist_ok=True)
        (tmp_path/"Protocol"/f"Pair_list_{kind}.txt").write_bytes(f"1 ..\\Data\\Images\\001\\{side}\\01.jpg\r\n2 ../Data/Images/002/{side}/01.jpg\r\n".encode())
    path = tmp_path/"Protocol"/"Split"/"FP"
    for fold in "01", "02":
        (path/fold).mkdir(parents=True)
        (path/fold/"same.txt").write_text("1,1\n2,2\n")
        (path/fold/"diff.txt").write_text("1,2\n\n2,1\n")
    p = open_pairs(path)
    assert p.issame.tolist() == [True, True, False, False] * 2
    assert p.encoded()[:8] == [b"001 frontal", b"001 profile", b"002 frontal", b"002 profile", b"001 frontal", b"002 profile", b"002 frontal", b"001 profile"]
    for folder in (tmp_path, tmp_path/"Protocol", path.parent, path/"01"):                  # near by
        with pytest.raises(FileNotFoundError, match=f"holds no pairs.txt or pairs.csv: name {path}$"): open_pairs(folder)
    (path/"02"/"diff.txt").write_text("1,9\n")
    with pytest.raises(ValueError, match="diff.txt, line 1: '1,9' should be two numbers of the lists of images"): open_pairs(path)
    for name in ("diff.txt", "same.txt"):                                                   # a fold that was not copied whole
        (path/"02"/name).unlink()
        with pytest.raises(FileNotFoundError, match="could not read .*02/"): open_pairs(path)


@pytest.mark.parametrize("text,says", [
    ("a b 1\nb a 1\nc c 1\n", "of 3 pairs, 1 of one image twice (the first is pair 2, from 0), 1 listed again (the first is pair 1, from 0): data lint says more"),
    ("a b 1\na c 0\nb a 0\nc a 0\na b 0\n", "of 5 pairs, 1 listed again (the first is pair 3, from 0), 2 listed again with the other label (the first is pair 2, from 0)"),
    ("a a 0\n", "of 1 pairs, 1 of one image twice")])
def test_pairs_that_mislead_are_counted(tmp_path, text, says):
    for n in "abc": (tmp_path/n).write_bytes(n.encode())
    (tmp_path/"pairs.txt").write_text(text)
    with pytest.warns(UserWarning) as said: p = open_pairs(tmp_path)
    assert len(said) == 1 and f"{tmp_path.name}: {says}" in str(said[0].message) and len(p) == len(text.splitlines())


def test_what_could_have_been_meant_in_a_folder_is_named(tmp_path):
    for name in ("lfw.bin", "African_pairs.txt", "notes.txt"): (tmp_path/name).write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=f"name {tmp_path / 'African_pairs.txt'} or {tmp_path / 'lfw.bin'}$"): open_pairs(tmp_path)


def test_other_files_in_the_place_of_pairs_are_called_what_they_are(tmp_path):
    np.savez(tmp_path/"a.npz", x=np.zeros(3))
    np.save(tmp_path/"a.npy", np.zeros(3))
    (tmp_path/"a.onnx").write_bytes(b"\x08\x07\x12\x07pytorch\x00")
    (tmp_path/"a.gz").write_bytes(b"\x1f\x8b\x08\x00")
    (tmp_path/"a.jpg").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    for name, kind in {"a.npz": "NumPy arrays", "a.npy": "a NumPy array", "a.onnx": "an ONNX graph", "a.gz": "a packed file", "a.jpg": "an image"}.items():
        with pytest.raises(ValueError, match=f"{name} is {kind}.*, not verification pairs: give a .bin file"): open_pairs(tmp_path/name)
    with open(tmp_path/"huge.rec", "wb") as f:                                               # is not read whole
        f.write(b"\x0a\x23\xd7\xce")
        f.truncate(10**11)
    for name, hint in {"a.gz": "unpack this one first", "a.npy": "by write_bin", "huge.rec": "verify --data"}.items():
        with pytest.raises(ValueError, match=f"{name} is .*; .*{hint}"): open_pairs(tmp_path/name)
    (tmp_path/"mine").write_text("a.png b.png 1\n")
    with pytest.raises(ValueError, match="mine: not a plain pickle.*; the name of a list ends in .txt, .csv or .tsv"): open_pairs(tmp_path/"mine")
