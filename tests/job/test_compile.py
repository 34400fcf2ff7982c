"""A network compiles after the import of torchvision that leaves torch.compile's front end out."""

from __future__ import annotations

import subprocess
import sys

BEGIN = "from batch_inference.models.torchvision_import import torchvision_models as models; import sys; "


def test_network_compiles_after_the_import() -> None:
    code = (
        "import torch; net = models().mobilenet_v3_small().eval(); "
        "graph = torch.compile(net, backend='eager'); "
        "x = torch.zeros(1, 3, 224, 224); torch.testing.assert_close(graph(x), net(x))"
    )
    done = subprocess.run([sys.executable, "-c", BEGIN + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
