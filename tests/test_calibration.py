"""The shipped calibration: each sampler gives the similarity asked for, to people that nothing was measured on, or says that it cannot."""
import pytest
import torch

from cemiface.core.settings import changed
from cemiface.generation.diffusion import SAMPLERS
from cemiface.data.faceset import to_float
from cemiface.generation.conditioning import identity_embedding
from cemiface.generation.shipped import shipped_pipeline
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study
from cemiface.world.worlds import draw_world


@pytest.fixture(scope="module")
def shipped():
    pipe, faces = shipped_pipeline(), to_float(draw_world("webface_1shot", 32, 1, 64, first=30_000).images)
    pipe.set_progress_bar_config(disable=True)
    return pipe, faces, identity_embedding(pipe.recogniser, faces, None)


@pytest.mark.parametrize("sampler, steps, wanted", [("DDIM", 10, .5), ("DDIM", 20, .5), ("DDPM", 4, .3), ("DDPM", 6, .3), ("DDPM", 10, .5), ("DPM-Solver++", 6, .4), ("DPM-Solver++", 10, .5), ("UniPC", 6, .4), ("UniPC", 10, .5)])
def test_asked_and_achieved(shipped, sampler, steps, wanted):
    pipe, faces, own = shipped
    pipe.scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    ask = lambda similarity, **kw: pipe(embeddings=own, similarity=similarity, num_inference_steps=steps, generator=torch.Generator().manual_seed(2), output_type="pt", **kw).images
    cos = (identity_embedding(pipe.recogniser, ask(wanted), None)*own).sum(1)
    assert abs(cos.mean() - wanted) < .05
    for judge, low in (("E_id", -.5), ("second", -.4)): # below what any of them reaches
        with pytest.raises(ValueError, match=f"similarity {low} is out of reach"): ask(low, judge=judge)
    if steps == 20: # the more steps, the narrower the range
        with pytest.raises(ValueError, match="similarity 0.2 is out of reach"): ask(.2)


def test_a_study_draws_with_the_sampler_of_its_profile(tmp_path):
    laptop = PROFILES["laptop"]
    for profile, kind in ((laptop, "DDPMScheduler"), (changed(laptop, sampler="DDIM", steps=20), "DDIMScheduler")):
        study = Study(profile, tmp_path)
        for model in (study.generator(), study.baseline()): assert type(model.load().scheduler).__name__ == kind
    assert type(shipped_pipeline().scheduler).__name__ == "DDPMScheduler"
