"""The pipeline: same image in any company, samplers, saving and loading, hostile folders."""
import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel, UniPCMultistepScheduler
from diffusers.callbacks import PipelineCallback
from hypothesis import given as drawn, settings, strategies as st

import cemiface
from cemiface.recognition.backbones import IResNet
from cemiface.generation.conditioning import GENERATORS, Conditioner
from cemiface.data.faceset import to_float, to_uint8
from cemiface.generation.pipeline import MARK, CemiFacePipeline, calibrated_m, untrained_pipeline
from cemiface.generation.standalone import standalone
from cemiface.generation.calibration import calibrate, sample_embeddings
from cemiface.generation.diffusion import SAMPLERS, ddim_scheduler, image_size, predict
from cemiface.generation.conditioning import identity_embedding
from cemiface.generation.shipped import WEIGHTS, shipped_pipeline
from cemiface.world.worlds import draw_world
from cemiface.generation.diffusion import noise_scheduler

diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def pipe():
    pipe = untrained_pipeline(GENERATORS["smoke"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def given(pipe): # eight inquiries with noise and m
    g, size = torch.Generator().manual_seed(3), image_size(pipe.unet)
    return dict(inquiries=torch.rand(8, 3, size, size, generator=g)*2 - 1, noise=torch.randn(8, 3, size, size, generator=g), m=torch.linspace(-1, 1, 8))


def draw(pipe, given, rows=slice(None), **kw):
    return pipe(**{k: v[rows] for k, v in given.items()}, **{"num_inference_steps": 3, "output_type": "pt"} | kw).images


def test_an_image_depends_on_no_neighbour(pipe, given):
    whole, size = draw(pipe, given), 4
    for rows in torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(s))[:size] for s in range(4)]):
        part = draw(pipe, given, rows)
        assert torch.equal(part, draw(pipe, given, rows.flip(0)).flip(0))
        mixed = draw(pipe, given, torch.cat([rows[:1], torch.tensor([i for i in range(8) if i not in rows.tolist()])[:size - 1]]))
        assert torch.equal(part[0], mixed[0])
        assert (to_uint8(part).int() - to_uint8(whole[rows]).int()).abs().max() <= 1


def test_a_list_of_generators_is_one_stream_an_image(pipe, given):
    seeded = lambda seeds: draw(pipe, {k: v[:len(seeds)] for k, v in given.items() if k == "inquiries"}, m=0., generator=[torch.Generator().manual_seed(s) for s in seeds])
    same = {"inquiries": given["inquiries"][:1].expand(3, -1, -1, -1)}
    draw_same = lambda seeds: draw(pipe, same, m=0., generator=[torch.Generator().manual_seed(s) for s in seeds])
    assert torch.equal(draw_same([1, 2, 3])[1], draw_same([3, 1, 2])[2])
    assert torch.equal(seeded([4, 5]), seeded([4, 5])) and not torch.equal(seeded([4, 5]), seeded([5, 4]))
    with pytest.raises(ValueError, match="2 generators for 3 images"): draw(pipe, same, m=0., generator=[torch.Generator()]*2)


def test_the_schedule_is_that_of_training():
    assert torch.equal(ddim_scheduler().alphas_cumprod, noise_scheduler().alphas_cumprod)


def test_the_condition_is_computed_once(pipe, given, monkeypatch):
    calls, forward = [], pipe.conditioner.forward
    monkeypatch.setattr(pipe.conditioner, "forward", lambda *a: calls.append(1) or forward(*a))
    draw(pipe, given)
    assert len(calls) == 1


def test_every_argument_matters(pipe, given):
    x = draw(pipe, given)
    for key in given:
        assert not torch.equal(x, draw(pipe, given | {key: given[key].flip(0)})), key


@pytest.mark.parametrize("scheduler", [DPMSolverMultistepScheduler, UniPCMultistepScheduler, EulerDiscreteScheduler])
def test_another_scheduler_is_a_swap(pipe, given, scheduler):
    ddim = draw(pipe, given)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    try:
        other = draw(pipe, given)
        assert other.isfinite().all() and torch.equal(other, draw(pipe, given)) and not torch.equal(other, ddim)
    finally: pipe.scheduler = ddim_scheduler()
    assert torch.equal(draw(pipe, given), ddim)


