"The baseline: style statistics, pairs, loss, kill -9 and resume, style bank, pipeline."
import json, os, shutil, signal, subprocess, sys, textwrap
from pathlib import Path
import diffusers, pandas as pd, pytest, torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F

import cemiface
from cemiface.core.settings import changed
from cemiface.recognition.backbones import backbone
from cemiface.audit.card import write_card
from cemiface.data.faceset import FaceSet, to_float
from cemiface.generation.dcface import DCFace, DCFaceConditioner, DCFaceConfig, DCFacePipeline, StyleBank, identity_image, identity_loss, patch_statistics, portraits, start_from, style_bank, style_cells, style_grid, style_map, train_dcface
from cemiface.generation import shipped
from cemiface.generation.shipped import load_beside, save_beside, shipped_dcface
from cemiface.data.images import decode_image
from cemiface.sets.stored import regenerate, verify_set
from cemiface.generation.diffusion import ddim_scheduler
from cemiface.generation.conditioning import identity_embedding
from cemiface.generation.shipped import shipped_pipeline
from cemiface.generation.pipeline import untrained_pipeline
from cemiface.world.worlds import draw_world
from cemiface.sets.layout import merge_set
from cemiface.generation.simmat import SimMatConfig
from cemiface.generation.training import load_generator
from cemiface.generation.training import train_generator
from cemiface.sets.synthesis import draw, generate_set, model_hash
from cemiface.generation.diffusion import image_noise
from cemiface.sets.layout import image_seed
from small import TINY, same, weights

diffusers.utils.logging.disable_progress_bar()
SHORT = DCFaceConfig(steps=9, batch_size=4, lr=1e-3, warmup_steps=2, log_every=3, save_every=0)
pytestmark = pytest.mark.slow


