"""Cross-layer equalization: channels of neighbouring layers brought to like ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.logs import logger
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.ops.weighted import WeightedOp
from lightning_linger.stages.equalize.pairs import ChannelPair, EqualizationFactors
from lightning_linger.stages.equalize.search import PairFinder, UnsuitableError
from lightning_linger.stages.selection import QUANT_MARK, Selection


@dataclass(frozen=True)
class EqualizationRow:
    """What became of one convolution or linear layer and the layer behind it.

    Args:
        site: Site key of the layer, or of the batch norm that is not folded into it.
        follower: Site key of the layer that takes its result, empty if there is none.
        channels: How many channels were rescaled.
        largest_factor: The largest factor between old and new range of a channel, at least 1.
        absorbed: In how many channels a high bias moved on to the follower.
        precision_before: Mean over the channels of the product of both layers' channel range over
            layer range, from 0 to 1; 1 where all channels use the whole grid.
        precision_after: The same after equalization.
        why_not: Why nothing was rescaled, empty if the pair is equalized.
    """

    site: str
    follower: str = ""
    channels: int = 0
    largest_factor: float = 1.0
    absorbed: int = 0
    precision_before: float = math.nan
    precision_after: float = math.nan
    why_not: str = ""


class Equalization(Table[EqualizationRow]):
    """A list of :class:`EqualizationRow` in execution order that prints as a table."""

    row_type = EqualizationRow
    digits = 4


@torch.no_grad()
def equalize(
    model: nn.Module,
    factors: EqualizationFactors = "power_of_two",
    absorb_bias: bool = False,
    modules: Sequence[str] | None = None,
    max_sweeps: int = 20,
) -> Equalization:
    """Rescale channels between neighbouring layers, so that one step suits all channels of each.

    Where only a layer reads what another layer gives, through activations like ReLU for which
    ``f(s * x) = s * f(x)``, each channel can be divided by a factor in the first layer and
    multiplied by it in the second. The factor ``sqrt(r1 / r2)`` makes the channel's ranges in both
    weights equal. Pairs are swept over until nothing moves.

    With factors that are powers of two the float model computes the same bits as before, unless a
    number leaves the range of its dtype: channels where one would are left as they are.

    Batch norms that are to be folded have to be planned before: their layer is then equalized as
    folded, by gamma and beta. Otherwise a batch norm is a layer of its own.

    Args:
        model: A prepared model that has seen no ranges yet.
        factors: ``power_of_two``, or ``free`` for exact balance, which changes the float function
            by rounding.
        absorb_bias: Also move what a ReLU behind a batch norm passes in all but 0.13 % of cases,
            ``max(0, beta - 3 |gamma|)``, into the bias of the next layer. This changes the function
            where the assumption fails.
        modules: Globs on dotted paths: pairs of which both layers match; None takes all.
        max_sweeps: How often to go over all pairs at most.

    Returns:
        A row for each convolution and linear layer: what was done, or why nothing.

    Raises:
        ConfigError: If an argument is not allowed, or ranges of the model have been seen.
    """
    instrumentation = instrumentation_of(model)
    _check(instrumentation, factors, max_sweeps)
    Selection(None, modules, None, QUANT_MARK).validate(model, instrumentation.sites)
    finder = PairFinder(model, instrumentation, modules)
    found = {
        site: _pair_or_reason(finder, site)
        for site in instrumentation.sites
        if isinstance(site.op, WeightedOp) or _is_norm_alone(site)
    }
    pairs = [pair for pair in found.values() if isinstance(pair, ChannelPair)]
    for _ in range(max_sweeps):
        moved = [pair.balance(factors) for pair in pairs]
        if not any(moved):
            break
    if absorb_bias:
        for pair in pairs:
            pair.absorb()
    instrumentation.thaw()
    instrumentation.applied.append("equalize")
    rows = Equalization([_row(site, pair) for site, pair in found.items()])
    logger.info(
        "equalized %d of %d layers of %s with the layer behind them",
        len(pairs),
        len(rows),
        type(model).__name__,
    )
    return rows


def _check(instrumentation: Instrumentation, factors: str, max_sweeps: int) -> None:
    if factors not in ("power_of_two", "free"):
        msg = f"`factors` must be 'power_of_two' or 'free'. Found: {factors!r}."
        raise ConfigError(msg)
    if not isinstance(max_sweeps, int) or max_sweeps < 1:
        msg = f"`max_sweeps` must be a positive integer. Found: {max_sweeps!r}."
        raise ConfigError(msg)
    for site in instrumentation.sites:
        for quantizer in site.quantizers():
            if quantizer.known and quantizer.estimator.rule.fixed is None:
                msg = (
                    f"`{quantizer.name}` has seen a range, which equalization would change. "
                    "Equalize before ranges are calibrated or trained."
                )
                raise ConfigError(msg)


def _is_norm_alone(site: Site) -> bool:
    return site.op.kind == "batch_norm" and not site.completes_fold


def _pair_or_reason(finder: PairFinder, site: Site) -> ChannelPair | str:
    try:
        return finder.pair_of(site)
    except UnsuitableError as reason:
        return str(reason)


def _row(site: Site, pair: ChannelPair | str) -> EqualizationRow:
    if isinstance(pair, str):
        return EqualizationRow(site.key, why_not=pair)
    return EqualizationRow(
        site=site.key,
        follower=pair.target.site.key,
        channels=int((pair.total != 1).sum()),
        largest_factor=float(torch.maximum(pair.total, 1 / pair.total).amax()),
        absorbed=pair.absorbed,
        precision_before=pair.before,
        precision_after=pair.precision(),
    )
