"Rendered sets: kill and resume, shares, forms, hostile folders, and the command line."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small import content
from typer.testing import CliRunner

from cemiface.cli.app import app
from cemiface.data.alignment import align_folder
from cemiface.data.images import decode_image
from cemiface.data.recordio import RecordWriter
from cemiface.data.records import open_encoded
from cemiface.sets.checked import redraw, verify_rendered
from cemiface.sets.factors import parse_factors
from cemiface.sets.rendered import merge_rendered, read_table, render_set
from cemiface.world.people import PERSON, PHOTO
from cemiface.world.worlds import draw_world

QUICK = dict(world="casia", subjects=5, per_subject=4, size=16, progress=False, batch_size=6) # 4 blocks, the last of 2
FORMS = pytest.mark.parametrize("form", [{}, dict(form="records", ext="jpg", truth=True)])


def make(out, **kw): return render_set(out=out, **{**QUICK, **kw})


def run(*words): return CliRunner(env=dict(NO_COLOR="1", TERM="dumb")).invoke(app, [str(w) for w in words])


def error(*words):
    answer = run(*words)
    assert answer.exit_code == 2 and "Traceback" not in answer.output, answer.output
    return answer.output.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return {form: make(root/form/"set", **kw) for form, kw in (("folder", {}), ("records", dict(form="records", ext="jpg", truth=True)))}


def test_pictures_and_factors_are_the_worlds(whole):
    stored, table = open_encoded(whole["folder"]), pd.read_csv(whole["folder"]/"factors.csv")
    drawn = draw_world("casia", 5, 4, 16)
    pixels = np.stack([decode_image(stored.read(i)).numpy() for i in range(20)])
    assert np.abs(pixels.astype(int) - drawn.images.numpy()).max() <= 1
    assert (table[list(PHOTO)].to_numpy(np.float32) == drawn.photo.numpy()).all()
    people = pd.read_csv(whole["folder"]/"people.csv")
    assert list(people) == ["shown", *PERSON] and not {*PERSON} & {*table}
    assert (table[["shown"]].merge(people, on="shown")[list(PERSON)].to_numpy(np.float32) == drawn.person.numpy()).all()
    assert table.shown.tolist() == drawn.shown.tolist() and table.file[4] == "000001/0000.png"
    assert stored.labels.tolist() == table.label.tolist() == drawn.labels.tolist()


def test_first_numbers_the_people(tmp_path):
    both, later = make(tmp_path/"a", subjects=4), make(tmp_path/"b", subjects=2, first=2)
    for k in range(4):
        for s in (2, 3):
            a, b = (np.asarray(Image.open(o/f"{s:06d}"/f"{k:04d}.png")).astype(int) for o in (both, later))
            assert np.abs(a - b).max() <= 1
    assert pd.read_csv(later/"factors.csv").label.unique().tolist() == [0, 1]


CHILD = """
import sys, time, json
from cemiface.sets import blocks, rendered
draw = blocks.draw_block
blocks.draw_block = lambda *a: time.sleep(.3) or draw(*a)
rendered.render_set(**json.loads(sys.argv[1]))
"""


