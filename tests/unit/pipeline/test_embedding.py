from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torchvision import models

from batch_inference.config import InferenceConfig, JobConfig, ModelConfig, OutputConfig, StorageConfig, parse_config
from batch_inference.errors import UserError
from batch_inference.images.transform import Transform
from batch_inference.models import networks
from batch_inference.models.exported import Logits
from batch_inference.models.networks import load_features
from batch_inference.pipeline.actor import InferenceActor
from batch_inference.pipeline.engine import resolve_engine
from batch_inference.pipeline.factories import EmbedderFactory
from batch_inference.pipeline.fingerprint import fingerprint_parts
from tests.support.batches import errors, image, prepared
from tests.support.models import LITE

CPU = InferenceConfig(actors=1, gpus_per_actor=0)
# Every way that torchvision's networks end, with the number of features that their papers and code give.
ENDINGS = {
    "resnet18": 512,
    "alexnet": 4096,
    "densenet121": 1024,
    "squeezenet1_1": 512,
    "mobilenet_v3_small": 1024,
    "efficientnet_b0": 1280,
    "convnext_tiny": 768,
    "shufflenet_v2_x0_5": 1024,
    "regnet_y_400mf": 440,
    "mnasnet0_5": 1280,
    "vit_b_32": 768,
    "swin_t": 768,
    "googlenet": 1024,
}


def features(
    name: str, monkeypatch: pytest.MonkeyPatch, source: str = "torchvision"
) -> tuple[nn.Module, nn.Module, nn.Module]:
    torch.manual_seed(0)
    if source == "timm":
        timm = networks.import_timm()
        network = timm.create_model(name, pretrained=False).eval()
    else:
        options = {"init_weights": False} if name == "googlenet" else {}
        network = models.get_model(name, weights=None, **options).eval()
    logits = Logits(network).eval()
    monkeypatch.setattr(networks, "load_model", lambda model, storage: logits)
    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
    return load_features(ModelConfig(name=name), StorageConfig(), 224), logits, last[0] if last else nn.Identity()


@pytest.mark.parametrize(("name", "size"), ENDINGS.items())
def test_features_are_what_the_classifier_classifies_by(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "squeezenet1_1":
        network, _, _ = features(name, monkeypatch)
        with torch.inference_mode():
            assert network(torch.rand(1, 3, 224, 224)).shape == (1, size)
        return
    images = torch.rand(2, 3, 224, 224)
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    complete = models.get_model(name, weights=None, **options).eval()
    network, _, classifier = features(name, monkeypatch)
    with torch.inference_mode():
        embedded = network(images)
        assert embedded.shape == (2, size)
        if name != "googlenet":
            torch.testing.assert_close(classifier(embedded), complete(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "size"), {"resnet18": 512, "mobilenetv3_small_050": 1024, "vit_tiny_patch16_224": 192}.items()
)
def test_features_of_timm_are_what_its_classifier_gets(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    network, _, _ = features(name, monkeypatch, "timm")
    with torch.inference_mode():
        assert network(torch.rand(2, 3, 224, 224)).shape == (2, size)


def test_network_that_does_not_end_with_a_linear_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 2 * self.linear(images.mean(dim=(2, 3)))

    monkeypatch.setattr(networks, "load_model", lambda model, storage: Logits(Scaled()))
    with pytest.raises(UserError, match="does not end with a linear layer"):
        load_features(ModelConfig(name="scaled"), StorageConfig(), 8)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_embeddings_of_an_actor_are_fixed_size_lists(dtype: str, tmp_path: Path) -> None:
    inference = CPU.model_copy(update={"embedding_dtype": dtype, "batch_size": 2})
    config = JobConfig(task="embed", model=LITE, inference=inference, output=OutputConfig(uri=str(tmp_path)))
    sent: list[pa.Table] = []

    class Writer:
        class add:  # noqa: N801
            @staticmethod
            def remote(shard: int, table: pa.Table) -> Any:
                sent.append(table)
                return None

    actor = InferenceActor(EmbedderFactory(config, Transform()), [Writer])
    items: list[Any] = [image(10, (224, 224)), ("decode", "TRUNCATED"), image(200, (224, 224)), image(90, (224, 224))]
    import ray

    before, ray.get = ray.get, lambda refs: refs
    try:
        table = actor(prepared(items))
    finally:
        ray.get = before
    assert errors(table) == [None, ("decode", "TRUNCATED"), None, None]
    assert "embedding" not in table.column_names
    (mine,) = sent
    assert mine["row"].to_pylist() == [0, 2, 3]
    assert mine.schema.field("embedding").type == pa.list_(pa.float16() if dtype == "float16" else pa.float32(), 1280)
    pq.write_table(mine, tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").equals(mine)
    network = load_features(LITE, StorageConfig(), 224)
    with torch.inference_mode():
        batch = torch.from_numpy(np.stack([items[0], items[2], items[3]]))
        expected = network(Transform().normalize(batch)).numpy()
    got = np.stack([np.asarray(row, np.float32) for row in mine["embedding"].to_pylist()])
    np.testing.assert_allclose(got, expected, rtol=2e-3, atol=1e-3)


def test_embedding_that_is_not_finite_is_an_error_row() -> None:
    def predict(images: np.ndarray, uris: list[str]) -> pa.Table:
        values = np.asarray(images)[:, 0, 0].astype(np.float32)
        values[1, 2] = np.inf
        return pa.table({"embedding": pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 3)})

    table = InferenceActor(lambda: predict, [])(prepared([image(1), image(2), image(3)]))
    assert errors(table) == [None, ("infer", "NOT_FINITE"), None]
    assert table["embedding"].to_pylist() == [[1, 1, 1], None, [3, 3, 3]]


def test_fingerprint_depends_on_the_task(tmp_path: Path) -> None:
    def identity(**changes: Any) -> dict[str, str]:
        config = JobConfig(model=LITE, inference=CPU, output=OutputConfig(uri=str(tmp_path))).model_copy(update=changes)
        engine = resolve_engine(config)
        assert engine.custom is (config.task == "embed")
        return fingerprint_parts(config, engine, "")

    half = CPU.model_copy(update={"embedding_dtype": "float16"})
    parts = [identity(), identity(task="embed"), identity(task="embed", inference=half)]
    assert len({tuple(sorted(item.items())) for item in parts}) == 3
    # What does not change an embedding does not change its job.
    assert identity(task="embed") == identity(task="embed", inference=CPU.model_copy(update={"top_k": 9}))


def test_predictor_does_not_embed() -> None:
    with pytest.raises(UserError, match="task is embed, but a predictor is given"):
        parse_config({"task": "embed", "predictor": "m:P"})
