"Public checkpoints against independent networks with the public names, and files that are partial, damaged or mean harm."
import collections
import datetime
import functools
import gzip
import hashlib
import os
import pathlib
import sys
import types
import zipfile
from argparse import Namespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from cemiface.recognition.backbones import IResNet
from cemiface.recognition.checkpoints import Layout, export_onnx, import_recogniser, load_checkpoint, names_in_file, read_centres, read_tensors, recognise
from cemiface.recognition.training import load_recogniser

torch.set_num_threads(1)
DEPTHS = {18: [2, 2, 2, 2], 50: [3, 4, 14, 3], 100: [3, 13, 30, 3]}


# ---- the two public codes, written down from their structure ----
class Excite(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(c, c // 16, 1, bias=False), nn.Conv2d(c // 16, c, 1, bias=False)
    def forward(self, x): return x * torch.sigmoid(self.fc2(torch.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class AdaFaceUnit(nn.Module):
    def __init__(self, a, b, stride, se):
        super().__init__()
        self.shortcut_layer = nn.MaxPool2d(1, stride) if a == b else nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b))
        self.res_layer = nn.Sequential(nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.PReLU(b),
                                       nn.Conv2d(b, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b))
        if se: self.res_layer.add_module("se_block", Excite(b))
    def forward(self, x): return self.res_layer(x) + self.shortcut_layer(x)


class AdaFaceNet(nn.Module):
    def __init__(self, depth, se=False, w=16, d=512, side=7):
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.PReLU(w))
        body, a = [], w
        for i, n in enumerate(DEPTHS[depth]):
            for j in range(n):
                body.append(AdaFaceUnit(a, w * 2**i, 1 if j else 2, se))
                a = w * 2**i
        self.body = nn.Sequential(*body)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(a), nn.Dropout(.4), nn.Flatten(), nn.Linear(a * side**2, d), nn.BatchNorm1d(d, affine=False))
    def forward(self, x): return self.output_layer(self.body(self.input_layer(x)))


class InsightUnit(nn.Module):
    def __init__(self, a, b, stride, se):
        super().__init__()
        self.bn1, self.conv1, self.bn2, self.prelu = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, 1, 1, bias=False), nn.BatchNorm2d(b), nn.PReLU(b)
        self.conv2, self.bn3 = nn.Conv2d(b, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b)
        self.downsample = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), nn.BatchNorm2d(b)) if stride == 2 or a != b else None
        self.se = Excite(b) if se else None
    def forward(self, x):
        y = self.bn3(self.conv2(self.prelu(self.bn2(self.conv1(self.bn1(x))))))
        if self.se is not None: y = self.se(y)
        return y + (x if self.downsample is None else self.downsample(x))


class InsightNet(nn.Module):
    def __init__(self, depth, se=False, w=16, d=512, side=7):
        super().__init__()
        self.conv1, self.bn1, self.prelu, a = nn.Conv2d(3, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w), nn.PReLU(w), w
        for i, n in enumerate(DEPTHS[depth]):
            units = []
            for j in range(n):
                units.append(InsightUnit(a, w * 2**i, 1 if j else 2, se))
                a = w * 2**i
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
        self.bn2, self.dropout, self.fc, self.features = nn.BatchNorm2d(a), nn.Dropout(0., inplace=True), nn.Linear(a * side**2, d), nn.BatchNorm1d(d)
    def forward(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.prelu(self.bn1(self.conv1(x)))))))
        return self.features(self.fc(self.dropout(torch.flatten(self.bn2(x), 1))))


def trained(net, seed=0):
    "Random scales, shifts, slopes and running statistics: fresh ones would hide a tensor in a wrong place."
    g = torch.Generator().manual_seed(seed)
    for name, t in net.state_dict().items():
        if t.is_floating_point():
            if t.ndim == 1: t.copy_(torch.rand(t.shape, generator=g) + .5)
            else: t.copy_(.3 * torch.randn(t.shape, generator=g) / t[0].numel()**.5)      # so that a hundred layers do not blow up
    return net.eval()


