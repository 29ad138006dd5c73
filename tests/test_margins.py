"Margin heads against loops over numpy vectors, over random cases and at the edges."
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from cemiface.recognition.margins import MARGINS, AdaFace, ArcFace, CosFace, correct, cosines, margin_head

FORMS = {**{name: {} for name in MARGINS}, "arcface without gradient": {"margin_gradient": False}} # every head there is

def make(form, *args, **kwargs): return margin_head(form.split()[0], *args, **kwargs, **FORMS[form])


def reference(head, z, labels, statistics=None):
    "Logits entry by entry in double precision; `statistics` are AdaFace's mean and deviation of the lengths."
    z, w, out = z.detach().double().numpy(), head.weight.detach().double().numpy(), []
    for i, y in enumerate(labels.tolist()):
        row = [float(np.dot(z[i], w[j]) / max(np.linalg.norm(z[i]), 1e-12) / np.linalg.norm(w[j])) for j in range(len(w))]
        row = [min(max(c, -1.), 1.) for c in row]
        if isinstance(head, CosFace): row[y] -= head.m
        elif isinstance(head, ArcFace):
            a = math.acos(row[y])
            row[y] = math.cos(a + head.m) if a + head.m < math.pi or not head.margin_gradient else row[y] - head.m * math.sin(head.m)
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
@given(name=st.sampled_from(sorted(FORMS)), batch=st.integers(1, 6), classes=st.integers(1, 5), dim=st.integers(2, 9),
       length=st.sampled_from([0., 1e-4, 1., 20., 1e3]), m=st.sampled_from([.1, .4, .5]), s=st.sampled_from([1., 64.]), seed=st.integers(0, 10**6))
def test_agrees_with_loops(name, batch, classes, dim, length, m, s, seed):
    torch.manual_seed(seed)
    head = make(name, classes, dim, m, s)
    z, labels = length * torch.randn(batch, dim), torch.randint(classes, (batch,))
    statistics = updated(head, z) if name == "adaface" else None
    want = reference(head, z, labels, statistics)
    np.testing.assert_allclose(head(z, labels).detach().numpy(), want, atol=2e-3 * s / 64 + 1e-5, rtol=1e-4)
    if statistics: np.testing.assert_allclose([head.norm_mean.item(), head.norm_std.item()], statistics, rtol=1e-5)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_edges_have_limits_and_finite_gradients(name, sign, half):
    "Straight at the centre, straight away from it, and nowhere; also one image at a time, and in mixed precision."
    torch.manual_seed(0)
    head = make(name, 3, 8)
    labels = torch.tensor([0, 1, 2])
    z = (sign * 30 * F.normalize(head.weight)).detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=half): logits = head(z, labels)
    statistics = (head.norm_mean.item(), head.norm_std.item()) if name == "adaface" else None
    np.testing.assert_allclose(logits.detach().numpy(), reference(head, z, labels, statistics), atol=2e-2) # an arccos near -1 in float32
    head.eval()
    for i in range(3): torch.testing.assert_close(head(z[i:i + 1], labels[i:i + 1])[0], logits[i], atol=2e-2, rtol=0)
    F.cross_entropy(logits, labels).backward()
    assert z.grad.isfinite().all() and head.weight.grad.isfinite().all()


def direct(form, head, z, w, labels, q):
    "Logits as one writes them down, in double precision and with gradient; `q` is AdaFace's quality."
    cos = (z / z.norm(dim=1, keepdim=True)) @ (w / w.norm(dim=1, keepdim=True)).T
    own = F.one_hot(labels, len(w)).bool()
    if form == "adaface": cos = cos.clamp(-1 + 1e-3, 1 - 1e-3)
    theta = cos.acos()
    if form == "cosface": moved = cos - head.m
    elif form == "arcface": moved = torch.where(theta + head.m < math.pi, (theta + head.m).cos(), cos - head.m * math.sin(head.m))
    elif form == "adaface": moved = (theta - head.m * q[:, None]).clamp(1e-3, math.pi - 1e-3).cos() - (head.m + head.m * q[:, None])
    else: moved = cos + ((theta + head.m).cos() - cos).detach()
    return head.s * torch.where(own, moved, cos)

