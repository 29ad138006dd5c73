"Lint finds exactly what was planted: hostile images in every kind of set, damaged record files, random sets against plain loops."
import io
import os
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from cemiface.data.convert import convert
from cemiface.data.images import encode_image, write_folder
from cemiface.core.files import write_whole
from cemiface.data.lint import RULES, Report, copies, label_gaps, lint, look, look_all, string_sorted
from cemiface.data.pairs import open_pairs, write_bin
from cemiface.data.recordio import RecordWriter

pytestmark = pytest.mark.filterwarnings("ignore")


def skin(seed, size=32):
    "A reddish picture like no other."
    x = torch.randint(0, 60, (3, size, size), generator=torch.Generator().manual_seed(seed))
    return (x+torch.tensor([150, 110, 80])[:, None, None]).to(torch.uint8)


def saved(im, form, **how):
    out = io.BytesIO()
    im.save(out, form, **how)
    return out.getvalue()


def png_header(width, height):
    chunk = lambda kind, body: struct.pack(">I", len(body))+kind+body+struct.pack(">I", zlib.crc32(kind+body))
    return b"\x89PNG\r\n\x1a\n"+chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))+chunk(b"IDAT", b"")+chunk(b"IEND", b"")


FACE = Image.fromarray(skin(0).permute(1, 2, 0).numpy())
HOSTILE = {"zero": b"", "text": b"<html>404</html>", "cut jpg": encode_image(skin(1), "jpg")[:400], "cut png": encode_image(skin(2))[:-300],
           "bomb": png_header(60000, 60000), "large": png_header(20000, 4000), "dot": saved(FACE.resize((1, 1)), "PNG"),
           "gif": saved(FACE, "GIF", save_all=True, append_images=[FACE.rotate(90)]), "apng": saved(FACE, "PNG", save_all=True, append_images=[FACE.rotate(90)]),
           "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n", "pages": saved(FACE, "TIFF", save_all=True, append_images=[FACE.rotate(90)])}
ODD = {"cmyk": saved(FACE.convert("CMYK"), "JPEG"), "palette": saved(FACE.quantize(64), "PNG"), "alpha": saved(FACE.convert("RGBA"), "PNG"),
       "webp": saved(FACE, "WEBP"), "one frame": saved(FACE, "GIF"), "tiff": saved(FACE, "TIFF"), "ppm": saved(FACE, "PPM")}
GREY = {"16 bit": saved(Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32)*60), "PNG"), "grey": saved(FACE.convert("L"), "JPEG")}
WIDE = saved(FACE.resize((20_000, 40)), "PNG")


def found(source, **how):
    table = lint(source, **how).table
    assert [RULES[r][0] for r in table.rule] == table.severity.tolist()
    return dict(zip(table.rule, table["count"]))


def as_folder(root, subjects):
    for k, images in enumerate(subjects):
        for i, data in enumerate(images): write_whole(root/f"s{k}"/f"{i}.jpg", data)
    return root


def as_list(root, subjects):
    as_folder(root/"images", subjects)
    write_whole(root/"faces.csv", "".join(f"images/s{k}/{i}.jpg,{k}\n" for k, images in enumerate(subjects) for i in range(len(images))).encode())
    return root/"faces.csv"


def as_record(root, subjects):
    with RecordWriter(root/"set", size=32) as w:
        for k, images in enumerate(subjects):
            for data in images: w.add(data, k)
    return root/"set"


def good(subjects=3, each=6):
    return [[encode_image(skin(100*k+i), "jpg") for i in range(each)] for k in range(subjects)]


@pytest.mark.parametrize("form", [as_folder, as_list, as_record])
def test_each_hostile_image_is_counted_and_named_and_nothing_else(tmp_path, form):
    subjects = good()
    assert found(form(tmp_path/"clean", subjects)) == {}
    hostile = {k: v for k, v in HOSTILE.items() if form is not as_record or v}                 # an empty record is no image, see below
    subjects[1] += list(hostile.values())
    subjects[2] += [*ODD.values(), *GREY.values(), WIDE]
    source = form(tmp_path/"spoilt", subjects)
    assert found(source) == {"unreadable": len(hostile), "grey": 2, "very small or large": 1}
    table = lint(source).table.set_index("rule")
    named = (f"record {13+i}" if form is as_record else f"s1/{6+i}.jpg" for i in range(3))
    assert all(f"{name}: " in table.example["unreadable"] for name in named)
    assert "(20000x40)" in table.example["very small or large"]


