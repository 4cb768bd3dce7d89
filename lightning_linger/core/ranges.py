"""Range estimators: what range of real values a quantizer has to cover."""

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_linger.core.capture import can_read
from lightning_linger.core.distributed import is_distributed, max_over_ranks
from lightning_linger.core.errors import ConfigError, QuantizationWarning

RangeKind = Literal["ema_absmax", "ema_minmax", "absmax", "minmax"]

RANGE_KINDS: tuple[str, ...] = ("ema_absmax", "ema_minmax", "absmax", "minmax")
EMA_WEIGHT = 0.1


class RangeEstimator(nn.Module):
    """Tracks the range of a tensor over training steps.

    The moving average starts from the first batch, never from zero: no warm-up is needed. In a
    distributed run a batch is that of all processes together, so that every one of them has the
    range that a single process would have.

    Args:
        kind: ``ema_absmax`` and ``ema_minmax`` average the batch extremes with weight 0.1,
            ``absmax`` and ``minmax`` keep the extremes of all batches; a positive number is a
            fixed absolute maximum.
        name: The layer, for messages.

    Attributes:
        range: float32 ``[2]``, the lower and upper end.
        batches: int64, how many batches were seen; 0 means that the range is not known.
    """

    range: Tensor
    batches: Tensor

    def __init__(self, kind: RangeKind | float, name: str) -> None:
        super().__init__()
        fixed = 0.0
        if isinstance(kind, int | float):
            fixed = float(kind)
            if not (math.isfinite(fixed) and fixed > 0):
                msg = f"`{name}`: a fixed range must be a positive number. Found: {kind!r}."
                raise ConfigError(msg)
        elif kind not in RANGE_KINDS:
            msg = f"`{name}`: range must be one of {RANGE_KINDS} or a number. Found: {kind!r}."
            raise ConfigError(msg)
        self.kind = kind
        self.name = name
        self.register_buffer("range", torch.tensor([-fixed, fixed]))
        self.register_buffer("batches", torch.tensor(int(fixed > 0)))
        self._known = fixed > 0

    @property
    def known(self) -> bool:
        """Whether the range was given or comes from data, so that it makes a scale."""
        return self._known

    @property
    def fixed(self) -> bool:
        """Whether the range was given as a number and never moves."""
        return isinstance(self.kind, int | float)

    @property
    def symmetric(self) -> bool:
        """Whether the range is kept symmetric around zero."""
        return self.kind in ("ema_absmax", "absmax")

    @property
    def moving(self) -> bool:
        """Whether the range is a moving average."""
        return self.kind in ("ema_absmax", "ema_minmax")

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known = bool(self.batches.item() > 0)

    def _apply(self, fn: Any, recurse: bool = True) -> "RangeEstimator":
        """Follow the model to its device, but stay float32: a range in half precision overflows."""
        device = fn(torch.empty(0, device=self.range.device)).device
        self.range, self.batches = self.range.to(device), self.batches.to(device)
        return self

    def absmax(self) -> Tensor:
        """Return the 0-dim float32 absolute maximum of the range."""
        return torch.maximum(-self.range[0], self.range[1])

    @torch.no_grad()
    def observe(self, x: Tensor, low: float = -math.inf, high: float = math.inf) -> None:
        """Move the range by one batch.

        Args:
            x: The batch, any shape. Empty batches are ignored; a batch with NaN or infinity (on any
                process) is skipped with a warning, so that it cannot poison the scale.
            low: Values below are clipped before they are observed (0 where a ReLU follows).
            high: Values above are clipped before they are observed.
        """
        if self.fixed or (x.numel() == 0 and not is_distributed()):
            return
        batch = _extremes(x, self.range)
        if can_read(batch):
            self._observe_values(batch, low, high)
        else:
            self._observe_tensors(batch, low, high)

    def _observe_values(self, batch: Tensor, low: float, high: float) -> None:
        """Move the range with the values at hand: few operations, and a warning if needed."""
        lowest, highest = batch.tolist()
        if lowest == math.inf:
            return
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            warnings.warn(
                f"`{self.name}`: a batch holds NaN or infinity and is left out of the range.",
                QuantizationWarning,
                stacklevel=2,
            )
            return
        lowest, highest = (min(max(value, low), high) for value in (lowest, highest))
        if self.symmetric:
            highest = max(-lowest, highest)
            lowest = -highest
        batch = torch.tensor([lowest, highest], dtype=self.range.dtype)
        if not self._known:
            self.range.copy_(batch)
        elif self.moving:
            self.range.lerp_(batch, EMA_WEIGHT)
        else:
            torch.minimum(self.range[0], batch[0], out=self.range[0])
            torch.maximum(self.range[1], batch[1], out=self.range[1])
        self.batches.add_(1)
        self._known = True

    def _observe_tensors(self, batch: Tensor, low: float, high: float) -> None:
        """Move the range without reading a value, on a GPU or in a graph capture."""
        finite = torch.isfinite(batch).all()
        batch = batch.clamp(low, high)
        if self.symmetric:
            extreme = torch.maximum(-batch[0], batch[1])
            batch = torch.stack([-extreme, extreme])
        if self.moving:
            moved = torch.lerp(self.range, batch, EMA_WEIGHT)
        else:
            moved = torch.stack(
                [torch.minimum(self.range[0], batch[0]), torch.maximum(self.range[1], batch[1])]
            )
        moved = torch.where(self.batches > 0, moved, batch)
        self.range.copy_(torch.where(finite, moved, self.range))
        self.batches.add_(finite.to(self.batches.dtype))
        self._known = True

    def extra_repr(self) -> str:
        """Show the kind and the range."""
        return f"kind={self.kind!r}, range={self.range.tolist()}"


def _extremes(x: Tensor, like: Tensor) -> Tensor:
    """Return the smallest and largest value of all processes; infinities in place of NaN.

    Without any value these are +inf and -inf.
    """
    if x.numel() == 0:
        batch = like.new_tensor([math.inf, -math.inf])
    else:
        batch = torch.stack(torch.aminmax(x)).to(like.dtype)
    if not is_distributed():
        return batch
    # A maximum over processes may lose NaN.
    upward = torch.stack([-batch[0], batch[1]]).nan_to_num(math.inf, math.inf, -math.inf)
    upward = max_over_ranks(upward)
    return torch.stack([-upward[0], upward[1]])
