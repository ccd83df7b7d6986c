"""The interpreter's tests once more, with the Triton that torch 2.11 brings."""

from older_triton import OLDER, run


def test_the_interpreter_of_torch_211() -> None:
    files = [f"test_conv2d{op}_triton.py" for op in ("", "_bwd", "_int8")]
    # torch.compile is of another torch than this Triton.
    files += ["test_conv2d_fused.py", "--deselect", "test_conv2d_fused.py::test_compiled_whole"]
    # Of the types bfloat16: float32 and float16 take the same ways, and this is one test of 90 s.
    files += ["-k", "not dtype0 and not dtype2"]
    # Its interpreter takes the int() of arrays with one number.
    warned = "ignore:Conversion of an array:DeprecationWarning"
    done = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", warned, *files], OLDER)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
