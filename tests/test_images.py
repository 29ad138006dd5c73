"Hostile files, full and read-only folders, and the order of subjects."
import io
import os
import resource
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from cemiface.data import images as image_files
from cemiface.data.images import FORMATS, decode_image, encode_image, list_folder, list_loose, natural_key, read_image, write_folder
from cemiface.core.files import write_whole


def noise(size=32, seed=0):
    return torch.randint(0, 256, (3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def saved(im, fmt, **how):
    out = io.BytesIO()
    im.save(out, fmt, **how)
    return out.getvalue()


def pil(x):
    return Image.fromarray(x.permute(1, 2, 0).numpy())


# -- one image --

@settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.integers(0, 99))
def test_png_keeps_every_byte(h, w, seed):
    x = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(decode_image(encode_image(x)), x)


@pytest.mark.parametrize("fmt", ["png", "jpg"])
def test_every_truncation_is_one_valueerror_naming_the_file(tmp_path, fmt):
    whole = encode_image(noise(), fmt)
    tail = 2 if fmt == "jpg" else 12       # end marker or chunk: all pixels are there before it
    for cut in [*range(0, 40), *range(40, len(whole)-tail, max(1, len(whole)//60))]:
        path = tmp_path/f"f{cut}.{fmt}"
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"f{cut}.{fmt}: .*remove it"):
            read_image(path, 32)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\x20\0\0\0WEBPVP8 ", b"BM", b"GIF89a"]))
def test_junk_never_raises_anything_but_valueerror(data, magic):
    try:
        assert decode_image(magic+data, "junk", 16).shape == (3, 16, 16)
    except ValueError as e:
        assert str(e).startswith("junk: ")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.sampled_from(["png", "jpg"]))
def test_one_flipped_byte_is_an_image_or_a_valueerror(at, value, fmt):
    data = bytearray(encode_image(noise(), fmt))
    data[at % len(data)] = value
    try:
        assert decode_image(bytes(data), "flipped", 32).shape == (3, 32, 32)
    except ValueError as e:
        assert str(e).startswith("flipped: ")


def bomb(w, h):
    def chunk(kind, body):
        return struct.pack(">I", len(body))+kind+body+struct.pack(">I", zlib.crc32(kind+body))
    rows = zlib.compress(b"\0"*10**6)      # a real start of pixel data
    return b"\x89PNG\r\n\x1a\n"+chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))+chunk(b"IDAT", rows)+chunk(b"IEND", b"")


