"""The report: safe with untrusted texts, bounded in size, and made from incomplete outputs, too."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_inference.config import JobConfig, load_config
from batch_inference.driver.shard_writer import ShardWriter
from batch_inference.errors import UserError
from batch_inference.output.ledger import Ledger
from batch_inference.output.records import now
from batch_inference.report import build, failure_examples, page
from batch_inference.report import svg as report_svg
from batch_inference.report.build import make_report
from batch_inference.report.worker import ReportError, ReportTimeouts, make_in_subprocess
from batch_inference.storage.store import Store
from batch_inference.system import subprocesses
from batch_inference.text import mask_secrets
from tests.support import outputs
from tests.support.hostile import HOSTILE
from tests.support.prediction_tables import classified


class Tags(HTMLParser):
    """A parser that collects tags, attributes and texts of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(output: Path | str) -> tuple[Tags, str]:
    html = Path(output, "_report/report.html").read_text()
    tags = Tags()
    tags.feed(html)
    return tags, html


def config_of(output: Path | str, **section: Any) -> JobConfig:
    stored = Ledger(Store(str(output), outputs.CONFIG)).require_job().config
    return load_config(stored, {"output": {"uri": str(output)}, "report": section})


def hostile(folder: Path) -> Path:
    """Write an output in which every untrusted text is an attack."""
    ledger, _ = outputs.planned(str(folder), HOSTILE * 2, len(HOSTILE))
    for shard in range(2):
        rows = len(HOSTILE)
        writer = ShardWriter(ledger.store, "first", "zstd")
        good = 0 if shard else rows
        if good:
            writer.add(
                shard,
                pa.table(
                    {
                        "shard": pa.array([shard] * rows, pa.int32()),
                        "row": pa.array(range(rows), pa.int32()),
                        "label": pa.array(HOSTILE, pa.string()),
                        "confidence": pa.array([i / rows for i in range(rows)], pa.float32()),
                        "<b onclick=x>": pa.array([1.0] * rows),
                    }
                ),
            )
        bad = rows - good
        errors = pa.table(
            {
                "row": pa.array(range(bad), pa.int32()),
                "stage": pa.array(["infer"] * bad, pa.string()),
                "error_type": pa.array([f"<I>{i}</I>" for i in range(bad)], pa.string()),
                "message": pa.array([HOSTILE[i] for i in range(bad)], pa.string()),
                "retryable": pa.array([False] * bad, pa.bool_()),
            }
        )
        assert ledger.commit(writer.write(shard, errors))
    return folder


def test_untrusted_texts_are_escaped(tmp_path: Path) -> None:
    output = hostile(tmp_path / "o")
    made = make_report(str(output), config_of(output))
    tags, html = parsed(output)
    allowed = set(re.findall(r"<([a-z0-9]+)", (Path(page.__file__).parent / "templates/report.html").read_text()))
    assert set(tags.tags) <= allowed | {"g", "desc", "text", "svg", "title", "path", "rect", "wbr"}
    assert not {"script", "iframe", "object", "embed", "form", "base", "b", "i"} & set(tags.tags)
    for tag, name, value in tags.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("srcdoc", "xlink:href", "action", "srcset", "poster")
        if name == "href":
            assert value.startswith("#") or (tag, value) == ("link", "data:,")
        if name == "src":
            assert (tag, value[:23]) == ("img", "data:image/jpeg;base64,")
        if name == "style":
            assert re.fullmatch(r"(width:[\d.]+%|flex-grow:[\d.]+)", value), value
    assert "hunter2" not in html
    assert "deadbeef" not in html
    assert "\u202e" not in html
    assert "\x1b" not in html
    assert "49" not in "".join(t for t in tags.text if "7*7" in t)
    assert made.bytes < 300_000
    assert made.notes == ()


def test_page_loads_nothing(tmp_path: Path) -> None:
    outputs.finished(str(tmp_path), ["s3://b/a.jpg"], 10)
    make_report(str(tmp_path), config_of(tmp_path, thumbnails=0))
    html = parsed(tmp_path)[1]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in html
    assert "@import" not in html
    assert "url(" not in html
    assert "http://" not in html
    assert "https://" not in html


