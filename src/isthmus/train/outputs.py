"""What a frozen prefix makes of each picture in each way it can be seen: computed once, kept on the disk."""

import hashlib
import inspect
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from isthmus import records
from isthmus.arch.preprocess import Preprocess
from isthmus.arch.spec import HeadSpec
from isthmus.cache import cache_folder
from isthmus.data.augment import VIEWS, Augment, altered
from isthmus.data.loader import Batch, Loader
from isthmus.data.order import earlier, sample_generator
from isthmus.data.pictures import Pictures
from isthmus.data.transform import normalise
from isthmus.nn.layers import DropPath
from isthmus.nn.network import ResNet
from isthmus.runtime import versions
from isthmus.train.prefix import Given, Prefix
from isthmus.train.reporter import Reporter
from isthmus.train.rows import Rows
from isthmus.weights.digest import add_tensors

__all__ = ["Computed", "PrefixOutputs", "fingerprint", "turns_of", "turns_of_views"]

CHUNK = 32
"""Pictures that go through the prefix at once: always so many, because the last bits of some kernels' results depend
on the number, though never on the other pictures or on the place among them."""

AHEAD = 4096
"""Rows that are looked for at once: a first batch does not wait for the whole of a large set."""

TURNS = [(mirrored, quarters) for mirrored in (False, True) for quarters in range(4)]
"""The eight ways to lay down a square: mirrored or not, then turned by so many quarters."""


def turned(images: Tensor, turn: int) -> Tensor:
    """Pictures (…, H, W) in one of TURNS."""
    mirrored, quarters = TURNS[turn]
    return torch.rot90(images.flip(-1) if mirrored else images, quarters, (-2, -1))


_CORNERS = torch.arange(4, dtype=torch.uint8).view(1, 2, 2)
_LOOKS = {tuple(turned(_CORNERS, turn).flatten().tolist()): turn for turn in range(len(TURNS))}


def turn_of(corners: Tensor) -> int:
    """Which of TURNS made this of _CORNERS."""
    return _LOOKS[tuple(corners.flatten().tolist())]


def turns_of_views(views: Sequence[str]) -> tuple[int, ...]:
    """The turns that these names of VIEWS stand for."""
    return tuple(turn_of(VIEWS[name](_CORNERS)) for name in views)


def turns_of(augment: Augment) -> tuple[int, ...]:
    """Every turn in which training may see a picture; none where it sees it in more ways than these."""
    flips = replace(Augment(crop_scale=()), hflip=augment.hflip, vflip=augment.vflip, rotate90=augment.rotate90)
    if augment != replace(flips, repeats=augment.repeats):
        return ()
    chances = product(range(1 + augment.hflip), range(1 + augment.vflip), range(4 if augment.rotate90 else 1))
    flipped = ((_CORNERS.flip([-1] * across + [-2] * down), quarters) for across, down, quarters in chances)
    return tuple(sorted({turn_of(torch.rot90(corners, quarters, (-2, -1))) for corners, quarters in flipped}))


@dataclass(frozen=True, kw_only=True, slots=True)
class Computed(Batch):
    """A batch whose pictures went through the prefix already: `images` is empty, `given` what the network takes."""

    given: Given


