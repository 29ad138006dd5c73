"""The benchmark of the generator: counts against independent arithmetic, rates from given seconds, one file, clear errors."""
import contextlib
import functools
import json
import shutil

import pandas as pd
import pytest
import torch
from diffusers.models.attention_processor import Attention

import cemiface.bench.generator as module
from cemiface.core.settings import changed
from cemiface.bench.generator import bench_accuracy, bench_generator_training, bench_sampling, bench_steps, generator_parts, run_bench_generator, where_sampling_goes
from cemiface.generation.diffusion import predict
from cemiface.generation.conditioning import GENERATORS, face_conditioner, face_unet
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study

generator_cost = functools.cache(module.generator_cost) # the paper's networks take seconds to build, even without numbers


@pytest.fixture(autouse=True)
def counted_once(monkeypatch): monkeypatch.setattr(module, "generator_cost", generator_cost)


@pytest.mark.parametrize("name", ["smoke", "laptop"])
def test_operations_counted_layer_by_layer(name):
    config, count = GENERATORS[name], [0]
    unet, conditioner = face_unet(config).eval(), face_conditioner(config).eval()
    def conv(m, i, o): count[0] += 2*o.numel()*m.in_channels//m.groups*m.kernel_size[0]*m.kernel_size[1]
    def linear(m, i, o): count[0] += 2*o.numel()*m.in_features
    def attend(m, i, o): n = i[0].shape[2]*i[0].shape[3]; count[0] += 4*n*(n + config.tokens)*m.inner_dim
    kinds = {torch.nn.Conv2d: conv, torch.nn.Linear: linear, Attention: attend}
    for m in (*unet.modules(), *conditioner.modules()):
        if type(m) in kinds: m.register_forward_hook(kinds[type(m)])
    with torch.no_grad(): predict(unet, torch.zeros(1, 3, config.size, config.size), 0, conditioner(torch.zeros(1, config.emb_dim), torch.zeros(1)))
    cost = generator_cost(name, steps=7)
    assert cost["gflop_evaluation"] == pytest.approx(count[0]/1e9, abs=6e-4) and cost["gflop_sampled"] == pytest.approx(7*count[0]/1e9, abs=6e-3)
    assert cost["parameters_m"] == round(sum(p.numel() for m in (unet, conditioner) for p in m.parameters())/1e6, 2)


def test_the_papers_network_has_the_published_size():
    cost = generator_cost("paper")
    assert abs(cost["gflop_evaluation"] - 76.8) < .5 and abs(cost["parameters_m"] - 93.6) < 5 and cost["gflop_sampled"] == pytest.approx(20*cost["gflop_evaluation"], abs=.1)


def test_a_rate_is_images_over_seconds(monkeypatch):
    calls = []
    def timed(seconds, step): calls.append(seconds); step(); return pd.Series([9., 4., 16.])
    monkeypatch.setattr(module, "repeat_for", timed)
    monkeypatch.setattr(module, "matmul_peak", lambda precision: {"no": 1e9, "bf16": 2e9}[precision])
    for precision, channels_last in (("no", False), ("bf16", True)):
        row = bench_sampling("smoke", precision, channels_last, batch_size=6, evaluations=2, steps=10)
        assert row["images_per_s"] == .3 and row["gflop_per_image"] == generator_cost("smoke", 10)["gflop_sampled"]
        assert row["share_of_peak"] == round(.3*row["gflop_per_image"]/{"no": 1, "bf16": 2}[precision], 3)
    monkeypatch.setattr(module, "unet_and_input", lambda *a: (None, None, None))
    monkeypatch.setattr(module, "denoise", lambda unet, scheduler, tokens, noise, n: calls.append(n))
    assert bench_sampling("paper", steps=20)["evaluations"] == 1 and calls[-2:] == [0, 1]


def test_training_is_measured_or_says_that_it_is_extrapolated(monkeypatch):
    monkeypatch.setattr(module, "matmul_peak", lambda precision: 1e9)
    row = bench_generator_training("smoke", batch_size=4, steps=1)
    assert not row["extrapolated"] and row["images_per_s"] > 0 and row["share_of_peak"] == pytest.approx(row["images_per_s"]*row["gflop_per_image"], rel=.02)
    monkeypatch.setattr(module, "bench_sampling", lambda name, *a, **kw: dict(images_per_s=3.))
    row, cost = bench_generator_training("paper"), generator_cost("paper")
    assert row["extrapolated"] and row["images_per_s"] == pytest.approx(3*cost["gflop_evaluation"]/cost["gflop_trained"], rel=.01)


