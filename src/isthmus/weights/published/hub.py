"""Weight files from the network: URLs into torch's cache, repositories of the Hugging Face hub into that library's.

What is in a cache is used as it is, checked by its hash, without a network. Nothing is asked of the network where
HF_HUB_OFFLINE is 1. HF_ENDPOINT names another hub, and ISTHMUS_TORCH_MIRROR another place of the files under
https://download.pytorch.org; TORCH_HOME and HF_HOME move the caches, and proxies are those of the environment.
"""

import hashlib
import json
import os
import re
import shutil
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

from isthmus.errors import WeightsError
from isthmus.messages import first_line

__all__ = ["CONFIG", "PREFIX", "PREPROCESSOR", "WEIGHTS", "Reference", "download", "fetch", "sha256"]

PREFIX = "hf:"
TORCH_HOST = "https://download.pytorch.org/"
MIRROR = "ISTHMUS_TORCH_MIRROR"
CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
# The first that is there.
WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
CHUNK = 1 << 20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 3  # a cut connection is taken up again where it broke
REFERENCE = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./ -]+))?", flags=re.ASCII)
FORBIDDEN = {401: "it wants a login", 403: "it is not for everyone", 404: "check the address", 410: "it was removed"}


def sha256(path: Path) -> str:
    """The hash of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download(url: str, wanted: str = "") -> Path:
    """The file at an http or https URL, in torch's cache under a name that tells it from all others.

    `wanted` is the sha256 of its content or the beginning of that. A broken download goes on where it stopped, also in
    another process; two processes bring a file once. Raises WeightsError.
    """
    import torch.hub
    from filelock import FileLock

    if not re.match(r"https?://[^/?#\[\]]", url):
        raise WeightsError(f"{url} is no address that can be downloaded; give one of https, or a path")
    target = Path(torch.hub.get_dir()) / "checkpoints" / _file_name(url, wanted)
    if target.is_file():
        if wanted and not (found := sha256(target)).startswith(wanted):
            raise WeightsError(
                f"{target} in the cache has the sha256 {found[:12]}… and must have {wanted[:12]}…; it is damaged: "
                f"delete it and load again"
            )
        return target
    _must_be_online(url)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if not target.is_file():  # another process may have brought it meanwhile
                _bring(url, target, wanted)
    except OSError as error:
        raise WeightsError(
            f"cannot keep {url} in {target.parent}: {error.strerror or error}; mend that, or name another folder in "
            f"TORCH_HOME. What was downloaded stays"
        ) from error
    return target


def _file_name(url: str, wanted: str) -> str:
    """The name in torch's way where it carries the hash; else with a hash of the content or the address."""
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(unquote(urlsplit(url).path)).name) or "weights"
    if wanted and wanted[:8] in name:
        return name
    path = PurePosixPath(name)
    return f"{path.stem}-{wanted[:8] or 'url' + hashlib.sha256(url.encode()).hexdigest()[:8]}{path.suffix}"


def _must_be_online(what: str) -> None:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise WeightsError(
            f"{what} is not in the cache, and HF_HUB_OFFLINE forbids the network; load it once without, or give the "
            f"path of a copy"
        )


def _bring(url: str, target: Path, wanted: str) -> None:
    """Download to a partial file beside `target`, check it, and put it in place; raises WeightsError or OSError."""
    address = url
    if (mirror := os.environ.get(MIRROR)) and url.startswith(TORCH_HOST):
        address = f"{mirror.rstrip('/')}/{url.removeprefix(TORCH_HOST)}"
    part = target.with_name(f"{target.name}.incomplete")
    for _ in range(ATTEMPTS):
        size = _go_on(address, part)
        if size is None or part.stat().st_size == size:
            break
    else:
        raise WeightsError(
            f"the connection to {address} broke after {part.stat().st_size:,} of {size:,} bytes, {ATTEMPTS} times; "
            f"load again: it goes on there"
        )
    if wanted and not (found := sha256(part)).startswith(wanted):
        part.unlink()
        raise WeightsError(
            f"what {address} sent has the sha256 {found[:12]}… and must have {wanted[:12]}…; it was removed. Load "
            f"again; if it stays so, the file was changed or something between here and there changes it"
        )
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    _mark(part).unlink(missing_ok=True)


def _mark(part: Path) -> Path:
    """Where the version that a partial file is of is kept: a server sends the rest only of the same."""
    return part.with_name(f"{part.name}.etag")


