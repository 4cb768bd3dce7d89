"""The library's one logger, ``lightning_linger``.

Its level comes from the environment variable ``LIGHTNING_LINGER_LOG_LEVEL``, once, on import:
``DEBUG``, ``INFO``, ``WARNING``, ``ERROR`` or ``FATAL``, or a number from -1 to 3 in this order.
Without it the level is ``WARNING``. Only the process of rank zero logs.

The root logger is never touched. Where the program has configured none, and has asked for a level,
records go to the standard error; else they go where the program sends them.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import Any

from lightning_linger.core.distributed import process_rank

NAME = "lightning_linger"
VARIABLE = "LIGHTNING_LINGER_LOG_LEVEL"

_LEVELS = {
    "DEBUG": logging.DEBUG,
    "INFO": logging.INFO,
    "WARNING": logging.WARNING,
    "ERROR": logging.ERROR,
    "FATAL": logging.CRITICAL,
}
_NUMBERS = {str(number): level for number, level in enumerate(_LEVELS.values(), start=-1)}

logger = logging.getLogger(NAME)


def configure(environment: Mapping[str, str]) -> None:
    """Set the level of the logger from an environment; say so if what it asks for is unknown."""
    asked = environment.get(VARIABLE, "").strip()
    level = _LEVELS.get(asked.upper(), _NUMBERS.get(asked))
    for handler in [handler for handler in logger.handlers if isinstance(handler, _Handler)]:
        logger.removeHandler(handler)
    logger.addHandler(_Handler(shows=bool(asked)))
    if _of_rank_zero not in logger.filters:
        logger.addFilter(_of_rank_zero)
    if asked or logger.level == logging.NOTSET:
        logger.setLevel(logging.WARNING if level is None else level)
    if asked and level is None:
        logger.warning(
            "%s is %r. It takes %s or a number from -1 to 3; WARNING is used.",
            VARIABLE,
            asked,
            ", ".join(_LEVELS),
        )


class _Handler(logging.Handler):
    """Writes to the standard error unless the program has handlers of its own.

    Args:
        shows: False to write nothing; a library without any handler would fall back on Python's.
    """

    def __init__(self, shows: bool) -> None:
        super().__init__()
        self.shows = shows
        self.setFormatter(logging.Formatter("[%(levelname)s] %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        if not self.shows or (logger.propagate and logging.getLogger().handlers):
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:  # logging never stops the program
            self.handleError(record)


def _of_rank_zero(record: Any) -> bool:
    return not process_rank()


configure(os.environ)
