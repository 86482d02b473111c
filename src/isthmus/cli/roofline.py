"""What `isthmus plan --roofline` shows: the floor of each layer on this machine and, when asked, its measured time."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isthmus import records
from isthmus.arch.cost import By
from isthmus.arch.plan import Plan
from isthmus.arch.roofline import Floor, LayerTime, Limits, Precision, merged, merged_times, roofline
from isthmus.report.tables import console, print_report, print_table

if TYPE_CHECKING:
    from isthmus.deploy.profile import Profile

__all__ = ["Roofline", "print_roofline", "roofline_document", "roofline_of", "save_roofline"]

NOTE = (
    "MB: what a layer must read and write. Floor: what takes longer, arithmetic or memory; norms, activations and "
    "additions, which engines fuse into layers, count nothing. Expected: arithmetic in whole vectors and memory, one "
    "after the other, with all that an engine moves, from the cache that still holds it."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Roofline:
    """Floors of a plan's layers for `batch` pictures in a precision, and the times of the fastest engine if asked."""

    limits: Limits
    precision: Precision
    batch: int
    floors: tuple[Floor, ...]
    profile: "Profile | None" = None
    times: tuple[LayerTime, ...] = ()

    @property
    def seconds(self) -> float:
        """The least time of a batch."""
        return sum(each.seconds for each in self.floors)

    @property
    def expected(self) -> float:
        """The time to expect of a batch."""
        return sum(each.expected for each in self.floors)


def roofline_of(plan: Plan, precision: Precision, batch: int, *, measure: bool) -> Roofline:
    """The roofline of a plan here; loads torch only to measure, the machine's limits (once) or the network."""
    from isthmus.deploy.limits import limits
    from isthmus.report.terminal import TerminalReporter

    with TerminalReporter() as reporter:
        here = limits(say=reporter.say)
        floors = roofline(plan, here, precision=precision, batch=batch)
        if not measure:
            return Roofline(limits=here, precision=precision, batch=batch, floors=floors)
        from isthmus.deploy.profile import layer_times, profiled_plan

        found = profiled_plan(plan, precision=precision, batch=batch, say=reporter.say)
    times = layer_times(found, floors)
    return Roofline(limits=here, precision=precision, batch=batch, floors=floors, profile=found, times=times)


def roofline_document(found: Roofline, by: By) -> dict[str, Any]:
    """A roofline under the keys of our JSON."""
    document: dict[str, Any] = {
        "limits": records.to_dict(found.limits),
        "precision": found.precision,
        "batch": found.batch,
        "floor_seconds": found.seconds,
        "pictures_per_second": found.batch / found.seconds,
        "expected_seconds": found.expected,
    }
    if not found.profile:
        return document | {"rows": [floor_values(each) for each in merged(found.floors, by)]}
    return document | {
        "engine": found.profile.engine,
        "measured_seconds": found.profile.seconds,
        "measured_pictures_per_second": found.batch / found.profile.seconds,
        "rows": [
            (floor_values(each.floor) if each.floor else {"name": each.name, "kind": each.kind})
            | {"measured_seconds": each.seconds, "share": each.share}
            for each in merged_times(found.times, by)
        ],
    }


def save_roofline(found: Roofline, path: Path) -> None:
    """A figure of what was measured."""
    from isthmus.report.drawing import save
    from isthmus.report.roofline_figure import roofline_figure

    save(roofline_figure(found.times, found.limits, found.precision), path)


def floor_values(floor: Floor) -> dict[str, Any]:
    """A floor under the keys of our JSON."""
    return {
        "name": floor.name,
        "kind": floor.kind,
        "operations": floor.operations,
        "bytes": floor.bytes,
        "intensity": floor.intensity,
        "floor_seconds": floor.seconds,
        "binds": floor.binds,
        "expected_seconds": floor.expected,
    }


def print_roofline(found: Roofline, by: By) -> None:
    """The rows, the total and what it means in pictures a second."""
    times = merged_times(found.times, by)
    batch = "1 picture" if found.batch == 1 else f"{found.batch} pictures"
    threads = "1 thread" if found.limits.threads == 1 else f"{found.limits.threads} threads"
    moved, measured = ("MB", "FLOP/byte"), ("measured", "of limit")
    print_table(
        f"Roofline: {batch} in {found.precision}, {threads} of {found.limits.machine}; times in ms",
        (by, *(() if times else moved), "floor", "binds", "expected", *(measured if times else ())),
        [line(each) for each in (times or merged(found.floors, by))],
    )
    rate = found.batch / found.seconds
    console.print(f"  floor {1e3 * found.seconds:.2f} ms: at most {rate:.1f} pictures/s", markup=False)
    rate = found.batch / found.expected
    console.print(f"  expected {1e3 * found.expected:.2f} ms: {rate:.1f} pictures/s", markup=False)
    if found.profile:
        seconds = found.profile.seconds
        console.print(
            f"  measured {1e3 * seconds:.2f} ms in {found.profile}: {found.batch / seconds:.1f} pictures/s, "
            f"{found.seconds / seconds:.2f} of the limit",
            markup=False,
        )
    print_report(NOTE)


def line(row: Floor | LayerTime) -> list[str]:
    """A row of the table: of a floor alone what it moves, of a measured layer how long it took."""
    if isinstance(row, Floor):
        return [row.name, f"{row.bytes / 1e6:.2f}", f"{row.intensity:.1f}", *times_of(row)]
    share = "–" if row.share is None else f"{row.share:.2f}"
    return [row.name, *(times_of(row.floor) if row.floor else ["–"] * 3), f"{1e3 * row.seconds:.3f}", share]


def times_of(floor: Floor) -> list[str]:
    """What is known before anything runs."""
    return [f"{1e3 * floor.seconds:.3f}", floor.binds, f"{1e3 * floor.expected:.3f}"]
