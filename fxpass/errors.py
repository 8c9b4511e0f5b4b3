"""The error tree: every error says what happened, where, and what to try.

``str(error)`` is one paragraph that a user can act on.  The command line prints it and
exits with ``error.exit_code`` (1: a check failed, 2: the request could not be carried out).
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Location:
    """Where something happened; every field is optional."""

    pass_name: str | None = None
    node: str | None = None
    shape: str | None = None
    irreps: str | None = None
    module_path: str | None = None
    source: str | None = None

    def __str__(self) -> str:
        parts = [(f.name.replace("_name", "").replace("_", " "), getattr(self, f.name)) for f in fields(self)]
        return ", ".join(f"{label} {value}" for label, value in parts if value)


class FxpassError(Exception):
    """Base of all errors that fxpass raises on purpose.

    Args:
        what: what happened, one sentence.
        where: location in the model, the graph or the pipeline.
        hint: what to try.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: Location | None = None, hint: str | None = None) -> None:
        self.what = what
        self.where = where or Location()
        self.hint = hint
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what.rstrip()
        place = str(self.where)
        if place:
            text += f" [{place}]"
        if self.hint:
            stop = "" if text.endswith((".", "?", "!")) or "\n" in text else "."
            text += f"{stop} Try: {self.hint}"
        return text


class UsageError(FxpassError):
    """A request that cannot be carried out: wrong argument, option, name or file."""


class UnsupportedModelError(FxpassError):
    """A model, module or variant that no frontend covers; named by path and class."""


class UnsupportedModuleError(UnsupportedModelError, NotImplementedError):
    """A module that is marked as one that TorchScript cannot carry; named by path and class."""


class MissingExtraError(FxpassError):
    """An optional package is needed and not installed; the hint is the pip line to type."""


class CaptureError(FxpassError):
    """The model could not be captured as a graph that is dynamic and complete."""


class PipelineError(UsageError):
    """A pipeline text, a pass name or a pass option that does not exist or does not parse."""


class PassError(FxpassError):
    """A pass broke its promise: a broken graph, a wrong modification flag, a changed interface."""

    exit_code = 1


class VerificationError(FxpassError):
    """A result lies outside its tolerance or budget; the pass that broke it is named."""

    exit_code = 1


class StructureError(UsageError):
    """Bad input structures: no atoms, unknown species, NaN or infinite positions."""


class LoweringError(FxpassError):
    """A target cannot carry the graph."""


class FrozenTraceError(LoweringError):
    """A trace that holds for the traced inputs alone: a size, a branch or a result is a constant in it."""


class KernelError(LoweringError):
    """A generated kernel does not compile or load; its source is kept and named."""


class PackageError(UsageError):
    """A saved fxpass package is truncated, altered, or from a newer format."""
