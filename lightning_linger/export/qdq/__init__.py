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

import onnx

from lightning_linger.core.errors import ConfigError, UnsupportedError
from lightning_linger.core.sites import Site
from lightning_linger.export.dialect import Dialect, Translation
from lightning_linger.export.grouping import refuse_groups
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
from lightning_linger.export.qdq.writer import SIGNED, UNSIGNED, Form, Write, Writer

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
        refuse_groups(site)
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


# How each op is written; ops from outside the library are added.
WRITES: dict[str, Write] = {op: write for table in _TABLES for op, write in table.items()}

# The last opset whose QuantizeLinear has 8 bits only, and the first that the graphs can be.
_NARROW_OPSET, _FIRST_OPSET = 20, 18
_LATEST_OPSET = 25


def qdq_dialect(
    name: str = "qdq", signed: bool = False, int4_weights: bool = False, opset_version: int = 21
) -> Dialect:
    """Return the dialect.

    Args:
        name: What users write.
        signed: Store activations as int8 and int16 with zero point 0 instead of uint8 and uint16.
            The codes are the same. onnxruntime runs such a graph with its integer kernels on x86
            only if the session says ``session.qdqisint8allowed = 1``, and its sums and products may
            then round the other way next to a tie, unless scales are powers of two.
        int4_weights: Store weights of up to 4 bits as int4.
        opset_version: Of standard ONNX; 21 is the first in which quantized values may have 16 or 4
            bits.

    Raises:
        ConfigError: If the opset is not one that the graphs can be written in.
    """
    latest = min(_LATEST_OPSET, onnx.defs.onnx_opset_version())
    known = type(opset_version) is int and _FIRST_OPSET <= opset_version <= latest
    if not known or (int4_weights and opset_version <= _NARROW_OPSET):
        first = _NARROW_OPSET + 1 if int4_weights else _FIRST_OPSET
        what = " with int4 weights" if int4_weights else ""
        msg = f"`opset_version`{what} is {first} to {latest}. Found: {opset_version!r}."
        raise ConfigError(msg)
    storages = SIGNED if signed else UNSIGNED
    form = Form(storages, int4_weights, wide=opset_version > _NARROW_OPSET)
    return Dialect(
        name=name,
        table={op: _translation(write, form) for op, write in WRITES.items()},
        opset_version=opset_version,
        ir_version=_IR_VERSIONS.get(opset_version, 10),
        domains={},
        check=_check,
        finish=lambda graph: finish(graph, storages),
        boundary=boundary.BOUNDARY,
    )


# An older reader refuses a file of a newer format version than its own.
_IR_VERSIONS = {18: 8, 19: 9, 20: 9}


def _translation(write: Write, form: Form) -> Translation:
    return lambda builder, call: write(Writer(builder, call, form))


def add_write(integer_op: str, write: Write) -> None:
    """Add an op from outside the library."""
    WRITES[integer_op] = write
    QDQ.table[integer_op] = _translation(write, Form(UNSIGNED))


def drop_write(integer_op: str) -> None:
    """Take out an op that was added."""
    WRITES.pop(integer_op, None)
    QDQ.table.pop(integer_op, None)


QDQ = qdq_dialect()
