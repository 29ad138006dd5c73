"The command line on a user's own folder of JPEGs, errors included."
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from test_checkpoints import AdaFaceNet, trained
from typer.main import get_command
from typer.testing import CliRunner

from cemiface.cli.app import app
from cemiface.data.images import encode_image
from cemiface.data.pairs import open_pairs, write_bin
from cemiface.generation.shipped import shipped_pipeline
from cemiface.data.records import open_encoded

TINY = ("--set", "backbone=ir18", "--set", "width=8", "--size", 16, "--epochs", 2, "--batch-size", 16, "--lr", 0.02)


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
    assert "Traceback" not in answer.output and lines[-1].startswith((f"cemiface {words[0]}: ", f"cemiface {' '.join(map(str, words[:2]))}: ")), answer.output
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

ROOT = Path(__file__).resolve().parent.parent


def leaves(command, words=()):
    "Every command below one, with the words that call it."
    if not hasattr(command, "commands"): return [(words, command)]
    return [leaf for name, below in command.commands.items() for leaf in leaves(below, (*words, name))]


def parse(line):
    "Read a command line as the command would, and run nothing. An error of click for what it would not take."
    command, words = get_command(app), shlex.split(line)
    assert words.pop(0) == "cemiface", line
    context = None
    while hasattr(command, "commands"):
        context = command.make_context("cemiface", words[:1], parent=context, resilient_parsing=True)
        name, command, _ = command.resolve_command(context, words[:1])
        words = words[1:]
    command.make_context(name, words, parent=context)


@pytest.mark.parametrize("words, command", leaves(get_command(app)), ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_examples_of_every_command_parse(words, command):
    examples = re.findall(r"Example[^:\n]*: (.+)", command.help)
    assert examples and not re.search(r"Example.*\n {4,}\S", command.help), "an example stands in one line"
    for line in examples:
        assert line.startswith(" ".join(("cemiface", *words)) + " ") or line == " ".join(("cemiface", *words)), line
        parse(line)
    for wrong in ("--model=x", "--recipe=x", "--threshold-model=x"):
        with pytest.raises(Exception, match="No such option"): parse(f"{examples[0]} {wrong}")


def test_examples_of_the_first_help_parse():
    examples = re.findall(r"Example[^:\n]*: (.+)", get_command(app).help)
    assert len(examples) == 2
    for line in examples: parse(line)


def command_lines(path):
    "What a page tells its reader to type: lines of fenced code, and cells that call the shell."
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(path.read_text())["cells"]] if path.suffix == ".ipynb" else [("markdown", path.read_text())]
    for kind, text in cells:
        text = text.replace("\\\n", " ") # continued lines
        shell = re.findall(r"^!(cemiface .+)", text, re.M) if kind == "code" else [m for block in re.findall(r"^```.*?^```", text, re.M | re.S) for m in re.findall(r"^(cemiface .+)", block, re.M)]
        for line in shell: yield re.split(r" +(?:\d?>|\||;|#|&&)", line)[0]


