"""Running integer graphs of the ``linger`` dialect on numpy arrays, without the engine.

The arithmetic is that of the library's own integer ops, so a graph agrees with the model it came
from, and with graphs that other tools wrote in either generation of the dialect's names.

A family is a module with ``KERNELS``, the function that runs each of its op types.
"""

from lightning_linger.export.runner.interpreter import OnnxIntegerRunner

__all__ = ["OnnxIntegerRunner"]
