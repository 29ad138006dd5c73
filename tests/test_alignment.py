"Alignment against independent arithmetic, hostile landmark files, kill and resume, and OpenCV's own detector code."
import os
import signal
import subprocess
import sys
import time
from threading import Lock

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from cemiface.data import alignment
from cemiface.data.alignment import align_face, align_folder, arcface_template, largest, read_landmarks, similarity_transform, yunet_detector
from cemiface.data.images import encode_image
from cemiface.core.files import write_whole

TEMPLATE = arcface_template()


def smooth(size, seed=0):
    "A picture without fine detail, uint8 [3,size,size]."
    coarse = torch.rand(1, 3, 9, 9, generator=torch.Generator().manual_seed(seed))*255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)[0].clamp(0, 255).round().to(torch.uint8)


def moved(scale, angle, x, y):
    "The template's points, scaled, turned and shifted."
    turn = torch.tensor([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return scale*TEMPLATE @ turn+torch.tensor([x, y], dtype=torch.float64)


def photos(root, n=6):
    "A folder of photos and a CSV of their landmarks."
    lines = []
    for i in range(n):
        name, points = f"s{i%2}/{i}.png", moved(1+.1*i, .2*i-.5, 40, 60+5*i)
        write_whole(root/"photos"/name, encode_image(smooth(260, i)))
        lines.append(",".join([name, *map(repr, points.flatten().tolist())]))
    write_whole(root/"points.csv", "\n".join(lines).encode())
    return root/"photos", root/"points.csv"


# -- the transform --

@settings(max_examples=60, deadline=None)
@given(st.floats(.01, 100), st.floats(-7, 7), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.integers(0, 10**6))
def test_no_similarity_fits_better(scale, angle, x, y, seed):
    g = torch.Generator().manual_seed(seed)
    points = moved(scale, angle, x, y)+scale*4*torch.randn(5, 2, generator=g, dtype=torch.float64)
    M = similarity_transform(points, TEMPLATE)
    assert abs(M[0, 0]-M[1, 1]) < 1e-12 and abs(M[0, 1]+M[1, 0]) < 1e-12                 # a similarity,
    columns = torch.cat([torch.stack([points[:, 0], -points[:, 1], torch.ones(5), torch.zeros(5)], 1),
                         torch.stack([points[:, 1], points[:, 0], torch.zeros(5), torch.ones(5)], 1)])
    best = np.linalg.lstsq(columns.numpy(), TEMPLATE.T.reshape(-1).numpy(), rcond=1e-14)[0]
    loss = lambda a, b, s, t: (columns @ torch.tensor([a, b, s, t], dtype=torch.float64)-TEMPLATE.T.reshape(-1)).square().sum()
    assert loss(M[0, 0], M[1, 0], M[0, 2], M[1, 2]) <= loss(*best)*(1+1e-6)+1e-8         # and the best one


@pytest.mark.parametrize("order, ok", [([0, 1, 2, 3, 4], True), ([1, 0, 2, 4, 3], False), ([1, 0, 2, 3, 4], False)])
@pytest.mark.parametrize("angle", [0, 1.5, 3.1, -2])
def test_mirrored_orders_are_refused_however_the_photo_is_held(order, ok, angle):
    points = moved(3, angle, 200, 100)[order]
    if ok: similarity_transform(points, TEMPLATE)
    else:
        with pytest.raises(ValueError, match="mirrored"): similarity_transform(points, TEMPLATE)


def test_a_full_profile_is_accepted():
    points = TEMPLATE.clone()
    points[:, 0] = torch.tensor([50, 49.5, 60, 50, 50.5])                                 # eyes have passed each other by half a pixel
    assert .5 < similarity_transform(points, TEMPLATE)[:, :2].det().sqrt() < 1.2


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), min_size=10, max_size=10), st.sampled_from([8, 32, 112]))
def test_any_ten_numbers_give_a_crop_or_one_valueerror(numbers, size):
    try: crop = align_face(smooth(40), torch.tensor(numbers).view(5, 2), size)
    except ValueError: return
    assert crop.shape == (3, size, size) and crop.dtype == torch.uint8


# -- the crop --

