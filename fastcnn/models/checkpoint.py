"""Reading checkpoint files: a dict of tensors, or a sentence that says what the file is instead."""

import os
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["WEIGHTS", "PathLike", "read_state_dict"]

PathLike = str | os.PathLike[str]

# What weights= takes, where somebody looked for trained weights elsewhere.
WEIGHTS = (
    "weights= takes the path of a local .pth or .safetensors, torchvision's or timm's too; nothing "
    "is downloaded"
)

# What a file that was meant to be a checkpoint often is.
_BEGINNINGS = {
    b"version https://git-lfs": "a Git LFS pointer, the file itself was not downloaded",
    b"<": "a web page or XML",
    b"{": "JSON",
    b"\x1f\x8b": "a gzip archive",
    b"\x89PNG": "an image",
    b"\xff\xd8": "an image",
    b"\x89HDF": "HDF5, as Keras writes",
}
_WRAPPERS = ("state_dict", "model_state_dict", "model")  # of training scripts
_PREFIXES = ("module.", "_orig_mod.", "model.")  # DistributedDataParallel, compile, Lightning


def read_state_dict(path: PathLike) -> dict[str, Tensor]:
    """Read the tensors of a .pth or .safetensors by their keys, on the CPU; no code is run.

    {"state_dict": ...}, {"model": ...} and prefixes of all keys ("module.") are taken off.

    Raises:
        TypeError: `path` is no path.
        FileNotFoundError: nothing is there.
        ValueError: a folder, no checkpoint, a pickle that would run code, or no state_dict in it.
        ImportError: a .safetensors without the package safetensors.
    """
    try:
        path = Path(path)
    except TypeError:
        raise TypeError(
            "weights: expected the path of a local .pth or .safetensors, got "
            f"{type(path).__name__} {path}; nothing is downloaded"
        ) from None
    if path.is_dir():
        raise ValueError(f"weights: expected a file, got the folder {path}")
    if not path.exists():
        raise FileNotFoundError(
            f"weights: there is no file {path}; expected a local .pth or .safetensors, nothing is "
            "downloaded"
        )
    _refuse_other_formats(path)
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    for key in _WRAPPERS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"weights: {path} holds no state_dict but {_described(loaded)}")
    strangers = [k for k, v in loaded.items() if not (isinstance(k, str) and isinstance(v, Tensor))]
    if strangers:
        raise ValueError(
            f"weights: {path} holds no state_dict: {_described(loaded)}, where {strangers[0]!r} is "
            f"{type(loaded[strangers[0]]).__name__}, no Tensor"
        )
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in loaded)), ""):
        loaded = {key.removeprefix(prefix): value for key, value in loaded.items()}
    return loaded


def _refuse_other_formats(path: Path) -> None:
    start = _start(path)
    what = "empty" if not start else ""
    for beginning, name in _BEGINNINGS.items():
        if start.startswith(beginning):
            what = name
    if zipfile.is_zipfile(path):
        names = {Path(name).name for name in zipfile.ZipFile(path).namelist()}
        if "constants.pkl" in names:
            what = "a TorchScript archive; save its state_dict() with torch.save"
        elif "data.pkl" not in names:
            what = "a zip archive without tensors"
    if what:
        raise ValueError(f"weights: {path} is no checkpoint but {what}")


def _read_pickle(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # Of pickle protocols that may fail to load; if they do, it is said below.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        names = re.findall(r"GLOBAL (\S+)", str(error))
        if names:
            raise ValueError(
                f"weights: {path} is a pickle that calls {names[0]}, and could run any code; only "
                "tensors are read. Save a state_dict() alone, or, if you trust the file, allow "
                "the name with torch.serialization.add_safe_globals"
            ) from error
        if _start(path).startswith(pickle.PROTO):
            raise ValueError(
                f"weights: {path} is a pickle that torch.save did not write, and could run any "
                "code; only tensors are read. Save a state_dict() with torch.save"
            ) from error
        raise ValueError(f"weights: {path} is no checkpoint: {_first_line(error)}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"weights: {path} is no checkpoint: {_first_line(error)}") from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"weights: {path} needs the package safetensors: pip install 'fastcnn[train]'"
        ) from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"weights: {path} is no safetensors file: {_first_line(error)}") from error


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(32)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _described(loaded: Any) -> str:
    if not isinstance(loaded, dict):
        return type(loaded).__name__
    return f"a dict with the keys {', '.join(map(str, list(loaded)[:5])) or '(none)'}"
