"""Tar shards: WebDataset is the oracle in both directions, and everything that can be wrong with them is named."""

import gc
import io
import json
import os
import pickle
import tarfile
import warnings
from pathlib import Path

import braceexpand
import fsspec
import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from isthmus.arch.preprocess import IMAGENET
from isthmus.data import pictures as pictures_module
from isthmus.data import shards
from isthmus.data.loader import Batch, Loader
from isthmus.data.pictures import Pictures
from isthmus.data.shard_index import INDEX, load_index, save_index
from isthmus.data.shard_writer import write_shards
from isthmus.data.shards import expand_braces, open_shards
from isthmus.data.sources import open_data, open_pictures
from isthmus.errors import DataError
from small_runs import class_folders
from web_server import Web, serving


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shards, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(shards, "_failed", {})
    return tmp_path / "cache"


def content(number: int) -> bytes:
    return f"picture {number} ".encode() * (number % 7 + 1)


def sample(number: int) -> dict[str, object]:
    return {"__key__": f"some.where/s{number:03d}", "jpg": content(number), "cls": number % 3}


def write(folder: Path, count: int = 40, start: int = 0, name: str = "x-%06d.tar", shard: int = 0) -> Path:
    """`count` samples as WebDataset itself writes them, seven a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    with webdataset.ShardWriter(str(folder / name), maxcount=7, start_shard=shard, verbose=0) as writer:
        for number in range(start, start + count):
            writer.write(sample(number))
    return folder


def streamed(urls: list[str]) -> list[dict[str, bytes]]:
    """What WebDataset reads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        found = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
        gc.collect()
    return found


def contents(pictures: Pictures) -> list[bytes]:
    return [pictures.read(index) for index in range(len(pictures))]


def test_what_webdataset_writes_is_what_it_reads(tmp_path: Path):
    folder = write(tmp_path / "set")
    pictures = open_pictures(str(folder))
    urls = sorted(map(str, folder.glob("*.tar")))
    theirs = streamed(urls)
    assert contents(pictures) == [each["jpg"] for each in theirs]
    assert pictures.labels.tolist() == [int(each["cls"]) for each in theirs]
    assert pictures.name(39) == f"{folder}/x-000005.tar/{theirs[39]['__key__']}.jpg"
    assert pictures.classes == ("0", "1", "2")
    assert contents(pictures.subset([30, 2])) == [content(30), content(2)]
    assert contents(pickle.loads(pickle.dumps(pictures))) == contents(pictures)
    assert pictures == open_pictures(str(folder))


