"""`gradsift.model.models` by its short name."""

import sys

from gradsift.model import models

sys.modules[__name__] = models
