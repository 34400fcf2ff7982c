"""The import of torchvision without the front end of torch.compile, in new processes, since a module is imported once."""

import subprocess
import sys

import pytest

BEGIN = "from batch_inference.models.torchvision_import import torchvision_models as models; import sys; "


@pytest.mark.parametrize(
    "code",
    [
        "m = models(); assert 'torch._dynamo' not in sys.modules and 'torchvision' in sys.modules",
        # A caller that needs the front end gets the real one, before and after.
        "m = models(); import torch._dynamo.utils as u; assert u.__file__ and callable(u.is_compile_supported)",
        "import torch._dynamo; real = torch._dynamo; models(); assert sys.modules['torch._dynamo'] is real",
        # What torchvision itself asks it when it is compiled.
        "m = models(); from torchvision.ops.roi_align import is_compile_supported as ask; assert ask('cpu') in (True, False)",
        # Another version of torchvision may want something else of it.
        "import types; t = types.ModuleType('torchvision'); import importlib; real = importlib.import_module\n"
        "def other(name, package=None):\n"
        "    if name != 'torchvision.models': return real(name, package)\n"
        "    from torch._dynamo import allow_in_graph; assert callable(allow_in_graph); return t\n"
        "importlib.import_module = other; assert models() is t; assert sys.modules['torch._dynamo'].__file__",
    ],
)
def test_compile_front_end_is_imported_when_it_is_called(code):
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
