"""Pipelines as text: parsing, printing, round trips, and where errors point."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import pytest
import torch

from fxpass.errors import PipelineError, UsageError
from fxpass.passes import Exactness, Pass
from fxpass.pipeline import format_options, format_pass, format_passes, parse, resolve
from fxpass.registry import PASSES, PRESETS, Registry

pytestmark = pytest.mark.once


class Mode(Enum):
    FAST = "fast"
    NEAR_EXACT = "near-exact"


class Level(Enum):
    LOW = 1
    HIGH = 2


class Mixed(str, Enum):
    PLAIN = "plain"
    ODD = "not a plain word"


@dataclass(frozen=True)
class Tidy(Pass):
    name: ClassVar[str] = "tidy"


@dataclass(frozen=True)
class Tabulate(Pass):
    name: ClassVar[str] = "tabulate"
    order: int = 3
    budget: float = 1e-4


@dataclass(frozen=True)
class PinPrecision(Pass):
    name: ClassVar[str] = "pin-precision"
    compute: torch.dtype = torch.float32


@dataclass(frozen=True)
class Everything(Pass):
    name: ClassVar[str] = "everything"
    flag: bool = False
    count: int = 0
    ratio: float = 0.5
    label: str = ""
    dtype: torch.dtype = torch.float32
    mode: Mode = Mode.FAST
    level: Level = Level.LOW
    mixed: Mixed = Mixed.PLAIN
    norm: Literal["sum", "mean", 3, "3"] = "sum"
    nothing: None = None
    cutoff: float | None = None
    title: str | None = None
    size: int | str = 0
    number: int | float = 0
    anything: bool | int | float | str | torch.dtype | Mode | None = None
    orders: tuple[int, ...] = ()
    names: list[str] = field(default_factory=list)
    pair: tuple[str, float] = ("", 0.0)
    nested: tuple[tuple[int, ...], ...] = ()
    dtypes: tuple[torch.dtype, ...] | None = None
    choices: tuple[str | int | None, ...] = ()
    single: tuple[()] = ()


@dataclass(frozen=True)
class Required(Pass):
    name: ClassVar[str] = "required"
    head: str
    index: int = field(default=0, kw_only=True)


@dataclass(frozen=True)
class Careful(Pass):
    name: ClassVar[str] = "careful"
    order: int = 1
    derived: int = field(init=False, default=7)

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError("order must be positive")


@dataclass(frozen=True)
class Wrapping(Pass):
    name: ClassVar[str] = "wrapping"
    function: Callable[[int], int] | None = None
    weight: torch.Tensor | None = None


PRESET_TEXTS = {
    "quick": "tidy,tabulate{order=4}",
    "thorough": "quick,pin-precision",
    "loop": "tidy,back",
    "back": "loop",
    "stale": "tidy,tabulat",
}
QUICK, THOROUGH, LOOP, BACK, STALE = PRESET_TEXTS.values()
CLASSES = (Tidy, Tabulate, PinPrecision, Everything, Required, Careful, Wrapping)
REGISTRY = Registry(
    [
        *(EntryPoint(cls.name, f"{__name__}:{cls.__name__}", PASSES) for cls in CLASSES),
        *(EntryPoint(name, f"{__name__}:{name.upper()}", PRESETS) for name in PRESET_TEXTS),
    ]
)


def same(a: Any, b: Any) -> bool:
    """Equal in type and value, nan included."""
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (repr(a) == repr(b) if isinstance(a, float) else a == b)


# --- reading and printing


def test_the_example_of_the_documentation() -> None:
    text = "tabulate{order=5,budget=1e-6},pin-precision{compute=bfloat16}"
    passes = parse(text, REGISTRY)
    assert passes == (Tabulate(order=5, budget=1e-6), PinPrecision(compute=torch.bfloat16))
    assert format_passes(passes) == text


def test_only_options_off_their_default_are_printed() -> None:
    assert format_pass(Tabulate()) == "tabulate"
    assert format_pass(Tabulate(budget=1e-3)) == "tabulate{budget=0.001}"
    assert format_options(Tabulate(order=5, budget=1e-4)) == "order=5"
    assert format_options(Everything(names=[], ratio=0.5)) == ""
    assert parse("tabulate{order=3}", REGISTRY) == parse("tabulate{}", REGISTRY) == (Tabulate(),)


def test_white_space_is_free() -> None:
    text = " tidy ,\n tabulate { order = 5 ,\tbudget = 1e-6 } , everything{ orders = [ 1 , 2 ] } \n"
    assert parse(text, REGISTRY) == (Tidy(), Tabulate(5, 1e-6), Everything(orders=(1, 2)))


def test_no_passes() -> None:
    assert parse("", REGISTRY) == ()
    assert format_passes(()) == ""


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("flag", True, "true"),
        ("count", -7, "-7"),
        ("count", 10**30, str(10**30)),
        ("ratio", 1e-6, "1e-6"),
        ("ratio", 1e16, "1e16"),
        ("ratio", -2.5e-300, "-2.5e-300"),
        ("ratio", 0.1 + 0.2, "0.30000000000000004"),
        ("ratio", 5e-324, "5e-324"),
        ("ratio", 3.0, "3.0"),
        ("ratio", -0.0, "-0.0"),
        ("ratio", math.inf, "inf"),
        ("ratio", -math.inf, "-inf"),
        ("ratio", math.nan, "nan"),
        ("label", "word", "word"),
        ("label", "64x0e+64x1o", "64x0e+64x1o"),
        ("label", "true", "true"),
        ("label", "5", "5"),
        ("label", "two words", '"two words"'),
        ("label", "a,b{c}[d]=e", '"a,b{c}[d]=e"'),
        ("label", 'say "hi" \\ bye', r'"say \"hi\" \\ bye"'),
        ("label", "line\nbreak\ttab", r'"line\nbreak\ttab"'),
        ("label", "Å", r'"\u00c5"'),
        ("dtype", torch.bfloat16, "bfloat16"),
        ("dtype", torch.float8_e4m3fn, "float8_e4m3fn"),
        ("mode", Mode.NEAR_EXACT, "near-exact"),
        ("level", Level.HIGH, "HIGH"),
        ("mixed", Mixed.ODD, "ODD"),
        ("norm", "mean", "mean"),
        ("norm", 3, "3"),
        ("norm", "3", '"3"'),
        ("cutoff", 5.0, "5.0"),
        ("title", "", '""'),
        ("title", "none", '"none"'),
        ("title", "some", "some"),
        ("size", 3, "3"),
        ("size", "3", '"3"'),
        ("number", 3, "3"),
        ("number", 3.0, "3.0"),
        ("number", 0.0, "0.0"),
        ("anything", True, "true"),
        ("anything", 1, "1"),
        ("anything", 1.0, "1.0"),
        ("anything", "1.0", '"1.0"'),
        ("anything", "bfloat16", '"bfloat16"'),
        ("anything", torch.bfloat16, "bfloat16"),
        ("anything", "fast", '"fast"'),
        ("anything", Mode.FAST, "fast"),
        ("anything", "nan", '"nan"'),
        ("orders", (1, 2, 3), "[1,2,3]"),
        ("orders", (1,), "[1]"),
        ("names", ["a", "b c", ""], '[a,"b c",""]'),
        ("names", ["a", "b"], "[a,b]"),
        ("pair", ("x", 1.5), "[x,1.5]"),
        ("nested", ((1, 2), (), (3,)), "[[1,2],[],[3]]"),
        ("dtypes", (torch.float64, torch.int32), "[float64,int32]"),
        ("dtypes", (), "[]"),
        ("choices", ("a", 1, None), "[a,1,none]"),
        ("choices", ("1", "none", 1, None), '["1","none",1,none]'),
    ],
)
def test_round_trip(option: str, value: Any, text: str) -> None:
    pass_ = Everything(**{option: value})
    printed = format_passes([pass_])
    assert printed == f"everything{{{option}={text}}}"
    (again,) = parse(printed, REGISTRY)
    assert isinstance(again, Everything)
    assert same(getattr(again, option), value)
    assert format_passes([again]) == printed


def test_round_trip_of_everything_at_once() -> None:
    pass_ = Everything(
        flag=True,
        count=2,
        label="a b",
        dtype=torch.float64,
        mode=Mode.NEAR_EXACT,
        level=Level.HIGH,
        mixed=Mixed.ODD,
        norm=3,
        cutoff=1.0,
        title="none",
        size="7",
        anything=False,
        orders=(3, 1),
        names=["x=y"],
        pair=("p", 2.0),
        nested=((1,),),
        dtypes=(torch.int64,),
        choices=("s", 2, None),
    )
    passes = (pass_, Tidy(), Required("ground state", index=2), Required("x"))
    assert parse(format_passes(passes), REGISTRY) == passes


def test_every_dtype_and_exactness_round_trips() -> None:
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)} - {torch.float32}
    assert len(dtypes) > 20
    for dtype in dtypes:
        assert parse(format_pass(PinPrecision(dtype)), REGISTRY) == (PinPrecision(dtype),)
    assert [member.value for member in Exactness] == ["exact", "reassociates", "approximate"]


def test_fields_that_are_no_options_are_left_out() -> None:
    assert format_pass(Careful(order=2)) == "careful{order=2}"
    with pytest.raises(PipelineError, match="has no option 'derived'"):
        parse("careful{derived=3}", REGISTRY)


def test_a_value_without_text_form_prints_as_its_type_and_does_not_parse() -> None:
    text = format_pass(Wrapping(function=abs, weight=torch.ones(2)))
    assert text == "wrapping{function=<builtin_function_or_method>,weight=<Tensor>}"
    with pytest.raises(PipelineError, match=r"no text form"):
        parse(text, REGISTRY)


def test_a_value_of_the_wrong_type_never_reads_back_as_another() -> None:
    text = format_pass(PinPrecision(compute="bfloat16"))  # type: ignore[arg-type]
    assert text == 'pin-precision{compute="bfloat16"}'
    with pytest.raises(PipelineError, match=r"takes dtype"):
        parse(text, REGISTRY)


def test_a_pass_from_outside_the_registry_prints() -> None:
    class Hue(Enum):
        RED = "red"

    @dataclass(frozen=True)
    class Local(Pass):
        name: ClassVar[str] = "local"
        hue: Hue = Hue.RED  # cannot be looked up by name from outside this function
        path: str = ""

    assert format_passes([Local(), Tidy(), Local(path="x")]) == 'local,tidy,local{path="x"}'


# --- resolving what users give


def test_resolve_takes_presets_texts_passes_and_mixtures() -> None:
    quick = (Tidy(), Tabulate(order=4))
    assert resolve("quick", REGISTRY) == quick
    assert resolve("tidy", REGISTRY) == (Tidy(),)
    assert resolve("quick,tabulate{order=5}", REGISTRY) == (*quick, Tabulate(order=5))
    assert resolve(Tidy(), REGISTRY) == (Tidy(),)
    mixed = ["tabulate", PinPrecision(torch.bfloat16), "thorough", "tidy,tidy"]
    assert resolve(mixed, REGISTRY) == (
        *(Tabulate(), PinPrecision(torch.bfloat16)),
        *(*quick, PinPrecision()),
        *(Tidy(), Tidy()),
    )
    assert resolve((item for item in ["tidy"]), REGISTRY) == (Tidy(),)
    assert resolve([], REGISTRY) == ()


def test_resolve_takes_a_pass_from_outside_the_registry() -> None:
    @dataclass(frozen=True)
    class Mine(Pass):
        name: ClassVar[str] = "mine"

    assert resolve(["tidy", Mine()], REGISTRY) == (Tidy(), Mine())


class Careless(Pass):
    name = "careless"
    order: int = 2


@pytest.mark.parametrize(
    ("passes", "error", "said"),
    [
        ("", PipelineError, "the pipeline text is empty. Try: passes=[]"),
        (["tidy", " \n"], PipelineError, "the pipeline text is empty"),
        (None, UsageError, "passes is None"),
        (3, UsageError, "passes is 3"),
        ([3], UsageError, "3 is neither a name, nor a pipeline text, nor a pass"),
        ([Tidy], UsageError, "Tidy is a pass class, not a pass. Try: Tidy()"),
        ([Careless()], UsageError, "the pass class Careless is not decorated with @dataclass(frozen=True)"),
        ([["tidy"]], UsageError, "['tidy'] is neither"),
        (["tidi"], PipelineError, "there is no pass or preset 'tidi'; did you mean 'tidy'?"),
    ],
)
def test_resolve_refuses(passes: Any, error: type[UsageError], said: str) -> None:
    with pytest.raises(error) as caught:
        resolve(passes, REGISTRY)
    assert type(caught.value) is error
    assert str(caught.value).startswith(said)


def test_presets_inside_a_pipeline_take_no_options() -> None:
    message = complaint("tidy,quick{order=5}")
    assert message.startswith("'quick' is a preset and takes no options")
    assert marked(message) == "order"


def test_a_preset_that_contains_itself() -> None:
    with pytest.raises(PipelineError) as caught:
        resolve("loop", REGISTRY)
    assert "the preset 'loop' contains itself: loop -> back -> loop (in the preset 'back'" in str(caught.value)


def test_an_error_inside_a_preset_shows_the_text_of_the_preset() -> None:
    message = complaint("tidy,stale")
    assert "there is no pass or preset 'tabulat'; did you mean 'tabulate'?" in message
    assert "in the preset 'stale' of an unknown distribution" in message
    assert marked(message) == "tabulat"


# --- errors


def complaint(text: str) -> str:
    with pytest.raises(PipelineError) as caught:
        parse(text, REGISTRY)
    return str(caught.value)


def marked(message: str) -> str:
    """The part of the shown line that the carets are under."""
    _, line, carets = message.split("\n")[-3:]
    carets = carets.split(" Try:")[0]
    return line[len(carets) - carets.count("^") : len(carets)]


@pytest.mark.parametrize(
    ("text", "said", "part"),
    [
        ("tidy,tabulat", "there is no pass or preset 'tabulat'; did you mean 'tabulate'?", "tabulat"),
        ("tabulate{ordr=5}", "the pass 'tabulate' has no option 'ordr'; did you mean 'order'?", "ordr"),
        ("tidy{order=5}", "the pass 'tidy' has no option 'order'", "order"),
        ("tabulate{order=five}", "the option 'order' of 'tabulate' takes int, not five", "five"),
        ("tabulate{order=5.0}", "takes int, not 5.0", "5.0"),
        ('tabulate{order="5"}', 'takes int, not "5"', '"5"'),
        ("tabulate{budget=small}", "the option 'budget' of 'tabulate' takes float, not small", "small"),
        ("tabulate{order=[5]}", "takes int, not [5]", "[5]"),
        ("tabulate{order=5,order=6}", "the option 'order' of 'tabulate' is given twice", "order"),
        (
            "pin-precision{compute=bfloat}",
            "takes dtype (such as bfloat16), not bfloat; did you mean 'bfloat16'?",
            "bfloat",
        ),
        ("everything{flag=True}", "takes true or false, not True; did you mean 'true'?", "True"),
        ("everything{mode=near}", "takes fast or near-exact, not near", "near"),
        ("everything{level=1}", "takes LOW or HIGH, not 1", "1"),
        ("everything{norm=avg}", "takes 3 or sum or mean or 3, not avg", "avg"),
        ("everything{nothing=0}", "takes none, not 0", "0"),
        ("everything{cutoff=far}", "takes float or none, not far", "far"),
        ("everything{orders=5}", "takes list [...] of int, not 5", "5"),
        ("everything{orders=[1,x]}", "takes int, not x", "x"),
        ("everything{pair=[a]}", "takes list [string, float], not [a]", "[a]"),
        ("everything{single=[1]}", "takes list [], not [1]", "[1]"),
        ("required", "the pass 'required' needs the option 'head': string", "required"),
        ("tidy,careful{order=0}", "the pass 'careful' refuses its options: order must be positive", "careful"),
        ("tabulate{order}", "expected '=' and a value, found '}'", "}"),
        ("tabulate{order=}", "expected a value, found '}'", "}"),
        ("tabulate{=5}", "expected the name of an option, found '='", "="),
        ("tabulate{order=5 budget=1}", "expected ',' or '}', found 'b'", "b"),
        ("tidy tidy", "expected ',' or the end of the pipeline, found 't'", "t"),
        ("tidy}", "expected ',' or the end of the pipeline, found '}'", "}"),
        (",tidy", "expected the name of a pass or preset, found ','", ","),
        ("tidy,,tidy", "expected the name of a pass or preset, found ','", ","),
        ('"tidy"', "expected the name of a pass or preset, found '\"'", '"'),
        ("everything{orders=[1 2]}", "expected ',' or ']', found '2'", "2"),
        (r'everything{label="\x"}', "this string has an unknown escape", r'"\x"'),
        ('everything{label="abc}', "this string has no closing quote", '"abc}'),
    ],
)
def test_an_error_points_at_its_place(text: str, said: str, part: str) -> None:
    message = complaint(text)
    assert said in message.split("\n")[0]
    assert f"    {text}\n" in message
    assert marked(message) == part


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tidy,", "expected the name of a pass or preset, found the end"),
        ("tabulate{order=5", "expected ',' or '}', found the end"),
        ("tabulate{order=", "expected a value, found the end"),
        ("everything{orders=[1", "expected ',' or ']', found the end"),
    ],
)
def test_an_error_at_the_end_points_behind_it(text: str, said: str) -> None:
    assert complaint(text) == f"{said}\n    {text}\n    {' ' * len(text)}^"


def test_an_error_in_full() -> None:
    assert complaint("tidy,tabulate{ordr=5}") == (
        "the pass 'tabulate' has no option 'ordr'; did you mean 'order'?\n"
        "    tidy,tabulate{ordr=5}\n"
        "                  ^^^^ Try: one of order, budget"
    )


def test_an_error_in_a_long_text_shows_the_part_around_it() -> None:
    message = complaint(",".join([*["tidy"] * 60, "tabulat", *["tidy"] * 60]))
    line = message.split("\n")[1].strip()
    assert marked(message) == "tabulat"
    assert line.startswith("…") and line.endswith("…") and len(line) <= 102


def test_an_error_in_several_lines_shows_the_line() -> None:
    message = complaint("tidy,\n\ttabulate{order=x},\ntidy")
    assert message.split("\n")[1] == "     tabulate{order=x},"
    assert marked(message) == "x"