@pytest.mark.slow
@FORMS
def test_killed_and_called_again_gives_the_same_bytes(tmp_path, whole, form):
    out = tmp_path/"set"
    child = subprocess.Popen([sys.executable, "-c", CHILD, json.dumps(dict(QUICK, out=str(out), **form))])
    deadline = time.time() + 60
    pieces = lambda: len(list(out.glob(".shares/block-*.csv")))
    while pieces() < 2 and child.poll() is None and time.time() < deadline: time.sleep(.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and 2 <= pieces() < 4
    with pytest.raises(ValueError, match="of 4 blocks are not drawn"): merge_rendered(out, progress=False)
    make(out, **form)
    assert content(out) == content(whole["records" if form else "folder"])


class Crash(BaseException): "What a killed process does: nothing more."


@FORMS
def test_a_crash_at_any_step_of_the_end(tmp_path, monkeypatch, whole, form):
    import cemiface.sets.rendered as rendered
    for s in (0, 1): make(tmp_path/"drawn", share=(s, 2), **form)
    for step in ("join_blocks", "join_people", "write_landmarks", "write_sheet", "write_rendered_card", "clean"):
        if step == "write_landmarks" and not form: continue
        for after in (False, True):
            out = shutil.copytree(tmp_path/"drawn", tmp_path/f"{step}{after}"/"set")
            with monkeypatch.context() as m:
                def crash(*a, real=getattr(rendered, step)):
                    if after: real(*a)
                    raise Crash
                m.setattr(rendered, step, crash)
                with pytest.raises(Crash): make(out, **form)
            make(out, **form)
            assert content(out) == content(whole["records" if form else "folder"]), (step, after)


def test_a_crash_in_the_middle_of_the_records(tmp_path, monkeypatch, whole):
    form, out, add = FORMS.args[1][1], tmp_path/"set", RecordWriter.add
    def crash(self, data, label):
        if self.done == 7:
            self.f.flush()
            raise Crash
        add(self, data, label)
    with monkeypatch.context() as m:
        m.setattr(RecordWriter, "add", crash)
        with pytest.raises(Crash): make(out, **form)
    assert content(make(out, **form)) == content(whole["records"])


@FORMS
def test_shares_give_the_bytes_of_one(tmp_path, whole, form):
    for n in (2, 7): # with 7 some have nothing to do
        out = tmp_path/str(n)/"set"
        for s in reversed(range(n)): make(out, share=(s, n), **form)
        assert not (out/"render.json").exists()
        if n == 2: merge_rendered(out, progress=False)
        else: make(out, **form) # the command without a share does as well
        assert content(out) == content(whole["records" if form else "folder"])
    with pytest.raises(ValueError, match="numbered from 0 to 1"): make(tmp_path/"new", share=(2, 2))
    assert not (tmp_path/"new").exists()


def test_records_hold_the_pixels_of_the_folder(tmp_path, whole):
    a, b = open_encoded(whole["folder"]), open_encoded(make(tmp_path/"records", form="records"))
    assert a.labels.tolist() == b.labels.tolist() and [a.read(i) for i in range(20)] == [b.read(i) for i in range(20)]
    assert (tmp_path/"records"/"property").read_text() == "5,16,16\n"


def test_a_single_picture(tmp_path):
    for form in ("folder", "records"): assert {"sheet.png", "README.md", "render.json"} < set(content(make(tmp_path/form, subjects=1, per_subject=1, form=form)))


def test_finished_is_left_alone_and_a_lost_picture_is_drawn_again(tmp_path, monkeypatch):
    out = make(tmp_path/"set")
    before = content(out)
    (out/"000003"/"0002.png").unlink()
    make(out)
    assert content(out) == before
    monkeypatch.setattr("cemiface.sets.blocks.draw_block", None)
    make(out)
    assert content(out) == before


def test_damage_is_named(tmp_path):
    out = tmp_path/"set"
    for s in (0, 1): make(out, share=(s, 2))
    (out/"000001"/"0001.png").write_bytes((out/"000002"/"0001.png").read_bytes())
    with pytest.raises(ValueError, match=r"000001/0001.png is not what was drawn: remove .*block-000000.csv"): merge_rendered(out, progress=False)
    (out/".shares"/"block-000000.csv").unlink()
    assert content(make(out)) == content(make(tmp_path/"again"/"set"))


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path):
    (tmp_path/"mine").mkdir(); (tmp_path/"mine"/"thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="holds something else"): make(tmp_path/"mine")
    with pytest.raises(ValueError, match="holds something else"): make(tmp_path/"mine"/"thesis.txt")
    assert content(tmp_path/"mine") == {"thesis.txt": b"all of it"}
    out = make(tmp_path/"set", subjects=1, per_subject=1)
    for change in (dict(seed=1), dict(first=1), dict(factors=dict(smile=.5)), dict(world="flickr"), dict(truth=True)):
        with pytest.raises(ValueError, match=f"other settings .{next(iter(change))} is"): make(out, **dict(subjects=1, per_subject=1) | change)


@pytest.mark.parametrize("bad, why", [
    (dict(world="moon"), "no world 'moon'"), (dict(size=15), "16 to 224"), (dict(subjects=0), "must be 1 or more"), (dict(margin=.5), "1 is the aligned face"),
    (dict(ext="gif"), "choose folder or records"), (dict(form="tar"), "choose folder or records"), (dict(table="xls"), "choose csv or parquet"), (dict(factors=dict(smiel=1)), "no factor 'smiel'")])
def test_bad_settings_leave_no_trace(tmp_path, bad, why):
    with pytest.raises(ValueError, match=why): make(tmp_path/"set", **bad)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text, why", [
    ("smiel=1", "did you mean 'smile'"), ("yaw", "write NAME=VALUE"), ("", "write NAME=VALUE"), ("yaw=", "write a number"), ("yaw=left", "write a number"), ("yaw=1..", "write a number"),
    ("yaw=1..2..3", "write a number"), ("yaw=nan", "write a number"), ("yaw=0..inf", "write a number"), ("yaw=1..-1", "lower end first"), ("yaw=N(1)", "write a number"),
    ("yaw=N(0,-1)", "0 or more"), ("yaw=1,yaw=2", "given twice"), ("=1", "no factor ''")])