def test_verification_pairs_with_hostile_images(tmp_path):
    images = [encode_image(skin(i)) for i in range(20)]
    write_bin(tmp_path/"clean.bin", images, [True, False]*5)
    assert found(tmp_path/"clean.bin") == {}
    bad = [*images, HOSTILE["cut jpg"], images[0], HOSTILE["bomb"], GREY["grey"]]
    write_bin(tmp_path/"bad.bin", bad, [True, False]*6)
    assert found(tmp_path/"bad.bin") == {"unreadable": 2, "grey": 1}
    report = lint(tmp_path/"bad.bin")
    example = report.table.set_index("rule").example
    assert report.status() == 1 and f"{tmp_path/'bad.bin'}, image 20: damaged" in example["unreadable"] and example["grey"] == f"{tmp_path/'bad.bin'}, image 23"


@pytest.mark.parametrize("same, rules", [([True]*10, {"one kind": 1}), ([False]*12, {"one kind": 1}), ([True]*9, {"one kind": 1, "few pairs": 1}),
                                         ([True, False]*4+[True], {"few pairs": 1, "uneven kinds": 1}), ([True]*9+[False], {"uneven kinds": 1})])
def test_pairs_on_which_nothing_can_be_measured(tmp_path, same, rules):
    write_bin(tmp_path/"x.bin", [encode_image(skin(i)) for i in range(2*len(same))], same)
    assert found(tmp_path/"x.bin") == rules
    assert lint(tmp_path/"x.bin").ok == (rules == {"uneven kinds": 1})


def test_folds_of_one_kind(tmp_path):
    images = [encode_image(skin(i)) for i in range(240)]
    for name, same, folds in (("in blocks", [True]*60+[False]*60, 10), ("in turn", [True, False]*60, 0), ("one tenth", [True]*12+[True, False]*54, 1)):
        write_bin(tmp_path/f"{name}.bin", images, same)
        assert found(tmp_path/f"{name}.bin").get("folds of one kind", 0) == folds
        with warnings.catch_warnings(record=True) as said: warnings.simplefilter("always"), open_pairs(tmp_path/f"{name}.bin")
        assert [f"{name}: {folds} of the ten folds hold one kind" in str(w.message) for w in said] == [True]*bool(folds)


def test_a_damaged_record_file(tmp_path):
    source = as_record(tmp_path, good())
    data = (source/"train.rec").read_bytes()
    offsets = [int(line.split("\t")[1]) for line in (source/"train.idx").read_text().splitlines()]
    broken = bytearray(data)
    broken[offsets[5]+8+24:offsets[5]+8+24+40] = bytes(40)                                     # the head of an image
    broken[offsets[9]:offsets[9]+4] = b"\1\2\3\4"                                              # the start of a record
    (source/"train.rec").write_bytes(broken)
    (source/"train.idx").write_text("".join(f"{i}\t{at}\n" for i, at in enumerate(offsets)))
    report = lint(source)
    assert dict(zip(report.table.rule, report.table["count"])) == {"left out": 1, "unreadable": 1}
    assert "record 5" in report.table.set_index("rule").example["unreadable"] and "record 9" in report.table.set_index("rule").example["left out"]


def test_a_file_that_vanishes_is_counted(tmp_path):
    source = as_list(tmp_path, good())
    (tmp_path/"images"/"s1"/"2.jpg").unlink()
    assert found(source) == {"unreadable": 1}


def test_a_set_of_nothing_but_damaged_images(tmp_path):
    assert found(as_folder(tmp_path, [[b"", b"x"], [b"y", b"z"]])) == {"unreadable": 4, "empty subject": 2}


def test_pictures_that_no_walk_sees_are_rules(tmp_path):
    "`set/A/1.jpg`, `set/B/session1/1.jpg`, `set/C/1.heic`: one subject, and two that are missed."
    write_whole(tmp_path/"A"/"1.jpg", encode_image(skin(1), "jpg")); write_whole(tmp_path/"B"/"session1"/"1.jpg", encode_image(skin(2), "jpg"))
    write_whole(tmp_path/"C"/"1.heic", b"x"); write_whole(tmp_path/"D"/"1.tif", saved(FACE, "TIFF")); (tmp_path/"A"/"2.jpg").symlink_to("gone")
    report = lint(tmp_path)
    assert report.size == "2 images of 2 subjects" and report.status() == 0 and report.status(strict=True) == 1
    assert dict(zip(report.table.rule, report.table["count"])) == {"empty subject": 2, "deeper picture": 1, "unread picture": 1, "dead link": 1, "one image": 2}
    assert lint(tmp_path, depth=1).size == "3 images of 3 subjects"


