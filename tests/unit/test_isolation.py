from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from batch_inference.config import PreprocessConfig, StorageConfig
from batch_inference.decoding import pixels_of
from batch_inference.errors import RowFailure, SystemFault
from batch_inference.isolation import Helper
from batch_inference.preparation import Preparation
from batch_inference.transform import Transform
from tests.unit.test_images import encode, photo

POISON = Path(__file__).parents[1] / "poison"
# Long enough for a busy machine to run out of memory in; where the time is to run out, it is short.
CONFIG = PreprocessConfig(decode_timeout_s=30, decode_memory_mib=256)
HURRIED = CONFIG.model_copy(update={"decode_timeout_s": 5})
GOOD = encode(photo(), "JPEG")
TYPES = {"crash": "DECODER_CRASH", "abort": "DECODER_CRASH", "hang": "DECODE_TIMEOUT", "memory": "DECODE_MEMORY"}


def poison(kind: str) -> bytes:
    return GOOD + b"POISON:" + kind.encode()


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Helper]:
    monkeypatch.setenv("PYTHONPATH", str(POISON))
    with Helper(CONFIG, Transform()) as one:
        yield one


def test_pixels_are_those_of_this_process(helper: Helper) -> None:
    assert np.array_equal(helper.pixels(GOOD), pixels_of(GOOD, CONFIG, Transform()))
    with Helper(CONFIG, None) as whole:
        assert np.array_equal(whole.pixels(GOOD), pixels_of(GOOD, CONFIG, None))


@pytest.mark.parametrize("kind", TYPES)
def test_what_kills_the_process_is_the_row_s_failure_and_no_other_s(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(POISON))
    with Helper(HURRIED if kind == "hang" else CONFIG, Transform()) as helper:
        expected = helper.pixels(GOOD)
        for _ in range(2):
            with pytest.raises(RowFailure) as caught:
                helper.pixels(poison(kind))
            assert (caught.value.error.stage, caught.value.error.error_type) == ("decode", TYPES[kind])
            assert np.array_equal(helper.pixels(GOOD), expected)


def test_ordinary_failures_are_what_they_are_without_it(helper: Helper) -> None:
    for data, kind in ((b"", "EMPTY_FILE"), (b"text", "UNKNOWN_FORMAT"), (GOOD[:600], "TRUNCATED")):
        with pytest.raises(RowFailure) as caught:
            helper.pixels(data)
        assert caught.value.error.error_type == kind


def test_an_image_larger_than_the_memory_is_one_row(helper: Helper) -> None:
    """Not poison, only large: 90 million pixels in 256 MiB."""
    large = encode(photo().resize((9500, 9500)), "PNG")
    with pytest.raises(RowFailure) as caught:
        helper.pixels(large)
    assert caught.value.error.error_type == "DECODE_MEMORY"
    assert helper.pixels(GOOD).shape == (224, 224, 3)


def test_a_helper_that_does_not_start_is_no_image_s_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the attempt, which is worth a retry; else every image of the shard would be a failed row for good."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (tmp_path / "0.jpg").write_bytes(GOOD)
    with pytest.raises(SystemFault, match="ended by itself, with code 1") as caught:
        list(Preparation(StorageConfig(), CONFIG, Transform()).rows(0, [f"file://{tmp_path}/0.jpg"], careful=True))
    assert "resumes" in caught.value.remedy


def test_no_process_stays(helper: Helper) -> None:
    helper.pixels(GOOD)
    assert helper._process is not None
    group = helper._process.pid
    children = Path(f"/proc/{group}/task/{group}/children").read_text().split()
    assert children
    helper.__exit__()
    until = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in [str(group), *children]):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_shard_is_prepared_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(POISON))
    uris = []
    for number, data in enumerate([GOOD, poison("crash"), GOOD, b"", poison("memory"), GOOD]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        uris.append(f"file://{tmp_path}/{number}.jpg")
    (table,) = Preparation(StorageConfig(), CONFIG, Transform()).rows(0, uris, careful=True)
    assert table["error_type"].to_pylist() == [None, "DECODER_CRASH", None, "EMPTY_FILE", "DECODE_MEMORY", None]
    assert table["pixels"].is_valid().to_pylist() == [True, False, True, False, False, True]


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_task_that_hangs_ends_itself(cpus: int, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(poison("hang"))
    code = (
        "from batch_inference.config import *; from batch_inference.preparation import Preparation\n"
        f"config = PreprocessConfig(decode_timeout_s=1, cpus_per_task={cpus})\n"
        f"list(Preparation(StorageConfig(), config, None).rows(0, ['file://{tmp_path}/0.jpg']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(POISON)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "decoding an image did not end within 1 s" in done.stderr
    assert "swallow" in done.stderr  # the traceback says where
