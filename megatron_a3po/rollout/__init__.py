"""Rollouts: from prompts and published weights to batches of scored, version-labelled trajectories.

`client.RolloutClient` is what the trainer holds; everything else runs in the rollout process (`process.py`).
"""
