"""What a predictor class does wrong is told with the place in its file, and costs no other image its row."""

from __future__ import annotations

import importlib
import json
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from batch_inference.config import JobConfig, PredictorConfig, StorageConfig, load_config
from batch_inference.driver.collector import ERROR_COLUMNS, Collector
from batch_inference.driver.shard_writer import ERRORS_SCHEMA, ShardWriter
from batch_inference.errors import RowError, UserError
from batch_inference.output.ledger import Ledger
from batch_inference.output.tally import Tally
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.engine import resolve_engine
from batch_inference.pipeline.factories import CustomFactory
from batch_inference.pipeline.result_rows import notes
from batch_inference.pipeline.schemas import RESULT_SCHEMA, raise_if_fatal
from batch_inference.report.failure_examples import group_failures
from batch_inference.storage.store import Store
from batch_inference.telemetry.tracebacks import (
    MAX_CHARACTERS,
    describe_exception,
    format_traceback,
    last_frame,
    with_traceback,
)
from tests.support.batches import errors, image, prepared
from tests.support.outputs import job_of, table_of

MISMATCH = ("postprocess", "OUTPUT_MISMATCH")
CLASSES = """
import os, sys
import numpy as np


def first(batch):
    return [int(i[0, 0, 0]) for i in batch["image"]]


def lookup(batch):
    table = {}
    return {"x": [table["pixels"] for _ in batch["image"]]}


class Key:
    def __call__(self, batch):
        return lookup(batch)


class Path:
    def __call__(self, batch):
        return {"p": list(batch["path"])}


class Caused:
    def __call__(self, batch):
        try:
            return lookup(batch)
        except KeyError as exc:
            raise ValueError("no such table") from exc


class Deep:
    def __call__(self, batch):
        return self(batch)


class Odd:
    def __call__(self, batch):
        if any(n % 2 for n in first(batch)):
            raise ValueError("an odd one" + "!" * 3000)
        return {"x": first(batch)}


class Exits:
    how = staticmethod(lambda: sys.exit(3))

    def __call__(self, batch):
        if 1 in first(batch):
            self.how()
        return {"x": first(batch)}


class Interrupts(Exits):
    def how(self):
        raise KeyboardInterrupt


class Closes(Exits):
    def how(self):
        raise GeneratorExit("closed")


class Panic(BaseException):  # as packages written in Rust raise
    pass


class Panics(Exits):
    def how(self):
        raise Panic("index out of bounds")


class CannotStart:
    def __init__(self):
        self.weights = open("/there/are/no/weights.bin")

    def __call__(self, batch):
        return {}


class ExitsAtStart:
    def __init__(self):
        sys.exit("no licence")

    def __call__(self, batch):
        return {}


class Old:
    def predict_batch(self, images):
        return images


class Nothing:
    pass


def predict(batch, scale=1):
    return {"x": [n * scale for n in first(batch)]}


def make(scale):
    return lambda batch: predict(batch, scale)


made = make(5)
number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "faulty_classes.py").write_text(CLASSES)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    linecache.clearcache()
    yield importlib.import_module("faulty_classes")
    sys.modules.pop("faulty_classes", None)


def line_of(text: str) -> int:
    return 1 + CLASSES.splitlines().index(next(line for line in CLASSES.splitlines() if text in line))


def actor_of(found: Any, **options: Any) -> InferenceActor:
    return InferenceActor(CustomFactory(found, PredictorConfig(path="m:P", **options)), [])


def rows(mine: InferenceActor, numbers: range) -> pa.Table:
    table = mine(prepared([image(number) for number in numbers]))
    raise_if_fatal(table)
    return table


# --- tracebacks ------------------------------------------------------------------------------------------------------------


def test_row_keeps_where_the_class_raised(module: Any) -> None:
    table = rows(actor_of(module.Key), range(2))
    assert errors(table) == [("infer", "PREDICTOR_ERROR")] * 2
    assert table["message"].to_pylist() == ["KeyError: 'pixels'"] * 2
    text = table["traceback"][0].as_py()
    here = line_of('table["pixels"]')
    assert text.startswith("Traceback (most recent call last):\n")
    assert (
        f'faulty_classes.py", line {line_of("return lookup(batch)")}, in __call__\n    return lookup(batch)\n' in text
    )
    assert f'faulty_classes.py", line {here}, in ' in text
    assert text.endswith("KeyError: 'pixels'")
    assert "batch_inference" not in text
    assert last_frame(text) == f"{module.__file__}:{here}"
    assert with_traceback("the fact", text).splitlines()[:2] == ["the fact", text.splitlines()[1]]
    assert "Traceback" not in with_traceback("the fact", text)


def test_key_that_a_batch_lacks_says_which_it_has(module: Any) -> None:
    table = rows(actor_of(module.Path), range(1))
    assert "a batch has the keys 'image' and 'uri', not 'path'" in table["message"][0].as_py()
    assert last_frame(table["traceback"][0].as_py()) == f"{module.__file__}:{line_of('path')}"


def test_causes_are_told_and_length_is_bounded(module: Any) -> None:
    text = rows(actor_of(module.Caused), range(1))["traceback"][0].as_py()
    assert "KeyError: 'pixels'\n\nThe above exception was the direct cause" in text
    assert text.endswith("ValueError: no such table")
    assert "batch_inference" not in text
    for found in (module.Deep, module.Odd):
        text = rows(actor_of(found), range(1, 2))["traceback"][0].as_py()
        assert len(text) <= MAX_CHARACTERS
        assert last_frame(text)
    assert "RecursionError" in rows(actor_of(module.Deep), range(1))["message"][0].as_py()


def test_traceback_is_in_failed_rows_only(module: Any) -> None:
    table = rows(actor_of(module.Odd), range(6))
    assert [text is not None for text in table["traceback"].to_pylist()] == [False, True] * 3
    assert table["x"].to_pylist() == [0, None, 2, None, 4, None]
    good = rows(actor_of(module.predict), range(6))
    assert good["traceback"].null_count == 6
    mismatch = rows(actor_of(lambda: lambda batch: None), range(2))
    assert (errors(mismatch), mismatch["traceback"].null_count) == ([MISMATCH] * 2, 2)


def test_exception_without_frames_of_the_class_is_one_line() -> None:
    def raised() -> str:
        try:
            raise ValueError("x")
        except ValueError as exc:
            exc.__traceback__ = None
            return format_traceback(exc)

    assert raised() == "ValueError: x"
    assert with_traceback("fact", raised()) == "fact"
    assert with_traceback("fact", None) == "fact"
    assert (last_frame(None), last_frame(raised())) == ("", "")


def test_job_that_ends_since_everything_failed_says_where(module: Any) -> None:
    table = rows(actor_of(module.Key), range(4)).select(RESULT_SCHEMA.names)
    collector = Collector({7: 4}, Tally())
    assert collector.add(table) == []
    with pytest.raises(UserError) as caught:
        collector.finish()
    fact, *lines = caught.value.message.splitlines()
    assert fact == "every image that could be read failed at infer with PREDICTOR_ERROR: KeyError: 'pixels'"
    assert lines[0].startswith(f'  File "{module.__file__}", line ')
    assert "Traceback" not in caught.value.message
    assert "batch-inference preflight" in caught.value.remedy


def test_traceback_is_in_errors_table_and_report_once_for_each_line(module: Any, tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"), StorageConfig())
    ledger = Ledger(store)
    uris = [f"s3://b/{number}.jpg" for number in range(4)]
    ledger.complete_manifest(ledger.create_job(table_of(uris), job_of(table_of(uris), 4), "one"))
    failed = rows(actor_of(module.Key), range(4))
    writer = ShardWriter(store, "one", "zstd")
    assert ledger.commit(writer.write(0, failed.select(list(ERROR_COLUMNS))))
    commits = ledger.commits()
    written = pa.parquet.read_table(tmp_path / "out" / commits[0].files[0].path)
    assert written.schema.names[: len(ERRORS_SCHEMA)] == ERRORS_SCHEMA.names
    assert written["traceback"].to_pylist() == failed["traceback"].to_pylist()
    (kind,) = group_failures(store, commits, commits[0].errors_by, 3)
    assert [one.traceback for one in kind.examples] == failed["traceback"].to_pylist()[:3]
    from batch_inference.report.sections import _with_tracebacks

    assert [bool(trace) for _, trace in _with_tracebacks(kind.examples)] == [True, False, False]


def test_errors_of_an_earlier_version_are_read_without_tracebacks(tmp_path: Path) -> None:
    store = Store(str(tmp_path), StorageConfig())
    ledger = Ledger(store)
    uris = table_of(["s3://b/0.jpg"])
    ledger.complete_manifest(ledger.create_job(uris, job_of(uris, 1), "one"))
    old = [name for name in ERROR_COLUMNS if name != "traceback"]
    table = pa.table([pa.array([0], pa.int32()), ["infer"], ["PREDICTOR_ERROR"], ["it failed"], [False]], names=old)
    commit = ShardWriter(store, "one", "zstd").write(0, table)
    path = tmp_path / commit.files[0].path
    pa.parquet.write_table(pa.parquet.read_table(path).drop_columns(["traceback"]), path)
    (kind,) = group_failures(store, [commit], commit.errors_by, 3)
    assert kind.examples[0].traceback is None


# --- ends of the process ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Exits", "the predictor calls sys.exit (SystemExit: 3)"),
        ("Interrupts", "the predictor raised KeyboardInterrupt"),
        ("Closes", "the predictor raised GeneratorExit: closed"),
        ("Panics", "Panic: index out of bounds"),
    ],
)
def test_class_that_ends_its_process_fails_on_its_image_alone(module: Any, name: str, said: str) -> None:
    table = rows(actor_of(getattr(module, name)), range(4))
    assert errors(table) == [None, ("infer", "PREDICTOR_ERROR"), None, None]
    assert table["x"].to_pylist() == [0, None, 2, 3]
    assert table["message"][1].as_py() == said
    assert 'faulty_classes.py", line ' in table["traceback"][1].as_py()


def test_exception_that_cannot_be_printed_costs_its_image_only() -> None:
    class Unprintable(Exception):  # noqa: N818
        def __init__(self, needed: str) -> None:
            super().__init__()

        def __str__(self) -> str:
            raise KeyError

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if any(i[0, 0, 0] == 1 for i in batch["image"]):
            raise Unprintable("x")
        return {"x": [1] * len(batch["image"])}

    table = rows(actor_of(lambda: call), range(3))
    assert table["message"].to_pylist() == [None, "Unprintable", None]
    assert last_frame(table["traceback"][1].as_py())


def test_names_of_exceptions_say_what_happened() -> None:
    assert describe_exception(SystemExit()) == "the predictor calls sys.exit (SystemExit)"
    assert describe_exception(ValueError("x")) == "ValueError: x"


@pytest.mark.parametrize(
    ("name", "said", "line"),
    [
        ("CannotStart", "FileNotFoundError: [Errno 2] No such file", "weights.bin"),
        ("ExitsAtStart", "the predictor calls sys.exit (SystemExit: no licence)", "no licence"),
    ],
)
def test_constructor_that_fails_ends_the_job_with_the_place(module: Any, name: str, said: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        rows(actor_of(getattr(module, name)), range(1))
    fact, *lines = caught.value.message.splitlines()
    assert fact.startswith(f"predictor m:P could not be constructed: {said}")
    assert lines[0] == f'  File "{module.__file__}", line {line_of(line)}, in __init__'
    assert "predictor.kwargs.path=" in caught.value.remedy


# --- counts ----------------------------------------------------------------------------------------------------------------


def test_images_are_predicted_alone_for_good_after_a_mismatch() -> None:
    seen: list[int] = []

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        seen.append(len(batch["image"]))
        return {"x": [int(i[0, 0, 0]) for i in batch["image"] if i[0, 0, 0] != 3]}  # leaves one out

    mine = actor_of(lambda: call, depends_on_batch=True)
    table = rows(mine, range(6))
    assert errors(table) == [None, None, None, MISMATCH, None, None]
    assert table["x"].to_pylist() == [0, 1, 2, None, 4, 5]
    assert table["message"][3].as_py().startswith("the predictor's column 'x' has 0 values for 1 images")
    assert seen == [6] + [1] * 6
    (note,) = notes(table)
    assert note.startswith(
        "from now on an actor predicts each image alone, which is slow: in a batch of 6, the predictor's column 'x' has 5 values"
    )
    # A batch whose number would be right is not asked for any more.
    assert rows(mine, range(10, 14))["x"].to_pylist() == [10, 11, 12, 13]
    assert seen[7:] == [1] * 4


def test_half_with_the_right_count_is_no_proof() -> None:
    """Three values, whatever there is: of a batch of 12, quarters would agree."""
    table = rows(actor_of(lambda: lambda batch: {"x": [1, 2, 3]}), range(12))
    assert errors(table) == [MISMATCH] * 12
    with pytest.raises(UserError, match=r"is chance: its column 'x' has 3 for 0\.jpg alone"):
        rows(actor_of(lambda: lambda batch: {"x": [1, 2, 3]}), range(3))


def test_halves_of_a_batch_that_raised_are_not_trusted_either_after_a_mismatch() -> None:
    """Images 0 and 1 together have two values, of which both are image 1's; image 3 raises, image 2 has none."""
    counts = {0: 0, 1: 2, 2: 0, 3: 1}

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        numbers = [int(i[0, 0, 0]) for i in batch["image"]]
        if 3 in numbers:
            raise ValueError("three")
        return {"x": [n for n in numbers for _ in range(counts[n])]}

    table = rows(actor_of(lambda: call, depends_on_batch=True), range(4))
    assert errors(table) == [MISMATCH, MISMATCH, MISMATCH, ("infer", "PREDICTOR_ERROR")]


