"Written by save_pretrained: everything that this pipeline needs beside its libraries."

from PIL import Image
from collections.abc import Callable
from contextlib import nullcontext
from diffusers import ConfigMixin
from diffusers import DDIMScheduler
from diffusers import DiffusionPipeline
from diffusers import ImagePipelineOutput
from diffusers import ModelMixin
from diffusers import SchedulerMixin
from diffusers import UNet2DConditionModel
from diffusers.callbacks import MultiPipelineCallbacks
from diffusers.callbacks import PipelineCallback
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import ModelCardData
from importlib.util import resolve_name
from pathlib import Path
from torch import Tensor
from torch import nn
from torch.nn.attention import SDPBackend
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import pixel_shuffle
from torch.nn.functional import pixel_unshuffle
from typing import Literal
import ast
import inspect
import math
import numpy as np
import os
import re
import sys
import torch
import torch.nn.functional as F

def fault_words(
    wrong:dict[str, list[str]], # what is wrong: names
)->str: # empty if there is none
    "How many of each kind, and the first three names."
    return "; ".join(f"{len(ks)} {what} ({', '.join(ks[:3])}{', ...' if len(ks) > 3 else ''})" for what, ks in wrong.items() if ks)

def sound(
    tensor:Tensor, # from a file
)->bool:
    "Whether a tensor is what a weight must be: dense, floating-point, finite, and with as many stored numbers as it shows."
    return (tensor.layout == torch.strided and not tensor.is_meta and tensor.is_floating_point()
            and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size() and bool(tensor.isfinite().all()))

def unsound_weights(
    tensors:dict[str, Tensor], # a network's, by name
)->dict[str, list[str]]: # what is wrong: the names of those
    "Weights that are no finite numbers, and variances below zero."
    return {"not finite numbers": [k for k, v in tensors.items() if not sound(v)],
            "variances below zero": [k for k, v in tensors.items() if k.endswith("running_var") and (v.to_dense() < 0).any()]}

def check_sound(
    net:nn.Module, # just loaded
    name:str="", # of this part, for messages
):
    "ValueError that counts and names weights that are not finite, or variances below zero."
    if faults := fault_words(unsound_weights({k: v for k, v in net.state_dict(prefix=name).items() if v.is_floating_point() and not v.is_meta})): raise ValueError(faults)

class OwnModels:
    "Saving and loading of a pipeline with models of this package, named in `own`."
    def register_to_config(self, **kwargs)->None:
        "As diffusers does, but our own models by their public name, wherever their class lives."
        ours = lambda v: isinstance(v, tuple) and str(v[0]).split(".")[0] in ("cemiface", "diffusers_modules") and v[1] in [c.__name__ for c in self.own]
        super().register_to_config(**{k: ("cemiface", v[1]) if ours(v) else v for k, v in kwargs.items()})

    @classmethod
    def load_config(cls, *args, **kwargs)->dict:
        "As diffusers does, but our own models come from where this class does, never from code in the folder."
        config = super().load_config(*args, **kwargs)
        ours = lambda v: isinstance(v, list) and str(v[0]).split(".")[0] == "cemiface"
        return {k: [cls.__module__, v[1]] if ours(v) else v for k, v in config.items()}

    @classmethod
    def from_pretrained(cls, folder:str|Path, # written by `save_pretrained`
                        **kwargs, # other components, `dtype`: see diffusers
                       )->DiffusionPipeline:
        "Load a saved pipeline. OSError if the folder holds none, ValueError if a file in it is damaged, or its weights are not safetensors or not finite."
        if not (Path(folder)/"model_index.json").is_file():
            raise OSError(f"no pipeline in {folder}: it has no model_index.json. Give a folder written by save_pretrained")
        def damaged(e): return ValueError(f"{folder}: a file of the generator is damaged or missing ({(str(e).splitlines() or [type(e).__name__])[0][:300]}): copy the folder again, or train it anew")
        try: pipe = super().from_pretrained(str(folder), use_safetensors=True, local_files_only=True, **kwargs)
        except OSError as e: raise damaged(e) from e
        try:
            for name, net in pipe.components.items():
                if isinstance(net, torch.nn.Module): check_sound(net, f"{name}.")
        except ValueError as e: raise damaged(e) from None
        return pipe