@pytest.mark.parametrize("scale, angle", [(1, 0), (1.3, .4), (.6, -2.5), (1.45, 3)])
def test_small_photos_are_cropped_as_opencv_crops(scale, angle):
    cv2 = pytest.importorskip("cv2")
    photo, points = smooth(400), moved(scale, angle, 200, 200)
    M = similarity_transform(points, TEMPLATE)
    theirs = cv2.warpAffine(photo.permute(1, 2, 0).numpy(), M.numpy(), (112, 112), borderValue=0.)
    ours, photo_ends = align_face(photo, points).permute(1, 2, 0).numpy(), theirs.max(2) == 0
    inside = cv2.erode((~photo_ends).astype(np.uint8), np.ones((3, 3))) > 0
    assert inside.mean() > .1 and np.abs(ours[inside].astype(int)-theirs[inside]).max() <= 3
    assert (ours[cv2.erode(photo_ends.astype(np.uint8), np.ones((3, 3))) > 0] == 0).all()


@pytest.mark.parametrize("shrink", [1.6, 2.5, 3.9, 5.5, 9.2, 13])
@pytest.mark.parametrize("angle", [0, .5])
def test_large_photos_are_averaged_in_the_right_place(shrink, angle):
    n = int(112*shrink*1.5)
    y, x = torch.meshgrid(torch.arange(n, dtype=torch.float64), torch.arange(n, dtype=torch.float64), indexing="ij")
    ramp = torch.stack([x, y, (x+y)/2])/n*255
    noise = 40*(torch.rand(n, n, generator=torch.Generator().manual_seed(0))-.5)
    points = moved(shrink, angle, *((n-112*shrink)/2+torch.tensor([0., 60.*shrink*np.sin(angle)])).tolist())
    M = np.vstack([similarity_transform(points, TEMPLATE).numpy(), [0, 0, 1]])
    crop = align_face((ramp+noise).clamp(0, 255).round().to(torch.uint8), points)
    cy, cx = np.mgrid[30:82, 30:82]
    px, py, _ = np.linalg.inv(M) @ np.stack([cx.ravel(), cy.ravel(), np.ones(cx.size)])
    off = crop[0, 30:82, 30:82].numpy().ravel()-px/n*255, crop[1, 30:82, 30:82].numpy().ravel()-py/n*255
    for axis in off:
        assert abs(axis.mean()) < .75                                                     # under half a crop pixel (1.5 grey levels)
        assert axis.std() < 14/shrink**.8+.6                                              # noise of 11.5 levels falls with the pixels used


def test_a_face_of_a_large_photo_needs_little_memory():
    code = """if True:
        import resource, torch
        from cemiface.data.alignment import align_face, arcface_template
        photo, face = torch.zeros(3, 4000, 5000, dtype=torch.uint8), arcface_template()-arcface_template().mean(0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for scale in (.5, 4, 40, 400, 4e6): align_face(photo, face*scale+2000)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-before)//1024)"""
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 300                                                                    # MB; the photo itself has 60


# -- files of landmarks --

@settings(max_examples=80, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet='0123456789.,-"\n\r[]{}:aNI/\\', max_size=80).map(str.encode)), st.sampled_from(["csv", "json"]))
def test_any_landmarks_file_is_read_or_refused_by_name(tmp_path_factory, data, kind):
    path = tmp_path_factory.mktemp("l")/f"points.{kind}"
    path.write_bytes(data)
    try: faces = read_landmarks(path)
    except ValueError as e: assert f"points.{kind}" in str(e)
    else: assert all(f.shape[1:] == (5, 2) for f in faces.values())


@pytest.mark.parametrize("text", ['{"a/1.jpg": [[1,2],[3,4]]}', '{"a/1.jpg": "no"}', '{"a/1.jpg": {"x": 1}}', '{"a/1.jpg": [[1,2],[3]]}', "[1]", "{}", '{"a": ' + "["*5000])
def test_json_that_holds_no_faces(tmp_path, text):
    (tmp_path/"p.json").write_text(text)
    with pytest.raises(ValueError, match=r"p\.json"): read_landmarks(tmp_path/"p.json")


