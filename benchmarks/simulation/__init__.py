"""A discrete-event simulation around the real buffer: see ``benchmarks/simulate.py``."""
