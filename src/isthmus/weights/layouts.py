"""Names of tensors in other libraries, both ways: one engine for the tables of `layout_tables`.

Ours are those of timm's resnet.py and of torchvision. What another library computes otherwise with the same function
(biases before a norm, norms without statistics, another epsilon) is worked out exactly in double precision, and said.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from isthmus.arch.block import Layer
from isthmus.arch.plan import Plan, plan
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec, NetSpec
from isthmus.errors import WeightsError
from isthmus.weights.layout_tables import ELASTIC, LAYOUTS, Layout, made_of

__all__ = [
    "LAYOUTS", "Layout", "Match", "Pair", "Translated", "carriers", "detect", "evidence", "from_native", "has",
    "modules", "pairs", "preprocess_of", "to_native", "weight_keys",
]  # fmt: skip

PLACE = re.compile(r"\{(\w+)([+-]\d)?\}")


class Pair(NamedTuple):
    """A module under our name and under theirs, of which the first is written and all are read."""

    native: str
    foreign: tuple[str, ...]
    kind: str
    biased: bool


class Translated(NamedTuple):
    """Tensors under other names, and sentences on what was worked out on the way."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """How many of a file's tensors a layout has a name for, and whether a stem and a block are among them."""

    layout: str
    named: int
    total: int
    whole: bool

    def __str__(self) -> str:
        return f"{self.layout} ({self.named} of {self.total} names)"


def evidence(keys: Iterable[str]) -> tuple[Match, ...]:
    """Every layout that a state dict's keys may be in, the likeliest first; layouts with our names are `native`."""
    every = list(keys)
    matches = []
    for layout in LAYOUTS.values():
        if layout.same_names and layout.name != "native":
            continue
        known = _known_keys(layout.name)
        found = [match.lastgroup for key in every if (match := known.fullmatch(key))]
        whole = "stem" in found and "block" in found
        matches.append(Match(layout.name, len(found), len(every), whole))
    return tuple(sorted(matches, key=lambda match: (-match.whole, -match.named)))


def detect(keys: Iterable[str]) -> str:
    """The layout that a state dict's keys are in.

    Raises WeightsError where none names half of them, a stem and a block among them, or where two name as many; ours
    then wins, as it asks for no translation.
    """
    best, second, *_ = matches = evidence(every := list(keys))
    if not best.whole or 2 * best.named < best.total:
        raise WeightsError(
            f"the names of these {len(every)} tensors are in no layout known here ({', '.join(LAYOUTS)}): "
            f"{', '.join(every[:4])}, …; rename them, or load the network they come from and pass it as it is"
        )
    if second.whole and second.named == best.named and best.layout != "native":
        equal = [str(match) for match in matches if match.whole and match.named == best.named]
        raise WeightsError(
            f"the names of these {len(every)} tensors may be in the layouts {', '.join(equal)}; say which: "
            f"layout={best.layout!r}"
        )
    return best.layout


def to_native(tensors: Mapping[str, Tensor], layout: str, spec: NetSpec) -> Translated:
    """Tensors of a foreign layout under our names; those without a rule keep theirs.

    Raises WeightsError where the layout has no such network, or two tensors are one of ours.
    """
    table = _layout(layout)
    _check_carries(table, spec, but=ELASTIC)
    if table.same_names:
        return Translated(dict(tensors), ())
    net = plan(replace(spec, head=HeadSpec(), num_classes=spec.num_classes or 1))  # a file may have a head of its own
    every = _pairs(table, net)
    back = {
        foreign + suffix: (pair, leaf)
        for pair in every
        for foreign in pair.foreign
        for leaf, suffixes in table.leaves[pair.kind].items()
        for suffix in _each(suffixes)
    }
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        pair, leaf = back.get(_bare(key, table), (None, ""))
        name = f"{pair.native}.{leaf}" if pair else key
        if name in renamed:
            raise WeightsError(f"two tensors are {name} in layout {layout}, one of them {key}; leave one out")
        renamed[name] = _as_ours(tensor, pair.kind, table) if pair and leaf == "weight" else tensor
    norms = [pair.native for pair in every if pair.kind == "norm"]
    notes = []
    completed = _complete_statistics(renamed, norms, spec.norm_eps) if table.affine_norms else 0
    if completed:
        notes.append(
            f"{completed} norms are a scale and a shift: mean 0 and variance 1 - {spec.norm_eps:g} make them so"
        )
    if folded := _fold_biases(renamed, net):
        notes.append(f"biases of {folded} convolutions taken off the means of the norms that read them")
    if table.norm_eps is not None and not completed:
        notes += _change_epsilon(renamed, norms, table.norm_eps, spec.norm_eps)
    return Translated(renamed, tuple(notes))


