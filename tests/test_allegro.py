"""Allegro: the drop-in against the original, built and packaged, for every option that is covered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxpass
from fxpass.frontends.allegro import AllegroFrontend
from fxpass.frontends.nequip import NequipFrontend
from test_nequip import (
    BY_TYPE,
    CUTOFF,
    CUTOFFS,
    ZBL,
    build,
    call,
    check_file,
    checkpoint,
    compare_variant,
    configuration,
    frame,
    package,
    refused,
    structures,
)
from variants import chosen

pytestmark = pytest.mark.nequip

BUILDER = "allegro.model.AllegroModel"
BESSEL = {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 4}
SPLINE = {"_target_": "allegro.nn.TwoBodySplineScalarEmbed", "num_splines": 6, "spline_span": 4}
SIZES: dict[str, Any] = {
    "l_max": 1,
    "num_layers": 2,
    "num_scalar_features": 8,
    "num_tensor_features": 4,
    "radial_chemical_embed": BESSEL,
    "scalar_embed_mlp_hidden_layers_width": 8,
    "allegro_mlp_hidden_layers_width": 8,
    "readout_mlp_hidden_layers_width": 8,
}

#: name -> arguments of the builder beyond ``SIZES``
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "l2": {"l_max": 2},
    "no-parity-l2": {"l_max": 2, "parity": False},
    "l3": {"l_max": 3, "num_tensor_features": 2},
    "one-layer": {"num_layers": 1},
    "three-layers": {"num_layers": 3, "l_max": 2},
    "paths-apart-from-channels": {"tp_path_channel_coupling": False, "num_layers": 3},
    "one-weight-for-all-irreps": {"weight_individual_irreps": False},
    "splines": {"radial_chemical_embed": SPLINE},
    "embedding-of-its-own-width": {"radial_chemical_embed_dim": 6},
    "linear-networks": {"allegro_mlp_hidden_layers_depth": 0, "readout_mlp_hidden_layers_depth": 0},
    "deep-linear-networks": {"allegro_mlp_nonlinearity": None, "allegro_mlp_hidden_layers_depth": 2},
    "deep-networks": {"scalar_embed_mlp_hidden_layers_depth": 2, "readout_mlp_nonlinearity": "gelu"},
    "zbl-and-cutoffs": {"pair_potential": ZBL, "per_edge_type_cutoff": CUTOFFS},
    "neighbours-by-type": {"avg_num_neighbors": BY_TYPE},
    "no-scales": {"per_type_energy_scales": None, "per_type_energy_shifts": None},
}


def allegro(**options: Any) -> Any:
    return build(BUILDER, SIZES | options)


ALWAYS = ("default", "no-parity-l2", "three-layers", "splines", "zbl-and-cutoffs", "deep-networks")


@pytest.mark.parametrize("name", chosen(VARIANTS, *ALWAYS))
def test_variant_is_exact_in_float64(name: str) -> None:
    compare_variant(allegro(**VARIANTS[name]), AllegroFrontend())


def test_either_frontend_recognises_its_own_models() -> None:
    mine, other = allegro(), build()
    assert AllegroFrontend().recognises(mine) and not NequipFrontend().recognises(mine)
    assert NequipFrontend().recognises(other) and not AllegroFrontend().recognises(other)
    assert not AllegroFrontend().recognises(nn.Linear(1, 1))


@pytest.mark.slow
def test_the_default_pipeline_in_kernels_passes_its_receipt(tmp_path: Path) -> None:
    model = allegro(model_dtype="float32", radial_chemical_embed=SPLINE, pair_potential=ZBL)
    optimised = fxpass.optimize(model, target="native")
    receipt = optimised.report.receipt
    assert receipt is not None and receipt.passed and optimised.report.frontend == "allegro"
    assert optimised.facts["dtype"] == "float32"  # although the first of its weights are float64
    ops = [row.op for row in optimised.manifest if row.kernel]
    if ops:  # where there is a compiler: two environments and the first product of features
        assert ops.count("convolution") >= 3 and ops.count("convolution_gradient") >= 3
    optimised.save(tmp_path / "model.fxp")
    loaded = fxpass.load(tmp_path / "model.fxp")
    data = frame(structures()[0])
    found, expected = call(loaded, data), call(optimised, data)
    assert torch.equal(found["forces"], expected["forces"])
    atoms = structures()[0].to_ase()
    atoms.calc = optimised.calculator()
    assert abs(atoms.get_potential_energy() - float(call(model, data)["total_energy"])) < 1e-4


def test_a_checkpoint_and_a_package(tmp_path: Path) -> None:
    original = checkpoint(tmp_path / "last.ckpt", configuration(BUILDER, SIZES))
    check_file(tmp_path / "last.ckpt", original, AllegroFrontend())
    package(tmp_path / "model.nequip.zip", {"sole_model": original})
    check_file(tmp_path / "model.nequip.zip", original, AllegroFrontend())


def test_the_tensor_track_is_made_of_semantic_ops() -> None:
    program = AllegroFrontend().capture(allegro(l_max=2, r_max=CUTOFF))
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("fxpass.tensor_product.default") == 3  # two environments and a product of features
    assert not any("einsum" in name or "bmm" in name for name in names)


def test_trained_biases_are_exact() -> None:
    from nequip.nn.mlp import ScalarLinearLayer

    model = allegro(num_layers=1)
    for layer in model.modules():
        if isinstance(layer, ScalarLinearLayer):
            layer.bias = nn.Parameter(torch.randn(layer.weight.shape[1], dtype=torch.float64) * 0.1)
    compare_variant(model, AllegroFrontend())


def test_another_version_of_nequip_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = allegro(num_layers=1)
    monkeypatch.setattr(NequipFrontend, "tested", ("0.25.0",))
    refused(model, "nequip 0.19.1 is not covered", "0.25.0")


def test_classes_of_others_within_a_stand_in_are_refused() -> None:
    model = allegro(num_layers=1)
    layers = model.model.func.allegro
    layers.latents[0].__class__ = type("Own", (type(layers.latents[0]),), {"__module__": __name__})
    refused(model, "the class Own is not covered", "allegro.latents.0")


def test_accelerated_products_are_refused_by_name() -> None:
    model = allegro(num_layers=1)
    layers = model.model.func.allegro
    layers.tps[0].__class__ = type("TritonContracter", (type(layers.tps[0]),), {"__module__": "allegro.nn._strided"})
    refused(model, "TritonContracter", "allegro.tps.0")
