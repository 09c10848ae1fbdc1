"""Warm-up training: LoRA checkpoints with Adam's moments by name and each epoch's mean learning rate."""
