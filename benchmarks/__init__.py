"""Measurements of speed, memory and cost: ``python -m benchmarks.NAME --json FILE``, or all with ``make bench``."""