class Conditioner(ModelMixin, ConfigMixin):
    "Embedding and similarity factor to the condition of the attention layers, Eq. 5-7."
    @register_to_config
    def __init__(self, *, # by name only: diffusers stores no positional argument in the config
        emb_dim:int=512,  # D, of the recogniser
        sim_dim:int=512,  # of C_sim
        cond_dim:int=512, # of each condition token
        tokens:int=1,     # that C_att is cut into
    ):
        super().__init__()
        self.f1 = nn.Linear(1, sim_dim)
        self.f2 = nn.Linear(emb_dim+sim_dim, tokens*cond_dim)

    def forward(self,
        emb:Tensor, # [B,emb_dim], L2-normalised
        m:Tensor,   # [B] in [-1,1]
    )->Tensor: # [B,tokens,cond_dim]
        c_id = emb*math.sqrt(self.config.emb_dim)
        c_sim = self.f1(m[:, None].to(emb))
        return self.f2(torch.cat([c_id, c_sim], 1)).unflatten(1, (self.config.tokens, -1))

class SqueezeExcite(nn.Module):
    "Channel weights in (0, 1) from the map's mean (Hu et al., 2018)."
    def __init__(self,
        channels:int, # of the map
        reduction:int=16, # channels a hidden unit
    ):
        super().__init__()
        hidden = max(1, channels // reduction)
        self.fc1, self.fc2 = nn.Conv2d(channels, hidden, 1, bias=False), nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x:Tensor)->Tensor:
        hidden = F.linear(x.mean((2, 3)), self.fc1.weight.flatten(1)).relu() # as products: GPUs are slow at convolutions of one pixel
        return x * F.linear(hidden, self.fc2.weight.flatten(1)).sigmoid()[..., None, None]

class ImprovedUnit(nn.Module):
    "ArcFace's improved residual unit: BN-conv-BN-PReLU-conv-BN beside a shortcut."
    def __init__(self,
        c_in:int, # channels in
        c_out:int, # channels out
        stride:int, # of the second convolution
        se:bool=False, # squeeze-and-excitation before the sum
        shortcut:Literal["conv", "pool"]="conv", # where the stride changes and the channels do not
    ):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False)
        self.bn2, self.prelu = nn.BatchNorm2d(c_out), nn.PReLU(c_out)
        self.conv2, self.bn3 = nn.Conv2d(c_out, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.se = SqueezeExcite(c_out) if se else nn.Identity()
        if c_in != c_out or stride > 1 and shortcut == "conv":
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        else: self.downsample = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()

    def forward(self, x:Tensor)->Tensor:
        h = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.se(self.bn3(self.conv2(h))) + self.downsample(x)

def stage(
    c_in:int, # channels in
    c_out:int, # channels out
    units:int, # residual units
    stride:int, # of the first unit
    se:bool, # squeeze-and-excitation in every unit
    shortcut:str, # of the first unit: conv or pool
)->nn.Sequential:
    "Residual units at one resolution; the first one changes it."
    rest = [ImprovedUnit(c_out, c_out, 1, se) for _ in range(units - 1)]
    return nn.Sequential(ImprovedUnit(c_in, c_out, stride, se, shortcut), *rest)

def stage_strides(
    size:int, # side of the first map in pixels
)->tuple[int, ...]: # stride of each of the four stages, 1 or 2
    "Four halvings where the last map keeps at least 2x2 pixels (17 px and more); smaller inputs leave out the first ones."
    halvings = min(4, (size - 1).bit_length() - 1)
    return (1,) * (4 - halvings) + (2,) * halvings

UNITS = {18: (2, 2, 2, 2), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)} # depth: units in layer1 ... layer4

