"""Networks as they run: one output, any batch size, whatever they were saved as."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batch_inference.errors import UserError
from batch_inference.storage import exc_line


class Logits(nn.Module):
    """Gives a network one output: the logits. Some give a tuple, or an object that has ``logits``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) to (n, classes)."""
        return _logits(self.network(images))


class ExportedNetwork(nn.Module):
    """A program of ``torch.export``, for batches of any size even if it was exported for one size.

    Args:
        path: A ``.pt2`` file.

    Raises:
        UserError: If it is not an exported program, or does not take one tensor of shape (n, 3, h, w).
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            program = torch.export.load(path)
        except Exception as exc:
            raise UserError(
                f"{path} is not a program of torch.export: {exc_line(exc)}",
                "Save it with torch.export.save, with this or an older release of torch.",
            ) from exc
        names = set(program.graph_signature.user_inputs)
        inputs = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
        shapes = [tuple(node.meta["val"].shape) for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
        if len(inputs) != 1 or len(shapes) != 1 or len(shapes[0]) != 4:
            raise UserError(
                f"{path} takes {len(inputs)} inputs of shapes {shapes}, not one of shape (n, 3, h, w)",
                "Export a network that takes one batch of images.",
            )
        #: Height and width that the program is fixed to; None where it takes any.
        self.size = tuple(int(side) if isinstance(side, int) else None for side in shapes[0][2:])
        self.least, self.most = _batch_range(program, shapes[0][0])
        self.program = program.module()

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Does nothing: a program is exported for evaluation, and says so with an exception."""
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 3, h, w) to (n, classes), in chunks of the sizes that the program allows."""
        parts = []
        for chunk in torch.split(images, self.most or max(1, len(images))):
            count = len(chunk)
            if count < self.least:
                chunk = torch.cat([chunk, chunk.new_zeros(self.least - count, *chunk.shape[1:])])
            parts.append(_logits(self.program(chunk))[:count])
        return torch.cat(parts)


def _batch_range(program: Any, size: Any) -> tuple[int, int | None]:
    """Least and most images that an exported program takes at once; None: no limit."""
    if isinstance(size, int):
        return size, size
    limits = program.range_constraints.get(size.node.expr)
    try:
        least, most = max(1, int(limits.lower)), int(limits.upper)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return 1, None
    return least, most if most < 1 << 31 else None


def _logits(output: Any) -> torch.Tensor:
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    if not isinstance(output, torch.Tensor) or output.ndim != 2:
        shape = f"shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__
        raise UserError(
            f"the network's output is of {shape}, not logits of shape (n, classes)", "Use an image classifier."
        )
    return output
