"`cemiface reproduce`: a subset at the smallest size, killed and continued, answered from the cache, with a failure on the way."
import hashlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from cemiface.core.settings import changed
from cemiface.generation import shipped
from cemiface.study import experiments, models, study as studies
from cemiface.recognition.backbones import backbone, forward_flops
from cemiface.generation.conditioning import GENERATORS
from cemiface.generation.diffusion import SAMPLERS
from cemiface.data.faceset import open_faces
from cemiface.generation.shipped import load_beside
from cemiface.sets.synthesis import draw
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study
from cemiface.study.tasks import in_order
from cemiface.generation.pipeline import CemiFacePipeline, untrained_pipeline
from cemiface.core.report import Finding
from cemiface.study.plan import bench_rates
from cemiface.study.pack import pack
from cemiface.paper.reproduce import reproduce

COMMAND = [sys.executable, "-c", "from cemiface.cli.app import app; app()", "reproduce", "--profile", "smoke", "--seeds", "1",
           "table1", "fig2", "--jobs", "2"]
pytestmark = pytest.mark.slow


def finished(out):
    return {p.parent: p.stat().st_mtime_ns for p in (out / "cache").rglob("job.pkl")}


def command(out, **how):
    return subprocess.run([*COMMAND, "--out", str(out)], capture_output=True, text=True, timeout=170, **how)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    "The folder of a run that was killed after its fifth step and then given again; with what stood before and the second run's words."
    out = tmp_path_factory.mktemp("out")
    run = subprocess.Popen([*COMMAND, "--out", str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while len(finished(out)) < 5 and run.poll() is None: time.sleep(.02)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = finished(out)
    done = command(out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, before, done.stdout + done.stderr


def test_goes_on_after_kill(killed):
    out, before, said = killed
    after = finished(out)
    assert 5 <= len(before) < len(after)
    assert all(after[p] == t for p, t in before.items())  # what was finished was not made again
    todo = int(re.search(r"\[1/(\d+)\]", said)[1])
    assert todo == len(after) - len(before)


def test_ends_where_an_undisturbed_run_ends(killed, tmp_path):
    out, _, _ = killed
    found = reproduce("smoke", ["table1"], tmp_path, seeds=1, say=lambda line: None)
    again = pd.read_csv(out / "smoke" / "tables" / "table1.csv")
    pd.testing.assert_frame_equal(found["table1"].table.astype(float), again.astype(float))


def test_second_run_answers_from_the_cache(killed):
    out, _, _ = killed
    before, start = finished(out), resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = command(out)
    assert done.returncode == 0 and finished(out) == before
    assert "in the cache" in done.stdout + done.stderr and "to do" not in done.stdout + done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 20  # seconds of work, most of it importing torch


def test_the_page_holds_everything(killed):
    folder = killed[0] / "smoke"
    page = (folder / "index.html").read_text()
    assert "proc-LFW" in page and "data:image/png;base64," in page and 'src="http' not in page
    assert "smoke" in page and "Not made" not in page
    assert (folder / "figures" / "figure2.png").stat().st_size > 2000
    table = pd.read_csv(folder / "tables" / "table1.csv")
    assert len(table) == 5 and {"proc-LFW", "LFW published", "AVG", "AVG published"} <= set(table.columns)
    assert (folder / "tables" / "table1.md").read_text().count("\n") == 7
    assert "Table 1" in killed[2] and str(folder) in killed[2]


def test_a_killed_worker_is_named(tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    with open(said, "w") as file:
        run = subprocess.Popen([*COMMAND, "--out", str(out)], stdout=file, stderr=subprocess.STDOUT)
        while len(finished(out)) < 2 and run.poll() is None: time.sleep(.02)
        workers = subprocess.run(["pgrep", "-P", str(run.pid), "-f", "spawn_main"], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[0]), signal.SIGKILL)
        assert run.wait(120) == 1
    assert "its process was killed" in said.read_text() and "Not made" in (out / "smoke" / "index.html").read_text()


def test_workers_end_with_their_parent(tmp_path):
    run = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(finished(tmp_path)) < 1 and run.poll() is None: time.sleep(.02)
    workers = [int(p) for p in subprocess.run(["pgrep", "-P", str(run.pid), "-f", "spawn_main"], capture_output=True, text=True).stdout.split()]
    assert len(workers) == 2
    run.kill()
    run.wait()
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{p}") for p in workers): break
        time.sleep(.1)
    assert not any(os.path.exists(f"/proc/{p}") for p in workers)


def test_a_failure_is_named_and_the_rest_goes_on(killed, monkeypatch):
    out, said = killed[0], []
    def fails(*args, **kwargs): raise OSError("no space left on device")
    monkeypatch.setattr(experiments, "generate_set", fails)
    profile = changed(PROFILES["smoke"], ms=(1.0, 0.0))
    found = reproduce(profile, ["table11", "table9"], out, seeds=1, say=said.append)
    assert isinstance(found["table9"], Finding)
    assert found["table11"].startswith("Not made: set of") and "no space left" in found["table11"]
    assert "Not made" in (out / "smoke" / "index.html").read_text()
    monkeypatch.undo()
    found = reproduce(profile, ["table11"], out, seeds=1, say=said.append)  # tried again
    assert isinstance(found["table11"], Finding) and len(found["table11"].table) == 2
    assert isinstance(found["table1"], Finding)  # of the run before: the page keeps it


def test_ctrl_c_keeps_what_is_done(tmp_path, monkeypatch):
    said = []
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(models, "train_recogniser", stop)
    with pytest.raises(SystemExit) as end: reproduce("smoke", ["table9"], tmp_path, seeds=1, say=said.append)
    assert end.value.code == 130 and "same command goes on" in said[-1]
    assert len(finished(tmp_path)) == 1  # the faces


def test_shipped_weights_are_used_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "shipped_pipeline", lambda: untrained_pipeline(GENERATORS["smoke"]))
    monkeypatch.setattr(studies, "shipped_hash", lambda *parts: "0123456789ab")
    monkeypatch.setattr(models, "shipped_centres", lambda: torch.nn.functional.normalize(torch.randn(12, 512)))
    shipped.shipped_models.cache_clear()
    profile = changed(PROFILES["smoke"], shipped=True)
    found = reproduce(profile, ["control", "table9"], tmp_path, seeds=1, say=lambda line: None)
    shipped.shipped_models.cache_clear()
    assert all(isinstance(f, Finding) for f in found.values()), found
    assert "classification weight" in found["table9"].text and list(found["control"].table.m) == sorted(profile.control_ms, reverse=True)
    assert "shipped with the package" in (tmp_path / "smoke" / "index.html").read_text()
    assert not list(tmp_path.rglob("*Generator*/*/train"))  # nothing was trained
    other = Study(profile, tmp_path, from_scratch=True)
    assert other.name == "smoke-from-scratch" and other.generator().infra.uid() != Study(profile, tmp_path).generator().infra.uid()


def test_the_baseline_of_the_package_is_taken_where_weights_are_shipped(tmp_path):
    task = Study("laptop", tmp_path).baseline()
    parts = [f for name in ("unet", "conditioner", "bank") for f in (shipped.WEIGHTS / "dcface" / name).glob("*.safetensors")]
    assert task.shipped == hashlib.sha256(b"".join(f.read_bytes() for f in parts)).hexdigest()[:12] and task.work() == ("load", 1)
    pipe = task.load()
    assert pipe is shipped.shipped_baseline() and pipe.recogniser.config == shipped.shipped_models().recogniser.config
    assert not list(tmp_path.rglob("train"))
    scratch = Study("laptop", tmp_path, from_scratch=True)
    assert scratch.baseline().config == PROFILES["laptop"].dcface and scratch.baseline().generator is scratch.generator()


def test_a_change_up_the_chain_means_another_task(tmp_path):
    small = Study("smoke", tmp_path)
    other = Study(changed(PROFILES["smoke"], per_subject=21), tmp_path)
    uids = [{t.infra.uid() for t in in_order([s.set_training(0.0, 0), s.benchmarks()])} for s in (small, other)]
    assert uids[0] & uids[1] == {small.benchmarks().infra.uid()}  # only the benchmarks do not hang on the faces
    assert small.set_training(0.0, 0).infra.uid() != small.set_training(0.0, 1).infra.uid()


def test_a_recogniser_is_trained_on_a_set_of_the_baseline(killed):
    study = Study("smoke", killed[0], seeds=1)
    task = study.set_training(None, 0)
    assert {"baseline, preset smoke", "set of 48 images of 8 by DCFace, seed 0", "recogniser on the set by DCFace, seed 0"} <= {t.title for t in in_order([task])}
    found = task.run()
    assert found["images"] == 8 * (6 + 2) and found["subjects"] == 8 and 0 <= found["accuracy"]["AVG"] <= 100
    table = pd.read_csv(task.generated.set_folder / "manifest.csv")
    assert table.m.isna().all() and (table.sampler != "inquiry").sum() == 48
    kept, cemi = study.samples(3, 2, (None,)).load(), study.samples(3, 2, (0.0,)).load()
    assert kept["images"].shape == cemi["images"].shape == (1, 3, 2, 3, 16, 16) and not torch.equal(kept["images"], cemi["images"])
    drawn = open_faces(task.generated.set_folder, 16)  # an image's seed is that of its place, in samples as in sets
    assert (drawn.images[drawn.labels == 0][:2].int() - kept["images"][0, 0].int()).abs().max() <= 1
    start, own = study.generator().load().unet.state_dict(), study.baseline().load().unet.state_dict()
    assert all(a.shape == b.shape for a, b in zip(start.values(), own.values(), strict=True)) and any(not torch.equal(a, b) for a, b in zip(start.values(), own.values()))


def test_packed_weights_are_what_was_trained(killed, tmp_path, monkeypatch):
    study = Study("smoke", killed[0], seeds=1)
    card = pack(study, tmp_path)
    pipe = CemiFacePipeline.from_pretrained(tmp_path / "generator", dtype=torch.float32)
    trained, (_, centres) = study.generator().load(), study.recogniser().load()
    for name in ("unet", "conditioner"):
        for a, b in zip(getattr(pipe, name).parameters(), getattr(trained, name).parameters(), strict=True):
            assert a.dtype == torch.float32 and torch.equal(a, b.half().float())
    assert all(torch.equal(a, b.half().float() if b.is_floating_point() else b) for a, b in zip(pipe.recogniser.state_dict().values(), trained.recogniser.state_dict().values(), strict=True))
    assert torch.equal(load_file(tmp_path / "centres.safetensors")["centres"], centres.half())
    assert torch.allclose(pipe.scheduler.alphas_cumprod, trained.scheduler.alphas_cumprod)
    assert not any(str(killed[0]) in path.read_text() for path in tmp_path.rglob("*.json"))  # no path of the machine that packed it
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors", ".py", ".md"}  # code and card beside the generator's weights
    baseline, own = load_beside(tmp_path / "dcface", pipe), study.baseline().load()
    for name in ("unet", "conditioner", "bank"):
        assert all(torch.equal(a, b.half().float()) for a, b in zip(getattr(baseline, name).parameters(), getattr(own, name).parameters(), strict=True))
    assert card["dcface"]["steps"] == 30 and card["dcface"]["styles"] == 240 and -1 <= card["dcface"]["achieved"] <= 1
    assert list(card["achieved"]) == ["1", "0.6", "0.3", "0", "-0.3", "-0.6", "-1"] and 0 <= card["recogniser_accuracy"]["AVG"] <= 100
    # every sampler is calibrated, and half precision moves a picture by less than a grey level on average
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    packed, asked = shipped.shipped_pipeline(), study.inquiries().load()["emb"][:4]
    assert {c["sampler"] for c in packed.config.calibration["second"]} == {cls.__name__ for cls in SAMPLERS.values()}
    before, after = (draw(p, asked, 0., list(range(4)), 4).float() for p in (trained, packed))
    assert (before - after).abs().mean() < 1
    assert shipped.shipped_dcface().bank.config.images == min(512, own.bank.config.images)


def test_plan_without_running(tmp_path):
    said = []
    assert reproduce("smoke", ["table1", "figure2"], tmp_path / "out", seeds=1, say=said.append, dry_run=True) == {}
    words = "\n".join(said)
    assert "10 to do" not in words and "5 to do" in words and not (tmp_path / "out").exists()
    table1, figure2 = (line.split() for line in words.splitlines()[-2:])
    assert table1[0] == "table1:" and figure2[0] == "figure2:" and figure2[-1] == "-"  # figure 2 reads what table 1 has made


def test_plan_for_another_machine(tmp_path):
    paper = PROFILES["paper"]
    rows = dict(machine={}, sampling=[dict(configuration="paper", steps=20, images_per_s=v) for v in (200., 260.)] + [dict(configuration="laptop", steps=20, images_per_s=1e6)],
                training=[dict(configuration="paper", images_per_s=1000.), dict(backbone="irse50", size=112, images_per_s=2000., gflop_per_image=38.)], steps=[dict(sampler="DDIM")])
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    rates = bench_rates(paper, [tmp_path / "bench.json"])
    assert rates["denoise"] == pytest.approx(1 / (260 * 20)) and rates["simmat"] == pytest.approx(1e-3) and "embed" not in rates
    assert rates["train"] == pytest.approx(3 * forward_flops(backbone("irse50", 112, 64)) / (2000 * 38e9))
    (tmp_path / "note.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="note.json is a text, not a file of cemiface bench: give its JSON"): bench_rates(paper, [tmp_path / "note.json"])


def test_paper_profile_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="--dry-run"): reproduce("paper", ["table1"], tmp_path, say=lambda line: None)
