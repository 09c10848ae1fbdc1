"""Programs of others, run so that they can do no harm."""
