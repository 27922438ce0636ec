"""What ``benchmarks/engines.py`` measures: workloads, the engines, speeds, the cost of weight updates, tables."""
