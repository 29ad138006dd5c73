"CemiFace beside DCFace at the smallest size, against arithmetic written out."
import json
import warnings

import matplotlib
matplotlib.use("Agg")
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from cemiface.core.settings import changed
from cemiface.data.faceset import open_faces
from cemiface.study.profiles import PROFILES
from cemiface.study.study import Study
from cemiface.study.tasks import in_order
from cemiface.paper.methods import METHODS, ROWS, VOLUMES, distances, subject_means, volume_runs, volume_training
from cemiface.paper.published import published
from cemiface.paper.statistics import agreement
from cemiface.recognition.training import embed
from cemiface.study.results import RESULTS
from cemiface.core.report import Finding
from cemiface.paper.reproduce import RESULTS
from cemiface.paper.reproduce import reproduce

NAMES = ["table7", "table12", "table6", "figure9"]
pytestmark = pytest.mark.slow


def small(): # every setting that takes time, less
    p, less = PROFILES["smoke"], changed
    return less(p, pairs=20, per_subject=6, candidates=12, set_per_subject=3, steps=2, teacher=less(p.teacher, epochs=1), student=less(p.student, epochs=1),
                simmat=less(p.simmat, steps=4), dcface=less(p.dcface, steps=2), control_ms=(1., 0., -1.))


@pytest.fixture(scope="module")
def made(tmp_path_factory): # findings of two seeds, and their study
    out = tmp_path_factory.mktemp("methods")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = reproduce(small(), NAMES, out, seeds=2, say=lambda line: None, progress=False)
    return found, Study(small(), out, 2)


def test_every_result_is_made(made):
    found, _ = made
    assert all(isinstance(found[n], Finding) for n in NAMES), found
    assert found["figure9"].figure is not None and all(found[n].table is not None for n in NAMES[:3])
    assert set(NAMES) <= set(RESULTS) and all("Section" in RESULTS[n].title for n in NAMES)


def test_results_only_read_what_they_need(made):
    _, study = made
    assert all(t.infra.status() == "completed" for n in NAMES for t in in_order(RESULTS[n].needs(study)))


def test_embeddings_leave_the_copies_out(made):
    _, study = made
    task, p = study.generated(None, 0), study.profile
    kept, faces = study.embedded(generated=task).load(), open_faces(task.set_folder, p.size)
    assert len(faces) == p.set_subjects * (p.set_per_subject + p.oversample) and len(kept["emb"]) == p.set_subjects * p.set_per_subject
    drawn = [k for k in range(len(faces)) if "inquiry" not in faces.encoded.where(k)]
    assert torch.equal(kept["labels"], faces.labels[drawn]) and torch.allclose(kept["emb"], embed(study.recogniser().load()[0], faces.images[drawn]), atol=1e-5)


def test_table7_by_hand(made):
    found, study = made
    table, inquiry = found["table7"].table.set_index(["method", "source"]), study.inquiries().load()["emb"]
    for name, m in METHODS.items():
        kept = study.embedded(generated=study.generated(m, 0)).load()
        cos = [float(e @ inquiry[i]) for e, i in zip(kept["emb"], kept["labels"])]
        row = table.loc[(name, "measured")]
        assert row.avg_sim == pytest.approx(100 * np.mean(cos), abs=1e-3) and row["std"] == pytest.approx(100 * np.std(cos), abs=1e-3)
        means = pd.Series(cos).groupby(kept["labels"].tolist()).mean()
        by_subject = [kept["emb"][kept["labels"] == i].double().numpy() for i in range(int(kept["labels"].max()) + 1)]
        assert row.scatter == pytest.approx(sum(((e - e.mean(0))**2).sum() for e in by_subject) / (len(cos) - len(by_subject)), rel=1e-5)
        assert row["common shift"] == pytest.approx((np.mean([e.mean(0) - inquiry[i].double().numpy() for i, e in enumerate(by_subject)], 0)**2).sum(), rel=1e-5)
        assert row["below 0"] == pytest.approx(100 * (means < 0).mean()) and row["0.1-0.2"] == pytest.approx(100 * ((means >= .1) & (means < .2)).mean())
    there = table.loc[("CemiFace", "published")]
    assert there.avg_sim == 28.54 and there["0.3-0.4"] == pytest.approx(100 * 4539 / 9996)


def test_table12_has_equal_counts_and_a_floor(made):
    table = made[0]["table12"].table.set_index("set")
    assert list(table.index) == ["CemiFace", "DCFace", "DigiFace", "other real faces"] and table.images.eq(6 * 3).all() # 12 real subjects, so 6 a set
    assert table["FID published"].dropna().to_dict() == dict(CemiFace=18.72, DCFace=15.82, DigiFace=65.39)
    assert (table["standard error"] > 0).all() and "not FID" in made[0]["table12"].text