def faces(n=24, per_subject=3, size=16):
    images = torch.randint(0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return FaceSet(images, torch.arange(n)//per_subject, [str(i) for i in range(-(-n//per_subject))], "noise")


def recogniser(size=16, width=8, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return backbone("ir18", size, width).eval()


def train(out, config=SHORT, **kw):
    return train_dcface(faces(), recogniser(), TINY, config, out, progress=False, **kw)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return out


@pytest.fixture(scope="module")
def pipe(whole):
    unet, conditioner = load_generator(whole, DCFaceConditioner)
    pipe = DCFacePipeline(unet, conditioner, recogniser(), ddim_scheduler(), style_bank(recogniser(), faces()))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds): return [torch.Generator().manual_seed(s) for s in seeds]


# style

@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(0, 6), st.integers(0, 10**6))
def test_statistics_against_plain_loops(cells, more, seed):
    side, g = cells+more, torch.Generator().manual_seed(seed)
    f = torch.randn(1, 2, side, side, generator=g)
    found = patch_statistics(f, cells)
    assert found.shape == (1, cells*cells, 4)
    for i in range(cells):
        for j in range(cells):
            for c in range(2):
                values = [f[0, c, y, x].item() for y in range(i*side//cells, -(-(i+1)*side//cells)) for x in range(j*side//cells, -(-(j+1)*side//cells))]
                mean = sum(values)/len(values)
                std = (sum((v-mean)**2 for v in values)/len(values))**.5
                assert found[0, i*cells+j, c] == pytest.approx(mean, abs=1e-5)
                assert found[0, i*cells+j, 2+c] == pytest.approx(std, abs=2e-3)


def test_an_even_map_has_no_deviation():
    assert patch_statistics(torch.full((1, 1, 10, 10), 3.), 5).equal(torch.tensor([3., 0.]).expand(1, 25, 2))


def test_the_style_map_is_the_first_stage():
    net, seen = recogniser(), []
    net.layer1.register_forward_hook(lambda module, given, out: seen.append(out))
    x = torch.rand(2, 3, 16, 16)*2-1
    net(x)
    assert torch.equal(style_map(net, x), seen[0])


@pytest.mark.parametrize("size,width,side,cells", [(16, 8, 16, 2), (32, 16, 16, 3), (64, 64, 32, 3), (112, 64, 56, 5)])
def test_map_and_grid_follow_the_size(size, width, side, cells):
    net = recogniser(size, width)
    with torch.no_grad(): assert style_map(net, torch.zeros(1, 3, size, size)).shape == (1, width, side, side)
    assert style_cells(size, width) == cells
    assert style_bank(net, faces(2, 1, size)).statistics.shape == (2, cells**2, 2*width)


def test_a_grid_finer_than_the_map_is_refused():
    with pytest.raises(ValueError, match="17x17 cells on a style map of 16x16: choose at most 16"): style_bank(recogniser(), faces(), cells=17)


def test_every_cell_and_both_conditions_reach_the_tokens():
    c = DCFaceConditioner(emb_dim=6, channels=3, cells=2, cond_dim=8, tokens=2)
    emb, style = torch.randn(1, 6, requires_grad=True), torch.randn(1, 4, 6, requires_grad=True)
    tokens = c(emb, style)
    assert tokens.shape == (1, 6, 8)
    for k in range(6):
        d_emb, d_style = torch.autograd.grad(tokens[0, k].square().mul(torch.arange(1., 9)).sum(), (emb, style), retain_graph=True, allow_unused=True, materialize_grads=True)
        assert d_emb.any() == (k < 2)
        assert d_style[0].any(1).tolist() == [k >= 2 and j == k-2 for j in range(4)]


# pairs and loss

@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(2, 5), st.integers(0, 10**6))
def test_identity_images_against_a_search(sizes, nearest, seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((n,), c) for c, n in enumerate(sizes)])[torch.randperm(sum(sizes), generator=g)]
    emb = F.normalize(torch.randn(len(labels), 6, generator=g), dim=1)
    found, count = portraits(emb, labels, nearest)
    drawn = {i: set() for i in range(len(labels))}
    for p in torch.arange(0, 1, .05):
        index = torch.arange(len(labels))
        for i, j in enumerate(identity_image(index, labels, p.expand(len(labels)), found, count).tolist()): drawn[i].add(j)
    for i, label in enumerate(labels.tolist()):
        mine = [j for j in range(len(labels)) if labels[j] == label]
        centre = sum(emb[j] for j in mine)
        best = sorted(mine, key=lambda j: -float(F.cosine_similarity(emb[j], centre, dim=0)))[:nearest]
        assert drawn[i] == (set(best)-{i} if len(mine) > 1 else {i})


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 1000))
def test_loss_against_plain_arithmetic(s_id, s_style, t):
    found = identity_loss(torch.tensor([s_id]), torch.tensor([s_style]), torch.tensor([t]), 1000).item()
    assert found == pytest.approx(t/1000*(1-s_id)+(1-t/1000)*(1-s_style), abs=1e-5)


def test_loss_at_both_ends():
    s_id, s_style = torch.tensor([.2, -.5]), torch.tensor([.9, .1])
    assert torch.equal(identity_loss(s_id, s_style, torch.zeros(2), 1000), 1-s_style)
    assert torch.equal(identity_loss(s_id, s_style, torch.full((2,), 1000), 1000), 1-s_id)


