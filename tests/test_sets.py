"""Sets by many processes: plans, shares, both forms, a crash at every step, kill -9, merging."""
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import count

import diffusers
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.sets import layout as sets
from cemiface.data.faceset import open_faces
from cemiface.sets.stored import verify_set
from cemiface.data.records import open_encoded
from cemiface.sets.layout import PLANS, current_share, filled, image_counts, merge_set, start_share, set_batches, set_plan, set_rows, write_share
from cemiface.sets.synthesis import generate_set
from small import SIZE, content, inquiries, make

diffusers.utils.logging.disable_progress_bar()
CONFIG = dict(subjects=4, per_subject=3, m=[0., .1], seed=0, sampler="DDIMScheduler", oversample=2, size=16, batch_size=5)


def colour(i, k): return torch.arange(3*16*16).view(3, 16, 16).mul(i+1).add(50*k).remainder(251).to(torch.uint8)


def share(out, shard=(0, 1), **more): # a set without a generator
    config = CONFIG | more
    start_share(out, config, shard, environment={"device": "test"}, licence={})
    write_share(lambda cells: torch.stack([colour(*c) for c in cells]), lambda i: colour(i, 0), config, out, shard, progress=False)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 7)), min_size=1, max_size=4), st.integers(1, 20), st.integers(1, 12), st.integers(0, 2))
def test_every_image_is_in_one_batch_and_every_batch_in_one_share(runs, batch_size, n, oversample):
    config = CONFIG | dict(subjects=sum(a for a, _ in runs), per_subject=[list(r) for r in runs], batch_size=batch_size, oversample=oversample)
    counts = [k for a, k in runs for _ in range(a)]
    assert image_counts(config).tolist() == counts
    batches = [b for s in range(n) for b in set_batches(config, (s, n))]
    assert batches == set_batches(config) and [b for b, _ in batches] == list(range(len(batches)))
    assert [c for _, cells in batches for c in cells] == [(i, k) for i, c in enumerate(counts) for k in range(c)]
    assert all(len(cells) == batch_size for _, cells in batches[:-1]) and all(len(filled(c, batch_size)) == batch_size for _, c in batches)
    sizes = [len(set_batches(config, (s, n))) for s in range(n)]
    assert max(sizes) - min(sizes) <= 1
    rows = set_rows(config)
    assert len({f for f, *_ in rows}) == len(rows) == sum(counts) + oversample*len(counts) and [i for _, i, _ in rows] == sorted(i for _, i, _ in rows)


def test_plans_are_the_papers():
    images = {name: sum(n*k for n, k in plan["per_subject"]) for name, plan in PLANS.items()}
    assert [images[v] for v in ("0.5M", "1.0M", "1.2M", "one m of Table 11")] == [500_000, 1_000_000, 1_200_000, 100_000]
    assert all(images[name] == 500_000 for name in PLANS if name.startswith("m in"))
    assert all(-1 <= m <= 1 for plan in PLANS.values() for m in plan["m"]) and PLANS["m in [-0.1,0.1]"]["m"] == [round(-.1 + .02*i, 2) for i in range(11)]
    with pytest.raises(ValueError, match="choose one of 0.5M"): set_plan("0.6M")