def test_names_are_found_however_they_are_written(tmp_path):
    (tmp_path/"p.csv").write_text("\ufeffpath,"+",".join(f"{c}{k}" for k in range(1, 6) for c in "xy")+"\n./a\\1.jpg,"+",".join("1234567890")+"\n\n", "utf-8")
    assert list(read_landmarks(tmp_path/"p.csv")) == ["a/1.jpg"]
    assert read_landmarks(tmp_path/"p.csv")["a/1.jpg"].tolist() == [[[1, 2], [3, 4], [5, 6], [7, 8], [9, 0]]]


# -- a folder --

def test_the_largest_face_and_never_one_of_nan():
    faces = torch.stack([moved(1, 0, 0, 0), moved(2, 1, 9, 9), moved(1.9, 0, 500, 500), TEMPLATE*float("nan")])
    assert torch.equal(largest(faces), faces[1])
    assert torch.equal(largest(faces.flip(0)), faces[1])


def test_every_bad_photo_is_counted_and_named(tmp_path):
    source, points = photos(tmp_path)
    lines = points.read_text().split("\n")
    (source/"s0"/"0.png").write_bytes(b"")
    write_whole(points, "\n".join([*lines[:4], "s0/4.png"+",7"*10, "s1/5.png"+",9999,9999,1e4,9999,1e4,1e4,9999,1e4,1e4,2e4"]).encode())
    report = align_folder(source, tmp_path/"out", points).set_index("path")
    assert report.outcome.to_dict() == {"s0/0.png": "unreadable", "s0/2.png": "aligned", "s0/4.png": "bad landmarks", "s1/1.png": "aligned",
                                        "s1/3.png": "aligned", "s1/5.png": "bad landmarks"}
    assert "0 bytes" in report.reason["s0/0.png"] and "one point" in report.reason["s0/4.png"] and "outside the photo" in report.reason["s1/5.png"]
    assert sorted(p.relative_to(tmp_path/"out").as_posix() for p in (tmp_path/"out").rglob("*.png")) == ["s0/2.png", "s1/1.png", "s1/3.png"]
    assert report.crop["s0/4.png"] == ""
    write_whole(points, "\n".join(lines).encode())                                       # better landmarks: failures are tried again
    assert align_folder(source, tmp_path/"out", points).outcome.tolist().count("aligned") == 5


def test_photos_of_one_name_get_different_crops(tmp_path):
    for name in ("a.png", "a.jpg", "b.png"): write_whole(tmp_path/"photos"/"s"/name, encode_image(smooth(112, len(name)), name[-3:]))
    report = align_folder(tmp_path/"photos", tmp_path/"out", lambda image: TEMPLATE[None])
    assert sorted(report.crop) == ["s/a.jpg.png", "s/a.png.png", "s/b.png"]


def test_landmarks_are_those_of_the_upright_photo(tmp_path):
    upright, exif = smooth(160), Image.Exif()
    exif[0x0112] = 6                                                                      # the camera was held on its side
    (tmp_path/"photos"/"s").mkdir(parents=True)
    Image.fromarray(upright.permute(1, 2, 0).numpy()).rotate(90, expand=True).save(tmp_path/"photos"/"s"/"a.png", exif=exif)
    seen = []
    align_folder(tmp_path/"photos", tmp_path/"out", lambda image: seen.append(image) or moved(1.2, .1, 5, 5)[None])
    assert torch.equal(seen[0], upright)
    assert np.array_equal(np.asarray(Image.open(tmp_path/"out"/"s"/"a.png")), align_face(upright, moved(1.2, .1, 5, 5)).permute(1, 2, 0).numpy())


def test_a_second_run_finds_nothing_to_do_and_another_size_starts_over(tmp_path):
    source, _ = photos(tmp_path)
    calls = []
    detect = lambda image: calls.append(1) or TEMPLATE[None]
    first = align_folder(source, tmp_path/"out", detect)
    assert len(calls) == 6
    pd.testing.assert_frame_equal(align_folder(source, tmp_path/"out", detect), first)
    assert len(calls) == 6
    (tmp_path/"out"/"s0"/"0.png").unlink()
    align_folder(source, tmp_path/"out", detect)
    assert len(calls) == 7
    align_folder(source, tmp_path/"out", detect, size=64)
    assert len(calls) == 13 and Image.open(tmp_path/"out"/"s0"/"0.png").size == (64, 64)


