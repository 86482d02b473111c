"""Claim: floors of `isthmus plan --roofline` are floors, most convolutions come near, what it expects ranks networks.

Three networks at batches of 1 and 16 in fp32 and bf16, each layer's floor beside its time by OpenVINO's own counters
(the engine that `Predictor` chooses here), the median of rounds in turn; limits are the higher of two measurements,
before and after. And twelve networks whose multiply-adds lie within 15 % of ResNet-50's, ranked by the times to expect
before any of them runs, by floors, and by multiply-adds alone, against their latency.
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.stats import spearmanr

import isthmus
from isthmus.arch.cost import cost
from isthmus.arch.plan import plan
from isthmus.arch.roofline import Floor, Limits, roofline
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from isthmus.deploy.engines import ENGINES, Model, Work
from isthmus.deploy.limits import measured_limits
from isthmus.deploy.profile import Profile, layer_times, profile
from measure import interleaved, spread, table, told, write_result

NETWORKS = ("resnet50", "resnext50_32x4d", "resnet50d")
WAYS = [(batch, precision) for batch in (1, 16) for precision in ("fp32", "bf16")]
NEAR = 3.0  # times its floor
ENGINE = "openvino"
WITHIN = 0.15
PAUSE = 0.05


def own(name: str, *, depths: tuple[int, ...] = (3, 4, 6, 3), mid: int = 64, out: int = 256) -> NetSpec:
    """ResNet-50 with other depths, strips and lands; `mid` and `out` are those of the first stage."""
    base = variant("resnet50")
    stages = tuple(
        replace(stage, depth=depth, mid=mid << place, out=out << place)
        for place, (stage, depth) in enumerate(zip(base.stages, depths, strict=True))
    )
    return replace(base, name=name, stages=stages)


RANKED = (
    *map(
        variant,
        (
            "resnet34",
            "resnet50",
            "resnet50d",
            "resnet50_gn",
            "resnext50_32x4d",
            "seresnet50",
            "resnetv2_50",
        ),
    ),
    own("lands twice as wide", mid=40, out=512),
    own("lands half as wide", mid=80, out=128),
    own("half as wide, deep", depths=(12, 16, 24, 12), mid=32, out=128),
    own("most blocks early", depths=(8, 5, 2, 1)),
    own("wide, shallow", depths=(1, 2, 3, 1), mid=96, out=384),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="profiles of each network, batch and precision")
    parser.add_argument("--runs", type=int, default=10, help="latencies of each of the twelve networks")
    parser.add_argument("--trial", action="store_true", help="the first network and batch 1 alone, no result file")
    arguments = parser.parse_args()
    names, ways = (NETWORKS[:1], WAYS[:2]) if arguments.trial else (NETWORKS, WAYS)
    before = measured_limits()
    models = {spec.name: Model(isthmus.create(spec).eval()) for spec in RANKED}
    ranked = [ranking(*way, models, arguments.runs, before) for way in ways if way != (16, "fp32")]
    models.clear()
    taken = {name: profiles(name, ways, arguments.rounds) for name in names}
    limits = highest(before, measured_limits())
    rows = [case(name, way, found, limits) for name in names for way, found in taken[name].items()]
    summary = {
        "layers that took less than their floor": f"{sum(row['below floor'] for row in rows)} of "
        f"{sum(row['layers'] for row in rows)}; target none",
        "convolution time within three times its floor, the least of all cases": f"{least(rows):.0%}; target >= 70 %",
        **{
            f"rank correlation with latency, b{each['batch']} {each['precision']}": f"expected {each['expected']:.2f}, "
            f"floors {each['floors']:.2f}, multiply-adds {each['MACs']:.2f}; target: expected above multiply-adds"
            for each in ranked
        },
        "limits, GOP/s": {
            name: round(rate / 1e9) for name in ("fp32", "bf16", "int8") if (rate := getattr(limits, name))
        },
        "limits, GB/s": {f"{each.size >> 10} KiB": round(each.rate / 1e9, 1) for each in limits.bandwidth},
    }
    if arguments.trial:
        print(summary)
        return
    write_result("roofline", __doc__, summary, rows, "\n\n".join(each["latencies"] for each in ranked))


def least(rows: list[dict]) -> float:
    """The least part of the convolutions' time."""
    return min(row["conv time near floor"] for row in rows)


def highest(one: Limits, other: Limits) -> Limits:
    """The most that was reached in two measurements: a limit is no mean."""
    known = [name for name in ("fp32", "bf16", "int8") if getattr(one, name)]
    rates = {name: max(getattr(one, name), getattr(other, name)) for name in known}
    bandwidth = tuple(
        max(pair, key=lambda each: each.rate) for pair in zip(one.bandwidth, other.bandwidth, strict=True)
    )
    return replace(one, bandwidth=bandwidth, **rates)


