"""Code that all contenders share: their command line, their marks, their output."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MARKS = "BENCH_MARKS"


@dataclass(frozen=True)
class Task:
    """The task of a contender.

    Attributes:
        images: Folder of JPEGs.
        output: Folder for Parquet files with columns ``uri``, ``predicted_class_idx`` and ``confidence``.
        model: torchvision's name.
        weights: State dict, ``.safetensors``.
        precision: ``float32``, ``bfloat16`` or ``auto``, where the contender has a choice.
        actors: Actors, where the contender has a choice.
        batch_size: Images in a forward pass; None: what the contender takes.
    """

    images: Path
    output: Path
    model: str
    weights: Path
    precision: str
    actors: int
    batch_size: int | None

    @property
    def paths(self) -> list[str]:
        """The images, in order."""
        return [str(path) for path in sorted(self.images.glob("*.jpg"))]


def task() -> Task:
    """The task that the command line sets."""
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "auto"))
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--batch-size", type=int)
    return Task(**vars(parser.parse_args()))


def mark(rows: int) -> None:
    """Notes that so many more rows have a prediction now; from any process of the contender."""
    # One short write in append mode: lines of several processes do not mix. The clock is the machine's, not the process's.
    handle = os.open(os.environ[MARKS], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(handle, f"{time.monotonic():.6f} {rows}\n".encode())
    os.close(handle)


def write(folder: Path, uris: list[str], classes: Any, confidences: Any) -> None:
    """Writes the rows as one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "uri": pa.array(uris),
            "predicted_class_idx": pa.array(classes, pa.int32()),
            "confidence": pa.array(confidences, pa.float32()),
        }
    )
    pq.write_table(table, folder / "predictions.parquet")
