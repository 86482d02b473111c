"""Weights from one library's names and format to another's, read back and compared before they count as written."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from isthmus.arch.spec import NetSpec
from isthmus.errors import RunError, WeightsError
from isthmus.nn.network import ResNet
from isthmus.weights import layouts
from isthmus.weights.compare import Agreement, TensorComparison, compare_logits, compare_tensors, pictures
from isthmus.weights.fit import LoadReport
from isthmus.weights.layout_tables import COUNTER
from isthmus.weights.load import create, load_weights, read_network
from isthmus.weights.save import check_place, makes_folder, save_weights
from isthmus.weights.source import open_source

__all__ = ["Conversion", "convert"]

TOLERANCE = 1e-6  # of the outputs in double precision, where a layout computes with the tensors in single


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was read and written, and the proof: the tensors read back, and outputs where their bits differ."""

    report: LoadReport
    path: Path
    layout: str
    tensors: TensorComparison
    agreement: Agreement | None
    notes: tuple[str, ...]


def convert(origin: str | Path, path: Path | str, layout: str, *, arch: str | NetSpec | None = None) -> Conversion:
    """Read weights, write them to `path` in the names of `layout`, and leave them there only if they read back equal.

    Equal is to the last bit, counters of batches aside; where the layout computes (norms without statistics, another
    epsilon), in the outputs up to rounding. Raises WeightsError or RunError, with `path` as it was.
    """
    path = Path(path)
    place = path.resolve()  # . has no name of its own
    check_place(path, layout)
    source = open_source(origin, None)
    if source.path is not None and place in (source.path.resolve(), source.path.resolve().parent):
        raise WeightsError(f"{path} is what is read, and was left as it is; name another place to write to")
    net, report = read_network(source, arch=arch)
    notes = []
    # What the source could not say stays an assumption, wherever the tensors go.
    extra = dict(source.extra, assumed=list(report.assumed)) if report.assumed else source.extra
    if makes_folder(path, layout) and layouts.has(layout, net.spec) and net.preprocess.channels == "BGR":
        _take_rgb(net)
        notes.append("pictures are RGB there: the first convolution, which took BGR, has its channels turned round")
    try:
        with tempfile.TemporaryDirectory(dir=place.parent, prefix=".isthmus-") as folder:
            written = Path(folder) / place.name
            notes += save_weights(net, written, layout=layout, extra=extra)
            again = _read_back(net, written, layout)
            tensors = compare_tensors(net.state_dict(), again.state_dict())
            if lost := [name for name in tensors.different if name.endswith(COUNTER)]:
                notes.append(f"{len(lost)} counters of batches, which only training reads, are not kept")
                tensors = compare_tensors(_learnt(net), _learnt(again))
            agreement = None if tensors.same else _outputs(net, again)
            if agreement is not None and not agreement.equal:
                raise WeightsError(
                    f"{path} was not written: read back, its outputs differ by {agreement.relative:.1e} from those of "
                    f"{report.source}, and {layout} should keep them to {agreement.tolerance:.0e}; use --to native"
                )
            _move(written, place)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror or error}; nothing was changed") from error
    return Conversion(report=report, path=path, layout=layout, tensors=tensors, agreement=agreement, notes=tuple(notes))


def _take_rgb(net: ResNet) -> None:
    """Turn round the input channels of a network that takes BGR, and its preprocessing with them."""
    record, first = net.preprocess, net.get_parameter("conv1.weight")
    first.data = first.data.flip(1)
    net.preprocess = replace(record, channels="RGB", mean=record.mean[::-1], std=record.std[::-1])


def _read_back(net: ResNet, path: Path, layout: str) -> ResNet:
    """What was written, as a reader finds it; into the same network where the format cannot name it."""
    if path.is_dir() or path.suffix == ".safetensors":
        return read_network(path)[0]
    again = create(net.spec).eval()
    load_weights(again, path, layout=layout)
    return again


def _learnt(net: ResNet) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in net.state_dict().items() if not name.endswith(COUNTER)}


def _outputs(net: ResNet, again: ResNet) -> Agreement:
    spec = net.spec
    batch = pictures(net.preprocess, spec.in_channels, spec.dims)
    return compare_logits(net, again.double(), batch, precision=torch.float64, tolerance=TOLERANCE)


def _move(written: Path, path: Path) -> None:
    """Put a file, or each file of a folder, in its place."""
    if not written.is_dir():
        written.replace(path)
        return
    path.mkdir(exist_ok=True)
    for file in sorted(written.iterdir()):
        file.replace(path / file.name)
