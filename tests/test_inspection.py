"""A finished set: every kind of damage found, any image drawn again, the card."""
import shutil

import diffusers
import pytest
import torch
import yaml

from cemiface.audit.card import licence_fields, set_similarity, size_category, write_card
from cemiface.generation.conditioning import GENERATORS
from cemiface.data.faceset import FaceSet, open_faces
from cemiface.data.images import decode_image, encode_image, read_image
from cemiface.sets.stored import open_set, regenerate, verify_set
from cemiface.generation.pipeline import untrained_pipeline
from cemiface.recognition.backbones import backbone
from cemiface.recognition.training import embed
from cemiface.data.records import open_encoded
from cemiface.sets.layout import checksum, merge_set
from small import SIZE, inquiries, make

diffusers.utils.logging.disable_progress_bar()


@pytest.mark.parametrize("form", ["folder", "records"])
def test_any_image_can_be_drawn_again(pipe, tmp_path, form):
    out = make(pipe, tmp_path/"set", form=form, batch_size=4, per_subject=[(3, 4), (2, 1)], m=[0., .5])
    for i, k in ((0, 0), (1, 3), (2, 2), (4, 0)):
        again = regenerate(out, pipe, f"{i}/{k}")
        assert again.same and again.difference == 0 and torch.equal(again.image, again.stored)
        assert regenerate(out, pipe, f"{i:06d}/{k:04d}.png", alone=True).difference <= 1
    bare = make(pipe, tmp_path/"bare", form=form, oversample=0)
    with pytest.raises(ValueError, match="pass `inquiries`"): regenerate(bare, pipe, "1/1")
    assert regenerate(bare, pipe, "1/1", inquiries()).same and not regenerate(bare, pipe, "1/1", inquiries().subset(torch.tensor([0, 0, 0, 0, 0]))).same
    for image, says in (("5/0", "5 subjects"), ("4/1", "no image 000004/0001"), ("4", "no generated image"), ("0/inquiry_0", "no generated image")):
        with pytest.raises(ValueError, match=says): regenerate(out, pipe, image)
    with pytest.raises(ValueError, match="name the one that made it"): regenerate(out, untrained_pipeline(GENERATORS["smoke"], seed=1), "0/0")


def test_jpegs_and_embeddings_are_drawn_again(pipe, tmp_path):
    assert regenerate(make(pipe, tmp_path/"jpg", ext="jpg"), pipe, "2/1").same
    emb = torch.randn(5, pipe.recogniser.config.emb_dim, generator=torch.Generator().manual_seed(0))
    assert regenerate(make(pipe, tmp_path/"emb", emb, oversample=0), pipe, "2/1", emb).same


@pytest.mark.parametrize("form", ["folder", "records"])
def test_each_kind_of_damage_is_found(pipe, tmp_path, form):
    whole = make(pipe, tmp_path/"whole", form=form)
    assert list(verify_set(whole).columns) == ["file", "fault"] and not len(verify_set(whole))
    def damaged(change):
        out = tmp_path/f"bad{len(list(tmp_path.iterdir()))}"
        shutil.copytree(whole, out)
        change(out)
        return {f: fault for f, fault in verify_set(out).itertuples(index=False)}
    def edit(name, old, new): return lambda out: (out/name).write_bytes((out/name).read_bytes().replace(old, new, 1))
    assert "promises" in damaged(edit("manifest.csv", b"0000.png,0,0,", b"0000.png,0,7,"))["000000/0000.png"]
    assert damaged(edit("set.json", b'"per_subject": 3', b'"per_subject": 2'))["manifest.csv"] == "has 25 images, set.json promises 20"
    if form == "folder":
        first = "000001/0002.png"
        assert damaged(edit(first, b"IDAT", b"IDAX")) == {first: "its checksum is not the manifest's"}
        assert damaged(lambda out: (out/first).unlink()) == {first: "cannot be read: No such file or directory"}
        assert damaged(lambda out: (out/"000001/9.png").write_bytes(b"?")) == {"000001/9.png": "is not in the manifest"}
    else:
        found = damaged(lambda out: (out/"train.rec").write_bytes((out/"train.rec").read_bytes().replace(b"IDAT", b"IDAX", 1)))
        assert found == {"000000/0000.png": "its checksum is not the manifest's"}
    (whole/"set.json").unlink()
    with pytest.raises(ValueError, match="no set.json"): verify_set(whole)


