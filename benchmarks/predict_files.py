"""Claim: from picture files to predictions at the speed of the engine, several times that of the usual tools.

ResNet-50 over 5,120 JPEG files of about 500 x 375: a table by the pipeline of `isthmus predict` in fp32, bf16 and int8,
Hugging Face's image-classification pipeline and timm's transform with an eager loop on the same weights, and the engine
alone on images in memory. Ten rounds, each on files that no other round reads; nobody's start counts.

python benchmarks/predict_files.py [--pictures 5120] [--rounds 10]
"""

import argparse
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import repeat
from pathlib import Path

import timm
import torch
import transformers
from PIL import Image
from torch.utils.data import Dataset

import isthmus
from isthmus.data.pictures import Pictures
from isthmus.deploy.answers import FILES, Wanted
from isthmus.deploy.engines import Model
from isthmus.deploy.predict import PART, Order, Pace, answered
from isthmus.deploy.predictor import BATCH
from isthmus.deploy.quantize import to_be_timed
from measure import interleaved, ratios, spread, write_result
from photographs import write_photographs

PRECISIONS = ("fp32", "bf16", "int8")
TARGETS = {"fp32": 1.6, "bf16": 3.2, "int8": 5.8}
Round = Callable[[list[str]], object]


def ours(order: Order, folder: Path) -> Round:
    """Every row of the table on the disk."""
    reader = order.reader()

    def run(files: list[str]) -> None:
        part = replace(order, pictures=Pictures.unlabelled(files))
        for answers in answered(part, reader, range(part.parts), Pace()):
            (folder / "part.csv").write_bytes(FILES[".csv"].encode(order.wanted.table(answers)))

    return run


def alone(order: Order) -> Round:
    """The engine on as many images, which lie in memory."""
    reader = order.reader()
    images = torch.randn(BATCH, 3, 224, 224)
    return lambda files: deque(reader.stream(repeat(images, -(-len(files) // BATCH))), maxlen=0)


def hugging_face(net: isthmus.ResNet, folder: Path, some: list[str]) -> Round:
    """The pipeline as its documentation has it, in batches, with a process that decodes or without: the faster one."""
    isthmus.save_weights(net, folder / "hf", layout="transformers")
    made = transformers.pipeline("image-classification", model=str(folder / "hf"), device="cpu")

    def by(workers: int) -> Round:
        given = {"batch_size": BATCH, "top_k": 5, "num_workers": workers}
        return lambda files: deque(made((file for file in files), **given), maxlen=0)

    ways = {workers: by(workers) for workers in (0, 1)}
    times = interleaved({str(workers): partial(way, some) for workers, way in ways.items()}, runs=1)
    return ways[int(min(times, key=times.__getitem__))]


class Files(Dataset):
    """Picture files for timm's loader."""

    def __init__(self, files: list[str], transform: Callable) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.transform(Image.open(self.files[index]).convert("RGB")), 0


def by_timm(net: isthmus.ResNet, folder: Path) -> Round:
    """Its transform, its network in channels_last, an eager loop; two processes of torch's DataLoader decode."""
    isthmus.save_weights(net, folder / "timm.safetensors", layout="timm")
    model = timm.create_model("resnet50", checkpoint_path=str(folder / "timm.safetensors")).eval()
    model = model.to(memory_format=torch.channels_last)
    config = timm.data.resolve_data_config({"crop_pct": 224 / 256, "interpolation": "bilinear"}, model=model)
    transform = timm.data.create_transform(**config)

    def run(files: list[str]) -> None:
        loader = torch.utils.data.DataLoader(Files(files, transform), batch_size=BATCH, num_workers=2)
        with torch.inference_mode():
            for images, _ in loader:
                model(images.contiguous(memory_format=torch.channels_last)).softmax(1).topk(5)

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pictures", type=int, default=5120)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    torch.manual_seed(0)
    net = isthmus.create("resnet50").eval()
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        write_photographs(folder / "files", options.pictures)
        files = sorted(map(str, (folder / "files").rglob("*.jpg")))
        slices = iter([files[start :: options.rounds] for start in range(options.rounds)])
        int8 = to_be_timed(Model(net))
        few = Pictures.unlabelled(files[:PART])
        wanted = Wanted(classes=tuple(f"class {place}" for place in range(1000)))
        calls: dict[str, Round] = {}
        for low in PRECISIONS:
            order = Order(
                net=net,
                pictures=few,
                wanted=wanted,
                batch_size=BATCH,
                size=PART,
                precision=low,
                int8=int8,
                engine="openvino",
            )
            calls[f"predict, {low}"] = ours(order, folder)
            calls[f"engine alone, {low}"] = alone(order)
        calls["Hugging Face"], calls["timm"] = hugging_face(net, folder, files[:64]), by_timm(net, folder)
        for call in calls.values():
            call(files[:64])
        current: list[str] = []

        def work(call: Round) -> Callable[[], object]:
            return lambda: call(current)

        times: dict[str, list[float]] = {name: [] for name in calls}
        for chosen in slices:
            current[:] = chosen
            for name, (seconds,) in interleaved(
                {n: work(c) for n, c in calls.items()}, runs=1, warm_up=0, pause=0.2
            ).items():
                times[name].append(seconds / len(chosen))
            print({name: round(1 / each[-1], 1) for name, each in times.items()}, flush=True)
    summary = {}
    for low in PRECISIONS:
        mine = times[f"predict, {low}"]
        least = f">= {TARGETS[low]}"
        summary[f"{low} over Hugging Face's pipeline"] = spread(ratios(times["Hugging Face"], mine)) | {"target": least}
        summary[f"{low} over timm's loader and an eager loop"] = spread(ratios(times["timm"], mine)) | {"target": least}
        summary[f"{low} over the engine alone"] = spread(ratios(times[f"engine alone, {low}"], mine)) | {
            "target": ">= 0.90"
        }
    rows = [{"what": name, "pictures/s": spread([1 / each for each in seconds])} for name, seconds in times.items()]
    write_result("predict_files", __doc__, summary, rows)


if __name__ == "__main__":
    main()
