"""Command-line entry points: ``python -m jobs.NAME --config FILE.toml``."""
