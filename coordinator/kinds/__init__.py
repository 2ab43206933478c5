"""The kinds of task there are. A file in this folder that has a `KIND` is one more of them."""

from __future__ import annotations

import importlib
import pkgutil

from coordinator.kinds.kind import Features, Kind, Taught
from edge_teacher.contract.errors import UsageError

__all__ = ["KINDS", "Features", "Kind", "Taught", "kind_named"]


def _found() -> dict[str, Kind]:
    modules = (
        importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    )
    kinds: list[Kind] = [module.KIND for module in modules if hasattr(module, "KIND")]
    return {kind.name: kind for kind in kinds}


KINDS = _found()


def kind_named(name: str) -> Kind:
    """Raises UsageError for a name that no kind has."""
    if name not in KINDS:
        raise UsageError(f"There is no kind of task {name!r}; it is one of {', '.join(KINDS)}.")
    return KINDS[name]