CODES = {"AdaFace": AdaFaceNet, "InsightFace": InsightNet}


@pytest.fixture(scope="module")
def small():
    return {code: trained(net(18, w=4, d=32, side=2)) for code, net in CODES.items()}


def saved(path, net, prefix="", **more):
    torch.save({f"{prefix}{k}": v for k, v in net.state_dict().items()} | more, path)
    return path


# ---- the same numbers ----
@pytest.mark.parametrize("code", list(CODES))
@pytest.mark.parametrize("depth,se,width", [(18, False, 64), (50, False, 16), (100, False, 16), (50, True, 16), (100, True, 16)])
def test_equals_independent_network_at_112_px(code, depth, se, width, tmp_path):
    theirs = trained(CODES[code](depth, se, width))
    found = load_checkpoint(saved(tmp_path / "weights.pth", theirs, "module."))
    assert found.source["network"] == f"{code} IR-{'SE-' if se else ''}{depth}"
    assert found.source["stored_channels"] == ("bgr" if code == "AdaFace" else "rgb")
    config = found.model.config
    assert (config.depth, config.se, config.size, config.width, config.emb_dim) == (depth, se, 112, width, 512)
    rgb = torch.rand(1, 3, 112, 112, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad(): ours, expected = found.model(rgb), theirs(rgb.flip(1) if code == "AdaFace" else rgb)
    assert expected.isfinite().all() and expected.abs().max() > 0
    assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("code", list(CODES))
@pytest.mark.parametrize("depth", list(DEPTHS))
@pytest.mark.parametrize("se", [False, True])
def test_names_and_shapes_at_full_width(code, depth, se):
    with torch.device("meta"): theirs = {k: v.shape for k, v in CODES[code](depth, se, 64).state_dict().items() if not k.endswith("num_batches_tracked")}
    layout = Layout(code, "", depth, se, 112, 64, 512)
    shapes = {k: v.shape for k, v in layout.network().state_dict().items()}
    assert {name: shapes[ours] for ours, name in names_in_file(layout).items()} == theirs
    assert recognise({k: torch.empty(s, device="meta") for k, s in theirs.items()}) == layout


def test_imported_network_trains_like_a_fresh_one(small, tmp_path):
    "The last scale stays fixed, everything else has a gradient, and nothing is tied to the file."
    path = saved(tmp_path / "w.pth", small["AdaFace"])
    model = load_checkpoint(path).model
    path.unlink()
    fresh = IResNet(18, size=32, width=4, emb_dim=32, shortcut="pool")
    assert {k: p.requires_grad for k, p in model.named_parameters()} == {k: p.requires_grad for k, p in fresh.named_parameters()}
    model.train()(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with torch.no_grad(): model.conv1.weight.add_(1)


def test_half_precision_file(small, tmp_path):
    net = small["InsightFace"]
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}, tmp_path / "half.pth")
    model, x = load_checkpoint(tmp_path / "half.pth").model, torch.randn(2, 3, 32, 32)
    assert model.dtype == torch.float32
    with torch.no_grad(): assert F.cosine_similarity(model(x), net(x)).min() > .9999


