from __future__ import annotations

import sys
from pathlib import Path

# Test modules are imported without a package: the oracles (shared by all of them) and the tiny models are found here.
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
