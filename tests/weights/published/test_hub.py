"""Downloads: whole, resumed, verified, once for all; what the hub keeps; and every way that a network can fail."""

import errno
import hashlib
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from isthmus.errors import WeightsError
from isthmus.weights.published import hub
from web_server import COMMIT

CONTENT = random.Random(0).randbytes(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def url(web):
    web.files["/some/net.pth"] = CONTENT
    return f"{web.address}/some/net.pth"


def ranges(web):
    return [wanted for method, _, wanted in web.asked if method == "GET"]


def beside(path: Path) -> set[str]:
    """Other files in the same folder, but for the locks."""
    return {other.name for other in path.parent.iterdir() if not other.name.endswith(".lock")} - {path.name}


# -- URLs ------------------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(web, url, tmp_path):
    path = hub.download(url, SHA256)
    assert path == tmp_path / "torch" / "hub" / "checkpoints" / f"net-{SHA256[:8]}.pth"
    assert path.read_bytes() == CONTENT
    assert not beside(path)
    assert hub.download(url, SHA256) == path
    assert web.count("GET") == 1


def test_names_in_the_cache_tell_files_apart(web):
    named = f"/models/net-{SHA256[:8]}.pth"
    for place in (named, "/a/net.pth", "/b/net.pth", "/c/..%2F..%2Fnet.pth", "/d/"):
        web.files[place] = CONTENT
    assert hub.download(web.address + named, SHA256[:8]).name == f"net-{SHA256[:8]}.pth"  # torch's own name
    paths = [hub.download(web.address + place) for place in ("/a/net.pth", "/b/net.pth", "/c/..%2F..%2Fnet.pth", "/d/")]
    assert len({path.name for path in paths}) == 4
    assert len({path.parent for path in paths}) == 1


def test_a_broken_connection_is_taken_up_where_it_broke(web, url):
    web.cuts = [1_000_000, 500_000]
    assert hub.download(url, SHA256).read_bytes() == CONTENT
    assert ranges(web) == ["", "bytes=1000000-", "bytes=1500000-"]


def test_what_was_downloaded_stays_for_the_next_time(web, url):
    web.cuts = [1_000_000, 0, 0]
    with pytest.raises(WeightsError, match=r"broke after 1,000,000 of 3,000,000 bytes, 3 times; load again"):
        hub.download(url, SHA256)
    path = hub.download(url, SHA256)
    assert ranges(web)[-1] == "bytes=1000000-"
    assert path.read_bytes() == CONTENT
    assert not beside(path)


def test_another_version_on_the_server_starts_afresh(web, url):
    web.cuts = [1_000_000, 0, 0]
    with pytest.raises(WeightsError, match="broke after"):
        hub.download(url)
    web.files["/some/net.pth"] = other = CONTENT[::-1]
    assert hub.download(url).read_bytes() == other


@pytest.mark.parametrize(("fact", "value"), [("ranges", False), ("tags", "none"), ("tags", "weak")])
def test_a_server_that_cannot_go_on_starts_afresh(web, url, fact, value):
    setattr(web, fact, value)
    web.cuts = [1_000_000]
    assert hub.download(url, SHA256).read_bytes() == CONTENT
    assert ranges(web) == ["", "bytes=1000000-" if fact == "ranges" else ""]


def test_a_whole_file_that_was_not_put_in_its_place(web, url):
    path = hub.download(url, SHA256)
    part = path.with_name(f"{path.name}.incomplete")
    part.with_name(f"{part.name}.etag").write_text(f'"{SHA256}"')
    path.rename(part)
    assert hub.download(url, SHA256).read_bytes() == CONTENT
    assert not beside(path)


def test_another_content_than_promised(web, url, tmp_path):
    with pytest.raises(WeightsError, match=f"sent has the sha256 {SHA256[:12]}… and must have 000000000000…; it was"):
        hub.download(url, "0" * 64)
    assert not list((tmp_path / "torch").rglob("*net*.incomplete"))
    assert not list((tmp_path / "torch").rglob("net*.pth"))


def test_a_damaged_file_in_the_cache(web, url):
    path = hub.download(url, SHA256)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match=f"in the cache has the sha256 .* must have {SHA256[:12]}…; it is damaged"):
        hub.download(url, SHA256)


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "check the address"), (401, "it wants a login"), (403, "it is not for everyone"), (503, "try again later")],
)
def test_a_server_that_refuses(web, url, status, message):
    web.errors["/some"] = (status, "")
    with pytest.raises(WeightsError, match=f"net.pth answers {status} .*; {message}"):
        hub.download(url)


