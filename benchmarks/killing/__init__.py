"""What ``benchmarks/chaos.py`` is made of: the tiny run, its processes, who is killed, what must hold."""
