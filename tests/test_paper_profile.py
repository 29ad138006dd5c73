"The profile `paper`, rehearsed: a miniature of the real layout, run end to end at tiny counts; and files that are missing, cut off or wrong."
import json
import os
import shutil
import warnings

import matplotlib
matplotlib.use("Agg")
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_checkpoints import AdaFaceNet, trained
from typer.testing import CliRunner

from cemiface.core.settings import changed
from cemiface.recognition.backbones import IResNet, backbone, forward_flops
from cemiface.cli.app import app
from cemiface.generation.conditioning import GENERATORS
from cemiface.study.experiments import Training
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study
from cemiface.study.tasks import in_order
from cemiface.data.images import encode_image, read_image
from cemiface.paper.inquiry_sources import CHALLENGES
from cemiface.paper.methods import first_images, published_row
from cemiface.data.pairs import open_pairs, write_bin
from cemiface.world.people import BENCHMARK_SIDES, PRESETS
from cemiface.world.worlds import draw_benchmark, draw_world
from cemiface.paper.published import published
from cemiface.data.recordio import RecordWriter
from cemiface.core.report import Finding
from cemiface.paper.reproduce import RESULTS, chosen_results, missing
from cemiface.study.plan import plan
from cemiface.paper.reproduce import reproduce
from cemiface.recognition.verification import evaluate