def test_nobody_there(web):
    with pytest.raises(WeightsError, match=r"cannot be reached: .*refused.*; check the connection and the proxy"):
        hub.download("http://127.0.0.1:9/net.pth")


def test_only_the_web_is_downloaded_from(web):
    for address in ("ftp://example.org/net.pth", "data:,x", "file:///etc/passwd", "https://", "https://[x"):
        with pytest.raises(WeightsError, match="no address that can be downloaded"):
            hub.download(address)


def test_without_a_network(web, url, monkeypatch):
    path = hub.download(url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.download(url) == path
    with pytest.raises(WeightsError, match=r"other.pth is not in the cache, and HF_HUB_OFFLINE forbids the network"):
        hub.download(f"{web.address}/some/other.pth")
    assert web.count("GET") == 1


def test_a_full_disk(web, url, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1_000}))
        with pytest.raises(
            WeightsError, match=r"it needs 3,000,000 bytes and 1,000 are free; mend that, or .* TORCH_HOME"
        ):
            hub.download(url)
    with monkeypatch.context() as patch:
        patch.setattr(hub.os, "fsync", full)
        with pytest.raises(WeightsError, match=r"cannot keep .*: No space left on device"):
            hub.download(url)
    assert hub.download(url).read_bytes() == CONTENT


def test_a_mirror_stands_for_torchs_host_only(web):
    web.files["/models/net.pth"] = CONTENT
    assert hub.download("https://download.pytorch.org/models/net.pth", SHA256).read_bytes() == CONTENT
    for address in ("http://127.0.0.1:9/models/net.pth", "http://127.0.0.1:9/a b"):
        with pytest.raises(WeightsError, match="cannot be reached"):
            hub.download(address)


def test_many_at_once_download_once(web, url):
    web.hold.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(hub.download(url, SHA256))) for _ in range(4)]
    for thread in threads:
        thread.start()
    while not web.asked:  # the first is under way, so the others must wait for it
        threads[0].join(0.01)
    web.hold.set()
    for thread in threads:
        thread.join()
    assert [path.read_bytes() == CONTENT for path in found] == [True] * 4
    assert web.count("GET") == 1


