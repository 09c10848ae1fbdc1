"""Does training on the choice help: held-out loss, always beside a random choice of the same size."""
