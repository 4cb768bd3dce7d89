"""Which of Lightning's strategies the stages work under."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch import nn

from lightning_linger.callbacks._compat import misconfiguration
from lightning_linger.core.distributed import copy_from_first_rank
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.sharding import gathering_state

_FLAT = (
    "it keeps the parameters of several layers in one flat tensor, so the layers have none of "
    "their own to fold, limit or quantize"
)
# Class names, as each installed namespace has classes of its own.
_REFUSED = {
    "FSDPStrategy": _FLAT,
    "XLAFSDPStrategy": _FLAT,
    "DeepSpeedStrategy": _FLAT,
}
_HINT_SHARDED = (
    "HINT: use `ModelParallelStrategy` with `fully_shard` in `configure_model`, `strategy='ddp'`, "
    "or one device."
)


def refuse_unsupported_strategy(trainer: Any, module: nn.Module) -> None:
    """Stop a run whose strategy would give wrong results, before anything is set up.

    Raises:
        MisconfigurationException: Naming the strategy and the reason.
    """
    for base in type(trainer.strategy).__mro__:
        if base.__name__ in _REFUSED:
            msg = (
                f"{base.__name__} is not supported by the stage callbacks: "
                f"{_REFUSED[base.__name__]}. {_HINT_SHARDED}"
            )
            raise misconfiguration(msg)
    if shards(trainer):
        _refuse_unsharded_needs(trainer)
    synchronized = getattr(trainer.strategy, "_layer_sync", None) is not None
    if synchronized or any(isinstance(part, nn.SyncBatchNorm) for part in module.modules()):
        msg = (
            "`sync_batchnorm=True` is not supported by the stage callbacks: it replaces every "
            "batch norm after the sites were found, by a layer that normalizes in a function of "
            "its own, which can be neither folded nor quantized. HINT: leave it off; DDP then "
            "uses the running statistics of rank 0 everywhere."
        )
        raise misconfiguration(msg)


def shards(trainer: Any) -> bool:
    """Whether the parameters lie in pieces on several processes."""
    return any(base.__name__ == "ModelParallelStrategy" for base in type(trainer.strategy).__mro__)


def refuse_unsupported_shards(module: nn.Module) -> None:
    """Stop a run that is planned with parameters which would not be there when they are needed.

    Raises:
        MisconfigurationException: Naming the layer and the reason.
    """
    instrumentation = instrumentation_of(module)
    if instrumentation.learned:
        msg = (
            "Learned ranges are not supported by ModelParallelStrategy: they come after the model "
            "is sharded, so nobody would reduce their gradients. HINT: use an observed range, e.g. "
            "`range='ema_absmax'`, or `strategy='ddp'`."
        )
        raise misconfiguration(msg)
    for layer, norm in _folded(instrumentation):
        if gathering_state(module, layer) is not gathering_state(module, norm):
            msg = (
                f"`{norm}` cannot be folded into `{layer}`: they are sharded apart, so one is in "
                "pieces while the other runs. HINT: shard them together, `fully_shard([layer, "
                "norm])` or a block that holds both; or leave the layer out of `modules` of "
                "FuseBNCallback."
            )
            raise misconfiguration(msg)


def share_statistics(module: nn.Module) -> None:
    """Give batch norms on every process the statistics of the first, as DDP does.

    Folded layers are made with them, and have to be the same everywhere.
    """
    norms = (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    copy_from_first_rank(chain.from_iterable(norm.buffers() for norm in norms))


def _refuse_unsharded_needs(trainer: Any) -> None:
    if trainer.strategy.device_mesh["tensor_parallel"].size() > 1:
        msg = (
            "ModelParallelStrategy with `tensor_parallel_size` above 1 is not supported by the "
            "stage callbacks: a layer then multiplies with a part of its weight, which has a range "
            "of its own. HINT: use `tensor_parallel_size=1`."
        )
        raise misconfiguration(msg)
    for callback in trainer.callbacks:
        if getattr(callback, "needs_whole_parameters", False):
            msg = (
                f"{type(callback).__name__} is not supported by ModelParallelStrategy: it works on "
                "the whole model in one process. HINT: save a checkpoint with "
                "`save_distributed_checkpoint=False`, and do this with the model that "
                "`linger.load_checkpoint` makes of it (`lightning-linger export` for ONNX files)."
            )
            raise misconfiguration(msg)


def _folded(instrumentation: Instrumentation) -> list[tuple[str, str]]:
    """Return the paths of layers and of the batch norms that are folded into them."""
    followers = ((s, instrumentation.graph.sole_consumer(s.key)) for s in instrumentation.sites)
    return [
        (site.node.owner, norm.owner)
        for site, norm in followers
        if site.fold is not None and norm is not None
    ]
