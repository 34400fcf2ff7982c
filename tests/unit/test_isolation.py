from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_inference import isolation
from batch_inference.config import InputConfig, PreprocessConfig, StorageConfig
from batch_inference.containers import places
from batch_inference.decoding import pixels_of
from batch_inference.errors import RowFailure, SystemFault
from batch_inference.fetcher import Fetcher
from batch_inference.isolation import Helper
from batch_inference.members import runs
from batch_inference.parquet_files import unpacked
from batch_inference.preparation import Preparation
from batch_inference.runs import fetched
from batch_inference.transform import Transform
from tests.unit.containers import parquet
from tests.unit.test_images import encode, photo

POISON = Path(__file__).parents[1] / "poison"
# The package that is tested here, and not the one that is installed.
POISONED = os.pathsep.join([str(POISON), str(Path(isolation.__file__).parents[1])])
# Long enough to run out of memory in; where the time is to run out, it is short. Both are CPU time, on a busy machine as well.
CONFIG = PreprocessConfig(decode_timeout_s=30, decode_memory_mib=256)
HURRIED = CONFIG.model_copy(update={"decode_timeout_s": 1})
GOOD = encode(photo(), "JPEG")
TYPES = {"crash": "DECODER_CRASH", "abort": "DECODER_CRASH", "hang": "DECODE_TIMEOUT", "memory": "DECODE_MEMORY"}


def poison(kind: str) -> bytes:
    return GOOD + b"POISON:" + kind.encode()


@pytest.fixture
def helper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Helper]:
    monkeypatch.setenv("PYTHONPATH", POISONED)
    with Helper(CONFIG, Transform()) as one:
        yield one


def test_pixels_are_those_of_this_process(helper: Helper) -> None:
    assert np.array_equal(helper.pixels(GOOD).values, pixels_of(GOOD, CONFIG, Transform()).values)
    with Helper(CONFIG, None) as whole:
        assert np.array_equal(whole.pixels(GOOD).values, pixels_of(GOOD, CONFIG, None).values)


