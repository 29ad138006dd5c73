"The command line on a user's own folder of JPEGs, errors included."
import json
import os
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from cemiface.cli import app

TINY = ("--backbone", "ir18", "--width", 8, "--size", 16, "--epochs", 2, "--batch-size", 16, "--lr", 0.02)


def run(*words):
    return CliRunner(env=dict(NO_COLOR="1", TERM="dumb")).invoke(app, [str(w) for w in words])


def ok(*words):
    answer = run(*words)
    assert answer.exit_code == 0, answer.output
    return answer.output


def error(status, *words):
    "The one line of an error."
    answer = run(*words)
    assert answer.exit_code == status, answer.output
    lines = answer.output.strip().splitlines()
    assert "Traceback" not in answer.output and lines[-1].startswith(f"cemiface {words[0]}: "), answer.output
    return lines[-1]


def write_jpegs(root, subjects=4, each=8):
    rng = np.random.default_rng(0)
    for s in range(subjects):
        face = rng.integers(0, 255, (5, 5, 3))
        for k in range(each):
            pixels = np.clip(np.kron(face, np.ones((8, 8, 1))) + rng.normal(0, 12, (40, 40, 3)), 0, 255).astype(np.uint8)
            path = root / f"person {s}" / f"{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=95)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_jpegs(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "recogniser"
    assert "32 images of 4 subjects" in ok("train-recogniser", "--data", folder, "--out", out, *TINY)
    return out


