"""Pickles of arrays: every protocol is read, and nothing else is built, called or imported."""

from __future__ import annotations

import collections
import decimal
import os
import pickle
import pickletools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from inlaid.media import pickled
from inlaid.media.meshes import read_surface
from inlaid.media.pickled import UnsafePickleError, unpickle

RNG = np.random.default_rng(0)
POINTS = RNG.uniform(-0.5, 0.5, (300, 3)).astype(np.float32)
NORMALS = (lambda n: n / np.linalg.norm(n, axis=-1, keepdims=True))(RNG.normal(size=(300, 3)))
BOTH = np.concatenate([POINTS, NORMALS.astype(np.float32)], -1)

VALUES: dict[str, Any] = {
    "dict": {"surface_points": POINTS, "surface_normals": np.asfortranarray(NORMALS)},
    "plain values": {"a": [1, -2.5, "x", None, True, (1, 2), 10**30], "b": {}, "c": b"\x00\xff", "": ()},
    "types": [np.arange(4, dtype=">i2"), np.float16(2), np.array(["a", "bc"]), np.zeros((0, 3)), np.array(7)],
    "shared": (lambda x: {"a": x, "b": [x, x]})(np.arange(3.0)),
}


def same(a: Any, b: Any) -> bool:
    if isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(b, (np.ndarray, np.generic)):
        return np.array_equal(a, b) and np.asarray(a).dtype == b.dtype
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", VALUES)
def test_every_protocol_is_read(name: str, protocol: int) -> None:
    assert same(unpickle(pickle.dumps(VALUES[name], protocol)), VALUES[name])
    inside = np.array(VALUES[name], dtype=object) if isinstance(VALUES[name], dict) else None
    if inside is not None:
        assert same(unpickle(pickle.dumps(inside, protocol)), VALUES[name])


def test_object_arrays_of_numbers_become_arrays() -> None:
    found = unpickle(pickle.dumps(POINTS.astype(object)))
    assert found.dtype == np.float64 and np.array_equal(found, POINTS)


def test_pickles_of_python_2_are_read() -> None:
    text = (
        b"(dp0\nS'surface_points'\np1\ncnumpy.core.multiarray\n_reconstruct\np2\n(cnumpy\nndarray\np3\n(I0\ntp4\n"
        b"S'b'\np5\ntp6\nRp7\n(I1\n(I2\nI3\ntp8\ncnumpy\ndtype\np9\n(S'f4'\np10\nI0\nI1\ntp11\nRp12\n(I3\nS'<'\n"
        b"p13\nNNNI-1\nI-1\nI0\ntp14\nbI00\nS'" + b"\\x00\\x00\\x80?" * 6 + b"'\np15\ntp16\nbs."
    )
    assert np.array_equal(unpickle(text)["surface_points"], np.ones((2, 3)))


class Touch:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("opened"),)


class State:
    def __init__(self) -> None:
        self.x = 1


HARMFUL: dict[str, Any] = {
    "a call": Touch(),
    "a call in a dict": {"surface_points": Touch()},
    "a call in an object array": np.array([Touch()], dtype=object),
    "an object": State(),
    "a function": print,
    "a system call": os.system,
    "a class": dict,
    "a subclass of dict": collections.OrderedDict(a=1),
    "another number": decimal.Decimal(1),
    "a generator": np.random.default_rng(0),
    "an element type": np.dtype("f4"),
    "a path": Path("x"),
    "a set": {1},
}


@pytest.mark.parametrize("name", HARMFUL)
def test_everything_else_is_refused_and_not_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(HARMFUL[name], protocol)
        with pytest.raises(UnsafePickleError):
            unpickle(data)
        (tmp_path / "s.npy").write_bytes(data)
        with pytest.raises(ValueError, match=r"s\.npy"):
            read_surface(tmp_path / "s.npy")
    assert not Path("opened").exists()


OPCODES = (b"i__builtin__\nprint\n", b"(cos\nsystem\no", b"\x8c\x02os\x8c\x06system\x93)\x81", b"\x82\x01",
           b"P1\n", b"N\x8c\x01xQ", b"(c__builtin__\neval\nS'1'\ntR", b"\x97")  # fmt: skip


@pytest.mark.parametrize("code", OPCODES)
def test_other_instructions_are_refused(code: bytes) -> None:
    with pytest.raises(UnsafePickleError):
        unpickle(b"\x80\x04" + code + b".")


