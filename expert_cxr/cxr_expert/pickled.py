"""Takes the tensors out of a pickled network without running anything that the file asks for.

The released DenseNets are whole modules written by ``torch.save``, so their files name classes and functions to call.
Python's unpickler calls what a file names. The reader here is none: it steps through the instructions of the pickle
(``pickletools`` decodes them) and keeps what it meets as inert records. It imports nothing, calls nothing that comes
from the file, and refuses the file at the first name or instruction that a DenseNet does not need.

Both layouts of ``torch.save`` are read: the zip archive (PyTorch 1.6 and later) and the older chain of pickles
followed by the raw storages.
"""

from __future__ import annotations

import functools
import io
import math
import pickletools
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from vila_m3_common.errors import UserError

# Classes whose instances hold the tensors. They are never imported.
MODULE_CLASSES = frozenset(
    [f"torchxrayvision.models.{name}" for name in ("DenseNet", "_DenseLayer", "_DenseBlock", "_Transition")]
    + [
        f"torch.nn.modules.{name}"
        for name in (
            "activation.ReLU",
            "batchnorm.BatchNorm2d",
            "container.ModuleList",
            "container.Sequential",
            "conv.Conv2d",
            "dropout.Dropout",
            "linear.Linear",
            "pooling.AdaptiveAvgPool2d",
            "pooling.AvgPool2d",
            "pooling.MaxPool2d",
        )
    ]
)
STORAGE_TYPES = {
    f"{module}.{name}": dtype
    for module in ("torch", "torch.cuda")
    for name, dtype in {
        "DoubleStorage": torch.float64,
        "FloatStorage": torch.float32,
        "HalfStorage": torch.float16,
        "LongStorage": torch.int64,
        "IntStorage": torch.int32,
    }.items()
}
_DICT_CLASS = "collections.OrderedDict"
_TENSOR_FUNCTIONS = frozenset({"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"})
_PARAMETER_FUNCTION = "torch._utils._rebuild_parameter"
# Part of a module's bookkeeping: the names of unsaved buffers, and what PyTorch before 1.5 kept in every module.
_BOOKKEEPING = frozenset({"__builtin__.set", "builtins.set", "torch.nn.backends.thnn._get_thnn_function_backend"})
_FUNCTIONS = frozenset({_DICT_CLASS, _PARAMETER_FUNCTION}) | _TENSOR_FUNCTIONS | _BOOKKEEPING
_ALLOWED = MODULE_CLASSES | STORAGE_TYPES.keys() | _FUNCTIONS

# Written by torch.save before PyTorch 1.6 as the first of its pickles.
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


class _Refused(Exception):
    """What a file holds that no network needs."""


@dataclass(frozen=True)
class _Name:
    """A class or function that the file names; nothing is looked up."""

    path: str


@dataclass(frozen=True)
class _Storage:
    """Where the numbers of a tensor lie in the file."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class _Tensor:
    """A window on a storage: offset and strides in elements."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class _Object:
    """An instance of a named class, with the attributes that the file gives it."""

    name: str
    state: dict[str, Any] = field(default_factory=dict)


class _Mark:
    """Where the arguments of the next instruction begin on the stack."""


def read_pickled_network(path: str | Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled network, by the names of its state dict.

    A file that holds a plain dictionary of tensors in place of a network gives that dictionary.

    Raises:
        UserError: if the file is missing or damaged, or names anything but the parts of a DenseNet. Nothing of the
            file has been run then.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights {path} do not exist; check the path")
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            return _read_zip(file) if is_zip else _read_legacy(file)
    except _Refused as reason:
        raise UserError(
            f"weights {path.name} are refused, and nothing in them was run: {reason}. "
            "Give the file that large_files.yml names"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError, RuntimeError, EOFError, OSError, MemoryError) as error:
        raise UserError(f"weights {path.name} are damaged or no network: {error}; fetch the file again") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"weights {path.name} are damaged: {error}; fetch the file again") from error


def _read_zip(file: BinaryIO) -> dict[str, torch.Tensor]:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise _Refused("it holds compressed entries, which torch.save never writes")
        if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
            raise _Refused("its numbers are not little-endian")
        network, _ = _interpret(io.BytesIO(archive.read(entries["data.pkl"])))
        tensors = _collect(network)
        used = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        numbers = {key: _numbers(archive.read(entries[f"data/{key}"]), storage) for key, storage in used.items()}
    return {name: _materialize(tensor, numbers) for name, tensor in tensors.items()}


