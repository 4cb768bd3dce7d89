"""What is quantized, how, and what is not and why, as one readable table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from lightning_linger.core.instrumentation import Instrumentation, instrumentation_of
from lightning_linger.core.registry import op_of
from lightning_linger.core.sites import Site
from lightning_linger.core.table import Table
from lightning_linger.core.tags import WIDEST_OPERAND


@dataclass(frozen=True)
class SummaryRow:
    """One call of the model.

    Args:
        site: Site key.
        op: Canonical op name.
        system: ``fake`` if it is quantized now, ``planned`` if it will be, ``folded`` into the
            layer before it, ``merged`` into the quantizer before it, else ``float``.
        bits: ``weight/input/output`` widths, empty for float.
        scale_kind: ``power_of_two`` or ``free``, with ``/channel`` where each output channel of the
            weight has a scale of its own and ``affine`` where results have a zero point; empty for
            float.
        scale: Step of the output as a power of two or a number, and its zero point if it has one;
            empty while unknown.
        range: Largest magnitude of the output seen so far, empty while unknown.
        stage: What acts on it now, e.g. ``fuse, normalize, quantize``.
        why_float: Why it is not quantized, or which parts of it are not; empty if all is.
        platform: Whose arithmetic it has, empty for float.
    """

    site: str
    op: str
    system: str
    bits: str
    scale_kind: str
    scale: str
    range: str
    stage: str
    why_float: str
    platform: str = ""


class Summary(Table[SummaryRow]):
    """A list of :class:`SummaryRow` in execution order that prints as a table."""

    row_type = SummaryRow


def summary(model: nn.Module) -> Summary:
    """Return what is quantized and what is not, and why, in execution order; prints nothing."""
    instrumentation = instrumentation_of(model)
    rows: list[SummaryRow] = []
    for node in instrumentation.graph:
        op = op_of(node.op)
        if op is not None and op.has_site:
            rows.append(_site_row(instrumentation, instrumentation.find(node.key)))
        elif op is None and any(spec.floating and not spec.constant for spec in node.inputs):
            why = "no quantized meaning; gets and gives plain values"
            rows.append(SummaryRow(node.key, node.op, "float", "", "", "", "", "", why))
    return Summary(rows)


def float_sites(model: nn.Module) -> list[Site]:
    """Return the sites that the quantize stage leaves in float."""
    return [site for site in instrumentation_of(model).sites if not site.quantized]


def _site_row(instrumentation: Instrumentation, site: Site) -> SummaryRow:
    switches = instrumentation.switches
    stages = [
        name
        for name, on in (
            ("fuse", switches.fuse and site.fold is not None),
            ("normalize", switches.normalize and site.limits is not None),
            ("quantize", switches.quantize and site.quantized),
        )
        if on
    ]
    system = "float"
    why = site.why_float or ""
    if site.quantized:
        system = "fake" if switches.quantize else "planned"
        if switches.quantize and not site.ready:
            system, why = "float", "has seen no range yet"
        elif site.floating:
            why = f"left in float: {', '.join(sorted(site.floating))}"
    elif not switches.quantize:
        why = why if why != "not reached" else ""
    bits = _bits(site)
    if site.quantized and site.op.kind == "batch_norm" and site.weights.grid is None:
        system, bits, stages, why = "folded", "", [], ""
    elif site.merged and switches.quantize:
        system = "merged"
    return SummaryRow(
        site=site.key,
        op=site.op.kind,
        system=system,
        bits=bits,
        scale_kind=_scale_kind(site) if bits else "",
        scale=_scale(site),
        range=_range(site),
        stage=", ".join(stages),
        why_float=why,
        platform=site.platform_name if bits else "",
    )


def _bits(site: Site) -> str:
    if site.config is None:
        return ""
    weight = str(site.weights.grid.bits) if site.weights.grid else "-"
    if site.output is not None:
        output = str(site.output.grid.bits)
    elif site.platform is not None and site.op.scale_source(site.platform) == "inputs":
        output = str(site.config.activation_bits)
    else:
        bits = site.config.output_bits
        output = str(bits) if bits is not None and bits > WIDEST_OPERAND else "float"
    return f"{weight}/{site.config.activation_bits}/{output}"


def _scale_kind(site: Site) -> str:
    grid = site.output.grid if site.output is not None else site.weights.grid
    if grid is None:
        return ""
    several = site.weights.grid is not None and (site.granularity == "channel" or site.has_groups)
    kind = f"{grid.scale_kind}/{site.granularity}" if several else grid.scale_kind
    return f"{kind} affine" if grid.affine else kind


def _range(site: Site) -> str:
    if site.output is None or not site.output.known:
        return ""
    return f"{float(site.output.reach()):.4g}"


def _scale(site: Site) -> str:
    if site.output is None or not site.output.known:
        return ""
    step = site.output.latest_step
    if step is None:
        step = float(site.output.wanted_step())
    exponent = math.log2(step)
    scale = f"2^{exponent:.0f}" if exponent.is_integer() else f"{step:.4g}"
    zero_point = site.output.zero_point(step)
    return scale if zero_point is None else f"{scale} zero {int(zero_point)}"