def test_images_are_read_and_shown(tmp_path: Path) -> None:
    from tests.support.images import jpeg

    (tmp_path / "photos").mkdir()
    files = [tmp_path / "photos" / f"{i}.jpg" for i in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(jpeg(number, (640, 480)) if number else b"no image")
    output = tmp_path / "o"
    ledger, _ = outputs.planned(str(output), [file.as_uri() for file in files], 6)
    outputs.commit_shard(ledger.store, 0)
    make_report(str(output), config_of(output))
    tags, html = parsed(output)
    images = [value for tag, name, value in tags.attributes if tag == "img" and name == "src"]
    assert len(images) == 5
    assert len(set(images)) == 5
    assert "no picture: UNKNOWN_FORMAT" in html
    make_report(str(output), config_of(output, thumbnails=0))
    assert "img" not in parsed(output)[0].tags
    assert "since report.thumbnails is 0" in parsed(output)[1]


def test_bombs_and_files_outside_of_the_allowed_prefixes_are_not_opened(tmp_path: Path) -> None:
    from batch_inference.cli.demo import _bomb

    (tmp_path / "bomb.png").write_bytes(_bomb(60_000, 60_000))
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/s.jpg").write_bytes(b"root:x:0:0")
    (tmp_path / "list.txt").write_text("x")
    output = tmp_path / "o"
    ledger = Ledger(Store(str(output), outputs.CONFIG))
    table = outputs.table_of([(tmp_path / "bomb.png").as_uri(), (tmp_path / "secret/s.jpg").as_uri()])
    job = outputs.job_of(table, 10)
    job.config["input"] = {
        "manifest": (tmp_path / "list.txt").as_uri(),
        "allowed_prefixes": [str(tmp_path / "bomb.png")],
    }
    ledger.complete_manifest(ledger.create_job(table, job, "first"))
    outputs.commit_shard(ledger.store, 0)
    # The configuration of the caller does not count.
    make_report(str(output), JobConfig())
    html = parsed(output)[1]
    assert "no picture: TOO_MANY_PIXELS" in html
    assert "no picture: NOT_ALLOWED" in html


def test_page_says_the_state_of_the_job(tmp_path: Path) -> None:
    ledger, _ = outputs.planned(str(tmp_path), [f"s3://b/{'bad' * (i % 4 == 0)}{i}.jpg" for i in range(30)], 10)
    config = config_of(tmp_path, thumbnails=0)
    assert make_report(str(tmp_path), config).state == "planned"
    outputs.commit_shard(ledger.store, 0)
    report = make_report(str(tmp_path), config)
    assert (report.state, report.rows, report.predictions, report.errors) == ("unfinished", 30, 7, 3)
    html = parsed(tmp_path)[1]
    assert "7 + 3 + 20 = 30: the counts add up." in html
    assert "Not finished: 33.3 % of the images are done" in html
    record = {"exit_code": 3, "verdict": "too many <failed>", "remedy": "fix & run"}
    ledger.store.put("_FAILED", json.dumps(record).encode())
    assert make_report(str(tmp_path), config).state == "failed"
    html = parsed(tmp_path)[1]
    assert "Failed (exit code 3)" in html
    assert "too many &lt;failed&gt;" in html
    assert "fix &amp; run" in html
    for shard in (1, 2):
        outputs.commit_shard(ledger.store, shard)
    commits = ledger.commits()
    job = ledger.require_job()
    ledger.finish(job, commits, outputs.totals_of(job, commits))
    assert make_report(str(tmp_path), config).state == "succeeded"
    html = parsed(tmp_path)[1]
    limit = "more than errors.max_percent = 5 (not enforced below errors.min_rows = 1,000 rows)"
    assert f"Succeeded with 26.7 % errors: 22 predictions and 8 errors, {limit}" in html
    assert "All 30 images are accounted for" in html
    assert "\N{CHECK MARK}" not in html


def test_broken_parts_are_noted_and_the_rest_is_shown(tmp_path: Path) -> None:
    store, commits, _ = classified(tmp_path, 3, 5)
    store.put(commits[0].files[0].path, b"rubbish")
    store.put("_FAILED", b"[1, 2]")
    store.put("_report/attempts/x.json", b"rubbish")
    report = make_report(str(tmp_path), config_of(tmp_path))
    assert report.rows == 15
    assert len(report.notes) == 1
    assert report.notes[0].startswith("the predictions cannot be read")
    assert "15 + 0 = 15" in parsed(tmp_path)[1]
    store.put("_commits/shard-00001.json", b"{}")
    assert "nothing is counted" in make_report(str(tmp_path), config_of(tmp_path)).notes[0]


def test_page_size_does_not_grow_with_the_job(tmp_path: Path) -> None:
    """The job has a thousand classes, a hundred types of errors, labels and messages of 10 kB, a configuration of a megabyte."""
    rows = 1500
    uris = [f"s3://b/{i}-{'x' * 900}.jpg" for i in range(rows)]
    ledger = Ledger(Store(str(tmp_path), outputs.CONFIG))
    table = outputs.table_of(uris)
    job = replace(outputs.job_of(table, rows), identity={f"k{i}": "v" * 500 for i in range(5000)})
    job.config["model"]["labels"] = ["label " * 20] * 10_000
    job = ledger.create_job(table, job, "first")
    ledger.complete_manifest(job)
    writer = ShardWriter(ledger.store, "first", "zstd")
    good = 1000
    writer.add(
        0,
        pa.table(
            {
                "shard": pa.array([0] * good, pa.int32()),
                "row": pa.array(range(good), pa.int32()),
                "label": pa.array([f"{i} {'y' * 10_000}" for i in range(good)], pa.string()),
                "confidence": pa.array([i / good for i in range(good)], pa.float32()),
                **{f"column {i} {'c' * 500}": pa.array([1.0] * good) for i in range(120)},
            }
        ),
    )
    bad = rows - good
    errors = pa.table(
        {
            "row": pa.array(range(good, rows), pa.int32()),
            "stage": pa.array(["infer"] * bad, pa.string()),
            "error_type": pa.array([f"KIND_{i % 120}_{'K' * 300}" for i in range(bad)], pa.string()),
            "message": pa.array(["m" * 10_000] * bad, pa.string()),
            "retryable": pa.array([False] * bad, pa.bool_()),
        }
    )
    assert ledger.commit(writer.write(0, errors))
    report = make_report(str(tmp_path), config_of(tmp_path, thumbnails=60), images_s=0.0)
    assert report.bytes < 1_000_000
    # 180 pictures of at most 12 kB, in base 64.
    assert report.bytes + 180 * 16_100 < 5_000_000


def test_thumbnail_size_is_bounded() -> None:
    import os

    from batch_inference.report.thumbnails import SIDE, encode_jpeg

    assert len(encode_jpeg(os.urandom(SIDE * SIDE * 3), SIDE)) < 16_100


def test_every_type_of_error_has_examples(tmp_path: Path) -> None:
    uris = [f"s3://b/{'bad' * (i % 2)}{i}.jpg" for i in range(40)]
    ledger, _ = outputs.finished(str(tmp_path), uris, 10)
    groups = failure_examples.group_failures(ledger.store, ledger.commits(), {"decode": {"TRUNCATED": 20}}, 7)
    assert [(k.stage, k.error_type, k.count, len(k.examples)) for k in groups] == [("decode", "TRUNCATED", 20, 7)]
    assert groups[0].examples[0].uri == "s3://b/bad1.jpg"
    other = failure_examples.FailureGroup("fetch", "TIMEOUT", 1, [replace(groups[0].examples[0], stage="fetch")])
    assert [failed.stage for failed in failure_examples.interleave([*groups, other], 4)] == [
        "decode",
        "fetch",
        "decode",
        "decode",
    ]


def test_secrets_in_arguments_are_not_shown() -> None:
    masked = mask_secrets(
        {
            "predictor": {"kwargs": {"api_key": "k1", "hf_token": "t1", "url": "https://u:p@h/x?sig=abc&a=1"}},
            "max_tokens": 5,
            "uris": ["s3://b/a?X-Amz-Credential=zz"],
        }
    )
    text = json.dumps(masked)
    for secret in ("k1", "t1", "u:p", "abc", "zz"):
        assert secret not in text
    assert masked["max_tokens"] == 5


def test_job_survives_a_failing_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patience = ReportTimeouts(600, 600, 600)
    with pytest.raises(ReportError, match="no job"):
        make_in_subprocess(str(tmp_path), JobConfig(), patience)
    outputs.finished(str(tmp_path), ["s3://b/a.jpg"], 10)
    config = config_of(tmp_path, thumbnails=0)
    assert make_in_subprocess(str(tmp_path), config, patience).endswith("_report/report.html")
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ReportError, match=r"not done after 0\.05 s"):
        make_in_subprocess(str(tmp_path), config, ReportTimeouts(5, 5, 0.05))
    monkeypatch.undo()
    monkeypatch.setattr(subprocesses, "_send", lambda connection, message: connection.send_bytes(b"rubbish"))
    with pytest.raises(ReportError, match="pickl"):
        make_in_subprocess(str(tmp_path), config, patience)
    monkeypatch.undo()
    # A process that dies says nothing; the report does not follow it.
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ReportError, match="ended with 1"):
        make_in_subprocess(str(tmp_path), config, patience)


