"""Prompt files, stateless draws and metrics.

Which prompt, noise and time a sample gets depends on (seed, iteration, purpose, global sample index) alone,
never on a running generator: any number of ranks cuts the same batch, and resuming needs no data state.
"""
import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.checkpoint import InputError, replacing, some
from models.parse import parse_json, short

# JourneyDB's annotations have "prompt", PartiPrompts.tsv "Prompt", COCO's files and OpenVid-1M's "caption" or
# "text", Open-Sora-Plan's "cap".
FIELDS = ("prompt", "caption", "text", "cap")
LONGEST = 2 ** 24  # bytes of a line
LONGEST_PROMPT = 2 ** 20  # characters, which take 7 s to tokenize and a gigabyte
INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"  # byte order mark and characters without width


# ---- prompt files ------------------------------------------------------------------------------------------

def read_prompts(source: str | Path | list) -> list[str]:
    """The prompts of a file or, one after the other, of several: .txt, one per line, .jsonl, .csv or .tsv
    with one of FIELDS, in any case, or .json as Vript and Open-Sora-Plan have it. Blank prompts are skipped.
    Raises InputError naming the file and the line."""
    if isinstance(source, list):
        return [prompt for path in source for prompt in read_prompts(path)]
    path = Path(source)
    readers = {".txt": lines_of, ".jsonl": jsonl_prompts, ".csv": csv_prompts, ".tsv": tsv_prompts,
               ".json": json_prompts}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise InputError(f"{path}: not a prompt file; expected one of {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected prompts")
    prompts = []
    for number, text in read(path):
        text = cleaned(text, f"{path}: line {number}")
        if path.suffix.lower() == ".txt" and text.startswith(('{"', '["')):
            raise InputError(f"{path}: line {number} is JSON; expected prompts, or a name that ends in .jsonl or .json")
        if text:
            prompts.append(text)
    if not prompts:
        raise InputError(f"{path}: no prompt in this file")
    return prompts


def cleaned(text: str, place: str) -> str:
    """The text without blanks and invisible characters around it. Raises InputError as `check_text`."""
    text = text.replace("\ufeff", "")  # files joined by cat have it in their middle
    while text != (text := text.strip().strip(INVISIBLE)):
        pass
    check_text(text, place)
    return text


def check_text(text: str, place: str) -> None:
    """Raises InputError for what no text encoder takes: zero bytes, halves of a surrogate pair, bytes of another
    encoding on a command line, and for formatted text."""
    if wrong := re.search("[\0\ud800-\udfff]", text):
        raise InputError(f"{place}: {wrong[0]!a} is no character of a text; expected Unicode")
    if len(text) > LONGEST_PROMPT:
        raise InputError(f"{place}: {len(text)} characters; expected a prompt of at most {LONGEST_PROMPT}")
    if text.lower().startswith(("version https://git-lfs", "<!doctype html", "<html", "{\\rtf")):
        raise InputError(f"{place}: {short(text, 40)} is of a web page, a Git LFS pointer or formatted text; expected "
                         "a prompt")


