"""What every room stands on: errors, values that pass between stages, settings, checks, progress, interruption."""