@pytest.mark.parametrize(
    ("fields", "listed", "classes", "label"),
    [
        ({"cls": b"2"}, None, ("2",), 0),
        ({"cls": b" 2\n"}, ["a", "b", "c"], ("a", "b", "c"), 2),
        ({"cls": b"cat"}, None, ("cat",), 0),
        ({"cls": b"b"}, ["a", "b"], ("a", "b"), 1),
        ({"json": b'{"label": 1, "cls": 0}'}, ["a", "b"], ("a", "b"), 1),
        ({"json": b'{"class_name": "b"}'}, ["a", "b"], ("a", "b"), 1),
        ({"json": b'{"label": 0}', "cls": b"1"}, ["a", "b"], ("a", "b"), 1),
        ({"JSON": b"7"}, None, ("7",), 0),
    ],
)
@pytest.mark.parametrize("kind", ["classes.txt", "classes.json"])
def test_labels(tmp_path: Path, fields, listed, classes, label, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, inside in {"._0.jpg": b"?", "__meta__.json": b"{}", "0.PNG": b"p", "0.txt": b"t"}.items():
            add(archive, name, inside)
        for end, inside in fields.items():
            add(archive, f"0.{end}", inside)
    if listed:
        text = "\n".join(listed) if kind.endswith("txt") else json.dumps(listed)
        (tmp_path / kind).write_text(text)
    found = open_shards(str(tmp_path))
    assert (found.classes, found.labels.tolist(), contents(found)) == (classes, [label], [b"p"])


def add(archive: tarfile.TarFile, name: str, inside: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(inside)
    archive.addfile(member, io.BytesIO(inside))


@pytest.mark.parametrize(
    ("names", "listed", "message"),
    [
        ([], None, "holds no pictures"),
        (["0.jpg"], None, r"sample 0 has no label \(jpg\); add 0\.cls"),
        (["0.cls"], None, r"sample 0 holds \['cls'\]; it must hold one picture"),
        (["0.jpg", "0.png", "0.cls"], None, "must hold one picture"),
        (["0.jpg", "0.jpg", "0.cls"], None, "must hold one picture"),
        (["0.jpg", "1.jpg", "0.cls", "1.cls"], None, "sample 0 has no label"),
        (["0.jpg", "0.cls"], '["a"]', "label 3 is none of the 1 classes"),
        (["0.jpg", "0.cls"], '["a", "a"]', "names a class twice"),
        (["0.jpg", "0.cls"], '{"a": 0}', "must be a list"),
        (["0.jpg", "0.cls"], "[", "classes.json cannot be read"),
    ],
)
def test_unusable_samples(tmp_path: Path, names, listed, message):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in names:
            add(archive, name, b"3")
    if listed:
        (tmp_path / "classes.json").write_text(listed)
    with pytest.raises(DataError, match=message) as raised:
        open_shards(str(tmp_path))
    assert str(tmp_path) in str(raised.value) or "classes named" in message or listed


@pytest.mark.parametrize(
    "damage", ["cut in a picture", "cut in a header", "cut at a sample", "header", "empty", "gzip"]
)
def test_a_damaged_shard_without_an_index_is_named(tmp_path: Path, damage):
    """Python's tarfile, and with it WebDataset, takes some of these for the end of a sound file."""
    folder = write(tmp_path / "set")
    path = folder / "x-000002.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as archive:
        member = archive.getmembers()[4]
    start = member.offset
    path.write_bytes(
        {
            "cut in a picture": whole[: member.offset_data + 3],
            "cut in a header": whole[: start + 100],
            "cut at a sample": whole[:start],
            "header": whole[: start + 10] + b"\xff" * 100 + whole[start + 110 :],
            "empty": b"",
            "gzip": b"\x1f\x8b" + whole,
        }[damage]
    )
    with pytest.raises(DataError, match=r"x-000002\.tar is damaged: .*copy it again"):
        open_data(str(folder))


def test_sides_by_the_names_of_shards(tmp_path: Path):
    write(tmp_path / "flat", 12, 0, "imagenet-train-%04d.tar")
    write(tmp_path / "flat", 9, 100, "imagenet-validation-%04d.tar")
    write(tmp_path / "flat", 9, 200, "imagenet-test-%04d.tar")
    for folder, name in (("train", "train"), ("val", "validation")):
        (tmp_path / "deep" / folder).mkdir(parents=True)
        for path in (tmp_path / "flat").glob(f"*{name}*"):
            (tmp_path / "deep" / folder / path.name[-8:]).write_bytes(path.read_bytes())
    names = str(tmp_path / "flat/imagenet-{train-{0000..0001},validation-{0000..0001}}.tar")
    for ref in (tmp_path / "flat", tmp_path / "deep", names):
        data = open_data(str(ref))
        assert contents(data.train) == [content(number) for number in range(12)], ref
        assert contents(data.val) == [content(number) for number in range(100, 109)]
    whole = open_data(str(tmp_path / "flat/imagenet-train-*.tar"), val_fraction=0.5)
    assert (len(whole.train), len(whole.val)) == (6, 6)


def test_an_index_is_kept_until_a_shard_changes(tmp_path: Path, monkeypatch):
    folder = write(tmp_path / "set")
    scans: list[Path] = []
    scan = shards.scan
    monkeypatch.setattr(shards, "scan", lambda path, shown, **how: (scans.append(path), scan(path, shown, **how))[1])
    first, second = open_shards(str(folder)), open_shards(str(folder))
    assert len(scans) == 6
    assert first == second
    write(folder, 5, 70, shard=5)  # the last shard had five samples too
    os.utime(folder / "x-000005.tar", (1, 1))
    changed = open_shards(str(folder))
    assert len(scans) == 12
    assert changed.read(39) == content(74)
    assert changed.identity(39) != first.identity(38)
    (folder / "classes.txt").write_text("a\nb\nc\n")
    assert open_shards(str(folder)).classes == ("a", "b", "c")


@pytest.fixture
def indexed(tmp_path: Path) -> Path:
    """Shards with their index beside them."""
    folder = write(tmp_path / "set")
    (tmp_path / "cache").mkdir(exist_ok=True)
    open_shards(str(folder))
    (kept,) = (tmp_path / "cache/shards").glob("*.index")
    kept.rename(folder / INDEX)
    return folder


def test_a_shard_that_its_index_does_not_know_as_it_is(indexed: Path):
    """Its pictures are unreadable, each with the reason; those of the other shards are not."""
    path = indexed / "x-000001.tar"
    path.write_bytes(path.read_bytes()[:-1])
    (indexed / "x-000002.tar").unlink()
    pictures = open_shards(str(indexed))
    for index in range(len(pictures)):
        if 7 <= index < 14:
            with pytest.raises(DataError, match=r"x-000001\.tar has .* bytes and its index says"):
                pictures.read(index)
        elif 14 <= index < 21:
            with pytest.raises(DataError, match=r"x-000002\.tar cannot be read: No such file"):
                pictures.read(index)
        else:
            assert pictures.read(index) == content(index)
    assert pictures.identity(15) != pictures.identity(16)  # the key of a cache does not need them to be there


def test_a_shard_that_its_index_lacks(indexed: Path):
    write(indexed, 3, 50, "more-%d.tar")
    with pytest.raises(DataError, match=r"more-0\.tar is not in .*index\.safetensors; remove it"):
        open_shards(str(indexed))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("offsets", lambda found: found.offsets + 10**9),
        ("offsets", lambda found: -found.offsets),
        ("lengths", lambda found: found.lengths[1:]),
        ("labels", lambda found: found.labels + 1),
        ("labels", lambda found: found.labels.astype(np.float64)),
        ("ends", lambda found: found.ends[::-1].copy()),
        ("ends", lambda found: found.ends + 1),
        ("sizes", lambda found: found.sizes[1:]),
        ("names", lambda found: found.names[1:]),
    ],
)
def test_an_index_that_contradicts_itself(indexed: Path, name, change):
    index = load_index(indexed / INDEX, "it")
    save_index(indexed / INDEX, index._replace(**{name: change(index)}))
    with pytest.raises(DataError, match=r"index\.safetensors contradicts itself"):
        open_shards(str(indexed))


