"""Rollout engines: one protocol (`base.py`) and one file per engine."""
