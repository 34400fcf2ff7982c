"""The records of a job's attempts, in ``_report/attempts/``."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from batch_inference.errors import BatchInferenceError
from batch_inference.storage.store import Store

ATTEMPTS_FOLDER = "_report/attempts"
_MAX_ATTEMPTS = 1000
# An attempt writes its record when it starts and every ten seconds while it works; one that is silent for longer has
# ended.
_MAX_SILENCE_S = 120.0


@dataclass(frozen=True)
class AttemptRecord:
    """Time and resources of one attempt, written to ``_report/attempts/ATTEMPT.json`` while it runs and at its end.

    Attributes:
        attempt: Identifier of the attempt.
        state: ``running`` (or killed), ``succeeded``, ``failed``, ``interrupted``.
        started_at: UTC, ISO 8601.
        working_from: Time at which the first rows came back, "" before.
        updated_at: Time of this record.
        elapsed_s: Seconds from its start until then.
        working_s: Seconds between the first and the last rows that came back.
        rows: Rows that came back.
        bytes: Bytes fetched.
        retries: Requests to the store that were sent again.
        stage_s: Seconds of fetch, decode and infer, added up over parallel work; also of the driver, and of its waiting
            for the store.
        busy: Share of the time that actors, decoding, fetching and driver were busy, 0 to 1.
        actors: Number of actors that were requested.
        gpus: GPUs of all actors together.
        cpus: CPUs of all actors together.
        limit: The bottleneck: the part that limited the attempt.
        sentence: The bottleneck in words.
    """

    attempt: str
    state: str
    started_at: str
    working_from: str
    updated_at: str
    elapsed_s: float
    working_s: float
    rows: int
    bytes: int
    retries: int
    stage_s: dict[str, float]
    busy: dict[str, float]
    actors: int
    gpus: float
    cpus: float
    limit: str = ""
    sentence: str = ""

    @property
    def gpu_hours(self) -> float:
        """GPU hours that the attempt reserved."""
        return self.gpus * self.elapsed_s / 3600

    @property
    def busy_gpu_hours(self) -> float:
        """GPU hours in which the actors worked."""
        gpus_per_actor = self.gpus / self.actors if self.actors else 0.0
        return min(self.gpu_hours, self.stage_s.get("infer", 0.0) * gpus_per_actor / 3600)

    def write(self, store: Store) -> None:
        """Write the record over the attempt's earlier one."""
        store.put(f"{ATTEMPTS_FOLDER}/{self.attempt}.json", json.dumps(asdict(self), indent=1).encode())


def read_attempts(store: Store) -> list[AttemptRecord]:
    """Return the records of the attempts, in the order of their starts; unreadable ones are left out."""
    paths = [i.path for i in store.objects(ATTEMPTS_FOLDER) if i.path.endswith(".json")]
    records = []
    for path in paths[:_MAX_ATTEMPTS]:
        try:
            record = AttemptRecord(**json.loads(store.get(path)))
            # A record whose numbers or times are of the wrong type would fail the report later.
            (
                epoch_seconds(record.started_at),
                work_starts([record]),
                float(record.elapsed_s),
                int(record.rows),
                dict(record.stage_s),
                dict(record.busy),
            )
        except (ValueError, TypeError, FileNotFoundError, BatchInferenceError):
            continue
        records.append(record)
    return sorted(records, key=lambda record: record.started_at)


def seconds_since_sign_of_life(store: Store) -> float | None:
    """Return the seconds since a running attempt last wrote its record; None if none did in the last two minutes."""
    if store.get_or_none("_FAILED") is not None:
        return None
    current = datetime.now(timezone.utc).timestamp()
    ages = [current - epoch_seconds(record.updated_at) for record in read_attempts(store) if record.state == "running"]
    return min((max(0.0, age) for age in ages if age < _MAX_SILENCE_S), default=None)


def epoch_seconds(text: str) -> float:
    """Return a time in ISO 8601 as seconds since 1970."""
    return datetime.fromisoformat(text).timestamp()


def work_starts(records: Iterable[AttemptRecord]) -> list[float]:
    """Return when attempts began to work, after start-up, in seconds since 1970."""
    return [epoch_seconds(record.working_from) for record in records if record.working_from]
