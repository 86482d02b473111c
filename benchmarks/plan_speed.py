"""How quick is paper: `isthmus plan` against `import torch`, and specs costed a second against fvcore's count.

python benchmarks/plan_speed.py [--runs 9]
"""

import argparse
import itertools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision

from isthmus.arch.cost import cost
from isthmus.arch.spec import NetSpec
from isthmus.arch.variants import variant
from measure import interleaved, process, ratios, spread, write_result

SPECS = 200  # costed a run


def distinct_specs() -> Iterator[NetSpec]:
    """ResNet-50-sized networks, no two alike: other strip widths in every stage, as a search would try them."""
    spec = variant("resnet50")
    widths = itertools.product(*(range(stage.mid // 2, stage.mid * 2, 8) for stage in spec.stages))
    for mids in widths:
        yield replace(spec, stages=tuple(replace(stage, mid=mid) for stage, mid in zip(spec.stages, mids, strict=True)))


def main() -> None:
    """Measure both claims and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="rounds of each pair (default 9)")
    runs = parser.parse_args().runs

    command = str(Path(sys.executable).with_name("isthmus"))
    whole = interleaved(
        {"plan": process(command, "plan", "resnet50"), "torch": process(sys.executable, "-c", "import torch")},
        runs=runs,
    )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fvcore scripts and traces, which torch deprecates
        from fvcore.nn import FlopCountAnalysis
    torch.set_num_threads(1)
    specs = distinct_specs()
    net, picture = torchvision.models.resnet50(weights=None).eval(), torch.zeros(1, 3, 224, 224)

    def paper() -> None:
        for spec in itertools.islice(specs, SPECS):  # the iterator goes on, so no run sees a spec of another
            found = cost(spec)
            assert found.params > 0 < found.macs  # noqa: S101 - the work must not be lazy
            assert found.activations > 0  # noqa: S101

    def counted() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counter = FlopCountAnalysis(net, picture).unsupported_ops_warnings(enabled=False)
            counter.total()

    counts = interleaved({"paper": paper, "fvcore": counted}, runs=runs)
    each = [seconds / SPECS for seconds in counts["paper"]]
    write_result(
        "plan_speed",
        "The network on paper costs no waiting",
        {
            "`isthmus plan resnet50` / `import torch`": {
                **spread(ratios(whole["plan"], whole["torch"])),
                "target": "≤ 0.15",
            },
            "`isthmus plan resnet50`, whole process": {**spread(whole["plan"]), "unit": "s"},
            '`python -c "import torch"`, whole process': {**spread(whole["torch"]), "unit": "s"},
            "distinct ResNet-50-sized specs costed on one core": {
                **spread([1 / seconds for seconds in each]),
                "unit": "specs/s",
                "target": "≥ 1,000",
            },
            "one fvcore count / one spec costed": spread(ratios(counts["fvcore"], each)),
            f"fvcore {version('fvcore')} counts torchvision's resnet50": {**spread(counts["fvcore"]), "unit": "s"},
        },
        note=(
            "Medians with minimum and maximum; rounds are interleaved and a ratio is taken round by round. A costed "
            "spec is made, laid out and summed (parameters, MACs, activations) for the first time; fvcore's count "
            "starts from a network in memory."
        ),
    )


if __name__ == "__main__":
    main()
