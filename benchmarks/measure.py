"""What every benchmark shares: runs interleaved A B A B, medians with their spread, machine and result files."""

import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from isthmus import records
from isthmus.runtime import machine, versions

__all__ = ["interleaved", "interval", "process", "ratios", "spread", "write_result"]

RESULTS = Path(__file__).parent / "results"


def interleaved(
    peers: Mapping[str, Callable[[], object]], *, runs: int, warm_up: int = 1, pause: float = 0.0
) -> dict[str, list[float]]:
    """Seconds of each call of each peer, in rounds A B A B, so that a slow moment of the machine meets them all.

    A `pause` before each call is for peers whose threads spin on when their work is done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for turn in range(warm_up + runs):
        for name, call in peers.items():
            time.sleep(pause)
            begun = time.perf_counter()
            call()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begun)
    return seconds


def process(*command: str) -> Callable[[], object]:
    """A call that runs a whole process and waits for it; its output is thrown away, its failure is not."""
    return lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, greatest and number of some runs: how times are told."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}


def ratios(these: Sequence[float], those: Sequence[float]) -> list[float]:
    """These over those, round by round."""
    return [this / that for this, that in zip(these, those, strict=True)]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and its 95 % interval by Student's t: how scores of several splits are told."""
    from scipy.stats import t

    mean, count = statistics.fmean(values), len(values)
    reach = t.ppf(0.975, count - 1) * statistics.stdev(values) / count**0.5 if count > 1 else 0.0
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "runs": count}


def write_result(
    name: str, claim: str | None, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = (), note: str = ""
) -> None:
    """results/NAME.json and results/NAME.md: claim, summary, rows, machine, versions, date and command; printed too.

    A summary's values are plain, or what `spread` and `interval` gave, with `unit` and `target` beside them at wish.
    """
    document = {
        "claim": (claim or name).strip(),
        "summary": dict(summary),
        "note": note,
        "machine": {**records.to_dict(machine()), "load_average": round(os.getloadavg()[0], 2)},
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "rows": [dict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    text = markdown(document)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def markdown(document: Mapping[str, Any]) -> str:
    """A result as a page to read."""
    title, _, rest = document["claim"].partition("\n")
    here, rows = document["machine"], document["rows"]
    sections = [
        f"# {title}",
        rest.strip(),
        table(("what", "result"), ((what, told(value)) for what, value in document["summary"].items())),
        document["note"],
        table(tuple(rows[0]), (map(told, row.values()) for row in rows)) if rows else "",
        f"{here['name']}, {here['cores']} cores, {here['memory'] / 2**30:.0f} GiB, load {here['load_average']}.",
        ", ".join(f"{library} {version}" for library, version in document["versions"].items()) + ".",
        f"{document['date']}, `{document['command']}`",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(columns: Sequence[str], rows: Any) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def told(value: Any) -> str:
    """A value in four digits; a spread or an interval with its ends, and the target beside it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if not isinstance(value, Mapping):
        return str(value)
    low, high = (("min", "max") if "median" in value else ("low", "high")) if "runs" in value else ("", "")
    if not low:
        return ", ".join(f"{key} {told(part)}" for key, part in value.items())
    middle = told(float(value.get("median", value.get("mean"))))
    unit = f" {value['unit']}" if "unit" in value else ""
    target = f"; target {value['target']}" if "target" in value else ""
    return f"**{middle}**{unit} ({told(float(value[low]))} to {told(float(value[high]))}, n = {value['runs']}){target}"
