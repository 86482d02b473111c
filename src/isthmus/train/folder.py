"""The folder of a run: what lies in it, whose it is, and whether it may be written."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from isthmus.atomic import atomic_write
from isthmus.data.pictures import Pictures
from isthmus.data.sources import open_data, open_pictures
from isthmus.errors import DataError, RunError
from isthmus.evaluation.metrics import Tally
from isthmus.train.distributed import World
from isthmus.train.recipe import Recipe
from isthmus.train.reporter import Reporter

__all__ = [
    "ENVIRONMENT",
    "MODEL",
    "RECIPE",
    "SCORES",
    "START",
    "check_folder",
    "claimed",
    "evaluation_pictures",
    "finished",
    "free_folder",
    "holds_run",
    "known",
    "own_pictures",
    "recipe_of",
    "write_text",
]

MODEL, START = "model.safetensors", "start.safetensors"
RECIPE, SCORES, ENVIRONMENT = "recipe.toml", "evaluation.json", "environment.json"
LOCK = ".lock"


def free_folder(world: World) -> Path:
    """A new folder under runs/, of the next free number; nobody else who asks at the same time gets it.

    Raises RunError for several processes, which could not find it again.
    """
    if world.size > 1:
        raise RunError("several processes need one folder to go on in when they are started anew; name it with --out")
    number = 1
    while True:
        try:
            Path("runs").mkdir(exist_ok=True)
            (folder := Path("runs") / str(number)).mkdir()
        except FileExistsError:
            number += 1
        except OSError as error:
            raise RunError(f"cannot make a folder in runs: {error.strerror}; name another with --out") from error
        else:
            return folder


def holds_run(folder: Path) -> bool:
    """Whether a run was started there; raises RunError where the folder may not be read."""
    try:
        return (folder / RECIPE).is_file()
    except OSError as error:
        raise RunError(f"cannot read {folder}: {error.strerror}") from error


def recipe_of(folder: Path) -> Recipe:
    """The recipe of the run in a folder, to go on with; raises RunError where there is none."""
    if not holds_run(folder):
        raise RunError(f"{folder} holds no run to resume ({RECIPE} is missing)")
    return Recipe.from_file(folder / RECIPE)


def finished(folder: Path) -> Tally | None:
    """The scores of a run that has ended, None of any other folder; raises RunError when they cannot be read."""
    path = folder / SCORES
    if not ((folder / MODEL).is_file() and path.is_file()):
        return None
    try:
        return Tally.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read ({error}); isthmus eval {folder} measures the run again") from error


def check_folder(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Raise RunError when the folder holds another run, or on `resume` none of `recipe`, or lies among the pictures."""
    if resume and recipe_of(folder) != recipe:
        raise RunError(
            f"{folder} was started with another recipe; go on with its own ({folder / RECIPE}), or start anew"
        )
    if holds_run(folder) and not resume:
        raise RunError(f"{folder} holds a run already; choose another --out, or go on with --resume {folder}")
    pictures = Path(recipe.data).resolve()
    if pictures.is_dir() and folder.resolve().is_relative_to(pictures):
        raise RunError(
            f"{folder} lies in {recipe.data}, where its files would be taken for classes; choose another --out"
        )


@contextmanager
def claimed(folder: Path, world: World, reporter: Reporter) -> Iterator[None]:
    """A context in which no other command may train in the folder, which is made; raises RunError.

    The system gives the lock back when its process ends, however it ends.
    """
    if not world.main:
        yield
        return
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise RunError(f"another command trains in {folder} now; wait for it, or choose another --out") from error
    except NotImplementedError:
        reporter.say(f"the file system of {folder} has no locks: let no other command train there")
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def own_pictures(folder: Path, data: str) -> Recipe | None:
    """The recipe of a run when `data` ("" for its own) means the pictures that it was trained on, however spelt."""
    path = folder / RECIPE
    recipe = Recipe.from_file(path) if path.is_file() else None
    if recipe is None or data in ("", recipe.data):
        return recipe
    there = Path(data).exists() and Path(recipe.data).exists()
    return recipe if there and Path(data).samefile(recipe.data) else None


def evaluation_pictures(folder: Path, classes: tuple[str, ...], data: str) -> Pictures:
    """The pictures to evaluate, with labels in the order of the network's classes."""
    if recipe := own_pictures(folder, data):
        found = open_data(recipe.data, val_fraction=recipe.val_fraction, seed=recipe.seed).val
    elif data:
        found = open_pictures(data)
    else:
        raise RunError(f"{folder} does not say what it was trained on; name the pictures with --data")
    return known(found, classes)


def known(pictures: Pictures, classes: tuple[str, ...]) -> Pictures:
    """The same pictures with labels in the order of a network's classes; raises DataError for classes beside them."""
    unknown = sorted(set(pictures.classes) - set(classes))
    if unknown:
        raise DataError(f"the network does not know the classes {unknown}; it knows {', '.join(classes) or 'none'}")
    return pictures.under(classes)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    atomic_write(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))
