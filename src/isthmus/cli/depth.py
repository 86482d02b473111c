"""The command that shows what depth does to a network, with shortcuts and without."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cli.options import Device, Json
from isthmus.report.tables import print_table

if TYPE_CHECKING:
    from isthmus.diagnose.depth import Measured

__all__ = ["depth"]

QUICK = 64  # px: depth is the same at any size
SHOWN = (1 / 1024, 1 / 64)  # of the distances; --json has all
NOTE = (
    "Before training. Gradient: its size in the input of a block.",
    "Alike: correlation of the gradients of two inputs that lie such a",
    "part of the way between two pictures apart: 1 the same, 0 unrelated.",
)
LEADING = "Pre-activation blocks begin with a norm: there are no twins without."


def depth(
    network: str,
    *,
    data: str,
    steps: int = 100,
    lr: float = 0.005,
    batch_size: int = 16,
    image_size: int | None = None,
    seed: int = 0,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show the same depth with and without shortcuts, with norms and without: gradients, and the first steps.

    Parameters
    ----------
    network
        A name from `isthmus models`, or a TOML file with a spec.
    data
        Pictures as `isthmus train` takes them.
    steps
        Training steps of each of the four networks; 0 for what can be seen before training.
    lr
        Learning rate, the same for all of them.
    batch_size
        Pictures a step.
    image_size
        Pixels a side; 64 unless given, 32 for the CIFAR nets.
    seed
        Decides the weights and the order of the pictures.
    """
    from isthmus.arch.preprocess import IMAGENET
    from isthmus.arch.spec import NetSpec
    from isthmus.arch.variants import variant
    from isthmus.cli.paper import chosen_image_size
    from isthmus.data.loader import Loader
    from isthmus.data.sources import open_pictures
    from isthmus.diagnose.depth import measure_twins
    from isthmus.errors import SpecError
    from isthmus.report.terminal import TerminalReporter
    from isthmus.runtime import machine
    from isthmus.weights.adapt import adapt_preprocess

    spec = NetSpec.from_file(Path(network)) if network.endswith(".toml") else variant(network)
    record = adapt_preprocess(IMAGENET.at(image_size or min(chosen_image_size(spec, None), QUICK)), spec.in_channels)
    if record is None:
        raise SpecError(f"{network} takes {spec.in_channels} channels and pictures have 3 or 1; change in_channels")
    loader = Loader(pictures=open_pictures(data), record=record, batch_size=batch_size, train=True, seed=seed)
    with TerminalReporter() as reporter:
        found = list(
            measure_twins(spec, loader, machine(device), steps=steps, lr=lr, seed=seed, tell=reporter.progress)
        )
    if as_json:
        settings = {
            "network": network,
            "image_size": record.crop,
            "batch_size": loader.step_size,
            "lr": lr,
            "seed": seed,
        }
        print(json.dumps({**settings, "twins": [each.to_dict() for each in found]}, indent=2))  # noqa: T201
        return
    print_twins(f"{network} at {record.crop} px, {loader.step_size} pictures a step, lr {lr:g}, seed {seed}", found)


def print_twins(title: str, found: "list[Measured]") -> None:
    """The twins one below the other."""
    steps = found[0].steps
    print_table(
        title,
        (
            "twin",
            "gradient,\nblock 1",
            f"\nblock {len(found[0].gradients)}",
            *(f"alike at\n1/{1 / distance:.0f}" for distance in SHOWN),
            *((f"loss,\nstep {steps}",) if steps else ()),
        ),
        (
            (
                each.twin,
                f"{each.first:.2g}",
                f"{each.last:.2g}",
                *(f"{each.correlations[distance]:.2f}" for distance in SHOWN),
                *((told_loss(each),) if steps else ()),
            )
            for each in found
        ),
        note="\n".join((*NOTE, *(() if len(found) > 2 else (LEADING,)))),
    )


def told_loss(found: "Measured") -> str:
    """The loss in the end, or the step at which it was no number."""
    return f"NaN at {len(found.losses)}" if found.loss is None else f"{found.loss:.3f}"