def test_safetensors_and_channels(small, tmp_path):
    net, x = small["AdaFace"], torch.randn(2, 3, 32, 32)
    for prefix, stored in (("", "bgr"), ("model.", "bgr"), ("net.", "rgb"), ("model.net.", "rgb")):
        save_file({prefix + k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "m.safetensors")
        for channels in (None, "rgb", "bgr"):
            found = load_checkpoint(tmp_path / "m.safetensors", channels)
            assert found.source["stored_channels"] == (channels or stored)
            with torch.no_grad(): expected = net(x.flip(1) if (channels or stored) == "bgr" else x)
            with torch.no_grad(): assert (found.model(x) - expected).norm() <= 1e-5 * expected.norm()


# ---- files as trainings write them ----
@pytest.fixture
def lightning_class():
    "The class that Lightning's older files name, in a module that is gone when the file is read."
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"]
    assert not set(names) & set(sys.modules)
    for name in names: sys.modules[name] = types.ModuleType(name)
    cls = type("ModelCheckpoint", (), {"__module__": names[-1], "__init__": lambda self: setattr(self, "best", .9)})
    cls.settings = type("AttributeDict", (dict,), {"__module__": names[-1]})
    sys.modules[names[-1]].ModelCheckpoint, sys.modules[names[-1]].AttributeDict = cls, cls.settings
    yield cls, lambda: [sys.modules.pop(name, None) for name in names]
    for name in names: sys.modules.pop(name, None)


def test_lightning_training(small, tmp_path, lightning_class):
    cls, forget = lightning_class
    kernel = torch.randn(32, 5)
    state = {f"model.{k}": v for k, v in small["AdaFace"].state_dict().items()}
    state |= {"head.kernel": kernel, "head.t": torch.zeros(1), "head.batch_mean": torch.ones(1), "head.batch_std": torch.ones(1)}
    torch.save({"epoch": 1, "global_step": 9, "pytorch-lightning_version": "1.4.4", "state_dict": state,
                "callbacks": {cls: {"best_model_score": torch.tensor(.9), "dirpath": "x", "object": cls()}}, "lr_schedulers": [{"milestones": [1, 2]}],
                "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(3)}}}], "hparams_name": "kwargs",
                "hyper_parameters": {"arch": "ir_18", "args": Namespace(lr=.1), "score": np.float64(.5)}}, tmp_path / "epoch.ckpt")
    forget()
    allowed = torch.serialization.get_safe_globals()
    found = load_checkpoint(tmp_path / "epoch.ckpt")
    assert torch.allclose(found.centres, F.normalize(kernel.T)) and found.centres.shape == (5, 32)
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
    with pytest.raises(Exception, match="Unsupported global"): torch.load(tmp_path / "epoch.ckpt", weights_only=True)


def test_hyperparameters_of_any_kind_are_passed_over(small, tmp_path, lightning_class):
    cls, forget = lightning_class
    state = {f"model.{k}": v for k, v in small["AdaFace"].state_dict().items()}
    settings = cls.settings(root=pathlib.PosixPath("/data"), limit=datetime.timedelta(hours=3), when=datetime.datetime(2024, 1, 1), tags={"a"}, rows=range(3),
                            seen=collections.defaultdict(list, {"a": [1]}), nested=cls.settings(lr=.1), act=functools.partial(dict, a=1), z=complex(1, 2),
                            names=types.SimpleNamespace(a=1), part=slice(1, 2), frozen=frozenset([1]))
    for kept in (state, cls.settings(state)):
        torch.save({"state_dict": kept, "hyper_parameters": settings}, tmp_path / "whole.ckpt")
        forget()
        assert load_checkpoint(tmp_path / "whole.ckpt").source["network"] == "AdaFace IR-18"
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", "pytorch_lightning.callbacks.model_checkpoint"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules[name].AttributeDict = cls.settings


def test_insightface_training_and_its_head(small, tmp_path):
    weight = torch.randn(6, 32)
    path = tmp_path / "checkpoint_gpu_0.pt"
    torch.save({"epoch": 2, "global_step": 9, "state_dict_backbone": small["InsightFace"].state_dict(), "state_dict_softmax_fc": {"weight": weight},
                "state_optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": []}, "state_lr_scheduler": {}}, path)
    assert load_checkpoint(path).centres is None
    recogniser = load_recogniser(import_recogniser(path, tmp_path / "out", centres=read_centres(path)))
    assert torch.allclose(recogniser.centres, F.normalize(weight), atol=1e-6)


