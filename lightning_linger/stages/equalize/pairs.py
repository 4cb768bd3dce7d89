"""Two layers with the same channels between them, and the factors that go from one to the other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_linger.core.sites import Site
from lightning_linger.ops.conv import ConvOp
from lightning_linger.ops.folding import running_factor

EqualizationFactors = Literal["power_of_two", "free"]

# Free factors that are nearer to one than this are not worth a sweep.
_SETTLED = 1e-4
# A Gaussian lies above its mean less three deviations in all but 0.13 % of cases.
_DEVIATIONS = 3.0


class ChannelSource(ABC):
    """What gives the channels of a pair."""

    site: Site

    @abstractmethod
    def rows(self) -> Tensor:
        """Return all that scales with a channel, ``[C, N]``."""

    @abstractmethod
    def ranges(self) -> Tensor:
        """Return the range of the channel in the weight that is quantized, ``[C]``."""

    @abstractmethod
    def multiply(self, factors: Tensor) -> None:
        """Scale the channels."""


class LayerSource(ChannelSource):
    """A layer without a batch norm folded into it."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.op: Any = site.op
        self.layer: Any = site.owner
        self.call = site.recorded_call

    def rows(self) -> Tensor:
        """Return weights and bias of each channel, ``[C, N]``."""
        rows: Tensor = self.op.channel_rows(self.call, self.layer.weight)
        bias = self.layer.bias
        return rows if bias is None else torch.cat([rows, bias.unsqueeze(1).to(rows.dtype)], 1)

    def ranges(self) -> Tensor:
        """Return the range of each channel's weights, ``[C]``."""
        rows: Tensor = self.op.channel_rows(self.call, self.layer.weight)
        return rows.abs().amax(1).double()

    def multiply(self, factors: Tensor) -> None:
        """Scale weights and bias."""
        weight = self.layer.weight
        weight.mul_(self.op.per_channel(self.call, factors.to(weight.dtype)))
        if self.layer.bias is not None:
            self.layer.bias.mul_(factors.to(self.layer.bias.dtype))


class NormSource(ChannelSource):
    """A batch norm, with the layer it is folded into if it is: gamma and beta take the factor."""

    def __init__(self, site: Site, bn: Any, layer: LayerSource | None) -> None:
        self.site = site
        self.bn = bn
        self.layer = layer

    def rows(self) -> Tensor:
        """Return gamma and beta, ``[C, 2]``."""
        return torch.stack([self.bn.weight, self.bn.bias], 1)

    def ranges(self) -> Tensor:
        """Return the range of each channel's weights, folded if they are, ``[C]``."""
        factor = running_factor(self.bn).abs().double()
        return factor if self.layer is None else factor * self.layer.ranges()

    def multiply(self, factors: Tensor) -> None:
        """Scale gamma and beta."""
        self.bn.weight.mul_(factors.to(self.bn.weight.dtype))
        self.bn.bias.mul_(factors.to(self.bn.bias.dtype))