def test_the_progress_bar_is_the_users_choice(pipe, given, capsys):
    draw(pipe, given)
    assert capsys.readouterr().err == ""
    pipe.set_progress_bar_config(disable=False)
    draw(pipe, given)
    pipe.set_progress_bar_config(disable=True)
    assert "3/3" in capsys.readouterr().err


def test_a_model_in_training_mode_is_put_in_evaluation_mode(pipe):
    again = CemiFacePipeline(pipe.unet.train(), pipe.conditioner.train(), pipe.recogniser.train(), ddim_scheduler())
    assert not (again.unet.training or again.conditioner.training or again.recogniser.training)


def test_save_and_load(pipe, given, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path/"model_index.json").read_text())
    assert index["conditioner"] == ["cemiface", "Conditioner"] and index["recogniser"] == ["cemiface", "IResNet"]
    assert index["_class_name"] == "CemiFacePipeline" and index["unet"] == ["diffusers", "UNet2DConditionModel"]
    again = CemiFacePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, given), draw(pipe, given))
    again.save_pretrained(tmp_path/"twice")
    for path in tmp_path.glob("*/*.safetensors"):
        assert path.read_bytes() == (tmp_path/"twice"/path.relative_to(tmp_path)).read_bytes()


def test_each_part_loads_by_itself(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for cls, name in ((UNet2DConditionModel, "unet"), (Conditioner, "conditioner"), (IResNet, "recogniser")):
        part = cls.from_pretrained(tmp_path, subfolder=name)
        assert all(torch.equal(a, b) for a, b in zip(part.state_dict().values(), getattr(pipe, name).state_dict().values(), strict=True))
    scheduler = DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert torch.equal(scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod) and scheduler.config.clip_sample


def test_a_part_can_be_replaced_on_loading(pipe, given, tmp_path):
    pipe.save_pretrained(tmp_path)
    other = untrained_pipeline(GENERATORS["smoke"], seed=1)
    again = CemiFacePipeline.from_pretrained(tmp_path, recogniser=other.recogniser, scheduler=UniPCMultistepScheduler.from_config(pipe.scheduler.config))
    assert again.recogniser is other.recogniser and isinstance(again.scheduler, UniPCMultistepScheduler)


def test_folders_that_hold_no_pipeline(pipe, tmp_path):
    with pytest.raises(OSError, match="model_index.json"): CemiFacePipeline.from_pretrained("some/hub-model")
    with pytest.raises(OSError, match="model_index.json"): CemiFacePipeline.from_pretrained(tmp_path)
    pipe.save_pretrained(tmp_path)
    weights = next((tmp_path/"unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="a file of the generator is damaged or missing .*diffusion_pytorch_model.safetensors.*: copy the folder again"): CemiFacePipeline.from_pretrained(tmp_path)
    weights.unlink()
    torch.save(pipe.unet.state_dict(), tmp_path/"unet"/"diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"): CemiFacePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("part, name, value, says", [("unet", "conv_out.bias", float("nan"), "1 not finite numbers .unet.conv_out.bias"), ("conditioner", "f2.weight", float("inf"), "1 not finite numbers .conditioner.f2.weight"),
    ("recogniser", "bn1.running_var", -1., "1 variances below zero .recogniser.bn1.running_var")])
def test_weights_that_no_training_leaves_behind(pipe, tmp_path, part, name, value, says):
    pipe.save_pretrained(tmp_path)
    path = tmp_path/part/"diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors[name][0] = value
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"a file of the generator is damaged .*{says}"): CemiFacePipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("wrong, says", [
    (dict(m=1.0001), "outside"), (dict(m=float("nan")), "outside"), (dict(m=[0., 1.]), "2 values for 8"), (dict(num_inference_steps=0), "between 1 and 1000"),
    (dict(num_inference_steps=1001), "between 1 and 1000"), (dict(embeddings=torch.ones(8, 512)), "either"), (dict(noise=torch.zeros(8, 3, 4, 4)), "noise of shape"),
    (dict(output_type="jpeg", num_inference_steps=1), "pil, pt or np")])
def test_wrong_inputs(pipe, given, wrong, says):
    with pytest.raises(ValueError, match=says): pipe(**(given | wrong))


def test_damaged_weights_are_told(given):
    pipe = untrained_pipeline(GENERATORS["smoke"])
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad(): pipe.unet.conv_out.bias[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"): draw(pipe, given)


def test_an_untrained_pipeline_leaves_the_random_state_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    a, b, c = (untrained_pipeline(GENERATORS["smoke"], seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(a.unet.conv_in.weight, b.unet.conv_in.weight) and not torch.equal(a.unet.conv_in.weight, c.unet.conv_in.weight)


def test_embeddings_need_not_be_normalised(pipe, given):
    emb = identity_embedding(pipe.recogniser, given["inquiries"], None).detach()
    assert torch.allclose(emb.norm(dim=1), torch.ones(8), atol=1e-5)
    assert torch.allclose(identity_embedding(pipe.recogniser, None, 7*emb), emb, atol=1e-6)


def test_shipped_weights_load_or_say_what_is_missing(monkeypatch, tmp_path):
    import cemiface.generation.shipped as module
    monkeypatch.setattr(module, "WEIGHTS", tmp_path/"weights")
    with pytest.raises(OSError, match="install a release"): shipped_pipeline()
    untrained_pipeline(GENERATORS["smoke"]).save_pretrained(tmp_path/"weights"/"generator")
    assert isinstance(shipped_pipeline(), CemiFacePipeline)


def test_import_is_light_and_names_are_there():
    code = "import sys, cemiface; cemiface.__version__; sys.exit(bool({'torch', 'diffusers', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert cemiface.CemiFacePipeline is CemiFacePipeline and cemiface.ModelMixin is diffusers.ModelMixin
    assert "generate_set" in dir(cemiface) and all(hasattr(cemiface, name) for name in cemiface.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): cemiface.nothing


def test_default_sampling_is_the_plain_loop(pipe, given):
    scheduler, x = ddim_scheduler(), given["noise"].clone()
    emb = torch.nn.functional.normalize(pipe.recogniser(given["inquiries"]), dim=1)
    with torch.no_grad():
        tokens = pipe.conditioner(emb, given["m"])
        scheduler.set_timesteps(4) # divides T, so that diffusers lands where the next step starts
        for t in scheduler.timesteps: x = scheduler.step(predict(pipe.unet, x, t, tokens), t, x).prev_sample
        plain = pipe.unet(x, t, encoder_hidden_states=tokens).sample # torch's own choice of attention
        assert torch.allclose(plain, predict(pipe.unet, x, t, tokens), atol=1e-4)
    assert torch.equal(draw(pipe, given, num_inference_steps=4), x.clamp(-1, 1))


# --- schedules, callbacks, memory

@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
@pytest.mark.parametrize("snr_scale, prediction", [(1., "epsilon"), (100., "v_prediction")])
def test_the_schedule_travels_through_swap_and_disk(pipe, given, tmp_path, scheduler, snr_scale, prediction):
    trained = noise_scheduler(1000, snr_scale, prediction)
    own = CemiFacePipeline(pipe.unet, pipe.conditioner, pipe.recogniser, scheduler.from_config(ddim_scheduler(snr_scale, 1000, prediction).config))
    own.scheduler.save_pretrained(tmp_path)
    for s in (own.scheduler, scheduler.from_pretrained(tmp_path)):
        assert torch.equal(s.alphas_cumprod, trained.alphas_cumprod) and s.config.prediction_type == prediction
        s.set_timesteps(5)
        assert s.timesteps[0] == 999
    own.set_progress_bar_config(disable=True)
    assert not torch.equal(draw(own, given), draw(pipe, given)) or (scheduler, snr_scale) == (DDIMScheduler, 1.)


@pytest.mark.parametrize("between", ["DDIM", "DDPM", "DPM-Solver++", "UniPC"])
@pytest.mark.parametrize("first", ["DDIM", "UniPC"])
def test_a_sampler_comes_back_from_any_other(tmp_path, first, between):
    own = SAMPLERS[first].from_config(ddim_scheduler(25., 1000, "sample").config)
    other = SAMPLERS[between].from_config(own.config)
    other.save_pretrained(tmp_path)
    back = SAMPLERS[first].from_config(SAMPLERS[between].from_pretrained(tmp_path).config)
    known = {k: v for k, v in own.config.items() if k != "_use_default_values"}
    assert known == {k: back.config[k] for k in known} and torch.equal(own.alphas_cumprod, back.alphas_cumprod)
    x, out = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 8, 8)
    own.set_timesteps(5); back.set_timesteps(5)
    assert torch.equal(own.step(out, own.timesteps[0], x).prev_sample, back.step(out, back.timesteps[0], x).prev_sample)


def test_a_pipeline_draws_in_its_own_steps(pipe, given, tmp_path):
    own = CemiFacePipeline(**pipe.components, steps=3)
    own.save_pretrained(tmp_path / "own"); pipe.save_pretrained(tmp_path / "usual")
    assert "in 3 steps of the 1000 of training" in (tmp_path / "own/README.md").read_text()
    for folder, steps in ((tmp_path / "own", 3), (tmp_path / "usual", 20)):
        again = CemiFacePipeline.from_pretrained(folder)
        again.set_progress_bar_config(disable=True)
        assert again.config.steps == steps and torch.equal(draw(again, given, num_inference_steps=None), draw(pipe, given, num_inference_steps=steps))
        assert again.num_timesteps == steps
    # a pipeline from before it had steps of its own
    old = json.loads((tmp_path / "usual/model_index.json").read_text())
    del old["steps"]
    (tmp_path / "usual/model_index.json").write_text(json.dumps(old))
    assert CemiFacePipeline.from_pretrained(tmp_path / "usual").config.steps == 20
    with pytest.raises(ValueError, match="0 sampling steps"): draw(pipe, given, num_inference_steps=0)


class Halve(PipelineCallback):
    @property
    def tensor_inputs(self): return ["latents"]

    def callback_fn(self, pipeline, step_index, timestep, callback_kwargs): return {"latents": callback_kwargs["latents"]/2}


def test_callbacks(pipe, given, monkeypatch):
    seen, calls, forward = [], [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward", lambda *a, **kw: calls.append(1) or forward(*a, **kw))
    look = lambda p, i, t, kw: seen.append((p is pipe, i, int(t), sorted(kw), kw["latents"].shape)) or {}
    x = draw(pipe, given, callback_on_step_end=look)
    assert seen == [(True, i, t, ["latents"], given["noise"].shape) for i, t in enumerate((999, 666, 332))] and torch.equal(x, draw(pipe, given))
    last = lambda p, i, t, kw: {"latents": kw["latents"]/2} if i == 2 else None
    assert torch.equal(draw(pipe, given, callback_on_step_end=last), draw(pipe, given, callback_on_step_end=lambda *a: {})/2) or x.abs().max() == 1
    assert not torch.equal(draw(pipe, given, callback_on_step_end=Halve()), x)
    def stop(p, i, t, kw): p._interrupt = True; return kw
    calls.clear()
    early = draw(pipe, given, callback_on_step_end=stop)
    assert len(calls) == 1 and pipe.interrupt and not torch.equal(early, x)
    assert torch.equal(draw(pipe, given), x) and len(calls) == 4 and not pipe.interrupt and pipe.num_timesteps == 3
    with pytest.raises(ValueError, match="no tensor 'prompt'"): draw(pipe, given, callback_on_step_end=look, callback_on_step_end_tensor_inputs=["prompt"])


def test_precision_slicing_and_offloading(pipe, given):
    x, fresh = draw(pipe, given), lambda: copy.deepcopy(pipe)
    for dtype in (torch.bfloat16, torch.float64):
        y = draw(fresh().to(dtype), given)
        assert y.dtype == torch.promote_types(dtype, torch.float32) and 0 < (y.double() - x.double()).abs().mean() < .1
    assert torch.equal(draw(fresh().to("cpu", torch.float32), given), x)
    sliced = fresh()
    sliced.enable_attention_slicing()
    assert torch.allclose(draw(sliced, given), x, atol=1e-4)
    moved = fresh()
    moved.enable_model_cpu_offload(device="cpu")
    assert len(moved._all_hooks) == 3 and torch.equal(draw(moved, given), x)
    seeded = [{"inquiries": given["inquiries"], "generator": [torch.Generator().manual_seed(k) for k in range(8)]} for _ in range(2)]
    assert torch.equal(*(p(**kw, num_inference_steps=2, output_type="pt").images for p, kw in zip((pipe, moved), seeded)))


# --- the folder, its code and its card

FOREIGN = """
import sys
sys.modules["cemiface"] = None
import torch, diffusers
torch.set_num_threads(1)
folder = sys.argv[1]
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
given = torch.load(folder + "/given.pt", weights_only=True)
x = pipe(**given["how"], num_inference_steps=3, output_type="pt").images
assert torch.equal(x, given["x"]), (x - given["x"]).abs().max()
assert torch.equal(pipe(given["how"]["inquiries"], similarity=given["s"], noise=given["how"]["noise"], num_inference_steps=3, output_type="pt").images, given["y"])
pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
pipe(**given["how"], num_inference_steps=3)
pipe.save_pretrained(folder + "/twice")
again = type(pipe).from_pretrained(folder + "/twice")
assert type(again.scheduler).__name__ == "UniPCMultistepScheduler" and pipe.config["recogniser"] == ("cemiface", "IResNet")
"""


def test_diffusers_loads_the_folder_without_this_package(given, tmp_path):
    pipe = untrained_pipeline(GENERATORS["smoke"])
    pipe.set_progress_bar_config(disable=True)
    low, high = calibrate(pipe, given["inquiries"], [-1, 1], [3], progress=False)["E_id"][0]["achieved"]
    s = (low + high)/2
    pipe.save_pretrained(tmp_path)
    y = pipe(given["inquiries"], similarity=s, noise=given["noise"], num_inference_steps=3, output_type="pt").images
    torch.save(dict(how=given, x=draw(pipe, given), s=s, y=y), tmp_path/"given.pt")
    away = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path/"modules")}
    done = subprocess.run([sys.executable, "-c", FOREIGN, str(tmp_path)], env=away, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Expected types" not in done.stderr, done.stderr[-2000:]
    for name in ("pipeline.py", "conditioner/cemiface.py", "recogniser/cemiface.py", "README.md"):
        assert (tmp_path/"twice"/name).read_text().replace("UniPCMultistep", "DDIM") == (tmp_path/name).read_text()
    with pytest.raises(ValueError, match="trust_remote_code"): diffusers.DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path))


SHIPPED = """
import sys
sys.modules["cemiface"] = None
import torch, diffusers
folder = sys.argv[1]
pipe = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
emb = torch.nn.functional.normalize(torch.ones(1, 512), dim=1)
assert pipe(embeddings=emb, m=0., num_inference_steps=2, output_type="pt").images.isfinite().all()
"""


def test_the_shipped_folder_opens_in_diffusers_without_this_package(tmp_path):
    folder = tmp_path/"generator"
    shutil.copytree(WEIGHTS/"generator", folder, ignore=shutil.ignore_patterns("__*"))
    away = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path/"modules")}
    done = subprocess.run([sys.executable, "-c", SHIPPED, str(folder)], env=away, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_code_beside_the_shipped_weights_is_of_today(tmp_path):
    shipped_pipeline().save_code(tmp_path)
    for name in ("pipeline.py", "conditioner/cemiface.py", "recogniser/cemiface.py"):
        assert (tmp_path/name).read_text() == (WEIGHTS/"generator"/name).read_text(), 'run shipped_pipeline().save_code(WEIGHTS/"generator")'


def test_loading_runs_no_code_of_the_folder(pipe, given, tmp_path):
    pipe.save_pretrained(tmp_path)
    for name in ("pipeline.py", "conditioner/cemiface.py", "recogniser/cemiface.py"): (tmp_path/name).write_text("raise SystemExit('ran')")
    again = CemiFacePipeline.from_pretrained(tmp_path)
    assert type(again.conditioner) is Conditioner and type(again.recogniser) is IResNet
    (tmp_path/"recogniser/cemiface.generation.pipeline.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="trust_remote_code"): CemiFacePipeline.from_pretrained(tmp_path)


def test_folders_of_before_still_load(pipe, given, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path/"model_index.json").read_text())
    del index["calibration"]
    (tmp_path/"model_index.json").write_text(json.dumps(index))
    for name in ("pipeline.py", "conditioner/cemiface.py", "recogniser/cemiface.py", "README.md"): (tmp_path/name).unlink()
    again = CemiFacePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(draw(again, given), draw(pipe, given))
    with pytest.raises(ValueError, match="not calibrated"): again(given["inquiries"], similarity=.3)


# "cemiface" is what every version wrote; the modules of then stand where a part was set after the pipeline was made
@pytest.mark.parametrize("modules", [{}, {"recogniser": "cemiface.backbones", "conditioner": "cemiface.conditioning"},
                                     {"recogniser": "cemiface.pipeline", "conditioner": "cemiface.pipeline"}])
def test_a_copy_of_the_shipped_folder_loads_and_draws(tmp_path, modules):
    folder = tmp_path/"generator"
    shutil.copytree(Path(cemiface.__file__).parent/"weights"/"generator", folder)
    index = json.loads((folder/"model_index.json").read_text())
    assert index["_class_name"] == "CemiFacePipeline"
    assert [index["conditioner"], index["recogniser"]] == [["cemiface", "Conditioner"], ["cemiface", "IResNet"]]
    for part, module in modules.items(): index[part][0] = module
    (folder/"model_index.json").write_text(json.dumps(index))
    pipe = CemiFacePipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.conditioner) is Conditioner and type(pipe.recogniser) is IResNet
    draw_two = lambda p: p(embeddings=torch.eye(2, p.recogniser.config.emb_dim), m=[-1., 1.], num_inference_steps=2,
                           generator=torch.Generator().manual_seed(0), output_type="pt").images
    shipped = shipped_pipeline()
    shipped.set_progress_bar_config(disable=True)
    assert torch.equal(draw_two(pipe), draw_two(shipped))
    pipe.save_pretrained(tmp_path/"again")
    assert json.loads((tmp_path/"again"/"model_index.json").read_text())["recogniser"] == ["cemiface", "IResNet"]


