"""Writing shards: the same pictures come back, WebDataset reads them, and nothing that happens leaves a half one."""

import gc
import json
import signal
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from isthmus.data import shard_writer
from isthmus.data.order import permutation
from isthmus.data.pictures import Pictures
from isthmus.data.shard_index import load_index
from isthmus.data.shard_writer import write_shards
from isthmus.data.sources import open_data, open_pictures, open_sides
from isthmus.errors import DataError, RunError
from small_runs import class_folders

COUNTS = {"flower": 9, "temple": 14}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ISTHMUS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pictures(tmp_path) -> Pictures:
    return open_pictures(str(class_folders(tmp_path / "set", COUNTS, side=48)))


def shown(pictures: Pictures) -> set[tuple[bytes, str]]:
    """Each picture with its class."""
    return {(pictures.read(index), pictures.classes[pictures.labels[index]]) for index in range(len(pictures))}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_written_is_what_there_was(pictures, tmp_path):
    out = tmp_path / "out"
    (written,) = write_shards({"all": pictures}, out, per_shard=5)
    assert sorted(files(out)) == [
        *(f"all-00000{number}.tar" for number in range(5)),
        "classes.json",
        "index.safetensors",
    ]
    assert (written.shards, written.pictures, written.left_out) == (5, 23, ())
    assert written.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    found = open_pictures(str(out))
    assert found.classes == pictures.classes
    assert shown(found) == shown(pictures)
    (out / "index.safetensors").unlink()
    scanned = open_pictures(str(out))
    assert (shown(scanned), scanned.labels.tolist()) == (shown(found), found.labels.tolist())


def test_webdataset_reads_it(pictures, tmp_path):
    write_shards({"all": pictures}, tmp_path / "out", per_shard=5)
    urls = sorted(map(str, (tmp_path / "out").glob("*.tar")))
    classes = json.loads((tmp_path / "out/classes.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        read = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil"))
        gc.collect()
    wanted = {Image.open(BytesIO(inside)).convert("RGB").tobytes(): name for inside, name in shown(pictures)}
    assert {each.get("jpg", each.get("png")).tobytes(): classes[each["cls"]] for each in read} == wanted
    firsts = [classes[each["cls"]] for each in read[:10]]
    assert len(set(firsts)) == 2  # mixed


def test_resized(pictures, tmp_path):
    write_shards({"all": pictures}, tmp_path / "out", resize=32)
    small = class_folders(tmp_path / "small", {"flower": 2}, side=20)
    (tmp_path / "wide").mkdir()
    Image.open(pictures.name(0)).resize((90, 60)).save(tmp_path / "wide/a.png")
    for inside, _ in shown(open_pictures(str(tmp_path / "out"))):
        image = Image.open(BytesIO(inside))
        assert (image.size, image.format) == ((32, 32), "JPEG")
    wide = Pictures.of_files([tmp_path / "wide/a.png", *sorted((small / "flower").iterdir())], [0, 0, 0], ["a"])
    write_shards({"all": wide}, tmp_path / "other", resize=32)
    found = [inside for inside, _ in shown(open_pictures(str(tmp_path / "other")))]
    assert sorted(Image.open(BytesIO(inside)).size for inside in found) == [(20, 20), (20, 20), (48, 32)]
    assert all((small / f"flower/{name}").read_bytes() in found for name in ("0.jpg", "1.png"))


