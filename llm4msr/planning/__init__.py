"""Capacity planning: the arithmetic behind jobs.plan, pure, over measured unit costs."""
