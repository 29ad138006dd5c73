"Training a recogniser: kill and resume, hostile state files, every setting with each of its values, several processes."
import os
import shutil
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
from accelerate.tracking import GeneralTracker
from safetensors.torch import load_file, save_file

from cemiface.core.settings import changed
from cemiface.data.faceset import FaceSet
from cemiface.data.faceset import to_float as recognition_to_float
from cemiface.recognition.margins import MARGINS
from cemiface.recognition.groups import class_centres
from cemiface.recognition.training import (RECIPES, RecogniserConfig, check_same_start, embed, fresh_accelerator, load_recogniser, load_recogniser_state, save_recogniser,
                                  train_recogniser)

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
    faces.images = Images(faces.images, 1 + lookups) # one tells the set
    with pytest.raises(Stop): train(config, faces, out=out, save_seconds=0.)


RUN = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_recognition import slowly
slowly(.15, out=sys.argv[1], save_seconds=0.)
"""

@pytest.mark.slow
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


@pytest.mark.parametrize("change", [{}, {"margin": "adaface", "dropout": .3}, {"margin": "arcface", "backbone": "irse18", "augment": "flip", "decay_norms": False}])
def test_resume_at_any_batch_is_bit_identical(tmp_path, change):
    config = changed(SMALL, **change)
    for lookups in (1, 3, 2): stopped(lookups, config, tmp_path) # cut within an epoch, at its end, and within the next
    assert same(train(config, out=tmp_path), train(config))


def test_a_state_between_the_last_epoch_and_the_result(tmp_path):
    saved = []
    import cemiface.recognition.training as r
    def stop(*args): saved.append(args); raise Stop
    with pytest.MonkeyPatch.context() as m, pytest.raises(Stop):
        m.setattr(r, "save_recogniser", stop)
        train(out=tmp_path)
    assert len(saved) == 1 and (tmp_path / "state.pt").exists()
    assert same(train(out=tmp_path), plain())


def test_a_finished_training_is_loaded_and_another_one_refused(tmp_path):
    train(out=tmp_path)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("cemiface.recognition.training.backbone", None) # nothing is built
        loaded = train(out=tmp_path)
    assert same(loaded, plain())
    with pytest.raises(ValueError, match="seed=0, not 1"): train(changed(SMALL, seed=1), out=tmp_path)
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
    with pytest.raises(ValueError, match="state.pt is damaged"): load_recogniser_state(tmp_path / "state.pt", {})
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("data", [b"", b"not a state", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_state_is_named(tmp_path, data):
    (tmp_path / "state.pt").write_bytes(data)
    with pytest.raises(ValueError, match="state.pt is damaged .* delete it"): train(out=tmp_path)


def poisoned(monkeypatch, step):
    "Let the images of one step be NaN, counted from 0."
    left = [step]
    def to_float(images):
        left[0] -= 1
        return recognition_to_float(images) * (float("nan") if left[0] == -1 else 1)
    monkeypatch.setattr("cemiface.recognition.training.to_float", to_float)

@pytest.mark.parametrize("step, epoch, batch", [(2, 1, 3), (3, 1, 4), (6, 2, 3)])
def test_a_poisoned_batch_stops_the_run_and_the_same_call_goes_on(tmp_path, monkeypatch, step, epoch, batch):
    for change in ({}, {"clip": None}):
        config, out = changed(SMALL, **change), tmp_path / str(len(change))
        with monkeypatch.context() as m, pytest.raises(FloatingPointError) as e:
            poisoned(m, step)
            train(config, out=out, save_seconds=0.)
        assert f"in epoch {epoch}, batch {batch}, " in str(e.value) and f"{out / 'state.pt'} holds the last good state: the same call goes on" in str(e.value)
        state = torch.load(out / "state.pt", weights_only=True)
        assert (state["epoch"], state["batch"]) == divmod(step, 4) # everything before the poisoned batch
        assert all(v.isfinite().all() for v in (state["head"] | state["net"]).values())
        assert same(train(config, out=out), train(config))


def test_weights_that_overflow_are_never_saved(tmp_path):
    def spoil(model): model.fc.weight.data[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="fc.weight and 0 other weights are not finite after 1 epochs and 0 batches.* holds no state yet"):
        train(out=tmp_path, evaluate=lambda model: spoil(model) or {})
    assert list(tmp_path.iterdir()) == []


def test_stops_at_nan_and_keeps_the_last_good_state(tmp_path):
    wild = changed(SMALL, lr=1e12, warmup_steps=0, epochs=4)
    with pytest.raises(FloatingPointError, match=r"(learning rate 1e\+12|not finite after \d+ epochs and \d+ batches): lower lr"): train(wild, out=tmp_path, save_seconds=0.)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(v.isfinite().all() for v in (state["head"] | {k: v for k, v in state["net"].items() if "running" not in k}).values())
    assert not (tmp_path / "recogniser.json").exists()


def test_it_learns_and_reports():
    trained = train(changed(SMALL, epochs=8, augment="none"), evaluate=lambda model: {"answer": np.float64(42), "mode": model.training})
    h = trained.history
    assert list(h.columns) == ["epoch", "loss", "accuracy", "lr", "seconds", "answer", "mode"] and list(h["epoch"]) == list(range(1, 9))
    assert h["accuracy"].iloc[-1] > .9 and h["loss"].iloc[-1] < h["loss"].iloc[0] / 2 and (h["answer"] == 42).all() and (h["mode"] == 0).all()
    faces = patterns()
    emb = embed(trained.model, faces, flip=True)
    assert ((emb @ class_centres(emb, faces.labels).T).argmax(1) == faces.labels).float().mean() > .9
    assert not trained.model.training


@cache
def plain(): return train()

@pytest.mark.parametrize("change", [{"augment": "none"}, {"augment": "flip"}, {"decay_norms": False}, {"clip": None}, {"precision": "bf16"}, {"margin": "arcface"}, {"margin": "adaface"}, {"margin_m": .1}, {"margin_s": 16.},
                                    {"clip": .1}, {"lr": .01}, {"milestones": (.1,)}, {"weight_decay": .1}, {"momentum": 0.}, {"dropout": .5}, {"seed": 1}])
def test_every_setting_changes_the_result(change):
    a, b = (torch.cat([p.flatten() for p in t.model.parameters()]) for t in (train(changed(SMALL, **change)), plain()))
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



def test_names_for_settings_are_those_of_their_modules():
    assert [m for m in MARGINS if RecogniserConfig(margin=m)] == list(MARGINS)
    assert all(RecogniserConfig(**r.model_dump(mode="json")) == r for r in RECIPES.values())
    with pytest.raises(ValueError, match="belongs to margin='arcface'"): RecogniserConfig(margin_gradient=False)
    with pytest.raises(ValueError, match="frozen"): RECIPES["arcface"].epochs = 3


def test_insightfaces_form_of_the_margin_is_another_training():
    a, b = (train(changed(SMALL, margin="arcface", margin_gradient=g)) for g in (True, False))
    assert not torch.equal(a.centres, b.centres)


def test_one_step_without_weight_decay_on_norms():
    "Independent arithmetic: with no rate but decay, one step leaves a spared weight where it was."
    faces, seen = patterns(each=4), {}
    start = train(changed(SMALL, epochs=1, lr=1e-30), faces).model.state_dict()
    for decay_norms in (True, False):
        config = changed(SMALL, epochs=1, weight_decay=1e3, clip=1e-30, decay_norms=decay_norms, warmup_steps=0, lr=1e-5)
        seen[decay_norms] = train(config, faces).model.state_dict()
    for key in ("bn1.weight", "layer1.0.bn1.weight", "layer4.0.downsample.1.weight"):
        torch.testing.assert_close(seen[False][key], start[key])
        torch.testing.assert_close(seen[True][key], start[key] * (1 - 1e-5 * 1e3))
    for key in ("conv1.weight", "prelu.weight", "fc.weight", "fc.bias"):
        for state in seen.values(): torch.testing.assert_close(state[key], start[key] * (1 - 1e-5 * 1e3))


def test_the_backbones_gradient_is_clipped_alone():
    "As in InsightFace: with next to no gradient the backbone stays where it was, and the classes move as without a limit."
    step = lambda **change: train(changed(SMALL, epochs=1, batch_size=len(patterns(each=4)), weight_decay=0., warmup_steps=0, **change), patterns(each=4))
    start, clipped, free = step(lr=1e-30), step(clip=1e-30), step(clip=None)
    for key in ("conv1.weight", "fc.weight", "bn1.weight"): torch.testing.assert_close(clipped.model.state_dict()[key], start.model.state_dict()[key])
    assert not torch.equal(free.model.state_dict()["conv1.weight"], start.model.state_dict()["conv1.weight"])
    assert torch.equal(clipped.centres, free.centres) and not torch.equal(clipped.centres, start.centres)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="a minute of C++ on a CPU"))])
def test_compiled_is_the_same_training(tmp_path, monkeypatch, backend):
    compile, calls = torch.nn.Module.compile, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: calls.append(net) or compile(net, backend=backend))
    compiled = train(changed(SMALL, epochs=1, compile=True), out=tmp_path, evaluate=lambda model: {"mean": embed(model, patterns()).mean()})
    eager = train(changed(SMALL, epochs=1))
    assert len(calls) == 1 # by one of the two
    np.testing.assert_allclose(compiled.history["loss"], eager.history["loss"], rtol=1e-4)
    torch.testing.assert_close(compiled.centres, eager.centres, atol=1e-3, rtol=0)
    assert torch.equal(embed(load_recogniser(tmp_path).model, patterns()), embed(compiled.model, patterns()))


class Notes(GeneralTracker):
    name, requires_logging_directory, main_process_only = "notes", False, True
    def __init__(self): super().__init__(); self.entries, self.finished = [], 0
    @property
    def tracker(self): return self.entries
    def store_init_configuration(self, values): self.settings = values
    def log(self, values, step=None, **_): self.entries.append((step, values))
    def finish(self): self.finished += 1

def test_trackers_hear_of_steps_and_epochs(tmp_path):
    notes = Notes()
    trained = train(evaluate=lambda model: {"AVG": 50.}, log_with=notes, log_steps=3)
    assert same(trained, plain().__class__(**(vars(plain()) | {"history": plain().history.assign(AVG=50.)})))
    assert [(step, sorted(values)) for step, values in notes.entries] == [
        (0, ["accuracy", "loss", "lr"]), (3, ["accuracy", "loss", "lr"]), (3, ["AVG", "epoch"]), (6, ["accuracy", "loss", "lr"]), (7, ["AVG", "epoch"])]
    assert notes.settings["backbone"] == "ir18" and notes.finished == 1
    heard = []
    every = Notes()
    train(log_with=every, log_steps=1)
    for epoch in range(2): heard.append(np.mean([v["loss"] for s, v in every.entries if "loss" in v and s // 4 == epoch]))
    np.testing.assert_allclose(heard, plain().history["loss"], rtol=1e-6)


def test_a_narrow_network_of_large_images_trains(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from test_recognition import SMALL, changed, patterns, train\n"
            "train(changed(SMALL, size=112, epochs=1, batch_size=4), patterns(2, 2, 112))")
    assert subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)]).returncode == 0 # torch's own convolutions end the process otherwise


def test_processes_that_start_apart_are_refused(tmp_path):
    class Two:
        device = "cpu"
        def gather(self, x): return torch.cat([x, x + 3])
    with pytest.raises(ValueError, match=r"steps 4, 7.*all machines share"): check_same_start(Two(), 4, tmp_path)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    assert same(train(out=tmp_path, log_with="tensorboard", log_steps=4), plain())
    assert list((tmp_path / "recogniser").glob("events*"))
    with pytest.raises(ValueError, match="logging_dir"): train(log_with="tensorboard") # no folder to write to
    fresh_accelerator("no")


def test_what_a_checkpoint_does_not_bring_is_left_out(tmp_path):
    trained = plain()
    saved = save_recogniser(tmp_path, type(trained)(trained.model, None, trained.history[:0], None, {"file": "a.ckpt"}))
    again = load_recogniser(saved)
    assert (again.centres, again.config, again.source, len(again.history)) == (None, None, {"file": "a.ckpt"}, 0)
    with pytest.raises(ValueError, match="another folder"): train(out=tmp_path)


@pytest.mark.parametrize("name", ["recogniser.json", "model/config.json", "model/diffusion_pytorch_model.safetensors", "centres.safetensors"])
def test_a_damaged_recogniser_is_named(tmp_path, name):
    save_recogniser(tmp_path, plain())
    (tmp_path / name).write_bytes(b"{junk")
    with pytest.raises(ValueError, match="a file of the recogniser is damaged"): load_recogniser(tmp_path)


@pytest.mark.parametrize("name, value, says", [("layer1.0.bn1.running_var", -1., "1 variances below zero .layer1.0.bn1.running_var"), ("fc.weight", float("nan"), "1 not finite numbers .fc.weight"),
                                               (None, float("inf"), "class centres that are not finite")])
def test_weights_that_no_training_leaves_behind(tmp_path, name, value, says):
    "As of a public checkpoint, so of a folder: a variance below zero makes every embedding NaN."
    path = save_recogniser(tmp_path, plain()) / ("model/diffusion_pytorch_model.safetensors" if name else "centres.safetensors")
    tensors = load_file(path)
    tensors[name or "centres"].view(-1)[0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"a file of the recogniser is damaged .*{says}"): load_recogniser(tmp_path)


def test_a_recogniser_without_its_model_asks_no_server(tmp_path, monkeypatch):
    shutil.rmtree(save_recogniser(tmp_path, plain()) / "model")
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: 1 / 0)
    with pytest.raises(ValueError, match="a file of the recogniser is damaged .*config.json"): load_recogniser(tmp_path)


def test_what_is_evaluated_is_what_is_kept():
    seen = []
    trained = train(changed(SMALL, precision="bf16"), evaluate=lambda model: seen.append(embed(model, patterns())) or {})
    assert torch.equal(embed(trained.model, patterns()), seen[-1])


def test_embedding_in_half_precision():
    trained, faces = plain(), patterns()
    half, full = embed(trained.model, faces, precision="bf16"), embed(trained.model, faces)
    assert half.dtype == torch.float32 and not torch.equal(half, full) and (half * full).sum(1).min() > .98


SHARED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_recognition import JOINT, changed, patterns, train
train(JOINT, out=sys.argv[1])
train(changed(JOINT, precision="bf16", epochs=1), patterns(each=4), out=sys.argv[1] + "/half")
train(changed(JOINT, joint_norms=False, epochs=1), patterns(each=4), out=sys.argv[1] + "/apart")
"""
JOINT = changed(SMALL, margin="adaface", backbone="irse18", lr=.02) # at .05 weights that differ by 1e-7 end with losses that differ by 1e-3

