"""The command line: its subcommands are imported when they are called."""

import sys
from importlib.metadata import version

from cyclopts import App, CycloptsError

from isthmus.errors import IsthmusError

__all__ = ["app", "main"]

app = App(
    name="isthmus",
    help="Networks made of the bottleneck residual block: on paper, in torch, from any weights, to predictions.",
    version=lambda: version("isthmus"),
)
weights = App(name="weights", help="Weight files: look inside, write under other names, prove and find them.")
app.command(weights)
bench = App(
    name="bench",
    help="How fast this machine is: with a network in each engine, in training (`data`), at most (`machine`).",
)
app.command(bench)
# What a command does is said here too, so that `isthmus --help` imports none of them; a test holds the two together.
COMMANDS = (
    (app, "models", "paper:models", "List the networks of the table with their cost."),
    (app, "plan", "paper:plan", "Show what a network costs and whether its strip pays, before a line of torch runs."),
    (app, "train", "work:train", "Train a network on your pictures and leave a run folder."),
    (
        app,
        "recipes",
        "recipes:recipes",
        "List the named recipes, where they are from and the accuracy that is reported of them there.",
    ),
    (app, "eval", "work:evaluate", "Measure a run on its validation pictures, or on other labelled pictures."),
    (
        app,
        "diagnose",
        "diagnose:diagnose",
        "Tell what ails a network: strips, batch norms, preprocessing, strides and gradients, measured on pictures.",
    ),
    (
        app,
        "depth",
        "depth:depth",
        "Show the same depth with and without shortcuts, with norms and without: gradients, and the first steps.",
    ),
    (
        app,
        "report",
        "report:report",
        "Write what a run reached as a page to read and pass on; of several runs, a page that compares them.",
    ),
    (
        app,
        "predict",
        "predict:predict",
        "Tell the classes of pictures: of a few in the terminal, of millions in a table.",
    ),
    (app, "serve", "serve:serve", "Answer over HTTP what pictures show, with a page to drop them on."),
    (
        app,
        "export",
        "export:export",
        "Write a network for ONNX Runtime, OpenVINO or torch.export, and prove that the file computes the same.",
    ),
    (
        app,
        "shards",
        "shards:shards",
        "Write pictures into tar shards with an index, which train from any disk or address.",
    ),
    (weights, "inspect", "weights:inspect", "Show what a weight file holds and what looks wrong with it."),
    (
        weights,
        "convert",
        "weights:convert",
        "Write weights under the names of another library, and prove that they read back the same.",
    ),
    (
        weights,
        "verify",
        "weights:verify",
        "Compare the outputs of weights with those of the library they are from, or of other weights.",
    ),
    (weights, "list", "weights:list_weights", "List published weights."),
    (
        bench,
        "data",
        "bench:data",
        "Show how many pictures a second the loader and the training step do alone, and which one binds.",
    ),
    (
        bench,
        "machine",
        "bench:limits",
        "Measure what this machine does at most, and keep it for `isthmus plan --roofline`: arithmetic and memory.",
    ),
    (
        app,
        "env",
        "machine:env",
        "Show this machine, what isthmus will use on it, and the versions that decide results.",
    ),
)
for group, name, place, text in COMMANDS:
    group.command(f"isthmus.cli.{place}", name=name, help=text)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2."""
    if "bench" in sys.argv[1:2] and bench.default_command is None:  # of defaults, cyclopts takes no names to import
        from isthmus.cli.bench import engines

        bench.default(engines)
    try:
        app(exit_on_error=False, print_error=True)
    except CycloptsError:
        sys.exit(2)
    except IsthmusError as error:
        print(f"isthmus: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # `isthmus models | head`
        sys.stderr.close()