def test_a_step_uses_the_pair_the_mirror_and_the_dropout():
    data, net, config = faces(), recogniser(), DCFaceConfig(batch_size=8)
    task, index = DCFace(data, net, config, "cpu", False), torch.arange(8)
    flip, t, pick, flip_id, keep, eps = task.draw(data.images[:8], torch.Generator().manual_seed(3))
    x = to_float(data.images[:8])
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    (emb_id, style), (loss_id, emb_style) = task.condition(x, flip, index, pick, flip_id, keep)
    who = identity_image(index, data.labels[:8], pick, task.nearest, task.count)
    portrait = to_float(data.images[who])
    with torch.no_grad():
        assert torch.allclose(emb_style, F.normalize(net(x), dim=1), atol=1e-5)
        assert torch.allclose(emb_id, F.normalize(net(torch.where(flip_id[:, None, None, None], portrait.flip(-1), portrait)), dim=1), atol=1e-5)
        plain = patch_statistics(style_map(net, x), 2)
    assert loss_id is emb_id and (data.labels[who] == data.labels[:8]).all() and (who != index).all()
    assert flip.any() and flip_id.any() and not torch.equal(flip, flip_id)
    kept = style != 0
    assert .5 < kept.float().mean() < .9 and torch.allclose(style[kept], plain[kept]/.7, atol=1e-5)


# training

CHILD = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_dcface as t
    plain, calls = t.DCFace.draw, iter(range(100))
    def kill_at_7(*a):
        if next(calls) == 7: os.kill(os.getpid(), signal.SIGKILL)
        return plain(*a)
    t.DCFace.draw = kill_at_7
    t.train(Path(sys.argv[2]))