def profiles(name: str, ways: list[tuple[int, str]], rounds: int) -> dict[tuple[int, str], list[Profile]]:
    """Where the time of one network goes, in rounds over all ways."""
    model = Model(isthmus.create(name).eval())
    found: dict[tuple[int, str], list[Profile]] = {way: [] for way in ways}
    for _ in range(rounds):
        for batch, precision in ways:
            found[batch, precision].append(profile(model, ENGINE, precision=precision, batch=batch))
    return found


def case(name: str, way: tuple[int, str], rounds: list[Profile], limits: Limits) -> dict:
    """One network in one precision and batch: medians of the rounds beside the floors."""
    every = roofline(plan(name), limits, precision=way[1], batch=way[0])
    totals = [each.seconds for each in rounds]
    seconds: dict[str, list[float]] = {}
    floors: dict[str, Floor] = {}
    for each in (each for found in rounds for each in layer_times(found, every)):
        seconds.setdefault(each.name, []).append(each.seconds)
        if each.floor:
            floors[each.name] = each.floor
    took = {each: statistics.median(values) for each, values in seconds.items()}
    ratio = {each: took[each] / floor.seconds for each, floor in floors.items()}
    convs = [each for each, floor in floors.items() if floor.kind == "conv"]
    near = sum(took[each] for each in convs if ratio[each] <= NEAR)
    below = sorted((each for each in floors if ratio[each] < 1), key=ratio.__getitem__)
    far = sorted(convs, key=lambda each: floors[each].seconds - took[each])[:3]
    floor, whole = sum(each.seconds for each in floors.values()), statistics.median(totals)
    row = {
        "network": name,
        "batch": way[0],
        "precision": way[1],
        "layers": len(floors),
        "below floor": len(below),
        "floor, ms": 1e3 * floor,
        "measured, ms": spread([1e3 * each for each in totals]),
        "floor over measured": floor / whole,
        "expected over measured": sum(each.expected for each in floors.values()) / whole,
        "conv time near floor": near / sum(took[each] for each in convs),
        "beside the layers": 1 - sum(took[each] for each in floors) / whole,
        "most lost, ms": {each: round(1e3 * (took[each] - floors[each].seconds), 2) for each in far},
        "least over floor": {each: round(ratio[each], 3) for each in sorted(floors, key=ratio.__getitem__)[:3]},
    }
    print(row, flush=True)
    return row


def ranking(batch: int, precision: str, models: dict[str, Model], runs: int, limits: Limits) -> dict:
    """The networks in the order of their times to expect, floors, multiply-adds and latencies."""
    middle = cost("resnet50").macs
    plans = {name: model.net.plan for name, model in models.items()}
    macs = {name: cost(each).macs for name, each in plans.items()}
    if wrong := [name for name, each in macs.items() if abs(each / middle - 1) > WITHIN]:
        raise ValueError(wrong)
    # Before any of them runs.
    layers = {name: roofline(each, limits, precision=precision, batch=batch) for name, each in plans.items()}
    floors = {name: sum(each.seconds for each in every) for name, every in layers.items()}
    expected = {name: sum(each.expected for each in every) for name, every in layers.items()}
    images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224)).astype(np.float32)

    def call(model: Model) -> Callable[[], object]:
        run = ENGINES[ENGINE].open(model, precision, Work(shape=images.shape))
        return lambda: run(images)

    times = interleaved({name: call(model) for name, model in models.items()}, runs=runs, warm_up=2, pause=PAUSE)
    medians = {name: statistics.median(each) for name, each in times.items()}
    latencies = table(
        (f"b{batch} {precision}", "GMACs", "floor, ms", "expected, ms", "measured, ms", "expected over measured"),
        (
            (
                name,
                f"{macs[name] / 1e9:.2f}",
                f"{1e3 * floors[name]:.1f}",
                f"{1e3 * expected[name]:.1f}",
                told(spread([1e3 * each for each in times[name]])),
                f"{expected[name] / medians[name]:.2f}",
            )
            for name in sorted(medians, key=medians.__getitem__)
        ),
    )
    found = {
        "batch": batch,
        "precision": precision,
        "expected": correlation(expected, medians),
        "floors": correlation(floors, medians),
        "MACs": correlation(macs, medians),
        "latencies": latencies,
    }
    ranks = ", ".join(f"{each} {found[each]:.2f}" for each in ("expected", "floors", "MACs"))
    print(f"{ranks}\n{latencies}", flush=True)
    return found


def correlation(these: dict[str, float], those: dict[str, float]) -> float:
    """Spearman's."""
    return float(spearmanr([these[name] for name in those], list(those.values())).statistic)


if __name__ == "__main__":
    main()