def test_a_damaged_index(indexed: Path):
    path = indexed / INDEX
    whole = path.read_bytes()
    for damaged in (b"", b"no index", whole[:-9], whole.replace(b"isthmus shards", b"isthmus shirts")):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"index\.safetensors"):
            open_shards(str(indexed))


@given(
    st.from_regex(r"[a-z]{0,2}(\{[0-9]{1,2}\.\.[0-9]{1,2}\}|\{[a-z]{1,2}(,[a-z]{1,2}){1,2}\}|-){0,3}", fullmatch=True)
)
def test_braces_expand_as_in_a_shell(pattern):
    assert expand_braces(pattern) == list(braceexpand.braceexpand(pattern))


def test_what_is_no_pattern_and_what_names_nothing(tmp_path: Path):
    with pytest.raises(DataError, match=r"\{a\} is no pattern"):
        open_shards("/data/{a}.tar")
    with pytest.raises(DataError, match=r"names no \.tar shards"):
        open_shards(str(tmp_path))
    folder = write(tmp_path / "set")
    with pytest.raises(DataError, match=r"x-000006\.tar is not there"):
        open_shards(f"{folder}/x-{{000000..000006}}.tar")
    with pytest.raises(DataError, match="Protocol not known: nowhere"):
        open_data("nowhere://bucket/x.tar")


def test_any_file_system(tmp_path: Path):
    folder = write(tmp_path / "set")
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/bucket/{path.name}", path.read_bytes())
    wanted = [content(number) for number in range(40)]
    for ref in ("memory://bucket", "memory://bucket/*.tar", "memory://bucket/x-{000000..000005}.tar"):
        pictures = open_shards(ref)
        assert contents(pictures) == wanted
        assert pictures.name(0) == "memory:///bucket/x-000000.tar/some.where/s000.jpg"
    assert contents(open_shards(f"file://{folder}")) == wanted
    assert open_shards(f"file://{folder}") == open_shards(str(folder))


@pytest.fixture
def web(indexed: Path):
    with serving() as web:
        web.files = {f"/set/{path.name}": path.read_bytes() for path in indexed.iterdir()}
        yield web


def test_over_http(web: Web):
    pictures = open_shards(f"{web.address}/set")
    assert contents(pictures) == [content(number) for number in range(40)]
    gets = [path for method, path, _ in web.asked if method == "GET" and path.endswith(".tar")]
    assert sorted(gets) == [f"/set/x-00000{number}.tar" for number in range(6)]
    again = open_shards(f"{web.address}/set")
    asked = len(web.asked)
    assert contents(again) == contents(pictures)
    assert len(web.asked) == asked
    del web.files["/set/index.safetensors"]
    with pytest.raises(DataError, match=r"where files cannot be listed, name them: \.\.\./train-\{000\.\.123\}\.tar"):
        open_shards(f"{web.address}/set")
    without = open_shards(f"{web.address}/set/x-{{000000..000005}}.tar")
    assert (contents(without), without.labels.tolist()) == (contents(pictures), pictures.labels.tolist())


def test_a_connection_that_breaks_is_tried_again_and_then_named(web: Web, monkeypatch):
    pictures = open_shards(f"{web.address}/set")
    web.cuts = [1000, 0]
    assert pictures.read(0) == content(0)
    web.cuts = [1000] * 3
    with pytest.raises(DataError, match=r"http://127.*x-000001\.tar could not be brought in 3 tries"):
        pictures.read(7)
    assert not web.cuts
    asked = web.count("GET")
    with pytest.raises(DataError, match="3 tries"):  # at once: the other pictures of the shard do not wait again
        pictures.read(8)
    assert web.count("GET") == asked
    monkeypatch.setattr(shards, "GIVEN_UP", 0.0)
    assert pictures.read(8) == content(8)


