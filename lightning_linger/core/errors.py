"""Errors and warnings of the library. Each names the layer, what is allowed, and the remedy."""

import difflib
from collections.abc import Iterable


class LingerError(Exception):
    """Base class of every error this library raises on purpose."""


class ConfigError(LingerError, ValueError):
    """An argument is outside what is allowed."""


class UnsupportedError(LingerError):
    """The model, an op or a platform cannot do what was asked."""


class NotReadyError(LingerError, RuntimeError):
    """A stage is used before the stage it builds on."""


class NonFiniteError(LingerError, ValueError):
    """A tensor from which a scale is derived holds NaN or infinity."""


class QuantizationWarning(UserWarning):
    """Something stays in float, or was skipped, that a user may have expected to be quantized."""


def near_matches(name: str, candidates: Iterable[str]) -> str:
    """Format up to five candidates that resemble ``name`` for an error message."""
    pool = sorted(set(candidates))
    near = difflib.get_close_matches(name, pool, n=5, cutoff=0.3) or pool[:5]
    return ", ".join(repr(candidate) for candidate in near) if near else "none"
