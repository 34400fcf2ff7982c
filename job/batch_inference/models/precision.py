"""``precision: auto``: use bfloat16 if the device is fast at it and the job's own images get the same labels."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from batch_inference.output.decisions import Decisions

log = logging.getLogger(__name__)

#: Name of the decision in :class:`~batch_inference.output.decisions.Decisions`.
DECISION_NAME = "precision"
#: Number of images that are compared. If one label in 100 changes, 512 images pass the test below with a probability of 11 %; if one
#: in 1,000 changes, with 99 %. (At most 2 of 512 may differ: binomial distribution.)
SAMPLE_IMAGES = 512
#: Share of images whose best class must be the same in both precisions.
MIN_AGREEMENT = 0.995
#: Minimum number of images per actor for the comparison to pay: running 512 images in both precisions costs about as much as bfloat16
#: saves on as many images.
MIN_JOB_IMAGES = 4 * SAMPLE_IMAGES


def supports_bfloat16(device: torch.device) -> bool:
    """Return whether the device has bfloat16 in hardware.

    NVIDIA GPUs have it from Ampere on (compute capability 8.0), CPUs with AMX or AVX512-BF16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # torch has no public functions for these. A release without the private ones falls back to float32.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


class PrecisionTrial:
    """A comparison of both precisions on the first images of a job.

    Rows are predicted in float32 until it is over, and then in the precision that the first actor to finish recorded.

    Args:
        decisions: Decisions of the job, which get the result.
        device: Device of this actor, for the record.
    """

    def __init__(self, decisions: Decisions, device: torch.device) -> None:
        self._decisions = decisions
        self._device = device
        self._images = 0
        self._differing = 0
        #: The precision of the job; None until it is decided.
        self.decided: str | None = _recorded_precision(decisions.known(DECISION_NAME))

    def add(self, float32_classes: NDArray[Any], bfloat16_classes: NDArray[Any]) -> None:
        """Compare the best classes of some images, and record a decision after :data:`SAMPLE_IMAGES` images.

        Args:
            float32_classes: Index of the best class in float32, int (n,).
            bfloat16_classes: Index of the best class in bfloat16, int (n,).
        """
        self._images += len(float32_classes)
        self._differing += int(np.sum(float32_classes != bfloat16_classes))
        refused = self._differing > (1 - MIN_AGREEMENT) * SAMPLE_IMAGES
        if self._images < SAMPLE_IMAGES and not refused:
            return
        agreement = 1 - self._differing / self._images
        chosen = "bfloat16" if agreement >= MIN_AGREEMENT else "float32"
        record = {
            "precision": chosen,
            "top1_agreement": round(agreement, 6),
            "images": self._images,
            "required": MIN_AGREEMENT,
            "device": device_name(self._device),
        }
        # If nothing could be recorded, other actors may decide otherwise. float32 needs no agreement.
        self.decided = _recorded_precision(self._decisions.decide(DECISION_NAME, record)) or "float32"
        log.info(
            "precision %s: %s of %s labels are the same in bfloat16", self.decided, f"{agreement:.2%}", self._images
        )


def device_name(device: torch.device) -> str:
    """Return the model name of a device, such as ``NVIDIA L4`` or ``cpu AVX512``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def _recorded_precision(record: dict[str, Any] | None) -> str | None:
    value = (record or {}).get("precision")
    return value if value in ("float32", "bfloat16") else None
