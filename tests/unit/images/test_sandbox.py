from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_inference.config import InputConfig, PreprocessConfig, StorageConfig
from batch_inference.errors import InfrastructureError, RowError
from batch_inference.images import sandbox
from batch_inference.images.pixels import Pixels, pixels_of
from batch_inference.images.sandbox import HANG_FACTOR, SandboxedFunction, SandboxedGenerator, decode_limits
from batch_inference.images.transform import Transform
from batch_inference.images.watchdog import Watchdog
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.member_locations import locate_members
from batch_inference.inputs.parquet import RowSelection, RowValue, unpack_in_process
from batch_inference.inputs.reads import fetch_inputs
from batch_inference.pipeline import prepare
from batch_inference.pipeline.prepare import Preparation
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.read_ahead import Answer
from batch_inference.system.subprocesses import Limits
from tests.support.containers import parquet
from tests.support.images import encode, photo
from tests.support.waiting import wait_until

POISON = Path(__file__).parents[2] / "poison"
# The package under test, not the installed one.
POISONED = os.pathsep.join([str(POISON), str(Path(sandbox.__file__).parents[2])])
# Long enough to run out of memory; HURRIED is short, to run out of time. Both limit CPU time, so a busy machine does not matter.
CONFIG = PreprocessConfig(decode_timeout_s=30, decode_memory_mib=256)
HURRIED = CONFIG.model_copy(update={"decode_timeout_s": 1})
GOOD = encode(photo(), "JPEG")
TYPES = {"crash": "DECODER_CRASH", "abort": "DECODER_CRASH", "hang": "DECODE_TIMEOUT", "memory": "DECODE_MEMORY"}


def poison(kind: str) -> bytes:
    return GOOD + b"POISON:" + kind.encode()


def decoder(
    config: PreprocessConfig, transform: Transform | None, hang_s: float | None = None
) -> SandboxedFunction[bytes, Pixels]:
    return SandboxedFunction(partial(pixels_of, config=config, transform=transform), decode_limits(config, hang_s))


def unpacker() -> SandboxedGenerator[RowSelection, RowValue]:
    return SandboxedGenerator(unpack_in_process, decode_limits(CONFIG))


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> Iterator[SandboxedFunction[bytes, Pixels]]:
    monkeypatch.setenv("PYTHONPATH", POISONED)
    with decoder(CONFIG, Transform()) as sandboxed:
        yield sandboxed


def server_of(sandboxed: SandboxedFunction[Any, Any] | SandboxedGenerator[Any, Any]) -> int:
    """Return the process id of the helper process."""
    assert sandboxed._server is not None
    return sandboxed._server.pid


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_sandboxed_pixels_equal_those_of_this_process(decode: SandboxedFunction[bytes, Pixels]) -> None:
    assert np.array_equal(decode(GOOD).values, pixels_of(GOOD, CONFIG, Transform()).values)
    with decoder(CONFIG, None) as decode_unscaled:
        assert np.array_equal(decode_unscaled(GOOD).values, pixels_of(GOOD, CONFIG, None).values)