def test_a_remote_shard_that_is_gone_or_shorter(web: Web):
    pictures = open_shards(f"{web.address}/set")
    del web.files["/set/x-000001.tar"]
    with pytest.raises(DataError, match=r"x-000001\.tar is not there"):
        pictures.read(7)
    web.files["/set/x-000002.tar"] = web.files["/set/x-000002.tar"][:-512]
    with pytest.raises(DataError, match=r"x-000002\.tar could not be brought in 3 tries: [\d,]+ of [\d,]+ bytes came"):
        pictures.read(14)
    assert pictures.read(0) == content(0)


def test_the_cache_of_remote_shards_keeps_to_its_budget(web: Web, cache: Path, monkeypatch):
    pictures = open_shards(f"{web.address}/set")
    size = len(web.files["/set/x-000000.tar"])
    monkeypatch.setenv("ISTHMUS_CACHE_GB", str(2.5 * size / 1e9))
    (cache / "shards").mkdir(exist_ok=True)
    for path in (cache / "shards").iterdir():
        path.unlink()
    assert contents(pictures) == [content(number) for number in range(40)]
    assert len(list((cache / "shards").glob("[!.]*.tar"))) <= 2
    monkeypatch.setenv("ISTHMUS_CACHE_GB", "0.000001")
    with pytest.raises(DataError, match=r"x-000000\.tar has [\d,]+ bytes and the cache may take 1,000"):
        pictures.read(0)


def test_remote_pictures_are_read_shard_by_shard_and_brought_ahead(web: Web, monkeypatch):
    monkeypatch.setattr(pictures_module, "WINDOW", 14)
    pictures = open_shards(f"{web.address}/set")
    order = pictures.shuffled(0, 0)
    assert sorted(order.tolist()) == list(range(40))
    assert len({index // 7 for index in order[:14].tolist()}) <= 3
    assert not np.array_equal(order, pictures.shuffled(0, 1))
    assert [pictures.read(index) for index in order[:3]] == [content(index) for index in order[:3].tolist()]
    before = web.count("GET")
    pictures.expect(order)
    for thread in [each for each in shards.threading.enumerate() if each.name == "isthmus-shards"]:
        thread.join()
    asked = web.count("GET")
    assert asked > before
    assert contents(pictures) == [content(number) for number in range(40)]
    assert web.count("GET") == asked


def test_local_pictures_come_in_any_order(indexed: Path):
    pictures = open_shards(str(indexed))
    assert np.array_equal(pictures.shuffled(3, 2), Pictures.unlabelled(map(str, range(40))).shuffled(3, 2))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Eight real pictures in shards of two, with their index."""
    pictures = open_pictures(str(class_folders(tmp_path / "pictures", {"flower": 4, "temple": 4})))
    write_shards({"all": pictures}, tmp_path / "photographs", per_shard=2)
    return tmp_path / "photographs"


def batches(pictures: Pictures, **options) -> tuple[Loader, list[Batch]]:
    defaults = {"record": IMAGENET.at(32), "batch_size": 3, "train": False, "threads": 2}
    loader = Loader(pictures=pictures, **{**defaults, **options})
    return loader, list(loader.epoch(0))


def test_batches_from_shards_are_those_from_files(photographs: Path):
    stored = open_pictures(str(photographs))
    order = [int(stored.name(index).rpartition("/")[2].partition(".")[0]) for index in range(8)]
    files = open_pictures(str(photographs.parent / "pictures")).subset(order)
    for one, other in zip(batches(stored)[1], batches(files)[1], strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("damage", ["cut", "gone", "a picture"])
def test_a_corrupt_shard_stops_the_loader_or_is_skipped_with_its_name(photographs: Path, damage):
    path = photographs / "all-000001.tar"
    whole = path.read_bytes()
    bad = [2, 3]
    if damage == "gone":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(whole[:2000])
    else:  # the content of one picture, and nothing else
        bad = [3]
        start = int(open_pictures(str(photographs)).identity(3)[3])
        path.write_bytes(whole[:start] + bytes(200) + whole[start + 200 :])
    pictures = open_pictures(str(photographs))
    with pytest.raises(DataError, match=r"all-000001\.tar"):
        batches(pictures)
    loader, kept = batches(pictures, on_error="skip")
    assert torch.cat([batch.indices for batch in kept]).tolist() == [index for index in range(8) if index not in bad]
    assert sorted(loader.unreadable) == bad
    assert all("all-000001.tar" in reason for reason in loader.unreadable.values())
    trained = batches(pictures, on_error="skip", train=True, batch_size=4)[1]
    assert [len(batch.indices) for batch in trained] == [4, 4]