@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_every_head(form, half):
    torch.manual_seed(1)
    head = make(form, 5, 6).eval()
    if form == "adaface": head.norm_mean.fill_(9.), head.norm_std.fill_(4.)
    z = torch.cat([4 * torch.randn(40, 6), -9 * head.weight.detach() * 100 + torch.randn(5, 6)]).requires_grad_() # the last five lie beyond pi - m
    labels, upstream = torch.cat([torch.randint(5, (40,)), torch.arange(5)]), torch.randn(45, 5)
    angles = cosines(z, head.weight).gather(1, labels[:, None])[:, 0].acos()
    assert (angles[40:] + .5 > math.pi).all() and (angles[:40] + .5 < math.pi).float().mean() > .8
    with torch.autocast("cpu", torch.bfloat16, enabled=half): logits = head(z, labels)
    (logits * upstream).sum().backward()
    zd, wd = (v.detach().double().requires_grad_() for v in (z, head.weight))
    q = (.333 * (zd.detach().norm(dim=1).clamp(.001, 100) - 9) / (4 + 1e-3)).clamp(-1, 1)
    (direct(form, head, zd, wd, labels, q) * upstream).sum().backward()
    for ours, theirs in ((z.grad, zd.grad), (head.weight.grad, wd.grad)):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=2e-3, atol=2e-3 * theirs.abs().max().item())


@pytest.mark.parametrize("m", [.2, .5, 1.])
def test_insightfaces_arcface(m):
    "As InsightFace computes it: on a tensor whose values are changed behind autograd's back, past pi too."
    torch.manual_seed(2)
    head = ArcFace(3, 3, m=m, margin_gradient=False)
    z, labels, upstream = torch.randn(400, 3, requires_grad=True), torch.randint(3, (400,)), torch.randn(400, 3)
    logits = head(z, labels)
    (logits * upstream).sum().backward()
    grads, z.grad, head.weight.grad = (z.grad, head.weight.grad), None, None
    want = cosines(z, head.weight) * 1.
    with torch.no_grad():
        angle = want.acos()
        angle[torch.arange(400), labels] += m
        assert (angle > math.pi).any()
        want.copy_(angle.cos())
    want = want * 64
    (want * upstream).sum().backward()
    torch.testing.assert_close(logits, want, atol=1e-3, rtol=1e-4)
    for ours, theirs in zip(grads, (z.grad, head.weight.grad)): torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-4)


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


@pytest.mark.parametrize("form", FORMS)
def test_float32_under_mixed_precision(form):
    head, z, labels = make(form, 3, 64).eval(), torch.randn(5, 64), torch.zeros(5, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16): mixed, rounded = head(z, labels), head(z.bfloat16(), labels)
    assert mixed.dtype == rounded.dtype == torch.float32
    assert torch.equal(mixed, head(z, labels)) and torch.equal(rounded, head(z.bfloat16().float(), labels))


@settings(max_examples=30, deadline=None)
@given(form=st.sampled_from(sorted(FORMS)), batch=st.integers(1, 6), classes=st.integers(2, 5), seed=st.integers(0, 10**6))
def test_right_and_wrong_are_told_without_the_margin(form, batch, classes, seed):
    torch.manual_seed(seed)
    head, z, labels = make(form, classes, 8), torch.randn(batch, 8), torch.randint(classes, (batch,))
    assert torch.equal(correct(head(z, labels), z, labels, head), cosines(z, head.weight).argmax(1) == labels)


TWO = """
import sys, torch, torch.distributed as dist
from cemiface.recognition.margins import AdaFace
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
emb, labels, weight = torch.load(f"{folder}/batch.pt", weights_only=True)
head = AdaFace(len(weight), weight.shape[1])
head.weight.data = weight
logits = [head(e[rank::2], labels[rank::2]).detach() for e in emb]
torch.save((logits, head.norm_mean, head.norm_std), f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""

def test_two_processes_share_adafaces_statistics(tmp_path):
    "Each sees a single image, whose lengths differ much: neither has a deviation of its own."
    torch.manual_seed(0)
    emb, labels, head = torch.randn(3, 2, 8) * torch.tensor([1., 20.])[None, :, None], torch.tensor([0, 1]), AdaFace(3, 8)
    torch.save((emb, labels, head.weight.data), tmp_path / "batch.pt")
    runs = [subprocess.Popen([sys.executable, "-c", TWO, str(rank), str(tmp_path)], env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"}) for rank in range(2)]
    try: assert [run.wait(timeout=120) for run in runs] == [0, 0]
    finally: [run.kill() for run in runs]
    want = [head(e, labels).detach() for e in emb]
    for rank in range(2):
        logits, mean, std = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close([mean, std], [head.norm_mean, head.norm_std])
        for ours, joint in zip(logits, want): torch.testing.assert_close(ours, joint[rank::2], atol=1e-3, rtol=1e-4)


def test_unknown_name():
    with pytest.raises(ValueError, match="choose one of cosface, arcface, adaface"): margin_head("sphereface", 3)