def written(out):
    "Bytes and time of each crop."
    return {p.relative_to(out).as_posix(): (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*.png")}


def test_corrected_landmarks_and_changed_photos_are_cropped_again_and_only_they(tmp_path):
    source, points = photos(tmp_path)
    first = align_folder(source, tmp_path/"out", points)
    before, lines = written(tmp_path/"out"), points.read_text().split("\n")
    lines[1] = "s1/1.png,"+",".join(map(repr, moved(1.3, -.1, 50, 60).flatten().tolist()))                # corrected,
    lines[2] = "s0/2.png"+",7"*10                                                                         # spoilt,
    del lines[3]                                                                                          # gone (s1/3.png),
    write_whole(points, "\n".join(lines).encode())
    write_whole(source/"s0"/"4.png", encode_image(smooth(260, 99)))                                       # another photo
    report, after = align_folder(source, tmp_path/"out", points).set_index("path"), written(tmp_path/"out")
    assert report.outcome.to_dict() == {"s0/0.png": "aligned", "s0/2.png": "bad landmarks", "s0/4.png": "aligned", "s1/1.png": "aligned", "s1/3.png": "no face", "s1/5.png": "aligned"}
    assert {name for name in before if before[name] == after.get(name)} == {"s0/0.png", "s1/5.png"}
    assert sorted(after) == sorted(report.crop[report.crop != ""])                                        # no crop is left of what is no face any more
    align_folder(source, tmp_path/"fresh", points)
    assert {k: v[0] for k, v in after.items()} == {k: v[0] for k, v in written(tmp_path/"fresh").items()}
    assert (first.set_index("path").made_from == report.made_from).to_dict() == {n: n in ("s0/0.png", "s1/5.png") for n in report.index}


def test_another_detector_starts_over(tmp_path):
    source, _ = photos(tmp_path, 2)
    def straight(image): return TEMPLATE[None]
    def turned(image): return moved(1.2, .3, 20, 20)[None]
    align_folder(source, tmp_path/"out", straight)
    straight_crops = written(tmp_path/"out")
    align_folder(source, tmp_path/"out", straight)
    assert written(tmp_path/"out") == straight_crops
    align_folder(source, tmp_path/"out", turned)
    turned_crops = written(tmp_path/"out")
    assert all(turned_crops[k][0] != straight_crops[k][0] for k in turned_crops)
    turned.name = "turned, with other weights"
    align_folder(source, tmp_path/"out", turned)
    assert all(written(tmp_path/"out")[k][1] != turned_crops[k][1] for k in turned_crops)


@pytest.mark.parametrize("digest", ["0012345678901234", "12e4567890123456", "nan", "1e5"])
def test_a_digest_that_looks_like_a_number_is_none(tmp_path, monkeypatch, digest):
    monkeypatch.setattr(alignment, "source_digest", lambda *_: digest)
    source, points = photos(tmp_path, 2)
    align_folder(source, tmp_path/"out", points)
    before = written(tmp_path/"out")
    align_folder(source, tmp_path/"out", points)
    assert written(tmp_path/"out") == before


def test_a_second_run_that_is_stopped_forgets_nothing(tmp_path, monkeypatch):
    source, points = photos(tmp_path)
    first = align_folder(source, tmp_path/"out", points)
    monkeypatch.setattr(alignment, "source_digest", lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): align_folder(source, tmp_path/"out", points)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/"out"/"alignment.csv", keep_default_na=False, dtype=alignment.TEXTS), first)


def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path):
    source, points = photos(tmp_path, 2)
    for name in ("train.rec", "s0/0.png"):
        out = tmp_path/name.replace("/", "_")
        write_whole(out/name, b"precious")
        with pytest.raises(FileExistsError, match="holds other files, and no alignment.csv.*choose a new or empty folder"): align_folder(source, out, points)
        assert [p.name for p in out.iterdir()] == [name.split("/")[0]] and (out/name).read_bytes() == b"precious"
    write_whole(tmp_path/"new"/".alignment.csv.7.part", b"of a run that was killed at once")
    assert (align_folder(source, tmp_path/"new", points).outcome == "aligned").all()


