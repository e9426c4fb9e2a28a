"""The mathematics of flows and diffusions, without a training framework."""
