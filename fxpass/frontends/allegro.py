"""Allegro (nequip-allegro): ``GraphModel`` of the builders ``AllegroModel`` and ``FullAllegroModel``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from ..capture.rules import Rule
from .allegro_rules import ALLEGRO_RULES
from .nequip import COMMON, NequipFrontend, check_version, holds_allegro, is_graph_model

STEPS = (
    "allegro.nn.scalarembed.TwoBodySplineScalarEmbed",
    "allegro.nn._edgeembed.ProductTypeEmbedding",
    "allegro.nn.tensorembed.TwoBodySphericalHarmonicTensorEmbed",
    "allegro.nn._allegro.Allegro_Module",
    "allegro.nn.edgewise.EdgewiseReduce",
)


class AllegroFrontend(NequipFrontend):
    """Frontend for nequip-allegro: the models, files and conventions of nequip with other modules in them."""

    name: ClassVar[str] = "allegro"
    extra: ClassVar[str] = "allegro"
    tested: ClassVar[tuple[str, ...]] = ("0.8.3",)
    covered: ClassVar[tuple[str, ...]] = (*COMMON, *STEPS)
    rules: ClassVar[Mapping[str, Rule]] = ALLEGRO_RULES
    package: ClassVar[str] = "nequip-allegro"

    def check(self, model: Any) -> None:
        check_version(NequipFrontend, model)
        super().check(model)

    def recognises(self, model: Any) -> bool:
        return is_graph_model(model) and holds_allegro(model)
