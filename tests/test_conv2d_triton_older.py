"""The interpreter's tests once more, with the Triton that torch 2.11 brings."""

from older_triton import OLDER, run


def test_the_interpreter_of_torch_211() -> None:
    files = [f"test_conv2d{op}_triton.py" for op in ("", "_bwd", "_int8")]
    files.append("test_conv2d_fused.py")
    # torch.compile is of another torch than this Triton, and opcheck says nothing of it. Of the
    # types bfloat16, of the activations ReLU and those that test_every_epilogue has: one test of a
    # minute instead of two.
    others = ["compiled", "opcheck", "dtype0", "dtype2"]
    others += ["gelu", "silu", "sigmoid", "hardswish", "leaky_relu"]
    files += ["-k", " and ".join(f"not {other}" for other in others)]
    # Its interpreter takes the int() of arrays with one number.
    warned = "ignore:Conversion of an array:DeprecationWarning"
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", warned, *files], OLDER)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
