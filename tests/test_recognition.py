"Training a recogniser: kill and resume, hostile state files, every setting with each of its values, several processes."
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from cemiface.data import FaceSet
from cemiface.recognition import RecogniserConfig, class_centres, embed, load_recogniser, load_state, train_recogniser

SMALL = RecogniserConfig(backbone="ir18", size=16, width=4, emb_dim=16, epochs=2, batch_size=16, lr=.05)


def patterns(subjects=4, each=16, size=16):
    "Subjects that differ in a coarse pattern, images that differ in noise."
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(subjects).repeat_interleave(each)
    coarse = torch.randint(40, 216, (subjects, 3, 4, 4), generator=g).float()
    images = torch.nn.functional.interpolate(coarse, size=size)[labels] + 25 * torch.randn(len(labels), 3, size, size, generator=g)
    return FaceSet(images.clamp(0, 255).to(torch.uint8), labels, [str(i) for i in range(subjects)], "patterns")


def train(config=SMALL, faces=None, **kwargs): return train_recogniser(faces or patterns(), config, progress=False, **kwargs)

def same(a, b):
    return (all(torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True))
            and torch.equal(a.centres, b.centres) and a.history.drop(columns="seconds").equals(b.history.drop(columns="seconds")))


class Stop(Exception): pass

class Images:
    "Images of which the n-th look-up fails, or each takes a while."
    def __init__(self, images, lookups=10**9, seconds=0.): self.images, self.shape, self.left, self.seconds = images, images.shape, lookups, seconds
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        time.sleep(self.seconds)
        self.left -= 1
        if self.left < 0: raise Stop
        return self.images[i]

def slowly(seconds, **kwargs):
    faces = patterns()
    faces.images = Images(faces.images, seconds=seconds)
    return train(faces=faces, **kwargs)