def test_a_list_with_columns_of_its_own(tmp_path):
    subjects = good()
    as_folder(tmp_path/"1999-01-01", subjects)
    write_whole(tmp_path/"faces.csv", ("img,who\n"+"".join(f"1999-01-01/s{k}/{i}.jpg,{k}\n" for k, images in enumerate(subjects) for i in range(len(images)))).encode())
    with pytest.raises(ValueError, match="img, who"): lint(tmp_path/"faces.csv")
    assert found(tmp_path/"faces.csv", path_column="img", label_column="who") == {}
    with pytest.raises(ValueError, match="depth is for nested folders"): lint(tmp_path/"faces.csv", path_column="img", label_column="who", depth=2)


# -- labels --

def test_lists_with_gaps_and_labels_in_the_order_of_text(tmp_path):
    as_folder(tmp_path, good(12, 2))
    names = sorted(f"s{k}" for k in range(12))                                                 # s0 s1 s10 s11 s2 ...
    rows = lambda label: "".join(f"{n}/{i}.jpg,{label(n)}\n" for n in names for i in range(2)).encode()
    write_whole(tmp_path/"text.csv", rows(names.index))
    write_whole(tmp_path/"natural.csv", rows(lambda n: int(n[1:])))
    write_whole(tmp_path/"gaps.csv", rows(lambda n: int(n[1:])*2))
    write_whole(tmp_path/"padded.csv", rows(lambda n: f"{int(n[1:])*1000+1:07}"))              # names of subjects, not numbers of classes
    write_whole(tmp_path/"far.csv", rows(lambda n: int(n[1:])*1000+100))
    assert found(tmp_path/"text.csv") == {"string-sorted": 10}
    assert found(tmp_path/"gaps.csv") == {"label gaps": 11}
    assert [found(tmp_path/f"{name}.csv") for name in ("natural", "padded", "far")] == [{}]*3


def test_subjects_named_like_numbers_in_a_folder_are_no_fault(tmp_path):
    for k in (1, 2, 10, 33):
        for i in range(2): write_whole(tmp_path/str(k)/f"{i}.jpg", encode_image(skin(10*k+i)))
    assert found(tmp_path) == {}


def test_one_label_throughout(tmp_path):
    assert found(as_folder(tmp_path/"folder", good(1))) == {"constant label": 1}
    assert found(as_record(tmp_path/"record", good(1))) == {"constant label": 1}
    assert found(as_folder(tmp_path/"single", [[encode_image(skin(0))]])) == {"one image": 1}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=30))
def test_gaps_equal_a_plain_loop(labels):
    count, examples = label_gaps(np.array(labels))
    missing = [k for k in range(max(labels)) if k not in labels]
    assert count == len(missing) and bool(examples) == bool(missing)
    if missing: assert examples[0].split()[1] == str(missing[0])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 3)), max_size=30))
def test_copies_equal_a_plain_loop(rows):
    digest, label = np.array([d for d, _ in rows], np.uint64), np.array([k for _, k in rows], np.int64)
    within, across, original = copies(digest, label)
    expect = ([], [])
    for i, (d, k) in enumerate(rows):
        before = [kk for dd, kk in rows[:i] if dd == d]
        if before: expect[k not in before].append(i)
    assert (within.tolist(), across.tolist()) == expect
    assert all(original(i) == digest.tolist().index(digest[i]) for i in [*within, *across])


@settings(max_examples=40, deadline=None)
@given(st.sets(st.integers(0, 200), min_size=1, max_size=20))
def test_numbers_in_natural_order_are_never_reported(numbers):
    names = [str(k) for k in sorted(numbers)]
    assert string_sorted(names) == (0, [])
    text = sorted(names)
    assert (string_sorted(text)[0] > 0) == (text != names)


# -- images --

def test_swapped_channels_need_a_majority_of_coloured_images(tmp_path):
    bgr = [encode_image(skin(k).flip(0)) for k in range(20)]
    rgb = [encode_image(skin(k)) for k in range(20, 40)]
    grey = [saved(Image.fromarray(skin(k)[0].numpy()), "PNG") for k in range(40, 70)]
    assert found(as_folder(tmp_path/"half", [bgr[:10], rgb[:10]])) == {}
    assert found(as_folder(tmp_path/"more", [bgr[:11], rgb[:10]])) == {"swapped channels": 11}
    assert found(as_folder(tmp_path/"grey", [bgr[:3]+grey, rgb[:2]])) == {"swapped channels": 3, "grey": 30}


