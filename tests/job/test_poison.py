"""Images that kill whatever decodes them, 200 among 10,000, or the predictor: the job ends by itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from tests.support.containers import parquet
from tests.support.jobs import POISON, job_args, verified

TYPES = {"crash": "DECODER_CRASH", "abort": "DECODER_CRASH", "memory": "DECODE_MEMORY", "hang": "DECODE_TIMEOUT"}
KINDS = ["crash"] * 96 + ["abort"] * 60 + ["memory"] * 40 + ["hang"] * 4
IMAGES, SHARD = 10_000, 1000


def test_each_poison_image_is_one_error_row_and_its_neighbours_keep_their_predictions(
    photos: Callable[..., Path], tmp_path: Path, program: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    clean, mixed = photos(IMAGES), tmp_path / "mixed"
    mixed.mkdir()
    files = sorted(clean.iterdir())
    every = IMAGES // len(KINDS)
    expected: dict[str, str] = {}
    for place, file in enumerate(files):
        target = mixed / file.name
        if place % every == every // 2:
            # Kinds in turn, so that each shard has some of each.
            kind = KINDS[(place // every * 37) % len(KINDS)]
            target.write_bytes(file.read_bytes() + b"POISON:" + kind.encode())
            expected[target.name] = TYPES[kind]
        else:
            os.link(file, target)
    assert len(expected) == len(KINDS)
    seconds = {}
    for name, folder in (("without", clean), ("with", mixed)):
        begun = time.monotonic()
        args = job_args(folder, tmp_path / name, shard_size=SHARD)
        more = [
            "--set",
            "preprocess.decode_timeout_s=2",
            "--set",
            "preprocess.decode_memory_mib=256",
            "--set",
            "inference.batch_size=64",
        ]
        done = program(*args, *more, env={"PYTHONPATH": str(POISON)})
        seconds[name] = time.monotonic() - begun
        assert done.returncode == 0, done.stdout + done.stderr
    report = verified(str(tmp_path / "with"), program)
    assert (report["predictions"], report["errors"]) == (IMAGES - len(KINDS), len(KINDS))
    found = {}
    for file in (tmp_path / "with/errors").iterdir():
        rows = pq.read_table(file).select(["uri", "stage", "error_type"]).to_pylist()
        found |= {row["uri"].rpartition("/")[2]: row["error_type"] for row in rows}
        assert {row["stage"] for row in rows} == {"decode"}
    assert found == expected
    assert not list((tmp_path / "with").glob("_begun/*"))
    print(f"\n{len(KINDS)} poison images among {IMAGES}: {dict(Counter(found.values()))}")
    print(f"{seconds['with']:.0f} s with them, {seconds['without']:.0f} s without")


def test_a_row_group_that_kills_the_task_costs_its_rows_and_no_others(
    photos: Callable[..., Path],
    tmp_path: Path,
    program: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A Parquet file of four row groups, two of which kill whatever unpacks them, beside images."""
    images: list[bytes | None] = [file.read_bytes() for file in sorted(photos(40).iterdir())]
    for number, kind in ((12, b"crash"), (31, b"memory")):
        images[number] = (images[number] or b"") + b"POISON-PAGE:" + kind
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.parquet").write_bytes(parquet(images, 10))
    for number, data in enumerate(images[:5]):
        (folder / f"{number}.jpg").write_bytes(data or b"")
    args = job_args(f"{folder}/*.parquet", tmp_path / "out", shard_size=20)
    args.insert(2, f"{folder}/*.jpg")
    done = program(*args, env={"PYTHONPATH": str(POISON)})
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for file in (tmp_path / "out/errors").iterdir():
        for row in pq.read_table(file).to_pylist():
            found[int(row["uri"].rpartition("#")[2])] = row["error_type"]
    # Five images and 15 rows are a shard, then rows 15 to 34, which reads the rest of the row group again.
    assert found == dict.fromkeys((12, 13, 14), "DECODER_CRASH") | dict.fromkeys((31, 32, 33, 34), "DECODE_MEMORY")
    assert verified(str(tmp_path / "out"), program)["predictions"] == 45 - len(found)


def test_an_image_that_kills_the_predictor_s_process_is_one_error_row(
    photos: Callable[..., Path],
    tmp_path: Path,
    program: Callable[..., subprocess.CompletedProcess[str]],
    attached: Callable[..., subprocess.CompletedProcess[str]],
    cluster: dict[str, str],
) -> None:
    folder = photos(120)
    files = sorted(folder.iterdir())
    deadly = {files[place].name for place in (5, 25, 70, 71)}
    for name in deadly:
        Image.new("RGB", (48, 32), "white").save(folder / name, "JPEG")
    predictor = ["--set", "predictor=predictors:DiesOfWhite", "--set", "inference.batch_size=16"]
    done = program(
        *job_args(folder, tmp_path / "out", shard_size=40), *predictor, "--address", cluster["address"],
        env={"PYTHONPATH": str(Path(__file__).parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = verified(str(tmp_path / "out"), attached)
    assert (report["predictions"], report["errors"]) == (116, 4)
    rows = [row for file in (tmp_path / "out/errors").iterdir() for row in pq.read_table(file).to_pylist()]
    assert {row["uri"].rpartition("/")[2] for row in rows} == deadly
    assert {(row["stage"], row["error_type"]) for row in rows} == {("infer", "PREDICTOR_CRASH")}
    assert not list((tmp_path / "out").glob("_begun/*"))
