"""Training with Lightning: modules, optimizers, averages, loggers and callbacks."""
