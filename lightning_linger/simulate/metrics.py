"""Per-site error statistics as torchmetrics: one vector per statistic, reduced over ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_linger.core.fake_quantize import Scalar

# Reported where there is no noise at all, instead of infinity, which charts cannot draw.
MAX_DECIBEL = 150.0


def decibel(signal: Tensor, noise: Tensor) -> Tensor:
    """Return ``10 log10(signal / noise)``, bounded by +-150 dB; 0 for no signal and no noise."""
    tiny = torch.finfo(torch.float64).tiny
    ratio = 10.0 * torch.log10((signal + tiny) / (noise + tiny))
    return ratio.clamp(-MAX_DECIBEL, MAX_DECIBEL)


class _PerSite(Metric):
    """Sums and maxima per site, float64 vectors of one entry per site."""

    full_state_update = False

    def __init__(self, sites: Sequence[str], sums: Sequence[str], maxima: Sequence[str]) -> None:
        super().__init__()
        self.sites = list(sites)
        self._index = {site: i for i, site in enumerate(self.sites)}
        for name in sums:
            self.add_state(name, torch.zeros(len(sites), dtype=torch.float64), "sum")
        for name in maxima:
            self.add_state(name, torch.zeros(len(sites), dtype=torch.float64), "max")

    def _add(self, site: str, **values: Any) -> None:
        index = self._index[site]
        for name, value in values.items():
            getattr(self, name)[index] += value

    def _raise_to(self, site: str, **values: Any) -> None:
        index = self._index[site]
        for name, value in values.items():
            state = getattr(self, name)
            state[index] = torch.maximum(state[index], value.to(state.dtype))


@dataclass(frozen=True)
class QuantErrorRow:
    """Fake-quant against float, at one site.

    Args:
        site: Site key.
        sqnr: Signal to quantization noise, dB, accumulated: both forwards ran from the input.
        cosine: Cosine similarity, -1 to 1, accumulated.
        saturation: Share of the codes that lie on an end of the grid, 0 to 1.
        exponent: log2 of the step.
        isolated_sqnr: Of the op alone: against the float op on the fake-quant input, dB.
    """

    site: str
    sqnr: float
    cosine: float
    saturation: float
    exponent: float
    isolated_sqnr: float


class QuantError(_PerSite):
    """SQNR, cosine and saturation of fake-quant values against float values, per site."""

    signal: Tensor
    noise: Tensor
    isolated_signal: Tensor
    isolated_noise: Tensor
    dot: Tensor
    power: Tensor
    saturated: Tensor
    elements: Tensor
    exponent: Tensor
    updates: Tensor

    def __init__(self, sites: Sequence[str]) -> None:
        sums = (
            *("signal", "noise", "isolated_signal", "isolated_noise", "dot", "power"),
            *("saturated", "elements", "exponent", "updates"),
        )
        super().__init__(sites, sums=sums, maxima=())

    def update(
        self,
        site: str,
        fake: Tensor,
        reference: Tensor,
        isolated_reference: Tensor,
        low: Scalar,
        high: Scalar,
        step: Scalar,
    ) -> None:
        """Add one tensor; nothing is read back from its device.

        Args:
            site: Site key.
            fake: Values on the grid.
            reference: Float values of the same shape, of the float chain.
            isolated_reference: Float values of the float op on the fake-quant input.
            low: Value of the lowest code in use; ends count as saturated.
            high: Value of the highest code.
            step: Step of the grid.
        """
        fake, reference = _wide(fake), _wide(reference)
        isolated_reference = _wide(isolated_reference)
        # A grid that begins at zero has no lower end to saturate at.
        at_end = (fake >= high).sum() + ((fake <= low) & (fake < 0)).sum()
        self._add(
            site,
            signal=_product(reference, reference),
            noise=_energy(fake - reference),
            isolated_signal=_energy(isolated_reference),
            isolated_noise=_energy(fake - isolated_reference),
            dot=_product(fake, reference),
            power=_product(fake, fake),
            saturated=at_end,
            elements=fake.numel(),
            exponent=torch.log2(step.double()) if isinstance(step, Tensor) else math.log2(step),
            updates=1,
        )

    def compute(self) -> Tensor:
        """Return ``[sites, 6]``: the columns of :class:`QuantErrorRow`, and the updates."""
        sqnr = decibel(self.signal, self.noise)
        scale = (self.signal * self.power).sqrt()
        cosine = torch.where(scale > 0, self.dot / scale.clamp_min(1e-300), torch.ones_like(scale))
        cosine = cosine.clamp(-1.0, 1.0)
        share = self.saturated / self.elements.clamp_min(1)
        exponent = self.exponent / self.updates.clamp_min(1)
        isolated = decibel(self.isolated_signal, self.isolated_noise)
        return torch.stack([sqnr, cosine, share, exponent, isolated, self.updates]).T

    def rows(self) -> list[QuantErrorRow]:
        """Return one row per site that was updated; a single transfer from the device."""
        table = _over_ranks(self).tolist()
        return [
            QuantErrorRow(site, *values[:-1])
            for site, values in zip(self.sites, table, strict=True)
            if values[-1] > 0
        ]


@dataclass(frozen=True)
class DivergenceRow:
    """Integer execution at one site, over all samples seen.

    *Accumulated* values come from the real integer chain, *isolated* ones from the op alone on the
    fake-quant input.

    Args:
        site: Site key.
        elements: Number of compared values.
        mismatches: Codes that differ from fake-quant, accumulated.
        max_lsb: Largest such difference in codes, accumulated.
        isolated_mismatches: Codes that differ from fake-quant, isolated.
        isolated_max_lsb: Largest such difference in codes, isolated.
        sqnr: Against float, dB, accumulated.
        max_error: Against float, real value, accumulated.
        isolated_sqnr: Against float, dB, isolated.
        isolated_max_error: Against float, real value, isolated.
    """

    site: str
    elements: int
    mismatches: int
    max_lsb: int
    isolated_mismatches: int
    isolated_max_lsb: int
    sqnr: float
    max_error: float
    isolated_sqnr: float
    isolated_max_error: float

    @property
    def mismatch_rate(self) -> float:
        """Share of codes that differ, accumulated, 0 to 1."""
        return self.mismatches / max(self.elements, 1)

    @property
    def isolated_mismatch_rate(self) -> float:
        """Share of codes that differ, isolated, 0 to 1."""
        return self.isolated_mismatches / max(self.elements, 1)


class Divergence(_PerSite):
    """Integer codes against fake-quant codes, and integer values against float, per site."""

    elements: Tensor
    mismatches: Tensor
    isolated_mismatches: Tensor
    signal: Tensor
    noise: Tensor
    isolated_signal: Tensor
    isolated_noise: Tensor
    max_lsb: Tensor
    isolated_max_lsb: Tensor
    max_error: Tensor
    isolated_max_error: Tensor

    def __init__(self, sites: Sequence[str]) -> None:
        sums = (
            *("elements", "mismatches", "isolated_mismatches"),
            *("signal", "noise", "isolated_signal", "isolated_noise"),
        )
        maxima = ("max_lsb", "isolated_max_lsb", "max_error", "isolated_max_error")
        super().__init__(sites, sums, maxima)

    def update(
        self,
        site: str,
        step: Scalar,
        fake: Tensor,
        integer: Tensor,
        isolated: Tensor,
        reference: Tensor,
        isolated_reference: Tensor,
    ) -> None:
        """Add the tensors of one site; all hold real values and have one shape.

        Args:
            site: Site key.
            step: Step of the grid, to express differences in codes.
            fake: Fake-quant result.
            integer: Result of the integer chain.
            isolated: Result of the integer op on the fake-quant input.
            reference: Result of the float chain.
            isolated_reference: Result of the float op on the fake-quant input.
        """
        fake, integer, isolated = _wide(fake), _wide(integer), _wide(isolated)
        reference, isolated_reference = _wide(reference), _wide(isolated_reference)
        error, isolated_error = integer - reference, isolated - isolated_reference
        self._add(
            site,
            elements=fake.numel(),
            mismatches=(integer != fake).sum(),
            isolated_mismatches=(isolated != fake).sum(),
            signal=_energy(reference),
            noise=_energy(error),
            isolated_signal=_energy(isolated_reference),
            isolated_noise=_energy(isolated_error),
        )
        self._raise_to(
            site,
            max_lsb=_largest(integer - fake) / step,
            isolated_max_lsb=_largest(isolated - fake) / step,
            max_error=_largest(error),
            isolated_max_error=_largest(isolated_error),
        )

    def compute(self) -> Tensor:
        """Return ``[sites, 9]``: the columns of :class:`DivergenceRow`."""
        return torch.stack(
            [
                self.elements,
                self.mismatches,
                self.max_lsb,
                self.isolated_mismatches,
                self.isolated_max_lsb,
                decibel(self.signal, self.noise),
                self.max_error,
                decibel(self.isolated_signal, self.isolated_noise),
                self.isolated_max_error,
            ]
        ).T

    def rows(self) -> list[DivergenceRow]:
        """Return one row per site that was updated; a single transfer from the device."""
        return [
            DivergenceRow(site, *(round(v) for v in values[:5]), *values[5:])
            for site, values in zip(self.sites, _over_ranks(self).tolist(), strict=True)
            if values[0] > 0
        ]


@dataclass(frozen=True)
class OutputRow:
    """What the model returns in one number system, against another.

    Args:
        elements: Number of compared values.
        differing: Share of the values that differ, 0 to 1.
        sqnr: Signal to noise of the values, dB.
        decisions: Number of positions with a decision, the index of the largest value along the
            dimension of the classes; 0 where the output has no such dimension.
        changed: Share of the decisions that differ, 0 to 1. An accuracy cannot differ by more.
    """

    elements: int
    differing: float
    sqnr: float
    decisions: int
    changed: float


class OutputError(Metric):
    """Compares what a model returns in two number systems, in values and in decisions.

    Args:
        class_dim: Dimension of the classes, over which a decision takes the largest value; 1 as in
            ``torch.nn.functional.cross_entropy``.
    """

    full_state_update = False
    elements: Tensor
    differing: Tensor
    signal: Tensor
    noise: Tensor
    decisions: Tensor
    changed: Tensor

    def __init__(self, class_dim: int = 1) -> None:
        super().__init__()
        self.class_dim = class_dim
        for name in ("elements", "differing", "signal", "noise", "decisions", "changed"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), "sum")

    def update(self, result: Tensor, reference: Tensor) -> None:
        """Add the outputs of one batch, which have one shape.

        Args:
            result: In the number system that is judged.
            reference: In the number system that is right.
        """
        result, reference = _wide(result), _wide(reference)
        self.elements += result.numel()
        self.differing += (result != reference).sum()
        self.signal += _energy(reference)
        self.noise += _energy(result - reference)
        dim = self.class_dim
        if result.numel() and -result.dim() <= dim < result.dim() > 1 and result.shape[dim] > 1:
            decided = reference.argmax(dim)
            self.decisions += decided.numel()
            self.changed += (result.argmax(dim) != decided).sum()

    def compute(self) -> Tensor:
        """Return ``[5]``: the columns of :class:`OutputRow`."""
        share = self.differing / self.elements.clamp_min(1)
        changed = self.changed / self.decisions.clamp_min(1)
        sqnr = decibel(self.signal, self.noise)
        return torch.stack([self.elements, share, sqnr, self.decisions, changed])

    def row(self) -> OutputRow | None:
        """Return what was found, None without an update; a single transfer from the device."""
        elements, share, sqnr, decisions, changed = _over_ranks(self).tolist()
        if not elements:
            return None
        return OutputRow(round(elements), share, sqnr, round(decisions), changed)


def _over_ranks(metric: Metric) -> Tensor:
    """Compute over all ranks, in which those without data take part.

    ``metric.compute()`` would warn there that nothing was seen.
    """
    with metric.sync_context():
        computed: Tensor = type(metric).compute(metric)
    return computed


def _wide(x: Tensor) -> Tensor:
    """Return values whose squares neither overflow nor vanish, as they are where they can be."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _energy(x: Tensor) -> Tensor:
    # One pass over memory, which is what these statistics cost; four digits make a decibel.
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm.double().square()


def _product(x: Tensor, y: Tensor) -> Tensor:
    # Pairwise sums: the cosine is a difference of nearly equal numbers.
    return (x * y).sum().double()


def _largest(x: Tensor) -> Tensor:
    if not x.numel():
        return x.new_zeros((), dtype=torch.float64)
    low, high = torch.aminmax(x)
    return torch.maximum(-low, high).double()
