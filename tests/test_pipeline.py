"""The pipeline: same image in any company, samplers, saving and loading, hostile folders."""
import json
import subprocess
import sys

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, UNet2DConditionModel, UniPCMultistepScheduler

import cemiface
from cemiface.backbones import IResNet
from cemiface.conditioning import GENERATORS, Conditioner
from cemiface.data import to_uint8
from cemiface.pipeline import CemiFacePipeline, ddim_scheduler, identity_embedding, shipped_pipeline, untrained_pipeline
from cemiface.simmat import noise_scheduler

diffusers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def pipe():
    pipe = untrained_pipeline(GENERATORS["smoke"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def given(pipe): # eight inquiries with noise and m
    g, size = torch.Generator().manual_seed(3), pipe.unet.config.sample_size
    return dict(inquiries=torch.rand(8, 3, size, size, generator=g)*2 - 1, noise=torch.randn(8, 3, size, size, generator=g), m=torch.linspace(-1, 1, 8))


def draw(pipe, given, rows=slice(None), **kw):
    return pipe(**{k: v[rows] for k, v in given.items()}, num_inference_steps=3, output_type="pt", **kw).images


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
    with pytest.raises(OSError, match="diffusion_pytorch_model.safetensors"): CemiFacePipeline.from_pretrained(tmp_path)
    weights.unlink()
    torch.save(pipe.unet.state_dict(), tmp_path/"unet"/"diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"): CemiFacePipeline.from_pretrained(tmp_path)


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
    import cemiface.pipeline as module
    monkeypatch.setattr(module, "__file__", str(tmp_path/"pipeline.py"))
    with pytest.raises(OSError, match="install a release"): shipped_pipeline()
    untrained_pipeline(GENERATORS["smoke"]).save_pretrained(tmp_path/"weights"/"generator")
    assert isinstance(shipped_pipeline(), CemiFacePipeline)


def test_import_is_light_and_names_are_there():
    code = "import sys, cemiface; cemiface.__version__; sys.exit(bool({'torch', 'diffusers', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
    assert cemiface.CemiFacePipeline is CemiFacePipeline and cemiface.ModelMixin is diffusers.ModelMixin
    assert "generate_set" in dir(cemiface) and all(hasattr(cemiface, name) for name in cemiface.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"): cemiface.nothing
