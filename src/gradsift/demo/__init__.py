"""The demo: a small pool with planted mistakes, and a target to select for."""