def from_native(tensors: Mapping[str, Tensor], layout: str, spec: NetSpec) -> Translated:
    """Our tensors under a foreign layout's names: the rules of `to_native` backwards.

    Raises WeightsError where the layout cannot hold them, naming those that can.
    """
    table = _layout(layout)
    _check_carries(table, spec)
    if table.same_names:
        return Translated(dict(tensors), ())
    by_name = {pair.native: pair for pair in _pairs(table, plan(spec))}
    norms = [pair.native for pair in by_name.values() if pair.kind == "norm"]
    ours, notes = dict(tensors), list[str]()
    if table.affine_norms:
        if folded := _fold_statistics(ours, norms, spec.norm_eps):
            notes.append(f"statistics of {folded} norms are part of their scale and shift, and not kept apart")
    elif table.norm_eps is not None:
        notes += _change_epsilon(ours, norms, spec.norm_eps, table.norm_eps)
    prefix = table.prefix if spec.num_classes else ""
    renamed: dict[str, Tensor] = {}
    for key, tensor in ours.items():
        module, _, leaf = key.rpartition(".")
        if module not in by_name:
            raise WeightsError(f"layout {layout} has no name for {key}; use layout='native'")
        pair = by_name[module]
        start = pair.foreign[0] if pair.kind == "linear" else prefix + pair.foreign[0]
        suffixes = table.leaves[pair.kind]
        if leaf not in suffixes:
            continue  # counters of batches, which training alone reads
        renamed[start + _each(suffixes[leaf])[0]] = _as_theirs(tensor, pair.kind, table) if leaf == "weight" else tensor
        if pair.biased:
            renamed[start + _each(suffixes["bias"])[0]] = tensor.new_zeros(tensor.shape[0])
    return Translated(_in_order(renamed, table.block_order), tuple(notes))


def pairs(layout: str, spec: NetSpec) -> tuple[Pair, ...]:
    """Every convolution, norm and classifier of a network with its names in a layout; raises WeightsError."""
    return _pairs(_layout(layout), plan(spec))


def modules(net: Plan) -> Iterator[tuple[str, Layer, int]]:
    """Convolutions, norms and classifiers by our name, each with the number of pools in its block's shortcut."""
    for layer in (*net.stem, *net.tail, *net.head):
        if layer.kind in ("conv", "norm", "linear"):
            yield layer.name, layer, 0
    for block in net.blocks:
        pools = sum(layer.kind == "avgpool" and layer.kernel > 1 for layer in block.spec.downsample)
        for layer in (*block.spec.main, *block.spec.downsample):
            if layer.kind in ("conv", "norm"):
                yield f"{block.name}.{layer.name}", layer, pools


def weight_keys(layout: str, *modules: str) -> tuple[str, ...]:
    """Every key under which a layout may keep the weight of one of these modules, as `conv1` or `fc`."""
    table = LAYOUTS[layout]
    return tuple(
        prefix + theirs + _each(table.leaves[kind]["weight"])[0]
        for kind, names in table.modules.items()
        for module in modules
        if module in names
        for theirs in _each(names[module])
        for prefix in ("", *_prefixes(table))
    )


def carriers(spec: NetSpec) -> tuple[str, ...]:
    """The layouts whose libraries have a network."""
    return tuple(layout for layout in LAYOUTS if has(layout, spec))


def has(layout: str, spec: NetSpec) -> bool:
    """Whether the library of a layout has a network."""
    return not _refused(_layout(layout), made_of(spec))


