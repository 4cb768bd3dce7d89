"""Widths of quantizers that are there already: changed in place, with the ranges they have.

Nothing is created and nothing taken away, so optimizers, DDP and averages of the model know every
parameter before and after. A range stays what it is; its step follows from the new width.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_linger.core.errors import ConfigError
from lightning_linger.core.platform import symmetry_of
from lightning_linger.core.ranges import RangeEstimator
from lightning_linger.core.tags import WIDEST_OPERAND

if TYPE_CHECKING:
    from lightning_linger.core.config import QuantConfig
    from lightning_linger.core.platform import Platform
    from lightning_linger.core.quantizer import Quantizer
    from lightning_linger.core.sites import Site

NAMES = ("weight_bits", "activation_bits", "output_bits")


@dataclass(frozen=True)
class Widths:
    """Widths of one site, named as in :class:`lightning_linger.QuantConfig`."""

    weight_bits: int
    activation_bits: int
    output_bits: int | None


def widths_of(site: Site) -> Widths:
    """Return the widths of a quantized site."""
    assert site.config is not None  # the caller asks quantized sites only
    return Widths(*(getattr(site.config, name) for name in NAMES))


def changed_config(site: Site, widths: Widths) -> QuantConfig:
    """Return the settings of a quantized site with other widths; nothing is changed.

    Raises:
        ConfigError: If a width is not allowed, or an output would become, or cease to be, codes.
    """
    config = site.config
    assert config is not None  # the caller changes quantized sites only
    if _is_narrow(widths.output_bits) != _is_narrow(config.output_bits):
        msg = (
            f"`{site.key}`: the quantizer of an output of {config.output_bits} bits cannot become "
            f"one of {widths.output_bits}. Widths from 2 to {WIDEST_OPERAND} can be changed into "
            "each other; leave `output_bits` away."
        )
        raise ConfigError(msg)
    return config.override(dataclasses.asdict(widths))


def set_widths(site: Site, widths: Widths) -> None:
    """Give a quantized site other widths.

    Raises:
        ConfigError: See :func:`changed_config`.
    """
    config, platform = changed_config(site, widths), site.platform
    assert platform is not None  # a plan gives it together with the settings
    call = site.recorded_call
    site.config = config
    if site.weights.grid is not None and site.weights.bits != widths.weight_bits:
        site.weights.change_width(widths.weight_bits)
    site.operand_bits = {}
    for position, _ in enumerate(site.op.operands(call)):
        bits = site.op.operand_bits(position, call, config, platform)
        if bits != config.activation_bits:
            site.operand_bits[position] = bits
        if str(position) in site.inputs:
            quantizer: Any = site.inputs[str(position)]
            _change(quantizer, bits, config, platform)
    for name, part in site.op.parts(call, config, platform).items():
        bits = config.activation_bits if part.bits is None else part.bits
        _change(site.part(name), bits, config, platform, part.range)
    if site.output is not None and widths.output_bits is not None:
        known = site.op.output_range(call, config, platform)
        _change(site.output, widths.output_bits, config, platform, known)
    site.thaw()


def _is_narrow(bits: int | None) -> bool:
    return bits is not None and bits <= WIDEST_OPERAND


def _change(
    quantizer: Quantizer, bits: int, config: QuantConfig, platform: Platform, known: Any = None
) -> None:
    symmetry = symmetry_of(config, platform, bits)
    grid = dataclasses.replace(quantizer.grid, bits=bits, symmetry=symmetry)
    before = quantizer.estimator
    quantizer.grid = grid
    if quantizer.learned is not None:
        quantizer.learned.change_grid(grid)
    before.grid = measured = quantizer.measured_grid
    range_ = config.range if known is None else known
    if range_ != before.kind:
        # What an engine knows of a result may depend on the width.
        estimator = RangeEstimator(range_, quantizer.name, measured).to(before.range.device)
        quantizer.estimator = estimator.train(before.training)
    quantizer.thaw()
