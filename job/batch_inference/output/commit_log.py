"""The commits of an output and the retries that they belong to: ``_commits/`` and ``_retries/``.

Of the commits of one shard, the one of the latest retry counts. Stores and caches may list objects late. A commit that
the listing does not show yet is made once more and loses; a commit that one process has seen, it does not forget; and
no commit is called missing before the store was asked for it by name.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from batch_inference.errors import AccountingError
from batch_inference.output.manifest import parse_shard_name, shard_name
from batch_inference.output.records import Commit, Retry
from batch_inference.storage.store import PARALLEL_REQUESTS, Store, object_sizes

_RETRY_PATH = re.compile(r"_retries/[1-9]\d{0,8}\.json$")


class CommitLog:
    """Commits and retries of one output. A *generation* is the number of a retry, 0 for the first run.

    Args:
        store: The output folder.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._seen: dict[int, int] = {}  # latest generation of each shard that this process has seen
        self._lock = threading.Lock()

    def generations(self) -> dict[int, int]:
        """Return the shards that are done, each with the generation of the commit that counts; costs one listing."""
        for shard, generation in self.commit_keys():
            self._remember(shard, generation)
        return dict(self._seen)

    def commit_keys(self) -> list[tuple[int, int]]:
        """Return shard and generation of every commit, superseded ones too; costs one listing."""
        paths = [info.path for info in self.store.objects("_commits") if info.path.endswith(".json")]
        return [(shard, generation) for shard, generation in map(parse_shard_name, paths) if shard >= 0]

    def committed(self) -> set[int]:
        """Return the numbers of the shards that are done; costs one listing."""
        return set(self.generations())

    def refresh(self, shards: Collection[int]) -> None:
        """Ask for the commits of some shards by name, up to the latest retry: a listing may not show them yet."""
        if not shards:
            return
        retry = self.retry()
        latest = retry.generation if retry else 0
        keys = {
            commit_path(shard, generation): (shard, generation)
            for shard in shards
            for generation in range(self._seen.get(shard, -1) + 1, latest + 1)
        }
        for path, size in object_sizes(self.store, list(keys)).items():
            if size is not None:
                self._remember(*keys[path])

    def commits(self, generations: dict[int, int] | None = None) -> list[Commit]:
        """Return the commits that count, or those of the shards and generations given, in the order of their shards.

        Raises:
            AccountingError: If a commit is unreadable or contradicts itself.
        """
        keys = sorted((self.generations() if generations is None else generations).items())
        with ThreadPoolExecutor(PARALLEL_REQUESTS) as pool:
            return list(pool.map(self._read_commit, keys))

    def retry(self) -> Retry | None:
        """Return the latest retry, None if there was none.

        Raises:
            AccountingError: If it is unreadable.
        """
        numbers = [
            int(info.path[len("_retries/") : -len(".json")])
            for info in self.store.objects("_retries")
            if _RETRY_PATH.match(info.path)
        ]
        latest = max(numbers, default=0)
        while self.store.size(f"_retries/{latest + 1}.json") is not None:
            latest += 1
        if not latest:
            return None
        path = f"_retries/{latest}.json"
        try:
            raw = json.loads(self.store.get(path))
            return Retry(**{**raw, "stages": tuple(raw["stages"]), "error_types": tuple(raw["error_types"])})
        except (ValueError, TypeError, KeyError, FileNotFoundError) as exc:
            raise AccountingError(
                f"{path} is not readable: {exc}", f"Delete {path}, and start the retry again."
            ) from None

    def begin_retry(self, retry: Retry) -> bool:
        """Begin a retry; return False if another driver has begun one of the same number."""
        path, content = f"_retries/{retry.generation}.json", json.dumps(asdict(retry), indent=1).encode()
        # A create whose answer was lost is sent again, and then finds its own object.
        return self.store.create(path, content) or self.store.get_or_none(path) == content

    def _create_commit(self, commit: Commit) -> bool:
        """Create the object of a commit if it is absent; return False if it is another driver's."""
        path, data = commit_path(commit.shard, commit.generation), commit.to_json()
        # A create whose answer was lost is sent again and finds its own object; taken for another driver's, its files
        # would be lost.
        mine = self.store.create(path, data) or self.store.get(path) == data
        self._remember(commit.shard, commit.generation)
        return mine

    def _remember(self, shard: int, generation: int) -> None:
        with self._lock:
            self._seen[shard] = max(generation, self._seen.get(shard, 0))

    def _read_commit(self, key: tuple[int, int]) -> Commit:
        path = commit_path(*key)
        try:
            commit = Commit.from_json(self.store.get(path))
            rows_in_files = sum(file.rows for file in commit.files)
            consistent = commit.rows == commit.predictions + commit.errors == rows_in_files
            if (commit.shard, commit.generation) != key or not consistent:
                raise ValueError(
                    f"rows {commit.rows}, predictions {commit.predictions}, errors {commit.errors}, in files {rows_in_files}"
                )
        except (ValueError, TypeError, KeyError, FileNotFoundError) as exc:
            raise AccountingError(
                f"{path} is not a valid commit: {exc}",
                f"Delete {path} and run the same command again; the shard will be processed again.",
            ) from None
        return commit


def commit_path(shard: int, generation: int) -> str:
    """Return the path of a commit.

    >>> commit_path(42, 1)
    '_commits/shard-00042-g1.json'
    """
    return f"_commits/{shard_name(shard, generation)}.json"
