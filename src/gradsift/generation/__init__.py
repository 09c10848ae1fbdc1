"""Text from a model: what it says to a prompt."""