def _go_on(address: str, part: Path) -> int | None:
    """Append what is missing of a partial file; how many bytes the whole has, None where the server does not say.

    Stops early where the connection breaks.
    """
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    mark = _mark(part)
    start = part.stat().st_size if part.is_file() and mark.is_file() else 0
    headers = {"User-Agent": "isthmus", "Accept-Encoding": "identity"}
    if start:
        headers |= {"Range": f"bytes={start}-", "If-Range": mark.read_text(encoding="utf-8")}
    with _answer(Request(address, headers=headers), part) as answer:  # noqa: S310 - the scheme was checked
        if answer.status != 206 or not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            start = 0
        length = answer.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        if total is not None and total - start > (free := shutil.disk_usage(part.parent).free):
            raise OSError(f"it needs {total - start:,} bytes and {free:,} are free")
        tag = answer.headers.get("ETag", "")
        if tag.startswith('"'):  # weak ones do not promise equal bytes
            mark.write_text(tag, encoding="utf-8")
        else:
            mark.unlink(missing_ok=True)
        name = part.name.removesuffix(".incomplete")
        with (
            part.open("ab" if start else "wb") as file,
            tqdm(desc=name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,  # type: ignore[no-untyped-call]
        ):
            while chunk := _read(answer, address, known=total is not None):
                file.write(chunk)
                bar.update(len(chunk))
    return total


def _answer(request: Request, part: Path) -> HTTPResponse:
    try:
        answer: HTTPResponse = urlopen(request, timeout=TIMEOUT)  # noqa: S310 - the scheme was checked
    except HTTPError as error:
        error.close()
        if error.code == 416:  # the partial file is longer than the whole, or is the whole
            part.unlink()
            return _answer(Request(request.full_url), part)  # noqa: S310
        mend = FORBIDDEN.get(error.code, "try again later")
        raise WeightsError(f"{request.full_url} answers {error.code} {error.reason}; {mend}") from error
    except (OSError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        raise WeightsError(
            f"{request.full_url} cannot be reached: {reason or type(error).__name__}; check the connection and the "
            f"proxy, or give the path of a copy"
        ) from error
    return answer


def _read(answer: HTTPResponse, address: str, *, known: bool) -> bytes:
    """The next bytes; none at the end, and none where the connection breaks and the size is `known` to show it."""
    try:
        return answer.read(CHUNK)
    except (OSError, HTTPException) as error:
        if known:
            return b""
        raise WeightsError(f"the connection to {address} broke ({error}); load again") from error


class Reference(NamedTuple):
    """A repository of the Hugging Face hub: `hf:owner/name[@revision][:file]`."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """The reference that a text is; raises WeightsError."""
        found = REFERENCE.fullmatch(text)
        if found is None:
            raise WeightsError(
                f"{text!r} is no reference to the hub; write it as hf:owner/name, hf:owner/name@revision or "
                f"hf:owner/name:file.safetensors"
            )
        return cls(found["repo"], found["revision"], found["file"])


def fetch(text: str) -> Path:
    """The weight file of a hub reference, with the config files and shards that belong to it in the same folder.

    A revision that is a commit is asked for once and never again; a branch is looked up each time. Raises WeightsError.
    """
    repo, revision, file = Reference.parse(text)
    for name in (CONFIG, PREPROCESSOR):
        if (path := _hub_file(repo, name, revision)) is not None:
            revision = path.parent.name  # the commit: all files are of one
    names = (file,) if file else WEIGHTS
    for name in names:
        if (path := _hub_file(repo, name, revision)) is not None:
            break
    else:
        _must_be_online(text)
        raise WeightsError(f"{text} has no {' or '.join(names)}; name the file: hf:{repo}:FILE, as its page lists it")
    if name.endswith(".index.json"):
        place = PurePosixPath(name)
        commit = path.parents[len(place.parts) - 1].name
        for shard in _shards(path):
            if _hub_file(repo, str(place.parent / shard), commit) is None:
                raise WeightsError(f"{text} lists the shard {shard} and has no such file; tell its owner")
    return path


def _shards(index: Path) -> list[str]:
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        return sorted({str(shard) for shard in content["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{index} lists no shards: {error}; download it again") from error


def _hub_file(repo: str, name: str, revision: str | None) -> Path | None:
    """A file of a repository in the hub's cache, its hash checked where the hub names one; None if there is none."""
    from huggingface_hub import _CACHED_NO_EXIST, constants, errors, hf_hub_download, try_to_load_from_cache

    commit = revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision)
    cached: Any = try_to_load_from_cache(repo, name, revision=revision)
    if cached is _CACHED_NO_EXIST and (commit or constants.HF_HUB_OFFLINE):
        return None
    what = f"hf:{repo}{f'@{revision}' if revision else ''}"
    try:
        path = Path(hf_hub_download(repo, name, revision=revision, library_name="isthmus"))
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            return None  # what is wanted in any case is missed by the caller
        raise WeightsError(
            f"{what} is not in the cache, and {constants.ENDPOINT} does not give it ({_reason(error.__cause__)}); "
            f"check the connection, the proxy and HF_ENDPOINT, or give the path of a copy"
        ) from error
    except errors.EntryNotFoundError:
        return None
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"{what} is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"{what} is not on {constants.ENDPOINT}, or is private; check the name, or log in with `hf auth login` or "
            f"set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"hf:{repo} has no revision {revision!r}; name a branch, a tag or a commit of it") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{what} cannot be a repository: {error}") from error
    except Exception as error:  # the client lets errors of its own transport through: httpx, requests, xet
        raise WeightsError(f"{name} of {what} cannot be had: {_reason(error)}; try again") from error
    _check_blob(path)
    return path


def _reason(error: BaseException | None) -> str:
    return first_line(error) if error is not None and str(error) else "no connection"


def _check_blob(path: Path) -> None:
    """Raise WeightsError unless a large file has the hash that it is kept under; small ones have none that is known."""
    blob = Path(path.readlink()).name if path.is_symlink() else ""
    if re.fullmatch(r"[0-9a-f]{64}", blob) and (found := sha256(path)) != blob:
        raise WeightsError(
            f"{path} in the cache has the sha256 {found[:12]}… and must have {blob[:12]}…; it is damaged: delete "
            f"{path.resolve()} and load again"
        )
