"""`gradsift.base.errors` by its short name."""

import sys

from gradsift.base import errors

sys.modules[__name__] = errors
