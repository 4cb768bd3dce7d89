"""ONNX: the integer model as a file, in the words of whoever reads it, and a way to run it."""

from lightning_linger.export.exporter import export_onnx
from lightning_linger.export.extension import register_export
from lightning_linger.export.runner import OnnxIntegerRunner

__all__ = ["OnnxIntegerRunner", "export_onnx", "register_export"]