def test_factors_that_cannot_be(text, why):
    with pytest.raises(ValueError, match=re.escape(why)): parse_factors([text])


def test_factors_are_obeyed(tmp_path):
    out = make(tmp_path/"set", factors=parse_factors(["glasses=0,smile=.5", "yaw=N(.2,.1)", "hat_r=.1...2", "male=1"]))
    table, people = pd.read_csv(out/"factors.csv"), pd.read_csv(out/"people.csv")
    assert (table.glasses == 0).all() and (table.smile == .5).all() and (people.male == 1).all()
    assert table.yaw.between(-.1001, .5001).all() and table.yaw.std() > .02 and table.hat_r.between(.1, .2).all()


def test_truth(whole):
    out = whole["records"]
    table, points = pd.read_csv(out/"factors.csv"), np.load(out/"landmarks68.npy")
    assert points.shape == (20, 68, 2) and len(list((out/"parts").rglob("*.png"))) == 20
    mask = np.asarray(Image.open(out/"parts"/"000002"/"0003.png"))
    assert mask.shape == (16, 16) and 1 < len(np.unique(mask)) and mask.max() < 8
    assert (table.right_eye_x < table.left_eye_x).mean() > .7
    assert list(pd.read_csv(out/"landmarks.csv").columns) == ["path", "x1", "y1", "x2", "y2", "x3", "y3", "x4", "y4", "x5", "y5"]
    assert "no real person" in (out/"README.md").read_text() and "landmarks68.npy" in (out/"README.md").read_text()


def test_every_person_who_is_shown_has_one_row(tmp_path):
    kw = dict(subjects=40, per_subject=3)
    out = make(tmp_path/"a"/"set", **kw)
    table, people = (pd.read_csv(out/f"{name}.csv") for name in ("factors", "people"))
    assert (table.shown != table.subject).any(), "no wrong label: choose another seed"
    assert people.shown.tolist() == table.shown.unique().tolist()
    drawn = draw_world("casia", 40, 3, 16)
    for who in people.shown: # on every photo of a person, the same factors
        rows = drawn.person.numpy()[drawn.shown.numpy() == who]
        assert (rows == people.loc[people.shown == who, list(PERSON)].to_numpy(np.float32)).all()
    for s in (1, 0): make(tmp_path/"b"/"set", share=(s, 2), **kw)
    assert content(merge_rendered(tmp_path/"b"/"set", progress=False)) == content(out)
    other = make(tmp_path/"c"/"set", **kw | dict(batch_size=50)) # other blocks, the same people
    assert (other/"people.csv").read_bytes() == (out/"people.csv").read_bytes()


