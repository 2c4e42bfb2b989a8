"""Weights by their Hugging Face names: tables per family, slices in, full tensors out, versions for engines."""
