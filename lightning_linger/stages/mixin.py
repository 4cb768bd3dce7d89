"""For classes of one's own: loading a checkpoint builds what was prepared when it was written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.stages.checkpoints import RECIPE_KEY, restore


class LingerMixin(nn.Module):
    """Base class of a module that loads checkpoints of its own quantized runs as they are.

    With it, ``load_from_checkpoint`` of a LightningModule, a Trainer without our callbacks, and
    plain ``load_state_dict`` take the structure from the checkpoint. Name it before the other base:
    ``class Net(LingerMixin, pl.LightningModule)``.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Load a state; a float module is first prepared as the one was that the state is of.

        Args:
            state_dict: Of a float or a prepared module.
            *args: As of ``nn.Module.load_state_dict``.
            **kwargs: Likewise.

        Raises:
            ConfigError: If the state belongs to another model; names the difference.
        """
        if not is_prepared(self) and RECIPE_KEY in state_dict:
            restore(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)
