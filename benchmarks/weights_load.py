"""How quick and how lean is loading: a ResNet-50 from safetensors against timm, and `weights inspect` of that file.

python benchmarks/weights_load.py [--runs 15]
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import isthmus
from measure import interleaved, process, ratios, spread, write_result

PEAK = """
import sys
from pathlib import Path
import timm, torch, isthmus
from isthmus.weights.load import load
from safetensors.torch import load_file

def held(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

def theirs(path):
    net = timm.create_model(Path(path).stem)
    net.load_state_dict(load_file(path))
    return net

call = {"isthmus": load, "timm": theirs}[sys.argv[1]]
call(sys.argv[2])  # what is imported at the first call is not what is measured
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = held("VmRSS")
net = call(sys.argv[3])
print(held("VmHWM") - before)
"""


def peak(who: str, tiny: Path, path: Path) -> float:
    """Most bytes that loading took in a process of its own, beyond what the process held before."""
    command = [sys.executable, "-c", PEAK, who, str(tiny), str(path)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure time and memory and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="rounds of each pair (default 15)")
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.safetensors" for name in ("test_resnet", "resnet50")}
        for name, path in files.items():
            net = isthmus.create(name)
            isthmus.save_weights(net, path)
        tiny, ours = files.values()
        plain = Path(folder) / "plain.safetensors"  # without our description
        save_file(net.state_dict(), plain)
        weights = sum(tensor.nbytes for tensor in net.state_dict().values())

        def theirs() -> torch.nn.Module:
            found = timm.create_model("resnet50")
            found.load_state_dict(load_file(plain))
            return found

        calls = {
            "timm": theirs,
            "load": lambda: isthmus.load(ours),
            "create": lambda: isthmus.create("resnet50", weights=plain),
        }
        seconds = interleaved(calls, runs=runs, warm_up=3)
        command = str(Path(sys.executable).with_name("isthmus"))
        whole = interleaved(
            {
                "inspect": process(command, "weights", "inspect", str(ours)),
                "torch": process(sys.executable, "-c", "import torch"),
            },
            runs=max(runs // 2, 3),
        )
        peaks = {who: [peak(who, tiny, ours) for _ in range(3)] for who in ("isthmus", "timm")}
    beyond = {who: [found / weights - 1 for found in values] for who, values in peaks.items()}
    waits = [inspect - torch_alone for inspect, torch_alone in zip(whole["inspect"], whole["torch"], strict=True)]
    write_result(
        "weights_load",
        "Loading a ResNet-50 is not slower than timm, and holds the weights once beside the network",
        {
            "`isthmus.load(file)` / timm.create_model + load_state_dict": {
                **spread(ratios(seconds["load"], seconds["timm"])),
                "target": "≤ 1",
            },
            '`isthmus.create("resnet50", weights=file)` / the same': {
                **spread(ratios(seconds["create"], seconds["timm"])),
                "target": "≤ 1",
            },
            "`isthmus.load(file)`": {**spread(seconds["load"]), "unit": "s"},
            "timm.create_model + load_state_dict": {**spread(seconds["timm"]), "unit": "s"},
            "most memory of `isthmus.load` beyond the network, in weights": {
                **spread(beyond["isthmus"]),
                "target": "≤ 1.1",
            },
            "the same of timm.create_model + load_state_dict": spread(beyond["timm"]),
            "`isthmus weights inspect` of that file beyond `import torch`, whole processes": {
                **spread(waits),
                "unit": "s",
                "target": "≤ 2",
            },
        },
        note=(
            f"25.6 million parameters, {weights / 1e6:.0f} MB of safetensors in the page cache. Medians with minimum "
            "and maximum; rounds are interleaved and a ratio is taken round by round. Memory is the peak resident set "
            "of a process of its own, less what it held before, less the network itself."
        ),
    )


if __name__ == "__main__":
    main()
