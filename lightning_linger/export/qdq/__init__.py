"""The ``qdq`` dialect: float ONNX operators between QuantizeLinear and DequantizeLinear.

Codes of 8 bits travel as uint8 with zero point 128 and those of 16 bits as uint16 with 32768; the
graph is float at both ends. onnxruntime finds ``DequantizeLinear -> operator -> QuantizeLinear``
and runs its integer kernel, whose float32 arithmetic our kernels for ``onnxruntime`` repeat.

Where onnxruntime has no integer kernel it computes on real numbers, and free scales would bring in
rounding errors that no other runtime repeats. Those operators work on the *codes* instead, as if
their scale were 1: whole numbers below 2^24 are exact in float32 in any order, with and without
optimizations, and one product or quotient brings the result to its scale:

=====================================  ===========================================================
transposed convolution, 16-bit layers  operator on codes -> Mul(multiplier) -> QuantizeLinear(1)
average pools                          AveragePool on codes, scale 1 in and out
means, pools over the whole map        ReduceSum on codes -> Div(count) -> QuantizeLinear(1)
float output of a convolution          ConvInteger -> Cast -> Mul(scale_x * scale_w)
=====================================  ===========================================================

A family is a module with a ``TABLE``: how each of its ops is written.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.sites import Site
from lightning_linger.export.dialect import Dialect, Translation
from lightning_linger.export.qdq import (
    arithmetic,
    boundary,
    curves,
    elementwise,
    embedding,
    layers,
    matmul,
    normalization,
    pool,
    recurrent,
    reduction,
    resample,
    select,
    softmax,
)
from lightning_linger.export.qdq.movement import finish
from lightning_linger.export.qdq.writer import SIGNED, UNSIGNED, Write, Writer

_TABLES: tuple[dict[str, Write], ...] = (
    boundary.TABLE,
    layers.TABLE,
    elementwise.TABLE,
    pool.TABLE,
    curves.TABLE,
    softmax.TABLE,
    normalization.TABLE,
    reduction.TABLE,
    embedding.TABLE,
    matmul.TABLE,
    select.TABLE,
    recurrent.TABLE,
    arithmetic.TABLE,
    resample.TABLE,
)


def _check(sites: Sequence[Site]) -> None:
    """Refuse targets whose arithmetic onnxruntime does not have."""
    for site in sites:
        platform = site.platform
        if platform is not None and platform.dialect != "qdq":
            msg = (
                f"`{site.key}` is quantized for platform {platform.name!r}, which reads the "
                f"{platform.dialect!r} dialect. Export with dialect={platform.dialect!r}, or "
                "quantize for 'onnxruntime'."
            )
            raise UnsupportedError(msg)
        if site.rounding != "half_even":
            msg = (
                f"`{site.key}`: QuantizeLinear rounds half to even. Found rounding="
                f"{site.rounding!r}. Leave `rounding` to the platform."
            )
            raise UnsupportedError(msg)


def translation_of(write: Write, signed: bool = False) -> Translation:
    """Return a translation that writes standard ONNX on stored codes."""
    storages = SIGNED if signed else UNSIGNED
    return lambda builder, call: write(Writer(builder, call, storages))


def qdq_dialect(name: str = "qdq", signed: bool = False) -> Dialect:
    """Return the dialect.

    Args:
        name: What users write.
        signed: Store activations as int8 and int16 with zero point 0 instead of uint8 and uint16.
            The codes are the same. onnxruntime runs such a graph with its integer kernels on x86
            only if the session says ``session.qdqisint8allowed = 1``, and its sums and products may
            then round the other way next to a tie, unless scales are powers of two.
    """
    storages = SIGNED if signed else UNSIGNED
    return Dialect(
        name=name,
        table={op: translation_of(w, signed) for table in _TABLES for op, w in table.items()},
        # The first in which quantized values may have 16 bits.
        opset_version=21,
        ir_version=10,
        domains={},
        check=_check,
        finish=lambda graph: finish(graph, storages),
        boundary=boundary.BOUNDARY,
    )


QDQ = qdq_dialect()
