"""Rewards: plain functions (`base.py`), each called off the event loop with a time limit (`scorer.py`)."""
