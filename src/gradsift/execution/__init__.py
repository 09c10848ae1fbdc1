"""Where work runs: in this process, or on the workers of a Ray cluster. What is done is the same."""
