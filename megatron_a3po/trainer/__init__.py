"""The training run: the loop, its steps and files, and the commands. Empty on purpose: commands import
without torch."""
