"""Scores of models and of anybody's images: how they are found, kept and shown."""
