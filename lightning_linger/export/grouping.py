"""What no graph can say: scales of groups of a weight."""

from __future__ import annotations

from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.sites import Site


def refuse_groups(site: Site) -> None:
    """Refuse a layer whose weight has several scales within one output.

    Raises:
        UnsupportedError: If it has.
    """
    if site.has_groups:
        msg = (
            f"`{site.key}`: granularity={site.granularity!r} trains and runs in the integer "
            "simulation, but no dialect has scales of groups. Quantize with granularity='tensor' "
            "or 'channel'."
        )
        raise UnsupportedError(msg)