def test_unreadable_pictures_are_left_out_and_named(pictures, tmp_path):
    bad = [2, 11]
    Path(pictures.name(2)).write_bytes(b"no picture")
    whole = Path(pictures.name(11)).read_bytes()
    Path(pictures.name(11)).write_bytes(whole[: len(whole) // 2])
    (written,) = write_shards({"all": pictures}, tmp_path / "out", per_shard=5)
    first, second = written.left_out
    assert first.startswith(f"{pictures.name(2)} is not a picture")
    assert second.startswith(f"{pictures.name(11)} cannot be decoded: ")
    rest = pictures.subset([index for index in range(23) if index not in bad])
    assert shown(open_pictures(str(tmp_path / "out"))) == shown(rest)
    for index in range(23):
        Path(pictures.name(index)).write_bytes(b"")
    with pytest.raises(DataError, match=r"none of 23 pictures can be read; the first: .* is empty"):
        write_shards({"all": pictures}, tmp_path / "none", per_shard=5)


def test_a_shard_of_unreadable_pictures_alone_is_not_written(pictures, tmp_path):
    bad = permutation(23, 0, 0)[[*range(5, 10), 22]].tolist()  # the second shard of five, one of the last
    for index in bad:
        Path(pictures.name(index)).unlink()
    (written,) = write_shards({"all": pictures}, tmp_path / "out", per_shard=5)
    assert (written.shards, written.pictures) == (4, 17)
    assert {reason.partition(" cannot be read: No such file")[0] for reason in written.left_out} == {
        pictures.name(index) for index in bad
    }
    rest = pictures.subset([index for index in range(23) if index not in bad])
    assert shown(open_pictures(str(tmp_path / "out"))) == shown(rest)
    assert not list((tmp_path / "out").glob(".*"))


def test_sides_stay_apart(pictures, tmp_path):
    data = open_data(str(tmp_path / "set"))
    write_shards({"train": data.train, "val": data.val}, tmp_path / "out", per_shard=4)
    found = open_data(str(tmp_path / "out"))
    assert (shown(found.train), shown(found.val)) == (shown(data.train), shown(data.val))
    train, val = open_sides(str(tmp_path / "out"))
    assert val is not None
    assert train.classes == val.classes == pictures.classes


def test_a_side_without_pictures(pictures, tmp_path):
    with pytest.raises(DataError, match="there are no pictures for val"):
        write_shards({"train": pictures, "val": pictures.subset([])}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Stopped(Exception):
    pass


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(pictures, tmp_path, monkeypatch):
    write_shards({"all": pictures}, tmp_path / "whole", per_shard=5)
    fill = shard_writer._fill
    for shards in range(5):
        out, left = tmp_path / f"stopped{shards}", [shards]

        def stopping(path, left=left, **rest):
            if not left[0]:
                path.write_bytes(b"half")
                raise Stopped
            left[0] -= 1
            fill(path, **rest)

        monkeypatch.setattr(shard_writer, "_fill", stopping)
        with pytest.raises(Stopped):
            write_shards({"all": pictures}, out, per_shard=5)
        assert len(list(out.glob("*.tar"))) == shards
        monkeypatch.setattr(shard_writer, "_fill", fill)
        write_shards({"all": pictures}, out, per_shard=5)
        assert files(out) == files(tmp_path / "whole")


def test_killed_while_it_writes(tmp_path, monkeypatch):
    """A real process, stopped in the middle of its third shard and killed there."""
    folder, out = class_folders(tmp_path / "set", COUNTS, side=48), tmp_path / "out"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from isthmus.data import shard_writer\n"
        "from isthmus.data.sources import open_pictures\n"
        "fill, done = shard_writer._fill, []\n"
        "def filling(path, **rest):\n"
        "    fill(path, **rest)\n"
        "    done.append(path)\n"
        "    if len(done) == 3:\n"
        "        print('writing', flush=True)\n"
        "        sys.stdin.read()\n"
        "shard_writer._fill = filling\n"
        "shard_writer.write_shards({'all': open_pictures(sys.argv[1])}, Path(sys.argv[2]), per_shard=5)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert len(list(out.glob("*.tar"))) == 2
    assert len(list(out.glob(".*.tmp"))) == 1
    pictures = open_pictures(str(folder))
    write_shards({"all": pictures}, out, per_shard=5)
    write_shards({"all": pictures}, tmp_path / "whole", per_shard=5)
    assert files(out) == files(tmp_path / "whole")


def test_a_folder_of_another_job_is_left_alone(pictures, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stopping(path, **_):
        raise Stopped

    fill = shard_writer._fill
    monkeypatch.setattr(shard_writer, "_fill", stopping)
    with pytest.raises(Stopped):
        write_shards({"all": pictures}, out, per_shard=5)
    monkeypatch.setattr(shard_writer, "_fill", fill)
    for other in (
        {"per_shard": 6},
        {"per_shard": 5, "resize": 32},
        {"per_shard": 5, "sides": {"all": pictures.subset(range(22))}},
        {"per_shard": 5, "sides": {"train": pictures}},
    ):
        sides = other.pop("sides", {"all": pictures})
        with pytest.raises(DataError, match="holds the beginning of other shards"):
            write_shards(sides, out, **other)
    write_shards({"all": pictures}, out, per_shard=5)
    before = files(out)
    with pytest.raises(DataError, match="holds shards already"):
        write_shards({"all": pictures}, out, per_shard=5)
    (out / "index.safetensors").unlink()
    with pytest.raises(DataError, match="holds shards already"):
        write_shards({"all": pictures}, out, per_shard=5)
    assert {name for name in before if name.endswith("tar")} < set(files(out))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot make the folder"):
        write_shards({"all": pictures}, tmp_path / "file/out")


def test_the_index_says_where_each_picture_is(pictures, tmp_path):
    write_shards({"all": pictures}, tmp_path / "out", per_shard=5)
    index = load_index(tmp_path / "out/index.safetensors", "it")
    assert index.ends.tolist() == [5, 10, 15, 20, 23]
    whole = {name: (tmp_path / "out" / name).read_bytes() for name in index.names}
    assert index.sizes.tolist() == [len(content) for content in whole.values()]
    for place in range(23):
        number = int(index.members[place].partition(".")[0])
        content = whole[index.names[place // 5]]
        start = int(index.offsets[place])
        assert content[start : start + int(index.lengths[place])] == pictures.read(number)
        assert index.labels[place] == pictures.labels[number]