@pytest.mark.parametrize("kind", TYPES)
def test_image_that_kills_the_process_fails_only_its_own_row(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", POISONED)
    with decoder(HURRIED if kind == "hang" else CONFIG, Transform()) as decode:
        expected = decode(GOOD).values
        for _ in range(2):
            with pytest.raises(RowError) as caught:
                decode(poison(kind))
            assert (caught.value.error.stage, caught.value.error.error_type) == ("decode", TYPES[kind])
            assert np.array_equal(decode(GOOD).values, expected)


def test_decoder_that_waits_ends_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It uses no CPU time, so that plenty is left."""
    monkeypatch.setenv("PYTHONPATH", POISONED)
    with decoder(CONFIG, Transform(), hang_s=2) as decode:
        expected = decode(GOOD)
        with pytest.raises(RowError, match=r"decoding the image hangs: it did not end within 2 s, in which") as caught:
            decode(poison("sleep"))
        assert caught.value.error.error_type == "DECODE_TIMEOUT"
        assert np.array_equal(decode(GOOD).values, expected.values)


def test_decoder_that_is_kept_from_the_cpu_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Like on a busy node, the process is stopped for longer than its limit and has used hardly any CPU time."""
    monkeypatch.setenv("PYTHONPATH", POISONED)
    config = CONFIG.model_copy(update={"decode_timeout_s": 0.5})
    with decoder(config, Transform(), hang_s=60) as decode:
        decode(GOOD)
        (child,) = children_of(server_of(decode))
        os.kill(child, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (child, signal.SIGCONT)).start()
        decode(GOOD)
        os.kill(child, signal.SIGSTOP)
        threading.Timer(1.5, os.kill, (child, signal.SIGCONT)).start()
        with pytest.raises(RowError) as caught:
            decode(poison("memory"))
        assert caught.value.error.error_type == "DECODE_MEMORY"


def test_clock_limit_is_ten_times_the_cpu_limit_by_default() -> None:
    config = PreprocessConfig(decode_timeout_s=120, decode_memory_mib=256)
    assert decode_limits(config) == Limits(120, 1200, 256)
    assert decode_limits(config, 7) == Limits(120, 7, 256)
    assert f"{HANG_FACTOR} times as many" in str(PreprocessConfig.model_fields["decode_timeout_s"].description)


def test_watchdog_does_not_count_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow store is not a decoder that hangs; for the sandbox, tests of subprocesses look at its timers."""
    uris, where = members(tmp_path, [GOOD] * 4)
    watchdogs: list[Watchdog] = []

    class Recorded(Watchdog):
        def __init__(self, limits: Limits) -> None:
            super().__init__(limits)
            watchdogs.append(self)

    monkeypatch.setattr(prepare, "Watchdog", Recorded)
    watched: dict[str, list[bool]] = {"fetching": [], "unpacking": []}
    real = RowSelection._value

    def value(self: RowSelection, number: int, value: pa.Scalar) -> RowValue:
        watched["unpacking"].append(bool(watchdogs[0]._starts))
        return real(self, number, value)

    monkeypatch.setattr(RowSelection, "_value", value)
    with contextlib.ExitStack() as stack:
        _, unpack = Preparation(StorageConfig(), CONFIG, None)._in_process(stack)

        def unpack_from_store(pages: RowSelection, take: Callable[[], Answer]) -> Iterator[RowValue]:
            def fetch() -> Answer:
                watched["fetching"].append(bool(watchdogs[0]._starts))
                return take()

            return unpack(pages, fetch)

        rows = list(fetch_inputs(plan_reads(uris, where, Fetcher(StorageConfig()), 10**6, None, unpack_from_store), 1))
        assert [(one.error, one.data) for one in rows] == [(None, GOOD)] * 4
        assert not watchdogs[0]._starts
    assert watched == {"fetching": [False], "unpacking": [True] * 4}


def test_ordinary_failures_are_the_same_in_the_sandbox(decode: SandboxedFunction[bytes, Pixels]) -> None:
    for data, kind in ((b"", "EMPTY_FILE"), (b"text", "UNKNOWN_FORMAT"), (GOOD[:600], "TRUNCATED")):
        with pytest.raises(RowError) as caught:
            decode(data)
        assert caught.value.error.error_type == kind


def test_image_larger_than_the_memory_fails_only_its_own_row(decode: SandboxedFunction[bytes, Pixels]) -> None:
    """Not poison, only large: 90 million pixels in 256 MiB."""
    large = encode(photo().resize((9500, 9500)), "PNG")
    with pytest.raises(RowError) as caught:
        decode(large)
    assert caught.value.error.error_type == "DECODE_MEMORY"
    assert decode(GOOD).values.shape == (224, 224, 3)


def test_sandbox_that_ends_at_its_start_fails_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The attempt can be retried; otherwise every image of the shard would be a failed row for good."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (tmp_path / "0.jpg").write_bytes(GOOD)
    with pytest.raises(InfrastructureError, match="ended by itself, with code 1") as caught:
        list(Preparation(StorageConfig(), CONFIG, Transform()).rows(0, [f"file://{tmp_path}/0.jpg"], careful=True))
    assert "resumes" in caught.value.remedy


def test_no_process_stays_behind(decode: SandboxedFunction[bytes, Pixels]) -> None:
    decode(GOOD)
    server = server_of(decode)
    children = children_of(server)
    assert children
    decode.__exit__()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in [server, *children]))


def test_careful_preparation_of_a_shard_fails_only_poison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Write a Parquet file of four rows a row group; return the URIs of its rows and their locations."""
    (folder / "a.parquet").write_bytes(parquet(images, 4, **options))
    uris = [f"file://{folder}/a.parquet#{number}" for number in range(len(images))]
    found, _ = locate_members(pa.chunked_array([uris]), InputConfig(), StorageConfig())
    assert found is not None
    return uris, found


def prepared(uris: list[str], where: pa.Table, config: PreprocessConfig = CONFIG) -> pa.Table:
    return pa.concat_tables(Preparation(StorageConfig(), config, Transform()).rows(0, uris, where, careful=True))


@pytest.mark.parametrize("struct", [True, False])
def test_sandboxed_row_groups_equal_those_of_this_process(struct: bool, tmp_path: Path) -> None:
    images = [None if number == 5 else GOOD + bytes([number]) * number for number in range(10)]
    uris, where = members(tmp_path, images, struct=struct)
    # Some rows, one of them twice.
    chosen = [9, 1, 5, 7, 1]
    with unpacker() as sandboxed:
        for unpack in (sandboxed, unpack_in_process):
            asked = [uris[number] for number in chosen]
            found = list(
                fetch_inputs(plan_reads(asked, where.take(chosen), Fetcher(StorageConfig()), 10**6, None, unpack), 2)
            )
            assert {chosen[one.row]: one.data for one in found} == {n: images[n] or b"" for n in chosen}
            assert [chosen[one.row] for one in found if one.error] == [5]
            assert len(found) == len(chosen)


@pytest.mark.parametrize("kind", TYPES)
def test_row_group_that_kills_the_process_fails_its_rows_from_there(
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


def test_pages_that_unpack_to_more_than_the_memory_fail_their_row_group(tmp_path: Path) -> None:
    # A dictionary of one value, 8 MiB that are packed into a few bytes, to which every row refers.
    bomb: list[bytes | None] = [bytes(8 << 20)] * 50
    uris, where = members(tmp_path, [GOOD, GOOD, GOOD, GOOD])
    (tmp_path / "bomb.parquet").write_bytes(
        parquet(bomb, 50, compression="zstd", use_dictionary=True, dictionary_pagesize_limit=1 << 30)
    )
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    more = [f"file://{tmp_path}/bomb.parquet#{number}" for number in range(50)]
    there, _ = locate_members(pa.chunked_array([more]), InputConfig(), StorageConfig())
    assert there is not None
    table = prepared(more + uris, pa.concat_tables([there, where], promote_options="permissive"))
    assert table["error_type"].to_pylist() == ["DECODE_MEMORY"] * 50 + [None] * 4
    assert "its pages unpack to more memory than there is" in table["message"][5].as_py()


def test_page_that_leaves_no_memory_does_not_fail_the_next_row_group(
    tmp_path: Path,
) -> None:
    """Bytes of the file are still on their way to the process when it fails."""
    noise = [os.urandom(3 << 20) for _ in range(24)]
    (tmp_path / "large.parquet").write_bytes(parquet(list(noise), 24, use_dictionary=False, data_page_size=1 << 30))
    uris, where = members(tmp_path, [GOOD] * 4)
    more = [f"file://{tmp_path}/large.parquet#{number}" for number in range(24)]
    there, _ = locate_members(pa.chunked_array([more]), InputConfig(), StorageConfig())
    assert there is not None
    for mib in (60, 72, 80, 96):
        config = CONFIG.model_copy(update={"decode_memory_mib": mib})
        table = prepared(more + uris, pa.concat_tables([there, where], promote_options="permissive"), config)
        assert set(table["error_type"][:24].to_pylist()) <= {"DECODE_MEMORY", "UNKNOWN_FORMAT"}
        assert table["error_type"][24:].to_pylist() == [None] * 4


def test_sandbox_that_cannot_be_started_fails_the_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uris, where = members(tmp_path, [GOOD] * 4)

    def full(*args: object, **kwargs: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", full)
    with pytest.raises(InfrastructureError, match=r"cannot be started: .*temporarily unavailable"):
        prepared(uris, where)
    with pytest.raises(InfrastructureError, match="cannot be started"), decoder(CONFIG, None) as decode:
        decode(GOOD)


def test_process_killed_between_two_row_groups_fails_neither(tmp_path: Path) -> None:
    uris, where = members(tmp_path, [GOOD] * 8)
    found = []
    with unpacker() as unpack:
        for one in fetch_inputs(plan_reads(uris, where, Fetcher(StorageConfig()), 10**6, None, unpack), 1):
            found.append(one.error)
            if one.row == 3:
                # The first row group is finished before the next one begins.
                killed = children_of(server_of(unpack))
        assert found == [None] * 8
        (child,) = children_of(server_of(unpack))
        assert child in killed
        os.kill(child, signal.SIGKILL)
        again = fetch_inputs(plan_reads(uris, where, Fetcher(StorageConfig()), 10**6, None, unpack), 1)
        assert [one.error for one in again] == [None] * 8


@pytest.mark.parametrize("cpus", [1, 2])
def test_task_that_unpacks_forever_ends_itself(cpus: int, tmp_path: Path) -> None:
    uris, _ = members(tmp_path, [GOOD, GOOD + b"POISON-PAGE:hang"])
    assert "unpack" in stderr_of_process_that_ended_itself(cpus, f"rows(0, {uris!r}, places({uris!r}))")


@pytest.mark.parametrize("cpus", [1, 2])
def test_task_that_decodes_forever_ends_itself(cpus: int, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(poison("hang"))
    assert "pixels_of" in stderr_of_process_that_ended_itself(cpus, f"rows(0, ['file://{tmp_path}/0.jpg'])")


@pytest.mark.parametrize("cpus", [1, 2])
def test_task_that_waits_forever_ends_itself_by_the_clock(cpus: int, tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(poison("sleep"))
    said = stderr_of_process_that_ended_itself(
        cpus,
        f"rows(0, ['file://{tmp_path}/0.jpg'])",
        limit_s=30,
        hang_s=2,
        reason="decoding hangs: it did not end within 2 s",
    )
    assert "pixels_of" in said


def test_watchdog_counts_the_cpu_time_of_each_thread() -> None:
    """Threads that wait use none; a thread that computes uses its own, regardless of the others."""
    code = (
        "import threading, time\n"
        "from batch_inference.images.watchdog import Watchdog\n"
        "from batch_inference.system.subprocesses import Limits\n"
        "watch = Watchdog(Limits(0.5, 60, 256))\n"
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
    done = run_python(code)
    assert done.stdout == "still here\n"
    assert done.returncode == 1
    assert "decoding did not end within 0.5 s of CPU time" in done.stderr


def stderr_of_process_that_ended_itself(
    cpus: int,
    call: str,
    limit_s: float = 1,
    hang_s: float = 600,
    reason: str = "decoding did not end within 1 s of CPU time",
) -> str:
    """Return stderr of a process that prepares a shard in which something hangs."""
    done = run_python(
        "from batch_inference.config import *; from batch_inference.pipeline.prepare import Preparation\n"
        "from batch_inference.inputs import member_locations; import pyarrow as pa\n"
        "places = lambda uris: member_locations.locate_members(pa.chunked_array([uris]), InputConfig(), StorageConfig())[0]\n"
        f"config = PreprocessConfig(decode_timeout_s={limit_s}, cpus_per_task={cpus})\n"
        f"list(Preparation(StorageConfig(), config, None, hang_s={hang_s}).{call})"
    )
    assert done.returncode == 1
    assert reason in done.stderr
    assert "swallow" in done.stderr  # the traceback says where
    return done.stderr


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": POISONED},
        capture_output=True,
        text=True,
        check=False,
    )
