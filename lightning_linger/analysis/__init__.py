"""What a model needs of an engine, and whether it has it, told before anything is trained."""

from lightning_linger.analysis.check import Finding, Findings, check
from lightning_linger.analysis.resources import ResourceRow, Resources, resources

__all__ = ["Finding", "Findings", "ResourceRow", "Resources", "check", "resources"]
