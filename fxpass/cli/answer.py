"""What a command answers, and how it reaches standard output: nothing else is ever written there."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

from rich.console import RenderableType

from ..render.terminal import console


@dataclass(frozen=True)
class Answer:
    """The result of a command.

    Attributes:
        data: the answer as JSON has it.
        shown: the answer for people, from top to bottom.
        code: exit code, 0 or 1 (a check failed).
    """

    data: Mapping[str, Any]
    shown: tuple[RenderableType, ...]
    code: int = 0

    def write(self, as_json: bool) -> None:
        """Write the answer to standard output: JSON, coloured on a terminal, plain in a pipe or a file."""
        if as_json:
            print(json.dumps(self.data, indent=1, allow_nan=False))
        else:
            console(sys.stdout).print(*self.shown, sep="\n", markup=False)
        sys.stdout.flush()


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
