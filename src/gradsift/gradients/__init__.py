"""Per-example gradients: captured by hooks, turned into Adam directions, projected, written to stores."""