def processes(folder, world):
    "Run SHARED in several processes, and wait for them."
    (folder / "run.py").write_text(SHARED)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, str(folder / "run.py"), str(folder), str(Path(__file__).parent)]
    runs = [subprocess.Popen(command, env=env | {"RANK": str(k), "LOCAL_RANK": str(k)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in range(world)]
    try: results = [run.communicate(timeout=300) for run in runs]
    finally: [run.kill() for run in runs]
    assert [run.returncode for run in runs] == [0] * world, results

@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path):
    processes(tmp_path, 2)
    two, one = load_recogniser(tmp_path), train(JOINT)
    half = train(changed(JOINT, epochs=1), patterns(each=4)) # in full precision
    assert load_recogniser(tmp_path / "half").history["loss"][0] == pytest.approx(half.history["loss"][0], rel=.02)
    apart = train(changed(JOINT, joint_norms=False, epochs=1), patterns(each=4)) # a batch of 16 is not two of 8
    assert load_recogniser(tmp_path / "apart").history["loss"][0] != pytest.approx(apart.history["loss"][0], rel=1e-3)
    np.testing.assert_allclose(two.history[["loss", "accuracy"]], one.history[["loss", "accuracy"]], rtol=1e-5)
    torch.testing.assert_close(two.centres, one.centres, atol=1e-4, rtol=0)
    for key, value in one.model.state_dict().items(): torch.testing.assert_close(two.model.state_dict()[key], value, atol=1e-3, rtol=1e-3)
