"""Checkpoints: whose they are, what is adapted, and what a user hands over by mistake."""

import argparse
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.oracles import timm, torchvision
from support.seeds import seed_all
from support.zoo import pair, slow_but
from torch import Tensor, nn

from fastcnn import models
from fastcnn.models.weights import adapt_input_channels

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """A ResNet-18 of torchvision for 10 classes."""
    seed_all(0)
    return torchvision.models.resnet18(num_classes=10).state_dict()


def saved(value: Any, folder: Path) -> Path:
    torch.save(value, folder / "weights.pth")
    return folder / "weights.pth"


def assert_loaded(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    for key, value in model.state_dict().items():
        if key not in but:
            assert torch.equal(value, state[key]), key


WRAPPED: dict[str, Callable[[State], Any]] = {
    "as it is": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "state_dict, module.": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
    "compiled": lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    "Lightning": lambda s: {"state_dict": {f"model.{k}": v for k, v in s.items()}},
    "half": lambda s: {k: v.half() if v.is_floating_point() else v for k, v in s.items()},
    "before PyTorch 0.4.1": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers(how: str, state: State, tmp_path: Path) -> None:
    path = saved(WRAPPED[how](state), tmp_path)
    expected = {k: v.half().float() for k, v in state.items()} if how == "half" else state
    assert_loaded(models.resnet18(num_classes=10, weights=path), expected)


def test_safetensors(state: State, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    assert_loaded(models.resnet18(num_classes=10, weights=str(path)), state)


def test_safetensors_not_installed(
    state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"needs the package safetensors: .*fastcnn\[train\]"):
        models.resnet18(num_classes=10, weights=path)


def test_old_densenet(tmp_path: Path) -> None:
    # torchvision's own file: norm.1 for norm1, and no counters.
    options = {"block_config": (2, 2), "growth_rate": 4}
    state = torchvision.models.DenseNet(num_classes=10, **options).state_dict()
    old = {}
    for key, value in state.items():
        for layer in ("norm", "conv"):
            for i in "12":
                if "denselayer" in key:
                    key = key.replace(f".{layer}{i}.", f".{layer}.{i}.")
        if "num_batches_tracked" not in key:
            old[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    path = saved(old, tmp_path)
    assert_loaded(models.densenet121(num_classes=10, weights=path, **options), state)


@pytest.mark.parametrize(("old", "new"), [(3, 1), (3, 2), (3, 3), (3, 4), (3, 8), (1, 3), (4, 6)])
def test_adapted_channels_are_timms(old: int, new: int) -> None:
    weight = torch.randn(4, old, 3, 3)
    expected = timm.models.adapt_input_conv(new, weight.clone(), base_chans=old)
    assert torch.equal(adapt_input_channels(weight, new) if old != new else weight, expected)


def test_in_chans(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    model = models.create_model("resnet18", num_classes=10, in_chans=1, weights=path)
    assert torch.equal(model.conv1.weight, state["conv1.weight"].sum(1, keepdim=True))
    assert_loaded(model, state, but=("conv1.weight",))
    bare = models.resnet18(num_classes=10, in_chans=2)
    loaded = models.load_weights(bare, path, adapt_in_chans=True)
    assert loaded == models.Loaded(["conv1.weight"], [], [])
    with pytest.raises(
        ValueError, match=r"conv1.weight is \[64, 3, 7, 7\], expected \[64, 2, 7, 7"
    ):
        models.load_weights(bare, path)


def test_num_classes(state: State, tmp_path: Path) -> None:
    path = saved(state, tmp_path)
    head = ("fc.weight", "fc.bias")
    with pytest.warns(UserWarning, match=r"other classes: fc.weight, fc.bias stay initialised"):
        model = models.create_model("resnet18", num_classes=3, weights=path, init="zeros")
    assert_loaded(model, state, but=head)
    assert not model.fc.weight.any()
    # Nobody asked for 1000 classes: the checkpoint's 10 are news, not a wish.
    with pytest.raises(
        ValueError, match=r"fc.weight is \[10, 512\], expected \[1000, 512\] \(num_c"
    ):
        models.create_model("resnet18", weights=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["googlenet", "inception_v3", "fcn_resnet50"])
def test_auxiliary_heads_may_stay_behind(name: str, tmp_path: Path) -> None:
    option = "aux_loss" if name == "fcn_resnet50" else "aux_logits"
    _, theirs = pair(name, **{option: True})
    path = saved(theirs.state_dict(), tmp_path)
    model = models.create_model(name, num_classes=10, weights=path, **{option: False})
    assert_loaded(model, theirs.state_dict())
    with pytest.warns(UserWarning, match="other classes"):
        model = models.create_model(name, num_classes=4, weights=path, **{option: True})
    heads = tuple(f"{head}.{leaf}" for head in model.heads for leaf in ("weight", "bias"))
    assert_loaded(model, theirs.state_dict(), but=heads)
    # The other way round they are missed.
    without = {k: v for k, v in theirs.state_dict().items() if not k.lower().startswith("aux")}
    path = saved(without, tmp_path)
    with pytest.raises(ValueError, match=r"missing [aA]ux.*\.weight"):
        models.create_model(name, num_classes=10, weights=path, **{option: True})


@pytest.mark.parametrize("name", slow_but({"unet_resnet18"}, ["fcn_resnet50", "unet_resnet18"]))
def test_weights_backbone(name: str, tmp_path: Path) -> None:
    _, resnet = pair(name.rpartition("_")[2])
    path = saved(resnet.state_dict(), tmp_path)
    model = models.create_model(name, weights_backbone=path, init="normal")
    assert_loaded(model.get_submodule(model.backbone_name), resnet.state_dict())
    with pytest.raises(ValueError, match="weights_backbone: ResNet has no backbone"):
        models.resnet50(weights_backbone=path)


def test_missing_and_unexpected_keys(state: State, tmp_path: Path) -> None:
    wrong = {k: v for k, v in state.items() if not k.startswith("layer4.1.bn2")}
    wrong["head.weight"] = torch.ones(2)
    wrong["fc.bias"] = torch.ones(11)
    message = (
        r"does not fit ResNet: missing layer4.1.bn2.weight, layer4.1.bn2.bias, .*running_var; "
        r"unexpected head.weight; fc.bias is \[11\], expected \[10\]"
    )
    model = models.resnet18(num_classes=10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        models.load_weights(model, saved(wrong, tmp_path))
    assert_loaded(model, before)  # nothing is loaded by halves


def test_keys_that_match_nothing(tmp_path: Path) -> None:
    path = saved({f"blocks.{i}.weight": torch.ones(1) for i in range(9)}, tmp_path)
    message = (
        r"no key of .*weights.pth matches: it has blocks.0.weight, .* and 6 more; expected conv1.w"
    )
    with pytest.raises(ValueError, match=message):
        models.resnet18(weights=path)


def test_meta_device(state: State, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = models.resnet18(num_classes=10)
    with pytest.raises(ValueError, match=r"model: .* on the meta device, .* model.to_empty"):
        models.load_weights(model, saved(state, tmp_path))


def test_a_foreign_network(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model: expected a network of fastcnn.models, got Linear"):
        models.load_weights(nn.Linear(1, 1), tmp_path)


class Malicious:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/fastcnn-was-here",)


def written(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


def zipped(name: str) -> Callable[[Path], Any]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, "x")

    return write


WRONG_FILES: list[tuple[str, Callable[[Path], Any], str]] = [
    ("x.pth", lambda p: torch.save({"a": Malicious()}, p), "pickle that calls .*mkdir, and could"),
    ("x.pth", lambda p: p.write_bytes(pickle.dumps(Malicious())),
     "is a pickle that torch.save did not write, and could run"),
    ("x.pth", lambda p: torch.save(nn.Linear(1, 1), p), "calls torch.nn.modules.linear.Linear"),
    ("x.pth", lambda p: torch.save({"model": {}, "args": argparse.Namespace()}, p),
     "calls argparse.Namespace, .* allow the name with .*add_safe_globals"),
    ("x.pth", lambda p: torch.save(torch.ones(3), p), "holds no state_dict but Tensor"),
    ("x.pth", lambda p: torch.save({"epoch": 3, "lr": 0.1}, p), "'epoch' is int, no Tensor"),
    ("x.pth", lambda p: torch.save({}, p), r"no state_dict but a dict with the keys \(none\)"),
    ("x.pth", lambda p: torch.save({"a": torch.ones(9999)}, p) or os.truncate(p, 4000),
     "is no checkpoint: "),
    ("x.pth", written(b""), "is no checkpoint but empty"),
    ("x.pth", written(b"hello"), "is no checkpoint: "),
    ("x.pth", written(b"<!DOCTYPE html><html>"), "is no checkpoint but a web page"),
    ("x.pth", written(b"version https://git-lfs.github.com/spec/v1\noid sha256:0"), "Git LFS poi"),
    ("x.pth", zipped("archive/constants.pkl"), "a TorchScript archive; save its state_dict"),
    ("x.pth", zipped("readme.txt"), "a zip archive without tensors"),
    ("x.safetensors", written(b"\x10\0\0\0\0\0\0\0 garbage"), "is no safetensors file: "),
    ("x.pth", lambda p: p.mkdir(), "expected a file, got the folder"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "message"), WRONG_FILES)
def test_files_that_are_no_checkpoint(
    name: str, write: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    write(path)
    with pytest.raises(ValueError, match=f"weights: .*{message}"):
        models.resnet20(weights=path)
    assert not os.path.exists("/tmp/fastcnn-was-here")


def test_no_file_at_all() -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file DEFAULT; .* nothing is downl"):
        models.resnet18(weights="DEFAULT")
    with pytest.raises(TypeError, match=r"weights: expected the path .*, got ResNet18_Weights"):
        models.resnet18(weights=torchvision.models.ResNet18_Weights.DEFAULT)