@pytest.mark.parametrize("name", PLANS)
def test_each_plan_at_tiny_counts(pipe, tmp_path, name):
    plan = set_plan(name, 1/20_000)
    plan["per_subject"] = [(n, max(1, k//10)) for n, k in plan["per_subject"]]
    n = sum(a for a, _ in plan["per_subject"])
    out = generate_set(pipe, inquiries(n), out=tmp_path/"set", batch_size=8, progress=False, **plan | dict(steps=1))
    table = pd.read_csv(out/"manifest.csv", keep_default_na=False, dtype=str)
    drawn = table[table.sampler != "inquiry"]
    assert drawn.groupby("subject").size().tolist() == [k for a, k in plan["per_subject"] for _ in range(a)]
    assert set(drawn.m.astype(float)) <= set(plan["m"]) and [float(m) for m in drawn.m[drawn.subject == "0"]] == [plan["m"][j % len(plan["m"])] for j in range(plan["per_subject"][0][1])]
    assert (table.sampler == "inquiry").sum() == 5*n and not len(verify_set(out))
    with pytest.raises(ValueError, match=f"a plan for {n} subjects, and there are {n+1}"): generate_set(pipe, inquiries(n+1), out=tmp_path/"other", **plan)


def test_a_larger_volume_holds_the_smaller_one(pipe, tmp_path):
    small = make(pipe, tmp_path/"small", per_subject=[(3, 4)], faces=inquiries(3))
    large = make(pipe, tmp_path/"large", per_subject=[(3, 4), (2, 1)])
    assert all(content(large)[f] == x for f, x in content(small).items() if f.endswith(".png"))


def array(**numbers): return {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in numbers.items()}


LEFT_OVER, TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}, {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
TASK, STEPS = array(ID=3, MIN=0, MAX=4, COUNT=5, STEP=1), array(ID=9, MIN=1, MAX=9, COUNT=3, STEP=4)


@pytest.mark.parametrize("asked,env,share", [
    (None, {}, (0, 1)), (None, LEFT_OVER, (0, 1)), (None, TASK, (0, 1)), (None, TASK | LEFT_OVER, (0, 1)),  # nobody asked
    ("2/5", {}, (1, 5)), ("2/5", TASK | LEFT_OVER, (1, 5)), ("slurm", TASK | LEFT_OVER, (3, 5)), ("slurm", STEPS, (2, 3)),
    (None, TORCHRUN, (1, 2)), ("slurm", STEPS | TORCHRUN, (5, 6)), ("2/5", TORCHRUN, (3, 10))])
def test_a_share_is_asked_for(asked, env, share): assert current_share(asked, env) == share


@pytest.mark.parametrize("asked,env,said", [
    ("slurm", {}, "no task of a Slurm array"), ("slurm", LEFT_OVER, "no task of a Slurm array"),
    ("slurm", array(ID=3, MIN=3, MAX=3, COUNT=1), "write the share"), ("slurm", array(ID=3, MIN=1, MAX=7, COUNT=3, STEP=1), "write the share"),
    *[(bad, {}, "from 1/5 to 5/5") for bad in ("0/2", "3/2", "2", "a/b", "-1/2", "1/2/3", "²/5", "", "SLURM")]])
def test_what_is_no_share(asked, env, said):
    with pytest.raises(ValueError, match=said): current_share(asked, env)


@pytest.mark.parametrize("form", [{}, {"form": "records"}])
def test_a_set_keeps_the_division_it_began_with(tmp_path, form):
    share(tmp_path/"set", (0, 3), **form)
    with pytest.raises(ValueError, match="was begun in 3 shares, and this is one of 4"): share(tmp_path/"set", (1, 4), **form)
    share(tmp_path/"set", (0, 1), **form)                        # the whole draws what is left
    share(tmp_path/"set", (1, 3), **form)                        # and a late share does no harm
    share(tmp_path/"one", **form)
    with pytest.raises(ValueError, match="begun as a whole, and this is one of 2"): share(tmp_path/"one", (1, 2), **form)
    assert content(merge_set(tmp_path/"set", progress=False)) == content(merge_set(tmp_path/"one", progress=False))


@pytest.mark.parametrize("form", ["folder", "records"])
@pytest.mark.parametrize("ext", ["png", "jpg"])
def test_any_number_of_shares_gives_the_bytes_of_one(pipe, tmp_path, form, ext):
    one = make(pipe, tmp_path/"one", form=form, ext=ext)
    for n in (2, 3, 9):                                         # 4 batches: with 9 shares some are empty
        for s in reversed(range(n)): out = make(pipe, tmp_path/str(n), form=form, ext=ext, shard=(s, n))
        assert not (out/"manifest.csv").exists()
        assert content(merge_set(out, progress=False)) == content(one) == content(merge_set(out, progress=False))
    assert not len(verify_set(one))
    faces = open_faces(one, SIZE)
    assert faces.labels.bincount().tolist() == [5]*5 and torch.equal(faces.images[3], inquiries().images[0])


def test_records_hold_the_files_of_the_folder(pipe, tmp_path):
    folder, records = (make(pipe, tmp_path/form, form=form) for form in ("folder", "records"))
    a, b = open_encoded(folder), open_encoded(records)
    assert a.labels.tolist() == b.labels.tolist() and [a.read(i) for i in range(len(a))] == [b.read(i) for i in range(len(b))]
    assert content(folder)["manifest.csv"] == content(records)["manifest.csv"]
    assert sorted(content(records)) == ["manifest.csv", "property", "set.json", "train.idx", "train.rec"] and (records/"property").read_text() == f"5,{SIZE},{SIZE}\n"


def test_jpeg_is_another_set_and_smaller_steps_are_refused(pipe, tmp_path):
    out = make(pipe, tmp_path/"set", ext="jpg")
    assert (out/"000000"/"0000.jpg").exists() and (out/"000000"/"inquiry_0.png").exists()
    with pytest.raises(ValueError, match="ext is jpg there"): make(pipe, out)
    for bad in (dict(ext="gif"), dict(form="tar")):
        with pytest.raises(ValueError, match="choose folder or records"): make(pipe, tmp_path/"new", **bad)
    with pytest.raises(ValueError, match="numbered from 0 to 1"): make(pipe, tmp_path/"new", shard=(2, 2))
    assert not (tmp_path/"new").exists()


class Crash(BaseException): "What a killed process does: nothing more."


@pytest.mark.parametrize("form", [{}, {"form": "records"}])
def test_a_crash_at_any_step_and_the_same_call_again_gives_the_same_bytes(tmp_path, monkeypatch, form):
    def whole(out):
        if not (out/"manifest.csv").exists():
            for s in range(2): share(out, (s, 2), **form)
        merge_set(out, progress=False)
    whole(tmp_path/"whole")
    for step in count():
        out, calls = tmp_path/f"cut{step}", []
        with monkeypatch.context() as m:
            for place, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (shutil, "rmtree")):
                def limited(*a, real=getattr(place, name), **kw):
                    calls.append(1)
                    if len(calls) > step: raise Crash
                    return real(*a, **kw)
                m.setattr(place, name, limited)
            try: whole(out)
            except Crash: pass
            else: break
        whole(out)
        assert content(out) == content(tmp_path/"whole"), f"crash at step {step}"
    assert step > 10


def test_the_number_of_processes_may_change_on_the_way(tmp_path):
    for form in ({}, {"form": "records"}):
        one, out = tmp_path/f"one{len(form)}", tmp_path/f"set{len(form)}"
        share(one, **form); merge_set(one, progress=False)
        share(out, (0, 3), **form); share(out, (2, 3), **form)
        with pytest.raises(ValueError, match="1 share is not finished, the first is 2/3: draw them by --share, then cemiface set merge"): merge_set(out, progress=False)
        share(out, **form)
        assert content(merge_set(out, progress=False)) == content(one)


def test_makers_of_different_kinds_are_all_named(tmp_path):
    for s, device in enumerate(("a", "b")):
        start_share(tmp_path/"set", CONFIG, (s, 2), environment={"device": device}, licence={})
        write_share(lambda cells: torch.stack([colour(*c) for c in cells]), lambda i: colour(i, 0), CONFIG, tmp_path/"set", (s, 2), progress=False)
    assert json.loads((merge_set(tmp_path/"set", progress=False)/"set.json").read_text())["environments"] == [{"device": "a"}, {"device": "b"}]


def test_shares_of_two_configurations_do_not_mix(tmp_path):
    share(tmp_path/"set", (0, 2))
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"): share(tmp_path/"set", (1, 2), seed=1)


@pytest.mark.parametrize("form", [{}, {"form": "records"}])
def test_the_merge_finds_damage_and_says_what_to_remove(tmp_path, form):
    out = tmp_path/"set"
    for s in range(2): share(out, (s, 2), **form)
    path = out/".shares"/"batch-000001.rec" if form else out/"000002"/"0001.png"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"IDAT", b"IDAX", 1))
    with pytest.raises(ValueError, match=f"{path.name}.*remove {path.name} and run that share again"): merge_set(out, progress=False)
    path.unlink()
    with pytest.raises(OSError, match=path.name): merge_set(out, progress=False)
    for s in range(2): share(out, (s, 2), **form)
    assert path.read_bytes() == data and not len(verify_set(merge_set(out, progress=False)))


