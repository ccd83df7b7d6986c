"""What every network of the zoo says of itself, and its trunk as a feature extractor."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, TypedDict

from torch import Tensor, nn

__all__ = ["Feature", "FeatureInfo", "Features", "Network"]


class Feature(TypedDict):
    """A feature map: its channels, how often the image is larger, the layer that gives it."""

    num_chs: int
    reduction: int
    module: str


def _unchanged(key: str) -> str:
    return key


class Network(nn.Module):
    """A network that create_model builds; with feature_info its children are in forward's order."""

    heads: ClassVar[tuple[str, ...]] = ("fc",)
    """The layers whose outputs are the classes."""

    backbone_name: ClassVar[str] = ""
    """The child that weights_backbone= is for; empty: there is none."""

    auxiliary: tuple[str, ...] = ()
    """Layers that a checkpoint may have and the network lack: heads for training alone."""

    rename: Callable[[str], str] = staticmethod(_unchanged)
    """The name here of a key of other checkpoints: timm's, or torchvision's of earlier days."""

    feature_info: "Sequence[Feature] | FeatureInfo" = ()
    """The last feature map of each resolution, as timm's."""


class FeatureInfo:
    """timm's accessors to feature maps: of those that come out, or of any by index."""

    def __init__(self, info: Sequence[Feature], out_indices: int | Sequence[int] | None) -> None:
        count = len(info)
        if out_indices is None:
            out_indices = count
        if isinstance(out_indices, int):  # as timm: the last so many
            out_indices = range(-out_indices, 0)
        valid = [i for i in out_indices if -count <= i < count]
        if not valid or len(valid) < len(out_indices):
            raise ValueError(
                f"out_indices: expected None, a number of maps, or indices from {-count} to "
                f"{count - 1}, got {out_indices}"
            )
        self.info = list(info)
        self.out_indices = tuple(sorted({i % count for i in valid}))

    def channels(self, idx: int | Sequence[int] | None = None) -> Any:
        """Channels: a list for the maps that come out or those at `idx`, a number for one."""
        return self._get("num_chs", idx)

    def reduction(self, idx: int | Sequence[int] | None = None) -> Any:
        """How often the image is larger, likewise."""
        return self._get("reduction", idx)

    def module_name(self, idx: int | Sequence[int] | None = None) -> Any:
        """The layers that give the maps, likewise."""
        return self._get("module", idx)

    def _get(
        self, what: Literal["num_chs", "reduction", "module"], idx: int | Sequence[int] | None
    ) -> Any:
        if isinstance(idx, int):
            return self.info[idx][what]
        return [self.info[i][what] for i in (self.out_indices if idx is None else idx)]

    def __getitem__(self, index: int) -> Feature:
        return self.info[index]

    def __len__(self) -> int:
        return len(self.info)


class Features(Network):
    """x -> [map, ...]: the trunk of `network` up to the last map asked for.

    x (n, in_chans, h, w); maps (n, channels, about h / reduction, ...) in the network's order,
    described by `feature_info`. The layers are those of `network`, under their keys. `out_indices`
    picks maps by index, from the end where negative; a number is that many of the last; None is
    all. As timm's features_only.

    Raises:
        ValueError: `network` names no feature maps, or out_indices are not among them.
    """

    heads = ()

    def __init__(self, network: Network, out_indices: int | Sequence[int] | None = None) -> None:
        super().__init__()
        known = network.feature_info
        if not known or isinstance(known, FeatureInfo):
            raise ValueError(
                f"features_only: {type(network).__name__} has no feature maps to choose from"
            )
        self.feature_info: FeatureInfo = FeatureInfo(known, out_indices)
        self.taps = self.feature_info.module_name()
        self.rename = network.rename
        dropped, complete = list(network.auxiliary), False
        for name, layer in _trunk(network):
            if complete:
                dropped.append(name)
                continue
            parent, _, leaf = name.rpartition(".")
            if parent and not hasattr(self, parent):
                self.add_module(parent, nn.Sequential())
            self.get_submodule(parent).add_module(leaf, layer)
            complete = name == self.taps[-1]
        self.auxiliary = tuple(dropped)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, layer in _trunk(self):
            x = layer(x)
            if name in self.taps:
                maps.append(x)
        return maps


def _trunk(network: Network) -> Iterator[tuple[str, nn.Module]]:
    """The layers in order, those of a child `features` one by one, without heads for training."""
    for name, child in network.named_children():
        if name in network.auxiliary:
            continue
        if name == "features":
            yield from ((f"features.{leaf}", layer) for leaf, layer in child.named_children())
        else:
            yield name, child
