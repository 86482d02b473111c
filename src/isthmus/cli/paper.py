"""Commands about the network on paper; none of them loads torch, but for a roofline that must measure first."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from isthmus import records
from isthmus.arch.cost import By, Cost, Row, cost
from isthmus.arch.economics import StageEconomics, economics
from isthmus.arch.memory import Memory, Optimizer, TrainingMemory, training_memory
from isthmus.arch.plan import plan as make_plan
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant, variants
from isthmus.cli.options import Json, Settings
from isthmus.cli.roofline import print_roofline, roofline_document, roofline_of, save_roofline
from isthmus.errors import RunError, SpecError
from isthmus.report.tables import console, count, print_table, size

__all__ = ["models", "plan"]

TRAINING = {
    "weights": "weights and statistics",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "average": "averaged weights",
    "saved": "maps that wait for backward",
    "transient": "maps within one block's backward (estimate)",
}


def chosen_image_size(spec: NetSpec, image_size: int | None) -> int:
    """What was asked for, else 224, or 32 for a stem that keeps the size (the CIFAR nets)."""
    usual = 32 if spec.stem.stride == 1 and spec.stem.pool == "none" else 224
    return usual if image_size is None else image_size


def models(pattern: str = "*", *, image_size: int | None = None, as_json: Json = False) -> None:
    """List the networks of the table with their cost.

    Parameters
    ----------
    pattern
        A part of the name, or a shell pattern such as 'resnext*'.
    image_size
        Pixels a side; 224 unless given, 32 for the CIFAR nets.
    """
    names = variants(pattern)
    if not names:
        raise SpecError(f"no network matches {pattern!r}; `isthmus models` lists all")
    costs = {name: cost(spec := variant(name), chosen_image_size(spec, image_size)) for name in names}
    if as_json:
        print(json.dumps([{"name": name, **totals(found)} for name, found in costs.items()], indent=2))  # noqa: T201
        return
    print_table(
        f"{len(names)} networks",
        ("name", "image", "parameters", "MACs", "activations"),
        (
            (name, size(found.plan.image_size), count(found.params), count(found.macs), count(found.activations))
            for name, found in costs.items()
        ),
        note="MACs are multiply-adds for one picture (1 MAC = 2 FLOPs).",
    )


def plan(
    network: str,
    *,
    image_size: int | None = None,
    in_channels: int | None = None,
    num_classes: int | None = None,
    output_stride: int | None = None,
    settings: Settings = (),
    by: By = "stage",
    train: bool = False,
    batch: int | None = None,
    memory: Memory = "plain",
    precision: Literal["fp32", "bf16", "fp16", "int8"] = "fp32",
    optimizer: Optimizer = "sgd",
    ema: bool = False,
    roofline: bool = False,
    measure: bool = False,
    figure: Path | None = None,
    as_json: Json = False,
) -> None:
    """Show what a network costs and whether its strip pays, before a line of torch runs.

    Parameters
    ----------
    network
        A name from `isthmus models`, or a TOML file with a spec.
    image_size
        Pixels a side; 224 unless given, 32 for the CIFAR nets.
    in_channels
        Channels of the input, in place of the spec's.
    num_classes
        Classes of the output, in place of the spec's; 0 for pooled features.
    output_stride
        8, 16 or 32: strides beyond it become dilations.
    settings
        A field of the spec to change, such as 'shortcut=avg' or 'stages.0.mid=32'; may be repeated.
    by
        One row a stage, block or layer.
    train
        Show the bytes that training holds; the next five say how it is trained.
    batch
        Pictures at once: in training 32 unless given, for a roofline 1.
    memory
        What waits for backward: all (plain), each block's input (checkpoint), or what is dear to run again (recompute).
    precision
        Of the maps: in training fp32, bf16 or fp16, as under autocast; for a roofline fp32, bf16 or int8.
    optimizer
        Whose state is held; sgd with momentum.
    ema
        Whether an average of the weights is held.
    roofline
        Show the least time of each row on this machine, whose limits are measured once.
    measure
        Beside it, the time of each row in the fastest engine here.
    figure
        A file, .svg or .png, for a figure of what was measured.
    """
    spec = NetSpec.from_file(Path(network)) if network.endswith(".toml") else variant(network)
    spec = records.override(spec, settings)
    spec = replace(
        spec,
        in_channels=spec.in_channels if in_channels is None else in_channels,
        num_classes=spec.num_classes if num_classes is None else num_classes,
    )
    if output_stride is not None:
        spec = spec.with_output_stride(output_stride)
    laid_out = make_plan(spec, chosen_image_size(spec, image_size))
    found, strips = cost(laid_out), economics(laid_out)
    rows, held, roofs = found.by(by), None, None
    pictures = 32 if batch is None else batch
    if train:
        if precision == "int8":
            raise SpecError("training holds no int8: give --precision fp32, bf16 or fp16")
        held = training_memory(
            laid_out, batch=pictures, precision=precision, memory=memory, optimizer=optimizer, ema=ema
        )
    if figure and not measure:
        raise RunError("a figure shows what was measured: give --measure too")
    if figure and figure.suffix.lower() not in (".svg", ".png"):
        raise RunError(f"{figure} is no name for a figure; it must end in .svg or .png")
    if roofline or measure:
        if precision == "fp16":
            raise SpecError("engines for CPUs do not multiply fp16: give --precision fp32, bf16 or int8")
        roofs = roofline_of(laid_out, precision, 1 if batch is None else batch, measure=measure)
        if figure:
            save_roofline(roofs, figure)
    if as_json:
        document = {
            "name": spec.name,
            "image_size": laid_out.image_size,
            **totals(found),
            "rows": [row_values(row) for row in rows],
            "economics": [strip._asdict() for strip in strips],
            **({"training_bytes": {**records.to_dict(held), "total": held.total}} if held else {}),
            **({"roofline": roofline_document(roofs, by)} if roofs else {}),
            "spec": records.to_dict(spec),
        }
        print(json.dumps(document, indent=2))  # noqa: T201
        return
    print_plan(spec.name or network, found, by, rows)
    print_economics(strips)
    if held:
        print_training(held, f"{pictures} pictures, {precision}, memory {memory}")
    if roofs:
        print_roofline(roofs, by)


def totals(found: Cost) -> dict[str, Any]:
    """A network's cost under the keys of our JSON."""
    return {
        "params": found.params,
        "macs": found.macs,
        "flops": found.flops,
        "activations": found.activations,
        "receptive_field": found.receptive_field,
        "output_stride": found.plan.output_stride,
    }


