"""A folder as the Hugging Face hub keeps a model: config, preprocessing, weights and a model card."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.atomic import atomic_write
from isthmus.errors import RunError, WeightsError
from isthmus.messages import first_line, listed
from isthmus.nn.network import ResNet
from isthmus.weights import files
from isthmus.weights.layouts import LAYOUTS
from isthmus.weights.published.hf import to_config, to_preprocessor
from isthmus.weights.published.hub import CONFIG, PREPROCESSOR

__all__ = ["push", "write_folder"]

MODEL, CARD = "model.safetensors", "README.md"


def write_folder(
    net: ResNet, folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], extra: Mapping[str, Any]
) -> None:
    """Write what `transformers` loads: `config.json`, `preprocessor_config.json`, `model.safetensors`, `README.md`.

    Raises WeightsError, with nothing written, when `transformers` has no name for a setting; RunError for the disk.
    """
    # Tensors in its layout are for the one epsilon that transformers has.
    spec = replace(net.spec, norm_eps=LAYOUTS["transformers"].norm_eps or net.spec.norm_eps)
    texts = {
        CONFIG: json.dumps(to_config(spec, net.classes), indent=2) + "\n",
        PREPROCESSOR: json.dumps(to_preprocessor(net.preprocess), indent=2) + "\n",
        CARD: model_card(net, folder.resolve().name, extra),
    }
    if other := sorted({file.name for file in folder.glob("[!.]*")} - {*texts, MODEL}):
        raise WeightsError(
            f"{folder} holds other files ({listed(other, 3)}), so nothing was written; name a new folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}") from error
    files.write(folder / MODEL, tensors, metadata)
    for name, text in texts.items():
        atomic_write(folder / name, _writer(text))


def push(folder: Path, repo: str) -> str:
    """Put a folder on the hub as `owner/repo`, made if it is not there; its address. Raises WeightsError.

    Who may write is decided by the token that `hf auth login` or HF_TOKEN left; HF_ENDPOINT names another hub.
    """
    if not folder.is_dir():
        raise WeightsError(
            f"{folder} is no folder as the hub keeps it; write one: --to transformers, a name without ending"
        )
    from huggingface_hub import HfApi

    check_repo(repo)
    api = HfApi(library_name="isthmus", library_version=version("isthmus"))
    try:
        address = api.create_repo(repo, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Weights written by isthmus",
            allow_patterns=[CONFIG, PREPROCESSOR, MODEL, CARD],  # and nothing else that lies there
        )
    except Exception as error:  # the client lets errors of its own transport through: httpx, requests, xet
        raise WeightsError(
            f"{repo} could not be pushed ({first_line(error)}); check the connection, log in with `hf auth login`, and "
            f"check that the token may write there. The folder {folder} is complete"
        ) from error
    return str(address)


def check_repo(repo: str) -> None:
    """Raise WeightsError for what is no name of a hub repository."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repo, flags=re.ASCII) is None:
        raise WeightsError(f"{repo!r} is no name of a hub repository; write it as owner/name")


def model_card(net: ResNet, name: str, extra: Mapping[str, Any]) -> str:
    """The README of a model: front matter that the hub reads, what it is, how it was made, how it is used.

    From `extra` it takes `licence` (SPDX), `source`, `recipe`, `assumed` (a list), and `metrics` (names and numbers).
    """
    given = extra.get("metrics")
    metrics = given if isinstance(given, Mapping) else {}
    front = {
        "license": str(extra["licence"]).lower() if extra.get("licence") else "",
        "library_name": "transformers",
        "pipeline_tag": "image-classification" if net.spec.num_classes else "image-feature-extraction",
        "tags": ["resnet", "isthmus"],
        "metrics": ["accuracy"] if metrics else [],
    }
    parts = [
        "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value), "---"]),
        f"# {name}",
        _what(net),
        _origin(extra),
        _results(metrics),
        f"## Preprocessing\n\nPictures: {net.preprocess}.",
        f"## Use\n\n{_usage(net, name)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what(net: ResNet) -> str:
    crop = net.preprocess.crop
    found = cost(plan(net.spec, crop))
    many = f"{net.spec.num_classes} classes" if net.spec.num_classes else "pooled features"
    lines = [
        f"A residual network{f' ({net.spec.name})' if net.spec.name else ''}: pictures of {crop}×{crop} px to {many}.",
        f"{found.params:,} parameters, {found.macs / 1e9:.3f} GMACs a picture.",
        *([f"Classes: {listed(net.classes, 10)}."] if net.classes else []),
    ]
    return "\n".join(lines)


def _origin(extra: Mapping[str, Any]) -> str:
    assumed = [str(what) for what in extra["assumed"]] if isinstance(extra.get("assumed"), list) else []
    said = [
        f"- weights from: {extra['source']}" if extra.get("source") else "",
        f"- licence of the weights: {extra['licence']}" if extra.get("licence") else "",
        f"- made by: {extra['recipe']}" if extra.get("recipe") else "",
        f"- assumed, as their source did not say: {', '.join(assumed)}" if assumed else "",
        f"- written by isthmus {version('isthmus')}; the metadata of `model.safetensors` has all of this",
    ]
    return "## How it was made\n\n" + "\n".join(line for line in said if line)


def _results(metrics: Mapping[str, Any]) -> str:
    if not metrics:
        return ""
    rows = [f"| {name} | {value:g} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in
            metrics.items()]  # fmt: skip
    return "## Results\n\n| metric | value |\n|---|---|\n" + "\n".join(rows)


def _usage(net: ResNet, name: str) -> str:
    task = "image-classification" if net.spec.num_classes else "image-feature-extraction"
    return (
        f"```python\nfrom transformers import pipeline\n\n"
        f'print(pipeline("{task}", model="{name}")("picture.jpg"))\n```\n\n'
        f"```sh\nisthmus predict {name} picture.jpg  # on the hub: hf:owner/{name}\n```"
    )


def _writer(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text, encoding="utf-8")
