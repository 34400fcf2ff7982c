"""The benchmark's own parts that measure nothing: its arithmetic, its images, and that contenders do the same work."""

import hashlib
import subprocess
import time
from pathlib import Path

import pytest

from tests.bench import figures, images
from tests.bench.figures import Run, Target
from tests.bench.reads import Reads
from tests.bench.report import markdown
from tests.bench.runner import Bench
from tests.bench.scenes import CONTENDERS, SCENES

# SHA-256 of the first dozen small images and of the first large one, one after the other.
_DIGEST = "15683bc59202b000f16df9ef1d17aff0803ece52647a34efc353f80d1e7f770c"


def _run(
    number: int,
    contender: str,
    steady: float | None,
    wall_s: float = 10,
    scene: str = "resnet18",
    worked: float | None = None,
) -> Run:
    return Run(number, scene, contender, wall_s, 4, steady, worked or steady, 100, 1.0)


def test_steady_rate_starts_after_a_quarter_of_the_rows_and_does_not_count_them() -> None:
    # 100 rows; the clock starts with the mark that brings 30 of them, and 70 come in the 7 s that follow.
    marks = [(0.0, 10), (5.0, 20), (8.0, 40), (12.0, 30)]
    assert figures.steady_rate(marks) == pytest.approx(70 / 7)


def test_steady_rate_is_none_where_there_is_nothing_to_divide() -> None:
    assert figures.steady_rate([]) is None
    assert figures.steady_rate([(1.0, 100)]) is None
    assert figures.steady_rate([(1.0, 50), (1.0, 50)]) is None


def test_marks_of_several_processes_are_put_in_order_of_time(tmp_path: Path) -> None:
    file = tmp_path / "marks"
    file.write_text("3.5 8\n1.25 8\n2.0 4\n")
    assert figures.read_marks(file) == [(1.25, 8), (2.0, 4), (3.5, 8)]
    assert figures.read_marks(tmp_path / "none") == []


def test_ratios_are_of_the_same_round_only() -> None:
    # Ours is twice as fast in each round; the machine was three times slower in the second, and a run is missing in the third.
    runs = [
        _run(1, "ours-float32", 60), _run(1, "daft", 30),
        _run(2, "daft", 10), _run(2, "ours-float32", 20),
        _run(3, "ours-float32", 100), _run(3, "daft", None),
        _run(1, "daft", 1, scene="mobilenet_v3_small"),
    ]  # fmt: skip
    assert figures.paired(runs, "resnet18", "steady", "ours-float32", "daft") == [2, 2]
    assert figures.paired(runs, "resnet18", "steady", "daft", "daft") == [1, 1]


def test_end_to_end_ratio_is_above_one_where_ours_takes_less_time() -> None:
    runs = [_run(1, "ours-auto", 1, wall_s=10), _run(1, "daft", 1, wall_s=25)]
    assert figures.paired(runs, "resnet18", "speed", "ours-auto", "daft") == [2.5]


def test_decoding_ahead_embellishes_the_steady_rate_and_not_the_rate_worked() -> None:
    # Read from second 0 on, everything decoded by second 9, then all predictions within a second.
    marks = [(9.0, 25), (9.5, 50), (10.0, 25)]
    assert figures.steady_rate(marks) == pytest.approx(75)
    assert figures.worked_rate(marks, 0.0) == pytest.approx(10)
    assert figures.worked_rate(marks, None) is None
    assert figures.worked_rate([], 0.0) is None


@pytest.mark.parametrize(
    ("steady", "worked", "verdict"),
    [(80, 10, "not settled"), (80, 60, "reached"), (40, 30, "missed"), (40, 60, "missed")],
)
def test_target_is_reached_only_by_work_that_is_all_in_the_time(steady: float, worked: float, verdict: str) -> None:
    runs = [_run(1, "ours-float32", steady, worked=worked), _run(1, "bound-float32", 50, worked=45)]
    (judgement,) = figures.judged(runs, [Target("resnet18", "steady", "ours-float32", "bound-float32", 0.9)])
    assert judgement.verdict == verdict
    assert judgement.safe is not None
    assert judgement.safe.median == pytest.approx(worked / 50)


def test_reads_are_seen_from_outside(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"x")
    before = time.monotonic()
    with Reads(tmp_path) as reads:
        (tmp_path / "a.jpg").read_bytes()
        time.sleep(0.2)
        between = time.monotonic()
        # Another process; and the first file once more, so that its first opening was only a look.
        subprocess.run(["cat", str(tmp_path / "b.jpg"), str(tmp_path / "a.jpg")], check=True, capture_output=True)  # noqa: S607
        time.sleep(0.2)
    assert reads.first is not None
    assert before < between < reads.first < time.monotonic()
    with Reads(tmp_path) as reads:
        pass
    assert reads.first is None


def test_spread_is_median_and_range() -> None:
    spread = figures.spread([3.0, None, 1.0, 2.0, 10.0])
    assert spread == figures.Spread(median=2.5, low=1.0, high=10.0, n=4)
    assert figures.spread([None]) is None


def test_report_says_which_targets_are_missed_and_what_failed(tmp_path: Path) -> None:
    bench = Bench(tmp_path, SCENES, ["ours-float32", "daft"])
    bench.failures.append("round 1, resnet18, article: exit code 1")
    runs = [_run(n, name, rate * n) for n in (1, 2, 3) for name, rate in (("ours-float32", 12), ("daft", 10))]
    targets = [
        Target("resnet18", "steady", "ours-float32", "daft", 1.25),
        Target("resnet18", "steady", "ours-float32", "daft", 1.2),
        Target("resnet18", "steady", "ours-float32", "article", 1.2),
    ]
    facts = dict.fromkeys(
        ("cores", "cpu", "memory_gib", "python", "torch", "torchvision", "ray", "daft", "numpy", "pillow", "commit"),
        "?",
    )
    text = markdown(bench, runs, targets, 3, facts)
    assert "| 1.25 | 1.20 | 1.20-1.20 | 1.20 | **missed** |" in text
    assert "| 1.2 | 1.20 | 1.20-1.20 | 1.20 | reached |" in text
    assert "| 1.2 | | | | not measured |" in text
    assert "- round 1, resnet18, article: exit code 1" in text
    assert (
        "| (d) Daft on its native runner | 20 (10-30) | 20 (10-30) | 4.0 (4.0-4.0) | 10.0 (10.0-10.0) | 1.20 (1.20-1.20) |"
        in text
    )


def test_targets_name_scenes_and_contenders_that_there_are() -> None:
    competing = {scene.name: set(scene.contenders) for scene in SCENES}
    for target in figures.TARGETS:
        assert {target.ours, target.other} <= competing[target.scene]
    assert set.union(*competing.values()) == {contender.name for contender in CONTENDERS}


def test_images_are_the_same_every_time() -> None:
    """If Pillow was upgraded and this fails, put in the new digest: figures of before and after are of different images."""
    data = b"".join(images.SMALL.encode(index) for index in range(12)) + images.LARGE.encode(0)
    assert hashlib.sha256(data).hexdigest() == _DIGEST, images.versions()


def test_images_are_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    digest = images.SMALL.make(3, folder, 1)
    first = folder / "000000.jpg"
    written = first.stat().st_mtime_ns
    assert images.SMALL.make(3, folder, 1) == digest
    assert first.stat().st_mtime_ns == written
    # Other recipes and other counts are other sets.
    assert images.SMALL.make(2, folder, 2) != digest
    assert sorted(path.name for path in folder.iterdir()) == ["000000.jpg", "000001.jpg"]