def test_table6_is_the_mean_over_seeds(made):
    found, study = made
    table = found["table6"].table.set_index(["method", "volume_M"])
    real = study.real_training().run()["accuracy"]["AVG"]
    for v in VOLUMES:
        for name, m in METHODS.items():
            runs, row = [volume_training(study, m, v, s).run() for s in (0, 1)], table.loc[(ROWS[name], v)]
            a, b = (r["accuracy"]["AVG"] for r in runs)
            assert row.AVG == pytest.approx((a + b) / 2) and row.AVG_sd == pytest.approx(abs(a - b) / 2**.5) and row.GtR == pytest.approx(real - row.AVG)
            assert row["proc-CFP-FP"] == pytest.approx(sum(r["accuracy"]["proc-CFP-FP"] for r in runs) / 2)
            assert row.images == sum(n * (k + study.profile.oversample) for n, k in volume_runs(v, 8, 3))
    assert (table.source == "published only").sum() == 8 and table.loc[("IDiff-Face", .5), "GtR published"] == 6.06
    assert table["AVG published"].tolist() == published("table6").AVG.tolist()
    csv = (study.out/"smoke"/"tables"/"table6.md").read_text()
    assert "<NA>" not in csv and "| 40 |" in csv # counts stay whole: 8 x (3 + 2)


def test_the_largest_volume_holds_the_one_before(made):
    _, study = made
    some, all_of_it = (volume_training(study, 0., v, 0).generated for v in (1., 1.2))
    a, b = (pd.read_csv(t.set_folder/"manifest.csv").query("sampler != 'inquiry'") for t in (some, all_of_it))
    both = a.merge(b, on=["subject", "k", "seed"], suffixes=("", "_there"))
    assert len(both) == len(a) == 16 * 3 and len(b) == 16 * 3 + 32 and all_of_it.subjects == 48
    first, again = (open_faces(t.set_folder, 16) for t in (some, all_of_it))
    assert (first.images.int() - again.images[:len(first)].int()).abs().max() <= 1 # other batches, so a grey level
    assert json.loads((all_of_it.set_folder/"set.json").read_text())["config"]["per_subject"] == [[16, 3], [32, 1]]


def test_figure9_shares_the_noise_and_prints_the_cosines(made):
    found, study = made
    cemi, dc = (study.samples(12, 1, ms, study.inquiries("digiface")).load() for ms in ((1., 0., -1.), (None,)))
    assert torch.equal(cemi["inquiry"], dc["inquiry"]) and study.inquiries("digiface").world == "digiface"
    printed = [float(ax.get_xlabel().replace("\N{MINUS SIGN}", "-")) for ax in found["figure9"].figure.axes if ax.get_xlabel()]
    cos = torch.einsum("mikd,id->im", torch.cat([cemi["emb"], dc["emb"]]), cemi["inquiry_emb"])
    assert printed == pytest.approx(cos[:6].flatten().tolist(), abs=.0051)
    titles = [ax.get_title() for ax in found["figure9"].figure.axes if ax.get_title()]
    assert titles == ["inquiry", "m = 1", "m = 0", "m = \N{MINUS SIGN}1", "DCFace"]


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 9), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_distances_do_not_depend_on_company_or_on_a_common_shift(S, K, D, seed):
    g = torch.Generator().manual_seed(seed)
    a, b, reference = (torch.randn(S, K, D, generator=g) for _ in range(3))
    found = distances(dict(a=a, b=b, same=reference), reference, halves=3)
    np.testing.assert_allclose(found.loc[["a"]], distances(dict(a=a), reference, halves=3), atol=1e-9)
    np.testing.assert_allclose(found, distances(dict(a=a + 7, b=b + 7, same=reference + 7), reference + 7, halves=3), atol=1e-4)
    assert found.loc["same"].abs().max() < 1e-9 and found.shape == (3, 4) # a set in the reference's place, half by half


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=4, max_size=30), st.integers(0, 99))
def test_subject_means_equal_a_loop(labels, seed):
    labels = torch.tensor([*range(4), *labels])
    g = torch.Generator().manual_seed(seed)
    emb, inquiry = torch.randn(len(labels), 5, generator=g), torch.randn(4, 5, generator=g)
    expected = [torch.cosine_similarity(emb[labels == i], inquiry[i:i + 1]).double().mean().item() for i in range(4)]
    np.testing.assert_allclose(subject_means(dict(emb=emb, labels=labels), inquiry), expected, atol=1e-6)


@given(st.floats(-9, 9), st.floats(0, 9), st.sampled_from([-1., 2.]))
def test_an_agreement_turns_with_the_published_sign(gap, spread, there):
    turned = {"agrees with the paper": "differs from the paper", "differs from the paper": "agrees with the paper"}
    said = agreement(gap, spread, there)
    assert agreement(-gap, spread, there) == agreement(gap, spread, -there) == turned.get(said, said)
    assert (said == "is not separable at this size") == (abs(gap) <= spread)
