"""torch, imported when something of it is first used: settings share files with the mathematics that they are for.

Modules that a recipe or an option needs say `from gradsift.base.lazy import Tensor, torch` in place of `import torch`.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import Tensor as Tensor
    from torch import nn as nn
else:

    class _Lazy(ModuleType):
        """Stands for a module, which is imported with the first of its names that is asked for."""

        def __getattr__(self, name: str) -> Any:
            module = sys.modules.get(self.__name__)
            if module is None or module.__spec__._initializing:  # not there, or another thread is importing it
                collecting = gc.isenabled()
                gc.disable()  # a tenth of the time to import goes into looking for garbage where there is none
                try:
                    module = import_module(self.__name__)
                finally:
                    if collecting:
                        gc.enable()
            return getattr(module, name)

    class _OfTensors(type):
        def __instancecheck__(cls, value: object) -> bool:
            return "torch" in sys.modules and isinstance(value, torch.Tensor)

    class Tensor(metaclass=_OfTensors):
        """Stands for `torch.Tensor` in annotations and `isinstance`, which need no torch where nothing has made one."""

    torch = _Lazy("torch")
    nn = _Lazy("torch.nn")