def test_a_run_that_is_killed_at_its_first_photos_can_be_continued(tmp_path, monkeypatch):
    source, points = photos(tmp_path)
    monkeypatch.setattr(alignment.os, "cpu_count", lambda: 1)
    real = alignment.align_photo
    monkeypatch.setattr(alignment, "align_photo", lambda path, *args: real(path, *args) if path.name != "3.png" else 1/0)
    with pytest.raises(ZeroDivisionError): align_folder(source, tmp_path/"out", points)
    assert len(written(tmp_path/"out")) > 0
    monkeypatch.setattr(alignment, "align_photo", real)
    assert (align_folder(source, tmp_path/"out", points).outcome == "aligned").all()


def test_a_file_of_landmarks_that_is_not_there_is_one_error(tmp_path):
    source, _ = photos(tmp_path, 2)
    for name in ("nope.csv", "nope.json", "."):
        with pytest.raises(OSError, match=r"could not read the landmarks .*: give a \.csv or \.json file that is there") as e: align_folder(source, tmp_path/"out", tmp_path/name)
        assert str(tmp_path/name) in str(e.value) and not (tmp_path/"out").exists()


def test_a_detector_may_return_lists_or_nothing(tmp_path):
    source, _ = photos(tmp_path, 2)
    answers = iter([[], TEMPLATE.tolist()])
    lock = Lock()
    def detect(image):
        with lock: return next(answers)
    assert sorted(align_folder(source, tmp_path/"out", detect).outcome) == ["aligned", "no face"]


SLOW = """
import sys, time
from pathlib import Path
from cemiface.data import alignment
alignment.os.cpu_count = lambda: 1
root = Path(sys.argv[1])
real = alignment.align_face
def slow(*args):
    time.sleep(.002)
    return real(*args)
alignment.align_face = slow
alignment.align_folder(root/"photos", root/"killed", root/"points.csv", 16)
"""


def test_kill_and_resume_end_where_an_uninterrupted_run_ends(tmp_path):
    source, points = tmp_path/"photos", tmp_path/"points.csv"
    lines, data = [], encode_image(smooth(40))
    for i in range(300):
        (source/f"s{i%7}").mkdir(parents=True, exist_ok=True)
        (source/f"s{i%7}"/f"{i}.png").write_bytes(data)
        lines.append(f"s{i%7}/{i}.png,"+",".join(map(repr, moved(.3, i/300, 3, 4).flatten().tolist())))
    points.write_text("\n".join(lines))
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path)], env=os.environ | dict(OMP_NUM_THREADS="1"))
    try:
        deadline = time.time()+120
        def rows():
            report = tmp_path/"killed"/"alignment.csv"
            return len(pd.read_csv(report)) if report.exists() else 0
        while not rows() and time.time() < deadline and process.poll() is None: time.sleep(.005)
    finally: os.kill(process.pid, signal.SIGKILL); process.wait()
    assert 0 < len(pd.read_csv(tmp_path/"killed"/"alignment.csv")) < 300
    whole = align_folder(source, tmp_path/"whole", points, 16)
    pd.testing.assert_frame_equal(align_folder(source, tmp_path/"killed", points, 16), whole)
    names = lambda folder: {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.suffix != ".part"}
    assert names(tmp_path/"killed") == names(tmp_path/"whole")


@pytest.mark.parametrize("text", ["", "a,b\n1,2,3\n", "\0\0"])
def test_a_damaged_report_is_named_or_starts_over(tmp_path, text):
    source, points = photos(tmp_path, 2)
    write_whole(tmp_path/"out"/"alignment.csv", text.encode())
    try: report = align_folder(source, tmp_path/"out", points)
    except ValueError as e: assert "alignment.csv: not a report" in str(e) and "choose a new folder" in str(e)
    else: assert (report.outcome == "aligned").all()


def test_an_output_that_cannot_be_written_is_one_oserror(tmp_path):
    source, points = photos(tmp_path, 2)
    (tmp_path/"out").write_text("a file")
    with pytest.raises(OSError, match="out"): align_folder(source, tmp_path/"out", points)