PAGES = [ROOT / "README.md", ROOT / "nbs/index.ipynb", *sorted((ROOT / "nbs/guides").glob("*.ipynb"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_of_the_pages_parse(page):
    lines = list(command_lines(page))
    assert lines
    for line in lines: parse(line)


def test_every_command_has_a_name_of_its_own_and_errors_by_it():
    names = [" ".join(words) for words, _ in leaves(get_command(app))]
    assert len(set(names)) == len(names)
    for name, source in (("data lint", "gone"), ("set verify", "gone"), ("set merge", "gone"), ("recogniser import", "gone.ckpt"), ("set card", "gone")):
        said = run(*name.split(), source)
        assert said.exit_code == 2 and said.output.strip().splitlines()[-1].startswith(f"cemiface {name}: "), said.output


def test_settings_of_a_recogniser(folder, tmp_path):
    listed = ok("train-recogniser", "--preset", "adaface", "--list-settings", "--set", "clip=2")
    assert re.search(r"^clip +2.0 ", listed, re.M) and re.search(r"^--epochs +26 ", listed, re.M) and re.search(r"^margin +adaface ", listed, re.M)
    assert re.search(r"^margin_m +None ", ok("train-recogniser", "--preset", "arcface", "--list-settings", "--set", "margin=cosface"), re.M)  # ArcFace's margin is not CosFace's
    assert re.search(r"^margin_m +0.3 ", ok("train-recogniser", "--list-settings", "--set", "margin_m=0.3", "--set", "margin=arcface"), re.M)
    words = ("train-recogniser", "--data", folder, "--out", tmp_path / "m", *TINY)
    assert "--epochs 3" in error(2, *words, "--set", "epochs=3")
    assert "--list-settings" in error(2, *words, "--set", "depth=18")
    assert "backbone" in error(2, *words, "--set", "backbone=vgg")
    assert "--data is missing" in error(2, "train-recogniser", "--out", tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_defaults_fit_a_small_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok("train-recogniser", "--data", folder, *TINY[:8])  # neither batch size nor learning rate given
    config = json.loads((tmp_path / "my_recogniser" / "recogniser.json").read_text())["config"]
    assert config["batch_size"] == 8 and config["lr"] == pytest.approx(.1 * 8 / 512)
    ok("groups", "--data", folder, "--recogniser", "my_recogniser", "--n-groups", 4)
    assert (tmp_path / "my_groups" / "groups.csv").exists()


def test_help_is_quick_and_loads_no_torch():
    code = "import sys; from cemiface.cli.app import app\ntry: app(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "reproduce" in done.stdout and "train-recogniser" in done.stdout


def test_verify_own_folder(folder, model, tmp_path):
    words = ("verify", "--recogniser", model, "--data", folder, "--pairs", 40, "--out", tmp_path / "verified")
    first = run(*words)
    assert first.exit_code == 0 and first.stdout == run(*words).stdout  # pairs are seeded
    table = pd.read_csv(tmp_path / "verified" / "table.csv", index_col=0)
    assert list(table.index) == [folder.name, "AVG"] and 0 <= table.accuracy.iloc[0] <= 100 and table.pairs.iloc[0] == 40
    assert "benchmarks" in error(2, "verify", "--recogniser", model, "--data", folder, "--benchmarks", "lfw.bin")


def test_each_image_of_drawn_pairs_is_embedded_once(folder, model, monkeypatch):
    import cemiface.recognition.training as r
    seen, embed = [], r.embed
    monkeypatch.setattr(r, "embed", lambda net, images, *a, **k: seen.append(len(images)) or embed(net, images, *a, **k))
    ok("verify", "--recogniser", model, "--data", folder, "--pairs", 400)
    assert len(seen) == 1 and seen[0] <= 32


def test_small_subjects_are_left_out_by_name(folder, model, tmp_path):
    few = tmp_path / "few"
    shutil.copytree(folder, few)
    (few / "lonely").mkdir(), shutil.copy(few / "person 0" / "0.jpg", few / "lonely")
    said = run("verify", "--recogniser", model, "--data", few, "--pairs", 40)
    assert said.exit_code == 0 and "left out: subject lonely with 1 image" in said.stderr
    assert "32 images of 4 subjects" in ok("groups", "--data", few, "--recogniser", model, "--n-groups", 4, "--out", tmp_path / "g")
    assert "subjects have fewer than 2 images" in error(2, "verify", "--recogniser", model, "--data", few, "--strict")
    assert "subjects have fewer than 20 images" in error(2, "groups", "--data", few, "--recogniser", model, "--n-groups", 20, "--out", tmp_path / "h")


def test_the_same_folder_by_another_path_goes_on(folder, model, tmp_path, monkeypatch):
    out = tmp_path / "g"
    words = ("--recogniser", model, "--n-groups", 4, "--out", out)
    first = run("groups", "--data", folder, *words)
    claimed, images = (out / "command.json").read_text(), (out / "images.csv").read_text()
    assert first.exit_code == 0 and json.loads(claimed)["data"] == str(folder.resolve())
    monkeypatch.chdir(folder.parent)
    again = run("groups", "--data", f"./{folder.name}", *words)
    assert again.exit_code == 0 and again.stdout == first.stdout
    assert (out / "command.json").read_text() == claimed and (out / "images.csv").read_text() == images
    shutil.copytree(folder, tmp_path / "copy")
    assert "begun with another data" in error(2, "groups", "--data", tmp_path / "copy", *words)


@pytest.fixture(scope="module")
def bins(folder, tmp_path_factory):
    "Two verification files of the folder's faces: twenty pairs each, one image in several."
    root, rng = tmp_path_factory.mktemp("bins"), np.random.default_rng(0)
    read = lambda s, k: (folder / f"person {s}" / f"{k}.jpg").read_bytes()
    for name in ("lfw", "cfp_fp"):
        same = [True, False] * 10
        images = [read(s, k) for is_same, s in zip(same, rng.integers(0, 4, 20)) for s, k in ((s, rng.integers(0, 4)), (s if is_same else (s + 1) % 4, rng.integers(4, 8)))]
        write_bin(root / f"{name}.bin", images, same)
    return f"{root}/lfw.bin,{root}/cfp_fp.bin"


def test_verify_bin_files(model, bins, tmp_path):
    assert "tar@0.001" not in ok("verify", "--recogniser", model, "--benchmarks", bins, "--out", tmp_path / "out")     # twenty pairs resolve no FAR of 1e-3
    table = pd.read_csv(tmp_path / "out" / "table.csv", index_col=0)
    assert list(table.index) == ["lfw", "cfp_fp", "AVG"] and (table.pairs == [20, 20, 40]).all()
    assert (table.ci_low <= table.accuracy).all() and (table.accuracy <= table.ci_high).all()
    assert Image.open(tmp_path / "out" / "verification.png").size[0] > 300
    assert "nowhere.bin" in error(2, "verify", "--recogniser", model, "--benchmarks", "nowhere.bin")
    assert "names no set" in error(2, "verify", "--recogniser", model, "--benchmarks", "")


def test_sets_are_checked_before_a_training(folder, bins, tmp_path):
    lfw, out = bins.split(",")[0], tmp_path / "m"
    pairs = open_pairs(lfw)
    write_bin(tmp_path / "one.bin", pairs.encoded()[:4], [True, False])
    bad = pairs.encoded()
    bad[6] = b"junk"
    write_bin(tmp_path / "bad.bin", bad, pairs.issame.tolist())
    (tmp_path / "other").mkdir(), shutil.copy(lfw, tmp_path / "other")
    for sets, says in ((tmp_path / "one.bin", "one"), (f"{lfw},{tmp_path}/other/lfw.bin", "lfw")):
        assert says in error(2, "train-recogniser", "--data", folder, "--out", out, "--benchmarks", sets, *TINY)
    assert not out.exists()
    said = run("verify", "--recogniser", "shipped", "--benchmarks", tmp_path / "bad.bin")
    assert said.exit_code == 2 and "--skip-damaged" in said.output
    said = run("verify", "--recogniser", "shipped", "--benchmarks", tmp_path / "bad.bin", "--skip-damaged")
    assert said.exit_code == 0 and "19" in said.stdout


def test_verify_several_seeds(folder, model, bins, tmp_path):
    ok("train-recogniser", "--data", folder, "--out", tmp_path / "other", *TINY, "--seed", 1)
    said = ok("verify", "--recogniser", model, "--recogniser", tmp_path / "other", "--benchmarks", bins, "--out", tmp_path / "both")
    table, single = pd.read_csv(tmp_path / "both" / "table.csv", index_col=0), []
    for m in (model, tmp_path / "other"):
        ok("verify", "--recogniser", m, "--benchmarks", bins, "--out", tmp_path / "one")
        single.append(pd.read_csv(tmp_path / "one" / "table.csv", index_col=0).accuracy)
    assert np.allclose(table["mean"], np.mean(single, 0)) and (table.seeds == 2).all() and "over 2 recognisers" in said
    assert "pixels" in error(2, "verify", "--recogniser", model, "--recogniser", "shipped", "--benchmarks", bins)


def test_a_recipe_judged_after_each_epoch(folder, bins, tmp_path):
    said = ok("train-recogniser", "--data", folder, "--out", tmp_path / "m", "--preset", "adaface", "--benchmarks", bins, *TINY)
    assert "ir18 + adaface, 2 epochs" in said and "best" in said
    history = pd.read_csv(tmp_path / "m" / "history.csv")
    assert {"lfw", "cfp_fp", "AVG"} <= set(history) and len(history) == 2 and np.allclose(history.AVG, (history.lfw + history.cfp_fp) / 2)
    assert json.loads((tmp_path / "m" / "recogniser.json").read_text())["config"]["decay_norms"] is False
    assert (tmp_path / "m" / "history.png").exists()


def test_from_a_folder_to_groups_as_sets_to_a_recogniser_on_one(folder, model, tmp_path):
    assert "32 images of 4 subjects" in ok("data", "convert", folder, tmp_path / "rec")
    assert sorted(p.name for p in (tmp_path / "rec").iterdir()) == ["property", "subjects.txt", "train.idx", "train.rec"]
    for centres in ("means", "weights"):
        out = tmp_path / centres
        ok("groups", "--data", tmp_path / "rec", "--recogniser", model, "--out", out, "--n-groups", 4, "--write", "list", "--centres", centres)
        images = pd.read_csv(out / "images.csv")
        assert images.image.str.contains("train.rec, record").all() and len(images) == 32
    assert "8 images of 4 subjects" in ok("train-recogniser", "--data", tmp_path / "means" / "group_1.txt", "--out", tmp_path / "m", *TINY[:8], "--batch-size", 4)
    assert "class centres" in error(2, "groups", "--data", folder, "--recogniser", model, "--subjects", 3, "--out", tmp_path / "x", "--centres", "weights", "--n-groups", 4)
    assert "rendered" in error(2, "groups", "--data", "proc:casia", "--subjects", 2, "--recogniser", model, "--out", tmp_path / "y", "--write", "list")


def test_sets_that_a_walk_or_a_list_would_half_see(folder, tmp_path):
    nested = tmp_path / "nested"
    for k, p in enumerate(sorted(folder.rglob("*.jpg"))):
        (nested / str(k % 2) / p.parent.name).mkdir(parents=True, exist_ok=True)
        (nested / str(k % 2) / p.parent.name / p.name).write_bytes(p.read_bytes())
    assert "--depth N" in error(2, "data", "lint", nested) and "are both called" in error(2, "data", "lint", nested, "--depth", 2)
    assert "32 images of 2 subjects" in run("data", "lint", nested, "--depth", 1).output
    assert "32 images of 2 subjects" in ok("data", "convert", nested, tmp_path / "faces.txt", "--depth", 1) and len(open_encoded(tmp_path / "faces.txt")) == 32
    (folder2 := tmp_path / "set").mkdir()
    for p in sorted(folder.rglob("*.jpg")): (folder2 / p.parent.name).mkdir(exist_ok=True); (folder2 / p.parent.name / p.name).write_bytes(p.read_bytes())
    assert run("data", "lint", folder2, "--strict").exit_code == 0
    (folder2 / "missed" / "session").mkdir(parents=True); (folder2 / "missed" / "session" / "0.jpg").write_bytes(b"x")
    said = run("data", "lint", folder2)
    assert said.exit_code == 0 and "empty subject: 1" in said.output and "deeper picture: 1" in said.output and run("data", "lint", folder2, "--strict").exit_code == 1
    assert "missed: no image" in error(2, "data", "convert", folder2, tmp_path / "rec", "--strict")
    assert "missed: no image" in error(2, "train-recogniser", "--data", folder2, "--out", tmp_path / "m", "--strict", *TINY)
    (tmp_path / "who.csv").write_text("path,who\n" + "".join(f"{p.relative_to(tmp_path)},{k % 3}\n" for k, p in enumerate(sorted(folder2.glob("*/*.jpg")))))
    assert "columns who are not known" in error(2, "data", "lint", tmp_path / "who.csv") and "--label-column" in error(2, "data", "convert", tmp_path / "who.csv", tmp_path / "rec")
    assert "32 images of 3 subjects" in ok("data", "convert", tmp_path / "who.csv", tmp_path / "own.txt", "--label-column", "who")


def test_data_commands(folder, bins, tmp_path):
    ok("data", "convert", folder, tmp_path / "rec"), ok("data", "convert", tmp_path / "rec", tmp_path / "back")
    for p in folder.rglob("*.jpg"): assert (tmp_path / "back" / p.parent.name / p.name).read_bytes() == p.read_bytes()
    ok("data", "convert", tmp_path / "rec", tmp_path / "all.txt")
    assert len(open_encoded(tmp_path / "all.txt")) == 32
    lfw = bins.split(",")[0]
    ok("data", "convert", lfw, tmp_path / "pairs"), ok("data", "convert", tmp_path / "pairs", tmp_path / "again.bin")
    assert (open_pairs(tmp_path / "again.bin").encoded()) == open_pairs(lfw).encoded()
    assert run("data", "lint", tmp_path / "rec").exit_code == 0
    (tmp_path / "back" / "person 0" / "0.jpg").write_bytes(b"junk")
    found = run("data", "lint", tmp_path / "back", "--out", tmp_path / "lint.csv")
    assert found.exit_code == 1 and "unreadable" in found.stdout and "unreadable" in list(pd.read_csv(tmp_path / "lint.csv").rule)
    said = run("data", "lint", tmp_path / "nothing")
    assert said.exit_code == 2 and said.output.strip().splitlines()[-1].startswith("cemiface data lint: ")


def test_align(tmp_path):
    photo = np.zeros((200, 240, 3), np.uint8)
    (tmp_path / "photos" / "ann").mkdir(parents=True)
    Image.fromarray(photo + np.uint8(90)).save(tmp_path / "photos" / "ann" / "1.png"), Image.fromarray(photo).save(tmp_path / "photos" / "ann" / "2.png")
    (tmp_path / "marks.csv").write_text("ann/1.png,90,90,130,90,110,110,95,130,125,130\n")
    said = run("data", "align", tmp_path / "photos", tmp_path / "faces", "--landmarks", tmp_path / "marks.csv")
    assert said.exit_code == 0 and "1 face, from 1 of 2 photos, aligned to 112 px" in said.stdout and "no face: ann/2.png" in said.stderr
    assert Image.open(tmp_path / "faces" / "ann" / "1.png").size == (112, 112)
    assert run("data", "align", tmp_path / "photos", tmp_path / "faces").exit_code == 2
    (tmp_path / "fractions.csv").write_text("ann/1.png,.3,.4,.5,.4,.4,.5,.35,.6,.5,.6\n")
    said = error(2, "data", "align", tmp_path / "photos", tmp_path / "none", "--landmarks", tmp_path / "fractions.csv")
    assert "none of 2 photos was aligned (bad landmarks: 1, no face: 1)" in said or "(no face: 1, bad landmarks: 1)" in said
    said = error(2, "data", "align", tmp_path / "photos", tmp_path / "marks.csv", "--landmarks", tmp_path / "marks.csv")
    assert said.endswith("marks.csv is a file: choose a new or empty folder")


def test_align_photos_of_nested_subjects(tmp_path):
    photo = np.full((200, 240, 3), 90, np.uint8)
    marks = "90,90,130,90,110,110,95,130,125,130"
    for shade, (subject, name) in enumerate((("0/ann", "1.png"), ("1/bob", "day/1.png"))):
        (tmp_path / "photos" / subject / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo + np.uint8(shade)).save(tmp_path / "photos" / subject / name)
    (tmp_path / "marks.csv").write_text(f"0/ann/1.png,{marks}\n1/bob/day/1.png,{marks}\n")
    said = run("data", "align", tmp_path / "photos", tmp_path / "faces", "--landmarks", tmp_path / "marks.csv", "--depth", 2)
    assert said.exit_code == 0 and "2 faces, from 2 of 2 photos, aligned" in said.stdout, said.output
    assert sorted(str(p.relative_to(tmp_path / "faces")) for p in (tmp_path / "faces").rglob("*.png")) == ["0/ann/1.png", "1/bob/day/1.png"]
    assert run("data", "lint", tmp_path / "faces", "--depth", 2).exit_code == 0


@pytest.mark.slow
def test_a_public_checkpoint_is_imported_verified_and_exported(bins, tmp_path):
    net = trained(AdaFaceNet(18, w=4, d=16, side=2))
    torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()} | {"head.kernel": torch.randn(16, 4)}}, tmp_path / "ada.ckpt")
    assert "stored for BGR, 4 class centres" in ok("recogniser", "import", tmp_path / "ada.ckpt", "--out", tmp_path / "ada")
    tables = [run("verify", "--recogniser", model, "--benchmarks", bins).stdout for model in (tmp_path / "ada", tmp_path / "ada.ckpt")]
    assert tables[0] == tables[1] and "cfp_fp" in tables[0]
    ok("recogniser", "export", "--recogniser", tmp_path / "ada", "--out", tmp_path / "ada.onnx")
    assert (tmp_path / "ada.onnx").stat().st_size > 10_000
    (tmp_path / "bad.ckpt").write_bytes(b"junk")
    said = run("recogniser", "import", tmp_path / "bad.ckpt")
    assert said.exit_code == 2 and said.output.strip().splitlines()[-1].startswith("cemiface recogniser import: ")


def test_groups_of_own_folder(folder, model, tmp_path):
    out = tmp_path / "groups"
    assert "32 images of 4 subjects" in ok("groups", "--data", folder, "--recogniser", model, "--out", out, "--n-groups", 4)
    images = pd.read_csv(out / "images.csv")
    assert sorted(images.groupby(["subject", "group"]).size().unique()) == [2]  # 8 images, 4 groups
    assert all(os.path.exists(p) and f"/{s}/" in p for p, s in zip(images.image, images.subject))
    means = images.groupby("group").cos.mean()
    assert means.is_monotonic_decreasing
    assert np.allclose(means, pd.read_csv(out / "groups.csv").avg_sim, atol=1e-5)
    assert Image.open(out / "groups.png").size[0] > 100


def test_generator_with_settings_of_a_table(folder, model, generator, tmp_path):
    words = ("train-generator", "--data", folder, "--recogniser", model, "--preset", "smoke", "--batch-size", 8, "--set", "similarity=euclidean", "--set", "interval=none", "--set", "m_span=[0, 1]")
    said = ok(*words, "--steps", 3, "--out", tmp_path / "one", "--init", generator, "--set", "sample_every=2")
    assert "3 steps of 8 images" in said and Image.open(tmp_path / "one" / "training.png").size[0] > 300
    assert (tmp_path / "one" / "train" / "samples" / "0000002.png").exists()
    about = json.loads((tmp_path / "one" / "command.json").read_text())
    assert (about["similarity"], about["interval"], about["m_span"]) == ("euclidean", None, [0., 1.])
    ok(*words, "--steps", 4, "--out", tmp_path / "one", "--init", generator)  # more steps go on
    assert "another similarity" in error(2, *words, "--set", "similarity=cosine", "--out", tmp_path / "one", "--init", generator)
    assert "--list-settings" in error(2, *words, "--set", "lamda=1", "--out", tmp_path / "two")
    assert "greater than 0" in error(2, *words, "--set", "interval=-1", "--out", tmp_path / "two")
    assert "pip install nobodys" in error(2, *words, "--log-with", "nobodys", "--out", tmp_path / "two")
    assert "lambda_simmat" in ok("train-generator", "--preset", "smoke", "--list-settings")


def test_baseline_is_trained_and_draws(folder, model, generator, tmp_path):
    words = ("train-generator", "--method", "dcface", "--data", folder, "--recogniser", model, "--preset", "smoke", "--steps", 2, "--batch-size", 8, "--init", generator, "--out", tmp_path / "dcface")
    assert "--m 0" not in ok(*words)
    draw = ("generate", "--inquiry", folder, "--per-subject", 2, "--generator", tmp_path / "dcface", "--steps", 1, "--oversample", 1)
    assert "4 subjects of 2 images by DCFace" in ok(*draw, "--out", tmp_path / "set")
    assert "is whole" in ok("set", "verify", tmp_path / "set")
    assert "the same file" in ok("set", "regenerate", tmp_path / "set", "--image", "2/1", "--generator", tmp_path / "dcface")
    assert "leave --m" in error(2, *draw, "--m", 0, "--out", tmp_path / "other")


def test_generate_and_go_on(folder, generator, tmp_path):
    out = tmp_path / "set"
    words = ("generate", "--inquiry", folder, "--m", 0, "--per-subject", 3, "--out", out, "--generator", generator, "--steps", 2, "--oversample", 1)
    assert "4 subjects of 3 images at m = 0" in ok(*words)
    made = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert len(made) == 4 * (3 + 1) and all(Image.open(p).size == (16, 16) for p in made)
    lost = sorted(made)[1]
    lost.unlink()
    ok(*words)
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == made
    assert "another" in error(2, *words, "--seed", 1)


def test_set_of_a_plan_and_its_image_drawn_again(folder, generator, tmp_path):
    words = ("generate", "--inquiry", folder, "--plan", "m in {0,0.5}", "--scale", .0002, "--generator", generator, "--steps", 1, "--oversample", 1, "--sampler", "unipc", "--precision", "bf16")
    assert "2 subjects of 50 images at m = 0, 0.5" in ok(*words, "--out", tmp_path / "set")
    table = pd.read_csv(tmp_path / "set" / "manifest.csv", dtype=str).query("m == m")
    assert len(table) == 100 and set(table.m.astype(float)) == {0., .5} and set(table.sampler) == {"UniPCMultistepScheduler"}
    assert "the same file" in ok("set", "regenerate", tmp_path / "set", "--image", "1/7", "--generator", generator)  # sampler and precision are the set's
    assert "needs 10 inquiries, and there are 4" in error(2, *words, "--scale", .001, "--out", tmp_path / "other")
    assert "no plan is called 'x'" in error(2, *words, "--plan", "x", "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_set_at_a_similarity(tmp_path):
    out = tmp_path / "set"
    ok("generate", "--inquiry", "proc:ddpm", "--subjects", 2, "--per-subject", 1, "--similarity", .5, "--oversample", 0, "--out", out)
    curve = next(c for c in shipped_pipeline().config.calibration["E_id"] if (c["sampler"], c["steps"]) == ("DDPMScheduler", 6))
    m = json.loads((out / "set.json").read_text())["config"]["m"]
    assert np.interp(m, curve["m"], curve["achieved"]) == pytest.approx([.5], abs=1e-4)
    assert "out of reach" in error(2, "generate", "--inquiry", "proc:ddpm", "--similarity", .99, "--out", tmp_path / "other")
    assert "give one of them" in error(2, "generate", "--inquiry", "proc:ddpm", "--similarity", .5, "--m", 0, "--out", tmp_path / "other")


def test_steps_and_sampler_are_the_generators_own_unless_asked_for(folder, generator, tmp_path):
    for k, (words, wanted) in enumerate({(): ("DDIMScheduler", 4), ("--sampler", "ddim"): ("DDIMScheduler", 4), ("--steps", 2): ("DDIMScheduler", 2),
                                         ("--sampler", "unipc"): ("UniPCMultistepScheduler", 20)}.items()):
        ok("generate", "--inquiry", folder, "--per-subject", 1, "--generator", generator, "--oversample", 0, "--out", tmp_path / str(k), *words)
        config = json.loads((tmp_path / str(k) / "set.json").read_text())["config"]
        assert (config["sampler"], config["steps"]) == wanted


def test_set_of_embeddings(generator, tmp_path):
    emb = np.random.default_rng(0).standard_normal((4, 512)).astype(np.float32)
    np.save(tmp_path / "centres.npy", np.concatenate([emb, emb[:2] + .1]))  # the last two are too near to the first two
    words = ("generate", "--per-subject", 2, "--generator", generator, "--steps", 1, "--m", "1,-1")
    said = ok(*words, "--inquiry", tmp_path / "centres.npy", "--threshold", .3, "--out", tmp_path / "set")
    assert "4 subjects of 2 images at m = 1, -1 (16 px), and no copies" in said
    assert json.loads((tmp_path / "set" / "set.json").read_text())["source"] == "embeddings"
    np.save(tmp_path / "flat.npy", emb[0])
    assert "flat.npy has the shape (512,)" in error(2, *words, "--inquiry", tmp_path / "flat.npy", "--out", tmp_path / "other")
    np.save(tmp_path / "objects.npy", np.array([{}]), allow_pickle=True)
    assert "objects.npy" in error(2, *words, "--inquiry", tmp_path / "objects.npy", "--out", tmp_path / "other")


def test_a_generated_set_is_checked_and_an_image_drawn_again(folder, generator, model, tmp_path):
    for form in ("folder", "records"):
        out = tmp_path / form
        ok("generate", "--inquiry", folder, "--per-subject", 2, "--out", out, "--generator", generator, "--steps", 2, "--oversample", 1, "--form", form, "--batch-size", 4)
        assert "is whole" in ok("set", "verify", out)
        assert "the same file" in ok("set", "regenerate", out, "--image", "2/1", "--generator", generator)
    ok("set", "card", tmp_path / "folder", "--recogniser", model)
    assert (tmp_path / "folder" / "README.md").exists()
    (tmp_path / "folder" / "000002" / "0001.png").write_bytes(b"junk")
    said = run("set", "verify", tmp_path / "folder")
    assert said.exit_code == 1 and "000002/0001.png" in said.stdout
    assert run("set", "merge", tmp_path / "nothing").exit_code == 2


def test_two_processes_draw_what_one_draws(folder, generator, tmp_path, monkeypatch):
    words = ("generate", "--inquiry", folder, "--per-subject", 3, "--generator", generator, "--steps", 1, "--oversample", 1, "--batch-size", 4)
    ok(*words, "--out", tmp_path / "one")
    for name, value in dict(RANK="0", WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none").items(): monkeypatch.setenv(name, value)
    assert "cemiface set merge" in ok(*words, "--out", tmp_path / "two")        # under torchrun
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    second = run(*words, "--out", tmp_path / "two", "--share", "2/2")           # by a word; what was left over says nothing
    assert second.exit_code == 4 and "is not whole yet" in second.output.strip().splitlines()[-1]
    for name in ("RANK", "WORLD_SIZE"): monkeypatch.delenv(name)
    assert "not whole yet" in error(2, "train-recogniser", "--data", tmp_path / "two", "--out", tmp_path / "model")
    ok("set", "merge", tmp_path / "two")
    assert "2 subjects" not in ok(*words, "--out", tmp_path / "two", "--share", "1/2")  # it is whole: nothing is left to share
    one, two = ({p.relative_to(o).as_posix(): p.read_bytes() for p in o.rglob("*") if p.suffix in (".png", ".parquet", ".csv")} for o in (tmp_path / "one", tmp_path / "two"))
    assert one == two and len(one) > 16


def test_a_task_of_a_sweep_draws_a_whole_set(folder, generator, tmp_path, monkeypatch):
    left = dict(RANK="1", WORLD_SIZE="4", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_MAX="4", SLURM_ARRAY_TASK_COUNT="5")
    for name, value in left.items(): monkeypatch.setenv(name, value)
    words = ("generate", "--inquiry", folder, "--per-subject", 2, "--generator", generator, "--steps", 1, "--oversample", 0)
    assert "images at m = 0" in ok(*words, "--out", tmp_path / "set") and (tmp_path / "set/set.json").exists()
    for name in ("train-recogniser", "train-generator"):
        said = error(2, name, "--data", folder, "--out", tmp_path / "model")
        assert "holds RANK, WORLD_SIZE, but" in said and "unset RANK WORLD_SIZE" in said and not (tmp_path / "model").exists()
    assert "unset RANK WORLD_SIZE" in error(2, "reproduce", "--dry-run", "--profile", "smoke")


def test_generate_from_loose_images(folder, generator, tmp_path):
    out = tmp_path / "set"
    said = ok("generate", "--inquiry", folder / "person 0", "--per-subject", 1, "--out", out, "--generator", generator, "--steps", 1,
              "--subjects", 3, "--oversample", 0, "--m", "-0.5")
    assert "3 subjects of 1 images at m = -0.5" in said and len(list(out.rglob("*.png"))) == 3


def test_the_same_training_command_goes_on(folder, model):
    before = (model / "centres.safetensors").read_bytes()
    start = time.perf_counter()
    said = ok("train-recogniser", "--data", folder, "--out", model, *TINY)
    assert f"{model} was finished before, and nothing was trained now: it holds the recogniser: ir18" in said
    assert (model / "centres.safetensors").read_bytes() == before
    assert time.perf_counter() - start < 10
    assert "another seed" in error(2, "train-recogniser", "--data", folder, "--out", model, *TINY, "--seed", 5)


def test_a_finished_generator_is_not_trained_in_silence(folder, model, generator, tmp_path):
    words = ("train-generator", "--data", folder, "--recogniser", model, "--preset", "smoke", "--batch-size", 8)
    said = "was finished before, and nothing was trained now: it holds the generator"
    assert said in ok(*words, "--out", generator, "--steps", 3)
    shutil.copytree(generator, tmp_path / "more")
    assert said not in ok(*words, "--out", tmp_path / "more", "--steps", 4) # one step more is a training
    assert said in ok(*words, "--out", tmp_path / "more", "--steps", 4)


@pytest.fixture(scope="module")
def things(folder, model, generator, bins, tmp_path_factory):
    "One of each kind that a path may name."
    out = tmp_path_factory.mktemp("things")
    (out / "graph.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch")
    np.savez(out / "stats.npz", mu=np.zeros(4), sigma=np.eye(4)), np.save(out / "emb.npy", np.ones((4, 8), np.float32))
    ok("data", "convert", folder, out / "records", "--to", "records")
    (out / "empty").mkdir()
    return {"recogniser": model, "generator": generator, "pairs": Path(bins.split(",")[0]), "ONNX graph": out / "graph.onnx", "NumPy arrays": out / "stats.npz", "NumPy array": out / "emb.npy",
            "record file": out / "records/train.rec", "image": next(folder.rglob("*.jpg")), "empty folder": out / "empty", "folder of record files": out / "records", "part of a saved model": model / "model"}


KINDS = ("recogniser", "generator", "pairs", "ONNX graph", "NumPy arrays", "NumPy array", "record file", "image", "empty folder", "folder of record files", "part of a saved model")

@pytest.mark.parametrize("kind", KINDS)
def test_what_lies_in_the_wrong_place_is_called_by_its_kind(kind, things, folder, tmp_path):
    "Whole files and folders, none of them damaged, and no Python error of the one that could not read them."
    path, to = things[kind], ("--out", tmp_path / "out")
    said = []
    if kind != "recogniser": said += [error(2, "verify", "--recogniser", path), error(2, "recogniser", "export", "--recogniser", path), error(2, "groups", "--data", folder, "--recogniser", path, *to)]
    said += [error(2, "recogniser", "import", path, *to), error(2, "set", "verify", path), error(2, "set", "merge", path), error(2, "set", "card", path)]
    if path.is_file(): said += [error(2, "data", "align", folder, tmp_path / "out", "--landmarks", path)]
    for line in said: assert kind in line and "damaged" not in line and str(path) in line, line


def test_a_recogniser_whose_embeddings_do_not_fit(folder, generator, things, tmp_path):
    ok("train-recogniser", "--data", folder, "--out", tmp_path / "narrow", *TINY, "--set", "emb_dim=32")
    words = ("--data", folder, "--out", tmp_path / "out", "--preset", "smoke")
    assert "takes embeddings of 512 numbers, but" in (said := error(2, "train-generator", "--recogniser", tmp_path / "narrow", *words)) and "--set emb_dim=512" in said
    words = ("generate", "--generator", generator, "--out", tmp_path / "out")
    assert "holds embeddings of 8 numbers, and the generator takes 512" in error(2, *words, "--inquiry", things["NumPy array"])
    assert "--threshold-recogniser is for --threshold" in error(2, *words, "--inquiry", folder, "--threshold-recogniser", "shipped")
    assert "--threshold-recogniser shipped takes images of 64 pixels, and the generator draws 16" in error(2, *words, "--inquiry", folder, "--threshold", .9, "--threshold-recogniser", "shipped")
    assert "give m (--m)" in error(2, *words, "--inquiry", folder, "--similarity", .3)


def test_empty_folder(tmp_path):
    (tmp_path / "none").mkdir()
    for command in ("train-recogniser", "generate"):
        option = "--inquiry" if command == "generate" else "--data"
        if command == "train-recogniser":
            assert str(tmp_path / "none") in error(2, command, option, tmp_path / "none", "--out", tmp_path / "out", *TINY)
    assert not (tmp_path / "out").exists()
    assert "there is no " in error(2, "train-recogniser", "--data", tmp_path / "gone", "--out", tmp_path / "out")


def test_generate_from_an_empty_folder(generator, tmp_path):
    (tmp_path / "none").mkdir()
    assert str(tmp_path / "none") in error(2, "generate", "--inquiry", tmp_path / "none", "--out", tmp_path / "out", "--generator", generator)


def test_subject_with_one_image(model, tmp_path):
    data = write_jpegs(tmp_path / "faces")
    Image.new("RGB", (40, 40)).save((data / "alone.jpg"))
    (data / "alone").mkdir()
    (data / "alone.jpg").rename(data / "alone" / "0.jpg")
    for words in (("train-recogniser", "--data", data, "--out", tmp_path / "a", *TINY), ("groups", "--data", data, "--recogniser", model, "--out", tmp_path / "b"),
                  ("verify", "--data", data, "--recogniser", model)):
        assert "subject alone with 1 image" in error(2, *words, "--strict")


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
    assert "table11" in error(2, "reproduce", "table99", "--profile", "smoke", "--out", tmp_path / "out")
    assert "CASIA-WebFace" in error(2, "reproduce", "--profile", "paper", "--out", tmp_path / "out")


def test_missing_models(folder, tmp_path):
    assert "train-recogniser" in error(2, "verify", "--recogniser", tmp_path / "none")
    assert "train-generator" in error(2, "generate", "--inquiry", folder, "--generator", tmp_path, "--out", tmp_path / "out")


def test_output_in_use(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not empty" in error(2, "train-recogniser", "--data", folder, "--out", tmp_path, *TINY)
    assert "is a file" in error(2, "train-recogniser", "--data", folder, "--out", tmp_path / "thesis.txt", *TINY)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_read_only_output(folder):
    assert len(error(3, "train-recogniser", "--data", folder, "--out", "/proc/cemiface", *TINY)) > len("cemiface train-recogniser: ")


def test_full_disk(folder, tmp_path, monkeypatch):
    def full(path, data): raise OSError(28, f"could not write {path} (No space left on device): free some space")
    monkeypatch.setattr("cemiface.core.files.write_whole", full)
    assert "No space left" in error(3, "train-recogniser", "--data", folder, "--out", tmp_path / "out", *TINY)


def test_debug_shows_the_traceback(monkeypatch, tmp_path):
    monkeypatch.setenv("CEMIFACE_DEBUG", "1")
    answer = run("generate", "--inquiry", "proc:ddpm", "--m", "2", "--out", tmp_path / "out")
    assert isinstance(answer.exception, ValueError)


def paths_of(command, path=()):
    "The words of every command."
    yield path
    for name, below in getattr(command, "commands", {}).items(): yield from paths_of(below, (*path, name))


SCREEN = """
import io, sys
from cemiface.cli import app
sys.stdout = io.TextIOWrapper(io.BytesIO(), sys.argv[1])
for line in sys.argv[2].splitlines():
    sys.argv = ["cemiface", *line.split(), "--help"]
    try: app.main()
    except SystemExit as e: assert not e.code, line
sys.stderr.buffer.write(sys.stdout.buffer.getvalue())
"""


@pytest.mark.parametrize("encoding", ["ascii", "cp1251", "utf-8"])
def test_every_help_on_a_screen_that_is_not_utf8(encoding):
    words = "\n".join(" ".join(path) for path in paths_of(get_command(app)))
    said = subprocess.run([sys.executable, "-c", SCREEN, encoding, "\n" + words], capture_output=True, env=os.environ | dict(COLUMNS="200", NO_COLOR="1"))
    assert said.returncode == 0, said.stderr
    assert {"utf-8": "Fréchet"}.get(encoding, r"Fr\xe9chet") in said.stderr.decode(encoding)


def test_main_is_asked_by_the_module_and_its_failures_have_status_3(tmp_path):
    said = subprocess.run([sys.executable, "-m", "cemiface", "data", "lint", tmp_path / "\udce9"], capture_output=True, env=os.environ | dict(PYTHONIOENCODING="ascii", CEMIFACE_DEBUG="1"))
    assert said.returncode == 3 and b"Traceback" in said.stderr # not 1, the status of faults


NAMES = ["Jos\u00e9", os.fsdecode(b"Jos\xe9_0"), "a$b$ x^{", "\u9673"]

@pytest.fixture(scope="module")
def odd_names(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("odd") / os.fsdecode(b"set_\xe9 $x^$")
    for k, name in enumerate(NAMES): shutil.copytree(folder / f"person {k}", root / name)
    (root / NAMES[1] / "bad.jpg").write_bytes(b"junk")
    return root


def test_names_that_are_no_text_pass_every_writer(odd_names, model, tmp_path):
    assert r"Jos\xe9_0" in run("data", "lint", odd_names, "--out", tmp_path / "lint.csv").output and r"Jos\xe9_0" in (tmp_path / "lint.csv").read_text()
    assert "1 were left out" in ok("data", "convert", odd_names, tmp_path / "rec")
    ok("data", "convert", tmp_path / "rec", tmp_path / "back")
    assert sorted(p.name for p in (tmp_path / "back").iterdir()) == sorted(NAMES)       # the names that the folders had, byte for byte
    ok("groups", "--data", odd_names, "--recogniser", model, "--n-groups", 2, "--write", "folder", "--out", tmp_path / "groups")
    assert set(pd.read_csv(tmp_path / "groups/images.csv").subject) == {NAMES[0], r"Jos\xe9_0", *NAMES[2:]} and os.fsdecode(b"Jos\xe9_0") in os.listdir(tmp_path / "groups/group_0")
    assert r"Jos\\xe9_0" in error(2, "groups", "--data", odd_names, "--recogniser", model, "--n-groups", 2, "--write", "list", "--out", tmp_path / "lists")
    assert not (tmp_path / "lists").exists()                                            # before the work, not after it
    ok("verify", "--data", odd_names, "--recogniser", model, "--pairs", 20, "--out", tmp_path / "verified")
    assert r"set_\xe9 $x^$" in (tmp_path / "verified/table.csv").read_text()


def test_an_audit_of_names_that_are_no_text_has_all_its_parts(odd_names, model, tmp_path):
    said = run("audit", odd_names, "--against", odd_names, "--recogniser", model, "--out", tmp_path / "audit")
    assert said.exit_code == 4 and "codec" not in said.output, said.output
    page = (tmp_path / "audit/index.html").read_text("utf-8")
    assert r"set_\xe9 $x^$" in page and page.count("data:image/png;base64,") >= 6
    assert set(pd.read_csv(tmp_path / "audit/tables/subjects.csv").subject) == {NAMES[0], r"Jos\xe9_0", *NAMES[2:]}


def test_an_audit_that_fails_has_not_the_status_of_a_leak(folder, model, tmp_path, monkeypatch):
    def broken(*args, **how): raise RuntimeError("the figure cannot be drawn")
    monkeypatch.setattr("cemiface.audit.page.plot_leakage", broken)
    assert "cannot be drawn" in error(3, "audit", folder, "--against", folder, "--recogniser", model, "--out", tmp_path / "audit")


@pytest.mark.parametrize("surroundings", [dict(LC_ALL="C", PYTHONUTF8="0"), dict(LC_ALL="C"), dict(LC_ALL="C.UTF-8")])
def test_the_locale_does_not_change_the_names_of_subjects(tmp_path, surroundings):
    for k, name in enumerate(("José", "Ánna")):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "1.png").write_bytes(encode_image(torch.full((3, 16, 16), k, dtype=torch.uint8)))
    env = {k: v for k, v in os.environ.items() if k not in ("LANG", "LC_CTYPE", "PYTHONIOENCODING")} | surroundings
    said = subprocess.run([sys.executable, "-m", "cemiface", "data", "lint", tmp_path / "set", "--out", tmp_path / "faults.csv"], capture_output=True, env=env)
    assert said.returncode == 0 and b"no text" not in said.stdout, said
    assert "one image,warning,2,José; Ánna" in (tmp_path / "faults.csv").read_text("utf-8")
