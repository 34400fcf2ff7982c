"""Lazy Ray datasets of images, and prediction over them: the pieces of a job for use in a script or a notebook.

A job (:func:`batch_inference.run`) accounts for every input and resumes. A dataset is run by Ray Data alone, and can be combined
with everything else that Ray Data offers. In both, a bad image never costs another one its row.
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

from batch_inference.config import InputConfig, JobConfig, PreprocessConfig, StorageConfig
from batch_inference.errors import RowError, UserError
from batch_inference.images.decode import open_image, to_rgb
from batch_inference.inputs.coalesce import plan_reads
from batch_inference.inputs.find import find_inputs
from batch_inference.inputs.manifest_files import with_locations
from batch_inference.inputs.reads import fetch_inputs
from batch_inference.models.columns import is_sequence
from batch_inference.models.predictor import TorchPredictor
from batch_inference.output.manifest import LOCATION_SCHEMA, without_etags
from batch_inference.storage.fetcher import Fetcher
from batch_inference.storage.store import resolve_uri

# Images that a task holds at a time: a decoded photo takes tens of megabytes.
_IMAGES_AT_ONCE = 8


def from_images(images: Sequence[NDArray[Any] | Image.Image]) -> ray.data.Dataset:
    """Return a dataset of images that are in memory.

    Args:
        images: uint8 arrays of shape (h, w, 3), or gray (h, w), or PIL images; of any sizes.

    Returns:
        One row for each image: ``image``, RGB uint8 of shape (h, w, 3).

    Raises:
        UserError: If an element is not such an image; the message says which.
    """
    return ray.data.from_items([{"image": _array(image, index)} for index, image in enumerate(images)])


def from_paths(
    paths: Sequence[str | PathLike[str]],
    *,
    storage: StorageConfig | None = None,
    preprocess: PreprocessConfig | None = None,
) -> ray.data.Dataset:
    """Return a dataset of image files, which are read in tasks and only when their rows are needed.

    Args:
        paths: Local paths, ``s3://``, ``gs://`` and ``az://`` URIs in any mixture; also members of tar and Parquet files, such as
            ``a.tar#x.jpg``.
        storage: Endpoint, retries and timeouts; None: the defaults.
        preprocess: Limits and EXIF orientation; None: the defaults.

    Returns:
        One row for each path: ``uri``, string with its scheme; ``image``, RGB uint8 of shape (h, w, 3), with its orientation
        applied; ``error``, string, null if there is none. A file that cannot be read or decoded has an ``image`` of
        shape (0, 0, 3) and an ``error``.

    Raises:
        UserError: If there are no paths, or one has an unknown scheme.
    """
    uris = [resolve_uri(str(path)) for path in paths]
    if not uris:
        raise UserError("no paths are given", "Give at least one.")
    table = with_locations(pa.table({"uri": pa.array(uris, pa.string())}), InputConfig(), storage or StorageConfig())
    return _images(table, storage, preprocess)


def read_images(
    source: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    storage: StorageConfig | None = None,
    preprocess: PreprocessConfig | None = None,
) -> ray.data.Dataset:
    """Return a dataset of the images in folders, of globs, or of single files.

    Folders are listed now, with their subfolders; files are read lazily, as in :func:`from_paths`.

    Args:
        source: Folder, glob, image, tar or Parquet file of images, or a list of them; local, ``s3://``, ``gs://`` or ``az://``.
        storage: Endpoint, retries and timeouts; None: the defaults.
        preprocess: Limits and EXIF orientation; None: the defaults.

    Returns:
        One row for each image, as from :func:`from_paths`.

    Raises:
        UserError: If nothing is found.
    """
    sources = [source] if isinstance(source, (str, PathLike)) else list(source)
    config = InputConfig(uris=tuple(str(uri) for uri in sources))
    inputs = find_inputs(JobConfig(input=config, storage=storage or StorageConfig()))
    return _images(inputs.table, storage, preprocess)


def _images(table: pa.Table, storage: StorageConfig | None, preprocess: PreprocessConfig | None) -> ray.data.Dataset:
    config = (storage or StorageConfig(), preprocess or PreprocessConfig())
    load: Any = _load
    return ray.data.from_items(without_etags(table).to_pylist()).map_batches(
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
    """Run a predictor over a dataset, lazily.

    Actors hold their CPUs for as long as they live. Leave at least one CPU for the tasks that read: if actors take every
    CPU of a cluster, nothing can run at all.

    Args:
        dataset: With a column ``image``, and optionally ``error``: the predictor does not get rows that have an error.
        predictor: A class like :class:`~batch_inference.TorchPredictor`: called with ``{"image": …}``, RGB uint8 arrays
            of any sizes, it returns columns with one value for each image.
        fn_constructor_args: Positional arguments of its constructor.
        fn_constructor_kwargs: Keyword arguments of its constructor.
        batch_size: Largest number of images in a call.
        num_gpus: GPUs of one actor.
        num_cpus: CPUs of one actor.
        actors: Number of actors.
        compute: A ``ray.data.ActorPoolStrategy`` instead of ``actors``.

    Returns:
        The dataset's columns without ``image``, and the predictor's columns, which are null in rows that have an ``error``.
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
    """Calls a predictor with the rows without an error, and puts its columns beside those of the dataset."""

    def __init__(self, predictor: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._predictor = predictor(*args, **kwargs)

    def __call__(self, table: pa.Table) -> pa.Table:
        if "image" not in table.column_names:
            raise ValueError(f"the dataset has no column image, but {', '.join(table.column_names)}")
        images = BlockAccessor.for_block(table.select(["image"])).to_batch_format("numpy")["image"]
        errors = table.column("error").to_pylist() if "error" in table.column_names else [None] * len(images)
        good = [index for index, error in enumerate(errors) if error is None]
        # If there is none, a black image shows which columns the predictor has; its row is not used.
        batch = images[good] if good else np.zeros((1, 32, 32, 3), np.uint8)
        columns = self._predictor({"image": batch})
        for name, values in columns.items():
            if not is_sequence(values):
                raise ValueError(
                    f"{type(self._predictor).__name__} returned one {type(values).__name__} as {name}, not one value an image"
                )
            if len(values) != len(batch):
                raise ValueError(
                    f"{type(self._predictor).__name__} returned {len(values)} {name} for {len(batch)} images"
                )
        predictions = BlockAccessor.batch_to_arrow_block(dict(columns))
        result = table.drop_columns(["image"])
        if len(good) < len(images):
            row_of = {index: row for row, index in enumerate(good)}
            predictions = predictions.take(pa.array([row_of.get(index) for index in range(len(images))], pa.int64()))
        for name in predictions.column_names:
            if name in result.column_names:
                result = result.drop_columns([name])
            result = result.append_column(name, predictions.column(name))
        return result


def _load(table: pa.Table, storage: StorageConfig, preprocess: PreprocessConfig) -> Iterator[pa.Table]:
    """Read and decode the images of a table of URIs; yield one table for each image."""
    uris = table.column("uri").to_pylist()
    locations = None
    if "_offset" in table.column_names:
        locations = pa.table([table[f.name].cast(f.type) for f in LOCATION_SCHEMA], schema=LOCATION_SCHEMA)
    fetcher = Fetcher.of_process(storage)
    for file in fetch_inputs(plan_reads(uris, locations, fetcher, preprocess.max_bytes), _IMAGES_AT_ONCE):
        image, failure, uri = np.zeros((0, 0, 3), np.uint8), file.error, uris[file.row]
        if failure is None:
            try:
                image = np.asarray(open_image(file.data, preprocess))
            except RowError as exc:
                failure = exc.error
        error = failure and f"{failure.stage} {failure.error_type}: {failure.message}"
        block = BlockAccessor.batch_to_arrow_block({"image": image[None]})
        # Typed, since the column of a block without errors would have the null type, and differ from that of one with errors.
        yield block.add_column(0, "uri", pa.array([uri], pa.string())).append_column(
            "error", pa.array([error], pa.string())
        )


def _array(image: Any, index: int) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        try:
            image.load()
            return np.asarray(to_rgb(image))
        except (RowError, OSError, SyntaxError, ValueError) as exc:
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
