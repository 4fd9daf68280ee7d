"""The tensors of a TorchScript archive (OpenAI's .pt files are such) without running anything that it holds.

An archive is a zip: `data.pkl` describes the tree of modules, `data/N` are the numbers, `code/` is a program. The description is a
pickle, which in Python's own machine may call any function; here its instructions are only read, into plain containers, and
every call but that which places a tensor in its storage is refused.
"""

import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_STORAGES = {
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch DoubleStorage": torch.float64,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
_LISTS = {f"torch.jit._pickle build_{kind}list" for kind in ("int", "double", "bool", "tensor")}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE"}
_EMPTY = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
_MARK = object()
_MAX_DEPTH, _MAX_TENSORS = 64, 100_000  # of a tree of modules: a description that refers to itself must end


@dataclass(frozen=True)
class _Global:
    """A name of the description, "module name". It stands for nothing."""

    name: str


@dataclass
class _Module:
    attributes: dict[str, Any] = field(default_factory=dict)


def is_archive(path: Path) -> bool:
    """Whether a file is a zip with TorchScript's constants."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def read_archive(path: Path) -> tuple[dict[str, Tensor], set[str]]:
    """(tensors by their dotted names, names of the classes of all modules).

    Raises ValueError for a description that calls anything else, and for a damaged archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            [description] = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
            if archive.getinfo(description).file_size > path.stat().st_size:
                raise ValueError("its description is larger than the file")
            root, classes = _run(archive.read(description), _storages(archive, description, path.stat().st_size))
    except (
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        StopIteration,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise ValueError(f"checkpoint {path} is a TorchScript archive that cannot be read: {error}") from error
    tensors: dict[str, Tensor] = {}
    _collect(root, "", tensors, path)
    return tensors, classes


def _storages(archive: zipfile.ZipFile, description: str, limit_bytes: int) -> Callable[[Any], Tensor]:
    """The function that finds a storage, a flat tensor, by its persistent id; each is read once."""
    folder, cache = description.removesuffix("data.pkl") + "data/", dict[str, Tensor]()

    def load(reference: tuple[Any, ...]) -> Tensor:
        kind, storage, key, _, count = reference
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in _STORAGES:
            raise ValueError(f"it holds a storage of unknown kind {storage}")
        if key not in cache:
            if archive.getinfo(folder + key).file_size > limit_bytes:  # a few bytes that unpack to many
                raise ValueError(f"storage {key} is larger than the file")
            content = bytearray(archive.read(folder + key))
            dtype = _STORAGES[storage.name]
            cache[key] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        if cache[key].dtype != _STORAGES[storage.name] or len(cache[key]) != count:
            raise ValueError(f"storage {key} holds {len(cache[key])} numbers, {count} are described")
        return cache[key]

    return load


def _run(content: bytes, load_storage: Callable[[Any], Tensor]) -> tuple[Any, set[str]]:
    """The described object, and the class names met. pickletools reads the instructions; they are followed here."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    classes: set[str] = set()
    for opcode, argument, _ in pickletools.genops(content):
        name: str = opcode.name
        if name in _LITERALS or name in _CONSTANTS:
            stack.append(_CONSTANTS.get(name, argument))
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[int(argument)] = stack[-1]  # type: ignore[arg-type]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(argument)])  # type: ignore[arg-type]
        elif name == "TUPLE":
            stack.append(tuple(_since_mark(stack)))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("SETITEMS", "SETITEM"):
            items = _since_mark(stack) if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            container: Any = stack[-1]
            container.update(zip(items[::2], items[1::2], strict=True))
        elif name in ("APPENDS", "APPEND"):
            items = _since_mark(stack) if name == "APPENDS" else [stack.pop()]
            container = stack[-1]
            container.extend(items)
        elif name == "GLOBAL":
            stack.append(_Global(str(argument)))
        elif name == "NEWOBJ":
            stack.pop()
            classes.add(stack.pop().name.split(" ")[-1])
            stack.append(_Module())
        elif name == "BUILD":
            attributes = stack.pop()
            if not isinstance(stack[-1], _Module):
                raise ValueError("it gives attributes to something that is no module")
            stack[-1].attributes.update(attributes)
        elif name == "BINPERSID":
            stack.append(load_storage(stack.pop()))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_call(stack.pop(), arguments))
        elif name == "STOP":
            return stack.pop(), classes
        elif name != "PROTO":
            raise ValueError(f"its description uses the instruction {name}, which no TorchScript archive needs")
    raise ValueError("its description does not end")


def _since_mark(stack: list[Any]) -> list[Any]:
    mark = len(stack) - 1 - next(place for place, item in enumerate(reversed(stack)) if item is _MARK)
    items = stack[mark + 1 :]
    del stack[mark:]
    return items


def _call(function: Any, arguments: tuple[Any, ...]) -> Any:
    called = function.name if isinstance(function, _Global) else repr(function)
    if called == "torch._utils _rebuild_tensor_v2":
        storage_P, offset, size, stride = arguments[:4]
        numbers = (offset, *size, *stride)
        if not all(isinstance(number, int) and number >= 0 for number in numbers) or len(size) != len(stride):
            raise ValueError(f"a tensor of shape {size}, strides {stride} and offset {offset}")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if math.prod(size) and last >= len(storage_P):
            raise ValueError(f"a tensor of shape {size} reaches beyond its {len(storage_P)} numbers")
        return storage_P.as_strided(size, stride, offset)
    if called == "collections OrderedDict" and not arguments:
        return {}
    if called in _LISTS or called == "torch.jit._pickle restore_type_tag":
        return arguments[0]
    raise ValueError(f"its description calls {called.replace(' ', '.')}, which is refused: weights need no calls")


def _collect(node: Any, prefix: str, into: dict[str, Tensor], path: Path) -> None:
    if prefix.count(".") > _MAX_DEPTH or len(into) > _MAX_TENSORS:
        raise ValueError(f"checkpoint {path} is a TorchScript archive that refers to itself, or is no CLIP")
    if isinstance(node, Tensor):
        into[prefix.removesuffix(".")] = node
    elif isinstance(node, _Module):
        for name, value in node.attributes.items():
            _collect(value, f"{prefix}{name}.", into, path)
