"""Writes the table of docs/packing.md from the cases, whose verdicts the tests measure.

Run ``python -m tests.thinker.packing_table`` after adding a case.
"""

from __future__ import annotations

from pathlib import Path

from tests.thinker.cases import GROUPS
from tests.thinker.cases.case import ENGINES, PLATFORMS, PackCase

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "packing.md"
VECTORS = ROOT / "tests" / "data" / "golden" / "thinker"
START = "<!-- Written by `python -m tests.thinker.packing_table`; the tests compare. -->\n"


def page() -> str:
    """Return the written part of the page."""
    recorded = {path.stem for path in VECTORS.glob("*.npz")}
    lines = [START]
    for group, cases in GROUPS.items():
        lines += [f"### {group}\n", "| | venusa | arcs | venus |", "|---|---|---|---|"]
        lines += [_row(case, recorded) for case in cases]
        lines.append("")
    return "\n".join(lines)


def _row(case: PackCase, recorded: set[str]) -> str:
    cells = (_cell(case, platform, recorded) for platform in PLATFORMS)
    return f"| {case.text} | {' | '.join(cells)} |"


def _cell(case: PackCase, platform: str, recorded: set[str]) -> str:
    refused = case.refused.get(platform)
    if refused is not None:
        return f"no: {refused.why}"
    if platform in case.wrong:
        return f"**wrong**: {case.wrong[platform]}"
    engine = ENGINES[platform]
    proven = any(
        name.startswith(prefix) and name.endswith(f"__{engine}")
        for prefix in case.vectors
        for name in recorded
    )
    return "**equal**" if proven else "yes"


def main() -> None:
    """Write the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index(START)] + page(), encoding="utf-8")


if __name__ == "__main__":
    main()
