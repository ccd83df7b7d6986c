"""The zoo against torchvision: keys, initial weights, outputs and gradients, bit for bit."""

import copy
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import conversions
from support.conversions import images, patterns
from support.oracles import torchvision
from support.paths import ROOT
from support.seeds import seed_all
from support.tolerance import assert_same
from support.zoo import (
    CLASSIFIERS,
    QUICK,
    SEGMENTERS,
    ZOO,
    assert_identical,
    fill,
    ours,
    outputs,
    pair,
    results,
    slow_but,
    theirs,
)
from torch import nn

from fastcnn import models, revert
from fastcnn.models.registry import architecture

FAMILIES = ["alexnet", "vgg11_bn", "resnet18", "googlenet", "inception_v3",
            "mobilenet_v2", "densenet121", "fcn_resnet50", "unet_resnet18"]  # fmt: skip

# The same code as smaller ones with other numbers, which the keys and shapes of weights show.
LARGER = {
    "vgg13", "vgg13_bn", "vgg16", "vgg16_bn", "vgg19", "vgg19_bn", "resnet101", "resnet152",
    "resnext101_32x8d", "wide_resnet101_2", "fcn_resnet101", "unet_resnet101", "unet_resnet152",
}  # fmt: skip

# Options of torchvision's constructors that change keys or arithmetic.
OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("resnet50", {"replace_stride_with_dilation": [False, True, True]}),
    ("resnet18", {"norm_layer": lambda channels: nn.GroupNorm(2, channels)}),
    ("mobilenet_v2", {"width_mult": 0.5, "dropout": 0.5}),
    ("mobilenet_v2", {"inverted_residual_setting": [[1, 16, 1, 1], [4, 24, 2, 2]]}),
    ("densenet121", {"block_config": (2, 3), "growth_rate": 8, "drop_rate": 0.3}),
    ("densenet121", {"block_config": (2, 3), "memory_efficient": True}),
    ("googlenet", {"transform_input": True, "aux_logits": False}),
    ("inception_v3", {"transform_input": True, "aux_logits": False}),
    ("fcn_resnet50", {"aux_loss": True}),
]


@pytest.mark.parametrize("name", slow_but(ZOO.keys() - LARGER, ZOO))
def test_keys_shapes_and_types(name: str) -> None:
    with torch.device("meta"):
        actual, expected = ours(name, 7).state_dict(), theirs(name, 7).state_dict()
    # Order too: optimizers and checkpoints of flat parameter lists depend on it.
    assert [(k, v.shape, v.dtype) for k, v in actual.items()] == [
        (k, v.shape, v.dtype) for k, v in expected.items()
    ]


ZERO_INIT = {"resnet18", "resnet50"}  # with the option zero_init_residual: each kind of block


@pytest.mark.parametrize(
    "name",
    slow_but({"resnet18", "resnet50", "mobilenet_v2", "densenet121"}, [*FAMILIES, "resnet50"]),
)
def test_same_seed_gives_the_same_initial_weights(name: str) -> None:
    # Somebody who switches a training script to fastcnn repeats the same experiment.
    options = {"zero_init_residual": True} if name in ZERO_INIT else {}
    seed_all(0)
    actual = ours(name, 7, **options).state_dict()
    seed_all(0)
    expected = theirs(name, 7, **options).state_dict()
    assert_identical(actual, expected)


@pytest.mark.parametrize("name", slow_but(QUICK, [name for name in ZOO if name not in LARGER]))
def test_training_and_evaluation(name: str) -> None:
    actual, expected = pair(name)
    size = ZOO[name]
    x = torch.randn(2, 3, size, size - 1 if name in SEGMENTERS else size)
    # Training first: evaluation then has the statistics that it left.
    assert_identical(results(actual, x), results(expected, x))
    with torch.no_grad():
        y = outputs(actual.eval()(x)), outputs(expected.eval()(x))
    assert_identical(*y)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options(name: str, options: dict[str, Any]) -> None:
    actual, expected = pair(name, **options)
    x = torch.randn(2, 3, 75, 75)
    assert_identical(results(actual, x), results(expected, x))


def test_auxiliary_outputs_have_torchvisions_names() -> None:
    for name in ("GoogLeNetOutputs", "InceptionOutputs"):
        expected = getattr(torchvision.models, name)
        assert getattr(models, name).__name__ == expected.__name__
        assert getattr(models, name)._fields == expected._fields


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_transform_input_wants_colours(name: str) -> None:
    with pytest.raises(ValueError, match="transform_input: expected in_chans=3 beside it, got 1"):
        models.create_model(name, in_chans=1, transform_input=True)


@pytest.mark.parametrize(
    ("init", "deviation"), [("kaiming", 2**0.5), ("xavier", 1.0), ("normal", 0.24), ("zeros", 0.0)]
)
@pytest.mark.parametrize(("name", "conv"), [("resnet18", "layer1.0.conv1"), ("unet", "stem.3")])
def test_init(name: str, conv: str, init: str, deviation: float) -> None:
    model = models.create_model(name, init=init, **({"depth": 1} if name == "unet" else {}))
    # A 3x3 convolution with as many inputs as outputs, where all fans are 9 * 64 = 24^2. 36864
    # draws: their deviation is known to 0.4 %, one in a million misses 2 %.
    std = model.get_submodule(conv).weight.std().item()
    assert std * 24 == pytest.approx(deviation, rel=0.02)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
            assert not module.bias.any()
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()


