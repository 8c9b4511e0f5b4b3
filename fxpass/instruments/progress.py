"""A progress bar on standard error."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..ir.program import Program
from ..passes import Pass
from ..runner import PassRecord


class ProgressBar:
    """An observer that shows the pass that is running; nothing where standard error is not a terminal.

    Use it as a context manager; the bar vanishes at the end::

        with ProgressBar(total=len(passes)) as bar:
            run(program, passes, check=check, observers=[bar])

    Args:
        total: number of steps, ``None`` where it is not known yet.
        console: where to draw instead of standard error.
    """

    def __init__(self, total: int | None = None, console: Console | None = None) -> None:
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            # rich's own is_terminal can be forced by the environment, and a log file would fill with bars
            disable=not console.file.isatty(),
        )
        self._task = self._progress.add_task("", total=total)

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def describe(self, text: str, total: int | None = None) -> None:
        """Say what is running now, and how many steps there are once that is known."""
        self._progress.update(self._task, description=text, total=total, refresh=True)

    def advance(self) -> None:
        """One step is done."""
        self._progress.advance(self._task)

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        self.describe(pass_.name)

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        self.advance()
