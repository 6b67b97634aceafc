"""The command line: its parser, its log, and the exit codes.

What a command needs beside the parser is imported when it runs, so that ``--help`` answers at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from longrope2_ray.cli import planning, search, study, training, vectors
from longrope2_ray.cli.exit_codes import FENCED, INTERRUPTED, STOPPED, SUCCESS, USAGE_ERROR
from longrope2_ray.errors import FencedError, StoppedError

DESCRIPTION = """\
Extend a language model's context window with LongRoPE2.

RECIPE is a TOML file or the name of a shipped one: debug (seconds), demo (minutes) and others.
Options --section.field VALUE after it override its fields; `longrope2 recipe` prints them all.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` (default: the program's arguments) names.

    Returns:
        The exit code, one of ``cli.exit_codes``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    arguments = _parse(words)
    _log_to_stderr()
    try:
        _require_recipe_first(words, arguments)
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except BrokenPipeError:
        return SUCCESS
    except KeyboardInterrupt:
        advice = "; what is done is kept, run the same command again to resume"
        print(f"interrupted{advice if arguments.resumable else ''}", file=sys.stderr)
        return INTERRUPTED
    except FencedError as error:
        print(f"stopped: {error}", file=sys.stderr)
        return FENCED
    except StoppedError as error:
        print(f"stopped: {error}\nwhat is done is kept, run again to resume", file=sys.stderr)
        return STOPPED


def _parse(words: Sequence[str]) -> argparse.Namespace:
    """Parse the words; options of the recipe's own fields are collected in ``overrides``."""
    parser = argparse.ArgumentParser(
        prog="longrope2",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for group in (planning, search, vectors, training, study):
        group.add_commands(commands)
    arguments, rest = parser.parse_known_args(words)
    if rest and not hasattr(arguments, "recipe"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    return arguments


def _require_recipe_first(words: Sequence[str], arguments: argparse.Namespace) -> None:
    """Refuse ``--section.field VALUE`` before RECIPE: the value would be taken for the recipe."""
    if not arguments.overrides:
        return
    before = words[: words.index(arguments.recipe)]
    early = [word for word in before if word in arguments.overrides and "=" not in word]
    if early:
        raise ValueError(
            f"{arguments.first}: expected before {early[0]}, got {arguments.recipe!r} after it"
        )


def _log_to_stderr() -> None:
    form = "%(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, stream=sys.stderr)
    logging.getLogger("longrope2").setLevel(logging.INFO)