def test_several_values_of_one_image_beside_one_of_others_end_the_job() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        return {"box": [int(i[0, 0, 0]) for i in batch["image"] for _ in range(2 if i[0, 0, 0] == 3 else 1)]}

    with pytest.raises(UserError) as caught:
        rows(actor_of(lambda: call), range(6))
    assert "alone, s3://b/3.jpg: the predictor's column 'box' has 2 values for 1 images" in caught.value.message
    assert '{"boxes": [[…], [], […]]}' in caught.value.remedy
    # Also where it comes later, and alone in its batch.
    mine = actor_of(lambda: call)
    rows(mine, range(3))
    with pytest.raises(UserError, match="cannot be told apart"):
        rows(mine, range(3, 4))


def test_one_image_that_gives_a_number_without_an_axis_costs_the_others_nothing() -> None:
    """squeeze() in a batch of one, such as the last one of a shard."""
    import torch

    def call(batch: dict[str, Any]) -> dict[str, Any]:
        return {"x": torch.tensor([[float(i[0, 0, 0])] for i in batch["image"]]).squeeze()}

    mine = actor_of(lambda: call)
    assert errors(rows(mine, range(4))) == [None] * 4
    assert errors(rows(mine, range(4, 5))) == [MISMATCH]
    assert rows(mine, range(5, 9))["x"].to_pylist() == [5.0, 6.0, 7.0, 8.0]


