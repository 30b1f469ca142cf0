"""Safe reader for NumPy data in pickle files.

A pickle is a program: it can call any function of any module. The published surfaces of the 3D-FRONT dataset
are pickles. This module therefore interprets the instructions of a pickle itself. It builds only arrays,
dicts, lists, tuples, texts, bytes, numbers, booleans and None. It refuses everything else, and imports
nothing that a pickle names.
"""

from __future__ import annotations

import codecs
import io
import math
import pickletools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from inlaid import limits

Name = tuple[str, str]
"""Module and name of a function or class in a pickle."""

NUMPY = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")

ARRAY_CLASSES = frozenset(
    [("numpy", "ndarray"), ("trimesh.caching", "TrackedArray"), ("trimesh.base", "TrackedArray")]
)
"""Array classes that pickles name. They are read as plain arrays."""

ELEMENTS = re.compile(r"[<>|=]?([fiub]\d{1,2}|O[48]?|[SU]\d{1,9})")
"""Supported types of array elements: numbers, booleans, texts, and objects."""


class UnsafePickleError(ValueError):
    """Error for a pickle that would call a function or create an object other than an array."""


class _Named:
    """Function or class that a pickle names. It is never imported."""

    def __init__(self, module: str, name: str) -> None:
        self.key: Name = (module, name)

    def __str__(self) -> str:
        return ".".join(self.key)


