"Small sets, generators and comparisons that several test files share."
import torch
from safetensors.torch import load_file

from cemiface.core.settings import changed
from cemiface.generation.conditioning import GENERATORS
from cemiface.data.faceset import FaceSet
from cemiface.sets.synthesis import generate_set

SIZE = GENERATORS["smoke"].size
TINY = changed(GENERATORS["smoke"], block_out_channels=(8, 16), norm_groups=4, head_dim=8)


def inquiries(n=5):
    images = torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return FaceSet(images, torch.arange(n), [f"p{i}" for i in range(n)], "noise")


def make(pipe, out, faces=None, **kw): # a set
    return generate_set(pipe, faces if faces is not None else inquiries(), out=out, **{**dict(m=.2, per_subject=3, steps=2, batch_size=4, oversample=2, progress=False), **kw})


def content(out): return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def weights(out): # of a trained generator
    return {k: load_file(out/k/"diffusion_pytorch_model.safetensors") for k in ("unet", "conditioner")}


def same(a, b): # two of `weights`
    return all(torch.equal(a[k][n], b[k][n]) for k in a for n in a[k])
