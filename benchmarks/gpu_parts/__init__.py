"""What ``benchmarks/gpu.py`` measures: one file for each section, and the processes that these run in."""