def test_an_error_of_a_writer_surfaces(tmp_path, monkeypatch):
    drawn, write = [], sets.write_whole
    def full(path, data):
        if path.suffix in (".png", ".rec"): raise OSError(28, "No space left on device")
        return write(path, data)
    monkeypatch.setattr(sets, "write_whole", full)
    for form in ({}, {"form": "records"}):
        config = CONFIG | form | dict(per_subject=50)
        start_share(tmp_path/str(len(form)), config, (0, 1), environment={})
        with pytest.raises(OSError, match="No space left"):
            write_share(lambda cells: drawn.append(1) or torch.stack([colour(*c) for c in cells]), lambda i: colour(i, 0), config, tmp_path/str(len(form)), (0, 1), progress=False)
    assert len(drawn) <= 2*2                                    # of 40 batches each: the next one at most


def test_a_batch_is_written_while_the_next_is_drawn(tmp_path, monkeypatch):
    encode, calls, second, waited = sets.encode_image, [], threading.Event(), []
    monkeypatch.setattr(sets, "encode_image", lambda *a: waited.append(second.wait(20)) or encode(*a))
    def draw(cells):
        calls.append(1)
        if len(calls) > 1: second.set()
        return torch.stack([colour(*c) for c in cells])
    for form in ({}, {"form": "records"}):
        calls.clear(); second.clear()
        start_share(tmp_path/f"set{len(form)}", CONFIG | form, (0, 1), environment={})
        write_share(draw, lambda i: colour(i, 0), CONFIG | form, tmp_path/f"set{len(form)}", (0, 1), progress=False)
    assert len(waited) == 2*20 and all(waited)                   # had a batch been finished before the next was begun, it would have waited in vain