def test_a_part_set_later_is_recorded_like_one_given(pipe, tmp_path):
    own = copy.deepcopy(pipe)
    own.recogniser = untrained_pipeline(GENERATORS["smoke"], seed=1).recogniser
    assert own.config["recogniser"] == ("cemiface", "IResNet")


def test_standalone_source_is_complete():
    code = standalone(CemiFacePipeline)
    scope = {"__name__": "elsewhere"}
    exec(compile(code, "pipeline.py", "exec"), scope)
    for cls in (CemiFacePipeline, Conditioner, IResNet): assert scope[cls.__name__] is not cls and scope[cls.__name__].__module__ == "elsewhere"
    assert "from ." not in code and "import cemiface" not in code and "pydantic" not in code and "sklearn" not in code


def test_the_model_card_is_refreshed_unless_it_is_yours(pipe, tmp_path):
    own, card = copy.deepcopy(pipe), tmp_path/"README.md"
    own.save_pretrained(tmp_path)
    first = card.read_text()
    assert first.startswith("---\nlibrary_name: diffusers") and "16 x 16" in first and f"{sum(p.numel() for p in pipe.unet.parameters())/1e6:.2f}M" in first and "Not calibrated" in first
    own.register_to_config(calibration={"E_id": [CURVE]})
    own.save_pretrained(tmp_path)
    assert "| E_id | DDIMScheduler | 10 | 8 | 0.20 to 0.80 |" in card.read_text()
    card.write_text(first.replace(MARK, "my own"))
    own.save_pretrained(tmp_path)
    assert card.read_text() == first.replace(MARK, "my own")


