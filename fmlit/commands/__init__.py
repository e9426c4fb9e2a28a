"""The scripts that start from a checkpoint: one module for each, and the options that they share."""