@pytest.mark.long
def test_many_processes_at_once_download_once(web, url):
    code = f"from isthmus.weights.published import hub; print(hub.download({url!r}, {SHA256!r}))"
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate()[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [Path(path).read_bytes() for path in paths] == [CONTENT]
    assert web.count("GET") == 1


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_references():
    assert hub.Reference.parse("hf:timm/resnet50.a1_in1k") == ("timm/resnet50.a1_in1k", None, None)
    assert hub.Reference.parse("hf:a/b@v1.0/x:sub/net.pth") == ("a/b", "v1.0/x", "sub/net.pth")
    for text in ("hf:", "hf:a", "hf:a/b/c", "hf:a/b@", "hf:a/b:", "a/b"):
        with pytest.raises(WeightsError, match="is no reference to the hub; write it as hf:owner/name"):
            hub.Reference.parse(text)


def test_a_repository_is_downloaded_once(web):
    web.publish("me/net", {"config.json": b"{}", "model.safetensors": CONTENT, "pytorch_model.bin": b"other"})
    path = hub.fetch("hf:me/net")
    assert path.name == "model.safetensors"
    assert path.read_bytes() == CONTENT
    assert path.parent.name == COMMIT
    assert {file.name for file in path.parent.iterdir()} == {"config.json", "model.safetensors"}
    downloads = [path for method, path, _ in web.asked if method == "GET" and "/resolve/" in path]
    web.asked.clear()
    assert hub.fetch("hf:me/net") == path
    assert web.asked == [("HEAD", "/me/net/resolve/main/config.json", "")]  # has the branch moved?
    assert hub.fetch(f"hf:me/net@{COMMIT}") == path
    assert len(web.asked) == 1
    assert len(downloads) == 2


def test_without_a_network_the_cache_serves(web, monkeypatch):
    web.publish("me/net", {"config.json": b"{}", "model.safetensors": CONTENT})
    path = hub.fetch("hf:me/net")
    web.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.fetch("hf:me/net") == path
    with pytest.raises(WeightsError, match="hf:me/other is not in the cache, and HF_HUB_OFFLINE forbids the network"):
        hub.fetch("hf:me/other")
    assert not web.asked


def test_revisions_and_files(web):
    web.publish("me/net", {"model.safetensors": b"old", "sub/best.pth": b"best"}, revision="v1")
    assert hub.fetch("hf:me/net@v1").read_bytes() == b"old"
    assert hub.fetch("hf:me/net@v1:sub/best.pth").read_bytes() == b"best"


def test_older_weights_and_parts(web):
    web.publish("me/old", {"pytorch_model.bin": b"old"})
    assert hub.fetch("hf:me/old").name == "pytorch_model.bin"
    index = json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "1.safetensors"}}).encode()
    web.publish("me/parts", {"model.safetensors.index.json": index, "1.safetensors": b"1", "2.safetensors": b"2"})
    path = hub.fetch("hf:me/parts")
    assert {file.name: file.read_bytes() for file in path.parent.glob("?.safetensors")} == {
        "1.safetensors": b"1",
        "2.safetensors": b"2",
    }
    web.publish("me/lost", {"model.safetensors.index.json": index, "1.safetensors": b"1"})
    with pytest.raises(WeightsError, match=r"lists the shard 2.safetensors and has no such file"):
        hub.fetch("hf:me/lost")


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", "hf:me/net is not on http.*, or is private; check the name, or log in"),
        (403, "GatedRepo", "hf:me/net is gated: ask for access on its page, then log in"),
        (404, "RevisionNotFound", "hf:me/net has no revision 'v9'; name a branch, a tag or a commit"),
        (400, "", "hf:me/net@v9 is not in the cache, and http.* does not give it .Bad request"),
    ],
)
def test_a_hub_that_refuses(web, status, code, message):
    web.errors["/me/net"] = (status, code)
    with pytest.raises(WeightsError, match=message):
        hub.fetch("hf:me/net@v9" if "v9" in message else "hf:me/net")


def test_a_repository_without_weights(web):
    web.publish("me/net", {"config.json": b"{}"})
    with pytest.raises(WeightsError, match=r"hf:me/net has no model.safetensors or .* name the file: hf:me/net:FILE"):
        hub.fetch("hf:me/net")
    with pytest.raises(WeightsError, match=r"has no best.pth"):
        hub.fetch("hf:me/net:best.pth")


def test_a_hub_that_is_not_reached(web, monkeypatch):
    def unreached(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("gone")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreached)
    with pytest.raises(WeightsError, match=r"hf:me/net is not in the cache, .* give it \(no connection"):
        hub.fetch("hf:me/net")


def test_a_transport_that_breaks(web, monkeypatch):
    class TransportError(Exception):
        """As that of httpx: neither of the hub's nor of the operating system's."""

    def broken(*_, **__):
        raise TransportError("peer closed connection\nwithout a word")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(
        WeightsError, match=r"config.json of hf:me/net cannot be had: peer closed connection; try again"
    ):
        hub.fetch("hf:me/net")


def test_a_damaged_file_in_the_hubs_cache(web):
    web.publish("me/net", {"model.safetensors": CONTENT})
    path = hub.fetch("hf:me/net")
    path.resolve().write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(WeightsError, match=f"must have {SHA256[:12]}…; it is damaged: delete .*{SHA256}"):
        hub.fetch("hf:me/net")
