"""Commands about weight files: what is in one, other names for it, proof, and the published ones."""

import json
import sys
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.markup import escape

from isthmus import records
from isthmus.cli.options import Json
from isthmus.errors import WeightsError
from isthmus.messages import listed
from isthmus.report.tables import console, count, print_facts, print_report, print_table

if TYPE_CHECKING:
    from isthmus.weights.compare import Agreement, TensorComparison
    from isthmus.weights.inspect import Inspection
    from isthmus.weights.published.catalog import Record
    from isthmus.weights.verify import Verification

__all__ = ["convert", "inspect", "list_weights", "verify"]

SHOWN = 5  # names in a row of names

Facts = list[tuple[str, str]]
"""Lines of a label and what it says."""

Weights = Annotated[
    str, Parameter(help="A file, a run or other folder, a URL, hf:owner/name, or a name from `isthmus weights list`.")
]
Arch = Annotated[
    str | None,
    Parameter(help="The network, where the weights do not say it: a name from `isthmus models`, or a TOML file."),
]


def inspect(weights: Weights, *, values: bool = False, as_json: Json = False) -> None:
    """Show what a weight file holds and what looks wrong with it.

    Parameters
    ----------
    values
        Look at every number too, not at names and shapes alone.
    """
    from isthmus.weights.inspect import inspect_weights

    found = inspect_weights(weights, values=values)
    if as_json:
        document = dict.fromkeys(found.__dataclass_fields__) | records.to_dict(found)
        print(json.dumps(document, indent=2))  # noqa: T201
        return
    print_facts(found.source, inspection_facts(found))
    for finding in found.findings:
        console.print(f"[yellow]warning[/] {escape(str(finding))}")
    if not found.values:
        console.print("[dim]The numbers themselves were not looked at; --values does.[/]")
    elif not found.findings:
        console.print("Nothing looks wrong.")


def convert(
    weights: Weights, out: Path, *, to: str, arch: Arch = None, push: str | None = None, as_json: Json = False
) -> None:
    """Write weights under the names of another library, and prove that they read back the same.

    Parameters
    ----------
    out
        A file ending in .safetensors, .pth, .pkl or .h5; with --to transformers also a folder as the Hugging Face hub
        has it: config, preprocessing, weights and model card.
    to
        native, torchvision, timm, timm_resnetv2, transformers, detectron2, detectron2_msra, mmpretrain, keras or
        keras_v2.
    push
        Where on the Hugging Face hub to upload the folder, as owner/name.
    """
    from isthmus.weights.convert import convert as write
    from isthmus.weights.published.hf_folder import check_repo
    from isthmus.weights.published.hf_folder import push as upload
    from isthmus.weights.save import makes_folder

    if push is not None:
        check_repo(push)
        if not makes_folder(out, to):
            raise WeightsError(
                f"{out} is no folder as the hub keeps it, so it was not written; --push is for --to transformers"
            )
    done = write(weights, out, to, arch=arch)
    if not as_json:
        print_report(str(done.report))
        facts = [*tensor_facts(done.tensors), *output_facts(done.agreement), *(("note", note) for note in done.notes)]
        print_facts(f"{done.path} ({done.layout}), read back", facts)
    address = None if push is None else upload(out, push)
    if as_json:
        document = {
            "path": str(done.path),
            "layout": done.layout,
            "tensors": comparison_values(done.tensors),
            "outputs": agreement_values(done.agreement),
            "notes": list(done.notes),
            "pushed": address,
        }
        print(json.dumps(document, indent=2))  # noqa: T201
    elif address is not None:
        console.print(f"pushed to {escape(address)}", soft_wrap=True)


def verify(
    weights: Weights,
    *,
    against: str | None = None,
    pictures: Path | None = None,
    arch: Arch = None,
    as_json: Json = False,
) -> None:
    """Compare the outputs of weights with those of the library they are from, or of other weights.

    The exit status is 0 where they are equal up to rounding, 1 where they differ, 2 where nothing could be compared.

    Parameters
    ----------
    against
        Other weights. Without them: the library whose names they have, filled with the same tensors.
    pictures
        A folder of pictures to compare on; drawn ones unless given.
    """
    from isthmus.weights.verify import verify as compare

    found = compare(weights, against=against, folder=pictures, arch=arch)
    if as_json:
        print(json.dumps(verification_values(found), indent=2))  # noqa: T201
    else:
        print_facts("equal" if found.agreement.equal else "different", verification_facts(found))
    if not found.agreement.equal:
        sys.exit(1)


def list_weights(pattern: str = "*", *, as_json: Json = False) -> None:
    """List published weights.

    Parameters
    ----------
    pattern
        A part of the name, a shell pattern such as 'torchvision:*.v2', or a network.
    """
    from isthmus.weights.published.catalog import published

    found = published(pattern)
    rows = [record_values(record) for record in found]
    if not rows:
        raise WeightsError(f"no published weights match {pattern!r}; `isthmus weights list` lists all")
    if as_json:
        print(json.dumps(rows, indent=2))  # noqa: T201
        return
    if len(rows) == 1:
        print_facts(found[0].name, record_facts(found[0]))
        return
    print_table(
        f"{len(rows)} published weights",
        ("weights", "top-1", "licence"),
        (
            (
                row["name"],
                "" if row["top1"] is None else f"{row['top1']:.2f} %",
                row["licence"],
            )
            for row in rows
        ),
        note="Top-1 is accuracy on ImageNet-1k as published. `isthmus weights list NAME` tells all of one.",
    )


