"Training of the generator: kill -9 and resume, damaged and foreign states, settings that change the result."
import os, signal, subprocess, sys, textwrap
import numpy as np, pandas as pd, pytest, torch
from diffusers import DDIMScheduler
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from torch import nn

from cemiface.data import FaceSet, batches, to_float
from cemiface.simmat import (Denoiser, SimMatConfig, draw_step, eps_from_v, m_grid, noise_scheduler, simmat_loss, step_generator,
                             train_generator, x0_from_eps)
from small import TINY, same, weights

SHORT = SimMatConfig(steps=12, batch_size=4, lr=1e-3, warmup_steps=2, log_every=3, save_every=0)


def faces(n=24):
    images = torch.randint(0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return FaceSet(images, torch.arange(n)//2, [str(i) for i in range(n//2)], "noise")


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


CHILD = textwrap.dedent("""
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    import test_simmat as t, cemiface.simmat as simmat
    out, plain = Path(sys.argv[2]), simmat.draw_step
    calls = iter(range(100))
    def kill_at_8(*a):
        if next(calls) == 8: os.kill(os.getpid(), signal.SIGKILL)
        return plain(*a)
    simmat.draw_step = kill_at_8
    t.train(out)
""")


def test_killed_run_ends_where_a_whole_one_ends(whole, tmp_path):
    child = subprocess.run([sys.executable, "-c", CHILD, os.path.dirname(__file__), str(tmp_path)], capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert pd.read_csv(tmp_path/"log.csv").step.tolist() == [3, 6] and not (tmp_path/"unet").exists()
    train(tmp_path)
    assert same(weights(whole), weights(tmp_path))
    pd.testing.assert_frame_equal(*(pd.read_csv(d/"log.csv").drop(columns="images_per_s") for d in (whole, tmp_path)))


def test_more_steps_go_on_from_a_finished_run(whole, tmp_path):
    train(tmp_path, SHORT.model_copy(update=dict(steps=6)))
    assert not same(weights(whole), weights(tmp_path))
    train(tmp_path)
    assert same(weights(whole), weights(tmp_path))


def test_finished_run_is_only_read(whole):
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}
    train(whole)
    assert before == {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file()}


@pytest.mark.parametrize("change", [dict(lambda_simmat=0.), dict(similarity="euclidean"), dict(interval=None), dict(m_span=(0., 1.)),
                                    dict(flip=False), dict(seed=1), dict(ema_max=.5), dict(clip_grad=.01), dict(weight_decay=.5), dict(snr_scale=49.)], ids=str)
def test_every_setting_has_an_effect(whole, tmp_path, change):
    train(tmp_path, SHORT.model_copy(update=change))
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
    with pytest.raises(ValueError, match="other settings .*lr"): train(whole, SHORT.model_copy(update=dict(lr=.5)))


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
    train(tmp_path, SHORT.model_copy(update=dict(steps=3, snr_scale=49.)))
    a, b = (s.alphas_cumprod.double() for s in (noise_scheduler(), DDIMScheduler.from_pretrained(tmp_path/"scheduler")))
    assert torch.allclose(b/(1-b), 49*a/(1-a), rtol=1e-2)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 999), st.sampled_from([1., 12.25, 49.]))
def test_v_against_the_equations_written_out(t, snr_scale):
    a = noise_scheduler(snr_scale=snr_scale).alphas_cumprod[[t]]
    x0, eps = torch.rand(2, 1, 3, 4, 4).mul(2).sub(1)
    root, rest = a.double().sqrt().item(), (1-a.double()).sqrt().item()
    xt, v = root*x0.double()+rest*eps.double(), root*eps.double()-rest*x0.double()
    assert torch.allclose(eps_from_v(xt.float(), v.float(), a), eps, atol=1e-5)
    assert torch.allclose(x0_from_eps(xt, eps_from_v(xt, v, a.double()), a.double()), x0.double(), atol=1e-6)


def test_losses_are_of_the_noise_whatever_the_network_puts_out(tmp_path, monkeypatch):
    v = SHORT.model_copy(update=dict(steps=1, prediction="v_prediction", lr=1e-12, log_every=1))
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
    v = SHORT.model_copy(update=dict(steps=3, prediction="v_prediction"))
    train(tmp_path, v)
    assert DDIMScheduler.from_pretrained(tmp_path/"scheduler").config.prediction_type == "v_prediction"
    with pytest.raises(ValueError, match="prediction"): train(tmp_path, v.model_copy(update=dict(prediction="epsilon")))
