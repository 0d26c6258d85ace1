"""Finds the family of a checkpoint by its `architectures`, never by `model_type`, which two architectures share.

A family is a module of this package that defines `ARCHITECTURES`, `Config`, `Model` and `weight_table`.
"""

import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Any

import models


@cache
def families() -> dict[str, ModuleType]:
    """Every architecture name and the module that implements it."""
    found: dict[str, ModuleType] = {}
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"models.{info.name}")
        for name in getattr(module, "ARCHITECTURES", ()):
            if name in found:
                raise ValueError(f"{name} is claimed by {found[name].__name__} and {module.__name__}: remove one")
            found[name] = module
    return found


def find_family(hf: dict[str, Any]) -> ModuleType:
    """The family module for a published config. Raises ValueError where `architectures` names none that is known."""
    names = hf.get("architectures")
    known = ", ".join(sorted(families()))
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ValueError(f"config.json: wanted 'architectures' with one name of {known}; got {names!r}")
    if names[0] not in families():
        raise ValueError(f"config.json: wanted an architecture of {known}; got {names[0]!r}, which is not implemented")
    return families()[names[0]]
