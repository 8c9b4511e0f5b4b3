"""What a command answers, and how it reaches standard output: nothing else is ever written there."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from rich.console import Console, RenderableType

from ..render.terminal import console

#: e3nn 0.4.4 and mace-torch 0.3.16 on torch 2.13
KNOWN_WARNINGS = (
    "The TorchScript type system doesn't support instance-level annotations",
    "Environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected",
    r".*torch\.jit\..* is deprecated",
)


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
        data: the answer as JSON has it.
        shown: the answer for people, from top to bottom; strings are printed as they are, however long their lines.
        code: exit code, 0 or 1 (a check failed).
    """

    data: Mapping[str, Any]
    shown: Sequence[RenderableType]
    code: int = 0

    def write(self, as_json: bool) -> None:
        """Write the answer to standard output: JSON, coloured on a terminal, plain in a pipe or a file."""
        screen = console(sys.stdout)
        if as_json:
            print(json.dumps(self.data, indent=1, allow_nan=False))
        elif screen.is_terminal:
            self._draw(screen)
        else:
            with screen.capture() as capture:
                self._draw(screen)
            print("\n".join(line.rstrip() for line in capture.get().splitlines()))  # rich fills lines with blanks
        sys.stdout.flush()

    def _draw(self, screen: Console) -> None:
        for part in self.shown:
            if isinstance(part, str):
                screen.out(part, highlight=False)
            else:
                screen.print(part)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what dependencies are known to warn about in code of their own."""
    with warnings.catch_warnings():
        for message in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def foreign_output_on_stderr() -> Iterator[None]:
    """Until the answer is written, whatever libraries, plugins and compilers print goes to standard error."""
    own = sys.stdout is sys.__stdout__
    sys.stdout.flush()
    with redirect_stdout(sys.stderr):
        if not own:  # someone captures it in this process; what child processes write goes elsewhere
            yield
            return
        kept = os.dup(1)
        os.dup2(2, 1)
        try:
            yield
        finally:
            os.dup2(kept, 1)
            os.close(kept)
