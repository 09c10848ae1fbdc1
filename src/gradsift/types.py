"""`gradsift.base.types` by its short name."""

import sys

from gradsift.base import types

sys.modules[__name__] = types
