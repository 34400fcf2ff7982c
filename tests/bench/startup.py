"""From the command to the first committed shard, beside what ``ray.init()`` and importing torch take by themselves.

One after the other, each as a process of its own, as often as asked: the demo's network (EfficientNet-Lite0 with its real
weights) on one small shard of its photos. Run: python -m tests.bench.startup --rounds 5
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from batch_inference.cli.demo import demo_config, make_photos

RAY = "import ray; ray.init('local', include_dashboard=False, log_to_driver=False)"
TORCH = "import torch"
ENVIRONMENT = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}


def until_ready(code: str) -> float:
    """Seconds until a Python process has run ``code``; its end does not count."""
    begun = time.perf_counter()
    command = [sys.executable, "-c", f"{code}; print(flush=True)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    assert process.stdout is not None
    process.stdout.readline()
    seconds = time.perf_counter() - begun
    process.wait()
    return seconds


def job(config: Path, output: Path) -> tuple[float, float]:
    """Seconds until the first commit, and until the program has ended."""
    program = str(Path(sys.executable).with_name("batch-inference"))
    command = [program, "run", "--config", str(config), "--output", str(output), "--dashboard-host", "none", "--quiet"]
    first = None
    begun = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    while process.poll() is None:
        if first is None and next((output / "_commits").glob("*.json"), None):
            first = time.perf_counter() - begun
        time.sleep(0.01)
    if process.returncode or first is None:
        raise SystemExit(f"the job ended with exit code {process.returncode}")
    return first, time.perf_counter() - begun


def main() -> None:
    """Prints each round, and the median with its range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    beyond = []
    with tempfile.TemporaryDirectory() as folder:
        photos, config = Path(folder, "photos"), Path(folder, "job.yaml")
        make_photos(photos)
        for broken in photos.glob("broken-*"):
            broken.unlink()
        config.write_text(demo_config(photos, Path(folder, "out")).to_yaml())
        for i in range(rounds):
            ray, torch = until_ready(RAY), until_ready(TORCH)
            first, total = job(config, Path(folder, f"out-{i}"))
            beyond.append(first - ray - torch)
            print(
                f"ray.init() {ray:.2f} s, torch {torch:.2f} s; first commit {first:.2f} s, end {total:.2f} s; beyond {beyond[-1]:+.2f} s",
                flush=True,
            )
    print(f"beyond: median {statistics.median(beyond):+.2f} s, {min(beyond):+.2f} to {max(beyond):+.2f}")


if __name__ == "__main__":
    main()