def test_init_is_one_of_four() -> None:
    with pytest.raises(ValueError, match=r"init: expected one of kaiming, .*, got 'orthogonal'"):
        models.resnet18(init="orthogonal")


@pytest.mark.parametrize("name", slow_but(QUICK, CLASSIFIERS))
def test_input_channels_and_classes(name: str) -> None:
    with torch.device("meta"):
        model = models.create_model(name, num_classes=3, in_chans=5).eval()
        y = model(torch.empty(1, 5, 299, 299))
    assert y.shape == (1, 3)


def test_list_models() -> None:
    assert set(models.list_models()) > set(ZOO)
    assert models.list_models("resnet?0") == ["resnet20", "resnet50"]
    expected = ["fcn_resnet50", "fcn_resnet101", "vgg11", "vgg11_bn"]
    assert models.list_models(["fcn_*", "vgg11*"]) == expected
    assert models.list_models("vit*") == []
    assert all(callable(getattr(models, name)) for name in models.list_models())


# VGG takes 14 seconds, and nothing in it differs from the others'.
@pytest.mark.parametrize(
    "name",
    slow_but({"resnet18", "resnet20"}, [*FAMILIES[2:], "unet", "resnet20"]),
)
def test_builders_convert(name: str) -> None:
    """The kernels compute what the plain network does, in training."""
    with torch.device("meta"):
        model = models.create_model(name, num_classes=10)
    fill(model.to_empty(device="cpu"))
    model.double()
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0  # other masks than PyTorch's from the same seed
    plain = revert(copy.deepcopy(model))
    assert patterns(model)
    x = images(2, 3, *[ZOO.get(name, 32)] * 2)
    assert_same(conversions.results(model, x), conversions.results(plain, x))


@pytest.mark.parametrize("name", slow_but({"resnet18", "unet"}, [*FAMILIES, "unet", "resnet20"]))
def test_copies(name: str) -> None:
    with torch.device("meta"):
        model = models.create_model(name)
        features = models.Features(model) if model.feature_info else model
    for original in (model, features):
        for again in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
            assert type(revert(again)) is type(revert(original))
            assert list(again.state_dict()) == list(original.state_dict())
            assert again.rename("classifier.weight") == original.rename("classifier.weight")


def test_parameter_counts_are_the_documented() -> None:
    table = (ROOT / "docs/models.md").read_text()
    documented = {}
    for names, counts in re.findall(r"^\| (`.*?`) \| ([\d., ]+) \|", table, re.MULTILINE):
        documented |= zip(re.findall(r"`(\w+)`", names), re.findall(r"[\d.]+", counts), strict=True)
    assert documented.keys() == set(models.list_models())
    for name, millions in documented.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in architecture(name).parameters())
        digits = len(millions.split(".")[1])
        assert f"{count / 1e6:.{digits}f}" == millions, name
        assert f"{millions}M" in getattr(models, name).__doc__ or name.startswith("plain"), name


def test_unknown_model() -> None:
    for name in ("resnet51", "ResNet50"):  # those that are called alike
        with pytest.raises(
            ValueError, match=rf"name: expected one of fcn_resnet50, .*resnet50, .*, got '{name}'$"
        ):
            models.create_model(name)
    for name in ("vit_b", ""):
        with pytest.raises(
            ValueError, match=rf"name: expected one of alexnet, .*, wide_resnet101_2, got '{name}'$"
        ):
            models.create_model(name)
    with pytest.raises(TypeError, match=r"^create_model: name: expected a str, got int$"):
        models.create_model(50)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [3, None, ["resnet*", 3]])
def test_a_filter_that_is_no_pattern(given: Any) -> None:
    with pytest.raises(
        TypeError, match=r"^list_models: filter: expected a str or several, got (int|NoneType|list)"
    ):
        models.list_models(given)


@pytest.mark.parametrize("count", [0, -1, "10", 2.0])
def test_counts(count: Any) -> None:
    with pytest.raises(
        ValueError, match=f"num_classes: expected an integer above 0, got {count!r}"
    ):
        models.create_model("resnet18", num_classes=count)
    with pytest.raises(ValueError, match=f"in_chans: expected an integer above 0, got {count!r}"):
        models.resnet18(in_chans=count)


TRAINED: dict[str, Callable[[], Any]] = {
    "timm's second argument": lambda: models.create_model("resnet50", True),
    "pretrained": lambda: models.create_model("resnet50", pretrained=True),
    "not pretrained": lambda: models.create_model("resnet50", pretrained=False),
    "a builder's first argument": lambda: models.resnet50(True),
    "a builder's pretrained": lambda: models.resnet50(pretrained=True),
    "in the weights' place": lambda: models.resnet50(weights=True),
}


@pytest.mark.parametrize("call", TRAINED)
def test_trained_weights_are_asked_for_as_elsewhere(call: str) -> None:
    with pytest.raises(
        TypeError, match=r"path of a local \.pth or \.safetensors.*nothing is downloaded"
    ) as caught:
        TRAINED[call]()
    assert re.search("got (bool )?(True|False)", str(caught.value))


@pytest.mark.parametrize("name", [*FAMILIES, "unet", "resnet50"])
def test_traceable(name: str) -> None:
    # Converting finds its patterns in this graph.
    with torch.device("meta"):
        torch.fx.symbolic_trace(architecture(name))
