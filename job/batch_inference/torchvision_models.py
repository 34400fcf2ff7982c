"""``torchvision.models``, without the second that importing it takes too long.

Importing torchvision imports the front end of ``torch.compile`` for one question, which ``roi_align`` asks where it is compiled.
That front end is most of torchvision's import time (0.83 of 0.93 s with torchvision 0.25), twice in each job: where the model is
looked at, and in each actor. Here the question is answered when it is asked.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_PACKAGE, _UTILS = "torch._dynamo", "torch._dynamo.utils"


def torchvision_models() -> ModuleType:
    """Imports ``torchvision.models``."""
    if "torchvision" in sys.modules or _PACKAGE in sys.modules:
        return importlib.import_module("torchvision.models")
    stands_in = [_StandIn(_PACKAGE), _StandIn(_UTILS)]
    stands_in[0].__path__ = []
    stands_in[1].is_compile_supported = _is_compile_supported  # type: ignore[attr-defined]
    sys.modules.update({module.__name__: module for module in stands_in})
    try:
        return importlib.import_module("torchvision.models")
    finally:
        _leave()


class _StandIn(ModuleType):
    """In a module's place while torchvision is imported; asked for anything else, it makes room for the module itself."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        _leave()
        return getattr(importlib.import_module(self.__name__), name)


def _is_compile_supported(device_type: Any) -> Any:
    return importlib.import_module(_UTILS).is_compile_supported(device_type)


def _leave() -> None:
    for name in (_UTILS, _PACKAGE):
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]