def digest(prompts: list[str]) -> str:
    """Tells whether a prompt file is still what it was when a run began."""
    return blake2b(json.dumps(prompts).encode(), digest_size=8).hexdigest()


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, line without its end) of a UTF-8 file, with or without byte order mark. A line ends in
    LF, CR LF or CR."""
    number = 0
    with path.open("rb") as file:
        for block in iter(lambda: file.readline(LONGEST + 1), b""):
            if len(block) > LONGEST:
                raise InputError(f"{path}: line {number + 1} has more than {LONGEST} bytes; expected lines of text")
            for line in block.rstrip(b"\r\n").split(b"\r"):
                number += 1
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    place = f"line {number} is not UTF-8 (byte {error.start + 1})"
                    raise InputError(f"{path}: {place}") from error


def field_of(path: Path, number: int, names: Iterable[str]) -> str:
    """The name that holds the prompt."""
    for field in FIELDS:
        found = [name for name in names if name.strip().lower() == field]
        if len(found) > 1:
            raise InputError(f"{path}: line {number}: {len(found)} fields {short(field, 40)}; expected one")
        if found:
            return found[0]
    raise InputError(f"{path}: line {number}: expected a field {' or '.join(FIELDS)}, found {some(names, 8)}")


def record_prompts(path: Path, number: int, record) -> Iterator[tuple[int, str]]:
    """The prompt of a record. Vript has its clips in a record "data", and of each a record "caption" whose
    "content" is the text; Open-Sora-Plan has a list of one text."""
    clips = [record]
    if isinstance(record, dict) and isinstance(record.get("data"), dict):
        clips = list(record["data"].values())
    for clip in clips:
        if not isinstance(clip, dict):
            raise InputError(f"{path}: line {number}: expected a record {{...}}, found {short(clip, 40)}")
        field = field_of(path, number, clip)
        text = clip[field]
        if isinstance(text, dict):
            text = text.get("content", text)
        if isinstance(text, list) and len(text) == 1:
            text, = text
        if text is not None and not isinstance(text, str):
            raise InputError(f"{path}: line {number}: expected text in {field!r}, found {short(text, 40)}")
        yield number, text or ""


def jsonl_prompts(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in lines_of(path):
        line = line.strip().strip(INVISIBLE)
        if not line:
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}: line {number} is not JSON ({error})") from error
        yield from [(number, record)] if isinstance(record, str) else record_prompts(
            path, number, record if isinstance(record, dict) else line)


def json_prompts(path: Path) -> Iterator[tuple[int, str]]:
    """A record, or a list of records or of texts, alone or in an object, as COCO's annotations; the "line" of a
    sentence is the place in that list."""
    try:
        records = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({short(error)})") from error
    for name in ("annotations", "prompts", "captions", "data"):
        if isinstance(records, dict) and isinstance(records.get(name), list):
            records = records[name]
    for number, record in enumerate(records if isinstance(records, list) else [records], 1):
        yield from [(number, record)] if isinstance(record, str) else record_prompts(path, number, record)


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
    def quoted(cell: str) -> bool:
        return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")

    def rows() -> Iterator[tuple[int, list[str]]]:
        cells, first, parts, quotes, length = [], 1, [], 0, 0  # parts: of an open cell, between its tabs and line ends
        for number, line in lines_of(path):
            for i, part in enumerate(line.split("\t")):
                if parts:
                    parts += ["\t" if i else "\n", part]
                else:
                    parts, quotes, length = [part], 0, 0
                quotes, length = quotes + part.count('"') * parts[0].startswith('"'), length + len(part)
                if quotes % 2 and length <= LONGEST:
                    continue
                cells.append("".join(parts))
                if quotes % 2 or len(parts) > 1 and not quoted(cells[-1]):
                    raise InputError(f"{path}: line {first}: the quotes around a cell that begins {parts[0][:40]!a} "
                                     "are not closed at its end")
                parts = []
            if not parts:
                yield first, [cell[1:-1].replace('""', '"') if quoted(cell) else cell for cell in cells]
                cells, first = [], number + 1
        if parts:
            raise InputError(f"{path}: line {first}: the quotes around a cell that begins "
                             f"{parts[0][:40]!a} are never closed")

    return column(path, rows())


def column(path: Path, rows: Iterator[tuple[int, list[str]]]) -> Iterator[tuple[int, str]]:
    """The prompts' column of a table whose first row is the header."""
    number, header = next(rows, (1, []))
    field = field_of(path, number, header)
    place = header.index(field)
    for number, row in rows:
        if not any(cell.strip(INVISIBLE) for cell in row) or [cell.strip(INVISIBLE + '"') for cell in row] == header:
            continue  # a blank line, or the header again, of tables joined by cat
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


class NoiseAhead:
    """`noise` of one iteration after another: that of the next is made in a thread while the caller works, pinned
    where a GPU will copy it."""

    def __init__(self, shape: tuple[int, ...], seed: int):
        self.shape, self.seed, self.thread = shape, seed, ThreadPoolExecutor(1)
        self.ready: dict[tuple, tuple[int, Future]] = {}

    def draw(self, iteration: int, purpose: str, indices: Sequence[int]) -> Tensor:
        x = noise(self.shape, self.seed, iteration, purpose, indices)
        return x.pin_memory() if torch.cuda.is_available() else x

    def __call__(self, iteration: int, purpose: str, indices: Sequence[int]) -> Tensor:
        """(len(indices), *shape) float32 on the CPU."""
        key = purpose, *indices
        when, ahead = self.ready.get(key, (None, None))
        x = ahead.result() if when == iteration else self.draw(iteration, purpose, indices)
        self.ready[key] = iteration + 1, self.thread.submit(self.draw, iteration + 1, purpose, indices)
        return x


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
            keep = parse_json(line)[key] <= last
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise InputError(f"{path}: line {number}: expected a record with a number {key!r}") from error
        if keep:
            kept.append(line + "\n")
    with replacing(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
