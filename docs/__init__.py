"""The documentation; ``docs.draw`` draws its pictures."""