def _read_legacy(file: BinaryIO) -> dict[str, torch.Tensor]:
    if (_interpret(file)[0], _interpret(file)[0]) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
        raise _Refused("it is no file of torch.save")
    if not _interpret(file)[0]["little_endian"]:
        raise _Refused("its numbers are not little-endian")
    network, storages = _interpret(file)
    tensors = _collect(network)
    keys, _ = _interpret(file)
    numbers = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        if count != storages[key].count:
            raise _Refused(f"storage {key!r} has {count} numbers where {storages[key].count} are announced")
        numbers[key] = _numbers(file.read(count * storages[key].dtype.itemsize), storages[key])
    return {name: _materialize(tensor, numbers) for name, tensor in tensors.items()}


def _numbers(data: bytes, storage: _Storage) -> torch.Tensor:
    if len(data) != storage.count * storage.dtype.itemsize:
        raise _Refused(f"storage {storage.key!r} has {len(data)} bytes where {storage.count} numbers are announced")
    return torch.frombuffer(bytearray(data), dtype=storage.dtype) if data else torch.empty(0, dtype=storage.dtype)


def _materialize(tensor: _Tensor, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return numbers[tensor.storage.key].as_strided(tensor.size, tensor.stride, tensor.offset).clone()


def _collect(network: Any) -> dict[str, _Tensor]:
    """Return the tensors of a record by the names of its state dict."""
    tensors = dict(_walk(network, "", set()) if isinstance(network, _Object) else _plain(network))
    if not tensors:
        raise _Refused("it holds no tensors")
    return tensors


def _plain(state: Any) -> Iterator[tuple[str, _Tensor]]:
    if not isinstance(state, dict):
        raise _Refused(f"it holds a {type(state).__name__}, no network")
    for name, value in state.items():
        if not isinstance(value, _Tensor):
            raise _Refused(f"its entry {name!r} is no tensor")
        yield name, value


def _walk(module: _Object, prefix: str, seen: set[int]) -> Iterator[tuple[str, _Tensor]]:
    # A module that stands in several places could stand in itself, or make a small file an endless network.
    if id(module) in seen or module.name not in MODULE_CLASSES:
        raise _Refused(f"{prefix or 'its content'} is no module of a network, or stands in it twice")
    seen.add(id(module))
    for kind in ("_parameters", "_buffers"):
        for name, value in _entries(module, kind).items():
            if isinstance(value, _Tensor):
                yield f"{prefix}{name}", value
            elif value is not None:
                raise _Refused(f"{prefix}{name} is no tensor")
    for name, child in _entries(module, "_modules").items():
        if isinstance(child, _Object):
            yield from _walk(child, f"{prefix}{name}.", seen)
        elif child is not None:
            raise _Refused(f"{prefix}{name} is no module")


def _entries(module: _Object, kind: str) -> dict[Any, Any]:
    entries = module.state.get(kind, {})
    if not isinstance(entries, dict):
        raise _Refused(f"the {kind} of a {module.name} are no dictionary")
    return entries


def _interpret(file: BinaryIO) -> tuple[Any, dict[str, _Storage]]:
    """Step through one pickle; return what it describes and the storages that it refers to, by key.

    The file then stands behind the pickle.
    """
    reader = _Reader()
    for opcode, argument, _position in pickletools.genops(file):
        if opcode.name == "STOP":
            break
        reader.step(opcode.name, argument)
    return reader.pop(), reader.storages


class _Reader:
    """The stack and the memo of a pickle. Every instruction that it knows moves data; none calls anything."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, _Storage] = {}
        self.steps: dict[str, Callable[[Any], None]] = {
            "MARK": lambda _: self.stack.append(_Mark()),
            "GLOBAL": lambda argument: self.stack.append(_name(argument)),
            "REDUCE": lambda _: self._combine(_called),
            "NEWOBJ": lambda _: self._combine(_instance),
            "BUILD": lambda _: self._build(),
            "BINPERSID": lambda _: self._refer(_persistent(self.pop())),
            "TUPLE": lambda _: self.stack.append(tuple(self.pop_to_mark())),
            "APPENDS": lambda _: self._extend(self.pop_to_mark()),
            "APPEND": lambda _: self._extend([self.pop()]),
            "SETITEMS": lambda _: self._set_items(self.pop_to_mark()),
            "SETITEM": lambda _: self._set_items([self.pop(), self.pop()][::-1]),
            "EMPTY_TUPLE": lambda _: self.stack.append(()),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "NONE": lambda _: self.stack.append(None),
            "NEWTRUE": lambda _: self.stack.append(True),
            "NEWFALSE": lambda _: self.stack.append(False),
            "PROTO": lambda _: None,
        }
        for count in (1, 2, 3):
            self.steps[f"TUPLE{count}"] = functools.partial(self._tuple, count)
        for name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            self.steps[name] = self.stack.append
        for name in ("BINPUT", "LONG_BINPUT"):
            self.steps[name] = self._remember
        for name in ("BINGET", "LONG_BINGET"):
            self.steps[name] = lambda argument: self.stack.append(self.memo[argument])

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction.

        Raises:
            _Refused: if a network that torch.save wrote has no use for it.
        """
        if name not in self.steps:
            raise _Refused(f"it holds the pickle instruction {name}, which torch.save never writes for a network")
        self.steps[name](argument)

    def pop(self) -> Any:
        """Take the topmost value."""
        value = self.stack.pop()
        if isinstance(value, _Mark):
            raise _Refused("its instructions are out of order")
        return value

    def pop_to_mark(self) -> list[Any]:
        """Take everything above the topmost mark, and the mark."""
        values = []
        while not isinstance(self.stack[-1], _Mark):
            values.append(self.stack.pop())
        self.stack.pop()
        return values[::-1]

    def _tuple(self, count: int, _argument: Any) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(values[::-1]))

    def _remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _combine(self, combine: Callable[[Any, Any], Any]) -> None:
        arguments, callee = self.pop(), self.pop()
        self.stack.append(combine(callee, arguments))

    def _refer(self, target: _Storage | _Name) -> None:
        if isinstance(target, _Storage) and self.storages.setdefault(target.key, target) != target:
            raise _Refused(f"storage {target.key!r} is announced twice, differently")
        self.stack.append(target)

    def _build(self) -> None:
        state, target = self.pop(), self.stack[-1]
        if not isinstance(state, dict) or not isinstance(target, _Object | dict):
            raise _Refused("it sets the state of something that is no module")
        # The attributes of a dictionary (the versions of a state dict) are of no use here.
        if isinstance(target, _Object):
            target.state.update(state)

    def _extend(self, values: Sequence[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise _Refused("it appends to something that is no list")
        self.stack[-1].extend(values)

    def _set_items(self, values: Sequence[Any]) -> None:
        target = self.stack[-1]
        keys = values[::2]
        if not isinstance(target, dict) or not all(isinstance(key, str | int) for key in keys):
            raise _Refused("it sets an entry of something that is no dictionary with plain names")
        target.update(zip(keys, values[1::2], strict=True))


def _name(argument: str) -> _Name:
    # pickletools joins module and name by a space.
    path = argument.replace(" ", ".")
    if path not in _ALLOWED:
        raise _Refused(f"it asks for {path}, which is no part of a DenseNet")
    return _Name(path)


def _instance(callee: Any, arguments: Any) -> _Object:
    if not isinstance(callee, _Name) or callee.path not in MODULE_CLASSES or arguments != ():
        raise _Refused("it makes an object that is no module")
    return _Object(callee.path)


def _called(callee: Any, arguments: Any) -> Any:
    """Return the record of what a call would give."""
    name = callee.path if isinstance(callee, _Name) else None
    if name == _DICT_CLASS and arguments == ():
        return {}
    if name in _BOOKKEEPING:
        return _Object(name)
    if name == _PARAMETER_FUNCTION and isinstance(arguments[0], _Tensor):
        return arguments[0]
    if name in _TENSOR_FUNCTIONS:
        return _tensor(*arguments[:4])
    raise _Refused("it calls something that makes no tensor")


def _tensor(storage: Any, offset: Any, size: Any, stride: Any) -> _Tensor:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, _Storage) or not all(type(number) is int and number >= 0 for number in numbers):
        raise _Refused("it describes a tensor without a storage or with a negative size")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    # The second condition keeps a stride of 0 from making a small file a huge tensor.
    if math.prod(size) and (last >= storage.count or math.prod(size) > storage.count):
        raise _Refused(f"it describes a tensor that reaches beyond its storage {storage.key!r}")
    return _Tensor(storage, offset, tuple(size), tuple(stride))


def _persistent(reference: Any) -> _Storage | _Name:
    """Return what ``torch.save`` keeps outside the pickle: a storage, or a class with its source text."""
    match reference:
        case ("module", _Name() as name, *_):
            return name
        case ("storage", _Name(path), str(key), str(), int(count), *view) if path in STORAGE_TYPES and count >= 0:
            if any(part is not None for part in view):
                raise _Refused(f"storage {key!r} is a view of another")
            return _Storage(STORAGE_TYPES[path], key, count)
    raise _Refused("it refers to something that is neither a storage nor a class")