def test_older_file_format(small, tmp_path):
    torch.save(small["InsightFace"].state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert not zipfile.is_zipfile(tmp_path / "old.pth")
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(load_checkpoint(tmp_path / "old.pth").model(x), small["InsightFace"](x), atol=1e-5)


# ---- wrong and partial ----
def broken(small, code, change):
    state = {k: v.clone() for k, v in small[code].state_dict().items()}
    change(state)
    return state


WRONG = {
    "missing": ("AdaFace", lambda s: s.pop("body.2.res_layer.4.weight"), "1 missing (body.2.res_layer.4.weight)"),
    "no stem": ("AdaFace", lambda s: [s.pop(k) for k in list(s) if k.startswith("input_layer")], "missing (input_layer.0.weight"),
    "no shortcut": ("InsightFace", lambda s: [s.pop(k) for k in list(s) if k.startswith("layer1.0.downsample")], "5 missing (layer1.0.downsample.0.weight"),
    "extra": ("InsightFace", lambda s: s.update({"layer1.0.conv3.weight": torch.zeros(1)}), "1 not expected (layer1.0.conv3.weight)"),
    "affine": ("AdaFace", lambda s: s.update({"output_layer.4.weight": torch.zeros(32)}), "1 not expected (output_layer.4.weight)"),
    "shape": ("InsightFace", lambda s: s.update({"fc.bias": torch.zeros(31)}), "1 of wrong shape (fc.bias [31] for [32])"),
    "nan": ("InsightFace", lambda s: s["bn1.running_var"].fill_(float("nan")), "1 not finite numbers (bn1.running_var)"),
    "variance": ("AdaFace", lambda s: s["body.0.res_layer.0.running_var"].neg_(), "1 variances below zero (body.0.res_layer.0.running_var)"),
    "integer": ("AdaFace", lambda s: s.update({"input_layer.1.bias": torch.zeros(4, dtype=torch.long)}), "1 not finite numbers (input_layer.1.bias)"),
    "stretched": ("AdaFace", lambda s: s.update({"output_layer.3.weight": torch.zeros(1).expand(32, 128)}), "1 not finite numbers (output_layer.3.weight)"),
    "sparse": ("AdaFace", lambda s: s.update({"input_layer.1.bias": torch.ones(4).to_sparse()}), "1 not finite numbers (input_layer.1.bias)"),
    "prefix": ("AdaFace", lambda s: s.update({"model.body.0.res_layer.0.weight": s.pop("body.0.res_layer.0.weight")}), "1 missing (body.0.res_layer.0.weight); 1 not expected (model.body.0"),
    "deeper": ("InsightFace", lambda s: s.update({k.replace("layer4.1", "layer4.2"): v for k, v in list(s.items()) if k.startswith("layer4.1")}), "not expected (layer4.2"),
}


@pytest.mark.parametrize("what", list(WRONG))
def test_wrong_file_says_which_keys(what, small, tmp_path):
    code, change, message = WRONG[what]
    torch.save(broken(small, code, change), tmp_path / "w.pth")
    with pytest.raises(ValueError) as e: load_checkpoint(tmp_path / "w.pth")
    assert message in str(e.value) and f"w.pth is no complete {code} IR-18, the nearest network" in str(e.value)
    with pytest.raises(ValueError): import_recogniser(tmp_path / "w.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_older_family_is_refused(small, tmp_path):
    "InsightFace_Pytorch's units have no BN after their first convolution, and so other numbers in the names that follow."
    shift = {"res_layer.3.": "res_layer.2.", "res_layer.4.": "res_layer.3.", "res_layer.5.": "res_layer.4."}
    state = {k: v for k, v in small["AdaFace"].state_dict().items() if ".res_layer.2." not in k}
    for old, new in shift.items(): state = {k.replace(old, new): v for k, v in state.items()}
    torch.save(state, tmp_path / "model_ir18.pth")
    with pytest.raises(ValueError, match="no complete AdaFace IR-18.* missing .* of wrong shape"): load_checkpoint(tmp_path / "model_ir18.pth")


def test_long_lists_are_cut(small, tmp_path):
    half = {k: v for i, (k, v) in enumerate(small["AdaFace"].state_dict().items()) if i % 2}
    torch.save(half, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"missing \([^()]*, \.\.\.\)") as e: load_checkpoint(tmp_path / "w.pth")
    assert len(str(e.value)) < 600


@pytest.mark.parametrize("data,message", [
    ({"fc1.weight": torch.zeros(2)}, "no AdaFace or InsightFace backbone"), ({"epoch": 3}, "no state dict"), (torch.zeros(3), "no state dict"),
    ({"state_dict": {}}, "no state dict"), ([torch.zeros(2)], "no state dict")])
def test_other_content(data, message, tmp_path):
    torch.save(data, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message): load_checkpoint(tmp_path / "w.pth")


def test_head_that_does_not_fit(small, tmp_path):
    for kernel in (torch.zeros(31, 4), torch.zeros(32), torch.full((32, 4), float("inf"))):
        saved(tmp_path / "w.pth", small["AdaFace"], "model.", **{"head.kernel": kernel})
        with pytest.raises(ValueError, match="head.kernel"): load_checkpoint(tmp_path / "w.pth")


# ---- hostile ----
class Bomb:
    def __init__(self, call, *args): self.call = call, args
    def __reduce__(self): return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_a_file_that_would_run_code_runs_nothing(zipped, where, small, tmp_path):
    touched = tmp_path / "touched"
    for bomb in (Bomb(os.system, f"touch {touched}"), Bomb(eval, f"open({str(touched)!r}, 'w')"), Bomb(open, str(touched), "w")):
        state = dict(small["AdaFace"].state_dict())
        torch.save({"state_dict": state, "callbacks": bomb} if where == "beside" else state | {"input_layer.0.weight": bomb}, tmp_path / "b.ckpt",
                   _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="more than tensors .* may run code"): import_recogniser(tmp_path / "b.ckpt", tmp_path / "out")
        assert not touched.exists() and not (tmp_path / "out").exists()


def test_a_stand_in_runs_nothing_either(small, tmp_path):
    "A name that is let through as bookkeeping still reaches no function of that name."
    touched = tmp_path / "touched.npy"
    torch.save({"state_dict": small["AdaFace"].state_dict(), "callbacks": Bomb(np.save, str(touched), [1])}, tmp_path / "b.ckpt")
    assert any(n.startswith("numpy.") for n in torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "b.ckpt"))
    load_checkpoint(tmp_path / "b.ckpt")
    assert not touched.exists()


def test_a_stand_in_is_no_tensor(small, tmp_path):
    state = dict(small["AdaFace"].state_dict()) | {"input_layer.0.weight": Namespace(shape=(4, 3, 3, 3))}
    torch.save(state, tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match="1 missing .input_layer.0.weight"): load_checkpoint(tmp_path / "b.ckpt")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_damaged_files(suffix, small, tmp_path):
    "Cut anywhere: an error. One bit flipped anywhere: an error, or a network that fits; never anything else."
    state = {k: v.contiguous() for k, v in small["InsightFace"].state_dict().items()}
    whole, path = tmp_path / f"whole{suffix}", tmp_path / f"damaged{suffix}"
    torch.save(state, whole) if suffix == ".pth" else save_file(state, whole)
    data, rng = whole.read_bytes(), np.random.default_rng(0)
    for cut in (0, 1, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(ValueError): load_checkpoint(path)
    for at in [*rng.integers(0, 16000, 12), *rng.integers(0, len(data), 6), *(len(data) - rng.integers(1, 4000, 6))]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try: assert isinstance(load_checkpoint(path).model, IResNet)
        except (ValueError, OSError): pass


def test_other_files(small, tmp_path):
    saved(tmp_path / "w.pth", small["AdaFace"])
    with zipfile.ZipFile(tmp_path / "w.pth") as plain, zipfile.ZipFile(tmp_path / "c.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist(): packed.writestr(part.filename, plain.read(part))
    with pytest.raises(ValueError, match="cannot be read"): read_tensors(tmp_path / "c.pth") # might unpack to anything
    with pytest.raises(FileNotFoundError, match="not a checkpoint: give a file"): read_tensors(tmp_path)
    with zipfile.ZipFile(tmp_path / "z.pth", "w") as z: z.writestr("a", "b")
    with pytest.raises(ValueError, match="cannot be read.* is a packed file that holds a: unpack it"): read_tensors(tmp_path / "z.pth")
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), str(tmp_path / "script.pt"))
    with pytest.raises(ValueError, match="is a TorchScript program"): read_tensors(tmp_path / "script.pt")


@pytest.mark.parametrize("data,says", [
    (b"", "is an empty file"), (b"<!DOCTYPE html>", "web page"), (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS"), (b"\x08\x07\x12\x07pytorch", "ONNX graph"),
    (b"\x12\x01\0\0\0\0\0\0\0\0", "MXNet"), (b"\x89HDF\r\n\x1a\n", "HDF5"), (b"\x93NUMPY\x01\0", "NumPy"), (gzip.compress(b"a", mtime=0), "unpack it"),
    (b"whatever it may be", "is a text"), (b"\x01whatever", "damaged or something else")])
def test_the_message_says_what_the_file_is(data, says, tmp_path):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(ValueError, match=f"w.pth cannot be read as a checkpoint: it .*{says}"): read_tensors(tmp_path / "w.pth")


def test_safetensors_are_known_by_their_content(small, tmp_path):
    state = {k: v.contiguous() for k, v in small["InsightFace"].state_dict().items()}
    save_file(state, tmp_path / "w.pth")
    assert len(read_tensors(tmp_path / "w.pth")) == len(state)


# ---- folders and ONNX ----
def test_import_leaves_an_existing_recogniser_alone(small, tmp_path):
    import_recogniser(saved(tmp_path / "a.pth", small["AdaFace"]), tmp_path / "out")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(FileExistsError, match="already holds a recogniser"): import_recogniser(saved(tmp_path / "i.pth", small["InsightFace"]), tmp_path / "out")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    again = load_recogniser(tmp_path / "out")
    assert again.centres is None and again.config is None and again.history.empty and again.model.config.dropout == .4
    assert again.source == load_checkpoint(tmp_path / "a.pth").source | {"sha256": hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()}


@pytest.mark.parametrize("left", ["centres.safetensors", "history.csv", "model/config.json", ".note"])
def test_import_takes_over_nothing_that_lies_in_the_folder(small, left, tmp_path):
    "Centres or a history of another network would be read as this one's."
    path = saved(tmp_path / "a.pth", small["InsightFace"])
    (tmp_path / "out" / left).parent.mkdir(parents=True)
    (tmp_path / "out" / left).write_bytes(b"old")
    with pytest.raises(FileExistsError, match="out is not empty: choose a new folder"): import_recogniser(path, tmp_path / "out")
    assert [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()] == [left]
    with pytest.raises(FileExistsError, match="a.pth is not empty"): import_recogniser(path, path)
    (tmp_path / "empty").mkdir()
    assert load_recogniser(import_recogniser(path, tmp_path / "empty")).centres is None


@pytest.mark.parametrize("shortcut,se,normalise", [("conv", False, False), ("pool", True, True)])
@pytest.mark.slow
def test_onnx_gives_the_same(shortcut, se, normalise, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = IResNet(18, se=se, size=32, width=16, emb_dim=32, dropout=.4, shortcut=shortcut)
    trained(net).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    capfd.readouterr()
    path = export_onnx(net, tmp_path / "new" / "m.onnx", normalise)
    with pytest.raises(ValueError, match="is an ONNX graph"): load_checkpoint(path)
    assert capfd.readouterr() == ("", "") and net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]      # weights inside, nothing beside
    runtime = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for n in (1, 3, 8):
        x = torch.rand(n, 3, 32, 32) * 2 - 1
        with torch.no_grad(): expected = F.normalize(net.eval()(x)) if normalise else net.eval()(x)
        assert np.abs(runtime.run(["embedding"], {"images": x.numpy()})[0] - expected.numpy()).max() <= 1e-4 * expected.abs().max()
    said = runtime.get_modelmeta().custom_metadata_map
    assert (said["channels"], said["range"], said["size"], said["embedding"]) == ("RGB", "-1 to 1", "32", "unit length" if normalise else "raw")
    assert os.path.dirname(torch.__file__).encode() not in path.read_bytes()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_says_what_is_missing(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'cemiface\[onnx\]'"): export_onnx(IResNet(18, size=16, width=4), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
