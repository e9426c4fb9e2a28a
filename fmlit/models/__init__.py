"""Generative models and the networks inside them."""
