"""Writes docs/platform-limits.md from the rules that `linger.check` looks at.

Run ``python -m tests.analysis.limits_page`` after changing a rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from lightning_linger.platforms import PLATFORMS
from lightning_linger.platforms.limits import LIMITS
from lightning_linger.platforms.rules import Rule

PAGE = Path(__file__).parents[2] / "docs" / "platform-limits.md"

HEAD = """# Platform limits

<!-- Written by `python -m tests.analysis.limits_page`; the tests compare. -->

What each platform can run, rule by rule. These are the rules that [`linger.check`](check.md) looks
at; the first column is the name in its findings. For every rule the tests check a model just inside
its limit and one just outside.

**error**: the model cannot be deployed. **warning**: it can, at a price, or with a result that
nobody compared. **note**: what whoever packs it has to know.

How it is known: **engine**: from results of the engine. **packer**: from what thinker's packer
does. **sources**: read in thinker's sources, and not run. **export**: this library's own export
refuses it.

A layer that runs in several passes, and an op that is written as several, are one layer in the
model. `--platform` and `platform=` take the names below; ops that an engine lacks are marked with †
under [operators](operators.md).
"""

# Headings, and the kinds of layers below them; rules about layers of several sections come last.
SECTIONS: dict[str, tuple[str, ...]] = {
    "Convolutions and pools": ("conv", "conv1d", "deconv", "max_pool", "avg_pool"),
    "Linear layers and products": ("linear", "matmul"),
    "Norms, softmax, recurrent layers": ("softmax", "log_softmax", "layer_norm", "lstm"),
    "Sums, products, movement": (
        "add",
        "mul",
        "cat",
        "slice",
        "select",
        "move",
        "pad",
        "transpose",
    ),
    "The whole model": ("model", "identity", "float", "unsupported", "unverified", "result_size"),
    "Settings of the quantize stage": ("setting",),
}
OTHERS = "Widths and other ops"

COLUMNS = ("rule", "limit", "on", "beyond it", "what to do", "known from")


def page() -> str:
    """Return the page."""
    platforms: dict[str, list[str]] = {}
    for platform in LIMITS:
        platforms.setdefault(PLATFORMS[platform].dialect, []).append(platform)
    lines = [HEAD]
    for dialect, names in platforms.items():
        lines.append(f"## {f'Platforms of the `{dialect}` dialect' if dialect else 'TFLite'}\n")
        lines += [f"- `{name}`: {LIMITS[name].about}" for name in names]
        lines.append("")
        for title, rows in _sections(names).items():
            lines += [f"### {title}\n", _row(COLUMNS), _row(["---"] * len(COLUMNS)), *rows, ""]
    return "\n".join(lines)


def _sections(platforms: list[str]) -> dict[str, list[str]]:
    """Return the rows of each section; what several platforms share is one row."""
    names = list(dict.fromkeys(rule.name for name in platforms for rule in LIMITS[name].rules))
    found: dict[str, list[str]] = {title: [] for title in (*SECTIONS, OTHERS)}
    for name in names:
        rules = {p: LIMITS[p].by_name[name] for p in platforms if name in LIMITS[p].by_name}
        for text in dict.fromkeys(rule.text for rule in rules.values()):
            shared = [platform for platform, rule in rules.items() if rule.text == text]
            rule, where = rules[shared[0]], "all" if shared == platforms else ", ".join(shared)
            cells = (f"`{name}`", text, where, rule.severity, rule.remedy, rule.evidence)
            found[_section(rule)].append(_row(cells))
    return {title: rows for title, rows in found.items() if rows}


def _section(rule: Rule) -> str:
    found = [title for title, kinds in SECTIONS.items() if set(rule.layers) <= set(kinds)]
    return found[0] if found else OTHERS


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
