"""The parent of the driver: it adds a verdict where there is none, and changes nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import batch_inference
from batch_inference.cli import app
from batch_inference.config import StorageConfig
from batch_inference.driver import supervision
from batch_inference.driver.lost import record_lost_driver
from batch_inference.driver.supervision import Ending, is_needed
from batch_inference.errors import InfrastructureError
from batch_inference.output.ledger import Ledger
from batch_inference.output.status import status
from batch_inference.storage.store import Store
from tests.support.outputs import commit_shard, planned
from tests.support.waiting import wait_until

JOB = str(Path(batch_inference.__file__).parents[1])
# A parent and a driver; the test says what the driver does.
PROGRAM = """
import json, os, signal, sys, time
from batch_inference.driver import supervision

def explain(ending):
    print("EXPLAINED", ending.code, json.dumps(ending.facts), flush=True)
    return 5

supervision.supervised(explain)
print("driver", os.getpid(), flush=True)
{driver}
"""


def start(driver: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(driver=driver)],
        env=os.environ | {"PYTHONPATH": JOB},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


def driver_of(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    word, pid = process.stdout.readline().split()
    assert word == "driver"
    assert int(pid) != process.pid
    return int(pid)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    # Not `communicate`, which does not see what was read ahead.
    assert process.stdout is not None
    with process.stdout:
        said = process.stdout.read()
    return process.wait(), said


def state_of(pid: int) -> str:
    """Return the letter that Linux has for a process's state; Z where it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def has_ended(pid: int) -> bool:
    return state_of(pid) == "Z"