def stopped(lookups, config, out):
    faces = patterns()
    faces.images = Images(faces.images, lookups)
    with pytest.raises(Stop): train(config, faces, out=out, save_seconds=0.)


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_recognition import slowly
slowly(.15, out=sys.argv[1], save_seconds=0.)
"""

def test_kill_and_resume_is_bit_identical(tmp_path):
    run = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path), str(Path(__file__).parent)])
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "state.pt").exists() and run.poll() is None and time.monotonic() < deadline: time.sleep(.01)
        time.sleep(.2)
    finally: run.kill() # SIGKILL
    assert run.wait() == -signal.SIGKILL
    state = torch.load(tmp_path / "state.pt", weights_only=True) # whole, whenever the kill came
    assert (state["epoch"], state["batch"]) != (0, 0) and state["epoch"] < SMALL.epochs
    (tmp_path / ".state.pt.12345.part").write_bytes(b"left by a killed process")
    resumed = train(out=tmp_path)
    assert same(resumed, plain())
    assert same(resumed, load_recogniser(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["centres.safetensors", "history.csv", "model", "recogniser.json"]


@pytest.mark.parametrize("change", [{}, {"margin": "adaface", "dropout": .3}, {"margin": "arcface", "backbone": "irse18", "augment": False}])
def test_resume_at_any_batch_is_bit_identical(tmp_path, change):
    config = SMALL.model_copy(update=change)
    for lookups in (1, 3, 2): stopped(lookups, config, tmp_path) # cut within an epoch, at its end, and within the next
    assert same(train(config, out=tmp_path), train(config))


def test_a_state_between_the_last_epoch_and_the_result(tmp_path):
    saved = []
    import cemiface.recognition as r
    def stop(*args): saved.append(args); raise Stop
    with pytest.MonkeyPatch.context() as m, pytest.raises(Stop):
        m.setattr(r, "save_recogniser", stop)
        train(out=tmp_path)
    assert len(saved) == 1 and (tmp_path / "state.pt").exists()
    assert same(train(out=tmp_path), plain())


def test_a_finished_training_is_loaded_and_another_one_refused(tmp_path):
    train(out=tmp_path)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("cemiface.recognition.backbone", None) # nothing is built
        loaded = train(out=tmp_path)
    assert same(loaded, plain())
    with pytest.raises(ValueError, match="seed=0, not 1"): train(SMALL.model_copy(update={"seed": 1}), out=tmp_path)
    with pytest.raises(ValueError, match="subjects=4, not 8"): train(faces=patterns(8, 8), out=tmp_path)


def test_no_state_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train()
    assert list(tmp_path.iterdir()) == []


class Payload:
    def __reduce__(self): return os.mkdir, ("hacked",)

def test_a_hostile_state_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"run": Payload()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt is damaged"): load_state(tmp_path / "state.pt", {})
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("data", [b"", b"not a state", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_state_is_named(tmp_path, data):
    (tmp_path / "state.pt").write_bytes(data)
    with pytest.raises(ValueError, match="state.pt is damaged .* delete it"): train(out=tmp_path)


def test_stops_at_nan_and_keeps_the_last_good_state(tmp_path):
    wild = SMALL.model_copy(update={"lr": 1e12, "warmup_steps": 0, "epochs": 4})
    with pytest.raises(FloatingPointError, match=r"epoch \d+, batch \d+, learning rate 1e\+12: lower lr"): train(wild, out=tmp_path, save_seconds=0.)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(v.isfinite().all() for v in (state["head"] | {k: v for k, v in state["net"].items() if "running" not in k}).values())
    assert not (tmp_path / "recogniser.json").exists()


def test_it_learns_and_reports():
    trained = train(SMALL.model_copy(update={"epochs": 8, "augment": False}), evaluate=lambda model: {"answer": np.float64(42), "mode": model.training})
    h = trained.history
    assert list(h.columns) == ["epoch", "loss", "accuracy", "seconds", "answer", "mode"] and list(h["epoch"]) == list(range(1, 9))
    assert h["accuracy"].iloc[-1] > .9 and h["loss"].iloc[-1] < h["loss"].iloc[0] / 2 and (h["answer"] == 42).all() and (h["mode"] == 0).all()
    faces = patterns()
    emb = embed(trained.model, faces, flip=True)
    assert ((emb @ class_centres(emb, faces.labels).T).argmax(1) == faces.labels).float().mean() > .9
    assert not trained.model.training


@cache
def plain(): return train()

@pytest.mark.parametrize("change", [{"augment": False}, {"precision": "bf16"}, {"margin": "arcface"}, {"margin": "adaface"}, {"margin_m": .1}, {"margin_s": 16.},
                                    {"clip": .1}, {"lr": .01}, {"milestones": (.1,)}, {"weight_decay": .1}, {"momentum": 0.}, {"dropout": .5}, {"seed": 1}])
def test_every_setting_changes_the_result(change):
    a, b = (torch.cat([p.flatten() for p in t.model.parameters()]) for t in (train(SMALL.model_copy(update=change)), plain()))
    assert a.shape == b.shape and a.isfinite().all() and not torch.equal(a, b)


def test_images_are_looked_up_in_the_same_way_from_a_lazy_collection():
    faces = patterns()
    faces.images = Images(faces.images)
    assert same(train(faces=faces), plain())


def test_embedding_does_not_depend_on_the_batch():
    trained, faces = train(), patterns()
    one, many = embed(trained.model, faces, batch_size=1), embed(trained.model, faces.images, batch_size=256)
    torch.testing.assert_close(one, many, atol=1e-5, rtol=0)
    torch.testing.assert_close(one.norm(dim=1), torch.ones(len(faces)))


SHARED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_recognition import SMALL, train
trained = train(SMALL.model_copy(update={"epochs": 1, "augment": False}), out=sys.argv[1])
print("sum", sum(p.double().sum() for p in trained.model.parameters()).item(), flush=True)
"""

def test_two_processes_share_a_batch(tmp_path):
    (tmp_path / "run.py").write_text(SHARED)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "out"), str(Path(__file__).parent)]
    runs = [subprocess.Popen(command, env=env | {"RANK": k, "LOCAL_RANK": k}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in "01"]
    try: results = [run.communicate(timeout=300) for run in runs]
    finally: [run.kill() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    sums = [[line for line in out.splitlines() if line.startswith("sum")] for out, _ in results]
    assert sums[0] == sums[1] and len(sums[0]) == 1 # the same weights on both
    assert len(load_recogniser(tmp_path / "out").history) == 1
