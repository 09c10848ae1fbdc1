"""Files of a run: one list/read/publish interface, manifests, and the gradient store. Knows nothing of models."""
