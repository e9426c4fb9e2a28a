"""Shared ground: tensors, randomness, files, processes, errors and progress bars."""
