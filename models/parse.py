"""Files that others wrote, read without trust: JSON, the header of a safetensors file, what torch.load may give.

Whatever the user can mend is an InputError of one sentence: which file, what was found, what was expected.
"""
import json
import math
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}

LARGEST = 2 ** 24  # bytes of a header: those of full-size models have less than a tenth


class InputError(ValueError):
    """Something the user can mend, such as a wrong file. Scripts print the sentence and exit with 2."""


class Span(NamedTuple):
    """Where a tensor is in a file, in bytes after the header."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def some(names: Iterable, count: int = 3) -> str:
    """The first few of many names, for a sentence."""
    names = list(map(short, names))
    return ", ".join(names[:count] + ["..."] * (len(names) > count)) or "nothing"


def short(value, length: int = 200) -> str:
    """What a file holds, for a sentence: on one line, and cut."""
    text = str(value)[:length]
    return text if text.isprintable() else ascii(text)[1:-1]


# ---- JSON --------------------------------------------------------------------------------------------------

def parse_json(text: bytes | str):
    """The value of a JSON text. Raises ValueError, of one line, for all that is wrong with it, also for
    nesting that Python cannot follow and for objects in which a name stands twice."""
    def once(pairs: list[tuple]) -> dict:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))
            raise ValueError(f"{short(twice)} stands twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deep") from None


def read_object(path: Path, what: str) -> dict:
    """The JSON object in a file; raises InputError for all else. `what`: what was expected, for a sentence."""
    try:
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected {what}, found damaged JSON ({short(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected {what}, found {short(value, 40) or 'nothing'}")
    return value


# ---- safetensors -------------------------------------------------------------------------------------------

def read_header(path: Path) -> tuple[dict[str, Span], dict[str, str], int]:
    """({tensor name: span}, metadata, bytes before the tensors) of a safetensors file: a length, a JSON
    header and the bytes. Raises InputError unless all of it makes sense and all bytes are there."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        head = file.read(min(length, LARGEST))
        if head[:1] != b"{":
            file.seek(0)
            pointer = file.read(20) == b"version https://git-"
            found = "a Git LFS pointer (run `git lfs pull`)" if pointer else "something else"
            raise InputError(f"{path}: expected a safetensors file, found {found}")
    if length > LARGEST and size >= 8 + length:
        raise InputError(f"{path}: a header of {length} bytes; expected at most {LARGEST}")
    if len(head) < length:
        raise InputError(f"{path}: truncated within its header, {size} bytes of more than {8 + length}")
    try:
        entries = parse_json(head)
        metadata = entries.pop("__metadata__", None) or {}
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("its metadata are not texts")
        spans = {name: span_of(name, entry) for name, entry in entries.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except ValueError as error:
        raise InputError(f"{path}: damaged safetensors header ({short(error)})") from error
    unfit = [name for name, (dtype, shape, start, stop) in spans.items()
             if stop - start != math.prod(shape) * dtype.itemsize]
    if unfit:
        raise InputError(f"{path}: damaged safetensors header, sizes do not fit the shapes of {some(unfit)}")
    filled = sorted((span.start, span.stop, name) for name, span in spans.items() if span.stop > span.start)
    shared = [f"{a} and {b}" for (_, stop, a), (start, _, b) in zip(filled, filled[1:]) if start < stop]
    if shared:
        raise InputError(f"{path}: damaged safetensors header, the same bytes are those of {some(shared)}")
    expected = 8 + length + max((span.stop for span in spans.values()), default=0)
    if size < expected:
        raise InputError(f"{path}: truncated, {size} bytes of {expected}")
    if idle := size - 8 - length - sum(stop - start for start, stop, _ in filled):  # the format allows no holes
        raise InputError(f"{path}: damaged safetensors file, {idle} of its bytes belong to no tensor")
    return spans, metadata, 8 + length


def span_of(name: str, entry) -> Span:
    """A tensor's entry. Raises ValueError for a damaged one, InputError for a dtype that nothing here reads."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(f"no dtype, shape and data_offsets of {short(name)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
               for numbers in (shape, offsets)) or len(offsets) != 2:
        raise ValueError(f"no whole numbers in shape and data_offsets of {short(name)}")
    if math.prod(max(n, 1) for n in shape) >= 2 ** 60:  # torch counts elements and bytes in 63 bits
        raise ValueError(f"the shape of {short(name)} is larger than any memory")
    if len(shape) > 64:  # with which torch can do nothing
        raise ValueError(f"{short(name)} has {len(shape)} dimensions")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InputError(f"{short(name)} has the unsupported dtype {short(dtype)}; "
                         f"expected one of {', '.join(DTYPES)}")
    return Span(DTYPES[dtype], tuple(shape), *offsets)


# ---- PyTorch files ----------------------------------------------------------------------------------------

def check_stored(path: Path, zipped: bool) -> None:
    """Raises InputError for a compressed PyTorch file: an entry may inflate to any size, and its tensors would be
    mapped as they are. Raises ValueError for a pickle that `check_nesting` refuses."""
    if not zipped:  # before PyTorch 1.6: a number, a version, the system, the tensors and their storages' keys
        with path.open("rb") as file:
            for _ in range(5):
                if file.peek(1):  # a pickle alone is refused later, by what it calls
                    check_nesting(file)
        return
    archive = zipfile.ZipFile(path)
    if any(entry.compress_type for entry in archive.infolist()):
        raise InputError(f"{path}: a compressed archive, or a TorchScript program; expected a file as torch.save "
                         "writes it")
    # torch reads the directory that the last bytes point to, zipfile the one before them: they may be two.
    reader = torch._C.PyTorchFileReader(str(path))
    names = sorted(name.partition("/")[2] for name in archive.namelist())
    if names != sorted(reader.get_all_records()):
        raise ValueError("an archive with two directories")
    for name in names:
        if name.lower().endswith("data.pkl"):  # torch finds it in any case of letters
            check_nesting(reader.get_record(name))


def check_nesting(content: bytes | BinaryIO, most: int = 10 ** 4) -> None:
    """Raises ValueError for a pickle with a tuple that takes more than `most` steps to hash: one of 45 pairs of
    itself takes 2^45. And for one that names bytearray, which makes any number of zeros, and which torch calls.
    Counts alone, and builds and runs nothing."""
    stack, memo = [], {}
    for opcode, value, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and value.endswith(" bytearray"):
            raise ValueError("it asks for a bytearray")
        if opcode.name.endswith(("PUT", "MEMOIZE")):
            memo[len(memo) if value is None else value] = stack[-1]
        elif opcode.name.endswith("GET"):
            stack.append(memo[value])
        elif opcode.name == "DUP":
            stack.append(stack[-1])
        elif opcode.name == "MARK":
            stack.append(None)
        else:
            below = [pickletools.markobject, pickletools.stackslice] if opcode.name == "OBJ" else opcode.stack_before
            taken = []
            for kind in reversed(below):
                if kind is pickletools.stackslice:
                    while stack[-1] is not None:
                        taken.append(stack.pop())
                else:
                    taken.append(stack.pop() or 0)
            steps = 1 + sum(taken) if "TUPLE" in opcode.name else max(taken, default=0)
            if steps > most:
                raise ValueError(f"a tuple that holds more than {most} others")
            stack += [steps] * len(opcode.stack_after)


def check_plain(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises InputError for tensors that are no plain arrays: sparse, nested, quantised, one process's part (DTensor),
    without values, or expanded, so that a small file would fill all memory."""
    for name, t in tensors.items():
        if type(t) is not Tensor or t.is_nested or t.layout != torch.strided or t.is_quantized or t.is_meta or \
                t.numel() * t.itemsize > t.untyped_storage().nbytes():
            raise InputError(f"{path}: {short(name)} is sparse, nested, quantised, expanded or without values; "
                             "expected plain tensors")
