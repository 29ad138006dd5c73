"Figure 3 says what the networks are; a training followed epoch by epoch ends as one that is not; Table 10 and D.1 at the smallest size."
import matplotlib
matplotlib.use("Agg")
import pandas as pd
import pytest
import torch

from cemiface.core.settings import changed
from cemiface.recognition.backbones import backbone
from cemiface.generation.conditioning import GENERATORS, face_conditioner, face_unet
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study
from cemiface.paper.structure import draw_structure, levels, module_table, structure, trace_shapes
from cemiface.paper.training import DYNAMICS_MS, NETWORKS
from cemiface.generation.shipped import shipped_pipeline
from cemiface.paper.published import published
from cemiface.core.report import Finding
from cemiface.paper.reproduce import reproduce

SMOKE = PROFILES["smoke"]
RESULTS = ["table10", "dynamics", "figure3"]
pytestmark = pytest.mark.slow


def words(fig): return "\n".join(t.get_text() for ax in fig.axes for t in ax.texts)


def with_generator(monkeypatch, **changes): # the smoke profile with another UNet
    monkeypatch.setitem(GENERATORS, "smoke", changed(GENERATORS["smoke"], **changes))
    return structure(SMOKE)


@pytest.fixture(scope="module")
def real(): # the networks themselves, with weights, and what they do to real images
    config, t = GENERATORS["smoke"], SMOKE.teacher
    recogniser, unet, conditioner = backbone(t.backbone, t.size, t.width).eval(), face_unet(config).eval(), face_conditioner(config).eval()
    x = torch.zeros(3, 3, SMOKE.size, SMOKE.size)
    with torch.no_grad():
        emb = recogniser(x)
        tokens = conditioner(emb, torch.zeros(3))
        return dict(E_id=recogniser, UNet=unet, F1=conditioner.f1, F2=conditioner.f2), emb, tokens, unet(x, 5, encoder_hidden_states=tokens).sample


def test_the_table_is_what_the_networks_are(real):
    nets, emb, tokens, out = real
    table = module_table(structure(SMOKE)).set_index("module")
    for name, net in nets.items(): assert table.parameters[name] == sum(v.numel() for v in net.state_dict().values() if v.is_floating_point()) - sum(b.numel() for b in net.buffers() if b.is_floating_point())
    assert table.output["E_id"] == f"[B,{emb.shape[1]}]" and table.output["F2"] == f"[B,{tokens[0].numel()}]"
    assert table.input["UNet"] == table.output["UNet"] == "[B,3,16,16]" == f"[B,{','.join(map(str, out.shape[1:]))}]"
    inside = table.drop(index=["E_id", "F1", "F2", "UNet"])
    assert inside.parameters.sum() == table.parameters["UNet"] and list(table.weights) == ["frozen"] + ["trained"] * (len(table) - 1)
    assert (inside.output.iloc[1:-1].to_numpy() == inside.input.iloc[2:].to_numpy()).all()  # from conv in on, what one part gives the next one takes


def test_small_numbers_by_hand():
    table = module_table(structure(SMOKE)).set_index("module").parameters
    assert table["F1"] == 64 + 64 and table["F2"] == (512 + 64) * 4 * 32 + 4 * 32  # 1 -> 64; 576 -> 4 tokens of 32
    assert table["conv in"] == 3 * 16 * 9 + 16 and table["conv out"] == 16 * 3 * 9 + 3 and table["norm out"] == 2 * 16
    assert table["time MLP"] == 16 * 64 + 64 + 64 * 64 + 64
    assert levels(structure(SMOKE)).values.tolist() == [["down 1", 16, 16, 1, 0], ["down 2", 8, 32, 1, 2], ["middle", 8, 32, 2, 2], ["up 2", 8, 32, 2, 2], ["up 1", 16, 16, 2, 0]]


def test_the_figure_says_the_tables_numbers():
    s = structure(SMOKE)
    said = words(draw_structure(s))
    for name in ("E_id", "F1", "F2", "UNet", "time MLP"): assert s.count_text(name) in said
    for row in levels(s).itertuples(): assert f"{row.width}\n{row.size}²" in said
    assert "40 steps of 16 images" in said and "DDIM, 4 steps" in said and "from 999 to 249" in said and "101 values" in said and "[4, 32]" in said


