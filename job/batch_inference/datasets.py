"""Lazy Ray datasets of images, and prediction over them: the pieces of a job for use in a script or a notebook.

A job (:func:`batch_inference.run`) accounts for every input and resumes; here it is Ray Data that runs, with everything
it can do. What stays the same: a bad image never costs another one its row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from PIL import Image
from ray.data.block import BlockAccessor

from batch_inference.columns import is_sequence
from batch_inference.config import InputConfig, JobConfig, PreprocessConfig, StorageConfig
from batch_inference.containers import PLACE_SCHEMA, without_versions
from batch_inference.errors import RowFailure, UserError
from batch_inference.fetcher import Fetcher
from batch_inference.images import open_image, to_rgb
from batch_inference.manifest import find_inputs, with_places
from batch_inference.members import runs
from batch_inference.predictor import TorchPredictor
from batch_inference.runs import fetched
from batch_inference.storage import located

# Decoded photos take tens of megabytes; a few at a time keep a task's memory small.
_IMAGES_AT_ONCE = 8


def from_images(images: Sequence[NDArray[Any] | Image.Image]) -> ray.data.Dataset:
    """A dataset of images that are in memory.

    Args:
        images: uint8 arrays of shape (h, w, 3), or gray (h, w), or PIL images; of any sizes.

    Returns:
        One row an image: ``image``, RGB uint8 of shape (h, w, 3).

    Raises:
        UserError: If one of them is not such an image; says which.
    """
    return ray.data.from_items([{"image": _array(image, index)} for index, image in enumerate(images)])


def from_paths(
    paths: Sequence[str | PathLike[str]],
    *,
    storage: StorageConfig | None = None,
    preprocess: PreprocessConfig | None = None,
) -> ray.data.Dataset:
    """A dataset of image files, which are read in tasks and only when their rows are needed.

    Args:
        paths: Local paths, ``s3://``, ``gs://``, ``az://``, in any mixture; also members of tar and Parquet files, ``a.tar#x.jpg``.
        storage: Endpoint, retries, timeouts; None: the defaults.
        preprocess: Limits and EXIF; None: the defaults.

    Returns:
        One row a path: ``uri`` string with its scheme; ``image``, RGB uint8 of shape (h, w, 3), with its orientation
        applied; ``error`` string, null where all is well. A file that cannot be read or decoded has an ``image`` of
        shape (0, 0, 3) and its ``error``.

    Raises:
        UserError: If there are no paths, or one has an unknown scheme.
    """
    uris = [located(str(path)) for path in paths]
    if not uris:
        raise UserError("no paths are given", "Give at least one.")
    table = with_places(pa.table({"uri": pa.array(uris, pa.string())}), InputConfig(), storage or StorageConfig())
    return _images(table, storage, preprocess)


def read_images(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    storage: StorageConfig | None = None,
    preprocess: PreprocessConfig | None = None,
) -> ray.data.Dataset:
    """A dataset of the images in folders, of globs, or of single files.

    Folders are listed at once and with their sub-folders; files are read lazily, as in :func:`from_paths`.

    Args:
        source: Folder, glob, image, tar or Parquet file of images, or a list of them; local, ``s3://``, ``gs://``, ``az://``.
        storage: Endpoint, retries, timeouts; None: the defaults.
        preprocess: Limits and EXIF; None: the defaults.

    Returns:
        One row an image, as from :func:`from_paths`.

    Raises:
        UserError: If nothing is found.
    """
    several = [source] if isinstance(source, (str, PathLike)) else list(source)
    section = InputConfig(uris=tuple(str(one) for one in several))
    found = find_inputs(JobConfig(input=section, storage=storage or StorageConfig()))
    return _images(found.table, storage, preprocess)


def _images(table: pa.Table, storage: StorageConfig | None, preprocess: PreprocessConfig | None) -> ray.data.Dataset:
    config = (storage or StorageConfig(), preprocess or PreprocessConfig())
    load: Any = _load
    return ray.data.from_items(without_versions(table).to_pylist()).map_batches(
        load, fn_args=config, batch_size=_IMAGES_AT_ONCE, batch_format="pyarrow"
    )


def predict(
    dataset: ray.data.Dataset,
    predictor: type = TorchPredictor,
    *,
    fn_constructor_args: Sequence[Any] = (),
    fn_constructor_kwargs: dict[str, Any] | None = None,
    batch_size: int = 32,
    num_gpus: float = 0,
    num_cpus: float = 1,
    actors: int = 1,
    compute: ray.data.ActorPoolStrategy | None = None,
) -> ray.data.Dataset:
    """Runs a predictor over a dataset, lazily.

    The CPUs of all actors are taken for as long as they live. Leave at least one for the tasks that read: where actors
    take every CPU of a cluster, nothing can run at all.

    Args:
        dataset: With a column ``image``, and perhaps ``error``: rows that have one are not shown to the predictor.
        predictor: A class like :class:`~batch_inference.TorchPredictor`: called with ``{"image": …}``, RGB uint8 arrays
            of any sizes, it returns columns with one value an image.
        fn_constructor_args: Positional arguments of its constructor.
        fn_constructor_kwargs: Keyword arguments of its constructor.
        batch_size: Most images in a call.
        num_gpus: GPUs of one actor.
        num_cpus: CPUs of one actor.
        actors: Number of actors.
        compute: A ``ray.data.ActorPoolStrategy`` instead of ``actors``.

    Returns:
        The dataset's columns without ``image``, and the predictor's, which are null in rows that have an ``error``.
    """
    return dataset.map_batches(
        _Predict,
        fn_constructor_args=(predictor, tuple(fn_constructor_args), dict(fn_constructor_kwargs or {})),
        batch_size=batch_size,
        batch_format="pyarrow",
        num_gpus=num_gpus,
        num_cpus=num_cpus,
        compute=compute or ray.data.ActorPoolStrategy(size=actors),
    )


class _Predict:
    """Shows a predictor the good rows only, and puts its columns beside those of the dataset."""

    def __init__(self, predictor: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._predictor = predictor(*args, **kwargs)

    def __call__(self, table: pa.Table) -> pa.Table:
        if "image" not in table.column_names:
            raise ValueError(f"the dataset has no column image, but {', '.join(table.column_names)}")
        images = BlockAccessor.for_block(table.select(["image"])).to_batch_format("numpy")["image"]
        errors = table.column("error").to_pylist() if "error" in table.column_names else [None] * len(images)
        good = [index for index, error in enumerate(errors) if error is None]
        # Where no image is good, a black one tells which columns there are; its row is not used.
        shown = images[good] if good else np.zeros((1, 32, 32, 3), np.uint8)
        columns = self._predictor({"image": shown})
        for name, values in columns.items():
            if not is_sequence(values):
                raise ValueError(
                    f"{type(self._predictor).__name__} returned one {type(values).__name__} as {name}, not one value an image"
                )
            if len(values) != len(shown):
                raise ValueError(
                    f"{type(self._predictor).__name__} returned {len(values)} {name} for {len(shown)} images"
                )
        found = BlockAccessor.batch_to_arrow_block(dict(columns))
        result = table.drop_columns(["image"])
        if len(good) < len(images):
            row_of = {index: row for row, index in enumerate(good)}
            found = found.take(pa.array([row_of.get(index) for index in range(len(images))], pa.int64()))
        for name in found.column_names:
            if name in result.column_names:
                result = result.drop_columns([name])
            result = result.append_column(name, found.column(name))
        return result


def _load(table: pa.Table, storage: StorageConfig, preprocess: PreprocessConfig) -> Iterator[pa.Table]:
    """Reads and decodes the images of some URIs, one table an image."""
    uris = table.column("uri").to_pylist()
    places = None
    if "_offset" in table.column_names:
        places = pa.table([table[f.name].cast(f.type) for f in PLACE_SCHEMA], schema=PLACE_SCHEMA)
    fetcher = Fetcher.of_process(storage)
    for one in fetched(runs(uris, places, fetcher, preprocess.max_bytes), _IMAGES_AT_ONCE):
        image, failure, uri = np.zeros((0, 0, 3), np.uint8), one.error, uris[one.row]
        if failure is None:
            try:
                image = np.asarray(open_image(one.data, preprocess))
            except RowFailure as exc:
                failure = exc.error
        error = failure and f"{failure.stage} {failure.error_type}: {failure.message}"
        block = BlockAccessor.batch_to_arrow_block({"image": image[None]})
        # Typed, since a block without errors would have a column of type null, and differ from one with errors.
        yield block.add_column(0, "uri", pa.array([uri], pa.string())).append_column(
            "error", pa.array([error], pa.string())
        )


def _array(image: Any, index: int) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        try:
            image.load()
            return np.asarray(to_rgb(image))
        except (RowFailure, OSError, SyntaxError, ValueError) as exc:
            raise UserError(f"image {index} cannot be used: {exc}", "Leave it out.") from exc
    array = np.asarray(image)
    if (
        array.dtype != np.uint8
        or array.ndim not in (2, 3)
        or (array.ndim == 3 and array.shape[2] != 3)
        or not array.size
    ):
        raise UserError(
            f"image {index} is a {type(image).__name__} of {array.dtype} and shape {array.shape}",
            "Give RGB uint8 arrays of shape (height, width, 3), gray ones of (height, width), or PIL images.",
        )
    return np.ascontiguousarray(np.broadcast_to(array[:, :, None], (*array.shape, 3)) if array.ndim == 2 else array)