@pytest.mark.parametrize("data", [b"{junk", b"", b"[1, 2]", b'{"config": 1}', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["set.json", "manifest.csv"])
def test_a_note_that_is_damaged_is_named(pipe, tmp_path, name, data):
    out = make(pipe, tmp_path/"set")
    (out/name).write_bytes(data)
    for use in (open_set, verify_set, lambda out: regenerate(out, pipe, "0/0"), *[merge_set]*(name == "set.json")):
        with pytest.raises(ValueError, match=f"set/{name} is damaged or cannot be read.*: copy the set again, or draw it anew"): use(out)


def test_what_is_no_set_is_called_by_its_kind(pipe, tmp_path):
    pipe.save_pretrained(tmp_path/"generator")
    for use in (open_set, merge_set):
        with pytest.raises(ValueError, match="generator is a generator, not a "): use(tmp_path/"generator")
        with pytest.raises(ValueError, match="there is no .*nowhere"): use(tmp_path/"nowhere")


def test_a_recogniser_of_another_size_is_told_before_anything_is_measured(pipe, tmp_path):
    out = make(pipe, tmp_path/"set")
    with pytest.raises(ValueError, match="has images of 16 pixels, the recogniser takes 32: choose another --recogniser, such as the one its generator was trained with"):
        write_card(out, backbone("ir18", 32, 4), "mine")


def test_the_size_and_the_label_are_checked_too(pipe, tmp_path):
    out = make(pipe, tmp_path/"set")
    small = encode_image(torch.zeros(3, 9, 12, dtype=torch.uint8))
    old = checksum((out/"000001"/"0001.png").read_bytes())
    (out/"000001"/"0001.png").write_bytes(small)
    (out/"manifest.csv").write_text((out/"manifest.csv").read_text().replace(old, checksum(small)))
    assert verify_set(out).fault.tolist() == ["it has 12x9 pixels instead of 16x16"]
    (out/"manifest.csv").write_text((out/"manifest.csv").read_text().replace("000003/0000.png,3", "000003/0000.png,2"))
    assert any("its label is 3, the manifest says 2" in f for f in verify_set(out).fault)


@pytest.mark.parametrize("form", ["folder", "records"])
def test_the_card(pipe, tmp_path, form):
    out = make(pipe, tmp_path/"my set", form=form, licence={"images": "CC BY-NC 4.0", "inquiries": "own photos: with consent"})
    text = write_card(out, pipe.recogniser, "R-18").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["license"] == "cc-by-nc-4.0" and front["size_categories"] == ["n<1K"] and front["pretty_name"] == "my set"
    images = torch.stack([decode_image(open_encoded(out).read(i)) for i in range(25)]).view(5, 5, 3, SIZE, SIZE)[:, :3].flatten(0, 1)
    cos = (embed(pipe.recogniser, images).view(5, 3, -1)*embed(pipe.recogniser, inquiries().images)[:, None]).sum(2).numpy()*100
    assert f"| mean | {cos.mean():.2f} % |" in text and f"| standard deviation | {cos.std():.2f} % |" in text and "| images measured | 15 |" in text
    assert "own photos: with consent" in text and "R-18" in text and read_image(out/"contact_sheet.png").shape == (3, 5*SIZE + 4*2, 4*SIZE + 3*2)
    assert not len(verify_set(out)) and len(open_faces(out, SIZE)) == 25
    assert set_similarity(out, pipe.recogniser, images=5).images.item() == 5


def test_words_of_the_hub():
    assert [licence_fields(x) for x in ("not stated", "MIT", "cc0 1.0", "Research only!")] == [{"license": "unknown"}, {"license": "mit"}, {"license": "cc0-1.0"}, {"license": "other", "license_name": "research-only!"}]
    assert [size_category(n) for n in (1, 1000, 9_999, 10_000, 999_999, 1_500_000, 10**8)] == ["n<1K", "1K<n<10K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "100M<n<1B"]