def test_landmarks_that_are_not_pixels_or_in_another_order(tmp_path):
    "Fractions of the photo's size are refused; a mixed order is a crop of something, and named."
    source, points = photos(tmp_path)
    lines = [line.split(",") for line in points.read_text().split("\n")]
    faces = {line[0]: np.array(line[1:], float).reshape(5, 2) for line in lines}
    def again(change):
        write_whole(points, "\n".join(",".join([name, *map(repr, change(face).flatten().tolist())]) for name, face in faces.items()).encode())
        return align_folder(source, tmp_path/"out", points)
    assert (again(lambda face: face).reason == "").all()
    report = again(lambda face: face/260)
    assert (report.outcome == "bad landmarks").all() and report.reason.str.contains("fractions of the photo's size").all()
    for order in ([0, 1, 2, 4, 3], [2, 0, 1, 3, 4], [0, 1, 3, 4, 2]):
        report = again(lambda face: face[order])
        assert (report.outcome == "aligned").all() and report.reason.str.contains("another order of the points").all()


@pytest.mark.parametrize("data, kind", [(b"\x08\x07\x12\x07pytorch", "an ONNX graph"), (b"\x93NUMPY\x01\0v\0{}", "a NumPy array"), (b"\x80\x02]q\0(", "a pickle")])
def test_a_file_of_another_kind_holds_no_landmarks(tmp_path, data, kind):
    (tmp_path/"p.csv").write_bytes(data)
    with pytest.raises(ValueError, match=f"p.csv is {kind}.*, not a file of landmarks: give a .csv"): read_landmarks(tmp_path/"p.csv")


# -- the detector --

def made_up_yunet(path):
    "A network with YuNet's twelve outputs that finds a face wherever 8 x 8 pixels are red: its landmarks are constants."
    onnx = pytest.importorskip("onnx")
    H, N, F = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    nodes, weights, wide = [], [], dict(cls=1, obj=1, bbox=4, kps=10)
    for s in (8, 16, 32):
        nodes.append(H.make_node("AveragePool", ["input"], [f"p{s}"], kernel_shape=[s, s], strides=[s, s]))
        for k, n in wide.items():
            W, b = np.zeros((n, 3, 1, 1), np.float32), np.zeros(n, np.float32)
            if n == 1 and s == 8: W[0, 2] = 1/255                                         # the third channel of BGR
            if n == 10: b[:] = [-1, -1, 1, -1, 0, 0, -.5, 1, .5, 1]                       # from the cell's corner, in cells
            weights += [N.from_array(W, f"W{k}{s}"), N.from_array(b, f"b{k}{s}"), N.from_array(np.array([1, -1, n]), f"r{k}{s}")]
            nodes += [H.make_node("Conv", [f"p{s}", f"W{k}{s}", f"b{k}{s}"], [f"c{k}{s}"]),
                      H.make_node("Transpose", [f"c{k}{s}"], [f"t{k}{s}"], perm=[0, 2, 3, 1]),
                      H.make_node("Reshape", [f"t{k}{s}", f"r{k}{s}"], [f"{k}_{s}"])]
    outputs = [H.make_tensor_value_info(f"{k}_{s}", F, [1, None, n]) for k, n in wide.items() for s in (8, 16, 32)]
    graph = H.make_graph(nodes, "yunet", [H.make_tensor_value_info("input", F, [1, 3, "h", "w"])], outputs, weights)
    model = H.make_model(graph, opset_imports=[H.make_opsetid("", 12)])
    model.ir_version = 8
    onnx.save(model, path)
    return path


def test_opencv_reads_the_network_and_landmarks_come_out_in_order(tmp_path):
    pytest.importorskip("cv2")
    detect = yunet_detector(made_up_yunet(tmp_path/"yunet.onnx"), side=128)
    photo = torch.zeros(3, 192, 256, dtype=torch.uint8)
    assert detect(photo).shape == (0, 5, 2)
    photo[0, 80:96, 128:144] = 255                                                        # at half size the cell at (64, 40)
    points = (torch.tensor([[56., 32], [72, 32], [64, 40], [60, 48], [68, 48]])+.5)*2-.5
    assert detect(photo).shape == (1, 5, 2) and torch.allclose(detect(photo)[0], points.double())
    similarity_transform(detect(photo)[0], TEMPLATE)                                      # not mirrored
    same, other = yunet_detector(tmp_path/"yunet.onnx", side=128), yunet_detector(tmp_path/"yunet.onnx", side=64)
    (tmp_path/"copy.onnx").write_bytes((tmp_path/"yunet.onnx").read_bytes()+b"\x32\0")     # the same network in another file: an empty field more
    assert detect.name == same.name and len({detect.name, other.name, yunet_detector(tmp_path/"copy.onnx", side=128).name}) == 3
    assert len(detect(photo.flip(0))) == 0                                                # blue is no face: the channels arrive as BGR


