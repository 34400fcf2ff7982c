from __future__ import annotations

from dataclasses import replace

import pytest

from batch_inference.pipeline.bottleneck import RunTimings, find_bottleneck

# A minute of four GPU actors, eight decoding CPUs and 128 fetching threads in which nobody did anything.
IDLE = RunTimings(60, 0, 0, 0, 4, 1, on_gpu=True, decode_cpus=8, fetch_threads=128, cpus=12)
CPU = replace(IDLE, on_gpu=False)


@pytest.mark.parametrize(
    ("timings", "limit", "words"),
    [
        (replace(IDLE, infer_s=235), "inference", ["98 %", "4 GPU actors", "inference.actors with their GPUs"]),
        (replace(CPU, infer_s=235), "inference", ["98 %", "raise inference.actors (there are 12 CPUs)"]),
        (replace(CPU, infer_s=235, cpus=2), "inference", ["98 %", "the actors have all 2 CPUs", "smaller network"]),
        (replace(CPU, infer_s=58, actors=1), "inference", ["the actor was busy 97 %"]),
        (replace(IDLE, infer_s=91, decode_s=460), "decode", ["busy 38 % of the time", "96 % of its 8 CPUs", "cpuWorkers.replicas"]),
        (replace(IDLE, infer_s=91, decode_s=60, fetch_s=7000), "fetch", ["38 %", "91 % of 128", "storage.fetch_concurrency"]),
        # A full store queue also where decoding is busy: the busier part is named by what waits for what.
        (replace(IDLE, infer_s=91, decode_s=400, fetch_s=7000), "decode", ["83 %"]),
        (replace(IDLE, infer_s=91, driver_s=55), "driver", ["the driver 92 %", "shard_size"]),
        (replace(IDLE, infer_s=91, driver_s=55, commit_s=50), "commit", ["83 % of the time", "output's store"]),
        # The driver's time is no limit where the actors have no time left either.
        (replace(IDLE, infer_s=235, driver_s=55), "inference", ["98 %"]),
        (replace(CPU, actors=1, cpus=2, decode_cpus=1, infer_s=48, decode_s=58), "cpu", ["88 % of 2 CPUs"]),
        (replace(CPU, actors=1, cpus=2, decode_cpus=1, infer_s=20, decode_s=100), "decode", ["100 % of its 1 CPUs"]),
        (replace(IDLE, infer_s=50, decode_s=100, fetch_s=100), "idle", ["decoding 21 %", "fetching 1 %"]),
        (replace(IDLE, working_s=1.0, infer_s=4), "unknown", ["too short"]),
        (replace(IDLE, fetch_threads=0, decode_cpus=0), "idle", ["0 %"]),
    ],
)  # fmt: skip
def test_sentence_names_the_limit_and_the_setting(timings: RunTimings, limit: str, words: list[str]) -> None:
    bottleneck = find_bottleneck(timings)
    assert bottleneck.limit == limit
    for word in words:
        assert word in bottleneck.sentence, bottleneck.sentence
    assert bottleneck.sentence.endswith(".")
    assert bottleneck.sentence.count("\n") == 0


def test_shares_stay_between_0_and_1() -> None:
    bottleneck = find_bottleneck(replace(IDLE, infer_s=1e6, decode_s=1e6, fetch_s=1e6, driver_s=1e6))
    assert (bottleneck.actors_busy, bottleneck.decode_busy, bottleneck.fetch_busy, bottleneck.driver_busy) == (
        1,
        1,
        1,
        1,
    )