""")


def test_killed_run_ends_where_a_whole_one_ends(whole, tmp_path):
    child = subprocess.run([sys.executable, "-c", CHILD, os.path.dirname(__file__), str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert pd.read_csv(tmp_path/"log.csv").step.tolist() == [3, 6] and not (tmp_path/"unet").exists()
    train(tmp_path)
    assert same(weights(whole), weights(tmp_path))
    pd.testing.assert_frame_equal(*(pd.read_csv(d/"log.csv").drop(columns="images_per_s") for d in (whole, tmp_path)))


@pytest.mark.parametrize("change", [dict(lambda_id=0.), dict(cells=3), dict(style_dropout=0.), dict(portraits=2), dict(flip=False), dict(prediction="v_prediction")], ids=str)
def test_every_setting_has_an_effect(whole, tmp_path, change):
    train(tmp_path, changed(SHORT, **change, steps=6))
    other = tmp_path/"six"
    if not change.get("cells"): # another grid has weights of another shape
        train(other, changed(SHORT, steps=6))
        assert not same(weights(other), weights(tmp_path))
    else: assert weights(tmp_path)["conditioner"]["cell"].shape[0] == 9 and weights(whole)["conditioner"]["cell"].shape[0] == 4


def test_labels_decide_the_pairs(whole, tmp_path):
    data = faces()
    mixed = FaceSet(data.images, data.labels.flip(0)[torch.randperm(24, generator=torch.Generator().manual_seed(1))], data.subjects, data.name)
    train_dcface(mixed, recogniser(), TINY, SHORT, tmp_path, progress=False)
    assert not same(weights(whole), weights(tmp_path))


def test_recogniser_stays_as_it_was(tmp_path):
    net = recogniser()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train_dcface(faces(), net, TINY, changed(SHORT, steps=2), tmp_path, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())


def test_a_run_of_the_other_method_is_refused(whole, tmp_path):
    simmat = SimMatConfig(**{k: v for k, v in SHORT.model_dump().items() if k in SimMatConfig.model_fields})
    with pytest.raises(ValueError, match="other settings .*lambda_id"): train_generator(faces(), recogniser(), TINY, simmat, whole, progress=False)
    with pytest.raises(ValueError, match="holds a generator with a DCFaceConditioner, not a Conditioner"): load_generator(whole)
    train_generator(faces(), recogniser(), TINY, changed(simmat, steps=1), tmp_path, progress=False)
    with pytest.raises(ValueError, match="other settings .*lambda_simmat"): train(tmp_path)
    with pytest.raises(ValueError, match="trained by another method"): train(tmp_path/"new", init=tmp_path)


def test_misfits_are_named(tmp_path):
    with pytest.raises(ValueError, match="one image per subject"): train_dcface(faces(8, 1), recogniser(), TINY, SHORT, tmp_path, progress=False)
    with pytest.raises(ValueError, match="Sequential has no first stage"): train_dcface(faces(), nn.Sequential(), TINY, SHORT, tmp_path, progress=False)
    with pytest.raises(ValueError, match="32 px, the generator 16 px"): train_dcface(faces(size=32), recogniser(), TINY, SHORT, tmp_path, progress=False)


def test_a_start_from_cemiface_has_its_identity_tokens_at_m_1(tmp_path):
    cemi = untrained_pipeline(TINY, recogniser())
    start_from(cemi, SHORT, tmp_path/"a"), start_from(cemi, SHORT, tmp_path/"b")
    assert same(weights(tmp_path/"a"), weights(tmp_path/"b"))
    unet, conditioner = load_generator(tmp_path/"a", DCFaceConditioner)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), cemi.unet.parameters()))
    emb = F.normalize(torch.randn(5, 512), dim=1)
    assert torch.allclose(conditioner(emb, torch.randn(5, 4, 16))[:, :TINY.tokens], cemi.conditioner(emb, torch.ones(5)), atol=1e-4)
    fast = changed(SHORT, steps=1, lr=1e-9, warmup_steps=0)
    trained = train(tmp_path/"run", fast, init=tmp_path/"a")
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(trained[1].parameters(), conditioner.parameters()))


# bank and pipeline

def test_bank_holds_the_images_styles(pipe):
    data = faces()
    with torch.no_grad(): alone = torch.cat([patch_statistics(style_map(recogniser(), to_float(data.images[i:i+1])), 2) for i in range(24)])
    assert torch.allclose(pipe.bank.statistics, alone, atol=1e-5)
    some = style_bank(recogniser(), data, images=4, batch_size=3).statistics
    assert torch.allclose(some, alone[[0, 8, 15, 23]], atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(0, 10**9), min_size=1, max_size=8), st.randoms())
def test_a_style_is_its_seeds(seeds, random):
    bank = StyleBank(images=50, cells=1, channels=1)
    bank.statistics.copy_(torch.arange(50.)[:, None, None].expand(-1, 1, 2))
    order = list(range(len(seeds)))
    random.shuffle(order)
    assert torch.equal(bank.draw(len(seeds), seeded(*seeds))[order], bank.draw(len(seeds), seeded(*[seeds[i] for i in order])))


def test_styles_are_drawn_evenly():
    bank = StyleBank(images=10, cells=1, channels=1)
    bank.statistics.copy_(torch.arange(10.)[:, None, None].expand(-1, 1, 2))
    drawn = bank.draw(2000, seeded(*[image_seed(0, i, k) for i in range(20) for k in range(100)]))[:, 0, 0].long()
    assert drawn.bincount(minlength=10).float().sub(200).abs().max() < 5*(2000*.1*.9)**.5
    assert bank.draw(2000, torch.Generator().manual_seed(0)).unique().numel() == 10


def test_an_image_depends_on_no_neighbour_and_an_m_is_refused(pipe):
    x = to_float(faces().images[:4])
    draw = lambda rows, **kw: pipe(inquiries=x[rows], generator=seeded(*[7+r for r in rows]), num_inference_steps=2, output_type="pt", **kw).images
    a = draw([0, 1, 2, 3])
    assert torch.equal(a[[2, 0, 3, 1]], draw([2, 0, 3, 1]))
    with pytest.raises(ValueError, match="no similarity factor: leave m out"): draw([0, 1, 2, 3], m=0.)
    assert not torch.equal(a, pipe(inquiries=x, generator=seeded(1, 2, 3, 4), num_inference_steps=2, output_type="pt").images)


def test_identity_style_and_noise_all_count(pipe):
    x, noise = to_float(faces().images[:6]), image_noise([0, 1], 16)
    draw = lambda who, style, n: pipe(inquiries=x[[who]], styles=x[[style]], noise=noise[[n]], num_inference_steps=2, output_type="pt").images
    base = draw(0, 4, 0)
    assert torch.equal(base, draw(0, 4, 0)) and not any(torch.equal(base, draw(*other)) for other in ((1, 4, 0), (0, 5, 0), (0, 4, 1)))
    emb = F.normalize(pipe.recogniser(x[:1]), dim=1).detach()
    assert torch.equal(base, pipe(embeddings=emb, styles=x[[4]], noise=noise[:1], num_inference_steps=2, output_type="pt").images)
    banked = pipe(embeddings=emb, generator=seeded(5), noise=noise[:1], num_inference_steps=2, output_type="pt").images
    row = int(torch.randint(24, (1,), generator=torch.Generator().manual_seed(5)))
    given = pipe(embeddings=emb, styles=to_float(faces().images[[row]]), noise=noise[:1], num_inference_steps=2, output_type="pt").images
    assert torch.allclose(banked, given, atol=1e-4)


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DCFacePipeline.from_pretrained(tmp_path)
    assert model_hash(again) == model_hash(pipe) and not list(tmp_path.rglob("*.bin")) and len(list(tmp_path.rglob("*.safetensors"))) == 4
    again.set_progress_bar_config(disable=True)
    images = [p(inquiries=to_float(faces().images[:2]), generator=seeded(1, 2), num_inference_steps=2, output_type="np").images for p in (pipe, again)]
    assert (images[0] == images[1]).all()
    assert cemiface.DCFacePipeline is DCFacePipeline
    with pytest.raises(OSError, match="no model_index.json"): DCFacePipeline.from_pretrained(tmp_path/"nowhere")


def make(pipe, out, m=None, **kw):
    return generate_set(pipe, faces(3, 1), m, 3, out, **dict(dict(batch_size=4, steps=2, oversample=1, progress=False), **kw))


def test_a_set_is_drawn_as_with_the_other_pipeline(pipe, tmp_path):
    out = make(pipe, tmp_path/"a")
    table = pd.read_csv(out/"manifest.csv")
    assert table.subject.tolist() == [i for i in range(3) for _ in range(4)] and table.m.isna().all()
    assert json.loads((out/"set.json").read_text())["config"]["m"] is None
    victim = out/"000001/0002.png"
    before = victim.read_bytes()
    victim.unlink()
    make(pipe, out)
    assert victim.read_bytes() == before
    other = make(untrained_pipeline(TINY, recogniser()), tmp_path/"b", 0.)
    assert sorted(p.relative_to(out) for p in out.rglob("*.png")) == sorted(p.relative_to(other) for p in other.rglob("*.png"))


def test_a_set_does_not_depend_on_batches_and_shares(pipe, tmp_path):
    one, other = make(pipe, tmp_path/"one"), make(pipe, tmp_path/"other", batch_size=9)
    for k in (1, 0): make(pipe, tmp_path/"shares", shard=(k, 2))
    merge_set(tmp_path/"shares")
    files = lambda out: {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert files(tmp_path/"shares") == files(one)
    pixels = lambda out: torch.stack([decode_image(p.read_bytes(), p.name) for p in sorted(out.glob("*/*.png"))]).int()
    assert (pixels(one)-pixels(other)).abs().max() <= 1
    images = pixels(one).view(3, 4, -1)[:, :3].flatten(0, 1)
    assert len(images.unique(dim=0)) == 9  # every image has noise and a style of its own


def test_a_set_without_m_is_verified_regenerated_and_described(pipe, tmp_path):
    out = make(pipe, tmp_path/"set")
    assert not len(verify_set(out)) and regenerate(out, pipe, "1/2").same
    assert "| similarity factor m | none |" in write_card(out, pipe.recogniser, "E").read_text()


def test_m_and_pipeline_have_to_fit(pipe, tmp_path):
    with pytest.raises(ValueError, match="DCFacePipeline has no similarity factor: give m=None"): make(pipe, tmp_path/"a", 0.)
    with pytest.raises(ValueError, match="CemiFacePipeline needs a similarity factor"): make(untrained_pipeline(TINY, recogniser()), tmp_path/"a")
    assert not (tmp_path/"a").exists()


def test_what_is_the_baselines_own_is_stored_once(pipe, tmp_path):
    cemi = untrained_pipeline(TINY, recogniser())
    whole = DCFacePipeline(UNet2DConditionModel.from_config(pipe.unet.config), DCFaceConditioner.from_config(pipe.conditioner.config), cemi.recogniser, cemi.scheduler, StyleBank.from_config(pipe.bank.config))
    for name in ("unet", "conditioner", "bank"): getattr(whole, name).load_state_dict(getattr(pipe, name).state_dict())
    save_beside(whole, tmp_path)
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".json", ".safetensors"} and not (tmp_path/"recogniser").exists()
    again = load_beside(tmp_path, cemi)
    assert again.recogniser is cemi.recogniser and again.scheduler is cemi.scheduler
    for name in ("unet", "conditioner", "bank"):
        for a, b in zip(getattr(again, name).parameters(), getattr(pipe, name).parameters(), strict=True): assert a.dtype == torch.float32 and torch.equal(a, b.half().float())
    shutil.rmtree(tmp_path/"bank")
    with pytest.raises(OSError, match="holds no baseline .no bank/config.json.: give a folder"): load_beside(tmp_path, cemi)


def test_shipped_baseline(monkeypatch, tmp_path):
    pipe, cemi = shipped_dcface(), shipped_pipeline()
    assert model_hash(pipe) == model_hash(shipped_dcface()) and len(pipe.bank.statistics) >= 200
    assert all(torch.equal(a, b) for a, b in zip(pipe.recogniser.state_dict().values(), cemi.recogniser.state_dict().values(), strict=True))
    weights = Path(cemiface.__file__).parent/"weights"
    assert sum(p.stat().st_size for p in weights.rglob("*")) < 40e6 # with the generator and its recogniser
    faces = draw_world("webface_1shot", 16, 1, 64, first=70_000).images
    emb = identity_embedding(pipe.recogniser, to_float(faces), None)
    drawn = draw(pipe, emb, None, list(range(16)), steps=5)
    cos = identity_embedding(pipe.recogniser, to_float(drawn), None) @ emb.T
    assert (cos.argmax(1) == torch.arange(16)).float().mean() > .9  # who was asked for is recognised among sixteen
    monkeypatch.setattr(shipped, "WEIGHTS", tmp_path)
    with pytest.raises(OSError, match="install a release that holds them"): shipped_dcface()


def test_grid(pipe):
    images = faces().images
    found = style_grid(pipe, images[:2], images[4:7], [3, 4], steps=2)
    assert found.shape == (2, 3, 3, 16, 16) and found.dtype == torch.uint8
    one = pipe(inquiries=to_float(images[1:2]), styles=to_float(images[5:6]), noise=image_noise([4], 16), num_inference_steps=2, output_type="np").images
    assert (torch.from_numpy(one[0]).permute(2, 0, 1).int()-found[1, 1].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="2 inquiries for 1 seeds"): style_grid(pipe, images[:2], images[:2], [0])


def test_pipeline_names_what_does_not_fit(pipe):
    x = to_float(faces().images[:3])
    with pytest.raises(ValueError, match="2 generators for 3 images"): pipe(inquiries=x, generator=seeded(0, 1))
    with pytest.raises(ValueError, match="2 styles for 3 images"): pipe(inquiries=x, styles=x[:2])
    with pytest.raises(ValueError, match="a bank of 3x3 cells .* for a conditioner of 2x2 .*style_bank"):
        DCFacePipeline(pipe.unet, pipe.conditioner, pipe.recogniser, pipe.scheduler, StyleBank(images=1, cells=3, channels=8))
