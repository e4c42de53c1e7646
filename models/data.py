"""Prompt files, stateless draws and metrics.

Which prompt, noise and time a sample gets depends on (seed, iteration, purpose, global sample index) alone,
never on a running generator: any number of ranks cuts the same batch, and resuming needs no data state.
"""
import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import InputError, replacing, some

# JourneyDB's annotations have "prompt", PartiPrompts.tsv "Prompt", COCO's files "caption" or "text".
FIELDS = ("prompt", "caption", "text")


# ---- prompt files ------------------------------------------------------------------------------------------

def read_prompts(path: str | Path) -> list[str]:
    """The prompts of a .txt file, one per line, or of a .jsonl, .csv or .tsv file with one of FIELDS, in any
    case. Blank prompts are skipped. Raises InputError naming the file and the line."""
    path = Path(path)
    readers = {".txt": lines_of, ".jsonl": jsonl_prompts, ".csv": csv_prompts, ".tsv": tsv_prompts}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: not a prompt file; expected one of {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected prompts")
    prompts = [prompt for _, text in read(path) if (prompt := text.strip())]
    if not prompts:
        raise InputError(f"{path}: no prompt in this file")
    return prompts


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without its end) of a UTF-8 file, with or without byte order mark."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: line {number} is not UTF-8 (byte {error.start + 1})") from error


def field_of(path: Path, number: int, names: Iterable[str]) -> str:
    """The name that holds the prompt."""
    for field in FIELDS:
        for name in names:
            if name.strip().lower() == field:
                return name
    raise InputError(f"{path}: line {number}: expected a field {' or '.join(FIELDS)}, found {some(names, 8)}")


def jsonl_prompts(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in lines_of(path):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(record, dict):
            raise InputError(f"{path}: line {number}: expected a record {{...}}, found {line.strip()[:40]}")
        field = field_of(path, number, record)
        text = record[field] if record[field] is not None else ""
        if not isinstance(text, str):
            raise InputError(f"{path}: line {number}: expected text in {field!r}, found {str(text)[:40]}")
        yield number, text


def csv_prompts(path: Path) -> Iterator[tuple[int, str]]:
    reader = csv.reader((line + "\n" for _, line in lines_of(path)), strict=True)

    def rows() -> Iterator[tuple[int, list[str]]]:
        while True:
            number = reader.line_num + 1  # where the record starts: a quoted prompt may span lines
            try:
                yield number, next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise InputError(f"{path}: line {number} is not CSV ({error})") from error

    return column(path, rows())


def tsv_prompts(path: Path) -> Iterator[tuple[int, str]]:
    # Quotes are part of the text, as in PartiPrompts.tsv's `"G I G G L E" painted in ...`, unless they are
    # around the whole cell and those inside are doubled, as pandas writes them.
    def unquoted(cell: str) -> str:
        quoted = len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")
        return cell[1:-1].replace('""', '"') if quoted else cell

    rows = ((number, [unquoted(cell) for cell in line.split("\t")]) for number, line in lines_of(path))
    return column(path, rows)


def column(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, str]]:
    """The prompts' column of a table whose first row is the header."""
    number, header = next(rows, (1, []))
    place = header.index(field_of(path, number, header))
    for number, row in rows:
        if not any(row):
            continue
        if len(row) > len(header) or len(row) <= place:
            raise InputError(f"{path}: line {number} has {len(row)} fields, the header {len(header)}; "
                             "expected a prompt that holds the separator to be in quotes")
        yield number, row[place]


# ---- stateless sampling ------------------------------------------------------------------------------------

def hashed(*key: int | str) -> int:
    """128 bits that depend on the key alone."""
    exact = tuple(part if isinstance(part, str) else int(part) for part in key)  # NumPy's repr differs
    return int.from_bytes(blake2b(repr(exact).encode(), digest_size=16).digest(), "little")


def prompt_index(seed: int, position: int, count: int) -> int:
    """The prompt at a global position: each epoch of `count` positions is a permutation of range(count),
    another one for each epoch and seed. Needs no memory: a Feistel network permutes the next power of 4, and
    an index that falls outside is permuted again until it falls inside."""
    epoch, index = divmod(position, count)
    bits = max(3, ((count - 1).bit_length() + 1) // 2)  # of each half; with fewer, few permutations occur
    while True:
        left, right = divmod(index, 1 << bits)
        for r in range(8):
            left, right = right, left ^ hashed(seed, "prompt", epoch, r, right) % (1 << bits)
        index = (left << bits) + right
        if index < count:
            return index


def noise(shape: tuple[int, ...], seed: int, iteration: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """Standard normal (len(indices), *shape) float32 on the CPU: one draw per global sample index."""
    # NumPy's counter-based Philox takes the whole 128-bit hash. torch's CPU generator keeps 32 bits of a
    # seed: among millions of samples some would start from equal noise.
    draws = np.empty((len(indices), *shape), np.float32)
    for draw, index in zip(draws, indices):
        philox = np.random.Philox(key=hashed(seed, iteration, purpose, index))
        np.random.Generator(philox).standard_normal(dtype=np.float32, out=draw)
    return torch.from_numpy(draws)


def uniform(seed: int, iteration: int, purpose: str, indices: Sequence[int]) -> Tensor:
    """U[0, 1), (len(indices),) float32 on the CPU: one draw per global sample index, a multiple of 2^-24."""
    return torch.tensor([(hashed(seed, iteration, purpose, index) >> 104) / 2 ** 24 for index in indices])


# ---- metrics.jsonl -----------------------------------------------------------------------------------------

def append_jsonl(path: str | Path, row: dict) -> None:
    """Add one line to a .jsonl file. Numbers that are not finite become null: JSON has none."""
    def plain(value):
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    with Path(path).open("a") as file:
        file.write(json.dumps({key: plain(value) for key, value in row.items()}) + "\n")


def truncate_jsonl(path: str | Path, key: str, last: int) -> None:
    """Keep the rows with row[key] <= last, so that a run resumed from `last` leaves no row twice. Half a line
    that a killed run left at the end is dropped. Raises InputError for other damage; no file is no error."""
    if not Path(path).exists():
        return
    lines = list(lines_of(Path(path)))
    kept = []
    for number, line in lines:
        try:
            keep = json.loads(line)[key] <= last
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number}: expected a record with a number {key!r}") from error
        if keep:
            kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
