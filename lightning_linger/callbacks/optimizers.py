"""Whether the user's optimizers train what was added to the model."""

from __future__ import annotations

import warnings
from typing import Any

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.core.errors import QuantizationWarning
from lightning_linger.stages.learned import learned_ranges

_FIX = (
    "In `configure_optimizers` write\n"
    "    groups = linger.parameter_groups(self)\n"
    "    optimizer = torch.optim.AdamW(groups, lr=...)"
)


def check_learned_ranges(trainer: Any, module: Any, late: bool) -> None:
    """Refuse optimizers that would miss learned ranges; warn where they would decay them.

    Args:
        trainer: With its optimizers.
        module: The prepared model.
        late: Whether quantization starts later than training.

    Raises:
        MisconfigurationException: Naming the two lines that repair it.
    """
    learned = learned_ranges(module)
    if not learned:
        return
    decay = {
        id(parameter): group.get("weight_decay", 0.0)
        for optimizer in trainer.optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    missing = [name for name, parameter in learned.items() if id(parameter) not in decay]
    if missing:
        msg = (
            f"{len(missing)} of {len(learned)} learned ranges are in no optimizer and would stay "
            f"where they start, e.g. `{missing[0]}`. HINT: {_FIX}"
        )
        raise misconfiguration(msg)
    if any(decay[id(parameter)] for parameter in learned.values()):
        warnings.warn(
            f"Weight decay pulls {len(learned)} learned ranges towards zero. {_FIX}",
            QuantizationWarning,
            stacklevel=2,
        )
    options = getattr(trainer.strategy, "_ddp_kwargs", None)
    if late and options is not None and not options.get("find_unused_parameters", False):
        msg = (
            "Learned ranges have no gradient before quantization starts, which DDP does not "
            'expect. HINT: start at epoch 0, or use `strategy="ddp_find_unused_parameters_true"`.'
        )
        raise misconfiguration(msg)
