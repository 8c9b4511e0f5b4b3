"""Which pass breaks the result?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import UsageError
from ..ir.program import Program
from ..passes import Pass
from ..runner import Check, PassRecord, run


@dataclass(frozen=True)
class BisectResult:
    """The pass that turns a good program into a bad one.

    Attributes:
        name: name of the pass.
        index: its place in the pipeline, from 0.
        before: the program that went into it, which is good.
        after: the program that came out of it, which is bad.
    """

    name: str
    index: int
    before: Program
    after: Program


def bisect(
    program: Program, passes: Sequence[Pass], is_good: Callable[[Program], bool], *, check: Check
) -> BisectResult | None:
    """Find a pass after which ``is_good`` fails.

    The passes run once and the programs in between are kept, which costs little because they share their
    tensors.  Halving then takes about ``log2(len(passes))`` calls of ``is_good``.  Where a result is bad from some
    pass on, that pass is found; where it goes from bad to good and back, one of the passes that made it bad.

    Args:
        program: the program that goes into the first pass.
        passes: the pipeline.
        is_good: the criterion, at every stage that the program goes through.
        check: as for :func:`fxpass.runner.run`.

    Returns:
        The pass, ``None`` where the last program is good.

    Raises:
        UsageError: ``program`` itself is bad, so that no pass is to blame.
        PassError: a pass broke its promise.
    """
    steps = _Steps()
    run(program, passes, check=check, observers=[steps])
    programs = [program, *(after for _, _, after in steps.modifying)]
    if is_good(programs[-1]):
        return None
    good, bad = 0, len(programs) - 1
    if bad == 0 or not is_good(programs[0]):
        raise UsageError("the program is bad before the first pass", hint="a wider tolerance, or check the capture")
    while bad - good > 1:
        middle = (good + bad) // 2
        if is_good(programs[middle]):
            good = middle
        else:
            bad = middle
    index, name, after = steps.modifying[good]
    return BisectResult(name, index, programs[good], after)


class _Steps:
    """Keeps the programs that passes changed, each with the index and the name of the pass."""

    def __init__(self) -> None:
        self.modifying: list[tuple[int, str, Program]] = []
        self.count = 0

    def on_pass_start(self, pass_: Pass, program: Program) -> None:
        pass

    def on_pass_end(self, record: PassRecord, before: Program, after: Program) -> None:
        if record.modified:
            self.modifying.append((self.count, record.name, after))
        self.count += 1