@pytest.mark.parametrize(
    ("driver", "code", "ending"),
    [
        # As Ray's native code does, past everything of Python's.
        ("supervision.tell_parent(output='o'); os._exit(1)", 5, 'EXPLAINED 1 {"output": "o"}'),
        ("supervision.tell_parent(output='o'); supervision.tell_parent(attempt='a'); os._exit(0)", 5, '{"output": "o", "attempt": "a"}'),
        ("os.abort()", 5, f"EXPLAINED -{int(signal.SIGABRT)} {{}}"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 5, f"EXPLAINED -{int(signal.SIGKILL)} {{}}"),
        # After a verdict its exit code counts, whatever happens then.
        ("supervision.tell_parent(exit_code=3); sys.exit(3)", 3, ""),
        ("supervision.tell_parent(exit_code=0); os._exit(1)", 0, ""),
        ("supervision.tell_parent(exit_code=2); os.abort()", 2, ""),
    ],
)  # fmt: skip
def test_end_of_a_driver_becomes_an_exit_code(driver: str, code: int, ending: str) -> None:
    process = start(driver)
    driver_of(process)
    exit_code, said = ended(process)
    assert (exit_code, ending in said) == (code, True), said
    assert ("EXPLAINED" in said) == bool(ending)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_driver(number: signal.Signals) -> None:
    answers = (
        "heard = []\n"
        f"signal.signal({int(number)}, lambda *_: heard.append(1))\n"
        "print('ready', flush=True)\n"
        "while not heard: time.sleep(0.02)\n"
        "supervision.tell_parent(exit_code=130); sys.exit(130)"
    )
    process = start(answers)
    driver_of(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert ended(process) == (130, "")


def test_driver_without_a_handler_yet_ends_by_the_signal() -> None:
    process = start("time.sleep(600)")
    driver = driver_of(process)
    process.terminate()
    assert ended(process) == (-signal.SIGTERM, "")
    assert has_ended(driver)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root and unshare")
def test_first_process_of_a_container_ends_with_the_code_of_the_signal(tmp_path: Path) -> None:
    """Signals without a handler do not end it."""
    script = tmp_path / "driver.py"
    script.write_text(PROGRAM.format(driver="time.sleep(600)"))
    in_a_container = ["unshare", "--fork", "--pid", "--mount-proc", sys.executable, str(script)]
    process = subprocess.Popen(
        in_a_container,
        env=os.environ | {"PYTHONPATH": JOB},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    word = process.stdout.readline()
    if not word.startswith("driver "):
        pytest.skip(f"no namespaces here: {word}")
    (first,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)
    assert ended(process) == (128 + signal.SIGTERM, "")


def test_driver_that_another_process_terminates_has_no_verdict() -> None:
    process = start("time.sleep(600)")
    os.kill(driver_of(process), signal.SIGTERM)
    assert ended(process) == (5, f"EXPLAINED -{int(signal.SIGTERM)} {{}}\n")


def test_driver_does_not_outlive_its_parent() -> None:
    process = start("time.sleep(600)")
    driver = driver_of(process)
    process.kill()
    process.communicate()
    wait_until(lambda: has_ended(driver))


def test_driver_that_is_stopped_and_continued_is_waited_for() -> None:
    process = start("sys.stdin.read(); supervision.tell_parent(exit_code=0)", stdin=subprocess.PIPE)
    driver = driver_of(process)
    os.kill(driver, signal.SIGSTOP)
    wait_until(lambda: state_of(driver) == "T")
    time.sleep(0.3)  # for a parent that takes this for the end
    assert process.poll() is None
    os.kill(driver, signal.SIGCONT)
    assert process.stdin is not None
    process.stdin.close()
    assert ended(process) == (0, "")


def test_process_left_behind_does_not_hold_the_parent_up() -> None:
    left_behind = "if os.fork() == 0: sys.stdin.read(); os._exit(0)\n"
    process = start(left_behind + "supervision.tell_parent(exit_code=0); os._exit(0)", stdin=subprocess.PIPE)
    assert process.wait() == 0
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()  # only now the one left behind ends
    assert process.stdout.read().startswith("driver ")
    process.stdout.close()


def test_driver_is_waited_for_where_sigchld_was_ignored() -> None:
    process = start(
        "supervision.tell_parent(exit_code=4)", preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    )  # as nohup-like launchers leave it
    driver_of(process)
    assert ended(process) == (4, "")


@pytest.mark.parametrize(
    ("argv", "environment", "needed"),
    [
        (["run", "photos/", "--output", "out/"], {}, True),
        (["retry", "out/"], {}, True),
        (["demo"], {}, True),
        (["preflight", "photos/"], {}, True),
        (["plan", "photos/"], {}, False),
        (["verify", "out/"], {}, False),
        ([], {}, False),
        (["run", "photos/", "--address", "auto"], {}, False),
        (["run", "photos/", "--address=ray://head:10001"], {}, False),
        (["run", "photos/"], {"RAY_ADDRESS": "10.0.0.1:6379"}, False),
    ],
)
def test_commands_that_start_ray_have_a_parent(argv: list[str], environment: dict[str, str], needed: bool) -> None:
    assert is_needed(argv, environment) is needed


def test_driver_without_a_parent_tells_nothing() -> None:
    assert supervision._parent is None
    supervision.tell_parent(exit_code=1)


def test_driver_goes_on_alone_without_a_process_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    supervision.supervised(lambda ending: 5)
    assert not supervision.is_supervised()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def facts(output: str) -> dict[str, Any]:
    return {
        "output": output,
        "storage": StorageConfig().model_dump(mode="json"),
        "attempt": "abcd1234",
        "started": time.monotonic(),
    }


def lost(tmp_path: Path) -> str:
    """Plan an output of three shards, commit one, and return its folder."""
    output = str(tmp_path / "out")
    ledger, _ = planned(output, [f"s3://b/{'bad-' * (i == 1)}{i}.jpg" for i in range(6)], 2)
    commit_shard(ledger.store, 0)
    return output


def test_parent_gives_the_verdict_of_a_lost_driver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = lost(tmp_path)
    monkeypatch.setattr(sys, "argv", ["batch-inference", "run"])
    assert app._driver_is_gone(Ending(1, facts(output))) == 5
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("FAILED (exit 5): the driver's process ended with exit code 1 and without a verdict")
    assert "the raylet or the GCS" in lines[0]
    assert lines[1] == "rows: 2 of 6 came back, 1 of 3 shards are committed and stay"
    assert "it resumes" in lines[3]
    record = json.loads(Path(output, "_FAILED").read_text())
    assert (record["exit_code"], record["attempt"]) == (5, "abcd1234")
    assert record["verdict"] in lines[0]
    assert status(output).verdict == record["verdict"]
    assert json.loads(Path(output, "_report/summary.json").read_text())["state"] == "FAILED"
    assert Path(output, "_report/report.html").exists()


def test_verdict_of_a_lost_driver_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["batch-inference", "run", "--json"])
    assert app._driver_is_gone(Ending(-9, facts(lost(tmp_path)))) == 5
    said = capsys.readouterr()
    verdict = json.loads(said.out)
    assert (verdict["state"], verdict["exit_code"]) == ("FAILED", 5)
    assert "was ended by SIGKILL" in verdict["verdict"]
    assert "memory" in verdict["verdict"]
    assert said.err == ""


def test_verdict_needs_no_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["batch-inference", "run"])
    assert app._driver_is_gone(Ending(-11, facts(str(tmp_path / "nothing")))) == 5
    assert "rows: none; nothing was started" in capsys.readouterr().out
    assert not (tmp_path / "nothing").exists()
    assert app._driver_is_gone(Ending(1)) == 5
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 2)
    assert "error: the driver's process ended with exit code 1" in said.err


def test_parent_whose_modules_are_gone_gives_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package that is upgraded during a job of days may not fit the modules that are loaded."""
    monkeypatch.setattr(sys, "argv", ["batch-inference", "run"])
    monkeypatch.setitem(sys.modules, "batch_inference.cli.tables", None)
    assert app._driver_is_gone(Ending(1, facts(lost(tmp_path)))) == 5
    assert "error: the driver's process ended with exit code 1" in capsys.readouterr().err


def test_job_that_was_done_stays_done(tmp_path: Path) -> None:
    output = lost(tmp_path)
    ledger = Ledger(Store(output, StorageConfig()))
    ledger.store.put("_SUCCESS", b"{}")
    record_lost_driver(facts(output), InfrastructureError("x", "y"))
    assert not Path(output, "_FAILED").exists()