class ChannelTarget:
    """The layer that takes the channels.

    Args:
        site: The layer.
        repeats: How many of its inputs each channel has become (by flattening).
    """

    def __init__(self, site: Site, repeats: int) -> None:
        self.site = site
        self.repeats = repeats
        self.op: Any = site.op
        self.layer: Any = site.owner
        self.call = site.recorded_call

    def rows(self) -> Tensor:
        """Return all that scales with a channel, ``[C, N]``."""
        return self._by_input(self.layer.weight)

    def ranges(self) -> Tensor:
        """Return the range of the channel in the weight that is quantized, ``[C]``."""
        weight = self.layer.weight.abs()
        bn: Any = self.site.fold
        if bn is not None:
            weight = weight * self.op.per_channel(self.call, running_factor(bn).abs())
        return self._by_input(weight).amax(1).double()

    def multiply(self, factors: Tensor) -> None:
        """Scale the input channels."""
        weight = self.layer.weight
        weight.mul_(self._along_input(factors.to(weight.dtype)))

    def absorb(self, shift: Tensor) -> None:
        """Add to the result what a shift of the input channels takes off."""
        moved = self._response(shift.to(self.layer.weight.dtype))
        if self.layer.bias is not None:
            self.layer.bias.add_(moved)
        else:
            self.norm.running_mean.sub_(moved)

    @property
    def norm(self) -> Any:
        """The batch norm that is folded into the layer."""
        return self.site.fold

    def refuses_shift(self) -> str | None:
        """Say why its input cannot be shifted, if so."""
        if isinstance(self.op, ConvOp) and (self.op.transposed or any(self.call.padding)):
            return "padding"
        return None if self.layer.bias is not None or self.norm is not None else "no bias"

    def _response(self, shift: Tensor) -> Tensor:
        """Return what an input that is constant in each channel gives, ``[C_out]``."""
        if not isinstance(self.op, ConvOp):
            result: Tensor = self.layer.weight @ shift.repeat_interleave(self.repeats)
            return result
        covered = (
            spread * (size - 1) + 1
            for spread, size in zip(self.call.dilation, self.layer.weight.shape[2:], strict=True)
        )
        ones = [1] * self.op.dims
        constant = shift.view(1, -1, *ones).expand(1, -1, *covered)
        return self.op.apply(self.call, constant, self.layer.weight, None).flatten()

    def _by_input(self, weight: Tensor) -> Tensor:
        if not isinstance(self.op, ConvOp):
            return weight.t().reshape(weight.shape[1] // self.repeats, -1)
        if self.op.transposed:
            return weight.flatten(1)
        # [groups, outputs per group, inputs per group, positions]
        grouped = weight.reshape(self.call.groups, -1, *weight.shape[1:]).flatten(3)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)

    def _along_input(self, factors: Tensor) -> Tensor:
        if not isinstance(self.op, ConvOp):
            return factors.repeat_interleave(self.repeats).view(1, -1)
        ones = [1] * self.op.dims
        if self.op.transposed:
            return factors.view(-1, 1, *ones)
        groups, outputs = self.call.groups, self.call.weight.shape[0]
        grouped = factors.view(groups, 1, -1).expand(-1, outputs // groups, -1)
        return grouped.reshape(outputs, -1, *ones)


class ChannelPair:
    """Two layers and the factors between them.

    Args:
        source: Gives the channels.
        target: Takes them.
        rectified: Whether a ReLU, and nothing that a shift would not pass, stands between.
    """

    def __init__(self, source: ChannelSource, target: ChannelTarget, rectified: bool) -> None:
        self.source = source
        self.target = target
        self.rectified = rectified
        self.total = torch.ones_like(source.ranges())
        self.before = self.precision()
        self.absorbed = 0

    def balance(self, kind: EqualizationFactors) -> bool:
        """Rescale the channels; return whether anything moved."""
        first, second = self.source.ranges(), self.target.ranges()
        alive = (first > 0) & (second > 0)
        wanted = torch.where(alive, (second / first).sqrt(), torch.ones_like(first))
        if kind == "power_of_two":
            wanted = torch.exp2(torch.round(torch.log2(wanted)))
            wanted = torch.where(self._survives(wanted), wanted, torch.ones_like(wanted))
        if bool(((wanted - 1).abs() < _SETTLED).all()):
            return False
        self.source.multiply(wanted)
        self.target.multiply(1 / wanted)
        self.total *= wanted
        return True

    def _survives(self, factors: Tensor) -> Tensor:
        """Whether the numbers of a channel can be scaled without losing a bit."""
        survives = torch.ones_like(factors, dtype=torch.bool)
        for rows, by in ((self.source.rows(), factors), (self.target.rows(), 1 / factors)):
            by = by.to(rows.dtype).unsqueeze(1)
            survives &= ((rows * by) / by == rows).all(1)
        return survives

    def precision(self) -> float:
        """Return the mean over the channels of the product of both relative ranges."""
        relative = [
            ranges / ranges.amax().clamp_min(torch.finfo(ranges.dtype).tiny)
            for ranges in (self.source.ranges(), self.target.ranges())
        ]
        return float((relative[0] * relative[1]).mean())

    def absorb(self) -> None:
        """Move the part of a bias that a ReLU hardly ever cuts on to the next layer."""
        if not (isinstance(self.source, NormSource) and self.rectified):
            return
        if self.target.refuses_shift() is not None:
            return
        bn = self.source.bn
        shift = (bn.bias - _DEVIATIONS * bn.weight.abs()).clamp_min(0)
        self.absorbed = int(shift.count_nonzero())
        if self.absorbed:
            bn.bias.sub_(shift)
            self.target.absorb(shift)
