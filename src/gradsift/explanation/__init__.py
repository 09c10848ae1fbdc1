"""How well a few training examples reconstruct the gradient of one output."""