def test_without_opencv_and_with_a_wrong_file(tmp_path, monkeypatch):
    (tmp_path/"yunet.onnx").write_bytes(b"no model")
    pytest.importorskip("cv2")
    with pytest.raises(ValueError, match="yunet.onnx is a text, not YuNet's face detector: get"): yunet_detector(tmp_path/"yunet.onnx")
    with pytest.raises(FileNotFoundError, match="is a folder of images|not YuNet's face detector"): yunet_detector(tmp_path)
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ImportError, match="pip install opencv-python-headless"): yunet_detector(tmp_path/"yunet.onnx")


def test_another_network_is_no_detector(tmp_path, capfd):
    "OpenCV reads any network, and stumbles at the first photo."
    pytest.importorskip("cv2")
    onnx = pytest.importorskip("onnx")
    H, F = onnx.helper, onnx.TensorProto.FLOAT
    graph = H.make_graph([H.make_node("Relu", ["images"], ["embedding"])], "recogniser", [H.make_tensor_value_info("images", F, ["n", 3, 16, 16])], [H.make_tensor_value_info("embedding", F, ["n", 3, 16, 16])])
    model = H.make_model(graph, opset_imports=[H.make_opsetid("", 12)])
    model.ir_version = 8
    onnx.save(model, tmp_path/"recogniser.onnx")
    with pytest.raises(ValueError, match="recogniser.onnx is an ONNX graph, not YuNet's face detector: get face_detection_yunet") as e: yunet_detector(tmp_path/"recogniser.onnx")
    assert "OpenCV(" not in str(e.value) and capfd.readouterr() == ("", "")


def test_the_network_is_never_used_by_two_threads_at_once(tmp_path, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    busy, clashes = Lock(), []
    class Net:
        size = None
        def setInputSize(self, size):
            clashes.append(not busy.acquire(blocking=False))
            self.size = size
        def detect(self, image):
            if self.size is None: return 1, None                                      # the black picture that tells another network
            time.sleep(.005)
            assert image.shape[:2] == self.size[::-1]
            busy.release()
            return 1, np.concatenate([np.zeros(4), TEMPLATE.flatten().numpy(), [1]])[None].astype(np.float32)
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda *args: Net())
    monkeypatch.setattr(alignment.os, "cpu_count", lambda: 8)
    write_whole(tmp_path/"yunet.onnx", b"x")
    source, _ = photos(tmp_path, 12)
    assert (align_folder(source, tmp_path/"out", yunet_detector(tmp_path/"yunet.onnx")).outcome == "aligned").all()
    assert len(clashes) == 12 and not any(clashes)


# -- the frame of the landmarks, names, and which face --

def sideways(root, tag, name="s/a.png", size=(160, 220)):
    "A photo with an orientation tag, and a face where it lies upright, and as stored."
    from PIL import ImageOps
    upright_photo = Image.fromarray(smooth(256, tag).permute(1, 2, 0).numpy()).crop((0, 0, *size))
    back = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE", 6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}.get(tag)
    stored, exif = upright_photo.transpose(Image.Transpose[back]) if back else upright_photo, Image.Exif()
    exif[0x0112] = tag
    (root/"photos"/name).parent.mkdir(parents=True, exist_ok=True)
    stored.save(root/"photos"/name, exif=exif)
    assert ImageOps.exif_transpose(Image.open(root/"photos"/name)).size == size
    face, (w, h) = moved(.8, .1, 20, 30), size
    x, y = face.T
    there = {2: (w-1-x, y), 3: (w-1-x, h-1-y), 4: (x, h-1-y), 5: (y, x), 6: (y, w-1-x), 7: (h-1-y, w-1-x), 8: (h-1-y, x)}.get(tag, (x, y))
    there = torch.stack(there, 1)
    return face, there[[1, 0, 2, 4, 3]] if tag in (2, 4, 5, 7) else there


