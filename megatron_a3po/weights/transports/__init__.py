"""Ways for weights to reach the engines: one small protocol and a file for each. Read `base.py` first."""
