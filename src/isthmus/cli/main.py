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
for way, names in {
    "paper": ("models", "plan"),
    "work": ("train", "eval", "predict"),
    "machine": ("env",),
}.items():
    for name in names:
        app.command(f"isthmus.cli.{way}:{name.replace('eval', 'evaluate')}", name=name)
weights = App(
    name="weights",
    help="Weight files: look inside (inspect), write under other names (convert), prove (verify), find (list).",
)
for name in ("inspect", "convert", "verify", "list"):
    weights.command(f"isthmus.cli.weights:{name.replace('list', 'list_weights')}", name=name)
app.command(weights)


def main() -> None:
    """Run the command line; a user's mistake is one message and exit status 2."""
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
