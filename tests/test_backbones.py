"Backbones as they are saved, and what the two layouts have in common."
import json

import pytest
import torch

from cemiface.recognition.backbones import BACKBONES, SqueezeExcite, UNITS, IResNet, backbone, forward_flops

torch.set_num_threads(1)


def test_folders_saved_before_there_was_a_choice_still_load(tmp_path):
    "Older configs name neither `shortcut` nor `stem`."
    IResNet(18, size=32, width=4, emb_dim=8).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    older = {k: v for k, v in config.items() if k not in ("shortcut", "stem")}
    (tmp_path / "config.json").write_text(json.dumps(older))
    loaded = IResNet.from_pretrained(tmp_path).config
    assert (loaded.shortcut, loaded.stem) == ("conv", 1) and len(older) == len(config) - 2


@pytest.mark.parametrize("shortcut", ["conv", "pool"])
def test_layout_survives_a_folder(shortcut, tmp_path):
    net = IResNet(18, se=True, size=32, width=4, emb_dim=8, shortcut=shortcut).eval()
    net.save_pretrained(tmp_path)
    again, x = IResNet.from_pretrained(tmp_path).eval(), torch.randn(2, 3, 32, 32)
    assert again.config.shortcut == shortcut
    with torch.no_grad(): assert torch.equal(again(x), net(x))


@pytest.mark.parametrize("depth", list(UNITS))
def test_layouts_differ_in_one_shortcut_alone(depth):
    "AdaFace's first unit takes every second pixel; all other tensors have the same names and shapes."
    with torch.device("meta"):
        conv, pool = ({k: v.shape for k, v in IResNet(depth, shortcut=s).state_dict().items()} for s in ("conv", "pool"))
    assert {k for k in conv if k not in pool} == {k for k in conv if k.startswith("layer1.0.downsample.")}
    assert all(conv[k] == shape for k, shape in pool.items())


def test_every_name_is_a_network():
    for name, (depth, se) in BACKBONES.items():
        with torch.device("meta"): config = backbone(name).config
        assert (config.depth, config.se, config.size, config.width, config.shortcut) == (depth, se, 112, 64, "conv")


def test_a_network_can_be_built_again_from_its_settings():
    net = backbone("irse18", 32, 4, 8, .1)
    again = IResNet.from_config(net.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in net.state_dict().items()} and again.config.dropout == .1


def test_flops_of_a_network_are_those_of_its_layers():
    "Twice the products of each convolution and linear map, summed over the layers that ran."
    net, count = IResNet(18, se=True, size=32, width=4, emb_dim=8).eval(), []
    def note(m, x, y): count.append(2 * y.numel() * m.weight[0].numel())
    for m in net.modules():
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)): m.register_forward_hook(note)
    with torch.no_grad(): net(torch.zeros(1, 3, 32, 32))
    expected = sum(count) + sum(2 * (m.fc1.weight.numel() + m.fc2.weight.numel()) for m in net.modules() if isinstance(m, SqueezeExcite))
    for m in net.modules(): m._forward_hooks.clear()
    assert forward_flops(net, 32) == expected
