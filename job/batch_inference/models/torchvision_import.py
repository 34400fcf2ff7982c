"""Import ``torchvision.models`` faster, without the front end of ``torch.compile``.

Importing torchvision imports that front end for one function, which ``roi_align`` calls to find out whether it can be compiled. The
front end is most of torchvision's import time (0.83 of 0.93 s with torchvision 0.25), and every process that loads a model would pay
it: the driver and each actor. A stand-in imports it when the function is called.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_PACKAGE, _UTILS = "torch._dynamo", "torch._dynamo.utils"


def torchvision_models() -> ModuleType:
    """Import ``torchvision.models`` and return it."""
    if "torchvision" in sys.modules or _PACKAGE in sys.modules:
        return importlib.import_module("torchvision.models")
    stand_ins = [_StandIn(_PACKAGE), _StandIn(_UTILS)]
    stand_ins[0].__path__ = []
    stand_ins[1].is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in stand_ins})
    try:
        return importlib.import_module("torchvision.models")
    finally:
        _remove_stand_ins()


class _StandIn(ModuleType):
    """A placeholder for a module while torchvision is imported. Any other attribute replaces it by the real module."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(importlib.import_module(self.__name__), name)


def _is_compile_supported(device_type: Any) -> Any:
    return importlib.import_module(_UTILS).is_compile_supported(device_type)


def _remove_stand_ins() -> None:
    for name in (_UTILS, _PACKAGE):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
