"""What commands share: the parser, groups of options, and what the words of the user stand for."""

from __future__ import annotations

import argparse
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from torch import nn

from ..errors import UsageError
from ..instruments import ProgressBar
from ..models import small_potential
from ..pipeline import resolve
from ..registry import default_registry, did_you_mean
from ..structures import Structure, read_structures
from .answer import Answer

Command = Callable[[argparse.Namespace], Answer]

MODEL_HELP = "a checkpoint, or example:small, which comes with fxpass"
#: potentials that come with fxpass, by the word that stands in place of a path
EXAMPLES: dict[str, Callable[[], nn.Module]] = {"example:small": small_potential}


class Parser(argparse.ArgumentParser):
    """A parser that raises what it has to complain about."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


class Commands:
    """The commands of a parser.  The help of each ends in examples that run as they stand, one after the other."""

    def __init__(self, parser: Parser) -> None:
        self._parsers = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
        self.parsers: dict[str, Parser] = {}

    def add(self, name: str, run: Command, summary: str, *parents: Parser, examples: str, more: str = "") -> Parser:
        """A new command; ``more`` follows the summary in its help."""
        lines = "\n".join(f"  {line}" for line in examples.strip().splitlines())
        parser: Parser = self._parsers.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}. {more}".rstrip(),
            parents=parents,
            epilog=f"examples:\n{lines}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("--json", action="store_true", help="answer in JSON, errors too")
        parser.set_defaults(run=run)
        self.parsers[name] = parser
        return parser


# --- options


def _parent() -> Parser:
    return Parser(add_help=False)


def model_argument() -> Parser:
    parent = _parent()
    parent.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    return parent


def passes_option() -> Parser:
    parent = _parent()
    parent.add_argument(
        "-p",
        "--passes",
        metavar="PIPELINE",
        default="default",
        help="presets and passes, with options as in 'exact,specialize-heads{head=0}' (default: default)",
    )
    return parent


def target_option() -> Parser:
    parent = _parent()
    parent.add_argument(
        "-t", "--target", default="eager", help="how the result runs; fxpass passes lists them (default: eager)"
    )
    return parent


def verification_options(structures: str) -> Parser:
    """``--structures``, whose help is ``structures``, and ``--budget``."""
    parent = _parent()
    group = parent.add_argument_group("verification")
    group.add_argument("--structures", metavar="FILE", help=f"{structures}; FILE@FRAMES takes some: md.xyz@::10")
    group.add_argument(
        "--budget", metavar="FORCE", help="force error that approximate passes may make: '1 meV/A', or 0.001 in eV/A"
    )
    return parent


def calibration_option() -> Parser:
    parent = _parent()
    parent.add_argument(
        "--calibration",
        metavar="FILE",
        help="structures that passes measure on, FILE@FRAMES as above (default: built-in ones, or a short molecular "
        "dynamics)",
    )
    return parent


def no_verify_option() -> Parser:
    parent = _parent()
    parent.add_argument("--no-verify", action="store_true", help="do not compare with the original; the report says so")
    return parent


def file_option(*names: str, help: str, required: bool = False) -> Parser:
    """An option that names a file to write, and ``--overwrite``."""
    parent = _parent()
    parent.add_argument(*names, metavar="FILE", required=required, help=help)
    parent.add_argument("--overwrite", action="store_true", help="replace a file that exists; else it is left as it is")
    return parent


def optimizing_options(*output: str) -> tuple[Parser, ...]:
    """What every command takes that writes an optimised model; ``output`` are the names of the option for its file."""
    return (
        model_argument(),
        file_option(*output, help="where to write the result", required=True),
        target_option(),
        calibration_option(),
        no_verify_option(),
        verification_options("structures to verify on besides the built-in ones"),
    )


def positive(text: str) -> int:
    """A positive number, for ``type=`` of an option."""
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


# --- what the words stand for


def find_model(word: str) -> nn.Module | Path:
    """The model that MODEL names, or its path, which is not read yet; says so where reading it runs code.

    Raises:
        UsageError: an example that does not exist.
    """
    if word.startswith("example:"):
        if word not in EXAMPLES:
            what = f"there is no {word!r}{did_you_mean(word, EXAMPLES)}"
            raise UsageError(what, hint=f"one of {', '.join(EXAMPLES)}")
        return EXAMPLES[word]()
    path = Path(word)
    if _is_pickle(path):
        print(f"note: {path} is a pickle; loading it runs the code that it names", file=sys.stderr)
    return path


def _is_pickle(path: Path) -> bool:
    """Whether the file is of ``torch.save`` (an archive with ``data.pkl``) or of ``pickle`` (protocol 2 and later)."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        with path.open("rb") as file:
            return file.read(1) == b"\x80"
    except OSError:  # whoever has to read it says so
        return False


def find_structures(word: str | None) -> list[Structure]:
    """The structures of FILE or FILE@FRAMES, none for ``None``.

    Raises:
        StructureError: the file cannot be read, or has no such frames.
        MissingExtraError: the format needs ASE.
    """
    if word is None:
        return []
    found = re.fullmatch(r"(.+)@([-\d:]+)", word)
    return read_structures(found[1], found[2]) if found and not Path(word).exists() else read_structures(word)


# --- progress


class Progress(ProgressBar):
    """A progress bar that counts stages as well as passes."""

    def stage(self, name: str) -> None:
        """A stage begins."""
        self.describe(name)
        self.advance()


@contextmanager
def progress(*, stages: int, passes: str | None = None) -> Iterator[Progress]:
    """A bar on standard error, drawn only on a terminal; ``passes`` is the pipeline that will run."""
    steps = 0 if passes is None else len(resolve(passes, default_registry()))
    bar = Progress(total=steps + stages)
    with bar:
        yield bar