CHILD = """
import sys, time, torch
from cemiface.sets import synthesis
from cemiface.generation.conditioning import GENERATORS
from cemiface.data.faceset import FaceSet
from cemiface.generation.pipeline import untrained_pipeline
from cemiface.sets.layout import current_share
draw = synthesis.draw
synthesis.draw = lambda *a: time.sleep(.5) or draw(*a)
images = torch.randint(256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
faces = FaceSet(images, torch.arange(20), [f"p{i}" for i in range(20)], "noise")
synthesis.generate_set(untrained_pipeline(GENERATORS["smoke"]), faces, .2, 3, sys.argv[1], batch_size=4, steps=2, oversample=2, progress=False, form="records", shard=current_share())
"""


def test_two_processes_one_killed(pipe, tmp_path):
    out, kw = tmp_path/"cut", dict(faces=inquiries(20), form="records")
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(out)], env=os.environ | TORCHRUN)
    deadline = time.time() + 90
    mine = lambda: [p for p in out.glob(".shares/batch-*.rec") if int(p.stem[6:]) >= 7]       # the second share's batches
    while not mine() and child.poll() is None and time.time() < deadline: time.sleep(.002)
    make(pipe, out, shard=(0, 2), **kw)                          # beside it
    while len(mine()) < 2 and child.poll() is None and time.time() < deadline: time.sleep(.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL and 2 <= len(mine()) < 8
    with pytest.raises(ValueError, match="1 share is not finished, the first is 2/2"): merge_set(out)
    make(pipe, out, shard=(1, 2), **kw)
    assert content(merge_set(out, progress=False)) == content(make(pipe, tmp_path/"whole", **kw))