def test_output_without_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no job"):
        make_report(str(tmp_path), JobConfig())


def test_cost_needs_a_price(tmp_path: Path) -> None:
    from batch_inference.output.attempts import AttemptRecord

    ledger, _ = outputs.finished(str(tmp_path), [f"s3://b/{i}.jpg" for i in range(10)], 10)
    stage_s = {"fetch": 1.0, "decode": 2.0, "infer": 1800.0, "driver": 1.0}
    AttemptRecord("a", "succeeded", now(), now(), now(), 7200.0, 7000.0, 10, 10, 0, stage_s, {}, 1, 1.0, 1.0).write(
        ledger.store
    )
    make_report(str(tmp_path), config_of(tmp_path, thumbnails=0))
    assert "set report.gpu_hour_price to see it" in parsed(tmp_path)[1]
    make_report(str(tmp_path), config_of(tmp_path, thumbnails=0, gpu_hour_price=2.5, currency="EUR"))
    html = parsed(tmp_path)[1]
    assert "5.00 EUR at 2.5 EUR per GPU-hour" in html
    assert "500,000.00 EUR" in html
    assert "0.5 (25.0 %)" in html


def test_charts_have_titles_and_descriptions() -> None:
    svg = str(
        report_svg.bar_chart("p", "A <title>", "a & b", [0.0, 3.0, 1.0], {0: "<0>", 3: "3"}, text=lambda v: f"{v:g}")
    )
    assert svg.count("<svg") == 2
    assert "A &lt;title&gt;" in svg
    assert "a &amp; b" in svg
    assert 'role="img"' in svg
    assert "<script" not in svg
    assert "<style" not in svg
    assert svg.count('class="rect') == 6
    assert report_svg.bar_chart("p", "t", "s", [], {}, text=str)
    assert report_svg.bar_chart("p", "t", "s", [0.0], {}, text=str)
    assert build.REPORT_PATH == "_report/report.html"


@pytest.mark.parametrize(("top", "last"), [(0.0, 1.0), (1e-9, 1e-9), (7.0, 8.0), (99.9, 100.0), (float("inf"), 1.0)])
def test_axes_end_at_round_numbers(top: float, last: float) -> None:
    steps = report_svg.axis_steps(top)
    assert steps[-1] == pytest.approx(last)
    assert 2 <= len(steps) <= 6
