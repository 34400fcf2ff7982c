"""Poison for decoders, in any Python process that has this folder on its path: what a file says behind its end happens when it is opened.

``…POISON:crash`` ends the process by SIGSEGV, ``abort`` by SIGABRT, ``hang`` computes for ever, ``sleep`` waits for ever, ``memory``
takes all there is.
``…POISON-PAGE:crash`` does it when a Parquet file's page with this value is unpacked. Real files that do so are defects of decoders,
which come and go with versions.
"""

import importlib.abc
import importlib.machinery
import os
import resource
import signal
import sys
import time


def swallow(kind: bytes) -> None:
    if kind == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == b"abort":
        os.abort()
    elif kind == b"hang":
        while True:
            pass
    elif kind == b"sleep":
        while True:
            time.sleep(0.1)
    elif kind == b"memory":
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            # As the system does when there is no more; really taking all would hit others.
            os.kill(os.getpid(), signal.SIGKILL)
        taken = []
        while True:
            taken.append(bytearray(16 << 20))


def poisoned_images(module):  # type: ignore[no-untyped-def]
    real = module._decode

    def poisoned(data, *args):  # type: ignore[no-untyped-def]
        take(bytes(data[-32:]), b"POISON:")
        return real(data, *args)

    module._decode = poisoned


def poisoned_pages(module):  # type: ignore[no-untyped-def]
    real = module.Pages._value

    def poisoned(self, number, value):  # type: ignore[no-untyped-def]
        if value.is_valid:
            take(bytes(value.as_buffer()[-32:]), b"POISON-PAGE:")
        return real(self, number, value)

    module.Pages._value = poisoned


def take(end: bytes, mark: bytes) -> None:
    _, found, kind = end.partition(mark)
    if found:
        swallow(kind)


MODULES = {"batch_inference.images": poisoned_images, "batch_inference.parquet_files": poisoned_pages}


class Finder(importlib.abc.MetaPathFinder):
    """Lets the real finders find the modules, and changes them once they are loaded."""

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in MODULES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]
                load(module)
                MODULES[name](module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
