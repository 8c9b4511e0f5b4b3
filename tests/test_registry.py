"""Registry: what entry points offer, who provides it, and what is said when a name cannot be had."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import ClassVar

import pytest

from fxpass.errors import MissingExtraError, PipelineError, UsageError
from fxpass.passes import Pass
from fxpass.registry import FRONTENDS, PASSES, PRESETS, TARGETS, Registry, default_registry, did_you_mean, pass_problem

pytestmark = pytest.mark.once

Distribute = Callable[..., list[EntryPoint]]


@dataclass(frozen=True)
class Tidy(Pass):
    """A pass."""

    name: ClassVar[str] = "tidy"


@dataclass(frozen=True)
class Sweep(Pass):
    """Another pass."""

    name: ClassVar[str] = "sweep"


class Undecorated(Pass):
    name = "undecorated"
    order: int = 3


@dataclass(frozen=True)
class Nameless(Pass):
    pass


@dataclass(frozen=True)
class Shouting(Pass):
    name: ClassVar[str] = "Shouting_Pass"


QUICK = "tidy,sweep"
EMPTY = "  "


def computed() -> str:
    return "sweep"


def missing_extra() -> str:
    raise MissingExtraError("mace-torch is not installed", hint='pip install "fxpass[mace]"')


@pytest.fixture
def distribute(tmp_path: Path) -> Distribute:
    """Makes the metadata of an installed distribution, and returns the entry points that Python reads from it."""

    def make(name: str, version: str, **groups: dict[str, str]) -> list[EntryPoint]:
        info = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, entries in groups.items():
            lines += [f"[fxpass.{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
        return list(metadata.Distribution.at(info).entry_points)

    return make


@pytest.fixture
def shipped(distribute: Distribute) -> list[EntryPoint]:
    return distribute(
        "fxpass",
        "0.1.0",
        passes={"tidy": f"{__name__}:Tidy", "sweep": f"{__name__}:Sweep"},
        presets={"quick": f"{__name__}:QUICK", "computed": f"{__name__}:computed"},
        frontends={"plain": f"{__name__}:Path"},
        targets={"eager": f"{__name__}:dataclass"},
    )


def test_finds_what_each_group_offers(shipped: list[EntryPoint]) -> None:
    registry = Registry(shipped)
    assert registry.pass_class("tidy") is Tidy
    assert registry.preset("quick") == "tidy,sweep"
    assert registry.preset("computed") == "sweep"
    assert registry.frontend("plain") is Path
    assert registry.target("eager") is dataclass


def test_an_entry_knows_its_provider(shipped: list[EntryPoint], distribute: Distribute) -> None:
    registry = Registry([*shipped, *distribute("acme-passes", "1.2", passes={"polish": "acme:Polish"})])
    entry = registry.find("polish", PASSES)
    assert (entry.provider, entry.version, entry.origin) == ("acme-passes", "1.2", "acme-passes 1.2")
    assert (entry.kind, entry.value) == ("pass", "acme:Polish")
    assert registry.find("tidy", PASSES).origin == "fxpass 0.1.0"


def test_an_entry_point_outside_a_distribution_is_usable() -> None:
    registry = Registry([EntryPoint("tidy", f"{__name__}:Tidy", PASSES)])
    assert registry.pass_class("tidy") is Tidy
    assert registry.find("tidy", PASSES).origin == "an unknown distribution"


def test_names_are_sorted_and_other_groups_left_alone(shipped: list[EntryPoint]) -> None:
    registry = Registry([*shipped, EntryPoint("fxpass", "fxpass.cli:main", "console_scripts")])
    assert registry.names(PASSES) == ("sweep", "tidy")
    assert registry.names(PASSES, PRESETS) == ("computed", "quick", "sweep", "tidy")
    assert [entry.name for entry in registry.entries(FRONTENDS, TARGETS)] == ["eager", "plain"]


def test_the_order_of_entry_points_does_not_matter(shipped: list[EntryPoint]) -> None:
    assert Registry(shipped).entries(PASSES) == Registry(shipped[::-1]).entries(PASSES)


def test_nothing_is_imported_before_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, distribute: Distribute
) -> None:
    (tmp_path / "lazy_plugin.py").write_text("TEXT = 'tidy'")
    monkeypatch.syspath_prepend(tmp_path)
    registry = Registry(distribute("lazy", "1.0", presets={"lazily": "lazy_plugin:TEXT"}))
    assert registry.names(PRESETS) == ("lazily",)
    assert registry.find("lazily", PRESETS)
    assert "lazy_plugin" not in sys.modules
    assert registry.preset("lazily") == "tidy"
    assert sys.modules.pop("lazy_plugin").TEXT == "tidy"


@pytest.mark.parametrize(
    ("word", "groups", "error", "said"),
    [
        ("tidi", (PASSES,), PipelineError, "there is no pass 'tidi'; did you mean 'tidy'? Try: one of sweep, tidy"),
        ("quik", (PRESETS,), PipelineError, "there is no preset 'quik'; did you mean 'quick'? Try: one of computed, q"),
        (
            "zzz",
            (PASSES, PRESETS),
            PipelineError,
            "there is no pass or preset 'zzz'. Try: one of computed, quick, sweep",
        ),
        ("eagre", (TARGETS,), UsageError, "there is no target 'eagre'; did you mean 'eager'? Try: one of eager"),
    ],
)
def test_an_unknown_name(
    shipped: list[EntryPoint], word: str, groups: tuple[str, ...], error: type[UsageError], said: str
) -> None:
    with pytest.raises(error) as caught:
        Registry(shipped).find(word, *groups)
    assert type(caught.value) is error
    assert str(caught.value).startswith(said)


def test_an_empty_group_says_what_is_needed() -> None:
    with pytest.raises(PipelineError, match=r"there is no pass 'tidy'. Try: a package that registers a pass"):
        Registry([]).pass_class("tidy")


def test_two_providers_of_a_name_are_both_named(shipped: list[EntryPoint], distribute: Distribute) -> None:
    registry = Registry([*shipped, *distribute("acme", "1.2", passes={"tidy": "acme:Tidy"})])
    with pytest.raises(PipelineError) as caught:
        registry.pass_class("tidy")
    assert "'tidy' is registered more than once" in str(caught.value)
    assert "acme 1.2 (pass acme:Tidy)" in str(caught.value)
    assert f"fxpass 0.1.0 (pass {__name__}:Tidy)" in str(caught.value)
    assert registry.pass_class("sweep") is Sweep


def test_a_pass_and_a_preset_share_their_names(shipped: list[EntryPoint], distribute: Distribute) -> None:
    registry = Registry([*shipped, *distribute("acme", "1.2", presets={"tidy": "acme:TEXT"})])
    with pytest.raises(PipelineError, match=r"acme 1\.2 \(preset acme:TEXT\) and fxpass 0\.1\.0 \(pass"):
        registry.find("tidy", PASSES, PRESETS)
    assert [bool(line.problem) for line in registry.listing(PASSES)] == [False, True]


def test_a_distribution_found_twice_is_no_clash(shipped: list[EntryPoint]) -> None:
    registry = Registry([*shipped, *shipped])
    assert registry.pass_class("tidy") is Tidy
    assert len(registry.entries(PASSES)) == 2


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("other = 1", "AttributeError: module 'broken_plugin' has no attribute 'Polish'"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_does_not_import(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    shipped: list[EntryPoint],
    distribute: Distribute,
    source: str,
    cause: str,
) -> None:
    (tmp_path / "broken_plugin.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    registry = Registry([*shipped, *distribute("acme", "1.2", passes={"polish": "broken_plugin:Polish"})])
    assert registry.pass_class("tidy") is Tidy
    with pytest.raises(PipelineError) as caught:
        registry.pass_class("polish")
    assert "the pass 'polish' (broken_plugin:Polish) of acme 1.2 cannot be loaded" in str(caught.value)
    assert cause in str(caught.value)
    assert caught.value.__cause__ is not None
    sys.modules.pop("broken_plugin", None)


@pytest.mark.parametrize(
    ("name", "attribute", "problem"),
    [
        ("tidy", "Path", "is not a subclass of fxpass.Pass"),
        ("tidy", "QUICK", "is not a subclass of fxpass.Pass"),
        ("clean", "Tidy", "calls itself 'tidy'"),
        ("undecorated", "Undecorated", "is not decorated with @dataclass(frozen=True)"),
        ("nameless", "Nameless", "has no kebab-case class attribute 'name'"),
        ("Shouting_Pass", "Shouting", "has no kebab-case class attribute 'name'"),
    ],
)
def test_a_plugin_that_is_no_pass(distribute: Distribute, name: str, attribute: str, problem: str) -> None:
    registry = Registry(distribute("acme", "1.2", passes={name: f"{__name__}:{attribute}"}))
    with pytest.raises(PipelineError) as caught:
        registry.pass_class(name)
    assert f"of acme 1.2 {problem}" in str(caught.value)


@pytest.mark.parametrize("attribute", ["EMPTY", "Distribute", "Tidy"])
def test_a_preset_that_is_no_text(distribute: Distribute, attribute: str) -> None:
    registry = Registry(distribute("acme", "1.2", presets={"odd": f"{__name__}:{attribute}"}))
    with pytest.raises(PipelineError, match=r"the preset 'odd' .* of acme 1\.2 (is not a pipeline text|cannot be)"):
        registry.preset("odd")


def test_a_missing_extra_is_said_as_it_is(distribute: Distribute) -> None:
    registry = Registry(distribute("acme", "1.2", presets={"needs-mace": f"{__name__}:missing_extra"}))
    with pytest.raises(MissingExtraError, match=r"pip install"):
        registry.preset("needs-mace")


def test_a_listing_shows_what_is_broken_and_raises_nothing(shipped: list[EntryPoint], distribute: Distribute) -> None:
    plugin = distribute("acme", "1.2", passes={"polish": "no_such_module:Polish", "tidy": "acme:Tidy"})
    lines = {(line.entry.name, line.entry.provider): line for line in Registry([*shipped, *plugin]).listing(PASSES)}
    assert set(lines) == {("sweep", "fxpass"), ("tidy", "fxpass"), ("tidy", "acme"), ("polish", "acme")}
    assert lines["sweep", "fxpass"].loaded is Sweep
    assert lines["sweep", "fxpass"].problem is None
    assert "No module named 'no_such_module'" in (lines["polish", "acme"].problem or "")
    assert "registered more than once" in (lines["tidy", "fxpass"].problem or "")
    assert lines["tidy", "acme"].loaded is None


def test_the_default_registry_has_the_shipped_passes() -> None:
    registry = default_registry()
    assert registry.find("differentiate", PASSES).provider == "fxpass"
    assert "default" in registry.names(PRESETS)
    assert [line.problem for line in registry.listing(PRESETS)] == [None] * len(registry.names(PRESETS))


@pytest.mark.parametrize("installed", [False, True], ids=["nothing", "only-a-plugin"])
def test_a_bare_checkout_is_refused(monkeypatch: pytest.MonkeyPatch, distribute: Distribute, installed: bool) -> None:
    points = distribute("acme", "1.2", passes={"polish": f"{__name__}:Tidy"}) if installed else []
    monkeypatch.setattr(metadata, "entry_points", lambda *, group: [p for p in points if p.group == group])
    with pytest.raises(UsageError, match=r"not installed: .* Try: \"pip install -e \.\""):
        default_registry()


def test_did_you_mean() -> None:
    assert did_you_mean("tabulat", ["tabulate", "dead-code"]) == "; did you mean 'tabulate'?"
    assert did_you_mean("pin_precision", ["pin-precision"]) == "; did you mean 'pin-precision'?"
    assert did_you_mean("zzz", ["tabulate"]) == ""


def test_pass_problem_accepts_a_pass() -> None:
    assert pass_problem(Tidy) is None