def test_where_the_time_goes_adds_up():
    shares = where_sampling_goes("smoke", batch_size=2)
    assert shares.sum() == pytest.approx(1) and shares["convolutions"] > .05 and shares.is_monotonic_decreasing and "group norm" in shares


def test_steps_against_quality():
    few, other = bench_steps("DPM-Solver++", 2, inquiries=6, ms=(1., -1.)), bench_steps("rendered", 0, inquiries=6, ms=(1., -1.))
    assert few["images"] == 12 and few["cos at m=1"] > few["cos at m=-1"] + .1 and few["ms_per_image"] > 0 and few["frechet"] > other["frechet"] > 0


def test_accuracy_is_that_of_the_reproduction(monkeypatch, tmp_path):
    monkeypatch.setattr(module.tempfile, "TemporaryDirectory", lambda: contextlib.nullcontext(tmp_path))
    p, less = PROFILES["smoke"], changed
    p = less(p, pairs=20, set_subjects=8, set_per_subject=3, simmat=less(p.simmat, steps=2), teacher=less(p.teacher, epochs=1))
    row, study = bench_accuracy("DDIM", p.steps, 2, p), Study(p, tmp_path, 2) # one folder: what was trained is there
    avg = [study.set_training(0., seed).run()["accuracy"]["AVG"] for seed in (0, 1)]
    assert row["of_each_seed"] == [round(a, 2) for a in avg] and row["AVG"] == pytest.approx(sum(avg)/2, abs=.006) and row["std"] == pytest.approx(abs(avg[0] - avg[1])/2**.5, abs=.006)
    for seed in (0, 1): shutil.rmtree(tmp_path/f"set {seed}")
    other = bench_accuracy("UniPC", 2, 1, p)
    config = json.loads((tmp_path/"set 0"/"set.json").read_text())["config"]
    assert (config["sampler"], config["steps"], config["m"], config["subjects"]*config["per_subject"]) == ("UniPCMultistepScheduler", 2, [0.], other["images"])
    assert other["std"] is None and other["AVG"] == other["of_each_seed"][0] and type(study.generator().load().scheduler).__name__ == "DDIMScheduler"


def test_all_of_it_in_one_file(monkeypatch, tmp_path):
    ran, said = [], []
    monkeypatch.setattr(module, "alone", lambda f, **kw: ran.append((f.__name__, kw)) or dict(images_per_s=1.5))
    found = run_bench_generator(["sampling", "steps"], "no", 2, out=tmp_path/"bench.json", say=said.append, configurations=["smoke"])
    assert json.loads((tmp_path/"bench.json").read_text()) == found and len(found["sampling"]) == 2 and "training" not in found and [c["configuration"] for c in found["cost"]] == ["smoke"]
    assert all(kw["name"] == "smoke" and kw["batch_size"] == 2 for f, kw in ran if f == "bench_sampling") and found["where_sampling_time_goes"]
    assert [kw["steps"] for f, kw in ran if f == "bench_steps" and kw["sampler"] == "DDIM"] == [5, 10, 20, 50] and len(said) == 2 + len(ran)
    assert [kw["compile"] for _, kw in generator_parts(None, None, True, ["smoke"])["sampling"]] == [False, False, False, True, True]
    assert [(kw["sampler"], kw["steps"]) for _, kw in generator_parts("no", None, False, [])["accuracy"]] == [("DDIM", 5), ("DDIM", 10), ("DDIM", 20), ("DDPM", 4), ("DDPM", 6), ("DDPM", 10), ("DPM-Solver++", 6), ("DPM-Solver++", 10), ("UniPC", 6), ("UniPC", 10)]
    with pytest.raises(ValueError, match="no part 'flying': choose from sampling, training, steps, accuracy"): run_bench_generator(["flying"])
    with pytest.raises(ValueError, match="no configuration 'huge': choose from smoke"): run_bench_generator(configurations=["huge"])