@pytest.mark.parametrize("kind", TYPES)
def test_what_kills_the_process_is_the_row_s_failure_and_no_other_s(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", POISONED)
    with Helper(HURRIED if kind == "hang" else CONFIG, Transform()) as helper:
        expected = helper.pixels(GOOD).values
        for _ in range(2):
            with pytest.raises(RowFailure) as caught:
                helper.pixels(poison(kind))
            assert (caught.value.error.stage, caught.value.error.error_type) == ("decode", TYPES[kind])
            assert np.array_equal(helper.pixels(GOOD).values, expected)


def test_a_decoder_that_waits_ends_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses no CPU time, of which there is plenty left."""
    monkeypatch.setenv("PYTHONPATH", POISONED)
    with Helper(CONFIG, Transform(), hang_s=2) as helper:
        expected = helper.pixels(GOOD)
        with pytest.raises(
            RowFailure, match=r"decoding the image hangs: it did not end within 2 s, in which"
        ) as caught:
            helper.pixels(poison("sleep"))
        assert caught.value.error.error_type == "DECODE_TIMEOUT"
        assert np.array_equal(helper.pixels(GOOD).values, expected.values)


def test_a_decoder_that_is_kept_from_the_cpu_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy node, as far as it goes: the process is stopped for longer than its time, which then has hardly begun."""
    monkeypatch.setenv("PYTHONPATH", POISONED)
    config = CONFIG.model_copy(update={"decode_timeout_s": 0.5})
    with Helper(config, Transform(), hang_s=60) as helper:
        helper.pixels(GOOD)
        assert helper._process is not None
        (child,) = Path(f"/proc/{helper._process.pid}/task/{helper._process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (int(child), signal.SIGCONT)).start()
        helper.pixels(GOOD)
        os.kill(int(child), signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (int(child), signal.SIGCONT)).start()
        with pytest.raises(RowFailure) as caught:
            helper.pixels(poison("memory"))
        assert caught.value.error.error_type == "DECODE_MEMORY"


def test_by_default_the_clock_leaves_ten_times_as_much() -> None:
    assert isolation._Limits.of(120, None) == isolation._Limits(120, 1200)
    assert isolation._Limits.of(120, 7) == isolation._Limits(120, 7)
    assert f"{isolation.HANG_FACTOR} times as many" in str(
        PreprocessConfig.model_fields["decode_timeout_s"].description
    )


def test_the_clocks_stand_still_while_bytes_are_fetched(tmp_path: Path) -> None:
    """A store that is slow is no decoder that hangs; neither here nor in a process of its own."""
    uris, where = members(tmp_path, [GOOD] * 4)

    waited: list[float] = []

    def slowly(unpack: Any) -> Any:
        def call(pages: Any, take: Any) -> Any:
            def later() -> Any:
                time.sleep(1.5)
                waited.append(1.5)
                return take()

            return unpack(pages, later)

        return call

    with contextlib.ExitStack() as stack:
        hurried = Preparation(StorageConfig(), CONFIG, None, hang_s=0.5)
        for unpack in (hurried._here(stack)[1], hurried._alone(stack)[1]):
            before = len(waited)
            found = list(fetched(runs(uris, where, Fetcher(StorageConfig()), 10**6, None, slowly(unpack)), 1))
            assert [(one.error, one.data) for one in found] == [(None, GOOD)] * 4
            assert len(waited) > before


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
    assert helper.pixels(GOOD).values.shape == (224, 224, 3)


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
    monkeypatch.setenv("PYTHONPATH", POISONED)
    uris = []
    for number, data in enumerate([GOOD, poison("crash"), GOOD, b"", poison("memory"), GOOD]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        uris.append(f"file://{tmp_path}/{number}.jpg")
    (table,) = Preparation(StorageConfig(), CONFIG, Transform()).rows(0, uris, careful=True)
    assert table["error_type"].to_pylist() == [None, "DECODER_CRASH", None, "EMPTY_FILE", "DECODE_MEMORY", None]
    assert table["pixels"].is_valid().to_pylist() == [True, False, True, False, False, True]


# --- Parquet files ---


def members(folder: Path, images: list[bytes | None], **options: Any) -> tuple[list[str], pa.Table]:
    """Rows of a Parquet file, four in a row group, and where they lie."""
    (folder / "a.parquet").write_bytes(parquet(images, 4, **options))
    uris = [f"file://{folder}/a.parquet#{number}" for number in range(len(images))]
    found, _ = places(pa.chunked_array([uris]), InputConfig(), StorageConfig())
    assert found is not None
    return uris, found


def prepared(uris: list[str], where: pa.Table, config: PreprocessConfig = CONFIG) -> pa.Table:
    return pa.concat_tables(Preparation(StorageConfig(), config, Transform()).rows(0, uris, where, careful=True))


@pytest.mark.parametrize("struct", [True, False])
def test_row_groups_unpacked_with_care_have_what_they_have_without(struct: bool, tmp_path: Path) -> None:
    images = [None if number == 5 else GOOD + bytes([number]) * number for number in range(10)]
    uris, where = members(tmp_path, images, struct=struct)
    # Some of them, one of them twice.
    chosen = [9, 1, 5, 7, 1]
    with Helper(CONFIG, None) as helper:
        for unpack in (helper.unpack, unpacked):
            asked = [uris[number] for number in chosen]
            found = list(fetched(runs(asked, where.take(chosen), Fetcher(StorageConfig()), 10**6, None, unpack), 2))
            assert {chosen[one.row]: one.data for one in found} == {n: images[n] or b"" for n in chosen}
            assert [chosen[one.row] for one in found if one.error] == [5]
            assert len(found) == len(chosen)


@pytest.mark.parametrize("kind", TYPES)
def test_a_row_group_that_kills_the_process_costs_its_rows_from_there_and_no_others(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", POISONED)
    images: list[bytes | None] = [GOOD] * 12
    images[6] = GOOD + b"POISON-PAGE:" + kind.encode()
    (tmp_path / "b.jpg").write_bytes(poison("crash"))
    uris, where = members(tmp_path, images)
    # A value that kills is the first of its batch where images are small; those before it in the row group are out already.
    alone = pa.table({name: pa.nulls(1, where.schema.field(name).type) for name in where.column_names})
    table = prepared(
        [*uris, f"file://{tmp_path}/b.jpg"], pa.concat_tables([where, alone]), HURRIED if kind == "hang" else CONFIG
    )
    assert table["row"].to_pylist() == list(range(13))
    types = [None] * 6 + [TYPES[kind]] * 2 + [None] * 4 + ["DECODER_CRASH"]
    assert table["error_type"].to_pylist() == types
    assert set(table["stage"].to_pylist()) == {None, "decode"}
    messages = table["message"].to_pylist()
    assert messages[6].startswith(f"row group 1 of file://{tmp_path}/a.parquet: ")
    assert messages[12] == "the process that decoded the image alone died: SIGSEGV"


def test_pages_that_unpack_to_more_than_the_memory_cost_their_row_group(tmp_path: Path) -> None:
    # A dictionary of one value, 8 MiB that are packed into a few bytes, to which every row refers.
    bomb: list[bytes | None] = [bytes(8 << 20)] * 50
    uris, where = members(tmp_path, [GOOD, GOOD, GOOD, GOOD])
    (tmp_path / "bomb.parquet").write_bytes(
        parquet(bomb, 50, compression="zstd", use_dictionary=True, dictionary_pagesize_limit=1 << 30)
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    more = [f"file://{tmp_path}/bomb.parquet#{number}" for number in range(50)]
    there, _ = places(pa.chunked_array([more]), InputConfig(), StorageConfig())
    assert there is not None
    table = prepared(more + uris, pa.concat_tables([there, where], promote_options="permissive"))
    assert table["error_type"].to_pylist() == ["DECODE_MEMORY"] * 50 + [None] * 4
    assert "its pages unpack to more memory than there is" in table["message"][5].as_py()


def test_a_page_that_leaves_no_memory_to_take_the_next_bytes_does_not_cost_the_row_group_after_it(
    tmp_path: Path,
) -> None:
    """The file's own bytes are then still on their way to the process when it fails."""
    noise = [os.urandom(3 << 20) for _ in range(24)]
    (tmp_path / "large.parquet").write_bytes(parquet(list(noise), 24, use_dictionary=False, data_page_size=1 << 30))
    uris, where = members(tmp_path, [GOOD] * 4)
    more = [f"file://{tmp_path}/large.parquet#{number}" for number in range(24)]
    there, _ = places(pa.chunked_array([more]), InputConfig(), StorageConfig())
    assert there is not None
    for mib in (60, 72, 80, 96):
        config = CONFIG.model_copy(update={"decode_memory_mib": mib})
        table = prepared(more + uris, pa.concat_tables([there, where], promote_options="permissive"), config)
        assert set(table["error_type"][:24].to_pylist()) <= {"DECODE_MEMORY", "UNKNOWN_FORMAT"}
        assert table["error_type"][24:].to_pylist() == [None] * 4


def test_a_helper_that_cannot_be_started_is_no_fault_of_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uris, where = members(tmp_path, [GOOD] * 4)

    def full(*args: object, **kwargs: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(isolation.subprocess, "Popen", full)
    with pytest.raises(SystemFault, match=r"cannot be started: .*temporarily unavailable"):
        prepared(uris, where)
    with pytest.raises(SystemFault, match="cannot be started"), Helper(CONFIG, None) as helper:
        helper.pixels(GOOD)


def test_a_process_that_is_killed_between_two_row_groups_costs_neither(tmp_path: Path) -> None:
    uris, where = members(tmp_path, [GOOD] * 8)
    found = []
    with Helper(CONFIG, None) as helper:
        for one in fetched(runs(uris, where, Fetcher(StorageConfig()), 10**6, None, helper.unpack), 1):
            found.append(one.error)
            if one.row == 3:
                assert helper._process is not None
                parent = helper._process.pid
                # The first row group is told to be done before the next one begins.
                killed = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        assert found == [None] * 8
        helper.pixels(GOOD)
        (child,) = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        assert child in killed
        os.kill(child, signal.SIGKILL)
        again = fetched(runs(uris, where, Fetcher(StorageConfig()), 10**6, None, helper.unpack), 1)
        assert [one.error for one in again] == [None] * 8


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_task_that_unpacks_for_ever_ends_itself(cpus: int, tmp_path: Path) -> None:
    uris, _ = members(tmp_path, [GOOD, GOOD + b"POISON-PAGE:hang"])
    assert "unpack" in ended_of_itself(cpus, f"rows(0, {uris!r}, places({uris!r}))")


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_task_that_hangs_ends_itself(cpus: int, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(poison("hang"))
    assert "pixels_of" in ended_of_itself(cpus, f"rows(0, ['file://{tmp_path}/0.jpg'])")


@pytest.mark.parametrize("cpus", [1, 2])
def test_a_task_that_waits_for_ever_ends_itself_by_the_clock(cpus: int, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(poison("sleep"))
    said = ended_of_itself(
        cpus,
        f"rows(0, ['file://{tmp_path}/0.jpg'])",
        limit_s=30,
        hang_s=2,
        reason="decoding hangs: it did not end within 2 s",
    )
    assert "pixels_of" in said


def test_a_watch_counts_the_cpu_time_of_each_thread_and_not_the_clock() -> None:
    """Threads that wait use none; one that computes uses its own, whatever the others do."""
    code = (
        "import threading, time\n"
        "from batch_inference.isolation import Watch\n"
        "watch = Watch(0.5, 60)\n"
        "def slow():\n"
        "    with watch: time.sleep(2)\n"
        "threads = [threading.Thread(target=slow) for _ in range(4)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "begun = time.thread_time()\n"
        "while time.thread_time() - begun < 2: pass\n"  # nothing is being decoded
        "print('still here', flush=True)\n"
        "def busy():\n"
        "    with watch:\n"
        "        while True: pass\n"
        "threading.Thread(target=busy).start(); slow(); slow(); time.sleep(60)\n"
    )
    done = in_a_process(code)
    assert done.stdout == "still here\n"
    assert done.returncode == 1
    assert "decoding did not end within 0.5 s of CPU time" in done.stderr


def ended_of_itself(
    cpus: int,
    call: str,
    limit_s: float = 1,
    hang_s: float | None = None,
    reason: str = "decoding did not end within 1 s of CPU time",
) -> str:
    """What a process that prepares a shard, in which something hangs, leaves on stderr."""
    done = in_a_process(
        "from batch_inference.config import *; from batch_inference.preparation import Preparation\n"
        "from batch_inference import containers; import pyarrow as pa\n"
        "places = lambda uris: containers.places(pa.chunked_array([uris]), InputConfig(), StorageConfig())[0]\n"
        f"config = PreprocessConfig(decode_timeout_s={limit_s}, cpus_per_task={cpus})\n"
        f"list(Preparation(StorageConfig(), config, None, hang_s={hang_s}).{call})"
    )
    assert done.returncode == 1
    assert reason in done.stderr
    assert "swallow" in done.stderr  # the traceback says where
    return done.stderr


def in_a_process(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": POISONED},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