@pytest.mark.parametrize("w,h", [(60000, 60000), (10000, 9000), (8001, 8000), (2**31-1, 1), (64_000_001, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_huge_header_is_refused_before_decoding(w, h):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="bomb.png: .*pixels.*remove it"):
        decode_image(bomb(w, h), "bomb.png")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before < 100_000   # KiB: nothing was allocated


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_huge_header_is_a_valueerror_even_where_warnings_are_errors():
    with pytest.raises(ValueError, match="promises more"):
        decode_image(bomb(10000, 9000), "bomb.png")


def test_size_limits_are_exact(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 10*10)
    assert decode_image(encode_image(noise(10))).shape == (3, 10, 10)
    with pytest.raises(ValueError, match="11x11 pixels are more than 100"):
        decode_image(encode_image(noise(11)))
    with pytest.raises(ValueError, match="7x7 pixels are too few"):
        decode_image(encode_image(noise(7)))
    with pytest.raises(ValueError, match="1x1"):
        decode_image(encode_image(noise(1)))
    assert decode_image(encode_image(noise(8))).shape == (3, 8, 8)


@pytest.mark.parametrize("fmt", ["PNG", "WEBP", "GIF"])
def test_an_animation_is_refused_whatever_its_suffix(tmp_path, fmt):
    frames = [pil(noise(seed=s)) for s in (1, 2, 3)]
    path = write_whole(tmp_path/"moving.png", saved(frames[0], fmt, save_all=True, append_images=frames[1:]))
    with pytest.raises(ValueError, match="moving.png: an animation of 3 frames: save one"):
        read_image(path)


def test_a_phone_picture_with_previews_is_a_still():
    frames = [pil(noise(seed=s)) for s in (1, 2)]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert torch.equal(decode_image(data), torch.from_numpy(np.array(Image.open(io.BytesIO(data)))).permute(2, 0, 1))


@pytest.mark.parametrize("fmt", ["ICO", "EPS", "TGA", "PCX"])
def test_other_formats_are_not_even_tried(fmt):
    data = saved(pil(noise()), fmt)
    with pytest.raises(ValueError, match="not one of JPEG, PNG"):
        decode_image(data, "odd.jpg")


@pytest.mark.parametrize("fmt", ["TIFF", "PPM", "BMP", "GIF", "AVIF"])
def test_less_usual_formats_are_read_as_pillow_reads_them(tmp_path, fmt):
    if fmt not in FORMATS: pytest.skip(f"this Pillow reads no {fmt}")
    suffix = {"TIFF": ".tif", "AVIF": ".avif", "GIF": ".gif", "PPM": ".ppm", "BMP": ".bmp"}[fmt]
    data = saved(pil(noise()), fmt)
    path = write_whole(tmp_path/"a"/f"0{suffix}", data)
    assert list_folder(tmp_path)[0] == [path]
    assert torch.equal(read_image(path), torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1))


def test_pixels_without_a_range_and_pages_are_refused():
    with pytest.raises(ValueError, match="x.tif: its pixels are floating-point numbers"): decode_image(saved(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"), "x.tif")
    with pytest.raises(ValueError, match="x.tif: a document of 2 pages: save one"): decode_image(saved(pil(noise()), "TIFF", save_all=True, append_images=[pil(noise(seed=1))]), "x.tif")


# -- modes --

def test_16_bit_grey_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    got = decode_image(saved(Image.fromarray(values), "PNG"))
    assert np.array_equal(got[0].numpy(), np.array([[int(v/257+.5) for v in row] for row in values]))
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])


def test_cmyk_is_rgb():
    data = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)    # no cyan: red
    r, g, b = decode_image(data).float().mean((1, 2)).tolist()
    assert r > 200 and g < 60 and b < 60


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_agrees_with_its_pixels(mode):
    im = pil(noise(16)).convert("L" if mode in ("1", "LA") else "RGB").convert(mode)
    opaque = im.convert("RGB")
    assert torch.equal(decode_image(saved(im, "PNG")), torch.from_numpy(np.array(opaque)).permute(2, 0, 1))


def test_transparency_is_black_in_rgba_and_in_a_palette():
    im = Image.new("P", (8, 8), 0)
    im.putpalette([10, 20, 30, 200, 100, 50])
    im.putpixel((3, 2), 1)
    got = decode_image(saved(im, "PNG", transparency=0))
    assert got[:, 2, 3].tolist() == [200, 100, 50] and got.sum() == 350
    half = Image.new("RGBA", (8, 8), (200, 100, 50, 51))                               # a fifth opaque
    assert decode_image(saved(half, "PNG"))[:, 0, 0].tolist() == [40, 20, 10]


@pytest.mark.parametrize("turn", range(1, 9))
def test_orientation_mark_is_obeyed(turn):
    undo = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270}
    x, exif = pil(noise(16)), Image.Exif()
    exif[0x0112] = turn
    stored = x.transpose(undo[turn]) if turn > 1 else x
    assert torch.equal(decode_image(saved(stored, "PNG", exif=exif)), torch.from_numpy(np.array(x)).permute(2, 0, 1))


def test_resizing_takes_the_central_square_and_a_constant_stays_constant():
    x = torch.zeros(3, 16, 48, dtype=torch.uint8)
    x[:, :, 16:32] = 90
    assert (decode_image(encode_image(x), size=8) == 90).all()
    assert (decode_image(encode_image(x[:, :, 16:32]), size=40) == 90).all()