class _Type:
    """Data type of an array's elements, as a pickle declares it."""

    def __init__(self, text: str) -> None:
        if not ELEMENTS.fullmatch(text):
            raise ValueError(f"contains an array of the unsupported type {text[:40]!r}")
        self.dtype = np.dtype(text)

    def set_state(self, state: Any) -> None:
        """Set the byte order from the state in the pickle.

        Raises:
            ValueError: if the type has fields or subarrays.
        """
        if not isinstance(state, tuple) or len(state) < 5 or any(x is not None for x in state[2:5]):
            raise ValueError("contains an array with fields or subarrays")
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Array in a pickle; `value` is a NumPy array, or the elements of an object array."""

    value: Any = None

    def set_state(self, state: Any) -> None:
        """Set the value from its pickled state: version (optional), shape, dtype, memory order, content."""
        if not isinstance(state, tuple) or len(state) not in (4, 5):
            raise ValueError("contains an array with an invalid state")
        shape, kind, fortran, content = state[-4:]
        self.set_content(content, kind, shape, "F" if fortran else "C")

    def set_content(self, content: Any, kind: Any, shape: Any, order: str) -> None:
        """Set the value of the array from its elements.

        Raises:
            ValueError: if an argument is invalid, or if the number of elements does not match the shape.
        """
        if not isinstance(kind, _Type) or not isinstance(shape, tuple) or order not in ("C", "F", "A"):
            raise ValueError("contains an array with an invalid state")
        if not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"contains an array of the invalid shape {shape}")
        count = math.prod(shape)
        if kind.dtype.hasobject:
            if not isinstance(content, list) or len(content) != count:
                raise ValueError(f"contains an array of the shape {shape} with another number of objects")
            self.value = _Objects(content, shape)
            return
        raw = content.encode("latin1") if isinstance(content, str) else content
        if not isinstance(raw, (bytes, bytearray)) or len(raw) != count * kind.dtype.itemsize:
            raise ValueError(f"contains an array of the shape {shape} with another number of bytes")
        self.value = np.frombuffer(bytes(raw), kind.dtype).reshape(shape, order="F" if order == "F" else "C")


class _Objects:
    """Elements of a NumPy array with dtype `object`, in C order."""

    def __init__(self, elements: list[Any], shape: tuple[int, ...]) -> None:
        self.elements = elements
        self.shape = shape


def unpickle(data: bytes) -> Any:
    """Return the content of a pickle of any protocol; bytes after the end of the pickle are ignored.

    An object array of shape () is returned as its element. Any other object array is returned as a float64
    array if all elements are numbers, else as a list.

    Raises:
        UnsafePickleError: if the pickle calls an unsupported function or creates an unsupported object.
        ValueError: if the data are not a pickle, or are damaged or too large.
    """
    try:
        return _plain(_Machine().run(data), {})
    except (IndexError, KeyError, TypeError):
        raise ValueError("is a damaged pickle") from None


class _Machine:
    """Interpreter of pickle instructions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """Interpret a pickle, and return the object that it builds."""
        most = 8 * limits.POINTS.value
        for count, (name, argument) in enumerate(_instructions(io.BytesIO(data))):
            if count > most:
                raise ValueError(f"contains more than {most:,.0f} values that are not in arrays")
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise UnsafePickleError(f"uses the instruction {name}, which can run code")
        raise ValueError("is not a pickle, or is truncated")

    def popped(self) -> list[Any]:
        """Remove the last mark and the stack values above it, and return these values."""
        start = self.marks.pop()
        values, self.stack[start:] = self.stack[start:], []
        return values

    def name(self, argument: Any) -> None:
        """Push the name of a supported function or class onto the stack."""
        if argument is None:  # STACK_GLOBAL: both parts are on the stack
            name, module = self.stack.pop(), self.stack.pop()
        else:
            module, _, name = argument.partition(" ")
        found = _Named(str(module), str(name))
        if found.key not in ARRAY_CLASSES and found.key not in _CALLS:
            raise UnsafePickleError(f"uses {found}")
        self.stack.append(found)

    def call(self, _: Any) -> None:
        """Pop a function and its arguments from the stack, and push the result.

        Only functions that pickles of NumPy arrays call are supported. A safe replacement runs instead.
        """
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Named) or function.key not in _CALLS or not isinstance(arguments, tuple):
            raise UnsafePickleError(f"calls {function if isinstance(function, _Named) else 'an object'}")
        self.stack.append(_CALLS[function.key](*arguments))

    def build(self, _: Any) -> None:
        """Set the state of the array or dtype on the stack, for the pickle instruction BUILD."""
        state = self.stack.pop()
        if not isinstance(self.stack[-1], (_Array, _Type)):
            raise UnsafePickleError("sets the state of an object")
        self.stack[-1].set_state(state)

    def extend(self, values: list[Any]) -> None:
        """Append values to the list on top of the stack."""
        if not isinstance(self.stack[-1], list):
            raise UnsafePickleError("extends an object that is not a list")
        self.stack[-1].extend(values)

    def update(self, values: list[Any]) -> None:
        """Add keys and values to the dict on top of the stack."""
        if not isinstance(self.stack[-1], dict):
            raise UnsafePickleError("changes an object that is not a dict")
        self.stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def push_dict(self, values: list[Any]) -> None:
        """Push a dict on the stack; `values` contains a key, its value, the next key, and so on."""
        self.stack.append({})
        self.update(values)

    def remember(self, key: Any) -> None:
        """Store the top of the stack in the memo."""
        self.memo[len(self.memo) if key is None else key] = self.stack[-1]

    def recall(self, key: Any) -> None:
        """Push a value from the memo."""
        self.stack.append(self.memo[key])

    def pop(self, _: Any) -> None:
        """Remove the top item of the stack, or the last mark if no item lies above that mark."""
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.stack.pop()


_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
"""Descriptions of all instructions of pickles."""


def _instructions(file: io.BytesIO) -> Iterator[tuple[str, Any]]:
    """Yield the opcode name and the argument of each instruction of a pickle."""
    while code := file.read(1):
        opcode = _OPCODES.get(code.decode("latin1"))
        if opcode is None:
            break
        if opcode.name == "STRING":  # of Python 2: bytes as a text with escapes
            line = file.readline().rstrip(b"\r\n")
            yield opcode.name, codecs.escape_decode(line[1:-1])[0].decode("latin1")  # type: ignore[attr-defined]
        else:
            yield opcode.name, opcode.arg.reader(file) if opcode.arg else None


def _reconstruct(kind: Any, *_: Any) -> _Array:
    if not isinstance(kind, _Named) or kind.key not in ARRAY_CLASSES:
        raise UnsafePickleError(f"creates {kind if isinstance(kind, _Named) else 'an object'}")
    return _Array()


