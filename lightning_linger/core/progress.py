"""A progress bar where somebody watches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning_linger.core.distributed import process_rank

T = TypeVar("T")


def with_progress(items: Iterable[T], description: str) -> Iterator[T]:
    """Iterate, with a progress bar on the standard error if that is a terminal.

    The bar goes once all is done; only the process of rank zero has one.

    Args:
        items: With a length, the bar shows how far it is.
        description: Stands before the bar.
    """
    from rich.console import Console
    from rich.progress import track

    # A console of its own: Lightning's may have a live display already.
    console = Console(stderr=True)
    if not console.is_interactive or process_rank():
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from track(items, description, total=total, console=console, transient=True)