@pytest.mark.parametrize("tag", range(1, 9))
def test_landmarks_of_the_stored_picture(tmp_path, tag):
    face, there = sideways(tmp_path, tag)
    for name, points in (("upright", face), ("stored", there)): write_whole(tmp_path/f"{name}.csv", ("s/a.png,"+",".join(map(repr, points.flatten().tolist()))).encode())
    expected = align_folder(tmp_path/"photos", tmp_path/"out", tmp_path/"upright.csv")
    assert expected.outcome.tolist() == ["aligned"] and expected.reason.tolist() == [""]
    crop = (tmp_path/"out/s/a.png").read_bytes()
    asked = align_folder(tmp_path/"photos", tmp_path/"out", tmp_path/"stored.csv")
    if tag > 2:
        assert asked.outcome.tolist() == ["which frame"] and "--landmarks-in stored" in asked.reason[0] and not (tmp_path/"out/s/a.png").exists()
    said = align_folder(tmp_path/"photos", tmp_path/"out", tmp_path/"stored.csv", landmarks_in="stored")
    assert said.outcome.tolist() == ["aligned"] and (tmp_path/"out/s/a.png").read_bytes() == crop


def test_a_turned_face_without_a_tag_is_aligned_and_named(tmp_path):
    write_whole(tmp_path/"photos/s/a.png", encode_image(smooth(260)))
    found = align_folder(tmp_path/"photos", tmp_path/"out", lambda image: moved(1, np.pi/2, 180, 60)[None])
    assert found.outcome[0] == "aligned" and "turned by" in found.reason[0] and "90 degrees" in found.reason[0]
    found = align_folder(tmp_path/"photos", tmp_path/"edge", lambda image: moved(1, 0, -45, 60)[None])
    assert found.outcome[0] == "aligned" and "2 of 5 landmarks lie outside" in found.reason[0]


def test_names_of_bytes_and_of_other_accents(tmp_path):
    names = {os.fsdecode(b"Jos\xe9/1.png"): b"Jos\xe9/1.png", "Jos\u00e9/2.png": "Jose\u0301/2.png".encode()}
    for name in names: write_whole(tmp_path/"photos"/name, encode_image(smooth(200)))
    numbers = ",".join(map(repr, moved(1, 0, 30, 30).flatten().tolist())).encode()
    write_whole(tmp_path/"marks.csv", b"\n".join(name+b","+numbers for name in names.values()))
    first = align_folder(tmp_path/"photos", tmp_path/"out", tmp_path/"marks.csv")
    assert first.outcome.tolist() == ["aligned", "aligned"]
    pd.testing.assert_frame_equal(align_folder(tmp_path/"photos", tmp_path/"out", tmp_path/"marks.csv"), first)     # the report is read again
    write_whole(tmp_path/"utf16.csv", "Jos\u00e9/2.png,1".encode("utf-16"))
    with pytest.raises(ValueError, match="UTF-16: save it as UTF-8"): read_landmarks(tmp_path/"utf16.csv")


def test_all_faces_of_a_photo_and_a_photo_of_that_name(tmp_path):
    for name in ("a.png", "a#2.png", "s/b.png"): write_whole(tmp_path/"photos"/name, encode_image(smooth(260)))
    two = torch.stack([moved(.5, 0, 100, 100), moved(1, 0, 0, 0)])
    found = align_folder(tmp_path/"photos", tmp_path/"out", lambda image: two, which="all")
    assert sorted(found.crop) == sorted(["a.png", "a#2.png", "a#2.png.png", "a#2.png#2.png", "s/b.png", "s/b#2.png"]) and len(set(found.path)) == 3
    align_folder(tmp_path/"photos", tmp_path/"out", lambda image: two, which="central")
    assert sorted(p.relative_to(tmp_path/"out").as_posix() for p in (tmp_path/"out").rglob("*.png")) == ["a#2.png.png", "a.png", "s/b.png"]
