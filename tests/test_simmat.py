"Training of the generator: kill -9 and resume, damaged and foreign states, settings that change the result."
import os, signal, subprocess, sys, textwrap
import numpy as np, pandas as pd, pytest, torch
from diffusers import DDIMScheduler
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from cemiface.core.settings import changed
from cemiface.recognition.backbones import backbone
from cemiface.data.faceset import FaceSet, batches, to_float
from cemiface.generation.dcface import DCFaceConfig, train_dcface
from cemiface.data.images import read_image
from cemiface.generation.diffusion import ddim_scheduler, denoise
from cemiface.generation.simmat import PACE, SimMatConfig, m_grid, simmat_loss
from cemiface.generation.training import SAMPLE_MS, Denoiser, SimMat, draw_step, load_generator, plot_training, random_centres, step_generator
from cemiface.generation.diffusion import eps_from_output, noise_scheduler, x0_from_eps
from cemiface.generation.training import train_generator
from small import TINY, same, weights

SHORT = SimMatConfig(steps=12, batch_size=4, lr=1e-3, warmup_steps=2, log_every=3, save_every=0)


def faces(n=24):
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return FaceSet(images, torch.arange(n)//2, [str(i) for i in range(-(-n//2))], "noise")


def embedder(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 512))


def train(out, config=SHORT, **kw):
    return train_generator(faces(), embedder(), TINY, config, out, progress=False, **kw)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    train(out)
    return out


