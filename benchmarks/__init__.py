"""Timing against honest baselines in the same run; each module prints JSON lines. Not installed."""