# --- calibration

CURVE = dict(sampler="DDIMScheduler", steps=10, inquiries=8, m=[-1., 0., .5, 1.], achieved=[.2, .4, .8, .8], std=[.1]*4)


@settings(deadline=None, max_examples=60)
@drawn(st.lists(st.integers(-900, 900), min_size=2, max_size=9), st.floats(0, 1))
def test_the_inverse_of_a_curve(values, share):
    achieved = sorted(v/1000 for v in values)
    curve = dict(CURVE, m=np.linspace(-1, 1, len(achieved)).tolist(), achieved=achieved)
    wanted = achieved[0] + share*(achieved[-1] - achieved[0])
    wanted = min(max(wanted, achieved[0]), achieved[-1])
    m = calibrated_m({"E_id": [curve]}, wanted, "DDIMScheduler", 10)
    assert m.shape == (1,) and -1 <= m <= 1
    steepest = max(np.diff(achieved)/np.diff(curve["m"]))
    assert abs(np.interp(m.item(), curve["m"], achieved) - wanted) < 1e-6*(1 + steepest)


def test_the_curve_of_the_most_steps_that_are_not_more():
    later = dict(CURVE, steps=20, achieved=[.1, .3, .7, .7])
    ask = lambda steps: calibrated_m({"E_id": [CURVE, later]}, .4, "DDIMScheduler", steps).item()
    assert ask(10) == ask(19) == 0 and ask(20) == ask(50) == pytest.approx(.125)


