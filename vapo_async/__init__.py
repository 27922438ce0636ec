"""Asynchronous, off-policy VAPO (value-based PPO for reasoning) on TorchRL."""

__version__ = "0.1.0"
