"Who stands in two sets: known people, properties, and what a mistaken call is told."
import warnings

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn.functional import normalize
from typer.testing import CliRunner

from cemiface.audit.overlap import face_findings, halves, overlap
from cemiface.cli.app import app
from cemiface.data.faceset import open_faces
from cemiface.data.images import write_folder

PEOPLE = normalize(torch.randn(40, 96, generator=torch.Generator().manual_seed(1)))


def pictures(who, images=6, spread=.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = torch.as_tensor(who).repeat_interleave(images)
    return normalize(PEOPLE[rows] + spread*torch.randn(len(rows), 96, generator=g)/96**.5)


def sets(first, second, names, images=6):
    "Embeddings, labels and parts of two sets: people of each, and what the second calls them."
    emb = torch.cat([pictures(first, images), pictures(second, images, seed=1)])
    labels = torch.tensor([*first, *names]).repeat_interleave(images)
    part = torch.tensor([0]*len(first) + [1]*len(second)).repeat_interleave(images)
    return emb, labels, part


@settings(max_examples=20, deadline=None)
@given(st.sets(st.integers(0, 11)), st.randoms())
def test_exactly_those_who_are_in_both(shared, random):
    second = sorted(shared) + list(range(12, 20))
    emb, labels, part = sets(range(12), second, range(20, 20 + len(second)))
    order = torch.tensor(random.sample(range(len(emb)), len(emb)))
    labels = labels.unique(return_inverse=True)[1]
    found = overlap(emb[order], labels[order], part[order]).one_face
    assert sorted(zip(found.subject, found.other_subject)) == [(person, 12 + k) for k, person in enumerate(sorted(shared))]
    assert list(found.cosine) == sorted(found.cosine, reverse=True)


def test_one_name_with_two_faces():
    # 0 to 4 are who they say, 5 to 7 somebody else
    found = overlap(*sets(range(8), [0, 1, 2, 3, 4, 30, 31, 32], range(8)))
    assert sorted(found.two_faces.subject) == [5, 6, 7] and not len(found.one_face)
    assert (found.two_faces.subject == found.two_faces.other_subject).all()


def test_three_sets_are_compared_two_by_two():
    emb = torch.cat([pictures([0, 1, 2]), pictures([0, 3, 4], seed=1), pictures([0, 3, 5], seed=2)])
    labels, part = torch.arange(9).repeat_interleave(6), torch.arange(3).repeat_interleave(18)
    found = overlap(emb, labels, part).one_face
    assert set(zip(found.subject, found.other_subject)) == {(0, 3), (0, 6), (3, 6), (4, 7)}


def test_the_two_cosines_are_what_they_say():
    emb, labels, part = sets(range(6), range(6, 12), range(6, 12))
    found = overlap(emb, labels, part)
    each = emb.view(12, 6, -1)
    split = [torch.cosine_similarity(e[::2].mean(0), e[1::2].mean(0), dim=0) for e in each]
    torch.testing.assert_close(halves(emb, labels), torch.stack(split))
    assert found.same == pytest.approx(torch.stack(split).median().item(), abs=1e-6)
    centres = normalize(each.mean(1))
    nearest = [max((centres[i] @ centres[j]).item() for j in group if j != i) for group in (range(6), range(6, 12)) for i in group]
    assert found.strangers == pytest.approx(torch.tensor(nearest).quantile(.99).item(), abs=1e-6)


def test_sets_that_tell_nothing_are_refused():
    emb, labels, part = sets(range(4), range(4, 8), range(4, 8), images=1)
    with pytest.raises(ValueError, match="nobody has two images"): overlap(emb, labels, part)
    emb, labels, part = sets(range(4), [5], [5])
    with pytest.raises(ValueError, match="one subject only"): overlap(emb, labels, part)


def test_the_linter_names_them(tmp_path):
    # a recogniser that looks at the colour of the whole picture
    colours = (PEOPLE[:8, :3].abs()*250).byte()
    def write(name, who, noise):
        images = colours[who].repeat_interleave(4, 0)[:, :, None, None].expand(-1, 3, 32, 32).clone()
        write_folder(tmp_path/name, images + torch.arange(4).repeat(len(who)).byte()[:, None, None, None] + noise, torch.arange(len(who)).repeat_interleave(4), "png")
    write("a", [0, 1, 2], 0); write("b", [4, 1, 5], 1)
    recogniser = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    recogniser.p = torch.nn.Parameter(torch.zeros(1))
    apart = face_findings(open_faces(f"{tmp_path}/a,{tmp_path}/b", 32), recogniser)
    assert apart["one face"][0] == 1 and apart["one face"][1][0].startswith("a-1 and b-1, cosine ") and apart["two faces"][0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matched = face_findings(open_faces(f"{tmp_path}/a+{tmp_path}/b", 32), recogniser)
    assert matched["one face"][0] == 0 and "a: 1" not in str(matched["two faces"])
    with pytest.raises(ValueError, match="this is one: write A,B"): face_findings(open_faces(tmp_path/"a", 32), recogniser)


def test_a_single_set_is_told_so_in_the_terminal(tmp_path):
    write_folder(tmp_path/"one", torch.zeros(4, 3, 64, 64, dtype=torch.uint8), torch.tensor([0, 0, 1, 1]), "png")
    told = CliRunner().invoke(app, ["data", "lint", str(tmp_path/"one"), "--recogniser", "shipped"])
    assert told.exit_code == 2 and "one: the faces of two sets are compared, and this is one: write A,B or A+B" in told.output
