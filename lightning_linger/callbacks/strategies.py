"""Which of Lightning's strategies the stages work under."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_linger.callbacks._compat import misconfiguration

_HINT = "HINT: use `strategy='ddp'`, or one device."

_SHARDED = (
    "it shards the parameters, so what a forward multiplies with is a temporary tensor that the "
    "stages cannot tell from an activation, and a folded layer finds only a piece of its batch norm"
)
# Class names, as each installed namespace has classes of its own.
_REFUSED = {
    "FSDPStrategy": _SHARDED,
    "XLAFSDPStrategy": _SHARDED,
    "ModelParallelStrategy": _SHARDED,
    "DeepSpeedStrategy": _SHARDED,
}


def refuse_unsupported_strategy(trainer: Any, module: nn.Module) -> None:
    """Stop a run whose strategy would give wrong results, before anything is set up.

    Raises:
        MisconfigurationException: Naming the strategy and the reason.
    """
    for base in type(trainer.strategy).__mro__:
        if base.__name__ in _REFUSED:
            msg = (
                f"{base.__name__} is not supported by the stage callbacks: "
                f"{_REFUSED[base.__name__]}. {_HINT}"
            )
            raise misconfiguration(msg)
    synchronized = getattr(trainer.strategy, "_layer_sync", None) is not None
    if synchronized or any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        msg = (
            "`sync_batchnorm=True` is not supported by the stage callbacks: it replaces every "
            "batch norm after the sites were found, by a layer that normalizes in a function of "
            "its own, which can be neither folded nor quantized. HINT: leave it off; DDP then "
            "uses the running statistics of rank 0 everywhere."
        )
        raise misconfiguration(msg)