def preprocess_of(layout: str, spec: NetSpec) -> Preprocess | None:
    """The preprocessing that all published weights of a layout share, if there is one; not of grouped networks."""
    grouped = any(stage.groups > 1 for stage in spec.stages)
    return None if grouped else _layout(layout).preprocess


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise WeightsError(f"there is no layout {name!r}; known: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _refused(table: Layout, facts: Mapping[str, tuple[object, ...]], but: tuple[str, ...] = ()) -> list[str]:
    """What a library does not have of a network's properties, as sentences."""
    return [
        f"{name} is {value} here and {' or '.join(map(str, table.can[name]))} there"
        for name, values in facts.items()
        for value in values
        if name in table.can and name not in but and value not in table.can[name]
    ]


def _check_carries(table: Layout, spec: NetSpec, but: tuple[str, ...] = ()) -> None:
    if refused := _refused(table, made_of(spec), but):
        raise WeightsError(
            f"layout {table.name} has no network like {spec.name or 'this one'}: {'; '.join(refused[:3])}; layouts "
            f"that have: {', '.join(carriers(spec))}"
        )


def _pairs(table: Layout, net: Plan) -> tuple[Pair, ...]:
    deep = table.deep_stem if len(net.spec.stem.widths) > 1 else {}
    found = []
    for name, layer, pools in modules(net):
        for ours, theirs in (*deep.items(), *table.modules[layer.kind].items()):
            if (places := _places(ours, name)) is not None:
                foreign = tuple(_filled(template, places | {"pools": pools}) for template in _each(theirs))
                biased = layer.kind == "conv" and any(_places(each, name) is not None for each in table.biased)
                found.append(Pair(name, foreign, layer.kind, biased))
                break
    return tuple(found)


def _each(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


@cache
def _pattern(template: str, *, capture: bool = True) -> re.Pattern[str]:
    """A template as a regular expression that captures its numbers by name."""
    pattern, end = "", 0
    for place in PLACE.finditer(template):
        pattern += re.escape(template[end : place.start()]) + (rf"(?P<{place[1]}>\d+)" if capture else r"\d+")
        end = place.end()
    return re.compile(pattern + re.escape(template[end:]))


def _places(template: str, name: str) -> dict[str, int] | None:
    """The numbers of a template in a name of its form; None for another form."""
    match = _pattern(template).fullmatch(name)
    if match is None:
        return None
    return {place[1]: int(match[place[1]]) - int(place[2] or 0) for place in PLACE.finditer(template)}


def _filled(template: str, places: Mapping[str, int]) -> str:
    return PLACE.sub(lambda place: str(places[place[1]] + int(place[2] or 0)), template)


def _prefixes(table: Layout) -> tuple[str, ...]:
    return tuple(prefix for prefix in (table.prefix, *table.read_prefixes) if prefix)


def _bare(key: str, table: Layout) -> str:
    prefix = next((prefix for prefix in _prefixes(table) if key.startswith(prefix)), "")
    return key.removeprefix(prefix)


@cache
def _known_keys(name: str) -> re.Pattern[str]:
    """Every key of a layout as one regular expression; its group says whether it is of a stem, a block or neither."""
    table = LAYOUTS[name]
    keys: dict[str, list[str]] = {"stem": [], "block": [], "other": []}
    for kind, modules in table.modules.items():
        leaves = "|".join(re.escape(suffix) for suffixes in table.leaves[kind].values() for suffix in _each(suffixes))
        for ours, theirs in (*modules.items(), *(table.deep_stem.items() if kind == "norm" else ())):
            convolution = kind == "conv" and "downsample" not in ours
            part = "stem" if convolution and ours.startswith("conv1") else "block" if convolution else "other"
            keys[part] += [f"{_pattern(template, capture=False).pattern}(?:{leaves})" for template in _each(theirs)]
    prefixes = "|".join(map(re.escape, _prefixes(table)))
    parts = "|".join(f"(?P<{part}>{'|'.join(patterns)})" for part, patterns in keys.items())
    return re.compile(f"(?:{prefixes})?(?:{parts})")


def _as_ours(weight: Tensor, kind: str, table: Layout) -> Tensor:
    """A weight as we lay it out: (out, in, *size), and (classes, in) for a classifier."""
    if table.channels_last and kind in ("conv", "linear"):
        return weight.movedim((-1, -2), (0, 1)).contiguous()
    return weight.flatten(1) if table.classifier_is_conv and kind == "linear" else weight


def _as_theirs(weight: Tensor, kind: str, table: Layout) -> Tensor:
    if table.channels_last and kind in ("conv", "linear"):
        return weight.movedim((0, 1), (-1, -2)).contiguous()
    return weight[:, :, None, None] if table.classifier_is_conv and kind == "linear" else weight


def _in_order(tensors: dict[str, Tensor], order: tuple[str, ...]) -> dict[str, Tensor]:
    """Tensors with each block's in an order of their modules' endings; Keras reads a file by order alone."""
    blocks: dict[str, int] = {}

    def place(key: str) -> tuple[int, int]:
        module = key.rpartition("/")[0]
        rank = next((rank for rank, ending in enumerate(order) if module.endswith(ending)), None)
        block = module if rank is None else module.removesuffix(order[rank])
        return blocks.setdefault(block, len(blocks)), rank or 0

    return {key: tensors[key] for key in sorted(tensors, key=place)} if order else tensors


def _complete_statistics(tensors: dict[str, Tensor], norms: Iterable[str], eps: float) -> int:
    """Give norms that are a scale and a shift the statistics that make batch norm that; how many there were."""
    count = 0
    for norm in norms:
        scale = tensors.get(f"{norm}.weight")
        if scale is None or f"{norm}.running_mean" in tensors or f"{norm}.running_var" in tensors:
            continue
        tensors[f"{norm}.running_mean"] = torch.zeros_like(scale)
        tensors[f"{norm}.running_var"] = torch.full_like(scale, 1 - eps)
        count += 1
    return count


def _fold_statistics(tensors: dict[str, Tensor], norms: Iterable[str], eps: float) -> int:
    """Make norms that have statistics a scale and a shift; how many there were."""
    found = [norm for norm in norms if f"{norm}.running_mean" in tensors]
    for norm in found:
        weight, bias = tensors[f"{norm}.weight"], tensors[f"{norm}.bias"]
        mean, var = tensors.pop(f"{norm}.running_mean"), tensors.pop(f"{norm}.running_var")
        scale = weight.double() / (var.double() + eps).sqrt()
        tensors[f"{norm}.weight"] = scale.to(weight.dtype)
        tensors[f"{norm}.bias"] = (bias.double() - mean.double() * scale).to(bias.dtype)
    return len(found)


def _change_epsilon(tensors: dict[str, Tensor], norms: Iterable[str], there: float, here: float) -> tuple[str, ...]:
    """Shift variances so that norms of another epsilon compute the same; a note where there was any."""
    changed = [key for norm in norms if there != here and (key := f"{norm}.running_var") in tensors]
    for key in changed:
        tensors[key] = (tensors[key].double() + (there - here)).to(tensors[key].dtype)
    return (
        (f"variances of {len(changed)} norms changed by {there - here:.3g}, for epsilon {here:g}",) if changed else ()
    )


def _fold_biases(tensors: dict[str, Tensor], net: Plan) -> int:
    """Take biases that our convolutions lack off the means of the norms that read them; how many there were.

    A pre-activation block adds the bias of its last convolution and of its shortcut's to the stream, whence it reaches
    the norms further on, up to the next convolution in a shortcut; a pool in a shortcut lets it through. A bias that no
    norm reads stays, for which there is no place.
    """
    biases = {
        name: tensors[key]
        for name, layer, _ in modules(net)
        if layer.kind == "conv" and not layer.bias and (key := f"{name}.bias") in tensors
    }
    if not biases:
        return 0
    folded: list[str] = []

    def take(name: str) -> Tensor | float:
        if name not in biases:
            return 0.0
        folded.append(name)
        return tensors.pop(f"{name}.bias").double()

    def shift(norm: str, offset: Tensor | float) -> None:
        mean = tensors.get(key := f"{norm}.running_mean")
        if mean is not None and not mean.is_meta:  # torch would import its compiler (seconds) to compute nothing
            tensors[key] = (mean.double() - offset).to(mean.dtype)

    def fold(path: str, layers: tuple[Layer, ...]) -> None:
        for layer, reader in pairwise(layers):
            if layer.kind == "conv" and reader.kind == "norm":
                shift(path + reader.name, take(path + layer.name))

    fold("", net.stem)
    stream: Tensor | float = 0.0
    for block in net.blocks:
        path, main, downsample = f"{block.name}.", block.spec.main, block.spec.downsample
        fold(path, main)
        fold(path, downsample)
        if net.spec.preact:
            shift(path + main[0].name, stream)
            if any(layer.kind == "conv" for layer in downsample):
                stream = 0.0
            for layer in (*downsample, main[-1]):
                stream = stream + take(path + layer.name)
    shift("norm", stream)
    return len(folded)
