"""What an error really is, in whatever form a library brings it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from tokenizers import Tokenizer

from einfold.errors import (
    DiskError,
    EinfoldError,
    ModelError,
    OutOfMemoryError,
    first_line,
    pass_on,
    stop_on,
)


def wrapped(error: BaseException) -> Exception:
    """A library's error whose cause is another."""
    try:
        raise RuntimeError("it went wrong") from error
    except RuntimeError as outer:
        return outer


def in_context(error: BaseException) -> Exception:
    """An error that came up while another was handled."""

    def inner() -> None:
        try:
            raise error
        except BaseException:
            [][1]

    try:
        inner()
    except IndexError as outer:
        return outer
    raise AssertionError


def renamed(error: Exception) -> None:
    """As a wrapper of ours renames what it caught."""
    try:
        raise error
    except Exception as caught:
        pass_on(caught)
        raise ModelError(first_line(caught)) from caught


@pytest.mark.parametrize("form", [wrapped, in_context])
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(143)])
def test_a_stop_passes_through_whatever_was_made_of_it(
    stop: BaseException, form: Callable[[BaseException], Exception]
) -> None:
    with pytest.raises(type(stop)) as met:
        renamed(form(stop))
    assert met.value is stop
    with pytest.raises(type(stop)):
        stop_on(form(stop))


def test_a_stop_that_pybind_put_into_words() -> None:
    with pytest.raises(KeyboardInterrupt):
        renamed(RuntimeError("KeyboardInterrupt: <EMPTY MESSAGE>\n\nAt:\n  file.py(3): f"))
    with pytest.raises(ModelError, match="pressed KeyboardInterrupt"):
        renamed(RuntimeError("somebody pressed KeyboardInterrupt"))


def test_what_the_caller_was_handling_is_no_cause() -> None:
    """A program that was interrupted, or met an error, may call us while it cleans up."""
    for before in (KeyboardInterrupt(), MemoryError(), OSError(errno.ENOSPC, "full")):
        try:
            raise before
        except BaseException:
            with pytest.raises(ModelError, match="unknown key"):
                renamed(ValueError("unknown key"))


def too_much_numpy() -> object:
    return np.empty(1 << 55, np.uint8)


def too_much_torch() -> object:
    return torch.empty(1 << 55, dtype=torch.uint8)


def too_much_inside_an_onnx_graph() -> object:
    import onnx_ir as ir

    size = ir.Input("n", ir.Shape([1]), ir.TensorType(ir.DataType.INT64))
    fill = ir.node("ConstantOfShape", [size])
    fill.outputs[0].name = "y"
    fill.outputs[0].dtype, fill.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(["n"])
    graph = ir.Graph([size], fill.outputs, nodes=[fill], opset_imports={"": 21}, name="g")
    proto = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(proto).run(None, {"n": np.array([1 << 53])})


@pytest.mark.parametrize(
    "demand", [too_much_numpy, too_much_torch, too_much_inside_an_onnx_graph, None]
)
def test_memory_that_a_library_does_not_get(demand: Callable[[], object] | None) -> None:
    error: Exception = OSError(errno.ENOMEM, "Cannot allocate memory")
    if demand is not None:
        with pytest.raises(Exception) as met:  # noqa: PT011  # each library has its own
            demand()
        error = met.value
    for form in (error, wrapped(error), in_context(error)):
        with pytest.raises(OutOfMemoryError) as told:
            renamed(form)
        assert told.value.exit_code == 12
        assert isinstance(told.value, MemoryError)
    stop_on(error)


@pytest.mark.parametrize(
    "error",
    [
        ImportError("/lib/x.so: failed to map segment from shared object"),
        RuntimeError("can't start new thread"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_memory_for_libraries_and_threads(error: Exception) -> None:
    with pytest.raises(OutOfMemoryError):
        renamed(error)


def full_torch() -> None:
    with open(
        "/dev/full", "wb"
    ) as file:  # by name a library might put a file in the device's place
        torch.save({"x": torch.zeros(1 << 20)}, file)


def full_numpy() -> None:
    with open("/dev/full", "wb") as file:
        np.zeros(1 << 20).tofile(file)


def full_python() -> None:
    with open("/dev/full", "w") as file:
        file.write("text")


@pytest.mark.parametrize("write", [full_torch, full_numpy, full_python])
def test_a_full_disk_in_each_library(write: Callable[[], None]) -> None:
    with pytest.raises(Exception) as met:  # noqa: PT011
        write()
    with pytest.raises(DiskError, match="disk is full") as told:
        renamed(met.value)
    assert told.value.exit_code == 74


def forbidden_tokenizer(path: str) -> object:
    return Tokenizer.from_file(path)


def forbidden_onnx(path: str) -> object:
    return ort.InferenceSession(path)


def forbidden_safetensors(path: str) -> object:
    from safetensors import safe_open

    return safe_open(path, "pt")


@pytest.mark.parametrize("read", [forbidden_tokenizer, forbidden_onnx, forbidden_safetensors])
def test_a_file_that_may_not_be_read(read: Callable[[str], object], tmp_path: Any) -> None:
    """What each library says of it is told apart from a damaged file."""
    path = tmp_path / "file"
    path.write_bytes(b"{}")
    path.chmod(0)
    try:
        read(str(path))
        raise AssertionError("it was read")
    except Exception as error:
        if os.access(path, os.R_OK):
            pytest.skip("root may read every file")
        with pytest.raises(DiskError, match="ermission denied"):
            renamed(error)


@pytest.mark.parametrize(
    "said",
    [
        "Permission denied (os error 13)",
        "Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: .. })",
        "Load model from /m/model.onnx failed: open file failed, errno 13",
        "Load model /m/model.onnx failed. File open: system error: Permission denied",
    ],
)
def test_refusals_of_the_system_in_words(said: str) -> None:
    with pytest.raises(DiskError):
        renamed(RuntimeError(said))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "x"),
        IsADirectoryError(errno.EISDIR, "Is a directory", "x"),
        RuntimeError("No such file or directory (os error 2)"),
        ValueError("a memory of 3 layers"),
        # A library that goes on behind a file it may not read, and then fails for another reason.
        wrapped(PermissionError(errno.EACCES, "Permission denied")),
    ],
)
def test_other_errors_are_left_to_the_wrapper(error: Exception) -> None:
    with pytest.raises(ModelError):
        renamed(error)


def test_a_sentence_of_ours_that_quotes_another_error_is_kept() -> None:
    error = ModelError("cannot read it: Permission denied (os error 13)")
    pass_on(error)
    with pytest.raises(DiskError):
        renamed(DiskError("full"))
    assert issubclass(DiskError, EinfoldError) and issubclass(DiskError, OSError)
