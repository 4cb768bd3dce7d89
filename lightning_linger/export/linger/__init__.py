"""The ``linger`` dialect: the integer graph that thinker packs into a chip image.

Integers flow between the nodes, weights are int8 initializers in torch's layout, biases int32 at
the scale of the accumulator. Scales are *reciprocals* of this library's steps: ``q = x * scale_x``.
The engine rounds ``floor(x + 0.5)`` and saturates; its ops say nothing else about rounding.

There are two generations of names. ``linger`` writes the newer one; ``linger1`` is the same graph,
spelled as the older one.

A family is a module with a ``TABLE``, the translation of each of its ops, and ``SCHEMAS``, the ops
it adds to the domain.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from onnx.defs import OpSchema
from onnxscript import ir

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.sites import Site
from lightning_linger.export.dialect import Dialect, Translation
from lightning_linger.export.generations import LINGER1_DOMAIN
from lightning_linger.export.grouping import refuse_groups
from lightning_linger.export.linger import (
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
from lightning_linger.export.linger.older import older_schemas, respell
from lightning_linger.export.linger.schema import DOMAIN
from lightning_linger.export.linger.tidy import tidy
from lightning_linger.export.schemas import register_schemas


class _Family(Protocol):
    TABLE: dict[str, Translation]
    SCHEMAS: list[OpSchema]


_FAMILIES: tuple[_Family, ...] = (
    boundary,
    layers,
    elementwise,
    pool,
    curves,
    softmax,
    normalization,
    reduction,
    embedding,
    matmul,
    select,
    recurrent,
    arithmetic,
    resample,
)


def _check(sites: Sequence[Site]) -> None:
    """Refuse targets that do not read this dialect, and graphs for two targets at once."""
    first: Site | None = None
    for site in sites:
        platform = site.platform
        if platform is None:
            continue
        refuse_groups(site)
        if platform.dialect != "linger":
            msg = (
                f"`{site.key}` is quantized for platform {platform.name!r}, which reads the "
                f"{platform.dialect!r} dialect. Export with dialect={platform.dialect!r}, or "
                "quantize for 'venusa', 'arcs', 'venus' or 'mars'."
            )
            raise UnsupportedError(msg)
        if first is None:
            first = site
        elif first.platform is not None and first.platform.name != platform.name:
            msg = (
                f"a linger graph has one platform. Found {first.platform.name!r} at `{first.key}` "
                f"and {platform.name!r} at `{site.key}`. Give all layers the same platform."
            )
            raise UnsupportedError(msg)


SCHEMAS = [schema for family in _FAMILIES for schema in family.SCHEMAS]
OLDER_SCHEMAS = older_schemas(SCHEMAS)
register_schemas([*SCHEMAS, *OLDER_SCHEMAS])


def _finish_older(graph: ir.Graph) -> None:
    tidy(graph)
    respell(graph)


LINGER = Dialect(
    name="linger",
    table={op: write for family in _FAMILIES for op, write in family.TABLE.items()},
    # What the packer's own ONNX release reads.
    opset_version=18,
    ir_version=8,
    domains={DOMAIN: 1},
    check=_check,
    finish=tidy,
    boundary=boundary.BOUNDARY,
)

LINGER1 = dataclasses.replace(
    LINGER, name="linger1", domains={LINGER1_DOMAIN: 1}, finish=_finish_older
)