def test_parquet_without_its_writer(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="pip install pyarrow"): make(tmp_path/"set", table="parquet")
    answer = run("render", "--subjects", 2, "--per-subject", 2, "--size", 16, "--table", "parquet", "--out", tmp_path/"set")
    assert answer.exit_code == 3 and answer.output.count("\n") == 1 and "pip install pyarrow" in answer.output
    assert not any(tmp_path.iterdir())


@FORMS
def test_parquet_holds_what_csv_holds(tmp_path, whole, form):
    pytest.importorskip("pyarrow")
    out, csv = make(tmp_path/"one"/"set", table="parquet", **form), whole["records" if form else "folder"]
    for name in ("factors", "people"):
        assert not (out/f"{name}.csv").exists() and f"`{name}.parquet`" in (out/"README.md").read_text()
        pd.testing.assert_frame_equal(read_table(out/f"{name}.parquet"), read_table(csv/f"{name}.csv"), check_exact=True)
    for s in (1, 0): make(tmp_path/"two"/"set", table="parquet", share=(s, 2), **form)
    assert content(merge_rendered(tmp_path/"two"/"set", progress=False)) == content(out)
    assert not len(verify_rendered(out))


@FORMS
def test_verify(tmp_path, whole, form):
    source = whole["records" if form else "folder"]
    assert not len(verify_rendered(source))
    def damaged(change):
        out = shutil.copytree(source, tmp_path/"set", dirs_exist_ok=False)
        change(out)
        answer = run("set", "verify", out)
        faults = dict(verify_rendered(out).itertuples(index=False))
        assert answer.exit_code == 1 and all(file in answer.output for file in faults) and f"{len(faults)} fault" in answer.output, answer.output
        shutil.rmtree(out)
        return faults
    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data)//2] ^= 1
        path.write_bytes(data)
    written = "is not what was written: its checksum is not render.json's"
    for name in ("factors.csv", "people.csv", *(["train.rec", "train.idx", "landmarks68.npy"] if form else [])):
        assert damaged(lambda out: flip(out/name)) == {name: written}
        assert damaged(lambda out: (out/name).unlink()) == {name: "is not there"}
    if form: assert damaged(lambda out: (out/"parts"/"000001"/"0001.png").unlink()) == {"parts/000001/0001.png": "is not there"}
    else:
        assert damaged(lambda out: flip(out/"000001"/"0001.png")) == {"000001/0001.png": "its checksum is not factors.csv's"}
        assert damaged(lambda out: (out/"000001"/"0001.png").unlink()) == {"000001/0001.png": "cannot be read: No such file or directory"}
        assert damaged(lambda out: (out/"000001"/"9.png").write_bytes(b"")) == {"000001/9.png": "is not in factors.csv"}


def test_commands_for_sets(tmp_path, whole, monkeypatch):
    for out in whole.values():
        answer = run("set", "verify", out)
        assert answer.exit_code == 0 and "is whole: every image is there, unchanged, and 8 of them drawn again are the same" in answer.output, answer.output
        answer = run("set", "regenerate", out, "--image", "3/2")
        assert answer.exit_code == 0 and "3/2 of" in answer.output and "drawn again: " in answer.output, answer.output
    assert "no image 9/9" in error("set", "regenerate", out, "--image", "9/9")
    assert "leave --generator out" in error("set", "regenerate", out, "--image", "3/2", "--generator", "dcface")
    assert "is a rendered set" in error("set", "card", out)
    make(tmp_path/"half", share=(0, 2))
    for words in (["verify"], ["regenerate", "--image", "0/0"]): assert "cemiface set merge" in error("set", *words, tmp_path/"half")
    monkeypatch.setattr("cemiface.sets.checked.head_hash", lambda: "other")
    monkeypatch.setattr("cemiface.sets.blocks.head_hash", lambda: "other")
    assert not len(verify_rendered(out)) and "none was drawn again" in run("set", "verify", out).output
    with pytest.raises(ValueError, match="other heads"): redraw(out, "3/2")


def test_photographs_can_be_aligned(tmp_path):
    out = make(tmp_path/"photos", size=64, margin=1.8, truth=True, subjects=2, per_subject=2, factors=dict(yaw=0, pitch=0, roll=0))
    table = align_folder(out, tmp_path/"faces", out/"landmarks.csv", 32)
    assert (table.outcome == "aligned").all() and len(table) == 4