def test_the_size_that_is_asked_for(tmp_path):
    subjects = [[encode_image(skin(10*s+k, size)) for k, size in enumerate(sizes)] for s, sizes in enumerate([[32]*3, [32, 40, 15, 32, 300]])]
    source = as_folder(tmp_path, subjects)
    assert found(source) == {"wrong size": 1, "very small or large": 2}
    assert found(source, size=40) == {"wrong size": 6, "very small or large": 1}
    assert found(source, size=32) == found(source)
    assert found(source, size=112) == {"wrong size": 1, "very small or large": 7}


def test_the_exit_status():
    import pandas as pd
    columns = ["rule", "severity", "count", "example", "remedy"]
    report = lambda *severities: Report("x", "", pd.DataFrame([["r", s, 1, "", ""] for s in severities], columns=columns))
    assert [(report(*s).ok, report(*s).status(), report(*s).status(strict=True)) for s in ((), ("warning",), ("warning", "error"))] == \
        [(True, 0, 0), (True, 0, 1), (False, 1, 1)]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 3))
def test_any_bytes_are_looked_at_without_a_crash(data, start):
    head = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a"][start]
    digest, h, w, *_, why = look(head+data, "file")
    assert (h == 0) == (w == 0) == bool(why) and (not why or "file: " in why)


def test_many_large_images_are_decoded_one_at_a_time():
    code = """if True:
        import io, resource
        from PIL import Image
        from cemiface.data import lint
        lint.os.cpu_count = lambda: 8
        out = io.BytesIO(); Image.new("RGB", (4000, 3000), (200, 100, 50)).save(out, "PNG", compress_level=1)
        data, before = out.getvalue(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seen, wrong = lint.look_all(lambda i: data, str, 8)
        assert (seen["h"] == 3000).all() and not wrong
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024)"""
    grown = int(subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 400                                                                         # MB; one image has 36, and is copied a few times


def test_what_is_kept_of_an_image_does_not_grow_with_it():
    data = encode_image(skin(0, 64))
    seen, wrong = look_all(lambda i: data, str, 2100)
    assert seen.nbytes == 21*2100 and not wrong and (seen["digest"] == seen["digest"][0]).all()


def test_names_of_one_person_twice_and_names_that_are_no_text(tmp_path):
    names = ["Jos\u00e9", "Jose\u0301", "Maria", "MARIA", "Maria ", "Stra\u00dfe", "STRASSE", os.fsdecode(b"Andr\xe9")]
    write_folder(tmp_path/"set", torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8), torch.arange(16)//2, subjects=names)
    (tmp_path/"set"/"Maria"/"0.png").rename(tmp_path/"set"/"Maria"/os.fsdecode(b"\xe9.png"))
    found = lint(tmp_path/"set").table.set_index("rule")
    assert found["count"][["one name", "upper and lower case", "no text"]].tolist() == [2, 2, 2] and found.severity["one name"] == "error"
    assert found.example["no text"] == r"Andr\xe9; \xe9.png" and r"'Jose\u0301' and 'Jos\xe9'" in found.example["one name"]
    convert(tmp_path/"set", tmp_path/"rec")
    found = lint(tmp_path/"rec").table.set_index("rule")
    assert found["count"][["one name", "upper and lower case", "no text"]].tolist() == [2, 2, 1]      # the subjects' names alone


def named(root, *names):
    for k, name in enumerate(names): write_whole(root/name/"0.png", encode_image(skin(k)))
    return root


def test_numbers_with_zeros_before_them(tmp_path):
    table = lint(named(tmp_path, "1", "01", "2", "0x2", "10")).table.set_index("rule").loc["leading zeros"]
    assert table["count"] == 1 and table.severity == "warning" and "'01' and '1'" in table.example


def test_what_macos_packs_beside_a_set_is_no_subject(tmp_path):
    named(tmp_path, "ann", "bo")
    write_whole(tmp_path/"__MACOSX"/"ann"/"._0.png", b"fork")
    assert lint(tmp_path).size == "2 images of 2 subjects" and found(tmp_path) == {"one image": 2}


def test_a_file_that_cannot_be_read_is_named_without_a_number(tmp_path):
    _, wrong = look_all(lambda i: (tmp_path/"gone.png").read_bytes() if i else encode_image(skin(0)), str, 2)
    assert wrong == {1: "No such file or directory"}