def test_failure_of_the_classs_own_kind_is_halved_as_before() -> None:
    def call(batch: dict[str, Any]) -> dict[str, Any]:
        if any(i[0, 0, 0] == 2 for i in batch["image"]):
            raise RowError("preprocess", "TOO_SMALL", "no face")
        return {"x": [int(i[0, 0, 0]) for i in batch["image"]]}

    table = rows(actor_of(lambda: call), range(5))
    assert errors(table) == [None, None, ("preprocess", "TOO_SMALL"), None, None]


def test_column_of_the_input_ends_the_job_in_the_first_batch() -> None:
    mine = InferenceActor(
        CustomFactory(lambda: lambda b: {"mean": [1] * len(b["image"])}, PredictorConfig(path="m:P"), ("mean",)), []
    )
    with pytest.raises(UserError, match="the predictor's column 'mean' and the manifest's have the same name"):
        rows(mine, range(3))


# --- what may stand for a class --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "scale"),
    [
        ("predict", {}, 1),
        ("predict", {"kwargs": {"scale": 3}}, 3),
        ("make", {"args": [2]}, 2),
        ("made", {}, 5),
    ],
)
def test_function_is_a_predictor_or_makes_one(module: Any, name: str, options: dict[str, Any], scale: int) -> None:
    config = JobConfig.model_validate({"predictor": {"path": f"faulty_classes:{name}", **options}})
    mine = InferenceActor(resolve_engine(config).with_passthrough(["id"]).factory, [])
    assert rows(mine, range(3))["x"].to_pylist() == [0, scale, 2 * scale]


