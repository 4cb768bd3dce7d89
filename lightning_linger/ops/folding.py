"""Batch norm folded into the layer before it, trained as if it were not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_linger.core.capture import can_read
from lightning_linger.core.fake_quantize import fake_quantize

if TYPE_CHECKING:
    from lightning_linger.core.fake_quantize import Scalar
    from lightning_linger.core.sites import Site

_ATTRIBUTE = "_linger_folded"

# Below this factor a folded weight has lost its direction to float32 rounding.
TINY_FACTOR = 1e-6


@dataclass(frozen=True)
class Folded:
    """Marks the result of a layer that has taken its batch norm in.

    Args:
        site: The layer's site; None if nothing is left to do.
        dtype: The dtype the model expects of the result.
        scale: ``[C]``, what each output channel of the convolution was multiplied with.
        beta: ``[C]``, the batch norm's bias, moved by what the folded bias loses where it is
            limited and rounded.
        conv_bias: The layer's own bias, which batch statistics cancel.
        silent: ``[C]``, channels whose quantized folded weight vanished: they give ``beta``, have
            no mean but the layer's own bias, and keep the gradient of the unfolded layer.
        statistics: Mean and biased variance of the batch, if the layer computed them itself.
        product: Step of the accumulator, or those of its channels as they broadcast to the result.
        in_codes: Whether the chip's result is a sum of integers, at the step of the accumulator.
        quantized: Whether the output is to be quantized.
    """

    site: Site | None = None
    dtype: torch.dtype = torch.float32
    scale: Tensor | None = None
    beta: Tensor | None = None
    conv_bias: Tensor | None = None
    silent: Tensor | None = None
    statistics: tuple[Tensor, Tensor] | None = None
    product: Scalar | None = None
    in_codes: bool = False
    quantized: bool = False


# Nothing is left to do: the layer has applied running statistics.
COMPLETE = Folded()


def mark_folded(y: Tensor, folded: Folded) -> Tensor:
    """Tell the batch norm that follows what is left to do."""
    setattr(y, _ATTRIBUTE, folded)
    return y


def folded_of(x: Tensor) -> Folded | None:
    """Return the mark of :func:`mark_folded`."""
    return getattr(x, _ATTRIBUTE, None)


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether the batch norm normalizes with the statistics of the batch now."""
    return bn.training


