"""Stages: functions on any `nn.Module`, usable without a Trainer."""
