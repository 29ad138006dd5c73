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
    (PNGS, "not one of"), ((PNGS, SAME, SAME), "not one of"), ((PNGS[:3], SAME), "3 images and 2 labels"), (([], []), "at least one pair"),
    (([*PNGS[:3], None], SAME), r"image 3 \(pair 1\) is NoneType"), (([*PNGS[:3], "text"], SAME), "is str"),
    (([*PNGS[:3], np.zeros((8, 8), np.uint8)], SAME), r"image 3 \(pair 1\) is an array uint8 \[8, 8\]"), (([*PNGS[:3], np.zeros((8, 8, 3), np.int64)], SAME), "is an array int64"),
    (([*PNGS[:3], np.zeros((8, 8, 3))], SAME), r"image 3 \(pair 1\) is an array float64"), (([*PNGS[:3], np.zeros(3, complex)], SAME), "array of c16"),
    ((PNGS, [1., .7]), "label of pair 1"), ((PNGS, np.array([float("nan"), 1.])), "label of pair 0"), ((PNGS, [True, 2]), "label of pair 1"), ((PNGS, [True, b"1"]), "label of pair 1"), ((PNGS, np.array([[1, 0, 1]])), "4 images and 3 labels")])
def test_other_pickles(tmp_path, content, says):
    with pytest.raises(ValueError, match=says): opened(tmp_path, pickle.dumps(content))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.lists(st.sampled_from([*PNGS, b"\xff\xd8jpeg", b"RIFF", b"?", b""]), min_size=2 * n, max_size=2 * n), st.lists(st.booleans(), min_size=n, max_size=n))))
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
    ("", "0 images and 0 labels"), ("2 2\nA 1 1\n", "promises 2 folds of 2 x 2 pairs, but 1 follow"), ("a.png b.png\n", "line 1: should be IMAGE IMAGE 0|1"), ("a.png b.png perhaps", "line 1"),
    ("\n\na.png b.png 2", "line 3"), ("1\nA 1", "line 2: should be NAME"), ("1\nA one two", "line 2"), ("a.png c.png 1", r"1 images are missing, the first is .*c.png \(pair 0\)"),
    ("a.png a\0.png 1", "missing"), ("A\t1\tB\t1", "2 images are missing")])
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
