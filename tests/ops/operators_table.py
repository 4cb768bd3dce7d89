"""Writes docs/operators.md from the op table and from what the harness proves about each op.

Run ``python -m tests.ops.operators_table`` after adding an op or a case.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import lightning_linger.ops  # noqa: F401 - fills the op table
from lightning_linger.core.registry import Op, all_ops
from lightning_linger.ops.refused import RefusedOp
from lightning_linger.platforms import PLATFORMS
from lightning_linger.platforms.tflite import TFLITE
from tests.ops.cases import ALL, Case

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"
WIDTHS = (8, 16)
EXPORTS = ("venusa", "arcs", "venus", "onnxruntime")

HEAD = """# Operators

<!-- Written by `python -m tests.ops.operators_table`; the tests compare. -->

Every op of this table trains at 2 to 16 bits on every platform and has an integer form; the names
are what `types=` and `overrides={"type:..."}` take. What a model calls and this page does not list
stays float, and `linger.summary(model)` says so.

- **train = integer**: the fake-quant forward in evaluation equals the integer forward *always* bit
  for bit, or with power-of-two scales (*pow2*): with the free scales of `onnxruntime` a code may
  then differ next to a rounding tie, which is counted and shown. Movement has nothing to round.
- **venusa, arcs, venus**: the `linger` dialect; mars is like arcs. **onnxruntime**: the `qdq`
  dialect. *yes*: every form of the op that the tests know is written, and gives the same integers
  in the runner or in onnxruntime; *8 bit*: at 8 bits only; *some*: see the last column; *no*: the
  export refuses the op, and says why. **†**: it can be written and simulated, but the engine cannot
  run it or computes something else; `strict_platform=True` makes it an error at set-up.
- **tflite**: no file is written. *yes*: evaluation and integers agree bit for bit, in TFLite's own
  arithmetic where [TFLite](tflite.md#kernels) describes it; *float*: the op stays float.

"""


def page() -> str:
    """Return the page."""
    cases: dict[str, list[Case]] = defaultdict(list)
    for case in ALL:
        for kind in (case.kind, *case.covers):
            cases[kind].append(case)
    lines = [
        "| op | train = integer | " + " | ".join((*EXPORTS, "tflite")) + " | what is refused |",
        "| --- | --- |" + " --- |" * (len(EXPORTS) + 2),
    ]
    notes: dict[str, str] = {}
    for op in all_ops():
        if isinstance(op, RefusedOp):
            continue
        own = [case for case in cases[op.kind] if case.kind == op.kind] or cases[op.kind]
        cells = [*(_cell(op.kind, platform, own) for platform in EXPORTS), _simulated(op.kind)]
        lines.append(f"| `{op.kind}` | {_exactness(op)} | {' | '.join(cells)} | {_refusals(own)} |")
        for name in EXPORTS:
            instead = PLATFORMS[name].unsupported.get(op.kind)
            if instead is not None:
                notes[op.kind] = instead
    text = HEAD + "\n".join(lines) + "\n\n## † Use instead\n\n"
    rows = (f"- `{kind}`: {instead}" for kind, instead in sorted(notes.items()))
    refused = [f"- `{op.kind}`: {op.reason}" for op in all_ops() if isinstance(op, RefusedOp)]
    return text + "\n".join(rows) + "\n\n## What stays float\n\n" + "\n".join(refused) + "\n"


def _exactness(op: Op) -> str:
    if not op.has_site:
        return "moves"
    return "always" if op.exact_with_free_scales or op.output_scale == "inputs" else "pow2"


def _cell(kind: str, platform: str, cases: list[Case]) -> str:
    dialect = PLATFORMS[platform].dialect
    written = {
        bits: [case.refusal(dialect, platform, bits) is None for case in cases] for bits in WIDTHS
    }
    if all(all(found) for found in written.values()):
        cell = "yes"
    elif all(written[8]):
        cell = "8 bit"
    elif any(map(any, written.values())):
        cell = "some"
    else:
        return "no"
    return cell + ("†" if kind in PLATFORMS[platform].unsupported else "")


def _simulated(kind: str) -> str:
    if kind in TFLITE.stays_float:
        return "float"
    return "yes†" if kind in TFLITE.unsupported else "yes"


def _refusals(cases: list[Case]) -> str:
    found: dict[str, list[str]] = {}
    for case in cases:
        for platform in EXPORTS:
            dialect = PLATFORMS[platform].dialect
            for bits in WIDTHS:
                reason = case.refusal(dialect, platform, bits)
                if reason is not None:
                    found.setdefault(reason.replace("\\", ""), []).append(case.name)
    return "; ".join(
        f"{reason} ({', '.join(dict.fromkeys(names))})" if len(set(names)) < len(cases) else reason
        for reason, names in found.items()
    )


if __name__ == "__main__":
    PAGE.write_text(page())
