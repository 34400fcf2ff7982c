"""What an actor's journal has, by the rows of a table."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batch_inference.config import StorageConfig
from batch_inference.errors import InfrastructureError
from batch_inference.models.batch_size import PADDING_ROW
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.crash_guard import CrashGuard, JournalConfig
from batch_inference.pipeline.result_rows import result_table
from batch_inference.pipeline.schemas import raise_if_fatal
from batch_inference.storage.store import Store
from tests.support.batches import errors, image, prepared


class Journal:
    """A journal in memory, with the crashes of earlier processes."""

    def __init__(self, crashes: dict[str, int] | None = None, fatal: int = 0) -> None:
        self.crashes = crashes or {}
        self.fatal = fatal
        self.steps: list[str] = []

    def crash_count(self, step: str) -> int:
        return self.crashes.get(step, 0)

    def begin(self, step: str) -> None:
        self.steps.append(step)

    def succeeded(self) -> None:
        self.steps.append("done")


def predict(table: pa.Table) -> tuple[pa.Table, pa.Table | None]:
    good = table.filter(table["error_type"].is_null())
    values = pa.table({"value": good["row"]}) if good.num_rows else None
    return result_table(table, {}, np.zeros(table.num_rows, np.float32)), values


def guard(journal: Any, **options: Any) -> CrashGuard:
    return CrashGuard(journal, predict, **options)


def with_rows(table: pa.Table, rows: list[int]) -> pa.Table:
    index = table.column_names.index("row")
    return table.set_column(index, table.schema.field(index), pa.array(rows, table.schema.field(index).type))


def test_batch_is_recorded_until_it_is_done() -> None:
    journal = Journal()
    result, values = guard(journal).predict(prepared([image(1), image(2)]))
    assert result.num_rows == 2 and values is not None and values["value"].to_pylist() == [0, 1]
    assert journal.steps == ["batch 7 0 2", "done"]


def test_batch_is_named_by_its_first_row_that_is_no_padding() -> None:
    journal = Journal()
    guard(journal).predict(with_rows(prepared([image(1), image(2), image(3)]), [PADDING_ROW, 5, 6]))
    assert journal.steps == ["batch 7 5 3", "done"]


def test_table_without_inputs_is_not_recorded() -> None:
    journal = Journal()
    padding = with_rows(prepared([image(1), image(2)]), [PADDING_ROW, PADDING_ROW])
    assert guard(journal).predict(padding)[0].num_rows == 2
    assert guard(journal).predict(padding.slice(0, 0))[0].num_rows == 0
    assert journal.steps == []


@pytest.mark.parametrize("crashes", [1, 3])
def test_batch_that_has_killed_a_process_is_predicted_image_by_image(crashes: int) -> None:
    journal = Journal({"batch 7 0 3": crashes, "image 7 1": 1, "image 7 2": 2})
    result, values = guard(journal).predict(prepared([image(1), image(2), image(3)]))
    assert journal.steps == ["image 7 0", "done", "image 7 1", "done"]
    assert errors(result) == [None, None, ("infer", "PREDICTOR_CRASH")]
    assert "died of this image 2 times" in result["message"][2].as_py()
    assert values is not None and values["value"].to_pylist() == [0, 1]


@pytest.mark.parametrize("decodes", [False, True])
def test_row_without_pixels_can_kill_only_an_actor_that_decodes(decodes: bool) -> None:
    journal = Journal({"batch 7 0 2": 1})
    result, _ = guard(journal, decodes=decodes).predict(prepared([("fetch", "TIMEOUT"), image(2)]))
    assert journal.steps == (["image 7 0", "done"] if decodes else []) + ["image 7 1", "done"]
    assert errors(result) == [("fetch", "TIMEOUT"), None]


@pytest.mark.parametrize("decodes", [False, True])
def test_actor_tells_its_guard_whether_it_decodes(decodes: bool) -> None:
    journal = Journal({"batch 7 0 1": 1})
    given: Any = SimpleNamespace(journal=lambda: journal, gives_up=True)
    decoder = (lambda: lambda table: table) if decodes else None
    mine = InferenceActor(lambda: lambda images, uris: pa.table({"x": uris}), [], decoder, given)
    assert errors(mine(prepared([("fetch", "TIMEOUT")]))) == [("fetch", "TIMEOUT")]
    assert journal.steps == (["image 7 0", "done"] if decodes else [])


@pytest.mark.parametrize("gives_up", [False, True])
def test_actor_of_a_retry_does_not_give_up(gives_up: bool) -> None:
    given: Any = SimpleNamespace(journal=lambda: Journal(fatal=9), gives_up=gives_up)
    mine = InferenceActor(lambda: lambda images, uris: pa.table({"x": uris}), [], None, given)
    result = mine(prepared([image(1)]))
    if gives_up:
        with pytest.raises(InfrastructureError, match="died of 9 images"):
            raise_if_fatal(result)
    else:
        assert result["x"].to_pylist() == ["s3://b/0.jpg"]


@pytest.mark.parametrize("restarted", [False, True, None])
def test_only_a_process_that_is_not_the_first_has_a_journal(
    restarted: bool | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Context:
        @property
        def was_current_actor_reconstructed(self) -> bool:
            if restarted is None:
                raise RuntimeError("the server of the cluster is gone")
            return restarted

        def get_actor_id(self) -> str:
            return "actor-1"

    monkeypatch.setattr("ray.get_runtime_context", Context)
    journal = JournalConfig(Store(str(tmp_path), StorageConfig()), "attempt").journal()
    assert (journal is None) is (restarted is False)
    if journal is not None:
        journal.begin("batch 7 0 1")
        assert [file for file in tmp_path.rglob("*") if file.is_file() and "actor-1" in file.name]


def test_actor_adopts_the_drivers_settings_of_logs_and_metrics() -> None:
    set_up: list[str] = []
    telemetry: Any = SimpleNamespace(set_up=lambda: set_up.append("done"))
    InferenceActor(lambda: lambda images, uris: pa.table({"x": uris}), [], telemetry=telemetry)
    assert set_up == ["done"]


def test_fourth_image_in_a_row_that_kills_a_process_ends_the_job() -> None:
    guard(Journal(fatal=3)).raise_if_hopeless()
    with pytest.raises(InfrastructureError, match="died of 4 images one after the other"):
        guard(Journal(fatal=4)).raise_if_hopeless()


def test_table_without_predictions_has_none() -> None:
    journal = Journal({"batch 7 0 1": 1, "image 7 0": 2})
    result, values = guard(journal).predict(prepared([image(1)]))
    assert (errors(result), values) == ([("infer", "PREDICTOR_CRASH")], None)