def test_encode_refuses_what_is_no_image():
    for bad in (noise().float(), noise()[0], noise()[None], torch.zeros(4, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="to_uint8"):
            encode_image(bad)
    with pytest.raises(ValueError, match="'tiff'"):
        encode_image(noise(), "tiff")


def test_a_missing_or_unreadable_file_is_an_oserror_naming_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="could not read .*gone.jpg"):
        read_image(tmp_path/"gone.jpg")
    with pytest.raises(OSError, match="could not read "):
        read_image(tmp_path)


# -- writing --

def test_write_replaces_whole_and_leaves_nothing_beside(tmp_path):
    path = write_whole(tmp_path/"a"/"b"/"f.bin", b"one")
    write_whole(path, b"two, longer")
    assert path.read_bytes() == b"two, longer" and [p.name for p in path.parent.iterdir()] == ["f.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_one_clear_error(tmp_path, monkeypatch, step):
    path = write_whole(tmp_path/"f.bin", b"old")
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match=r"could not write .*f\.bin \(No space left on device\): free some space") as e:
        write_whole(path, b"new")
    assert e.value.errno == 28
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["f.bin"]


def test_a_real_size_limit(tmp_path):
    "The operating system itself refuses the bytes: a file-size limit in a process of its own."
    code = ("import resource, sys; from cemiface.core.files import write_whole\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "try: write_whole(sys.argv[1], bytes(5000))\n"
            "except OSError as e: print(e)")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"f.bin")], capture_output=True, text=True, timeout=120)
    assert "could not write" in done.stdout and "f.bin" in done.stdout and not list(tmp_path.iterdir()), done.stderr


def test_a_read_only_folder(tmp_path):
    (tmp_path/"locked").mkdir()
    (tmp_path/"locked").chmod(0o500)
    target = tmp_path/"locked"/"set"
    if os.geteuid() == 0:                  # permissions do not stop root; a file in the way does
        target = write_whole(tmp_path/"file", b"")/"set"
    with pytest.raises(OSError, match="could not write .*choose a folder you can write to"):
        write_folder(target, noise()[None], torch.tensor([0]))


def test_kill_in_the_middle_of_writing(tmp_path):
    "A process killed before the rename leaves the old file and a neighbour that no listing takes for an image."
    write_whole(tmp_path/"s"/"0.png", encode_image(noise()))
    code = ("import os, signal, sys; from cemiface.core import files\n"
            "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
            "files.write_whole(sys.argv[1], b'half')")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path/"s"/"0.png")], timeout=120)
    assert done.returncode == -9
    paths, *_ = list_folder(tmp_path)
    assert [p.name for p in paths] == ["0.png"] and torch.equal(read_image(paths[0]), noise())


# -- folders --

def test_natural_order_of_subjects_and_images(tmp_path):
    images = torch.stack([noise(8, s) for s in range(24)])
    labels = torch.arange(2).repeat_interleave(12)
    paths, got, subjects, _ = list_folder(write_folder(tmp_path/"a", images, labels))
    assert [p.name for p in paths[:12]] == [f"{k}.png" for k in range(12)] and torch.equal(got, labels)
    assert torch.equal(torch.stack([read_image(p) for p in paths]), images)
    _, _, subjects, _ = list_folder(write_folder(tmp_path/"b", images, torch.arange(24)))
    assert subjects == [str(i) for i in range(24)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 10**20), unique=True), st.text(max_size=5))
def test_numbers_sort_as_numbers_behind_any_prefix(numbers, prefix):
    prefix += "x"
    assert sorted([f"{prefix}{n}" for n in numbers], key=natural_key) == [f"{prefix}{n}" for n in sorted(numbers)]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(), unique=True), st.randoms())
def test_natural_order_is_total(names, random):
    shuffled = random.sample(names, len(names))
    assert sorted(names, key=natural_key) == sorted(shuffled, key=natural_key)