KILLED = [{}, dict(accumulate=2, checkpointing=True, channels_last=True, identity="random_centre", sample_every=7)]
CHILD = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_simmat as t, cemiface.generation.training as simmat
    plain, calls = simmat.draw_step, iter(range(100))
    def kill_at_8(*a):
        if next(calls) == 8: os.kill(os.getpid(), signal.SIGKILL)
        return plain(*a)
    simmat.draw_step = kill_at_8
    for k, how in enumerate(t.KILLED):
        if not (pid := os.fork()): t.train(Path(sys.argv[2])/str(k), t.changed(t.SHORT, **how))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""")


@pytest.fixture(scope="module")
def killed(tmp_path_factory): # a folder for each of KILLED, as a kill -9 in step 9 left it
    out = tmp_path_factory.mktemp("killed")
    child = subprocess.run([sys.executable, "-c", CHILD, os.path.dirname(__file__), str(out)], capture_output=True, text=True)
    assert child.stdout.split() == [str(-signal.SIGKILL)]*2, child.stderr
    return out


def same_log(a, b):
    pd.testing.assert_frame_equal(*(pd.read_csv(d/"log.csv").drop(columns="images_per_s") for d in (a, b)))


@pytest.mark.parametrize("k", range(len(KILLED)))
def test_killed_run_ends_where_a_whole_one_ends(killed, tmp_path, k):
    config, cut = changed(SHORT, **KILLED[k]), killed/str(k)
    assert pd.read_csv(cut/"log.csv").step.tolist() == [3, 6] and not (cut/"unet").exists()
    train(cut, config)
    train(tmp_path, config)
    assert same(weights(tmp_path), weights(cut))
    same_log(tmp_path, cut)
    assert [p.read_bytes() for p in sorted(tmp_path.glob("samples/*"))] == [p.read_bytes() for p in sorted(cut.glob("samples/*"))]


def test_more_steps_go_on_from_a_finished_run(whole, tmp_path):
    train(tmp_path, changed(SHORT, steps=6))
    assert not same(weights(whole), weights(tmp_path))
    train(tmp_path)
    assert same(weights(whole), weights(tmp_path))


def test_finished_run_is_only_read(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    train(whole)
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}


@pytest.mark.parametrize("change", [dict(lambda_simmat=0.), dict(similarity="euclidean"), dict(interval=None), dict(m_span=(0., 1.)),
                                    dict(flip=False), dict(seed=1), dict(ema_max=.5), dict(clip_grad=.01), dict(weight_decay=.5), dict(snr_scale=49.),
                                    dict(identity="class_centre"), dict(identity="random_centre"), dict(precision="bf16")], ids=str)
def test_every_setting_has_an_effect(whole, tmp_path, change):
    train(tmp_path, changed(SHORT, **change))
    assert not same(weights(whole), weights(tmp_path))


def test_conditioner_is_averaged_too(whole):
    state = load_file(whole/"state.safetensors")
    raw, mean = state["model.conditioner.f1.weight"], weights(whole)["conditioner"]["f1.weight"]
    assert not torch.equal(raw, mean) and torch.allclose(raw, mean, atol=.05)


def test_recogniser_stays_as_it_was(tmp_path):
    network = embedder()
    before = [p.clone() for p in network.parameters()]
    train_generator(faces(), network, TINY, SHORT, tmp_path, progress=False)
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, network.parameters()))


def test_damaged_state_is_named(tmp_path):
    (tmp_path/"state.safetensors").write_bytes(b"not a state")
    with pytest.raises(ValueError, match="state.safetensors cannot be read"): train(tmp_path)


def test_state_of_other_settings_is_refused(whole):
    with pytest.raises(ValueError, match="other settings .*lr"): train(whole, changed(SHORT, lr=.5))


@settings(deadline=None, max_examples=50)
@given(st.floats(-1, 1), st.floats(-1, 1), st.integers(0, 1000))
def test_loss_against_plain_arithmetic(s, m, t):
    one = simmat_loss(torch.tensor([s]), torch.tensor([m]), torch.tensor([t]), 1000).item()
    assert one == pytest.approx((1-t/1000)*(1-s)**2+t/1000*(m-s)**2, abs=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([.01, .02, .04, .05, .06, .1, .5, 1.]))
def test_grid_against_numpy(interval):
    assert np.allclose(m_grid(interval), np.arange(-1, 1+1e-6, interval), atol=1e-6)


def test_x0_is_clipped_and_passes_no_gradient_outside():
    alpha_bar = noise_scheduler().alphas_cumprod[[900]]
    eps = torch.tensor([[[[0., 5.]]]], requires_grad=True)
    x0 = x0_from_eps(torch.zeros(1, 1, 1, 2), eps, alpha_bar)
    x0.sum().backward()
    assert x0.tolist() == [[[[0., -1.]]]] and eps.grad[0, 0, 0, 0] < 0 and eps.grad[0, 0, 0, 1] == 0


def test_sampler_reads_the_schedule_of_the_run(tmp_path):
    train(tmp_path, changed(SHORT, steps=3, snr_scale=49.))
    a, b = (s.alphas_cumprod.double() for s in (noise_scheduler(), DDIMScheduler.from_pretrained(tmp_path/"scheduler")))
    assert torch.allclose(b/(1-b), 49*a/(1-a), rtol=1e-2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1., 12.25, 49.]))
def test_v_against_the_equations_written_out(t, snr_scale):
    a = noise_scheduler(snr_scale=snr_scale).alphas_cumprod[[t]]
    x0, eps = torch.rand(2, 1, 3, 4, 4).mul(2).sub(1)
    root, rest = a.double().sqrt().item(), (1-a.double()).sqrt().item()
    xt, v = root*x0.double()+rest*eps.double(), root*eps.double()-rest*x0.double()
    assert torch.allclose(eps_from_output(xt.float(), v.float(), a, "v_prediction"), eps, atol=1e-5)
    assert torch.allclose(x0_from_eps(xt, eps_from_output(xt, v, a.double(), "v_prediction"), a.double()), x0.double(), atol=1e-6)


def test_losses_are_of_the_noise_whatever_the_network_puts_out(tmp_path, monkeypatch):
    v = changed(SHORT, steps=1, prediction="v_prediction", lr=1e-12, log_every=1)
    monkeypatch.setattr(Denoiser, "forward", lambda self, xt, t, emb, m: 0*self.conditioner(emb, m).mean() + torch.zeros_like(xt))
    train(tmp_path, v)
    images, _, index = next(batches(faces(), 4, v.seed, 0))
    flip, t, m, eps = draw_step(images, v, step_generator(v.seed, 0, "cpu"))
    x = to_float(images)
    x = torch.where(flip[:, None, None, None], x.flip(-1), x)
    scheduler = noise_scheduler()
    rest = (1-scheduler.alphas_cumprod[t])[:, None, None, None].sqrt()
    expected = (rest*scheduler.add_noise(x, eps, t)-eps).square().mean()  # v = 0: eps' is the noised image times the root of 1 - alpha
    assert np.isclose(pd.read_csv(tmp_path/"log.csv").loss_mse[0], expected.item(), rtol=1e-4)


def test_the_kind_of_output_travels_with_the_run(tmp_path):
    v = changed(SHORT, steps=3, prediction="v_prediction")
    train(tmp_path, v)
    assert DDIMScheduler.from_pretrained(tmp_path/"scheduler").config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="prediction"): train(tmp_path, changed(v, prediction="epsilon"))


def close(a, b, lr=SHORT.lr):
    "Two runs that differ in rounding: Adam turns a gradient that is all rounding into a whole step, so a few weights may differ by some of them."
    for part, tensors in a.items():
        off = torch.cat([(v-b[part][k]).abs().flatten() for k, v in tensors.items()])
        assert off.mean() < .02*lr and off.max() < 2*SHORT.steps*lr


def gradients(out):
    "Adam's mean of the gradients, over all weights."
    state = load_file(out/"state.safetensors")
    return torch.cat([v.flatten() for k, v in sorted(state.items()) if k.endswith("exp_avg")])


@pytest.mark.parametrize("how", [dict(accumulate=2), dict(accumulate=4), dict(checkpointing=True), dict(channels_last=True)], ids=str)
def test_how_a_step_is_computed_changes_only_rounding(whole, tmp_path, how):
    train(tmp_path, changed(SHORT, **how))
    assert torch.allclose(gradients(tmp_path), gradients(whole), atol=1e-5)
    close(weights(whole), weights(tmp_path))
    logs = [pd.read_csv(d/"log.csv").drop(columns="images_per_s") for d in (whole, tmp_path)]
    np.testing.assert_allclose(*logs, rtol=1e-3, atol=1e-5)


def test_a_step_in_pieces_is_one_step(tmp_path, monkeypatch):
    seen, plain = [], Denoiser.forward
    monkeypatch.setattr(Denoiser, "forward", lambda self, xt, t, emb, m: seen.append((xt, t, m)) or plain(self, xt, t, emb, m))
    one = changed(SHORT, steps=1)
    for k in (1, 4): train(tmp_path/str(k), changed(one, accumulate=k))
    assert [len(xt) for xt, *_ in seen] == [4, 1, 1, 1, 1]
    for whole, *pieces in zip(*seen): assert torch.equal(whole, torch.cat(pieces)) # noise, time steps and factors are those of the whole batch


def test_the_baseline_in_pieces(tmp_path):
    network = backbone("ir18", 16, 8).eval()
    for k in (1, 2):
        config = DCFaceConfig(**SHORT.model_dump(include=set(DCFaceConfig.model_fields)) | dict(accumulate=k))
        train_dcface(faces(), network, TINY, config, tmp_path/str(k), progress=False)
    assert torch.allclose(gradients(tmp_path/"1"), gradients(tmp_path/"2"), atol=1e-5)
    close(weights(tmp_path/"1"), weights(tmp_path/"2"))


def test_checkpointing_computes_the_unet_twice(tmp_path, monkeypatch):
    from diffusers.models.resnet import ResnetBlock2D
    calls, plain = [0], ResnetBlock2D.forward
    def counted(self, *a, **kw): calls[0] += 1; return plain(self, *a, **kw)
    monkeypatch.setattr(ResnetBlock2D, "forward", counted)
    found = []
    for on in (False, True):
        calls[0] = 0
        train(tmp_path/str(on), changed(SHORT, steps=1, checkpointing=on))
        found.append(calls[0])
    assert found[1] > 1.5*found[0]


def test_compiled_is_the_same_training(whole, tmp_path, monkeypatch):
    compile, calls = nn.Module.compile, []
    monkeypatch.setattr(nn.Module, "compile", lambda net: calls.append(type(net).__name__) or compile(net, backend="eager"))
    train(tmp_path, changed(SHORT, compile=True))
    assert calls == ["UNet2DConditionModel"]
    assert torch.allclose(gradients(tmp_path), gradients(whole), atol=1e-5)
    close(weights(whole), weights(tmp_path))
    assert all(weights(whole)[k].keys() == weights(tmp_path)[k].keys() for k in ("unet", "conditioner")) # plain names
    assert load_file(whole/"state.safetensors").keys() == load_file(tmp_path/"state.safetensors").keys()


def test_a_run_may_go_on_in_another_way(whole, tmp_path):
    train(tmp_path, changed(SHORT, steps=6, accumulate=2, checkpointing=True, channels_last=True, sample_every=5))
    train(tmp_path)
    close(weights(whole), weights(tmp_path))
    assert set(PACE) < set(SimMatConfig.model_fields)


def test_a_batch_that_does_not_split_is_named(tmp_path):
    with pytest.raises(ValueError, match="batch_size 4 does not split over 1 processes with accumulate=3: choose a multiple of 3"):
        train(tmp_path, changed(SHORT, accumulate=3))
    with pytest.raises(ValueError, match="Input should be 'auto', 'no' or 'bf16'"): SimMatConfig(precision="fp16")


# who a face is

def task(**change):
    return SimMat(faces(), embedder(), changed(SHORT, **change), "cpu", False)


def test_class_centre_by_hand():
    one, network, data = task(identity="class_centre"), embedder(), faces()
    x = to_float(data.images)
    unit = F.normalize(torch.stack([network(x), network(x.flip(-1))]), dim=2)
    (emb, _), _ = one.condition(x, torch.tensor([False, True]*12), torch.arange(24), torch.zeros(24))
    for i in range(24): assert torch.allclose(emb[i], F.normalize(unit[:, data.labels == data.labels[i]].sum((0, 1)), dim=0), atol=1e-5)
    (plain, _), _ = task(identity="class_centre", flip=False).condition(x, torch.zeros(24, dtype=torch.bool), torch.arange(24), torch.zeros(24))
    assert torch.allclose(plain[2], F.normalize(unit[0, 2]+unit[0, 3], dim=0), atol=1e-5)


def test_loss_is_towards_the_centre_that_the_generator_is_told():
    for identity in ("class_centre", "random_centre"):
        one = task(identity=identity)
        (told, _), (wanted, m) = one.condition(None, torch.zeros(4, dtype=torch.bool), torch.tensor([0, 1, 2, 23]), torch.zeros(4))
        assert torch.equal(told, wanted) and torch.equal(told[0], told[1]) and not torch.allclose(told[1], told[2])
        assert torch.allclose(one.loss(told, torch.tensor([5]), wanted, m)[1], torch.ones(4), atol=1e-5)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31), st.integers(1, 20), st.integers(1, 20))
def test_random_centres_depend_on_seed_and_label_alone(seed, n, more):
    some, all_ = random_centres(n, 32, seed), random_centres(n+more, 32, seed)
    assert torch.equal(some, all_[:n]) and torch.allclose(all_.norm(dim=1), torch.ones(n+more), atol=1e-5)
    assert not torch.equal(some, random_centres(n, 32, seed+1)) and len(all_.unique(dim=0)) == n+more


def test_centres_need_labels(tmp_path):
    one = FaceSet(faces().images, torch.zeros(24, dtype=torch.long), ["?"], "noise")
    for identity in ("class_centre", "random_centre"):
        with pytest.raises(ValueError, match=f"noise has 1 subject, identity='{identity}' needs labels"):
            train_generator(one, embedder(), TINY, changed(SHORT, identity=identity), tmp_path, progress=False)
    with pytest.raises(ValueError, match="other settings .*identity"):
        train(tmp_path, changed(SHORT, steps=1))
        train(tmp_path, changed(SHORT, steps=1, identity="class_centre"))


def test_only_what_is_needed_is_embedded():
    images = [0]
    class Counting(nn.Module):
        def forward(self, x): images[0] += len(x); return x.flatten(1)
    for change, expected in ((dict(), 48), (dict(flip=False), 24), (dict(identity="class_centre", flip=False), 24), (dict(identity="random_centre", flip=False), 1)):
        images[0] = 0
        SimMat(faces(), Counting(), changed(SHORT, **change), "cpu", False)
        assert images[0] == expected


# what is seen of a run

def test_samples_leave_the_training_alone(whole, tmp_path):
    train(tmp_path, changed(SHORT, sample_every=4))
    assert same(weights(whole), weights(tmp_path))
    same_log(whole, tmp_path)
    assert [p.name for p in sorted(tmp_path.glob("samples/*"))] == ["0000004.png", "0000008.png", "0000012.png"]
    last = read_image(tmp_path/"samples/0000012.png")
    assert last.shape == (3, 4*16, 6*16)
    assert torch.equal(last[:, :16, :16], faces().images[0]) and torch.equal(last[:, -16:, :16], faces().images[23])
    unet, conditioner = load_generator(tmp_path)     # the average of step 12 draws the same again
    noise = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(SHORT.seed))[1:2]
    emb = F.normalize(embedder()(to_float(faces().images[7:8])), dim=1)
    with torch.no_grad(): drawn = denoise(unet, ddim_scheduler(), conditioner(emb, torch.tensor([SAMPLE_MS[3]])), noise)
    assert ((to_float(last[:, 16:32, 64:80])-drawn[0]).abs() < .02).all()


def test_a_method_without_samples_says_so(tmp_path):
    with pytest.raises(ValueError, match="Blind draws no samples while it trains"):
        train(tmp_path, changed(SHORT, sample_every=4), method=type("Blind", (), {}))


def test_losses_by_band_add_up(whole):
    log = pd.read_csv(whole/"log.csv")
    assert log.step.tolist() == [3, 6, 9, 12]
    config, count = SHORT, np.zeros((4, 5))
    for step in range(12): np.add.at(count[step//3], draw_step(faces().images[:4], config, step_generator(0, step))[1].numpy()*5//1000, 1)
    for overall, name in (("loss_mse", "mse"), ("loss_simmat", "loss_simmat")):
        by_band = log[[f"{name}_{k}" for k in range(5)]].to_numpy()
        assert (np.isnan(by_band) == (count == 0)).all()
        np.testing.assert_allclose((np.nan_to_num(by_band)*count).sum(1)/12, log[overall], rtol=1e-4)


def test_a_plot_of_any_log(whole):
    log = pd.read_csv(whole/"log.csv")
    lines = lambda log: [len(ax.lines) for ax in plot_training(log).axes]
    assert lines(log) == [6, 6, 10]
    assert lines(log[[c for c in log if not c.startswith(("mse_", "loss_simmat_"))]]) == [1, 1, 10]    # a log from before these were kept
    assert lines(log.rename(columns=lambda c: c.replace("loss_simmat", "loss_id"))) == [6, 6, 5]       # another method: no slope of least loss


def test_trackers_hear_every_row(whole, tmp_path):
    from test_recognition import Notes
    notes = Notes()
    train(tmp_path, log_with=notes)
    assert same(weights(whole), weights(tmp_path)) and notes.finished == 1 and notes.settings["lambda_simmat"] == .05
    log = pd.read_csv(whole/"log.csv")
    assert [step for step, _ in notes.entries] == log.step.tolist()
    np.testing.assert_allclose([row["loss_mse"] for _, row in notes.entries], log.loss_mse)
    assert set(notes.entries[0][1]) == set(log.columns)