def test_no_instruction_is_forgotten() -> None:
    known = {*pickled._VALUES, *pickled._CONSTANTS, *pickled._ACTIONS, "PROTO", "FRAME", "STOP"}
    refused = {o.name for o in pickletools.opcodes} - known
    assert refused == {
        *("PERSID", "BINPERSID", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"),
        *("NEXT_BUFFER", "READONLY_BUFFER", "EMPTY_SET", "ADDITEMS", "FROZENSET"),
    }


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\x80\x04", b"junk", b"\x80\x04.", b"\x80\x04l.", b"\x80\x04]e.", b"\x80\x04h\x05."),
        *(b"\x80\x04Nb.", pickle.dumps(VALUES["dict"])[:-200], pickle.dumps(VALUES["dict"])[:40]),
    ],
)
def test_damaged_pickles_are_errors(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"pickle|stream|remain"):
        unpickle(data)


def test_bombs_end_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    start, bomb, cycle = time.perf_counter(), [1.0], []
    for _ in range(200):  # 2**200 elements, if references were followed one by one
        bomb = [bomb, bomb]
    cycle.append(cycle)
    unpickle(pickle.dumps(bomb))
    with pytest.raises(ValueError, match="contains itself"):
        unpickle(pickle.dumps(cycle))
    unpickle(b"\x80\x04Nr\xff\xff\xff\x7f.")  # index 2**31 of the memo
    claim = pickle.dumps(np.zeros(2)).replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85")
    with pytest.raises(ValueError, match=r"shape \(2147483647,\) with another number of bytes"):
        unpickle(claim)
    monkeypatch.setenv("INLAID_MAX_POINTS", "100")
    with pytest.raises(ValueError, match="more than 800 values"):
        unpickle(pickle.dumps([0.5] * 1000))
    assert time.perf_counter() - start < 2


# --- surfaces -----------------------------------------------------------------------------------------------


def test_surfaces_in_every_container(tmp_path: Path) -> None:
    path, archive = tmp_path / "s.npy", tmp_path / "s.npz"
    value = VALUES["dict"]
    for content in (value, np.array([value], dtype=object), np.array(value, dtype=object), [value]):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            path.write_bytes(pickle.dumps(content, protocol))
            (found,) = read_surface(path)
            assert np.allclose(found.points, BOTH, atol=1e-6)
        np.save(path, content, allow_pickle=True)
        assert np.allclose(read_surface(path)[0].points, BOTH, atol=1e-6)
        np.savez(archive, surface=np.array(content, dtype=object))
        assert np.allclose(read_surface(archive)[0].points, BOTH, atol=1e-6)
    np.savez_compressed(archive, **value, other=np.zeros(3))
    assert np.allclose(read_surface(archive)[0].points, BOTH, atol=1e-6)
    np.savez(archive, surface_points=POINTS.astype(object), surface_normals=NORMALS)
    assert np.allclose(read_surface(archive)[0].points, BOTH, atol=1e-6)
    path.write_bytes(pickle.dumps(BOTH.tolist(), 0))
    assert np.allclose(read_surface(path)[0].points, BOTH, atol=1e-6)


def test_object_arrays_hold_surfaces_of_different_lengths(tmp_path: Path) -> None:
    ragged = np.empty(2, dtype=object)
    ragged[:] = [BOTH, BOTH[:100]]
    np.save(tmp_path / "s.npy", ragged, allow_pickle=True)
    assert [len(s.points) for s in read_surface(tmp_path / "s.npy")] == [300, 100]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"points": POINTS}, "has no array surface_points; its arrays are: points"),
        ({"surface_points": POINTS, "surface_normals": NORMALS[:10]}, "does not match surface_points"),
        ({"surface_points": POINTS.astype(complex)}, "unsupported type 'c16'"),
        ({"surface_points": "x"}, "a surface must be"),
        ([[0.0, 1.0], [2.0]], "cannot be read"),
        (np.array([None, None]), "a surface must be"),
    ],
)
def test_other_content_is_named(content: Any, says: str, tmp_path: Path) -> None:
    (tmp_path / "s.npy").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=says) as error:
        read_surface(tmp_path / "s.npy")
    assert "s.npy" in str(error.value)
