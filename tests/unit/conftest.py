"""Import torchvision as the program does, before a test module does: without torch.compile's front end, which takes seconds."""

from __future__ import annotations

from batch_inference.models.torchvision_import import torchvision_models

torchvision_models()