@pytest.fixture(scope="module")
def generator(folder, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("models") / "generator"
    ok("train-generator", "--data", folder, "--recogniser", model, "--out", out, "--preset", "smoke", "--steps", 3, "--batch-size", 8)
    return out


def test_defaults_fit_a_small_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("train-recogniser", "--data", folder, *TINY[:8])  # neither batch size nor learning rate given
    config = json.loads((tmp_path / "my_recogniser" / "recogniser.json").read_text())["config"]
    assert config["batch_size"] == 8 and config["lr"] == pytest.approx(.1 * 8 / 512)
    ok("groups", "--data", folder, "--model", "my_recogniser", "--n-groups", 4)
    assert (tmp_path / "my_groups" / "groups.csv").exists()


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from cemiface.cli import app\ntry: app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout and "train-recogniser" in done.stdout


def test_verify_own_folder(folder, model, tmp_path):
    words = ("verify", "--model", model, "--data", folder, "--pairs", 40, "--out", tmp_path / "table.csv")
    first = ok(*words)
    assert first == ok(*words)  # pairs are seeded
    table = pd.read_csv(tmp_path / "table.csv", index_col=0)
    assert list(table.index) == [folder.name, "AVG"] and 0 <= table.accuracy.iloc[0] <= 100 and table.pairs.iloc[0] == 40


def test_groups_of_own_folder(folder, model, tmp_path):
    out = tmp_path / "groups"
    assert "32 images of 4 subjects" in ok("groups", "--data", folder, "--model", model, "--out", out, "--n-groups", 4)
    images = pd.read_csv(out / "images.csv")
    assert sorted(images.groupby(["subject", "group"]).size().unique()) == [2]  # 8 images, 4 groups
    assert all(os.path.exists(p) and f"/{s}/" in p for p, s in zip(images.image, images.subject))
    means = images.groupby("group").cos.mean()
    assert means.is_monotonic_decreasing
    assert np.allclose(means, pd.read_csv(out / "groups.csv").avg_sim, atol=1e-5)
    assert Image.open(out / "groups.png").size[0] > 100


def test_generate_and_go_on(folder, generator, tmp_path):
    out = tmp_path / "set"
    words = ("generate", "--inquiry", folder, "--m", 0, "--per-subject", 3, "--out", out, "--model", generator, "--steps", 2, "--oversample", 1)
    assert "4 subjects of 3 images at m = 0" in ok(*words)
    made = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert len(made) == 4 * (3 + 1) and all(Image.open(p).size == (16, 16) for p in made)
    lost = sorted(made)[1]
    lost.unlink()
    ok(*words)
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == made
    assert "another" in error(2, *words, "--seed", 1)


def test_generate_from_loose_images(folder, generator, tmp_path):
    out = tmp_path / "set"
    said = ok("generate", "--inquiry", folder / "person 0", "--per-subject", 1, "--out", out, "--model", generator, "--steps", 1,
              "--subjects", 3, "--oversample", 0, "--m", "-0.5")
    assert "3 subjects of 1 images at m = -0.5" in said and len(list(out.rglob("*.png"))) == 3


def test_the_same_training_command_goes_on(folder, model):
    before = (model / "centres.safetensors").read_bytes()
    start = time.perf_counter()
    ok("train-recogniser", "--data", folder, "--out", model, *TINY)
    assert (model / "centres.safetensors").read_bytes() == before
    assert time.perf_counter() - start < 10
    assert "another seed" in error(2, "train-recogniser", "--data", folder, "--out", model, *TINY, "--seed", 5)


def test_empty_folder(tmp_path):
    (tmp_path / "none").mkdir()
    for command in ("train-recogniser", "generate"):
        option = "--inquiry" if command == "generate" else "--data"
        if command == "train-recogniser":
            assert str(tmp_path / "none") in error(2, command, option, tmp_path / "none", "--out", tmp_path / "out", *TINY)
    assert not (tmp_path / "out").exists()
    assert "there is no folder" in error(2, "train-recogniser", "--data", tmp_path / "gone", "--out", tmp_path / "out")


def test_generate_from_an_empty_folder(generator, tmp_path):
    (tmp_path / "none").mkdir()
    assert str(tmp_path / "none") in error(2, "generate", "--inquiry", tmp_path / "none", "--out", tmp_path / "out", "--model", generator)


def test_subject_with_one_image(model, tmp_path):
    data = write_jpegs(tmp_path / "faces")
    Image.new("RGB", (40, 40)).save((data / "alone.jpg"))
    (data / "alone").mkdir()
    (data / "alone.jpg").rename(data / "alone" / "0.jpg")
    for words in (("train-recogniser", "--data", data, "--out", tmp_path / "a", *TINY), ("groups", "--data", data, "--model", model, "--out", tmp_path / "b"),
                  ("verify", "--data", data, "--model", model)):
        assert "alone (1)" in error(2, *words)


def test_unreadable_image_is_named(tmp_path):
    data = write_jpegs(tmp_path / "faces")
    bad = data / "person 1" / "3.jpg"
    bad.write_bytes(b"not an image")
    words = ("train-recogniser", "--data", data, "--out", tmp_path / "out", *TINY)
    assert str(bad) in error(2, *words, "--strict")
    answer = ok(*words)
    assert f"left out: {bad}" in answer.replace("\n", "") or str(bad) in answer
    assert "31 images of 4 subjects" in answer


@pytest.mark.parametrize("m", ["1.5", "-1.01", "nan"])
def test_m_outside(m, tmp_path):
    assert "[-1, 1]" in error(2, "generate", "--inquiry", "proc:ddpm", "--m", m, "--out", tmp_path / "out")


def test_unknown_world_and_profile(tmp_path):
    assert "casia" in error(2, "train-recogniser", "--data", "proc:mars", "--out", tmp_path / "out", *TINY)
    assert "laptop" in error(2, "reproduce", "--profile", "huge", "--out", tmp_path / "out")
    assert "table11" in error(2, "reproduce", "--profile", "smoke", "--results", "table99", "--out", tmp_path / "out")
    assert "CASIA-WebFace" in error(2, "reproduce", "--profile", "paper", "--out", tmp_path / "out")


def test_missing_models(folder, tmp_path):
    assert "train-recogniser" in error(2, "verify", "--model", tmp_path / "none")
    assert "train-generator" in error(2, "generate", "--inquiry", folder, "--model", tmp_path, "--out", tmp_path / "out")


def test_output_in_use(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not empty" in error(2, "train-recogniser", "--data", folder, "--out", tmp_path, *TINY)
    assert "is a file" in error(2, "train-recogniser", "--data", folder, "--out", tmp_path / "thesis.txt", *TINY)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_read_only_output(folder):
    assert len(error(1, "train-recogniser", "--data", folder, "--out", "/proc/cemiface", *TINY)) > len("cemiface train-recogniser: ")


def test_full_disk(folder, tmp_path, monkeypatch):
    def full(path, data): raise OSError(28, f"could not write {path} (No space left on device): free some space")
    monkeypatch.setattr("cemiface.images.write_whole", full)
    assert "No space left" in error(1, "train-recogniser", "--data", folder, "--out", tmp_path / "out", *TINY)


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("CEMIFACE_DEBUG", "1")
    answer = run("generate", "--inquiry", "proc:ddpm", "--m", "2", "--out", tmp_path / "out")
    assert isinstance(answer.exception, ValueError)
