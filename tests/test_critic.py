"A critic in the last steps of a training: what it changes and what not, kill and resume, pieces, processes, the baseline."
import os, socket, subprocess, sys
import numpy as np, pandas as pd, pytest, torch
from safetensors import safe_open

from cemiface.core.settings import changed
from cemiface.data.faceset import FaceSet
from cemiface.generation.critic import Critic, SHARE, joint_gradient, recogniser_maps
from cemiface.generation.dcface import DCFaceConfig, train_dcface
from cemiface.generation.simmat import SimMatConfig
from cemiface.generation.training import another_view, train_generator
from cemiface.recognition.backbones import backbone
from small import TINY, same, weights
from test_simmat import faces

PLAIN = SimMatConfig(steps=12, batch_size=4, lr=1e-3, warmup_steps=2, log_every=3, save_every=0, prediction="sample")
JUDGED = changed(PLAIN, critic_steps=6)


def recogniser():
    torch.manual_seed(0)
    return backbone("ir18", size=16, width=4).eval()


def train(out, config=JUDGED, images=None):
    given = faces()
    if images: given = FaceSet(images(given.images), given.labels, given.subjects, given.name)
    return train_generator(given, recogniser(), TINY, config, out, progress=False)


def log(out): return pd.read_csv(out/"log.csv").drop(columns="images_per_s").set_index("step")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("judged")
    train(out)
    return out


class Failing:
    "Images that can be looked up `n` times."
    def __init__(self, images, n): self.images, self.n, self.shape = images, n, images.shape
    def __len__(self): return len(self.images)
    def __getitem__(self, i):
        self.n -= 1
        if self.n < 0: raise OSError("disk gone")
        return self.images[i]


@pytest.mark.parametrize("step", [4, 7, 11]) # before the critic's first step, and within its steps
def test_cut_off_and_called_again_it_ends_where_a_whole_run_ends(whole, tmp_path, step):
    with pytest.raises(OSError, match="disk gone"): train(tmp_path, images=lambda x: Failing(x, 2 + step))
    assert (tmp_path/"state.safetensors").exists() and not (tmp_path/"unet").exists()
    train(tmp_path)
    assert same(weights(tmp_path), weights(whole))
    pd.testing.assert_frame_equal(log(tmp_path), log(whole))
    with safe_open(whole/"state.safetensors", "pt") as a, safe_open(tmp_path/"state.safetensors", "pt") as b:
        critics = [k for k in a.keys() if k.startswith("critic")]
        assert critics and all(torch.equal(a.get_tensor(k), b.get_tensor(k)) for k in critics)


def test_nothing_differs_before_the_critics_first_step(whole, tmp_path):
    train(tmp_path, PLAIN)
    plain, judged = log(tmp_path), log(whole)
    pd.testing.assert_frame_equal(plain[:2], judged[plain.columns][:2])
    assert judged.loss_critic.isna().tolist() == [True, True, False, False] and "loss_critic" not in plain
    assert not same(weights(tmp_path), weights(whole))
    assert 1.5 < judged.loss_critic.iloc[-1] < 2.5 # hinge: 2 where the critic cannot tell


def test_more_critic_steps_than_steps_are_all_of_them(tmp_path):
    train(tmp_path, changed(JUDGED, critic_steps=100))
    assert log(tmp_path).loss_critic.notna().all()


def test_the_recogniser_stays_as_it_was(tmp_path):
    net = recogniser()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    train_generator(faces(), net, TINY, JUDGED, tmp_path, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("how", [dict(accumulate=2), dict(precision="bf16"), dict(checkpointing=True, channels_last=True)])
def test_how_a_step_is_computed_changes_only_rounding(whole, tmp_path, how):
    train(tmp_path, changed(JUDGED, **how))
    columns = ["loss_mse", "loss_simmat", "loss_critic"]
    np.testing.assert_allclose(log(tmp_path)[columns], log(whole)[columns], rtol=.02, atol=.02)


def test_the_maps_are_those_of_the_recogniser():
    net, x = recogniser(), torch.rand(2, 3, 16, 16)
    maps = recogniser_maps(net, x)
    end = net.features(net.fc(net.bn2(net.layer4(maps[-1])).flatten(1)))
    assert torch.allclose(end, net(x), atol=1e-5)
    assert [v.shape[0] for v in Critic(net)(x, maps)] == [2]*5


@pytest.mark.parametrize("scale", [1e-3, 1., 1e3])
def test_the_wish_has_a_fixed_share_whatever_its_scale(scale):
    out = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    other = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    mse, loss, wished = out.square().sum(), (2*out).sum(), scale*(other*out).sum()
    g = joint_gradient(out, mse, loss, wished, .5)
    wanted = 2*out + 2 + .5*SHARE*(2*out).norm()/other.norm()*other
    assert torch.allclose(g, wanted, atol=1e-5)


def test_another_view_is_the_image_where_nothing_is_drawn():
    x = torch.rand(2, 3, 8, 8)*2 - 1
    whole_frame = torch.tensor([[.9, 1., .5, 0, 0, 0], [.1, 1., .5, 0, 0, 0]])
    seen = another_view(x, whole_frame, torch.ones_like(x))
    assert torch.allclose(seen[0], x[0], atol=1e-5) and torch.allclose(seen[1], x[1].flip(-1), atol=1e-5)
    grainy = another_view(x, whole_frame + torch.tensor([0, 0, 0, 0, 0, 1.]), torch.ones_like(x))
    assert torch.allclose(grainy - seen, torch.full_like(x, .15), atol=1e-6)


def test_a_recogniser_without_stages_is_named(tmp_path):
    toy = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, 512))
    with pytest.raises(ValueError, match="the recogniser is a Sequential: give an IResNet, or critic_steps=0"):
        train_generator(faces(), toy, TINY, JUDGED, tmp_path, progress=False)


def test_the_baseline_has_it_too(tmp_path):
    config = DCFaceConfig(steps=4, batch_size=4, log_every=2, critic_steps=2, prediction="sample", cells=1)
    train_dcface(faces(), recogniser(), TINY, config, tmp_path, progress=False)
    assert log(tmp_path).loss_critic.isna().tolist() == [True, False]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_critic as t
t.train(Path(sys.argv[2]), t.changed(t.JUDGED, batch_size=8))
"""


@pytest.mark.slow
def test_two_processes_are_nearly_as_one(tmp_path): # the critic's share is taken of each process's part
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = str(s.getsockname()[1])
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    command = [sys.executable, "-c", CHILD, os.path.dirname(__file__), str(tmp_path/"two")]
    runs = [subprocess.Popen(command, env=env | {"RANK": k, "LOCAL_RANK": k}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in "01"]
    try: results = [run.communicate(timeout=300) for run in runs]
    finally: [run.kill() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], results
    train(tmp_path/"one", changed(JUDGED, batch_size=8))
    columns = ["loss_mse", "loss_simmat", "loss_critic", "grad_norm"]
    np.testing.assert_allclose(log(tmp_path/"two")[columns], log(tmp_path/"one")[columns], rtol=.05, atol=.02)
