"""Some values of each site, for histograms: float and quantized, at the same places."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_linger.core.fake_quantize import Scalar

# Multiples of it modulo 1 cover the unit interval evenly, whatever the shape of the tensor.
_GOLDEN_RATIO = 0.6180339887498949


@dataclass(frozen=True)
class ValueSample:
    """Values of one site, and the ends of its grid.

    Args:
        reference: ``[n]`` values of the float chain.
        quantized: ``[n]`` values on the grid, of the same elements.
        low: Value of the lowest code in use.
        high: Value of the highest code in use.
    """

    reference: Tensor
    quantized: Tensor
    low: Scalar
    high: Scalar


class ValueSamples:
    """Keeps a few elements of the latest tensor of each site, on its device.

    Which elements depends on nothing but their number: no random generator is touched.

    Args:
        size: Elements per site, at most.
    """

    def __init__(self, size: int = 4096) -> None:
        self.size = size
        self._samples: dict[str, ValueSample] = {}

    def add(
        self, site: str, reference: Tensor, quantized: Tensor, low: Scalar, high: Scalar
    ) -> None:
        """Keep some elements of a site; both tensors have one shape."""
        reference, quantized = reference.detach().reshape(-1), quantized.detach().reshape(-1)
        if reference.numel() > self.size:
            spots = torch.arange(self.size, dtype=torch.float64, device=reference.device)
            spots = ((spots * _GOLDEN_RATIO).frac() * reference.numel()).long()
            reference, quantized = reference[spots], quantized[spots]
        self._samples[site] = ValueSample(reference, quantized, low, high)

    def __contains__(self, site: str) -> bool:
        """Whether there are values of a site."""
        return site in self._samples

    def __getitem__(self, site: str) -> ValueSample:
        """Return the values of a site."""
        return self._samples[site]