class PrefixOutputs:
    """Outputs of a prefix for `pictures` under `record`, in the turns `seen`: a row is one picture in one turn.

    They are kept in the cache, by layers, weights, preprocessing, precision, machine and pictures, and have the same
    bits whether they are read or computed, and in whatever company. None are kept where `fingerprint` gives None.
    """

    def __init__(
        self,
        net: ResNet,
        prefix: Prefix,
        pictures: Pictures,
        record: Preprocess,
        seen: Sequence[int],
        reporter: Reporter,
    ) -> None:
        self.prefix, self.record, self.seen = prefix, record, tuple(seen)
        self.sorted = np.array(
            sorted(range(len(pictures)), key=pictures.name)
        )  # another order of theirs is no other key
        self.place, self.pictures = np.argsort(self.sorted), pictures.subset(self.sorted)
        self.map, self.taps = prefix.shapes(record)
        self.wide = torch.promote_types(prefix.dtype, torch.float32)
        width = (
            math.prod(self.map) * prefix.dtype.itemsize * bool(self.map) + sum(self.taps.values()) * self.wide.itemsize
        )
        key = fingerprint(net, prefix, self.pictures, record, self.seen)
        what = f"the outputs of {prefix.after} for {len(pictures)} pictures in {len(self.seen)} turns"
        count = len(pictures) * len(self.seen)
        path = cache_folder("features") / f"{key}.rows" if key else None
        self.rows = Rows(path, count, width, what, reporter)

    @classmethod
    def where_possible(cls, net: ResNet, prefix: Prefix, loader: Loader, reporter: Reporter) -> "PrefixOutputs | None":
        """Those for a training loader; None where there is no prefix, pictures have too many looks or none is kept."""
        seen = turns_of(loader.augment) if loader.augment and loader.on_error == "raise" else ()
        if not prefix.after or not seen:
            return None
        record = loader.record.at(loader.size) if loader.size else loader.record
        made = cls(net, prefix, loader.pictures, record, seen, reporter)
        return made if made.rows.path else None

    def compute(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Rows and their bytes (n, width), in the order given, kept where there is room."""
        places, turns = np.divmod(rows, len(self.seen))
        first = np.flatnonzero(np.diff(places, prepend=-1))  # a picture in several turns is decoded once
        groups = np.split(turns, first[1:])
        chosen = self.pictures.subset(places[first])
        loader = Loader(pictures=chosen, record=self.record, batch_size=CHUNK, train=False)
        waiting: list[Tensor] = []
        done = 0
        for batch in loader.epoch(0):
            for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
                waiting += [turned(image, self.seen[turn]) for turn in groups[index]]
            while len(waiting) >= CHUNK or (waiting and batch.step == loader.steps - 1):
                values = self._run(waiting[:CHUNK])
                del waiting[:CHUNK]
                these = rows[done : done + len(values)]
                for row, value in zip(these.tolist(), values, strict=True):
                    self.rows.write(row, value)
                yield these, values
                done += len(values)

    def _run(self, images: list[Tensor]) -> NDArray[np.uint8]:
        rows = [image.permute(1, 2, 0) for image in (*images, *images[-1:] * (CHUNK - len(images)))]
        x = normalise(torch.stack(rows).permute(0, 3, 1, 2).to(self.prefix.device), self.record)
        given = self.prefix(x)
        parts = [given.known[tap].contiguous() for tap in self.taps]
        if self.map:
            parts.append(given.images.permute(0, 2, 3, 1).contiguous())
        return np.concatenate(
            [part[: len(images)].flatten(1).view(torch.uint8).cpu().numpy() for part in parts], axis=1
        )

    def given(self, values: NDArray[np.uint8]) -> Given:
        """Rows' bytes (N, width) as what the network takes, on its device."""
        whole, start, known = torch.from_numpy(values), 0, {}
        for tap, width in self.taps.items():
            end = start + width * self.wide.itemsize
            known[tap] = whole[:, start:end].contiguous().view(self.wide).to(self.prefix.device)
            start = end
        images = torch.empty(len(values), 0)
        if self.map:
            channels, *size = self.map
            images = whole[:, start:].contiguous().view(self.prefix.dtype).view(-1, *size, channels).permute(0, 3, 1, 2)
        return Given(images.to(self.prefix.device), self.prefix.after, known)

    def all(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
        """Every row with its bytes, those that are kept before the others, which are computed."""
        rows = np.arange(len(self.sorted) * len(self.seen))
        there = self.rows.have(rows)
        kept = rows[there]
        for start in range(0, len(kept), AHEAD):
            some = kept[start : start + AHEAD]
            yield some, self.rows.read(some)
        if not there.all():
            yield from self.compute(rows[~there])

    def batches(self, loader: Loader, epoch: int, start_step: int = 0) -> Iterator[Computed]:
        """The batches of `loader`, which augments by turns alone, with what the prefix makes of their pictures.

        A row is computed when it first comes, so no picture is decoded again once all are there.
        """
        if (augment := loader.augment) is None:
            raise TypeError(loader)
        order = loader.order(epoch)
        copies = earlier(order)
        corners, places = _CORNERS.permute(1, 2, 0).numpy(), {turn: place for place, turn in enumerate(self.seen)}

        def row_at(place: int) -> int:
            random = sample_generator(loader.seed, epoch, int(order[place]), int(copies[place]))
            turn = turn_of(altered(corners, augment, self.record, random))
            return int(self.place[order[place]]) * len(self.seen) + places[turn]

        labels, steps = torch.from_numpy(loader.pictures.labels), max(AHEAD * loader.ranks // loader.step_size, 1)
        for begin in range(start_step, loader.steps, steps):
            parts = [part for step in range(begin, min(begin + steps, loader.steps)) for part in loader.parts(step)]
            wanted = [np.array([row_at(place) for place in range(part.start, part.stop)]) for part in parts]
            for part, values in zip(parts, self._in_order(wanted), strict=True):
                indices = torch.from_numpy(order[part.start : part.stop])
                yield Computed(
                    step=part.step,
                    part=part.part,
                    parts=part.parts,
                    images=torch.empty((len(indices), 0), dtype=torch.uint8),
                    labels=labels[indices],
                    indices=indices,
                    given=self.given(values),
                )

    def _in_order(self, wanted: list[NDArray[np.int64]]) -> Iterator[NDArray[np.uint8]]:
        """The bytes of rows, part by part. Few wait in memory, though there may be no place for any on the disk."""
        coming = np.concatenate(wanted)
        _, first = np.unique(coming, return_index=True)
        once = coming[np.sort(first)]
        once = once[~self.rows.have(once)]
        stream, due = self.compute(once), set(once.tolist())
        waiting: dict[int, NDArray[np.uint8]] = {}  # rows that have no place on the disk, until they are used
        for rows in wanted:
            while lacking := [row for row in rows[~self.rows.have(rows)].tolist() if row not in waiting]:
                # One that was used before is computed again, alone: the stream holds what is still to come.
                gone = [row for row in lacking if row not in due]
                found, values = next(self.compute(np.unique(gone)) if gone else stream)
                due.difference_update(found.tolist())
                kept = self.rows.have(found)
                waiting |= {row: value for row, value, on in zip(found.tolist(), values, kept, strict=True) if not on}
            there = self.rows.have(rows)
            values = np.empty((len(rows), self.rows.width), np.uint8)
            if there.any():
                values[there] = self.rows.read(rows[there])
            for place in np.flatnonzero(~there).tolist():
                values[place] = waiting[int(rows[place])]
            for row in rows[~there].tolist():
                waiting.pop(row, None)
            yield values


SETTINGS = (int, float, str, tuple, list)
FREE = {"training", "inplace", "in_place", "memory"}
"""Settings of modules that decide how they work, not what they give in evaluation."""


def described(net: ResNet, parts: set[str]) -> list[str]:
    """Class and settings of each module in `parts`, and the files that define classes of the caller's own.

    Raises OSError or TypeError where there is no such file, as for what was typed into an interpreter, and for a class
    made in a function, whose variables it may use.
    """
    found, own = [], set()
    for name, module in net.named_modules():
        if name.partition(".")[0] not in parts or type(module) in (nn.Identity, DropPath):
            continue
        # These two files have classes that do in evaluation what their bases do.
        kinds = [k for k in type(module).__mro__ if k.__module__ not in ("isthmus.nn.batchnorm", "isthmus.nn.memory")]
        settings = [(k, v) for k, v in sorted(vars(module).items()) if isinstance(v, SETTINGS) and k not in FREE]
        found.append(f"{name}: {kinds[0].__module__}.{kinds[0].__qualname__} {settings}")
        own |= {kind for kind in kinds if kind.__module__.partition(".")[0] not in ("isthmus", "torch", "builtins")}
    if made := [kind.__qualname__ for kind in own if "<locals>" in kind.__qualname__]:
        raise TypeError(made[0])
    # The whole file, because a class may use what stands beside it.
    return found + sorted({"".join(inspect.findsource(kind)[0]) for kind in own})


def fingerprint(net: ResNet, prefix: Prefix, pictures: Pictures, record: Preprocess, seen: Sequence[int]) -> str | None:
    """A hash of all that decides the outputs: the network as far as it is run, its weights, machine, pictures.

    None where the code of a layer, which decides as well, is not to be had: see `described`.
    """
    depth = net.stages.index(prefix.after) + 1 if prefix.after in net.stages else 0
    parts = {"conv1", "bn1", "act1", "maxpool", *net.stages[:depth]}
    parts |= {"norm", "act"} if "last" in prefix.taps else set()
    try:
        modules = described(net, parts)
    except (OSError, TypeError):
        return None
    spec = replace(
        net.spec, head=HeadSpec(), num_classes=0, drop_path=0.0, name="", stages=net.spec.stages[: max(depth, 1)]
    )
    facts = {
        "spec": records.to_dict(spec),
        "modules": modules,
        "reads": [prefix.after, prefix.needs_map, prefix.taps, net.spec.head.pools],
        "preprocess": records.to_dict(replace(record, views=("identity",))),
        "turns": seen,
        "precision": str(prefix.dtype),
        "machine": prefix.machine,
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(facts).encode())
    for index in range(len(pictures)):
        digest.update(json.dumps(pictures.identity(index)).encode())
    add_tensors(digest, ((key, value) for key, value in net.state_dict().items() if key.partition(".")[0] in parts))
    return digest.hexdigest()[:32]
