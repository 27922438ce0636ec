"""What a training run needs of a cluster, from stated models: memory, speed, and whether it fits (scripts/plan.py)."""
