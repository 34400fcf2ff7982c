"""Poison for decoders, in any Python process with this folder on its path: files whose last bytes say what happens at opening them.

``…POISON:crash`` ends the process by SIGSEGV, ``abort`` by SIGABRT, ``hang`` computes forever, ``sleep`` waits forever, ``memory``
uses up the memory.
``…POISON-PAGE:crash`` does so when the page of a Parquet file with this value is unpacked. Real files that do so rely on defects of
decoders, which come and go with versions.
"""

import importlib.abc
import importlib.machinery
import mmap
import os
import resource
import signal
import sys
import time


def swallow(poison: bytes) -> None:
    if poison == b"crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif poison == b"abort":
        os.abort()
    elif poison == b"hang":
        while True:
            pass
    elif poison == b"sleep":
        while True:
            time.sleep(0.1)
    elif poison == b"memory":
        if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
            # As the system does when memory ends; really using it up would hit other processes.
            os.kill(os.getpid(), signal.SIGKILL)
        taken = []
        try:
            while True:
                # Pages that nobody writes to take address space and no CPU time, whose limit would come first on a busy machine.
                taken.append(mmap.mmap(-1, 16 << 20))
        except OSError:
            raise MemoryError from None


def poison_images(module):  # type: ignore[no-untyped-def]
    real = module._decode

    def poisoned(data, *args):  # type: ignore[no-untyped-def]
        swallow_any(bytes(data[-32:]), b"POISON:")
        return real(data, *args)

    module._decode = poisoned


def poison_pages(module):  # type: ignore[no-untyped-def]
    real = module.RowSelection._value

    def poisoned(self, number, value):  # type: ignore[no-untyped-def]
        if value.is_valid:
            swallow_any(bytes(value.as_buffer()[-32:]), b"POISON-PAGE:")
        return real(self, number, value)

    module.RowSelection._value = poisoned


def swallow_any(end: bytes, mark: bytes) -> None:
    _, separator, poison = end.partition(mark)
    if separator:
        swallow(poison)


MODULES = {"batch_inference.images.decode": poison_images, "batch_inference.inputs.parquet": poison_pages}


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
