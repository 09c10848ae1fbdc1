"""Models with their adapters, the one loss, and sentence embeddings."""
