"""Modules whose parameters lie in pieces on several processes, together only while they run."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def gathers_parameters(module: nn.Module) -> bool:
    """Whether ``fully_shard`` has made the module gather parameters before its forward."""
    # Whoever has sharded a module has imported this; nobody else pays for the import.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, as it was before it was sharded."""
    kind = type(module)
    # `fully_shard` puts a class of its own, made of FSDPModule and the module's, in its place.
    return (kind.__mro__[2] if gathers_parameters(module) else kind).__name__


def gathering_state(root: nn.Module, path: str) -> Any:
    """Return what the parameters of the module at a path are gathered by.

    Modules for which it is the same object have their parameters together; None if nothing is
    sharded.
    """
    while True:
        module = root.get_submodule(path)
        if gathers_parameters(module):
            sharded: Any = module
            return sharded._get_fsdp_state()
        if not path:
            return None
        path = path.rpartition(".")[0]