def test_file_stands_for_its_module(module: Any) -> None:
    assert load_config(settings=["predictor=faulty_classes.py:Odd"]).predictor == PredictorConfig(
        path="faulty_classes:Odd"
    )
    for value, said in (
        ("./faulty.py:Odd", "such as faulty:Odd, with PYTHONPATH=. before the command"),
        ("/a/b/faulty.py:Odd", "such as faulty:Odd, with PYTHONPATH=/a/b before the command"),
        ("faulty_classes.Odd", "such as faulty_classes:Odd"),
        ("a.b.Odd", "such as a.b:Odd"),
        ("faulty", "such as my_module:MyPredictor"),
        ("my-file:Odd", "such as my_module:MyPredictor"),
    ):
        with pytest.raises(UserError) as caught:
            load_config(settings=[f"predictor={value}"])
        assert f"'{value}' is not of the form module:Class, {said}" in caught.value.message


def engine(path: str) -> Callable[[], Any]:
    return lambda: resolve_engine(JobConfig.model_validate({"predictor": path}))


def test_class_that_cannot_be_called_is_refused_before_ray(module: Any) -> None:
    with pytest.raises(UserError, match="predictor faulty_classes:Old has no __call__") as caught:
        engine("faulty_classes:Old")()
    assert caught.value.remedy == "Give it __call__(self, batch) -> dict of columns, such as the lines above."
    lines = caught.value.message.splitlines()
    assert len(lines) == 7
    written = "class Fixed(Old):\n" + "\n".join(lines[1:])
    exec(compile(written, "fixed", "exec"), vars(module))  # noqa: S102 - the lines that the remedy shows run
    assert len(rows(actor_of(module.Fixed), range(2))["traceback"]) == 2
    with pytest.raises(UserError, match="has no __call__") as caught:
        engine("faulty_classes:Nothing")()
    assert caught.value.remedy == "Give it __call__(self, batch) -> dict of columns."
    for name in ("number", "np"):
        with pytest.raises(
            UserError, match=f"predictor faulty_classes:{name} is one .*, neither a class nor a function"
        ):
            engine(f"faulty_classes:{name}")()


