"""The console command `fastcnn`. Every import that costs time happens inside its subcommand."""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from fastcnn import _C

__all__ = ["main"]

# The packages of the extra [train] that `demo` imports, by the names Python reports as missing.
TRAIN_EXTRA = {"matplotlib", "rich", "sklearn"}


def _positive(text: str) -> int:
    return _at_least(1, text)


def _not_negative(text: str) -> int:
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer from {least} up, got {text!r}")
    return value


def _writable_folder(text: str) -> Path:
    """Make the folder and write into it once: better now than after training."""
    folder = Path(text)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a folder that can be written, got {text!r}: {error.strerror}"
        ) from error
    return folder


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastcnn", description="Fused kernels for convolutional networks in PyTorch."
    )
    parser.add_argument("--version", action="version", version=f"fastcnn {_C.version}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser(
        "demo",
        help="teach a U-Net to read, and compare with the same in plain PyTorch",
        description="Trains a U-Net to read pages of scikit-learn's digits, and the same network "
        "in plain PyTorch in turns with it; compares accuracy, time and memory of both, and writes "
        "summary.json and curves.png.",
    )
    demo.add_argument(
        "--out", type=_writable_folder, default="runs/demo", help="folder to write (%(default)s)"
    )
    demo.add_argument(
        "--epochs", type=_positive, help="passes over the training digits (the recipe's)"
    )
    demo.add_argument(
        "--seed", type=_not_negative, default=0, help="of weights, order and paper (%(default)s)"
    )
    demo.add_argument("--threads", type=_positive, help="CPU threads (PyTorch's choice)")

    commands.add_parser("info", help="what this build can do, and on what machine it runs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; wrong arguments exit with code 2."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command == "info":
        from fastcnn import info

        info.main()
        return 0

    try:
        from fastcnn.train import demo
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in TRAIN_EXTRA:
            raise
        parser.error(f"demo needs the module {module}: pip install 'fastcnn[train]'")
    demo.run(
        arguments.out,
        epochs=arguments.epochs or demo.EPOCHS,
        seed=arguments.seed,
        threads=arguments.threads,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
