"Margin heads against loops over numpy vectors, over random cases and at the edges."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from cemiface.margins import MARGINS, AdaFace, ArcFace, CosFace, cosines, margin_head


def reference(head, z, labels, statistics=None):
    "Logits entry by entry in double precision; `statistics` are AdaFace's mean and deviation of the lengths."
    z, w, out = z.detach().double().numpy(), head.weight.detach().double().numpy(), []
    for i, y in enumerate(labels.tolist()):
        row = [float(np.dot(z[i], w[j]) / max(np.linalg.norm(z[i]), 1e-12) / np.linalg.norm(w[j])) for j in range(len(w))]
        row = [min(max(c, -1.), 1.) for c in row]
        if isinstance(head, CosFace): row[y] -= head.m
        elif isinstance(head, ArcFace):
            a = math.acos(row[y])
            row[y] = math.cos(a + head.m) if a + head.m < math.pi else row[y] - head.m * math.sin(head.m)
        else:
            row = [min(max(c, -1 + 1e-3), 1 - 1e-3) for c in row]
            mean, std = statistics
            length = min(max(np.linalg.norm(z[i]), .001), 100.)
            q = min(max(.333 * (length - mean) / (std + 1e-3), -1.), 1.)
            a = min(max(math.acos(row[y]) - head.m * q, 1e-3), math.pi - 1e-3)
            row[y] = math.cos(a) - (head.m + head.m * q)
        out.append([head.s * c for c in row])
    return np.array(out)


def updated(head, z):
    "AdaFace's running statistics after one batch."
    lengths = np.clip(np.linalg.norm(z.detach().double().numpy(), axis=1), .001, 100)
    mean, std = .99 * head.norm_mean.item() + .01 * lengths.mean(), head.norm_std.item()
    return mean, .99 * std + .01 * lengths.std(ddof=1) if len(z) > 1 else std


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(sorted(MARGINS)), batch=st.integers(1, 6), classes=st.integers(1, 5), dim=st.integers(2, 9),
       length=st.sampled_from([0., 1e-4, 1., 20., 1e3]), m=st.sampled_from([.1, .4, .5]), s=st.sampled_from([1., 64.]), seed=st.integers(0, 10**6))
def test_agrees_with_loops(name, batch, classes, dim, length, m, s, seed):
    torch.manual_seed(seed)
    head = margin_head(name, classes, dim, m, s)
    z, labels = length * torch.randn(batch, dim), torch.randint(classes, (batch,))
    statistics = updated(head, z) if name == "adaface" else None
    want = reference(head, z, labels, statistics)
    np.testing.assert_allclose(head(z, labels).detach().numpy(), want, atol=2e-3 * s / 64 + 1e-5, rtol=1e-4)
    if statistics: np.testing.assert_allclose([head.norm_mean.item(), head.norm_std.item()], statistics, rtol=1e-5)


@pytest.mark.parametrize("name", MARGINS)
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_edges_have_limits_and_finite_gradients(name, sign):
    torch.manual_seed(0)
    head = margin_head(name, 3, 8)
    labels = torch.tensor([0, 1, 2])
    z = (sign * 30 * F.normalize(head.weight)).detach().requires_grad_()
    logits = head(z, labels)
    statistics = (head.norm_mean.item(), head.norm_std.item()) if name == "adaface" else None
    np.testing.assert_allclose(logits.detach().numpy(), reference(head, z, labels, statistics), atol=1e-2)
    F.cross_entropy(logits, labels).backward()
    assert z.grad.isfinite().all() and head.weight.grad.isfinite().all()


@pytest.mark.parametrize("with_gradient", [True, False])
def test_gradient_of_arcface(with_gradient):
    head = ArcFace(2, 2, m=.5, s=1., margin_gradient=with_gradient)
    head.weight.data = torch.eye(2)
    for angle in np.linspace(.2, 2.4, 12):
        z = torch.tensor([[math.cos(angle), math.sin(angle)]], requires_grad=True)
        head(z, torch.tensor([0]))[0, 0].backward()
        along = z.grad[0] @ torch.tensor([-math.sin(angle), math.cos(angle)], dtype=torch.float32) # derivative by the angle
        assert along.item() == pytest.approx(-math.sin(angle + .5) if with_gradient else -math.sin(angle), abs=1e-4)


@pytest.mark.parametrize("name", ["cosface", "arcface"])
def test_target_logit_falls_with_the_angle(name):
    head = margin_head(name, 2, 2, s=1.)
    head.weight.data = torch.eye(2)
    a = torch.linspace(0, math.pi, 400)
    logits = head(torch.stack([a.cos(), a.sin()], 1), torch.zeros(400, dtype=torch.long))[:, 0]
    assert (logits.diff() < 1e-6).all()


def test_no_margin_is_plain_softmax():
    z, labels = torch.randn(5, 8), torch.randint(3, (5,))
    for name in MARGINS:
        head = margin_head(name, 3, 8, m=0.).eval()
        torch.testing.assert_close(head(z, labels), 64 * cosines(z, head.weight), atol=2e-3, rtol=1e-4)


def test_statistics_move_only_in_training_and_are_saved():
    head, z = AdaFace(3, 8), torch.randn(4, 8)
    head.eval()(z, torch.zeros(4, dtype=torch.long))
    assert (head.norm_mean, head.norm_std) == (20., 100.)
    head.train()(z, torch.zeros(4, dtype=torch.long))
    assert head.norm_mean < 20. and head.norm_std < 100.
    again = AdaFace(3, 8)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again.norm_std, head.norm_std)


def test_poor_images_get_the_smaller_demand_when_far():
    head = AdaFace(2, 2, s=1.).eval()
    head.weight.data, head.norm_std = torch.eye(2), torch.tensor(10.)
    far = torch.tensor([[math.cos(2.), math.sin(2.)]])
    poor, good = (head(length * far, torch.tensor([0]))[0, 0].item() for length in (.01, 60.))
    assert poor > good


def test_float32_under_mixed_precision():
    head, z, labels = CosFace(3, 64), torch.randn(5, 64), torch.zeros(5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16): mixed = head(z, labels)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, head(z, labels))


def test_unknown_name():
    with pytest.raises(ValueError, match="choose one of cosface, arcface, adaface"): margin_head("sphereface", 3)
