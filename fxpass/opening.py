"""From what the user has, a model or a file, to a module and the frontend that covers it; and what none covers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import FxpassError, Location, UnsupportedModelError, UsageError
from .frontends.base import Frontend
from .optimized import Optimized
from .registry import FRONTENDS, default_registry


def open_model(model: nn.Module | str | Path) -> tuple[nn.Module, Frontend]:
    """A model, or the one that a checkpoint holds, and the frontend that covers it.

    Raises:
        UsageError: no such file, or not a model.
        UnsupportedModelError: no frontend covers the model, or the file cannot be loaded.
        MissingExtraError: the family's package is not installed.
    """
    frontends, broken = _frontends()
    known = ", ".join(f.name for f in frontends) + broken
    if isinstance(model, (str, Path)):
        model = _load(model, frontends, known)
    _not_optimised(model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"{type(model).__name__} is not a model", hint="a torch.nn.Module or the path of a checkpoint")
    found = next((f for f in frontends if f.recognises(model)), None)
    if found is None:
        cls = type(model)
        raise UnsupportedModelError(
            "no frontend covers this model",
            where=Location(module_path="(model)", source=f"{cls.__module__}.{cls.__qualname__}"),
            hint=f"a model of {known}; example_inputs=(...) for a module that is no potential; or register a frontend "
            "(entry point group fxpass.frontends)",
        )
    _no_hooks(model)
    found.check(model)
    return model, found


def open_function(model: Any) -> nn.Module:
    """A module that no frontend covers, which is what ``example_inputs`` are for.

    Raises:
        UsageError: not a module, or a potential.
        UnsupportedModelError: it is compiled already, or has hooks.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"example_inputs are for a torch.nn.Module, not for a {type(model).__name__}")
    _not_optimised(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            f"this module is compiled to TorchScript already ({model.original_name}), which hides what it is made of",
            hint="optimise the module that it was made from",
        )
    family = next((f.name for f in _frontends()[0] if f.recognises(model)), None)
    if family is not None:
        raise UsageError(
            f"this is a model of the family {family}, which has inputs of its own",
            hint="leave example_inputs out; example= takes structures",
        )
    _no_hooks(model)
    return model


def _frontends() -> tuple[list[Frontend], str]:
    """All that can be loaded, and in words what cannot."""
    listing = default_registry().listing(FRONTENDS)
    broken = "".join(f"; {listed.problem}" for listed in listing if listed.problem is not None)
    return [listed.loaded() for listed in listing if listed.problem is None], broken


def _load(given: str | Path, frontends: list[Frontend], known: str) -> nn.Module:
    path = Path(given)
    names = {name: f for f in frontends for name in getattr(f, "names", ())}
    if path.is_file():
        reader = next((f for f in frontends if f.reads(str(path))), None)
        if reader is None:
            raise UnsupportedModelError(f"{path} is not a checkpoint of a known family", hint=f"one of {known}")
    elif (reader := names.get(str(given).lower())) is None:
        shipped = f", or one of {', '.join(names)}" if names else ""
        raise UsageError(f"there is no file {path}", hint=f"check the path of the checkpoint{shipped}")
    try:
        return reader.load(str(path))
    except FxpassError:
        raise
    except Exception as error:  # unpickling runs whatever code the file names, which may raise anything
        reason = (str(error).splitlines() or [""])[0]
        raise UnsupportedModelError(
            f"{path} cannot be loaded: {type(error).__name__}: {reason}",
            hint=f"save the checkpoint again; it needs the version of {reader.name} that wrote it",
        ) from error


def _not_optimised(model: Any) -> None:
    if isinstance(model, Optimized):
        raise UsageError("this model is optimised already", hint="optimise the original")


def _no_hooks(model: nn.Module) -> None:
    """Refuse a model whose hooks change what it computes: no graph has them."""
    for path, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) and (module._forward_hooks or module._forward_pre_hooks):
            raise UnsupportedModelError(
                "this module has forward hooks, which a compiled model would not run",
                where=Location(module_path=path or "(model)", source=type(module).__qualname__),
                hint="remove them; parametrisations by hooks (weight_norm) have a function that does",
            )
