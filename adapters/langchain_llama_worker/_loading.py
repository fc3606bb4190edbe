"""Makes our classes known to `langchain_core.load`, so that chains with them can be saved and loaded.

`load(..., allowed_objects="all")` revives only classes of one table in langchain_core, which has no entry
point for other packages. Entering a class says where it lives and runs nothing; whoever loads still has to
name this package in `valid_namespaces`.
"""

from __future__ import annotations

import importlib
from typing import Any

from langchain_core.load.serializable import Serializable


def make_loadable(*classes: type[Serializable]) -> None:
    # `langchain_core.load.load` as an attribute is the function of that name, not the module.
    table: Any = importlib.import_module("langchain_core.load.load")
    paths = {tuple(cls.lc_id()): tuple(cls.lc_id()) for cls in classes}
    getattr(table, "ALL_SERIALIZABLE_MAPPINGS", {}).update(paths)
    # What was computed of the table before we came.
    getattr(table, "_default_class_paths_cache", {}).pop("all", None)