def row_values(row: Row) -> dict[str, Any]:
    """A row under the keys of our JSON."""
    return {**row._asdict(), "flops": row.flops}


def print_plan(name: str, found: Cost, by: By, rows: tuple[Row, ...]) -> None:
    """Totals and the rows below them."""
    laid_out, spec = found.plan, found.plan.spec
    console.print(f"[bold]{name}[/] at {size(laid_out.image_size)}, {spec.in_channels} channels in, ", end="")
    console.print(f"{spec.num_classes} classes out" if spec.num_classes else "pooled features out")
    console.print(
        f"  {found.params:,} parameters · {count(found.macs)}MACs ({count(found.flops)}FLOPs) · "
        f"{count(found.activations)} activations"
    )
    console.print(f"  receptive field {found.receptive_field} px · output stride {laid_out.output_stride}")
    print_table(
        "",
        (by, "kind", "channels", "map", "parameters", "MACs", "share"),
        (
            (
                row.name,
                row.kind,
                f"{row.in_channels} → {row.out_channels}",
                size(row.out_size),
                f"{row.params:,}",
                count(row.macs),
                f"{row.macs / max(found.macs, 1):.1%}",
            )
            for row in rows
        ),
    )


def print_economics(strips: tuple[StageEconomics, ...]) -> None:
    """The economics of the bottleneck, then its warnings."""
    if not strips:
        return
    print_table(
        "Economics of the bottleneck",
        ("stage", "outer", "mid", "groups", "ratio", "MACs", "params", "equal basic", "break even"),
        (
            (
                strip.name,
                strip.outer,
                strip.mid,
                strip.groups,
                f"{strip.reduction:.3g}×",
                f"{strip.macs_ratio:.1%}",
                f"{strip.params_ratio:.1%}",
                strip.equal_basic_width,
                strip.break_even_mid,
            )
            for strip in strips
        ),
        note=(
            "MACs and params: a block against two plain 3×3 convolutions of the same outer width (100%).\n"
            "Equal basic: the width of a basic block of the same MACs. Break even: the mid at which the saving is gone."
        ),
    )
    for strip in strips:
        for warning in strip.warnings:
            console.print(f"[yellow]warning[/] {strip.name}: {warning}")


def print_training(held: TrainingMemory, how: str) -> None:
    """What training holds, largest part first."""
    parts = sorted(records.to_dict(held).items(), key=lambda part: -part[1])
    print_table(
        f"Training: {held.total / 2**30:.2f} GiB ({how})",
        ("held", "MiB", "share"),
        ((TRAINING[name], f"{size / 2**20:,.0f}", f"{size / held.total:.1%}") for name, size in parts if size),
        note="Beside it: libraries, the allocator's rounding, and batches that wait in the loader.",
    )
