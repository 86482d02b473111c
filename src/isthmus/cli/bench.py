"""Commands that measure this machine at work."""

import json
from dataclasses import replace
from typing import Annotated

from cyclopts import Parameter

from isthmus.cli.options import Device, Json
from isthmus.report.tables import console, print_report, print_table, size

__all__ = ["data", "engines", "limits"]

INT8_TIMED = (
    "int8 was calibrated on made-up pictures: its speed counts; `isthmus export RUN FILE --precision int8` measures "
    "what it costs"
)


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


def engines(
    network: str,
    *,
    image_size: int = 0,
    batch_sizes: Annotated[tuple[int, ...], Parameter(negative="", consume_multiple=True)] = (1, 16),
    as_json: Json = False,
) -> None:
    """Show how many pictures a second each engine reaches in each precision, and what part of this machine's limit.

    Parameters
    ----------
    network
        A name from `isthmus models`, a run folder or a weight file.
    image_size
        Pixels a side; what the network was made for unless given.
    batch_sizes
        Pictures at once.
    """
    import torch

    from isthmus import records
    from isthmus.arch.cost import cost
    from isthmus.arch.variants import variants
    from isthmus.deploy.engines import ENGINES, PRECISIONS, EnginePrecision, Model
    from isthmus.deploy.limits import limits as limits_of_machine
    from isthmus.deploy.predictor import HINTS, Hint, Timed, choose
    from isthmus.deploy.program import input_size
    from isthmus.deploy.quantize import to_be_timed
    from isthmus.errors import EngineError, MissingExtraError
    from isthmus.report.terminal import TerminalReporter
    from isthmus.runtime import machine
    from isthmus.weights.load import create, load

    if min(batch_sizes) < 1:
        raise EngineError(f"batch sizes are {', '.join(map(str, batch_sizes))}; they must be 1 or more")
    net = (create(network) if network in variants() else load(network)).eval()
    if image_size:
        net.preprocess = net.preprocess.at(image_size)
    model, notes = Model(net), [INT8_TIMED]
    with TerminalReporter() as reporter:
        machine_limits = limits_of_machine(say=reporter.say)  # before the engines keep the machine busy
        try:
            reporter.say("calibrating int8 on made-up pictures")
            model.int8 = to_be_timed(model)
        except MissingExtraError as error:
            notes = [str(error)]
        found = {}
        for count in batch_sizes:
            for hint in HINTS:
                reporter.say(f"timing {count} at once for {hint}")
                found[count, hint] = choose(model, hint=hint, batch_size=count, again=True)[0]
    timed: dict[tuple[EnginePrecision, str], dict[tuple[int, Hint], Timed]] = {
        (row.precision, row.engine): {} for choice in found.values() for row in choice.rows
    }
    for way, choice in found.items():
        for row in choice.rows:
            timed[row.precision, row.engine][way] = row
    side, here = input_size(net), machine("cpu")
    flops = cost(net.spec, side).flops
    used = [precision for precision in PRECISIONS if any(precision in pair for pair in timed)]
    most = {precision: rate / flops for precision in used if (rate := getattr(machine_limits, precision))}
    if as_json:
        rows = [
            records.to_dict(row) | {"batch_size": count, "hint": hint}
            for (count, hint), choice in found.items()
            for row in choice.rows
        ]
        said = {"unit": "pictures/s", "network": network, "machine": here.name, "limits": most, "rows": rows}
        print(json.dumps(said, indent=2))  # noqa: T201
        return

    def told(row: Timed) -> str:
        part = f" ({row.rate / most[row.precision]:.2f})" if row.precision in most else ""
        return "–" if row.refused else f"{row.rate:.1f}{part}"

    print_table(
        f"{network} at {size(side)} on {here.name}, {torch.get_num_threads()} threads: pictures/s (part of the limit)",
        ("engine", "precision", *(f"{count}, {hint}" for count, hint in found)),
        (
            (ENGINES[engine].title, precision, *(told(timed[precision, engine][way]) for way in found))
            for precision in used
            for _, engine in sorted(pair for pair in timed if pair[0] == precision)
        ),
        note="The limit: " + ", ".join(f"{each} {rate:.1f}" for each, rate in most.items()),
    )
    notes += [str(row) for choice in found.values() for row in choice.rows if row.refused]
    print_report("\n".join(dict.fromkeys(notes)))


def limits(*, as_json: Json = False) -> None:
    """Measure what this machine does at most, and keep it for `isthmus plan --roofline`: arithmetic and memory."""
    from isthmus import records
    from isthmus.arch.roofline import ITEM
    from isthmus.deploy.limits import measured_limits
    from isthmus.report.terminal import TerminalReporter

    with TerminalReporter() as reporter:
        reporter.say("measuring arithmetic and memory with all threads")
        found = measured_limits(say=reporter.say)
    if as_json:
        print(json.dumps(records.to_dict(found), indent=2))  # noqa: T201
        return
    rates = {precision: getattr(found, precision) for precision in ITEM}
    print_table(
        f"{found.machine}, {found.threads} thread{'s' * (found.threads > 1)}",
        ("precision", "GOP/s"),
        ((precision, f"{rate / 1e9:.0f}" if rate else "–") for precision, rate in rates.items()),
    )
    print_table(
        "",
        ("working set", "GB/s"),
        ((binary(each.size), f"{each.rate / 1e9:.1f}") for each in found.bandwidth),
    )
    print_report(
        f"GOP/s: of a 5×5 convolution without padding; a multiplication and an addition are two operations. A vector "
        f"holds {found.lanes} sums.\n"
        "GB/s: read and written by all threads that go over so much memory again and again."
    )


def binary(size: int) -> str:
    """Bytes in KiB or MiB."""
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
