"""Every error a user can cause. A message says what was found, what was wanted, and what to do."""

from __future__ import annotations


class GradsiftError(Exception):
    """Base of all errors that gradsift raises on purpose: the command line prints its message and exits with a status.

    exit_status: 1 for what went wrong, 2 for what was typed wrong
    """

    exit_status = 1


class DataError(GradsiftError):
    """Input rows, files or columns cannot be used."""


class UnusableRowsError(DataError):
    """A source can be read, and no row of it can be used."""


class ModelError(GradsiftError):
    """A model, tokenizer or adapter cannot be loaded or does not fit what is asked of it."""


class ConfigError(GradsiftError):
    """An option or recipe is wrong; raised before any work is done."""

    exit_status = 2


class RefusedError(ConfigError):
    """A server refuses whoever asks it: the key, the quota, or the model's name; known only once it is asked."""

    exit_status = 1


class ShapeError(GradsiftError):
    """An array given to a pure function has the wrong shape."""


class NonFiniteError(GradsiftError):
    """An array given to a pure function holds NaN or infinity."""


class MismatchError(GradsiftError):
    """Two artifacts do not belong together (other model, adapter, projection, template or data)."""


class CorruptError(GradsiftError):
    """A stored file is truncated or altered."""


class StorageError(GradsiftError):
    """A file cannot be written or read: permissions, disk full, not a folder."""


class LockedError(GradsiftError):
    """Another process works on the same run folder."""


class WorkerError(GradsiftError):
    """A piece of work brings its workers down, again and again."""


class IncompleteError(GradsiftError):
    """A part of the work failed, and the rest is done."""