def inspection_facts(found: "Inspection") -> Facts:
    """What was found, a line each, in the order of a reader's questions."""
    kinds = ", ".join(f"{kind} ({many} tensors)" for kind, many in found.dtypes.items())
    facts = {
        "format": f"{found.format}, {count(found.bytes)}B",
        "layout": layout(found),
        "network": found.network or fits(found.candidates),
        "parameters": f"{found.parameters:,} in {found.tensors} tensors",
        "numbers": kinds,
        "classes": f"{len(found.classes)}: {listed(found.classes, SHOWN)}" if found.classes else "not named",
        "preprocessing": str(found.preprocess or "not said"),
        **{f"metadata {key}": shortened(text) for key, text in found.metadata.items() if key != "format"},
    }
    return [*facts.items(), *(("note", note) for note in found.notes)]


def layout(found: "Inspection") -> str:
    """Whose names the tensors have, how many of them, and who comes next."""
    if not found.evidence:
        return found.layout
    best, *others = (f"{match.layout} has {match.named}" for match in found.evidence)
    known = (
        f"{found.layout}: {best} of {found.tensors} names" if found.layout else f"unknown; the nearest, {best} names"
    )
    return "; next, ".join((known, *others))


def fits(candidates: tuple[str, ...]) -> str:
    """What the table says of names and shapes."""
    if not candidates:
        return "not said, and no network of the table has these names and shapes"
    return f"not said; names and shapes fit {listed(candidates, SHOWN)}"


def shortened(text: str) -> str:
    """A text that may be a document, at most a line of it."""
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def tensor_facts(found: "TensorComparison | None") -> Facts:
    """What two networks' tensors side by side came to."""
    if found is None:
        return []
    every = found.equal + len(found.different) + len(found.only_first)
    facts = [f"{found.equal} of {every} equal to the last bit"]
    if found.different:
        largest = f", by {found.largest:.1e} at most, in {found.where}" if found.where else ""
        facts.append(f"{len(found.different)} different{largest}")
    for which, only in (("first", found.only_first), ("second", found.only_second)):
        if only:
            facts.append(f"{len(only)} in the {which} alone: {listed(only, SHOWN)}")
    return [("tensors", fact) for fact in facts]


def output_facts(found: "Agreement | None") -> Facts:
    """How far the outputs of two networks are apart."""
    if found is None:
        return []
    allowed = f"{found.tolerance:.0e} is allowed, computed in {found.precision}"
    facts = [f"the same best class for {found.same_top1} of {found.pictures} pictures"]
    if isnan(found.difference):
        facts = ["not finite, which proves nothing; `isthmus weights inspect --values` tells where from"]
    elif found.difference:
        facts.append(
            f"largest difference {found.difference:.1e}: {found.relative:.1e} of the largest output; {allowed}"
        )
    else:
        facts.append(f"no difference; {allowed}")
    return [("outputs", fact) for fact in facts]


def verification_facts(found: "Verification") -> Facts:
    """What was compared and how it came out."""
    what = [("weights", found.source), ("against", found.against)]
    notes = [("note", note) for note in found.notes]
    return [*what, *tensor_facts(found.tensors), *output_facts(found.agreement), *notes]


def agreement_values(found: "Agreement | None") -> dict[str, Any] | None:
    """Outputs under the keys of our JSON."""
    return None if found is None else records.finite({"equal": found.equal, **records.to_dict(found)})


def comparison_values(found: "TensorComparison | None") -> dict[str, Any] | None:
    """Tensors under the keys of our JSON."""
    return None if found is None else records.finite({"same": found.same, **records.to_dict(found)})


def verification_values(found: "Verification") -> dict[str, Any]:
    """What was compared and how it came out, under the keys of our JSON."""
    return {
        "weights": found.source,
        "against": found.against,
        "equal": found.agreement.equal,
        "outputs": agreement_values(found.agreement),
        "tensors": comparison_values(found.tensors),
        "notes": list(found.notes),
    }


def record_values(record: "Record") -> dict[str, Any]:
    """A published file under the keys of our JSON."""
    from isthmus.arch.cost import cost

    place = record.place
    return {
        "name": record.name,
        "network": record.network or None,
        "params": None if record.spec is None else cost(record.spec).params,
        "classes": record.num_classes,
        "top1": record.top1,
        "top5": record.top5,
        "preprocess": records.to_dict(record.preprocess),
        "recipe": record.recipe,
        "licence": record.licence,
        "source": place if isinstance(place, str) else f"{place.file} of the package {place.package}",
        "sha256": record.sha256 or None,
        "note": record.note or None,
    }


def record_facts(record: "Record") -> Facts:
    """A published file, a line a fact."""
    row = record_values(record) | {"preprocess": record.preprocess}
    row["params"] = row["params"] and f"{row['params']:,}"
    for score in ("top1", "top5"):
        row[score] = row[score] and f"{row[score]} % of ImageNet-1k"
    return [(key, str(value)) for key, value in row.items() if value is not None and key != "name"]
