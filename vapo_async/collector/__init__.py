"""Rollouts: the engine protocol, the embedded engine and the collector that turns tickets into groups."""
