"The profile `paper`, rehearsed: a miniature of the real layout, run end to end at tiny counts; and files that are missing, cut off or wrong."
import os
import shutil
import warnings

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_checkpoints import AdaFaceNet, trained
from typer.testing import CliRunner

from cemiface.backbones import IResNet, backbone, forward_flops
from cemiface.cli import app
from cemiface.conditioning import GENERATORS
from cemiface.experiments import PROFILES, Study, in_order
from cemiface.images import encode_image
from cemiface.paper.methods import first_images, published_row
from cemiface.pairs import write_bin
from cemiface.procfaces import BENCHMARKS, WORLDS, benchmark_pairs, world_faces
from cemiface.published import published
from cemiface.recordio import RecordWriter
from cemiface.reproduction import RESULTS, Finding, all_results, chosen_results, missing, plan, reproduce

NAMES = ["yardstick", "table1", "table9", "figure2", "control", "table11", "table6", "table13"]
COUNTS = [3, 5, 6, 7, 8, 9, 10, 11, 12, 5, 6, 7] # images of each subject of casia
BINS = dict(zip(BENCHMARKS, ("lfw", "cfp_fp", "agedb_30", "calfw", "cplfw")))
TINY = GENERATORS["paper"].model_copy(update=dict(block_out_channels=(8, 8, 8, 8, 16), layers_per_block=(1,) * 5, norm_groups=4, head_dim=8, sim_dim=16, cond_dim=16))


def small(): # the paper's profile with every count made tiny; 112 px, volumes and recipes stay
    p, less = PROFILES["paper"], lambda config, **kw: config.model_copy(update=dict(precision="no") | kw)
    net = dict(backbone="ir18", width=2, epochs=1, batch_size=8, lr=.01)
    return less(p, pairs=40, inquiries=4, candidates=8, set_subjects=4, set_per_subject=3, curve_per_subject=2, oversample=1, steps=2, ms=(1., 0.), control_ms=(1., 0., -1.),
                teacher=less(p.teacher, **net), student=less(p.student, **net), simmat=less(p.simmat, steps=2, batch_size=4), dcface=less(p.dcface, steps=2, batch_size=4))


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
    faces = large(world_faces("casia", 12, 12, 28).images).view(12, 12, 3, 112, 112)
    with RecordWriter(root / "casia") as record:
        for label, n in enumerate(COUNTS):
            for image in faces[label, :n]: record.add(encode_image(image, "jpg"), label)
    (root / "webface_1shot").mkdir()
    for k, image in enumerate(large(world_faces("webface_1shot", 26, 1, 28).images)): (root / "webface_1shot" / f"{k}.jpg").write_bytes(encode_image(image, "jpg"))
    for name, file in BINS.items():
        images, issame = benchmark_pairs(name, 20, 28)
        encoded = [encode_image(image, "jpg") for image in large(images[:24])]
        write_bin(root / f"{file}.bin", [encoded[k % 24] for k in range(80)], [*issame.tolist(), *issame.tolist()]) # 40 pairs of 24 photos
    torch.save(dict(state_dict=checkpoint(faces[:, 0])), root / "recogniser.ckpt")
    write_folder(root / "sets" / "SynFace", faces[:3, :4].flatten(0, 1), [s for s in range(3) for _ in range(4)])
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory): return write_layout(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data, tmp_path_factory): # findings of one seed, and where they are
    out, said = tmp_path_factory.mktemp("out"), []
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(GENERATORS, "paper", TINY)
        found = reproduce(small(), NAMES, out, seeds=1, say=said.append, progress=False, data=data)
    return found, out, "\n".join(said)


def study(data, out="nowhere", **kw): return Study(small(), out, 1, data=data, **kw)


def test_every_chosen_result_is_made(made):
    found, _, said = made
    assert all(isinstance(found[n], Finding) for n in NAMES), {n: f for n, f in found.items() if isinstance(f, str)}
    assert "missing" not in said and "failed" not in said