class IResNet(ModelMixin, ConfigMixin):
    "ArcFace's improved ResNet. `save_pretrained` and `from_pretrained` keep it as config.json and safetensors."
    @register_to_config
    def __init__(self,
        depth:Literal[18, 50, 100]=50, # convolutions, as the name counts them
        se:bool=False, # squeeze-and-excitation
        size:int=112, # side of the input in pixels
        width:int=64, # channels of the first stage; the others have 2, 4 and 8 times as many
        emb_dim:int=512, # length of the embedding
        dropout:float=0., # before the last linear map
        shortcut:Literal["conv", "pool"]="conv", # in the first unit: as InsightFace or as AdaFace builds it
        stem:int=1, # stride of the first convolution: 2 leaves every later map half as large
    ):
        super().__init__()
        first = -(-size // stem) # side of the first map
        c, strides, units = (width, 2 * width, 4 * width, 8 * width), stage_strides(first), UNITS[depth]
        side = -(-first // 2**strides.count(2))
        self.conv1, self.bn1, self.prelu = nn.Conv2d(3, width, 3, stem, 1, bias=False), nn.BatchNorm2d(width), nn.PReLU(width)
        self.layer1 = stage(width, c[0], units[0], strides[0], se, shortcut)
        self.layer2 = stage(c[0], c[1], units[1], strides[1], se, shortcut)
        self.layer3 = stage(c[1], c[2], units[2], strides[2], se, shortcut)
        self.layer4 = stage(c[2], c[3], units[3], strides[3], se, shortcut)
        self.bn2, self.drop = nn.BatchNorm2d(c[3]), nn.Dropout(dropout)
        self.fc, self.features = nn.Linear(c[3] * side**2, emb_dim), nn.BatchNorm1d(emb_dim)
        self.features.weight.requires_grad_(False)
        for m in self.modules():
            if isinstance(m, nn.Conv2d): nn.init.normal_(m.weight, 0, .1)

    def forward(self,
        x:Tensor, # [B,3,size,size] in [-1,1], RGB
    )->Tensor: # [B,emb_dim], not normalised
        "The raw embedding. ValueError if the images have another size than the network was made for."
        if x.shape[1:] != (3, self.config.size, self.config.size):
            raise ValueError(f"this backbone takes images [B,3,{self.config.size},{self.config.size}], not {list(x.shape)}: "
                             "resize the images or make a backbone of their size")
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False): # margins read the embedding's length: float32 from here on, as InsightFace does
            return self.features(self.fc(self.drop(self.bn2(x).flatten(1)).to(self.fc.weight.dtype)))

@torch.no_grad()
def identity_embedding(recogniser:IResNet,
                       inquiries:Tensor|None, # [B,3,S,S] in [-1,1]
                       embeddings:Tensor|None, # [B,D], any length
                       device:torch.device|None=None, # to compute on; None: where the recogniser is
                      )->Tensor: # [B,D], length 1
    "C_id of Eq. 5, from images or as given. ValueError if both or none are given, for another image size, or none at all."
    if (inquiries is None) == (embeddings is None): raise ValueError("give either inquiries (images) or embeddings")
    size = recogniser.config.size
    if inquiries is not None and tuple(inquiries.shape[1:]) != (3, size, size):
        raise ValueError(f"inquiries of shape {tuple(inquiries.shape)}: this recogniser takes [B,3,{size},{size}]")
    x = embeddings if inquiries is None else inquiries
    if not len(x): raise ValueError("no inquiry: the batch is empty")
    x = x.to(device or recogniser.device, recogniser.dtype)
    return torch.nn.functional.normalize(x if inquiries is None else recogniser(x), dim=1)

def starting_noise(shape:tuple, # of the images [B,3,S,S]
                   noise:Tensor|None, # as given; None: draw it
                   generator:torch.Generator|list|None, # one for all, or one per image
                   device:torch.device,
                   dtype:torch.dtype,
                  )->Tensor:
    "Standard normal noise. ValueError if the noise or the generators do not fit the number of images."
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators for {shape[0]} images")
    if noise is None: noise = randn_tensor(shape, generator, device, dtype)
    if noise.shape != shape:
        raise ValueError(f"noise of shape {tuple(noise.shape)}: these inquiries need {list(shape)}")
    return noise.to(device, dtype)

class StepsOfLength:
    "Takes the place of DDIM's number of steps: T divided by it is the way to the next time step, whole and exact."
    def __init__(self, length:int): self.length = length
    def __rfloordiv__(self, T:int)->int: return self.length

def patch_side(
    unet:UNet2DConditionModel,
)->int: # pixels a side of a patch; 1: it takes the image as it is
    "How the UNet takes an image."
    return math.isqrt(unet.config.in_channels//3)

def predict(
    unet:UNet2DConditionModel,
    xt:Tensor,     # [B,3,S,S] noised image
    t:Tensor,      # [B], or one time step
    tokens:Tensor, # [B,tokens,C] the condition
)->Tensor: # [B,3,S,S]
    "The UNet's output for an image, by way of patches."
    side = patch_side(unet)
    # on a CPU plain products are faster than torch's fused attention, which is made for long sequences
    attention = sdpa_kernel(SDPBackend.MATH) if xt.device.type == "cpu" else nullcontext()
    with attention: out = unet(pixel_unshuffle(xt, side), t, encoder_hidden_states=tokens).sample
    return pixel_shuffle(out, side)

def denoise(unet:UNet2DConditionModel,
            scheduler:SchedulerMixin,
            tokens:Tensor, # [B,tokens,C] the condition, the same at every step
            noise:Tensor, # [B,3,S,S] standard normal
            steps:int=20,
            generator:torch.Generator|list|None=None, # for samplers that draw noise in their steps
            bar:Callable=iter, # wraps the time steps, such as a progress bar
            on_step:Callable|None=None, # takes the number of the step, t and x_t after it; gives the x_t to go on with
           )->Tensor: # [B,3,S,S] in [-1,1]
    "Images from noise, steps evaluations of the UNet. ValueError if steps is not within 1 and T, or the UNet gives no finite number."
    if not 1 <= steps <= scheduler.config.num_train_timesteps:
        raise ValueError(f"{steps} sampling steps: choose between 1 and {scheduler.config.num_train_timesteps}")
    scheduler.set_timesteps(steps, device=noise.device)
    own = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    visited = [*scheduler.timesteps.tolist(), -1]
    xt = noise * scheduler.init_noise_sigma
    for i, t in enumerate(bar(scheduler.timesteps)):
        if isinstance(scheduler, DDIMScheduler): scheduler.num_inference_steps = StepsOfLength(visited[i] - visited[i+1])
        eps = predict(unet, scheduler.scale_model_input(xt, t).to(unet.dtype), t, tokens).to(xt.dtype)
        xt = scheduler.step(eps, t, xt, **own).prev_sample
        if on_step: xt = on_step(i, t, xt)
    scheduler.num_inference_steps = steps
    if not xt.isfinite().all():
        raise ValueError("the generator's output is not finite: its weights are damaged, or its precision too low")
    return xt.clamp(-1, 1)

def to_uint8(
    x:Tensor, # float in [-1,1]; values outside are cut off
)->Tensor: # uint8, same shape
    "A model's range to bytes, rounded; inverts `to_float` exactly."
    return ((x.float()+1)*127.5).round().clamp(0, 255).to(torch.uint8)

def as_output(x:Tensor, # [B,3,S,S] in [-1,1]
              output_type:str, # pil, pt or np
             ):
    "Images in the form asked for. ValueError for an unknown one."
    if output_type == "pt": return x
    if output_type not in ("pil", "np"): raise ValueError(f"output_type {output_type!r}: choose pil, pt or np")
    arrays = to_uint8(x).permute(0, 2, 3, 1).cpu().numpy()
    return arrays if output_type == "np" else [Image.fromarray(a) for a in arrays]

def readable(
    text:str, # may hold names of files
)->str: # what every file, figure and screen can hold
    r"Text with each byte that is no UTF-8 written out, as in `Jos\xe9`."
    return re.sub("[\ud800-\udc7f\udd00-\udfff]", "\ufffd", text).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

def write_whole(
    path:str|Path, # the file; its folder is made if needed
    data:bytes|str,# all of its content; text is written as UTF-8, `readable`
)->Path: # the same path
    "Write `data` so that `path` holds all of it or is left as it was. OSError names the file, the cause and the remedy."
    path, data = Path(path), readable(data).encode() if isinstance(data, str) else data
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as f:
            f.write(data); f.flush(); os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as e:
        try: beside.unlink(missing_ok=True)
        except OSError: pass
        raise OSError(e.errno, f"could not write {path} ({e.strerror}): free some space or choose a folder you can write to") from e
    return path

MARK = "<!-- written by save_pretrained: delete this line to keep a text of your own -->"

def calibrated_m(calibration:dict|None, # judge -> curves of `calibrate`
                 similarity:float|list|Tensor, # wanted cosine, one or [B]
                 sampler:str, # class of the scheduler
                 steps:int,
                 judge:str="E_id", # recogniser that the cosine is meant under
                 m:None=None, # not with a similarity
                )->Tensor: # m of each
    "The m at which images have the wanted cosine on average. ValueError names the reachable range, or what is calibrated."
    if m is not None: raise ValueError("give either m or similarity: the second chooses the first")
    if not calibration:
        raise ValueError("this generator is not calibrated, so it cannot choose m for a similarity: give m (--m), or calibrate it once in Python, calibrate(pipe, inquiries), and save it")
    if judge not in calibration:
        raise ValueError(f"no calibration under {judge!r}: choose from {', '.join(calibration)}")
    fit = [c for c in calibration[judge] if c["sampler"] == sampler and c["steps"] <= steps]
    curves = ", ".join(f"{c['sampler']} from {c['steps']} steps on" for c in calibration[judge])
    if not fit:
        raise ValueError(f"not calibrated for {sampler} at {steps} steps (only for {curves}): choose another sampler or number of steps, or calibrate these in Python, steps=[{steps}]")
    curve = max(fit, key=lambda c: c["steps"])
    cos_sim, low, high = np.atleast_1d(np.asarray(similarity, dtype=float)), curve["achieved"][0], curve["achieved"][-1]
    for s in cos_sim[~((cos_sim >= low) & (cos_sim <= high))]:
        raise ValueError(f"similarity {s:g} is out of reach: this generator's mean goes from {low:.2f} to {high:.2f} under {judge} ({sampler}, {curve['steps']} steps)")
    return torch.as_tensor(np.interp(cos_sim, curve["achieved"], curve["m"]), dtype=torch.float32)

def top_level(
    source:str, # of a module
)->dict: # name -> (node, its source), or (import, the name imported)
    "What each name at the top of a module means."
    lines, meaning = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            meaning |= {a.asname or a.name.split(".")[0]: (node, a) for a in node.names}
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) # a decorator stands above
        names = [getattr(node, "name", None), *(t.id for t in getattr(node, "targets", []) if isinstance(t, ast.Name))]
        meaning |= {n: (node, "\n".join(lines[first - 1:node.end_lineno])) for n in names if n}
    return meaning

def standalone(
    cls:type, # of a module of this package
)->str: # Python source that needs no other module of it
    "Source of a class and of all that it uses from its package."
    done, modules, imports, texts = set(), {}, set(), []
    def add(module, name):
        if module not in modules: modules[module] = top_level(inspect.getsource(sys.modules[module]))
        if (module, name) in done or name not in modules[module]: return
        done.add((module, name))
        node, what = modules[module][name]
        if isinstance(what, str):
            for part in ast.walk(node):
                if isinstance(part, ast.Name): add(module, part.id)
            texts.append(what)
        elif getattr(node, "level", 0):
            add(resolve_name("." * node.level + node.module, module.rpartition(".")[0]), what.name)
        else:
            imports.add((f"from {node.module} " if isinstance(node, ast.ImportFrom) else "")
                        + f"import {ast.unparse(what)}")
    add(cls.__module__, cls.__name__)
    about = '"Written by save_pretrained: everything that this pipeline needs beside its libraries."'
    return "\n\n".join([about, "\n".join(sorted(imports)), *texts]) + "\n"

def similarity_factors(m:float|list|Tensor, # one value, or one per image, in [-1,1]
                       n:int, # images
                      )->Tensor: # [n] float32
    "m as one value per image. ValueError if one lies outside [-1,1], or their number is neither 1 nor n."
    m = torch.as_tensor(m, dtype=torch.float32).flatten()
    if len(m) not in (1, n): raise ValueError(f"m has {len(m)} values for {n} images: give one value, or one per image")
    wrong = m[~((m >= -1) & (m <= 1))]
    if len(wrong): raise ValueError(f"m = {wrong[0]:g} lies outside [-1, 1]: m is a cosine similarity")
    return m.expand(n)

MODEL_CARD = """---
{head}
---
{mark}
# CemiFace generator

Draws faces of {size} x {size} px at a chosen cosine similarity to an inquiry face (CemiFace, NeurIPS 2024, arXiv 2409.18876): {parameters}.
Sampler as saved: {sampler} in {steps} steps of the {T} of training; the network predicts {predicts}.

```python
from cemiface import CemiFacePipeline
pipe = CemiFacePipeline.from_pretrained(folder)
faces = pipe(inquiries, m=0.).images      # inquiries: [B,3,S,S] in [-1,1]
```

Where `cemiface` is not installed; this runs the Python files of the folder, so read them first:

```python
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
```

## Calibration

{calibration}

## Licence and use

Not stated here: it follows from the data that the weights were trained on. Faces of real people as inquiries need their consent.
"""

def image_size(
    unet:UNet2DConditionModel,
)->int: # pixels a side
    "Side of the images that the UNet draws."
    return unet.config.sample_size*patch_side(unet)

def model_card(pipe:DiffusionPipeline, # a CemiFacePipeline
              )->str: # Markdown
    "What the folder holds, how to load it with and without this package, and its calibration."
    head = ModelCardData(library_name="diffusers",
                         tags=["diffusion", "face-generation", "face-recognition", "synthetic-data"]).to_yaml()
    parts = {"UNet": pipe.unet, "conditioner": pipe.conditioner, "recogniser": pipe.recogniser}
    counts = [f"{name} {sum(p.numel() for p in net.parameters()) / 1e6:.2f}M" + " parameters"*(net is pipe.unet)
              for name, net in parts.items()]
    rows = [f"| {judge} | {c['sampler']} | {c['steps']} | {c['inquiries']} | {c['achieved'][0]:.2f} to {c['achieved'][-1]:.2f} | {max(c['std']):.2f} |" for judge, curves in (pipe.config.calibration or {}).items() for c in curves]
    table = ["| under | sampler | steps | inquiries | mean cosine, lowest to highest m | largest std of an image |", "|---|---|---|---|---|---|", *rows] if rows else ["Not calibrated: `similarity=` needs `calibrate(pipe, inquiries)` first."]
    noise = pipe.scheduler.config
    return MODEL_CARD.format(head=head, mark=MARK, size=image_size(pipe.unet), parameters=", ".join(counts),
                             sampler=type(pipe.scheduler).__name__,
                             steps=pipe.config.steps, T=noise.num_train_timesteps, predicts=noise.prediction_type,
                             calibration="\n".join(table))

class CemiFacePipeline(OwnModels, DiffusionPipeline):
    "Faces at similarity m to an inquiry face (Section 3.2.2). Puts the models in evaluation mode."
    model_cpu_offload_seq = "recogniser->conditioner->unet"
    _callback_tensor_inputs = ["latents"]
    own = (Conditioner, IResNet) # models of this package: their source is saved with them

    def __init__(self, unet:UNet2DConditionModel, conditioner:ModelMixin, recogniser:ModelMixin,
                 scheduler:SchedulerMixin,
                 calibration:dict|None=None, # judge -> curves of `calibrate`
                 steps:int=20, # of the sampler, where a call does not say
                ):
        super().__init__()
        self.register_modules(unet=unet.eval(), conditioner=conditioner.eval(), recogniser=recogniser.eval(),
                              scheduler=scheduler)
        self.register_to_config(calibration=calibration, steps=steps)

    def save_code(self, folder:str|Path)->None:
        "Write what diffusers needs where this package is missing: the source of the pipeline and of its own models."
        code = standalone(CemiFacePipeline).encode()
        ours = [name for name in ("conditioner", "recogniser") if self.config[name][0] == "cemiface"]
        for name in ("pipeline.py", *(f"{part}/cemiface.py" for part in ours)): write_whole(Path(folder)/name, code)

    def save_pretrained(self, folder:str|Path, **kwargs)->None:
        "One folder a part; beside the weights the code of `save_code`, and README.md, unless it is your own."
        self.save_code(folder)
        card = Path(folder)/"README.md"
        if not card.is_file() or MARK in card.read_text(encoding="utf-8"): write_whole(card, model_card(self).encode())
        super().save_pretrained(folder, **kwargs)

    @property
    def interrupt(self)->bool: return getattr(self, "_interrupt", False)

    @property
    def num_timesteps(self)->int: return self._num_timesteps

    def _timesteps(self, timesteps:Tensor):
        "The time steps behind a progress bar, until `_interrupt` is set."
        self._interrupt, self._num_timesteps = False, len(timesteps)
        for t in self.progress_bar(timesteps):
            if self.interrupt: return
            yield t

    def _on_step(self, callback:Callable|None, names:list|None)->Callable|None:
        "The callback in the form that `denoise` takes. ValueError for a tensor that is not to be had."
        if callback is None: return None
        names = callback.tensor_inputs if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)) else names
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(f"no tensor {min(unknown)!r} for the callback: choose from {self._callback_tensor_inputs}")
        return lambda i, t, xt: (callback(self, i, t, dict.fromkeys(names, xt)) or {}).get("latents", xt)

    @torch.inference_mode()
    def __call__(self,
                 inquiries:Tensor|None=None, # [B,3,S,S] in [-1,1]
                 embeddings:Tensor|None=None, # [B,D] instead of inquiries
                 m:float|list|Tensor|None=None, # similarity factor, one or [B], in [-1,1]; None: 0, or what `similarity` needs
                 num_inference_steps:int|None=None, # of the sampler; None: the pipeline's own
                 generator:torch.Generator|list|None=None, # one for all, or one per image
                 noise:Tensor|None=None, # [B,3,S,S], instead of drawing it
                 output_type:str="pil", # pil, pt ([-1,1]) or np (uint8)
                 return_dict:bool=True,
                 similarity:float|list|Tensor|None=None, # wanted cosine to the inquiry on average, one or [B], instead of m
                 judge:str="E_id", # recogniser of the calibration that this cosine is meant under
                 callback_on_step_end:Callable|None=None, # takes the pipeline, step, t and a dict of tensors; gives a dict of those it changed
                 callback_on_step_end_tensor_inputs:list|None=["latents"], # what the dict holds
                )->ImagePipelineOutput: # .images: B of them
        "One image for each inquiry (Algorithm 2, inner loop). ValueError for m outside [-1,1], a similarity out of reach or inputs that do not fit together."
        steps = self.config.steps if num_inference_steps is None else num_inference_steps
        if similarity is not None:
            m = calibrated_m(self.config.calibration, similarity, type(self.scheduler).__name__, steps, judge, m)
        on_step = self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        emb = identity_embedding(self.recogniser, inquiries, embeddings, self._execution_device)
        tokens = self.conditioner(emb, similarity_factors(0. if m is None else m, len(emb)).to(emb))
        shape = (len(emb), 3, *[image_size(self.unet)]*2)
        noise = starting_noise(shape, noise, generator, self._execution_device,
                               torch.promote_types(self.unet.dtype, torch.float32))
        x0 = denoise(self.unet, self.scheduler, tokens.to(self.unet.dtype), noise, steps, generator, self._timesteps,
                     on_step)
        self.maybe_free_model_hooks()
        images = as_output(x0, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
