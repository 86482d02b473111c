"""Commands that measure this machine at work."""

import json
from dataclasses import replace

from isthmus.cli.options import Device, Json
from isthmus.report.tables import console, print_table

__all__ = ["data"]


def data(
    data: str,
    *,
    arch: str = "resnet50",
    batch_size: int = 32,
    image_size: int = 224,
    threads: int = 0,
    seconds: float = 5.0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show how many pictures a second the loader and the training step do alone, and which one binds.

    Parameters
    ----------
    data
        Pictures as `isthmus train` takes them.
    arch
        The network whose step is measured: a name from `isthmus models`.
    batch_size
        Pictures a step.
    image_size
        Pixels a side.
    threads
        Threads that decode; one a core unless given.
    seconds
        For each measurement; the resized pictures that are kept on the way stay in the cache.
    """
    from isthmus.arch.preprocess import IMAGENET
    from isthmus.data.augment import Augment
    from isthmus.data.cache import Resized
    from isthmus.data.loader import Loader
    from isthmus.data.rate import loader_rate
    from isthmus.data.sources import open_pictures
    from isthmus.runtime import machine
    from isthmus.train.pace import step_rate
    from isthmus.weights.load import create

    here, record, pictures = machine(device), IMAGENET.at(image_size), open_pictures(data)
    net = create(arch, num_classes=max(len(pictures.classes), 2))
    plain = Loader(
        pictures=pictures,
        record=record,
        batch_size=batch_size,
        train=True,
        augment=Augment(),
        threads=threads,
        on_error="skip",
    )
    resized = replace(plain, resized=Resized(pictures, record.resize, record))
    rates = {
        "uint8 batches": loader_rate(plain, seconds),
        "normalised batches": loader_rate(plain, seconds, floats=True),
        "normalised, from resized pictures": loader_rate(resized, seconds, floats=True),
    }
    step = step_rate(net, here, batch_size=plain.step_size, size=image_size, seconds=seconds)
    rows = [
        {
            "loader": name,
            "loader_alone": rate,
            "step_alone": step,
            "together": 1 / (1 / rate + 1 / step) if here.torch_device.type == "cpu" else min(rate, step),
            "binds": "loader" if rate < step else "step",
        }
        for name, rate in rates.items()
    ]
    if as_json:
        print(json.dumps({"unit": "pictures/s", "arch": arch, "device": here.device, "rows": rows}, indent=2))  # noqa: T201
        return
    print_table(
        f"pictures/s, {arch} at {image_size} px, {plain.step_size} a step, on {here.name}",
        ("loader", "loader alone", "step alone", "together", "binds"),
        (
            (row["loader"], *(f"{row[name]:.0f}" for name in ("loader_alone", "step_alone", "together")), row["binds"])
            for row in rows
        ),
        note="Together is what to expect: loader and step share the cores." if here.device == "cpu" else "",
    )
    if plain.unreadable:
        console.print(f"pictures that could not be read: {len(plain.unreadable)}", markup=False)
