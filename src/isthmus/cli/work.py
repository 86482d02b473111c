"""Commands that train networks and use them."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.markup import escape

from isthmus.cli.options import Device, Json, Settings
from isthmus.errors import RecipeError
from isthmus.report.tables import console, print_table

__all__ = ["evaluate", "train"]


def train(
    *,
    data: str | None = None,
    weights: str | None = None,
    arch: str | None = None,
    freeze: str | None = None,
    recipe: str | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    epochs: int | None = None,
    batch_size: int | None = None,
    micro_batch: int | None = None,
    memory: Literal["plain", "checkpoint", "recompute"] | None = None,
    lr: float | None = None,
    image_size: int | None = None,
    head: str | None = None,
    val_fraction: float | None = None,
    seed: int | None = None,
    settings: Settings = (),
    report: bool = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train a network on your pictures and leave a run folder.

    Parameters
    ----------
    data
        A folder of class folders (or of train/ and val/), a .csv file of path,label, a folder or an address of tar
        shards, hf:NAME for a Hugging Face data set, or elpv.
    weights
        Where to start: demo, a weight file, or a run folder. Without it, --arch is trained from scratch.
    arch
        A name from `isthmus models`; needed where the weights do not say it.
    freeze
        What stays as it is: trunk (the default: features are computed once and a head is trained on them), stem,
        layer1 and so on up to that stage, or none.
    recipe
        A name from `isthmus recipes`, or a TOML file; the other options change single settings of it.
    out
        The run folder; the next free number under runs/ unless given. Under torchrun it must be given.
    resume
        A run folder to go on with; its recipe is used as it is. To train longer: a new run with --weights RUN.
    epochs
        Passes over the pictures.
    batch_size
        Pictures a step, over all processes.
    micro_batch
        Pictures that a process holds at once; the steps stay those of the whole batch. Batch norms that train see
        these alone: 16 or more is good.
    memory
        What is kept for backward: everything, the input of each block, or what is dear to compute again.
    lr
        Peak learning rate.
    image_size
        Pixels a side; as the weights ask unless given.
    head
        For a frozen trunk: chosen by cross-validation, linear, or the one stage that is read, such as layer3.
    val_fraction
        Part of the pictures to validate on, where the data is not divided already.
    seed
        Decides the split, the order and every random number.
    settings
        Any setting of the recipe, such as 'augment.vflip=true' or 'views=["identity"]'; may be repeated.
        unreadable=skip goes on without pictures that cannot be read.
    report
        Write report.html into the run folder at the end.
    """
    from isthmus.report.terminal import TerminalReporter
    from isthmus.run import fit
    from isthmus.train.folder import recipe_of
    from isthmus.train.loop import Interrupted
    from isthmus.train.recipe import Recipe, gradient_only, override
    from isthmus.train.recipes import recipe as named_recipe

    given: dict[str, Any] = {
        "data": data,
        "weights": weights,
        "arch": arch,
        "freeze": freeze,
        "epochs": epochs,
        "batch_size": batch_size,
        "micro_batch": micro_batch,
        "memory": memory,
        "lr": lr,
        "image_size": image_size,
        "head": head,
        "val_fraction": val_fraction,
        "seed": seed,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume is not None:
        others = given | {"recipe": recipe, "out": out, "set": settings or None}
        if others := {name: value for name, value in others.items() if value is not None}:
            options = ", ".join(f"--{name.replace('_', '-')}" for name in others)
            raise RecipeError(
                f"--resume goes on with the run's own recipe; leave out {options}, or begin a new run from it "
                f"with --weights {resume}"
            )
        chosen = recipe_of(resume)
    elif recipe is not None and recipe.endswith(".toml"):
        chosen = replace(Recipe.from_file(Path(recipe)), **given)
    else:
        if "data" not in given:
            raise RecipeError("--data is missing: a folder of class folders or shards, a .csv file, hf:NAME, or elpv")
        usual = "scratch" if weights is None else "finetune" if freeze not in (None, "trunk") else "probe"
        chosen = named_recipe(recipe or usual, **given)
    chosen = override(chosen, settings)
    named = {*given, *(setting.partition("=")[0].partition(".")[0].strip() for setting in settings)}
    if chosen.freeze == "trunk" and (idle := sorted(named & gradient_only())):
        raise RecipeError(f"{idle[0]} does nothing with a frozen trunk; add --freeze none, or leave it out")
    with TerminalReporter() as reporter:
        if resume is None and (told := rate_for_batch(chosen, named)):
            reporter.say(told)
        try:
            run = fit(
                chosen,
                resume or out or "",
                resume=resume is not None,
                device=device,
                reporter=reporter,
                report=report,
            )
        except Interrupted as stopped:
            reporter.say(str(stopped))
            sys.exit(130)
    if reporter.bar.console.quiet:  # of many processes one speaks
        return
    if as_json:
        print(json.dumps(run.scores.to_dict() | {"run": str(run.folder), "seconds": run.seconds}, indent=2))  # noqa: T201
        return
    print_scores(run.scores)
    console.print(
        f"Done in {run.seconds:.0f} s. Use it: isthmus predict {run.folder} PICTURES", soft_wrap=True, markup=False
    )


def rate_for_batch(chosen: Any, named: set[str]) -> str:
    """A hint where the batch of a named recipe was changed and its rate was not; otherwise empty."""
    from isthmus.train.recipes import RECIPES
    from isthmus.train.recipes import recipe as named_recipe

    if chosen.name not in RECIPES or chosen.freeze == "trunk" or chosen.optimizer != "sgd" or "lr" in named:
        return ""
    usual = named_recipe(chosen.name, data=chosen.data, weights="any")
    if chosen.batch_size == usual.batch_size or chosen.lr != usual.lr:
        return ""
    return (
        f"lr {chosen.lr:g} is meant for a batch of {usual.batch_size}; for {chosen.batch_size} in proportion "
        f"(Goyal et al. 2017) take --lr {chosen.lr * chosen.batch_size / usual.batch_size:.2g}"
    )


def evaluate(
    run: str,
    *,
    data: str = "",
    batch_size: int = 32,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure a run on its validation pictures, or on other labelled pictures.

    Parameters
    ----------
    run
        A run folder or a weight file with metadata.
    data
        Pictures as `isthmus train` takes them; all of them are used. Without it, or where the run was trained on
        them, its own validation part.
    batch_size
        Pictures a step.
    precision
        The machine's best unless given.
    """
    from isthmus.report.terminal import TerminalReporter
    from isthmus.run import evaluate as measure

    with TerminalReporter() as reporter:
        scores = measure(run, data, batch_size=batch_size, precision=precision, device=device, reporter=reporter)
    if as_json:
        print(json.dumps(scores.to_dict(), indent=2))  # noqa: T201
        return
    print_scores(scores)


def print_scores(scores: Any) -> None:
    """Accuracy, the rows of the classes, the confusion matrix."""
    five = f" · top-5 {scores.top5:.2%}" if scores.top5 is not None else ""
    console.print(
        f"[bold]accuracy {scores.accuracy:.2%}[/] · balanced {scores.balanced_accuracy:.2%}{five} · "
        f"{scores.correct} of {scores.seen} right"
    )
    confusion = scores.confusion.tolist()
    few = len(scores.classes) <= 12  # wider matrices do not fit a terminal; --json has them all
    print_table(
        "",
        ("class", "precision", "recall", "pictures", *(escape(f"as {name}") for name in scores.classes if few)),
        (
            (escape(row.name), f"{row.precision:.1%}", f"{row.recall:.1%}", row.support, *(line if few else ()))
            for row, line in zip(scores.per_class(), confusion, strict=True)
        ),
    )