def _from_buffer(content: Any, kind: Any, shape: Any, order: Any) -> _Array:
    out = _Array()
    out.set_content(content, kind, shape, order)
    return out


def _scalar(kind: Any, content: Any) -> _Array:
    return _from_buffer(content, kind, (), "C")


def _element_type(text: Any, *_: Any) -> _Type:
    return _Type(str(text))


def _encoded(text: Any, encoding: Any) -> bytes:
    """Encode text as Latin-1 bytes. Old pickle protocols store bytes as such text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnsafePickleError("calls _codecs.encode")
    return text.encode("latin1")


def _bytes(*arguments: Any) -> bytes:
    """Replacement for the constructors `bytes` and `bytearray`.

    Pickles of old protocols call these constructors to restore bytes.
    """
    if len(arguments) == 1 and isinstance(arguments[0], (bytes, bytearray)):
        return bytes(arguments[0])
    return _encoded(*arguments) if arguments else b""


_CALLS: dict[Name, Callable[..., Any]] = {
    **{(m, n): _bytes for m in ("builtins", "__builtin__") for n in ("bytes", "bytearray")},
    ("numpy", "dtype"): _element_type,
    ("_codecs", "encode"): _encoded,
    **{(module, "_reconstruct"): _reconstruct for module in NUMPY},
    **{(module, "scalar"): _scalar for module in NUMPY},
    **{(module, "_frombuffer"): _from_buffer for module in ("numpy.core.numeric", "numpy._core.numeric")},
}
"""Replacements for the functions that pickles of NumPy arrays call."""

_VALUES = frozenset(
    [
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    ]
)
"""Instructions that push their argument."""

_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}


def _tuple_of(count: int) -> Callable[[_Machine, Any], None]:
    def push(machine: _Machine, _: Any) -> None:
        values = tuple(machine.stack[-count:])
        if len(values) < count:
            raise ValueError("is damaged")
        machine.stack[-count:] = [values]

    return push


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda m, _: m.marks.append(len(m.stack)),
    "POP": _Machine.pop,
    "POP_MARK": lambda m, _: m.popped().clear(),
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "LIST": lambda m, _: m.stack.append(m.popped()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.popped())),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    "DICT": lambda m, _: m.push_dict(m.popped()),
    "APPEND": lambda m, _: m.extend([m.stack.pop()]),
    "APPENDS": lambda m, _: m.extend(m.popped()),
    "SETITEM": lambda m, _: m.update([m.stack.pop(), m.stack.pop()][::-1]),
    "SETITEMS": lambda m, _: m.update(m.popped()),
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.name,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.recall),
}
"""Instructions that change the stack or the memo."""


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Return a value without the interpreter's own array objects: they become NumPy arrays or lists.

    `done` contains the results so far, by `id` of the original object.
    """
    if id(value) in done:
        found = done[id(value)]
        if found is ...:
            raise ValueError("contains itself")
        return found
    if isinstance(value, (_Named, _Type)):
        raise UnsafePickleError(f"uses {value}" if isinstance(value, _Named) else "contains a type")
    if not isinstance(value, (_Array, _Objects, dict, list, tuple)):
        return value
    done[id(value)] = ...
    if isinstance(value, _Array):
        found = _plain(value.value, done)
    elif isinstance(value, dict):
        found = {key: _plain(each, done) for key, each in value.items()}
    elif isinstance(value, _Objects):
        found = _elements([_plain(each, done) for each in value.elements], value.shape)
    else:
        found = [_plain(each, done) for each in value]
        found = tuple(found) if isinstance(value, tuple) else found
    done[id(value)] = found
    return found


def _elements(found: list[Any], shape: Sequence[int]) -> Any:
    """Convert the elements of an object array to plain Python or NumPy values.

    An array of numbers becomes a float64 array, and other elements become a flat list. A zero-dimensional
    array becomes its element.
    """
    if not shape:
        return found[0]
    numbers = all(isinstance(x, (int, float, np.ndarray)) and np.ndim(x) == 0 for x in found)
    return np.array(found, np.float64).reshape(shape) if numbers and found else found
