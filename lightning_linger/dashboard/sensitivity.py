"""A suggestion made of sensitivities alone, for a page that knows no more of the model."""

from __future__ import annotations

from collections.abc import Iterable

from lightning_linger.analysis.sensitivity import SensitivityRow


def suggest_bits(rows: Iterable[SensitivityRow], tolerance: float) -> dict[str, int]:
    """Return, by site, the narrowest width at which the metric drops by no more than ``tolerance``.

    A width counts only if every wider one that was measured is within the tolerance too. A site
    that is at no width gets its widest. The most sensitive site comes first.
    """
    by_site: dict[str, dict[int, float]] = {}
    for row in rows:
        by_site.setdefault(row.site, {})[row.bits] = row.drop
    found = {}
    for site in sorted(by_site, key=lambda site: -max(by_site[site].values())):
        widths = sorted(by_site[site], reverse=True)
        chosen = widths[0]
        for bits in widths:
            if by_site[site][bits] > tolerance:
                break
            chosen = bits
        found[site] = chosen
    return found