def full(x: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any other as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def gamma_of(bn: Any) -> Tensor:
    """Return the weight of a batch norm, ones if it is not affine."""
    return full(bn.weight if bn.weight is not None else torch.ones_like(bn.running_var))


def beta_of(bn: Any) -> Tensor:
    """Return the bias of a batch norm, zeros if it is not affine."""
    return full(bn.bias if bn.bias is not None else torch.zeros_like(bn.running_mean))


def running_statistics(site: Site, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Return running statistics as evaluation uses them: on grids of their own, if there are.

    A variance has one code at least.

    Args:
        site: The batch norm, or the layer that has taken it in.
        mean: ``[C]``.
        var: ``[C]``.
    """
    mean, var = full(mean), full(var)
    ranges = site.active_statistics
    if ranges is None or ranges.grid is None:
        return mean, var
    grid = ranges.grid
    rounded = []
    for name, values, lowest in (("running_mean", mean, grid.qmin), ("running_var", var, 1)):
        step = ranges.held(name, grid.step(ranges.reach(values.detach()[None])[0]))
        rounded.append(fake_quantize(values, step, lowest, grid.qmax, grid.rounding))
        site.note(name, values, rounded[-1], step)
    return rounded[0], rounded[1]


def running_factor(bn: Any, var: Tensor | None = None) -> Tensor:
    """Return ``gamma / sigma`` with the running variance, or one in its place, ``[C]``."""
    var = full(bn.running_var) if var is None else var
    return gamma_of(bn) * torch.rsqrt(var + bn.eps)


def running_bias(bn: Any, mean: Tensor, conv_bias: Tensor | None, factor: Tensor) -> Tensor:
    """Return the bias of the folded layer with the running mean, ``[C]``."""
    centre = -mean if conv_bias is None else full(conv_bias) - mean
    return beta_of(bn) + centre * factor


@torch.library.custom_op("linger::snapshot", mutates_args=())
def snapshot(x: Tensor) -> Tensor:
    """Copy a value that depends on a buffer this forward is going to change.

    A compiler's partitioner would rather recompute such a value in backward, from the changed
    buffer; it does not look into a custom op.
    """
    return x.clone()


@snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _ScaledBatchNorm(torch.autograd.Function):
    """Batch norm of a channel-wise scaled input, with one epsilon per channel.

    Scaling a channel by ``s`` scales its variance by ``s^2``; with ``eps * s^2`` in place of
    ``eps`` the normalized value is that of the unscaled channel, exactly, for any ``s``.

    With a step, which broadcasts to the result, that is rounded to it; the gradient is as without.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: Tensor,
        silent: Tensor | None,
        step: Scalar | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = _statistics(y)
        variance = var + eps
        # A channel without any signal and without epsilon normalizes to zero, not to NaN.
        variance = torch.where(variance > 0, variance, torch.ones_like(variance))
        gain = weight if silent is None else torch.where(silent, torch.zeros_like(weight), weight)
        if step is None:
            out = F.batch_norm(y, mean, variance, gain, bias, False, 0.0, 0.0)
        else:
            unit = step.flatten() if isinstance(step, Tensor) else step
            codes = F.batch_norm(y, mean, variance, gain / unit, bias / unit, False, 0.0, 0.0)
            out = codes.round_().mul_(step)
        ctx.save_for_backward(y, weight, mean, torch.rsqrt(variance))
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, mean, invstd = ctx.saved_tensors
        dy, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0].contiguous(),
            y,
            weight,
            None,
            None,
            mean,
            invstd,
            True,
            0.0,
            [True, True, True],
        )
        return dy, dweight, dbias, None, None, None


def _statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    if can_read(y):
        mean, var = torch.ops.aten.batch_norm_update_stats(y, None, None, 0.0)
        return mean, var
    var, mean = torch.var_mean(y, _reduced(y), correction=0)
    return mean, var


def _reduced(y: Tensor) -> list[int]:
    return [d for d in range(y.dim()) if d != 1]


def batch_statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differentiable mean and biased variance of each channel (dim 1)."""
    var, mean = torch.var_mean(y, _reduced(y), correction=0)
    return mean, var


def normalize_scaled(
    y: Tensor, folded: Folded, gamma: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Finish a folded layer: batch norm straight on the output of the scaled convolution.

    Returns:
        The result, and the mean and biased variance of the *unscaled* convolution (own bias
        left out).
    """
    scale, silent = folded.scale, folded.silent
    if scale is None or folded.beta is None:
        msg = "internal: a scaled convolution without its scale or its bias."
        raise RuntimeError(msg)
    scale = scale.to(y.dtype)
    weight = gamma * torch.sign(scale)
    out, mean, var = _ScaledBatchNorm.apply(
        y,
        weight,
        folded.beta,
        eps * scale.square(),
        silent,
        folded.product if folded.in_codes else None,
    )
    mean = mean / scale
    return out, mean if silent is None else mean.masked_fill(silent, 0.0), var / scale.square()


@torch.no_grad()
def update_running(
    running_mean: Tensor,
    running_var: Tensor,
    statistics: tuple[Tensor, Tensor],
    conv_bias: Tensor | None,
    count: int,
    momentum: float,
) -> None:
    """Move the running statistics as ``F.batch_norm`` does: unbiased variance, in place.

    Args:
        running_mean: ``[C]``, overwritten.
        running_var: ``[C]``, overwritten.
        statistics: Mean and biased variance of the batch, without the layer's own bias.
        conv_bias: The layer's own bias.
        count: Number of values per channel.
        momentum: Weight of the batch.
    """
    mean, var = statistics
    if conv_bias is not None:
        mean = mean + conv_bias
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    unbiased = var * (count / max(count - 1, 1))
    running_var.lerp_(unbiased.to(running_var.dtype), momentum)
