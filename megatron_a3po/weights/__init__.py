"""Weights by their Hugging Face names: tables per family, slices in, full tensors out, publishing to rollout engines."""
