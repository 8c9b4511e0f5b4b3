"""Parses the command line, runs one command, and turns whatever happens into output and an exit code."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ..errors import FxpassError, UsageError
from ..registry import did_you_mean
from . import bench, catalogue, compress, doctor, look, optimize
from .answer import foreign_output_on_stderr, quiet
from .doctor import installed
from .options import Commands, Parser

INTERRUPTED = 130  # 128 + SIGINT, as shells have it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``fxpass``, those of the process by default.

    Returns:
        0: done; 1: a check failed; 2: the request could not be carried out; 130: interrupted.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        arguments = _parse(words)
        if arguments is None:
            return 0
        with quiet(), foreign_output_on_stderr():
            answer = arguments.run(arguments)
        answer.write(as_json)
        return int(answer.code)
    except FxpassError as error:
        if as_json:
            print(json.dumps({"error": _error_to_json(error)}, indent=1))
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read the answer has seen enough; what is left in the buffer goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def build_parser() -> tuple[Parser, Commands]:
    """The parser of the whole command line, and its commands."""
    parser = Parser(
        prog="fxpass",
        description="A compiler for machine-learned interatomic potentials: verified drop-in replacements.",
        epilog="fxpass COMMAND --help tells more and ends in examples. Exit codes: 0 done, 1 a check failed, 2 usage.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fxpass {installed('fxpass') or '(not installed)'}")
    commands = Commands(parser)
    for module in (optimize, compress, look, catalogue, bench, doctor):
        module.add_to(commands)
    return parser, commands


def _parse(words: Sequence[str]) -> argparse.Namespace | None:
    """The arguments, or ``None`` where help or the version was asked for and printed.

    Raises:
        UsageError: a command or option that does not exist, or one that is missing.
    """
    parser, commands = build_parser()
    name = next((word for word in words if not word.startswith("-")), None)
    known = commands.parsers
    if name is not None and name not in known:
        raise UsageError(f"there is no command {name!r}{did_you_mean(name, known)}", hint=f"one of {', '.join(known)}")
    if not words:
        parser.print_help()
        return None
    try:
        arguments, unknown = parser.parse_known_args(words)
    except SystemExit:
        return None
    if unknown or name is None:
        chosen = parser if name is None else known[name]
        options = re.findall(r"--[a-z-]+", chosen.format_help().partition("\nexamples:")[0])
        word = unknown[0] if unknown else words[0]
        kind = "option" if word.startswith("-") else "argument"
        raise UsageError(f"there is no {kind} {word!r}{did_you_mean(word, options)}", hint=f"{chosen.prog} --help")
    return arguments


def _error_to_json(error: FxpassError) -> dict[str, object]:
    return {
        "type": type(error).__name__,
        "what": error.what,
        "where": {key: value for key, value in asdict(error.where).items() if value is not None},
        "hint": error.hint,
        "exit_code": error.exit_code,
    }
