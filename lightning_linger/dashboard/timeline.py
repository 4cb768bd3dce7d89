"""When a stage was on."""

from __future__ import annotations

from lightning_linger.dashboard.records import RunRecord


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
