"""Wrappers that give networks of any kind one output, and exported programs any batch size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batch_inference.errors import UserError
from batch_inference.storage.store import exception_line


class Logits(nn.Module):
    """A network whose only output is the logits. Some networks return a tuple, or an object with ``logits``."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 3, h, w) to logits (n, classes).

        Raises:
            UserError: If the output has another shape.
        """
        return _logits_of(self.network(images))


class ExportedNetwork(nn.Module):
    """A program of ``torch.export`` that takes batches of any size, even if it was exported for one size.

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
                f"{path} is not a program of torch.export: {exception_line(exc)}",
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
        #: Height and width that the program requires; None for an axis of any length.
        self.size = tuple(int(side) if isinstance(side, int) else None for side in shapes[0][2:])
        self.min_batch, self.max_batch = _batch_range(program, shapes[0][0])
        self.program = program.module()

    def train(self, mode: bool = True) -> ExportedNetwork:
        """Do nothing, instead of raising an exception: a program is exported for evaluation."""
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images (n, 3, h, w) to logits (n, classes), in chunks of the sizes that the program allows."""
        parts = []
        for chunk in torch.split(images, self.max_batch or max(1, len(images))):
            count = len(chunk)
            if count < self.min_batch:
                chunk = torch.cat([chunk, chunk.new_zeros(self.min_batch - count, *chunk.shape[1:])])
            parts.append(_logits_of(self.program(chunk))[:count])
        return torch.cat(parts)


def _batch_range(program: Any, size: Any) -> tuple[int, int | None]:
    """Return the minimum and maximum batch size of an exported program; a maximum of None means no limit."""
    if isinstance(size, int):
        return size, size
    limits = program.range_constraints.get(size.node.expr)
    try:
        minimum, maximum = max(1, int(limits.lower)), int(limits.upper)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return 1, None
    return minimum, maximum if maximum < 1 << 31 else None


def _logits_of(output: Any) -> torch.Tensor:
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