def test_the_command_line(tmp_path):
    words = ["render", "--world", "vggface2", "--subjects", 3, "--per-subject", 2, "--size", 16, "--factors", "yaw=-.5...5,glasses=0", "--factors", "smile=.5", "--device", "cpu"]
    answer = run(*words, "--out", tmp_path/"set")
    assert answer.exit_code == 0 and re.search(r"holds 6 images of 3 subjects, [\d.]+ MB; 6 drawn in [\d.]+ s, [\d.]+ images/s", answer.output), answer.output
    assert "all of them were there" in run(*words, "--out", tmp_path/"set").output
    assert "other settings (seed is 0 there and 1 here)" in error(*words, "--out", tmp_path/"set", "--seed", 1)
    for s in "21":
        part = run(*words, "--out", tmp_path/"shares", "--share", f"{s}/2")
        assert part.exit_code == 4 and "not whole yet" in part.output.strip().splitlines()[-1] and f"share {s} of 2 is drawn" in part.output
    assert "was begun in 2 shares" in error(*words, "--out", tmp_path/"shares", "--share", "1/3")
    assert "not whole yet" in error("train-recogniser", "--data", tmp_path/"shares", "--out", tmp_path/"model")
    assert "is finished" in run("set", "merge", tmp_path/"shares").output
    a, b = content(tmp_path/"set"), content(tmp_path/"shares")
    assert {k: v for k, v in a.items() if k != "README.md"} == {k: v for k, v in b.items() if k != "README.md"}
    for share in ("0/2", "3/2", "2", "a/b", "-1/2"): assert "write which of how many" in error(*words, "--out", tmp_path/"new", f"--share={share}")
    assert "did you mean 'yaw'" in error("render", "--factors", "yawn=1", "--out", tmp_path/"new")
    assert not (tmp_path/"new").exists()
    lint = run("data", "lint", tmp_path/"set")
    assert lint.exit_code == 0 and "6 images" in lint.output, lint.output


def test_list_factors():
    lines = run("render", "--list-factors", "--world", "flickr").output.splitlines()
    assert len(lines) == len(PERSON) + len(PHOTO) and any(re.match(r"photo +yaw +N\(0,0.65\) within -1.45..1.45 +turn of the head", o) for o in lines)
    assert "no world 'moon'" in error("render", "--list-factors", "--world", "moon")


def test_torchrun_gives_the_share_and_variables_that_were_left_over_do_not(tmp_path):
    words = shlex.split("render --subjects 2 --per-subject 2 --size 16 --device cpu --out") + [str(tmp_path/"set")]
    two = dict(RANK="1", WORLD_SIZE="2")
    answer = CliRunner(env=two | dict(TORCHELASTIC_RUN_ID="none")).invoke(app, words)
    assert answer.exit_code == 0 and "share 2 of 2 is drawn" in answer.output and not (tmp_path/"set"/"render.json").exists()
    task = {f"SLURM_ARRAY_TASK_{k}": v for k, v in dict(ID="1", MIN="0", MAX="3", COUNT="4").items()}
    assert "holds 4 images of 2 subjects" in CliRunner(env=two | task).invoke(app, words).output
    answer = CliRunner(env=task).invoke(app, [*words[:-1], str(tmp_path/"array"), "--share", "slurm"])
    assert answer.exit_code == 4 and "share 2 of 4 is drawn" in answer.output


@pytest.mark.slow
def test_bench_world(tmp_path):
    answer = run("bench", "world", "--parts", "core", "--sizes", 16, "--seconds", .01, "--out", tmp_path/"bench.json")
    assert answer.exit_code == 0, answer.output
    found = json.loads((tmp_path/"bench.json").read_text())
    assert found["core"][0]["size"] == 16 and found["core"][0]["ms_per_image"] > 0 and "cpu" in found["machine"]
    assert "choose from core, cores, written" in error("bench", "world", "--parts", "oven")
    assert "whole numbers" in error("bench", "world", "--sizes", "big")