@pytest.mark.parametrize("kw, says", [(dict(similarity=.85), "goes from 0.20 to 0.80 under E_id"), (dict(similarity=[.3, .1]), "0.1 is out of reach"), (dict(similarity=float("nan")), "nan is out of reach"),
    (dict(similarity=.3, m=.3), "either m or similarity"), (dict(similarity=.3, judge="other"), "'other': choose from E_id"), (dict(similarity=.3, num_inference_steps=5), "from 10 steps on"), (dict(similarity=[.3, .4]), "2 values for 8")])
def test_similarities_that_cannot_be_had(pipe, given, kw, says):
    own = copy.deepcopy(pipe)
    own.register_to_config(calibration={"E_id": [CURVE]})
    with pytest.raises(ValueError, match=says): own(given["inquiries"], **kw)


def test_calibration_measures_what_the_pipeline_draws(given, tmp_path):
    pipe, other = untrained_pipeline(GENERATORS["smoke"]), untrained_pipeline(GENERATORS["smoke"], seed=1).recogniser
    pipe.set_progress_bar_config(disable=True)
    noise = torch.stack([torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(7 + i)) for i in range(8)])
    curves = calibrate(pipe, given["inquiries"], [1, -1], [2, 3], {"second": other}, seed=7, batch_size=8, progress=False)
    for name, net in (("E_id", pipe.recogniser), ("second", other)):
        for curve, n in zip(curves[name], (2, 3), strict=True):
            assert (curve["sampler"], curve["steps"], curve["inquiries"], curve["m"]) == ("DDIMScheduler", n, 8, [-1, 1])
            x = [to_float(to_uint8(pipe(given["inquiries"], m=m, noise=noise, num_inference_steps=n, output_type="pt").images)) for m in (-1, 1)]
            with torch.no_grad(): means = [torch.cosine_similarity(net(y), net(given["inquiries"])).mean().item() for y in x]
            expected = means if means[0] <= means[1] else [sum(means)/2]*2
            assert curve["achieved"] == pytest.approx(expected, abs=2e-4)
    again = calibrate(pipe, given["inquiries"][:4], [-1, 1], [3], progress=False)
    assert [(c["steps"], c["inquiries"]) for c in again["E_id"]] == [(2, 8), (3, 4)] and again["second"] == curves["second"]
    pipe.save_pretrained(tmp_path)
    assert CemiFacePipeline.from_pretrained(tmp_path).config.calibration == again
    with pytest.raises(ValueError, match="at least two"): calibrate(pipe, given["inquiries"], [.3])


def test_the_shipped_generator_gives_the_similarity_asked_for():
    pipe = shipped_pipeline()
    pipe.set_progress_bar_config(disable=True)
    faces = to_float(draw_world("webface_1shot", 64, 1, 64, first=30_000).images)
    own = identity_embedding(pipe.recogniser, faces, None)
    for wanted in (.45, .65):
        x = pipe(faces, similarity=wanted, num_inference_steps=10, generator=torch.Generator().manual_seed(1), output_type="pt").images
        assert abs((identity_embedding(pipe.recogniser, x, None)*own).sum(1).mean() - wanted) < .05
    with pytest.raises(ValueError, match="goes from 0.* to 0.* under second"): pipe(faces, similarity=.99, judge="second")
