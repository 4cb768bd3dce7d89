"""Reading checkpoints that may not be trusted."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from lightning_linger.core.errors import ConfigError


def read_checkpoint(source: Path) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Raises:
        ConfigError: If it cannot be read, is no dictionary, or holds other objects.
    """
    try:
        checkpoint = torch.load(source, map_location="cpu", weights_only=True)
    except OSError as error:
        msg = f"cannot read {str(source)!r}: {error.strerror or error}."
        raise ConfigError(msg) from error
    # What a broken file raises depends on where it is broken.
    except Exception as error:
        refused = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if refused:
            msg = (
                f"{str(source)!r} holds {refused[1]}, which is not loaded from a file that may not "
                "be trusted. Save its state dict alone, with torch.save(model.state_dict(), path)."
            )
        else:
            msg = f"{str(source)!r} is no checkpoint, or it is damaged: torch cannot load it."
        raise ConfigError(msg) from error
    if not isinstance(checkpoint, dict):
        kind = type(checkpoint).__name__
        msg = f"{str(source)!r} holds a {kind}. Save a state dict or a Lightning checkpoint."
        raise ConfigError(msg)
    return checkpoint
