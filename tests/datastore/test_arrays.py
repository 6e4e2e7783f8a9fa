"""Reading .npy files: what numpy writes is read, and nothing that is damaged is taken for another array."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.datastore.arrays import open_array
from knnlm.errors import DatastoreCorrupt


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<i4", "<i8"])
@pytest.mark.parametrize("shape", [(0,), (5,), (0, 3), (1, 1), (4, 3), (70_000, 2)])
def test_what_numpy_writes_is_mapped(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    array: npt.NDArray[np.generic] = np.random.default_rng(0).integers(0, 99, shape).astype(dtype)
    np.save(tmp_path / "a.npy", array)
    mapped = open_array(tmp_path / "a.npy", shape, dtype)
    assert isinstance(mapped, np.memmap)
    assert not mapped.flags.writeable
    np.testing.assert_array_equal(mapped, array)
    assert mapped.dtype == np.dtype(dtype)


@pytest.mark.parametrize("shape", [(40,), (8, 5)])
def test_every_flipped_bit_of_a_header_is_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.zeros(shape, "<i4"))
    sound = file.read_bytes()
    for at in range(128):
        for bit in range(8):
            damaged = bytearray(sound)
            damaged[at] ^= 1 << bit
            file.write_bytes(bytes(damaged))
            with pytest.raises(DatastoreCorrupt, match=r"a\.npy .*expected int32 of shape \("):
                open_array(file, shape, "<i4")


def test_a_header_that_ends_early_would_shift_every_number(tmp_path: Path) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.arange(40, dtype="<i4"))
    data = bytearray(file.read_bytes())
    data[8] -= 4  # the length of the header, whose end is now read as the first number...
    data[123] = 10  # ...and which ends as a header does
    file.write_bytes(bytes(data))
    with pytest.raises(DatastoreCorrupt, match=r"a\.npy has 288 bytes, of which 124 are its header"):
        open_array(file, (40,), "<i4")


@pytest.mark.parametrize("size", [-1, 1])
def test_a_file_of_another_size_is_refused(tmp_path: Path, size: int) -> None:
    file = tmp_path / "a.npy"
    np.save(file, np.arange(40, dtype="<i4"))
    file.write_bytes((file.read_bytes() + b"\0")[: 288 + size])
    with pytest.raises(DatastoreCorrupt, match=rf"has {288 + size} bytes, of which 128 are its header"):
        open_array(file, (40,), "<i4")


def test_another_order_of_rows_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(np.zeros((4, 3), "<i4")))
    with pytest.raises(DatastoreCorrupt, match=r"of shape \(4, 3\), in the order of Fortran, expected int32"):
        open_array(tmp_path / "a.npy", (4, 3), "<i4")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatastoreCorrupt, match=r"a\.npy cannot be read as an array: .*No such file"):
        open_array(tmp_path / "a.npy", (4,), "<i4")
