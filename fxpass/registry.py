"""Which passes, presets, frontends and targets exist.

All of them, the shipped ones too, come in by entry point and are imported when they are asked for::

    [project.entry-points."fxpass.passes"]
    my-pass = "my_package.my_module:MyPass"

A registry never changes after it is built.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from typing import Any

from .errors import FxpassError, PipelineError, UsageError
from .passes import Pass

PASSES = "fxpass.passes"
PRESETS = "fxpass.presets"
FRONTENDS = "fxpass.frontends"
TARGETS = "fxpass.targets"

_KINDS = {PASSES: "pass", PRESETS: "preset", FRONTENDS: "frontend", TARGETS: "target"}


@dataclass(frozen=True)
class Entry:
    """One registered name, not imported yet.

    Attributes:
        group: entry-point group, e.g. ``"fxpass.passes"``.
        name: the name that users type.
        value: where it is, ``"package.module:attribute"``.
        provider: name of the distribution that registers it.
        version: version of that distribution.
    """

    group: str
    name: str
    value: str
    provider: str
    version: str

    @property
    def kind(self) -> str:
        return _KINDS[self.group]

    @property
    def origin(self) -> str:
        """Provider and version, e.g. ``"acme-passes 1.2"``."""
        return f"{self.provider} {self.version}".rstrip()

    def load(self) -> Any:
        """What the entry names: the pass class, the text of the preset, the frontend or the target.

        Raises:
            PipelineError: a pass or preset that cannot be imported or is not one.
            UsageError: a frontend or target that cannot be imported.
        """
        try:
            loaded = EntryPoint(self.name, self.value, self.group).load()
            if self.group == PRESETS and callable(loaded):
                loaded = loaded()
        except FxpassError:
            raise
        except Exception as error:  # importing a plugin runs foreign code, which may raise anything
            raise self._broken(f"cannot be loaded: {type(error).__name__}: {error}") from error
        if problem := self._problem(loaded):
            raise self._broken(problem)
        return loaded

    def _problem(self, loaded: object) -> str | None:
        if self.group == PASSES:
            if problem := pass_problem(loaded):
                return problem
            if loaded.name != self.name:  # type: ignore[attr-defined]
                return f"calls itself {loaded.name!r}"  # type: ignore[attr-defined]
        if self.group == PRESETS and not (isinstance(loaded, str) and loaded.strip()):
            return f"is not a pipeline text but {loaded!r}"
        return None

    def _broken(self, problem: str) -> UsageError:
        error = PipelineError if self.group in (PASSES, PRESETS) else UsageError
        return error(
            f"the {self.kind} {self.name!r} ({self.value}) of {self.origin} {problem}",
            hint=f"update {self.provider}, remove it, or report this to its authors",
        )


@dataclass(frozen=True)
class Listed:
    """One line of a listing: an entry with what it loads to, or with the reason why it cannot be used."""

    entry: Entry
    loaded: Any = None
    problem: str | None = None


class Registry:
    """The names that entry points offer.

    Two providers of one name are an error when, and only when, that name is asked for; so is a plugin that
    cannot be imported.  A pass and a preset share their names, because both stand in pipelines.
    """

    def __init__(self, entry_points: Iterable[EntryPoint]) -> None:
        entries = (_entry(point) for point in entry_points if point.group in _KINDS)
        # the same distribution can be found twice on the path (a checkout and its editable install): one entry
        self._entries = tuple(dict.fromkeys(sorted(entries, key=lambda e: (e.name, e.origin))))

    def entries(self, *groups: str) -> tuple[Entry, ...]:
        """The entries of the groups, by name; nothing is imported."""
        return tuple(entry for entry in self._entries if entry.group in groups)

    def names(self, *groups: str) -> tuple[str, ...]:
        """The names in the groups, sorted; nothing is imported."""
        return tuple(dict.fromkeys(entry.name for entry in self.entries(*groups)))

    def find(self, name: str, *groups: str) -> Entry:
        """The entry called ``name`` in one of the groups.

        Raises:
            PipelineError: no such pass or preset, or two of that name.
            UsageError: no such frontend or target, or two of that name.
        """
        error = PipelineError if set(groups) <= {PASSES, PRESETS} else UsageError
        kinds = " or ".join(_KINDS[group] for group in groups)
        matches = [entry for entry in self.entries(*groups) if entry.name == name]
        if not matches:
            known = self.names(*groups)
            raise error(
                f"there is no {kinds} {name!r}{did_you_mean(name, known)}",
                hint=f"one of {', '.join(known)}" if known else f"a package that registers a {kinds}",
            )
        if len(matches) > 1:
            offers = " and ".join(f"{entry.origin} ({entry.kind} {entry.value})" for entry in matches)
            raise error(
                f"the name {name!r} is registered more than once: by {offers}",
                hint="uninstall all but one of them",
            )
        return matches[0]

    def pass_class(self, name: str) -> type[Pass]:
        """The pass class called ``name``; raises :class:`PipelineError` where there is none or it is broken."""
        return self.find(name, PASSES).load()

    def preset(self, name: str) -> str:
        """The pipeline text of the preset ``name``; raises :class:`PipelineError` where there is none."""
        return self.find(name, PRESETS).load()

    def frontend(self, name: str) -> Any:
        """The frontend called ``name``; raises :class:`UsageError` where there is none or it is broken."""
        return self.find(name, FRONTENDS).load()

    def target(self, name: str) -> Any:
        """The target called ``name``; raises :class:`UsageError` where there is none or it is broken."""
        return self.find(name, TARGETS).load()

    def listing(self, group: str) -> tuple[Listed, ...]:
        """All entries of a group, imported; those that are broken or clash carry the problem and raise nothing."""
        sharing = (PASSES, PRESETS) if group in (PASSES, PRESETS) else (group,)

        def listed(entry: Entry) -> Listed:
            try:
                self.find(entry.name, *sharing)
                return Listed(entry, loaded=entry.load())
            except FxpassError as error:
                return Listed(entry, problem=str(error))

        return tuple(map(listed, self.entries(group)))


def default_registry() -> Registry:
    """The registry of everything installed in this environment.

    Raises:
        UsageError: fxpass itself is not installed, so that not even its own passes are registered.
    """
    registry = Registry(point for group in _KINDS for point in metadata.entry_points(group=group))
    if not any(entry.provider == "fxpass" for entry in registry.entries(PASSES)):
        raise UsageError(
            "fxpass is imported but not installed: its own passes are not registered, so no pipeline can be run",
            hint='"pip install -e ." in the checkout of fxpass',
        )
    return registry


def pass_problem(candidate: object) -> str | None:
    """Why ``candidate`` is not a usable pass class, ``None`` where it is one."""
    if not (isinstance(candidate, type) and issubclass(candidate, Pass)):
        return "is not a subclass of fxpass.Pass"
    if "__dataclass_fields__" not in vars(candidate):
        return "is not decorated with @dataclass(frozen=True)"
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", getattr(candidate, "name", "")):
        return "has no kebab-case class attribute 'name'"
    return None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` where a known word is close to ``word``, else nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _entry(point: EntryPoint) -> Entry:
    if point.dist is None:
        return Entry(point.group, point.name, point.value, "an unknown distribution", "")
    return Entry(point.group, point.name, point.value, point.dist.name, point.dist.version)
