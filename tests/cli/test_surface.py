"""The command line's surface, pinned: its commands and the options of each."""

import inspect
import json
from importlib import import_module

import pytest
from cyclopts import App

from isthmus.cli import main
from isthmus.cli.main import app

COMMANDS = [
    "weights",
    "bench",
    "models",
    "plan",
    "train",
    "recipes",
    "eval",
    "diagnose",
    "depth",
    "report",
    "predict",
    "serve",
    "export",
    "shards",
    "env",
]
WEIGHTS = ["inspect", "convert", "verify", "list"]
# Commands whose options are pinned in tests/golden/commands.json; add a name, then run pytest --regenerate.
PINNED = [
    "models",
    "plan",
    "recipes",
    "diagnose",
    "depth",
    "report",
    "serve",
    "export",
    "shards",
    "bench data",
    "bench machine",
    *(f"weights {name}" for name in WEIGHTS),
]


def at(words: str) -> App:
    """A command by its words, such as "weights list"."""
    found = app
    for word in words.split():
        found = found[word]
    return found


def options(command: str) -> dict[str, dict[str, object]]:
    """What a command takes, by name."""
    return {
        argument.names[0]: {
            "type": getattr(argument.hint, "__name__", str(argument.hint)) if not argument.get_choices() else "choice",
            "choices": list(argument.get_choices() or ()),
            "positional": argument.index is not None,
            "required": bool(argument.required),
            "default": None if argument.required else argument.field_info.default,
            "explained": bool(argument.parameter.help),
        }
        for argument in at(command).assemble_argument_collection(parse_docstring=True)
    }


def test_commands():
    assert [name for name in app if not name.startswith("-")] == COMMANDS
    assert [name for name in app["weights"] if not name.startswith("-")] == WEIGHTS
    assert [name for name in app["bench"] if not name.startswith("-")] == ["data", "machine"]


def test_options(golden):
    golden("commands.json", json.dumps({command: options(command) for command in PINNED}, indent=2))


@pytest.mark.parametrize("command", PINNED)
def test_every_option_and_command_is_explained(command):
    assert at(command).help
    assert [name for name, option in options(command).items() if not option["explained"]] == []


@pytest.mark.parametrize("row", main.COMMANDS, ids=lambda row: row[1])
def test_the_overview_says_what_the_command_itself_says(row):
    _, _, place, text = row
    module, function = place.split(":")
    command = getattr(import_module(f"isthmus.cli.{module}"), function)
    assert inspect.getdoc(command).splitlines()[0] == text
