"""Batch norm statistics, estimated anew under the weights that the chip has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_linger.core.distributed import sum_over_ranks
from lightning_linger.core.errors import ConfigError, near_matches
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.progress import with_progress
from lightning_linger.core.sites import Site
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.forwards import Forward, evaluating, forwards_of


def reestimate_bn(
    model: nn.Module,
    loader: Iterable[Any],
    modules: Sequence[str] | None = None,
    keep_codes: bool = True,
) -> nn.Module:
    """Replace running statistics of batch norms by the mean of those of some batches.

    The model runs in the stage it is in, quantized or not: each batch norm normalizes with the
    statistics of the batch, all else as in evaluation. Folded weights keep the old statistics until
    the last batch has been seen. Ranges, weights and momenta stay as they are. Where a module calls
    a batch norm several times, each of its calls counts.

    Training leaves a moving average over weights whose codes went on jumping between neighbours:
    Nagel et al., "Overcoming Oscillations in Quantization-Aware Training", ICML 2022.

    Args:
        model: A prepared model.
        loader: Batches of the training data's size, as :func:`lightning_linger.calibrate` takes
            them; kept in memory.
        modules: Globs on dotted paths of batch norms; None takes all that keep statistics.
        keep_codes: Keep a variance with which folded weights would be rounded to other codes: those
            whose channels share a step, or have a power of two or a frozen one. The means, which
            belong to the bias, are estimated all the same. Otherwise the batches are gone through
            twice, so that the means are those under the new codes.

    Returns:
        The model.

    Raises:
        ConfigError: If the loader is empty, no batch norm is meant, or a batch is too small to have
            statistics.
    """
    return reestimate_bn_by(model, forwards_of(model, loader), modules, keep_codes)


def reestimate_bn_by(
    model: nn.Module,
    forwards: Sequence[Forward],
    modules: Sequence[str] | None = None,
    keep_codes: bool = True,
) -> nn.Module:
    """Estimate statistics by forwards of the model, or parts of it; see :func:`reestimate_bn`."""
    instrumentation = instrumentation_of(model)
    norms = _norms(model, modules)
    rounded = [site.fold for site in instrumentation.sites if _rounds_variance(site)]
    fixed = [norm for norm in norms if any(norm is other for other in rounded)]
    if fixed and not keep_codes:
        _estimate(model, norms, forwards, keeping_variance=[])
    _estimate(model, norms, forwards, keeping_variance=fixed)
    instrumentation.applied.append("reestimate_bn")
    logger.info("estimated %d batch norms anew on %d batches", len(norms), len(forwards))
    return model


def _estimate(
    model: nn.Module,
    norms: Sequence[Any],
    forwards: Sequence[Forward],
    keeping_variance: Sequence[Any],
) -> None:
    instrumentation = instrumentation_of(model)
    averages = [_Average(norm) for norm in norms]
    with evaluating(model), _normalizing_by_batch(instrumentation, norms):
        hooks = [average.norm.register_forward_hook(average.take) for average in averages]
        try:
            for forward in with_progress(forwards, "Estimating statistics"):
                _run(forward)
        finally:
            for average, hook in zip(averages, hooks, strict=True):
                hook.remove()
                average.put_back()
    for average in averages:
        average.put(variance=not any(average.norm is norm for norm in keeping_variance))
    instrumentation.thaw()


def _run(forward: Forward) -> None:
    try:
        forward()
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        msg = (
            "a batch holds one value per channel of a batch norm, of which there are no "
            "statistics. Pass batches of several samples."
        )
        raise ConfigError(msg) from error


def _rounds_variance(site: Site) -> bool:
    """Whether another variance would round the weight of a folded layer to other codes."""
    grid = site.weights.grid
    if site.active_fold is None or not site.quantized or not site.switches.quantize:
        return False
    scales_along = site.granularity == "channel" and grid is not None and grid.scale_kind == "free"
    return not scales_along or "weights" in site.frozen or bool(site.weights.learned_scales())


class _Average:
    """The mean of the statistics that a batch norm of momentum one has after each of its calls."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.kept = [norm.running_mean.clone(), norm.running_var.clone()]
        self.tracked = None if norm.num_batches_tracked is None else int(norm.num_batches_tracked)
        self.totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in self.kept]
        self.count = 0

    @property
    def _present(self) -> list[Tensor]:
        return [self.norm.running_mean, self.norm.running_var]

    @torch.no_grad()
    def take(self, *_: Any) -> None:
        """Count in what a call has left, and put the statistics back; a forward hook."""
        for total, present in zip(self.totals, self._present, strict=True):
            total += present
        self.count += 1
        self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give the batch norm the statistics that it had."""
        for present, kept in zip(self._present, self.kept, strict=True):
            present.copy_(kept)
        if self.tracked is not None:
            self.norm.num_batches_tracked.fill_(self.tracked)

    @torch.no_grad()
    def put(self, variance: bool) -> None:
        """Replace the statistics by the mean, over all processes; every one has to.

        Args:
            variance: Whether to replace the variance too.
        """
        count = sum_over_ranks(self.totals[0].new_tensor(float(self.count)))
        mean, var = (sum_over_ranks(total) / count for total in self.totals)
        if count > 0:
            self.norm.running_mean.copy_(mean)
        if count > 0 and variance:
            self.norm.running_var.copy_(var)


@contextlib.contextmanager
def _normalizing_by_batch(instrumentation: Instrumentation, norms: Sequence[Any]) -> Iterator[None]:
    """Let batch norms, and the layers they are folded into, work as in training."""
    switches = instrumentation.switches
    momenta = [norm.momentum for norm in norms]
    before = switches.observing, switches.fuse_mode
    switches.observing = False
    if switches.fuse_mode == "frozen":
        switches.fuse_mode = "running"
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    for site in instrumentation.sites:
        affected = site.fold if isinstance(site.op, WeightedOp) else site.owner
        if any(affected is norm for norm in norms):
            site.training = True
    try:
        yield
    finally:
        switches.observing, switches.fuse_mode = before
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _norms(model: nn.Module, modules: Sequence[str] | None) -> list[Any]:
    """Return the batch norms that keep statistics, and that one of the globs matches."""
    kept = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_var is not None
    }
    for pattern in modules or ():
        if not any(fnmatchcase(name, pattern) for name in kept):
            msg = (
                f"the pattern {pattern!r} matches no batch norm that keeps running statistics. "
                f"Similar: {near_matches(pattern, kept)}."
            )
            raise ConfigError(msg)
    chosen = [
        norm
        for name, norm in kept.items()
        if modules is None or any(fnmatchcase(name, pattern) for pattern in modules)
    ]
    if not chosen:
        msg = f"{type(model).__name__} has no batch norm that keeps running statistics."
        raise ConfigError(msg)
    return chosen
