"""When a stage was on, and with which widths."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lightning_linger.dashboard.records import RunRecord


@dataclass(frozen=True)
class Span:
    """A stage while it is on with the same widths.

    Args:
        start: First step.
        end: First step behind it.
        label: The widths, see :func:`widths_label`; empty for stages that have none.
    """

    start: int
    end: int
    label: str = ""


def labelled_spans(record: RunRecord, stage: str) -> list[Span]:
    """Return when a stage was on, quantization divided where widths were changed."""
    spans = stage_spans(record, stage)
    if stage != "quantize" or not record.widths:
        return [Span(start, end) for start, end in spans]
    found = []
    starts = [switch.step for switch in record.widths]
    for switch, until in zip(record.widths, [*starts[1:], None], strict=True):
        label = widths_label(switch.bits.values())
        for start, end in spans:
            first, last = max(start, switch.step), end if until is None else min(end, until)
            if first < last:
                found.append(Span(first, last, label))
    return sorted(found, key=lambda span: span.start)


def widths_label(bits: Iterable[str]) -> str:
    """Return ``weight/input/output`` widths of layers in one: ``8/8/8``, or ``2-8/8/8``."""
    columns = zip(*(layer.split("/") for layer in bits), strict=True)
    return "/".join(_range_of(column) for column in columns)


def _range_of(column: Sequence[str]) -> str:
    widths = [int(word) for word in column if word.isdigit()]
    if not widths:
        return column[0]
    low, high = min(widths), max(widths)
    return str(low) if low == high else f"{low}-{high}"


def stage_spans(record: RunRecord, stage: str) -> list[tuple[int, int]]:
    """Return the steps ``[start, end)`` in which a stage was on; the last step seen ends them."""
    ends = (*(epoch.step for epoch in record.epochs), *(s.step + 1 for s in record.switches))
    last = max(ends, default=0)
    spans: list[tuple[int, int]] = []
    start: int | None = None
    for switch in record.switches:
        on = stage in switch.stages
        if on and start is None:
            start = switch.step
        elif not on and start is not None:
            spans.append((start, switch.step))
            start = None
    if start is not None:
        spans.append((start, last))
    return spans