def test_what_is_no_image_is_ignored(tmp_path):
    root = write_folder(tmp_path/"set", torch.stack([noise(8)]*3), torch.tensor([0, 0, 1]))
    for name in ("0/notes.txt", "0/.DS_Store", "0/._0.png", "0/Thumbs.db", "README.md", "LICENSE", ".git/0.png", "2/only.txt", "0/deeper/0.png"):
        write_whole(root/name, b"x")
    (root/"0"/"folder.png").mkdir()
    write_whole(root/"1"/"UPPER.JPG", encode_image(noise(8), "jpg"))
    paths, labels, subjects, left = list_folder(root)
    assert [str(p.relative_to(root)) for p in paths] == ["0/0.png", "0/1.png", "1/0.png", "1/UPPER.JPG"]
    assert labels.tolist() == [0, 0, 1, 1] and labels.dtype == torch.int64 and subjects == ["0", "1"]
    assert {kind: [line.split(":")[0] for line in lines] for kind, lines in left.items()} == {"empty subject": [f"{root}/2"], "deeper picture": [f"{root}/0/deeper/0.png"]}


def walked(root, depth=None):
    "What is found, and what is left out by kind, both below `root`."
    paths, labels, subjects, left = list_folder(root, depth)
    return ({str(p.relative_to(root)): subjects[k] for p, k in zip(paths, labels.tolist())},
            {kind: [line.removeprefix(f"{root}/").split(":")[0] for line in lines] for kind, lines in left.items()})


def test_every_picture_is_found_or_named(tmp_path):
    "Random trees: each picture is an image of the set, or stands in a line of its own."
    rng = np.random.default_rng(0)
    for trial in range(20):
        root, made = tmp_path/str(trial), []
        for k in range(12):
            folders = [str(n) for n in rng.integers(0, 3, rng.integers(0, 4))]
            made.append("/".join([*folders, f"p{k}{rng.choice(['.jpg', '.TIF', '.heic', '.jfif', '', '.jpg_large'])}"]))
            write_whole(root/made[-1], b"x")
        write_whole(root/"0"/"sure.jpg", b"x")
        write_whole(root/"1"/"sure.jpg", b"x")
        for depth in (None, 1):
            found, left = walked(root, depth)
            left.pop("empty subject", None)
            named = [name for names in left.values() for name in names]
            expected = {*made, "0/sure.jpg", "1/sure.jpg"}
            assert len(named) == len(set(named)) and set(found) | set(named) == expected and not set(found) & set(named)
            assert all(name.split("/")[0] == subject for name, subject in found.items())
            assert depth is None or "deeper picture" not in left


def test_subjects_without_images_and_links_are_named(tmp_path):
    root = write_folder(tmp_path/"set", torch.stack([noise(8)]*2), torch.tensor([0, 1]))
    write_whole(root/"B"/"session1"/"1.jpg", b"x"); write_whole(root/"C"/"1.heic", b"x"); (root/"D").mkdir()
    (root/"0"/"1.jpg").symlink_to("gone.jpg"); (root/"E").symlink_to("gone"); (root/"0"/"loop").symlink_to(root); (root/"0"/"self.jpg").symlink_to("self.jpg")
    (tmp_path/"far").mkdir(); write_whole(tmp_path/"far"/"0.png", b"x"); (root/"F").symlink_to(tmp_path/"far"); (root/"1"/"linked.png").symlink_to(tmp_path/"far"/"0.png")
    found, left = walked(root)
    assert found == {"0/0.png": "0", "1/0.png": "1", "1/linked.png": "1", "F/0.png": "F"}          # links that lead somewhere are followed
    assert left == {"empty subject": ["B", "C", "D"], "deeper picture": ["B/session1/1.jpg"], "unread picture": ["C/1.heic"], "dead link": ["E", "0/1.jpg", "0/self.jpg", "0/loop"]}
    found, left = walked(root, 1)
    assert found["B/session1/1.jpg"] == "B" and left["empty subject"] == ["C", "D"]


