"""``precision: auto``: bfloat16 where the device is fast at it and the job's own images get the same labels."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batch_inference.decisions import Decisions

log = logging.getLogger(__name__)

#: The decision's name among :class:`~batch_inference.decisions.Decisions`.
NAME = "precision"
#: Images that are compared. Where one label in a hundred changes, 512 pass the test below with a chance of 11 %; where
#: one in a thousand does, with one of 99 %.
IMAGES = 512
#: Share of images whose best class has to be the same.
AGREEMENT = 0.995
#: Images of an actor from which on comparing pays: 512 in both precisions cost what bfloat16 saves on about as many.
LEAST_IMAGES = 4 * IMAGES


def supports_bfloat16(device: torch.device) -> bool:
    """Whether the device computes with bfloat16 in hardware: NVIDIA from Ampere on, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # They have no public names; a release without them means float32.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


class Trial:
    """Compares labels in both precisions on the first images of a job.

    Until it is over, rows are float32; afterwards they are what was decided, by whichever actor was first.

    Args:
        decisions: Where the result is recorded.
        device: For the record.
    """

    def __init__(self, decisions: Decisions, device: torch.device) -> None:
        self._decisions = decisions
        self._device = device
        self._images = 0
        self._differ = 0
        #: The precision that holds, once it is known.
        self.decided: str | None = _chosen(decisions.known(NAME))

    def add(self, exact: NDArray[Any], lower: NDArray[Any]) -> None:
        """Takes the best classes of some images in float32 and bfloat16, int (n,) each."""
        self._images += len(exact)
        self._differ += int(np.sum(exact != lower))
        refused = self._differ > (1 - AGREEMENT) * IMAGES
        if self._images < IMAGES and not refused:
            return
        agreement = 1 - self._differ / self._images
        chosen = "bfloat16" if agreement >= AGREEMENT else "float32"
        record = {
            "precision": chosen,
            "top1_agreement": round(agreement, 6),
            "images": self._images,
            "required": AGREEMENT,
            "device": device_name(self._device),
        }
        # Without a record others would decide otherwise: float32 is what nobody has to agree on.
        self.decided = _chosen(self._decisions.decide(NAME, record)) or "float32"
        log.info(
            "precision %s: %s of %s labels are the same in bfloat16", self.decided, f"{agreement:.2%}", self._images
        )


def device_name(device: torch.device) -> str:
    """The device's model, for people."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _chosen(record: dict[str, Any] | None) -> str | None:
    value = (record or {}).get("precision")
    return value if value in ("float32", "bfloat16") else None