NAMES = ["yardstick", "table1", "table9", "figure2", "control", "table11", "table6", "table13", "figure8"]
COUNTS = [3, 5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7] # images of each subject of casia
BINS = dict(zip(BENCHMARK_SIDES, ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")))
TINY = changed(GENERATORS["paper"], block_out_channels=(8, 8, 8, 8, 16), layers_per_block=(1,) * 5, norm_groups=4, head_dim=8, sim_dim=16, cond_dim=16)


def small(): # the paper's profile with every count made tiny; 112 px, volumes and recipes stay
    p, short = PROFILES["paper"], dict(steps=2, batch_size=4, precision="no")
    net = dict(backbone="ir18", width=4, epochs=1, batch_size=8, lr=.01, precision="no")
    return changed(p, pairs=40, inquiries=4, candidates=8, set_subjects=4, set_per_subject=3, curve_per_subject=2, oversample=1, steps=2, ms=(1., 0.), control_ms=(1., 0., -1.),
                teacher=changed(p.teacher, **net), student=changed(p.student, **net), simmat=changed(p.simmat, **short), dcface=changed(p.dcface, **short))


pytestmark = pytest.mark.slow


def large(images): return F.interpolate(images.float(), 112).to(torch.uint8) # rendered small, stored at the paper's size


def write_folder(root, images, labels):
    for k, (image, label) in enumerate(zip(images, labels)):
        (root / f"p{label}").mkdir(parents=True, exist_ok=True)
        (root / f"p{label}" / f"{k}.jpg").write_bytes(encode_image(image, "jpg"))


@torch.no_grad()
def checkpoint(images): # an AdaFace network that has seen these images, with a head that fits nobody
    torch.manual_seed(0)
    net = AdaFaceNet(18, w=4).train()
    for _ in range(20): net(images.flip(1) / 127.5 - 1)
    return {f"model.{k}": v for k, v in net.state_dict().items()} | {"head.kernel": torch.randn(512, 12)}


def write_layout(root):
    faces = large(draw_world("casia", 12, 12, 28).images).view(12, 12, 3, 112, 112)
    with RecordWriter(root / "casia") as record:
        for label, n in enumerate(COUNTS):
            for image in faces[label, :n]: record.add(encode_image(image, "jpg"), label)
    for kind, n in zip(CHALLENGES, (2, 3, 4, 5, 6)): # as many photos as somebody has found
        write_folder(root / kind, large(draw_world(kind, n, 1, 28).images), range(n))
    (root / "webface_1shot").mkdir()
    for k, image in enumerate(large(draw_world("webface_1shot", 26, 1, 28).images)): (root / "webface_1shot" / f"{k}.jpg").write_bytes(encode_image(image, "jpg"))
    for name, file in BINS.items():
        images, issame = draw_benchmark(name, 20, 28)
        encoded = [encode_image(image, "jpg") for image in large(images[:24])]
        write_bin(root / f"{file}.bin", [encoded[k % 24] for k in range(80)], [*issame.tolist(), *issame.tolist()]) # 40 pairs of 24 photos
    torch.save(dict(state_dict=checkpoint(faces[:, 0])), root / "recogniser.ckpt")
    write_folder(root / "sets" / "SynFace", faces[:3, :4].flatten(0, 1), [s for s in range(3) for _ in range(4)])
    return root


@pytest.fixture(scope="module", autouse=True)
def _narrow(): # the generator, in every test
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(GENERATORS, "paper", TINY)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_layout(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory): # findings of one seed, and where they are
    out, said = tmp_path_factory.mktemp("out"), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = reproduce(small(), NAMES, out, seeds=1, say=said.append, progress=False, data=data)
    return found, out, "\n".join(said)


def study(data, out="nowhere", **kw): return Study(small(), out, 1, data=data, **kw)


def test_every_chosen_result_is_made(made):
    found, _, said = made
    assert all(isinstance(found[n], Finding) for n in NAMES), {n: f for n, f in found.items() if isinstance(f, str)}
    assert "missing" not in said and "failed" not in said
    assert "Not made" not in (made[1] / "paper" / "index.html").read_text()


def test_nothing_real_is_called_rendered(made):
    found, out, _ = made
    page = (out / "paper" / "index.html").read_text()
    assert "proc-" not in page and "proc:" not in page and "rendered" not in page and "photographs" in page
    assert "89 images of 12 subjects" in page and "recogniser.ckpt" in page  # where the numbers come from
    assert {"LFW", "LFW published", "AVG", "AVG published"} <= set(found["table1"].table) and "proc" not in " ".join(found["table11"].table)
    measured = found["figure4"].figure.axes[0]
    assert measured.get_title() == "measured, photographs" and "proc" not in found["figure4"].text


def test_challenging_photos_of_other_people_are_measured_by_what_needs_no_clear_photo(made):
    table = made[0]["figure8"].table
    assert table.challenge.tolist() == [*CHALLENGES] and [*table] == ["challenge", "achieved", "sharpness"] and table.sharpness[0] == 1
    assert "2 people" in made[0]["figure8"].text and len(made[0]["figure8"].figure.axes) == 2


def test_accuracies_are_those_of_the_files(made, data):
    s = study(data, made[1])
    direct = evaluate(s.recogniser().load()[0], {name: open_pairs(data / f"{file}.bin") for name, file in BINS.items()})["accuracy"]
    row = made[0]["yardstick"].table.set_index("E_id").loc["trained"]
    assert row.to_dict() == pytest.approx({n.removeprefix("proc-"): v for n, v in direct.items()}) and row.nunique() > 2


def test_real_images_stay_where_they_are(made, data):
    s = study(data, made[1])
    kept = {type(t).__name__: load_file(p) for t in (s.inquiries(), s.groups(), s.recogniser()) for p in t.infra.uid_folder().glob("*.safetensors")}
    assert {k: set(v) for k, v in kept.items()} == dict(Inquiries={"emb", "rows"}, Groups={"cos", "groups"}, TrainedRecogniser={"centres"})
    assert not any(list(t.infra.uid_folder().glob("*.safetensors")) for t in (s.faces(), s.benchmarks()))
    for i, row in enumerate(kept["Inquiries"]["rows"].tolist()): assert torch.equal(s.inquiries().faces(4).images[torch.tensor([i])][0], read_image(data / "webface_1shot" / f"{row}.jpg"))


def test_groups_of_unequal_subjects(made, data):
    s = study(data, made[1])
    kept, labels = s.groups().load(), torch.repeat_interleave(torch.tensor(COUNTS))
    assert (kept["groups"][labels == 0] == -1).all() and s.groups().run() == dict(images=sum(COUNTS), left_out=3)
    for label, n in list(enumerate(COUNTS))[1:]:
        mine, cos = kept["groups"][labels == label], kept["cos"][labels == label]
        sizes = mine.bincount(minlength=5)
        assert sizes.sum() == n and sizes.max() - sizes.min() <= 1 and mine[cos.argsort(descending=True)].diff().min() >= 0
    assert made[0]["table9"].table.images.sum() == sum(COUNTS) - 3 and "3 images of subjects with fewer than five" in made[0]["table9"].text
    assert s.group_training(0, 0).run()["subjects"] == 11 and s.group_training(2, 0).run()["images"] == (kept["groups"] == 2).sum()


def test_the_users_checkpoint_is_e_id(made, data):
    s = study(data, made[1])
    model, centres = s.recogniser().load()
    faces, model = s.faces().load(), model.cpu()
    x = faces.images[torch.arange(len(faces))].float() / 127.5 - 1
    with torch.no_grad(): emb = F.normalize(model(x))
    for i in range(12): assert torch.allclose(centres[i], F.normalize(emb[faces.labels == i].mean(0), dim=0), atol=1e-4)  # the head fits nobody
    assert model.config.width == 4 and s.generator().load().recogniser.config.shortcut == "pool"
    assert "mean embeddings" in made[0]["table9"].text
    kept = s.inquiries().load()
    with torch.no_grad(): again = F.normalize(model(kept["images"][torch.arange(4)].float() / 127.5 - 1))
    assert torch.allclose(kept["emb"], again, atol=1e-4)
    assert (kept["emb"] @ kept["emb"].T - torch.eye(4)).max() < s.inquiries().run()["threshold"]


def test_a_set_of_another_method_is_a_row_of_table6(made, data):
    s, table = study(data, made[1]), made[0]["table6"].table.set_index(["method", "volume_M"])
    own, row = s.other_training(s.other_sets()["SynFace"], 0).run(), table.loc[("SynFace", .5)]
    assert row.source == "measured and published" and row["AVG published"] == 74.75 and row.AVG == own["accuracy"]["AVG"] and row.images == own["images"] == 12
    assert row.GtR == pytest.approx(s.real_training().run()["accuracy"]["AVG"] - row.AVG) and "<td>12</td>" in made[0]["table6"].table_html
    assert table.loc[("IDiff-Face", .5), "source"] == "published only"


def test_a_copy_of_the_folder_is_answered_from_the_cache_and_a_change_is_not(made, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "elsewhere", copy_function=shutil.copyfile)  # other dates
    s = study(copy, made[1])
    assert all(step.cached for step in plan(s, chosen_results(NAMES)))
    assert str(copy) in s.faces().source and len(s.faces().load()) == sum(COUNTS)
    pd.testing.assert_frame_equal(RESULTS["table1"].make(s).table, made[0]["table1"].table)
    os.utime(copy / "casia" / "train.rec")
    (copy / "casia" / "train.idx").unlink()  # the reader finds the records without it, and says so
    with pytest.warns(UserWarning, match="train.idx"): assert study(copy, made[1]).faces().infra.status() == "completed"
    photo = copy / "webface_1shot" / "7.jpg"
    photo.write_bytes(encode_image(torch.zeros(3, 112, 112, dtype=torch.uint8), "jpg"))
    (copy / "lfw.bin").write_bytes((copy / "cfp_fp.bin").read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = study(copy, made[1])
        assert s.groups().infra.status() == "completed" and {t.infra.status() for t in (s.inquiries(), s.benchmarks(), s.yardstick())} == {"not submitted"}


# ---- what is missing, cut off or wrong
def said_of(data, names, tmp_path, **how):
    said = []
    try: return reproduce(small(), names, tmp_path, seeds=1, say=said.append, progress=False, data=data, **how), "\n".join(said)
    except ValueError as e: return str(e), "\n".join(said)


def test_without_data_everything_is_listed_and_refused(tmp_path):
    error, said = said_of(None, ["table1", "table4"], tmp_path)
    assert "\n" not in error and "--data DIR" in error and "CASIA-WebFace" in error and "listed above" in error
    for file in ("casia", "vggface2", "flickr", "webface_1shot", "ddpm", "flickr_1shot", *(f"{f}.bin" for f in BINS.values())): assert f"DIR/{file} is missing" in said
    assert "digiface" not in said and "InsightFace's dataset zoo" in said and "http" not in said
    line = next(l for l in said.splitlines() if "DIR/casia " in l)
    assert line.endswith("(table1, table4)") and next(l for l in said.splitlines() if "DIR/ddpm" in l).endswith("(table4)")
    assert not list(tmp_path.iterdir())


def test_results_whose_data_is_there_are_made(made, data, tmp_path):
    copy = shutil.copytree(data, tmp_path / "data", ignore=lambda *a: {"webface_1shot"})
    found, said = said_of(copy, ["table1", "control"], made[1])
    assert isinstance(found["table1"], Finding) and found["control"].startswith(f"Not made: {copy / 'webface_1shot'} is missing: inquiries") and "(control)" in said
    shutil.copytree(data / "webface_1shot", copy / "webface_1shot", ignore=lambda *a: {f"{k}.jpg" for k in range(9, 26)})
    assert not missing(study(copy), chosen_results(["control"]))
    few = missing(study(copy), chosen_results(["table6"]))["table6"]
    assert len(few) == 1 and "9 subjects" in str(few[0]) and "24 inquiries" in str(few[0])


def test_the_plan_of_what_is_missing(tmp_path):
    found, said = said_of(None, ["table1", "table11"], tmp_path, dry_run=True)
    assert found == {} and "DIR/casia is missing" in said and "table11: Table 11" in said and ("GPU-hours" in said) == torch.cuda.is_available()
    rows = dict(machine=dict(gpu="H100"), training=[dict(configuration="paper", images_per_s=1000.), dict(backbone="irse50", size=112, images_per_s=2000., gflop_per_image=38.)])
    (tmp_path / "bench.json").write_text(json.dumps(rows))
    _, said = said_of(None, ["table1", "table11"], tmp_path, dry_run=True, bench=(tmp_path / "bench.json",))
    assert "GPU-hours of each result" in said and " GPU-hours); everything is kept" in said


@pytest.mark.parametrize("file,spoil,names,words", [
    ("agedb_30.bin", lambda p: p.write_bytes(p.read_bytes()[:5000]), ["table1"], ["agedb_30.bin", "get the file again"]),
    ("calfw.bin", lambda p: p.write_bytes(b"\x80\x02cos\nsystem\nq\x00."), ["table1"], ["calfw.bin", "not a plain pickle"]),
    ("casia/train.rec", lambda p: p.unlink(), ["figure2"], ["casia", "images belong in"]),
    ("casia/train.rec", lambda p: p.write_bytes(b"nothing"), ["figure2"], ["casia", "copy"]),
    ("recogniser.ckpt", lambda p: torch.save(dict(state_dict=dict(w=torch.ones(3))), p), ["figure2"], ["recogniser.ckpt", "no AdaFace or InsightFace backbone"]),
    ("recogniser.ckpt", lambda p: p.write_bytes(p.read_bytes()[:9000]), ["figure2"], ["recogniser.ckpt", "again"]),
    ("recogniser.ckpt", lambda p: torch.save(IResNet(18, size=48, width=4).state_dict(), p), ["figure2"], ["recogniser.ckpt", "48 px"]),
    ("sets/SynFace/p0", lambda p: shutil.rmtree(p.parent), ["table6"], None)])
def test_a_bad_file_is_named_in_one_line(data, tmp_path, file, spoil, names, words):
    copy = shutil.copytree(data, tmp_path / "data")
    spoil(copy / file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if words is None: assert "SynFace" not in study(copy).other_sets(); return
        error, said = said_of(copy, names, tmp_path / "out")
    assert isinstance(error, str) and "\n" not in error and all(w in error for w in words), error
    assert not (tmp_path / "out").exists()


def test_a_damaged_pair_stops_before_any_training(data, tmp_path):
    images, _ = draw_benchmark("proc-LFW", 20, 28)
    copy = shutil.copytree(data, tmp_path / "data")
    encoded = [encode_image(i, "jpg") for i in images]
    encoded[5] = encoded[5][:200]
    write_bin(copy / "lfw.bin", encoded, [True, False] * 10)
    found, said = said_of(copy, ["yardstick", "table1"], tmp_path / "out")
    assert "image 5" in found["table1"] and "lfw.bin" in found["table1"] and "recogniser on group" not in found["table1"]


# ---- the graph
def test_rendered_tasks_are_what_they_were(tmp_path):
    s = Study("laptop", tmp_path, from_scratch=True)
    tasks = in_order([t for r in RESULTS.values() for t in r.needs(s)])
    assert len(tasks) > 100 and not s.real
    new = {"source", "data", "images", "filter", "usual"}
    def keys(config): return {k for k, v in config.items()} | {k for v in config.values() if isinstance(v, dict) for k in keys(v)}
    for t in tasks: assert not new & keys(t.infra.config(uid=True, exclude_defaults=True)), t.title


def test_names_of_data_are_those_of_the_worlds():
    from cemiface.study.user_files import BINS as files, NEEDED
    assert set(NEEDED) == set(PRESETS) | set(files.values()) and [f"proc-{n}" for n in files] == list(BENCHMARK_SIDES)


def test_published_volumes(tmp_path):
    from cemiface.paper.methods import volume_training
    s = Study("paper", tmp_path)
    assert s.set_training(0., 0).generated.drawn == 500_000 and s.set_training(0., 0).generated.images == 550_000  # Tables 2 to 5, 8, 10, 13, 14
    assert s.curve_training(.5, 0).generated.drawn == s.dynamics(.7, 0).generated.drawn == 100_000  # Table 11, Figure 4, D.1
    assert [volume_training(s, 0., v, 0).generated.drawn for v in (.5, 1., 1.2)] == [500_000, 1_000_000, 1_200_000]
    table11 = {t.generated.drawn for t in in_order(chosen_results(["table11"])[0].needs(s)) if isinstance(t, Training) and t.generated}
    assert table11 == {100_000} and all(Study(n, tmp_path).curve == PROFILES[n].set_per_subject for n in ("smoke", "laptop", "gpu"))


def test_a_larger_network_costs_more(tmp_path):
    s = Study("paper", tmp_path)
    base, big = s.set_training(0., 0), s.set_training(0., 0, student=dict(backbone="irse100"))
    with torch.device("meta"): flops = {n: forward_flops(backbone(n, 112, 64), 112) for n in ("irse50", "irse100")}
    assert big.work()[1] / base.work()[1] == pytest.approx(flops["irse100"] / flops["irse50"]) and flops["irse100"] > 1.8 * flops["irse50"]
    assert "irse100" in big.title and "irse50" not in base.title and base.work() == ("train", 550_000 * 40)
    assert s.set_training(0., 0, student=dict(backbone="irse50")) is base


def test_rows_for_sets():
    assert published_row("synface", 9) == ("SynFace", .5) and published_row("DigiFace-1.2M", 9) == ("DigiFace", 1.2) and published_row("IDiff-Face", 9) == ("IDiff-Face", .5)
    assert published_row("CemiFace", 510_000) == ("sets/CemiFace", .51) and published_row("DigiFace-0.7M", 700_000) == ("sets/DigiFace-0.7M", .7)
    assert published_row("DCFace", 1) == ("DCFace", .5) and set(published("table6").method) >= {"SynFace", "DigiFace"}


@pytest.mark.parametrize("K", [1, 2, 4])
def test_first_images_equal_a_loop(K):
    g = torch.Generator().manual_seed(K)
    labels = torch.cat([torch.arange(6), torch.randint(6, (20,), generator=g)])
    emb = torch.randn(26, 3, generator=g)
    expected = [emb[labels == i][:K] for i in range(6) if (labels == i).sum() >= K]
    assert torch.equal(first_images(dict(emb=emb, labels=labels), K), torch.stack(expected))


# ---- the command
def run(*words): return CliRunner(env=dict(NO_COLOR="1", TERM="dumb")).invoke(app, [str(w) for w in words])


def test_list_says_what_each_result_lacks(data, tmp_path):
    answer = run("reproduce", "--list", "--profile", "paper", "--data", data, "--out", tmp_path)
    assert answer.exit_code == 0, answer.output
    line = {l.split()[0]: l for l in answer.output.splitlines() if l.startswith("  ")}
    lacks = {name: l.rpartition("(lacks ")[2].rstrip(")").split(", ") if "(lacks " in l else [] for name, l in line.items()}
    assert sorted(lacks["table4"]) == ["ddpm", "flickr", "flickr_1shot", "vggface2", "webface_1shot"]  # of the last one, 26 where 10,000 are needed
    assert not lacks["table1"] and "digiface" in lacks["figure9"] and "is missing" in answer.output


def test_sets_of_others_at_any_profile(data, tmp_path):
    s = Study("smoke", tmp_path, 1, data=data)
    assert not s.real and s.other_sets()["SynFace"].count == 12 and s.other_sets()["SynFace"].size == 16
    titles = [t.title for t in in_order(chosen_results(["table6"])[0].needs(s))]
    assert "recogniser on the set SynFace, cosface, seed 0" in titles and "faces of proc:casia, 12 x 20, 16 px" in titles
    assert Study("smoke", tmp_path, 1).faces().infra.uid() == s.faces().infra.uid()
    (tmp_path / "empty").mkdir()
    for folder, words in ((tmp_path / "empty", "holds no sets"), (tmp_path / "nowhere", "there is no folder")):
        answer = run("reproduce", "table6", "--profile", "smoke", "--data", folder, "--out", tmp_path / "out")
        assert answer.exit_code == 2 and words in answer.output and "Traceback" not in answer.output