def test_nested_folders(tmp_path):
    root = tmp_path/"nested"
    for k in range(12): write_whole(root/f"{k//6}"/f"{k//6}_{k//3}"/f"{k}"/"x.jpg", b"x")
    with pytest.raises(ValueError, match="12 images lie deeper .* first is 0/0_0/0/x.jpg.*--depth N.* 1 for 0, 2 for 0_0, 3 for 0;"): list_folder(root)
    for depth, subjects in ((1, ["0", "1"]), (2, ["0_0", "0_1", "1_2", "1_3"]), (3, [str(k) for k in range(12)])):
        paths, labels, got, left = list_folder(root, depth)
        assert got == subjects and len(paths) == 12 and left == {}
        assert [p.relative_to(root).parts[depth-1] for p in paths] == [got[k] for k in labels]
    with pytest.raises(ValueError, match="12 images but no folders of subjects at depth 4"): list_folder(root, 4)
    with pytest.raises(ValueError, match="at least 1"): list_folder(root, 0)
    write_whole(root/"1"/"1_3"/"0"/"x.jpg", b"x")
    with pytest.raises(ValueError, match="are both called 0: rename"): list_folder(root, 3)


def test_a_folder_that_stands_alone_is_passed_through(tmp_path):
    write_folder(tmp_path/"a", torch.stack([noise(8)]*2), torch.tensor([0, 1]))
    for top in (tmp_path, tmp_path/"a"):
        if top == tmp_path:
            with pytest.warns(UserWarning, match="a stands alone"): got = list_folder(top)
        else: got = list_folder(top)
        assert got[2] == ["0", "1"] and got[3] == {}
    (tmp_path/"b").mkdir(); (tmp_path/"b"/"only").symlink_to(tmp_path/"b")                        # a circle
    with pytest.raises(ValueError, match="no images"): list_folder(tmp_path/"b")


def test_what_the_package_puts_beside_subjects_is_no_loose_picture(tmp_path):
    root = write_folder(tmp_path/"set", torch.stack([noise(8)]*2), torch.tensor([0, 1]))
    for name in ("sheet.png", "contact_sheet.png", "parts/0/0.png"): write_whole(root/name, b"x")
    assert walked(root) == ({"0/0.png": "0", "1/0.png": "1"}, {}) and list_loose(root) == ([], [])
    write_whole(root/"loose.png", b"x")
    assert walked(root)[1] == {"loose picture": ["loose.png"]}
    with pytest.raises(ValueError, match="1 images lie beside 2 folders, the first are loose.png and 0: which"): list_loose(root)
    write_whole(tmp_path/"flat"/"a.png", b"x"); write_whole(tmp_path/"flat"/"b.heic", b"x")
    assert list_loose(tmp_path/"flat") == ([tmp_path/"flat"/"a.png"], [f"{tmp_path}/flat/b.heic: .heic is not read here: save it as .png or .jpg"])


def test_clear_errors_for_what_is_no_set(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*none"): list_folder(tmp_path/"none")
    with pytest.raises(ValueError, match="no images; images belong in .*SUBJECT"): list_folder(tmp_path)
    flat = write_whole(tmp_path/"flat"/"0.png", encode_image(noise(8)))
    with pytest.raises(ValueError, match="1 images but no folders of subjects"): list_folder(tmp_path/"flat")
    with pytest.raises(NotADirectoryError, match="is a file"): list_folder(flat)


def test_write_folder_refuses_to_mix_or_to_escape(tmp_path):
    one, label = noise(8)[None], torch.tensor([0])
    write_folder(tmp_path/"set", one, label)
    with pytest.raises(FileExistsError, match="not empty"): write_folder(tmp_path/"set", one, label)
    with pytest.raises(ValueError, match="2 labels"): write_folder(tmp_path/"new", one, torch.tensor([0, 1]))
    for name in ("..", ".", "", "a/b", "/etc", ".hidden"):
        with pytest.raises(ValueError, match="folder's name"): write_folder(tmp_path/"new", one, label, subjects=[name])
    with pytest.raises(ValueError, match="same name"): write_folder(tmp_path/"new", one, label, subjects=["a", "a"])
    assert not (tmp_path/"new").exists()
