"""Small weight files of every kind that we read, made by their own libraries, or here where these no longer can."""

import io
import json
import pickle
import struct
import tarfile
from collections.abc import Mapping
from pathlib import Path

import h5py
import torch
from safetensors.torch import save_file
from torch import Tensor

STORAGES = {torch.float32: "FloatStorage", torch.int64: "LongStorage", torch.float16: "HalfStorage"}


def tensors() -> dict[str, Tensor]:
    """What each of the files holds."""
    random = torch.Generator().manual_seed(0)
    return {
        "conv1.weight": torch.randn(4, 3, 3, 3, generator=random),
        "bn1.running_var": torch.rand(4, generator=random),
        "fc.weight": torch.randn(5, 4, generator=random),
        "fc.bias": torch.randn(5, generator=random),
    }


def write_tar(path: Path, content: Mapping[str, Tensor]) -> None:
    """The container of torch before 0.1.10: a tar archive of storages, tensors, and a pickle that refers to them."""

    class StorageType:
        """Pickled by the name of torch's class."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __reduce__(self) -> str:
            return self.name

    class Pickler(pickle._Pickler):  # the one in Python, which lets a global be written by its name
        def save_global(self, obj: object, name: str | None = None) -> None:
            self.write(f"ctorch\n{name}\n".encode())

        def persistent_id(self, obj: object) -> str | None:
            return str(keys[id(obj)]) if isinstance(obj, Tensor) else None

    def pickled(value: object) -> bytes:
        out = io.BytesIO()
        Pickler(out, protocol=2).dump(value)
        return out.getvalue()

    keys = {id(tensor): 1000 + number for number, tensor in enumerate(content.values())}
    storages, described = pickled(len(content)), pickled(len(content))
    for key, tensor in zip(keys.values(), content.values(), strict=True):
        name = STORAGES[tensor.dtype]
        storages += pickled((key + 5000, "cpu", StorageType(name)))
        storages += struct.pack("<q", tensor.numel()) + tensor.numpy().tobytes()
        described += pickled((key, key + 5000, StorageType(name.replace("Storage", "Tensor"))))
        described += struct.pack("<i4x", tensor.ndim)
        described += struct.pack(f"<{2 * tensor.ndim + 1}q", *tensor.shape, *tensor.stride(), 0)
    storages += pickled([])
    members = {"sys_info": pickled({}), "pickle": pickled(dict(content)), "tensors": described, "storages": storages}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 0.5  # a time with a fraction takes an extended header, as it did then
            archive.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, content: Mapping[str, Tensor]) -> Path:
    """Two .safetensors files and their index, as transformers writes them; the index's path."""
    names = list(content)
    places = {name: f"model-0000{1 + (number % 2)}-of-00002.safetensors" for number, name in enumerate(names)}
    for place in sorted(set(places.values())):
        save_file({name: content[name] for name in names if places[name] == place}, folder / place, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=1), encoding="utf-8")
    return index


def keras_tensors() -> dict[str, Tensor]:
    """Of a Keras network: one convolution, one norm, one classifier."""
    random = torch.Generator().manual_seed(0)
    shapes = {"conv/kernel": (3, 3, 3, 4), "conv/bias": (4,)}
    shapes |= {f"norm/{name}": (4,) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    shapes |= {"dense/kernel": (4, 5), "dense/bias": (5,)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def write_keras3(path: Path | io.BytesIO, content: Mapping[str, Tensor]) -> None:
    """The layout of `.weights.h5`: groups named by classes, variables by numbers, layers by an attribute."""
    classes = {"conv": "conv2d", "norm": "batch_normalization", "dense": "dense"}
    with h5py.File(path, "w") as file:
        for name, tensor in content.items():
            layer = name.split("/")[0]
            group = file.require_group(f"layers/{classes[layer]}/vars")
            group.attrs["name"] = layer
            group[str(len(group))] = tensor.numpy()


def write_arrays(path: Path, content: Mapping[str, Tensor], protocol: int) -> None:
    """What detectron2 writes: NumPy arrays in a pickle."""
    arrays = {name: tensor.numpy() for name, tensor in content.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}, protocol))
