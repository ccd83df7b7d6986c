"""features_only against timm's: the same maps from timm's own checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracles import timm
from support.seeds import seeded
from support.tolerance import assert_same
from support.zoo import CLASSIFIERS, QUICK, fill, pair, slow_but
from torch import nn

from fastcnn.models import FeatureInfo, Features, create_model, unet

# Our name; timm's, the size of images, options of ours. timm's inception_v3 has no AuxLogits.
TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {
    "resnet18": ("resnet18", 65, {}),
    "resnext50_32x4d": ("resnext50_32x4d", 65, {}),
    "wide_resnet50_2": ("wide_resnet50_2", 65, {}),
    "densenet121": ("densenet121", 65, {}),
    "mobilenet_v2": ("mobilenetv2_100", 65, {}),
    "inception_v3": ("inception_v3", 107, {"aux_logits": False}),
    "vgg11_bn": ("vgg11_bn", 224, {}),  # timm's head is a 7x7 convolution: no other size agrees
}


def timms(name: str, **options: Any) -> nn.Module:
    """timm's network, filled without drawing its initial weights."""
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    model.to_empty(device="cpu")
    fill(model)
    return model.eval()


@pytest.mark.parametrize("ours", slow_but({"resnet18", "mobilenet_v2"}, TIMM))
@torch.no_grad()
def test_timms_checkpoint(ours: str, tmp_path: Path) -> None:
    theirs, size, options = TIMM[ours]
    whole = timms(theirs, num_classes=7)
    path = tmp_path / "timm.pth"
    torch.save(whole.state_dict(), path)
    x = torch.randn(2, 3, size, size, dtype=torch.float64, generator=seeded(0))

    model = create_model(ours, num_classes=7, weights=path, **options).double().eval()
    assert_same(model(x), whole.double()(x), floor=0.0)

    # timm's own features_only flattens the names of sequential layers: their order is the same.
    expected = timm.create_model(theirs, features_only=True).double()
    for target, source in zip(
        expected.state_dict().values(), whole.state_dict().values(), strict=False
    ):
        target.copy_(source)
    features = Features(model).eval()
    maps = features(x)
    assert features.feature_info.channels() == expected.feature_info.channels()
    assert features.feature_info.reduction() == expected.feature_info.reduction()
    assert_same(maps, expected.eval()(x), floor=0.0)


@pytest.mark.parametrize("name", slow_but(QUICK, CLASSIFIERS))
def test_channels_and_reductions_are_what_comes_out(name: str) -> None:
    with torch.device("meta"):
        features = create_model(name, features_only=True, in_chans=2).eval()
        # So large that the border that unpadded layers lose is nothing.
        maps = features(torch.empty(1, 2, 2**17, 2**17))
    assert isinstance(features, Features)
    assert [y.shape[1] for y in maps] == features.feature_info.channels()
    assert [round(2**17 / y.shape[-1]) for y in maps] == features.feature_info.reduction()


@pytest.mark.parametrize("name", slow_but({"resnet18"}, ["densenet121", "resnet18", "googlenet"]))
def test_keys_and_weights_are_the_networks(name: str, tmp_path: Path) -> None:
    _, whole = pair(name)
    state = whole.state_dict()
    path = tmp_path / "whole.pth"
    torch.save(state, path)
    # Its classes do not matter, as they do not come along.
    features = create_model(name, features_only=True, weights=path)
    kept = [key for key in state if not key.startswith(("fc.", "classifier.", "aux"))]
    assert list(features.state_dict()) == kept
    assert all(torch.equal(value, state[key]) for key, value in features.state_dict().items())
    # What a features_only network saved goes back into one.
    torch.save(features.state_dict(), path)
    create_model(name, features_only=True, weights=path)
    create_model(name, features_only=True, out_indices=(0,), weights=path)


def test_dilated_stages_keep_their_resolution() -> None:
    dilated = {"replace_stride_with_dilation": (False, True, True)}
    features = create_model("resnet50", features_only=True, **dilated)
    expected = timm.create_model("resnet50", features_only=True, output_stride=8)
    assert features.feature_info.reduction() == expected.feature_info.reduction()
    assert features(torch.randn(1, 3, 64, 64))[-1].shape == (1, 2048, 8, 8)


@pytest.mark.parametrize("out_indices", [(1, 3), (-1,), (-3, -1), 2, None])
def test_out_indices(out_indices: Any) -> None:
    features = create_model("resnet18", features_only=True, out_indices=out_indices)
    expected = timm.create_model(
        "resnet18", features_only=True, out_indices=range(5) if out_indices is None else out_indices
    )
    info = features.feature_info
    assert info.channels() == expected.feature_info.channels()
    assert info.module_name()[-1] == expected.feature_info.module_name()[-1]
    assert info.channels(0) == 64
    assert info.reduction([0, 4]) == [2, 32]
    assert info[1] == {"num_chs": 64, "reduction": 4, "module": "layer1"}
    assert len(info) == 5
    shapes = [y.shape for y in features(torch.randn(1, 3, 64, 64))]
    assert shapes == [y.shape for y in expected(torch.randn(1, 3, 64, 64))]
    # Stages that no map needs are gone.
    last = max(info.out_indices)
    assert hasattr(features, "layer4") == (last == 4)


@pytest.mark.parametrize("out_indices", [(5,), (-6,), (), 6, 0])
def test_out_indices_out_of_range(out_indices: Any) -> None:
    with pytest.raises(ValueError, match=r"out_indices: expected None, .* from -5 to 4, got"):
        create_model("resnet18", features_only=True, out_indices=out_indices)


def test_gradients_flow_from_every_map() -> None:
    features = create_model("vgg11", features_only=True)
    x = torch.randn(1, 3, 32, 32, requires_grad=True)
    torch.autograd.backward([y.sum() for y in features(x)])
    assert x.grad is not None
    assert all(p.grad is not None for p in features.parameters())


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"out_indices: expected None without features_only"):
        create_model("resnet18", out_indices=(1,))
    with pytest.raises(ValueError, match=r"features_only: UNet has no feature maps"):
        create_model("unet", features_only=True)
    with pytest.raises(ValueError, match=r"features_only: Features has no feature maps"):
        Features(create_model("resnet18", features_only=True))
    assert not isinstance(unet(depth=1, width=2).feature_info, FeatureInfo)