def test_module_that_exits_at_import_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_script.py").write_text(
        "import argparse\nx = 1\nargparse.ArgumentParser().parse_args(['--no'])\nclass P: ...\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"importing a_script failed: the predictor calls sys\.exit \(SystemExit: 2\)"
    ) as caught:
        engine("a_script:P")()
    assert f'File "{tmp_path}/a_script.py", line 3' in caught.value.message
    assert "__main__" in caught.value.remedy


def test_package_that_a_module_needs_is_named_with_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import os\nimport not_there.part\nclass P: ...\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs_more imports 'not_there', which is not installed") as caught:
        engine("needs_more:P")()
    assert f'File "{tmp_path}/needs_more.py", line 2' in caught.value.message
    assert "`pip install not_there`" in caught.value.remedy
    assert "needs_more.py" not in caught.value.remedy


def test_network_itself_is_sent_to_model_source_package() -> None:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)

    with pytest.raises(UserError, match=r"m:P is a torch\.nn\.Module, and its forward does not take a batch") as caught:
        rows(actor_of(Net), range(2))
    assert "model.source=package" in caught.value.remedy
    assert f'File "{__file__}"' in caught.value.message

    class Fine(Net):
        def forward(self, batch: Any) -> Any:
            if 3 in [int(i[0, 0, 0]) for i in batch["image"]]:
                raise ValueError("three")
            return {"x": torch.tensor([float(i.mean()) for i in batch["image"]])}

    mine = actor_of(Fine)
    assert errors(rows(mine, range(3))) == [None] * 3
    assert errors(rows(mine, range(2, 5))) == [None, ("infer", "PREDICTOR_ERROR"), None]


def test_end_of_a_job_keeps_its_lines() -> None:
    from batch_inference.pipeline.schemas import end_of_job

    end = end_of_job(UserError("fact\n  File", "remedy"))
    assert json.loads(end["message"][0].as_py()) == ["UserError", "fact\n  File", "remedy"]
    with pytest.raises(UserError) as caught:
        raise_if_fatal(end)
    assert caught.value.message == "fact\n  File"
