"""The HDF5 reader against the HDF5 library itself (h5py), in both generations of the format, and what it refuses."""

import h5py
import numpy as np
import pytest
import torch

from isthmus.weights.formats.hdf5 import Group, read_tree
from isthmus.weights.formats.stored import Span, Stored, read_all

DTYPES = ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def tree(path):
    with path.open("rb") as file:
        return read_tree(file, Span(path, 0, path.stat().st_size))


def assert_same(found, wanted):
    """Our tree against h5py's: names, attributes of text, and every number."""
    if isinstance(wanted, h5py.Dataset):
        assert isinstance(found, Stored)
        assert np.array_equal(read_all({"it": found})["it"].numpy(), wanted[()])
        return
    assert isinstance(found, Group)
    assert set(found.members) == set(wanted)
    texts = {
        name: [text.decode() if isinstance(text, bytes) else text for text in np.atleast_1d(value).tolist()]
        for name, value in wanted.attrs.items()
        if np.asarray(value).dtype.kind in "SOU"
    }
    assert found.attributes == texts
    for name in wanted:
        assert_same(found.members[name], wanted[name])


@pytest.fixture
def h5(tmp_path):
    """Writes an HDF5 file by a function of its root, and returns its path."""

    def write(fill, **options):
        with h5py.File(tmp_path / "a.h5", "w", **options) as file:
            fill(file)
        return tmp_path / "a.h5"

    return write


def test_numbers_and_texts_of_every_kind(h5):
    random = np.random.default_rng(0)

    def fill(root):
        for number, dtype in enumerate(DTYPES):
            root.create_dataset(f"deep/{dtype}", data=random.integers(0, 100, (2, 3, number + 1)).astype(dtype))
        root["scalar"] = np.float32(3)
        root["empty"] = np.zeros((0, 4), np.float32)
        root.attrs["fixed"] = [b"first", b"second one"]
        root.attrs["one"] = b"alone"
        root["deep"].attrs["variable"] = "a text of variable length, größer"
        root["deep"].attrs["many"] = ["of", "", "variable length"]
        root["deep"].attrs["number"] = 3
        root["deep"].attrs["none"] = []

    path = h5(fill)
    with h5py.File(path) as wanted:
        assert_same(tree(path), wanted)


@pytest.mark.parametrize("count", [1, 9, 60, 700])
def test_groups_of_any_size(h5, count):
    """Beyond a few members their names are in trees, which grow by levels."""

    def fill(root):
        for number in range(count):
            group = root.create_group(f"layer_{number}_{'x' * (number % 40)}")
            group.attrs["name"] = f"name of {number}"
            group["vars"] = np.full(2, number, np.float32)

    path = h5(fill)
    with h5py.File(path) as wanted:
        assert_same(tree(path), wanted)


def test_many_and_long_attributes(h5):
    def fill(root):
        for number in range(30):
            root.attrs[f"names{number}"] = [b"a name of some length %d" % (7 * number + piece) for piece in range(200)]

    path = h5(fill)
    with h5py.File(path) as wanted:
        assert_same(tree(path), wanted)


@pytest.mark.parametrize("options", [{"libver": "v108"}, {"libver": "latest"}, {"track_order": True}])
def test_newer_generations_are_refused_with_the_mend(h5, options):
    with pytest.raises(ValueError, match="newer than those of Keras; load the weights there and save them again"):
        tree(h5(lambda root: root.create_group("a"), **options))


def test_bfloat16_as_keras_marks_it(h5):
    def fill(root):
        root["x"] = torch.arange(5, dtype=torch.bfloat16).view(torch.int16).numpy().view("V2")
        root["x"].attrs["dtype"] = "bfloat16"

    assert read_all(tree(h5(fill)).members)["x"].tolist() == [0, 1, 2, 3, 4]


def soft(root):
    root["real"] = np.ones(3)
    root["link"] = h5py.SoftLink("/real")


def external(root):
    root["link"] = h5py.ExternalLink("other.h5", "/x")


def outside(root):
    root.create_dataset("x", (10,), "f4", external=[("/etc/passwd", 0, 40)])


def virtual(root):
    layout = h5py.VirtualLayout((4,), "f4")
    layout[:] = h5py.VirtualSource("other.h5", "x", shape=(4,))
    root.create_virtual_dataset("x", layout)


def bomb(root):
    root.create_dataset("x", (1 << 40,), "f4", chunks=(1 << 20,), compression="gzip", fillvalue=1)


def unfilled(root):
    root.create_dataset("x", (1 << 40,), "f4", fillvalue=1)


def booleans(root):
    root["x"] = np.ones(3, bool)


def circle(root):
    root.create_group("a/b")["back"] = root


@pytest.mark.parametrize(
    ("fill", "reason"),
    [
        (soft, "a link to another place"),
        (external, "a link to another file"),
        (outside, "a dataset in another file"),
        (virtual, "a dataset of virtual layout"),
        (bomb, "a dataset of chunked layout; `h5repack -f NONE -l CONTI`"),
        (unfilled, "a tensor of 1099511627776 elements in 0 bytes"),
        (booleans, "a dataset that holds no numbers"),
        (circle, "groups in groups, 32 deep"),
    ],
)
def test_what_could_read_elsewhere_or_grow_is_refused(h5, fill, reason):
    path = h5(fill)
    with pytest.raises(ValueError, match=reason):
        tree(path)


def test_a_block_of_the_user_before_the_file(h5):
    path = h5(lambda root: root.create_group("a"), userblock_size=512)
    with pytest.raises(ValueError, match="other addresses than of 64 bits"), path.open("rb") as file:
        read_tree(file, Span(path, 512, path.stat().st_size - 512))