def test_another_configuration_another_figure(monkeypatch):
    before = structure(SMOKE)
    said = words(draw_structure(before))
    s = with_generator(monkeypatch, block_out_channels=(16, 32, 48), layers_per_block=(1, 2, 1), attention=(False, False, True), tokens=2)
    other = words(draw_structure(s))
    assert s.count("UNet") != before.count("UNet") and s.count_text("UNet") in other and s.count_text("UNet") not in said
    assert "48\n4²" in other and "48\n4²" not in said and "[2, 32]" in other
    assert levels(s).set_index("level").loc["up 2", ["size", "blocks", "heads"]].tolist() == [8, 3, 0]
    simmat = changed(SMOKE.simmat, lambda_simmat=.5, prediction="epsilon", interval=None, similarity="euclidean", T=50)
    other = words(draw_structure(structure(changed(SMOKE, simmat=simmat, steps=1, teacher=changed(SMOKE.teacher, backbone="irse18")))))
    assert "+ 0.5\\,L" in other and "0.05" not in other and "continuous" in other and "v'" not in other and "t / 50" in other and "dist" in other
    assert "irse18" in other and "from 49 to 49" in other
    of_image = words(draw_structure(structure(SMOKE.model_copy(update=dict(simmat=SMOKE.simmat.model_copy(update=dict(identity="image")))))))
    assert "all images of $x$'s subject" in said and "all images" not in of_image and of_image.count("(Eq. 5)") == 2 and said.count("(Eq. 5)") == 1


def test_the_laptop_figure_is_of_the_weights_in_the_package():
    s, pipe = structure(PROFILES["laptop"]), shipped_pipeline()
    for name, net in (("E_id", pipe.recogniser), ("F1", pipe.conditioner.f1), ("F2", pipe.conditioner.f2), ("UNet", pipe.unet)):
        assert s.count(name) == sum(p.numel() for p in net.parameters())


def test_nothing_is_left_on_the_networks():
    s = structure(SMOKE)
    assert not any(m._forward_hooks for m in s.modules.values())
    with pytest.raises(RuntimeError): trace_shapes(dict(net=s.modules["F1"]), lambda: s.modules["F1"](torch.zeros(2, 3)))
    assert not s.modules["F1"]._forward_hooks  # not after a failure either


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The smoke profile over two seeds, with shorter trainings of E_id and of the generator."
    out, short = tmp_path_factory.mktemp("out"), dict(simmat=changed(SMOKE.simmat, steps=3), teacher=changed(SMOKE.teacher, epochs=1))
    profile = changed(SMOKE, per_subject=8, pairs=20, candidates=12, steps=2, **short)
    return out, reproduce(profile, RESULTS, out, seeds=2, say=lambda line: None, progress=False), Study(profile, out)


def test_results_at_the_smallest_size(made):
    out, found, _ = made
    assert all(isinstance(found[n], Finding) for n in RESULTS), found
    table10, dynamics = found["table10"].table, found["dynamics"].table
    assert table10.backbone.tolist() == published("table10").backbone.tolist() == list(NETWORKS) and table10.AVG_sd.notna().all()
    for name, n in zip(NETWORKS.values(), table10.parameters): assert n == sum(p.numel() for p in backbone(name, 16, SMOKE.student.width).parameters())
    assert dynamics.m.tolist() == list(DYNAMICS_MS) and dynamics["epochs_to_best_AVG published"].tolist()[:2] == [10, 38] and (dynamics.best_AVG >= dynamics.last_AVG).all()
    assert (out / "smoke" / "figures" / "figure3.png").exists() and "Not made" not in (out / "smoke" / "index.html").read_text()
    assert "nan" not in " ".join(found[n].text for n in RESULTS)


def test_a_followed_training_ends_as_one_that_is_not(made):
    _, _, study = made
    for seed in study.seeds:
        followed, plain = study.dynamics(0., seed), study.set_training(0., seed).run()
        history = pd.DataFrame(followed.run()["history"])
        assert history.epoch.tolist() == [1, 2] and {n: history[n].iloc[-1] for n in plain["accuracy"]} == plain["accuracy"] and history.loss.iloc[-1] == plain["loss"]
        assert not (followed.infra.uid_folder() / "train").exists()


def test_one_seed_has_no_spread(made):
    out, _, study = made
    one = reproduce(study.profile, ["table10", "dynamics"], out, seeds=1, say=lambda line: None, progress=False)
    texts = [one[n].text for n in ("table10", "dynamics")]
    assert "unknown with one seed" in texts[0] and texts[0].count("has no spread to be judged by") == 2 and "one seed: no verdict" in texts[1]
    assert one["table10"].table.AVG_sd.isna().all() and "nan" not in " ".join(texts)


def test_figure3_needs_no_task(tmp_path):
    found = reproduce("smoke", ["figure3"], tmp_path, say=lambda line: None, progress=False)["figure3"]
    assert found.figure and not (tmp_path / "cache").exists()
