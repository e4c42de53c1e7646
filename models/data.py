"""Prompt files, stateless sampling, ODE pairs, pictures, videos and metrics.

Which prompt, noise and time a sample gets depends on (seed, iteration, purpose, global sample index) alone,
never on a running generator: any number of ranks cuts the same batch, and resuming needs no data state.
"""
import csv
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, file_digest
from itertools import accumulate
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from models.checkpoint import InputError, Tensors, open_tensors, replacing, save_safetensors, some

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


# ---- ODE pairs ---------------------------------------------------------------------------------------------
# A folder of shards, files of x_T and x_0 (B C h w or B T C h w), guidance scale w (B,), index (B,) and prompts (the bytes
# of a JSON list), and manifest.json: the settings, the "count" asked for, and the "shards" that are finished.
# A shard is written before the manifest names it: whatever is not named there does not count.

def sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def read_manifest(folder: str | Path) -> dict:
    """Raises InputError when there is none or it is damaged."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a folder of ODE pairs made by collect_odes.py")
    try:
        manifest = json.loads(path.read_bytes())
        for key in ("model", "size", "latent_shape", "count"):
            manifest[key]
        for entry in manifest["shards"]:
            entry["file"], entry["sha256"], entry["first"] + entry["count"] + entry["bytes"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged, not the manifest of ODE pairs "
                         f"({type(error).__name__}: {error})") from error
    return manifest


def write_manifest(folder: str | Path, manifest: dict) -> None:
    with replacing(Path(folder) / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


def write_shard(folder: str | Path, first: int, x_T: Tensor, x_0: Tensor, w: Tensor,
                prompts: list[str]) -> dict:
    """Write the pairs from index `first` on: the shard's entry for the manifest."""
    path = Path(folder) / f"pairs_{first:08d}-{first + len(x_0) - 1:08d}.safetensors"
    # Not in the file's metadata, whose order in the file differs from one writing to the next.
    text = torch.frombuffer(bytearray(json.dumps(prompts).encode()), dtype=torch.uint8)
    index = torch.arange(first, first + len(x_0))
    save_safetensors(path, dict(x_T=x_T, x_0=x_0, w=w, index=index, prompts=text))
    return dict(file=path.name, first=first, count=len(x_0), bytes=path.stat().st_size, sha256=sha256(path))


def shard_fault(folder: str | Path, manifest: dict, entry: dict, every_byte: bool = True) -> str:
    """What is wrong with a finished shard, "" if nothing; without `every_byte` only size and header count."""
    path, n = Path(folder) / entry["file"], entry["count"]
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes, expected {entry['bytes']}"
    try:
        tensors = open_tensors(path)
    except InputError:
        return "damaged header"
    latents = (n, *manifest["latent_shape"])
    expected = {"x_T": latents, "x_0": latents, "w": (n,), "index": (n,)}
    wrong = [name for name, shape in expected.items() if tensors.shapes.get(name) != shape]
    if wrong or "prompts" not in tensors:
        return f"another shape of {some(wrong or ['prompts'])}"
    if every_byte and sha256(path) != entry["sha256"]:
        return "its sha256 is not that of the manifest"
    if every_byte and tensors["index"].tolist() != list(range(entry["first"], entry["first"] + n)):
        return f"not the pairs {entry['first']} to {entry['first'] + n - 1}"
    return ""


class Pairs:
    """Finished ODE pairs of a folder; `open_pairs` makes it. `total`: how many the folder will have."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest = folder, manifest
        self.shards, self.total = manifest["shards"], manifest["count"]
        self.starts = [0, *accumulate(entry["count"] for entry in self.shards)]
        self.opened: dict[int, Tensors] = {}
        self.prompts: dict[int, list[str]] = {}  # of the shards whose bytes have been checked

    def __len__(self) -> int:
        return self.starts[-1]

    def __str__(self) -> str:
        height, width = self.manifest["size"]
        unfinished = f" of {self.total}, not all collected yet" * (len(self) < self.total)
        return (f"{self.folder}: ODE pairs of {self.manifest['model']} at {height}x{width}, "
                f"{len(self)}{unfinished}")

    def shard(self, k: int) -> Tensors:
        if k not in self.opened:
            path = self.folder / self.shards[k]["file"]
            fault = shard_fault(self.folder, self.manifest, self.shards[k], every_byte=k not in self.prompts)
            if fault:
                raise InputError(damaged(path, fault))
            if len(self.opened) >= 256:  # an open file each
                self.opened.pop(next(iter(self.opened)))
            self.opened[k] = open_tensors(path)
            if k not in self.prompts:
                self.prompts[k] = json.loads(self.opened[k]["prompts"].numpy().tobytes())
        return self.opened[k]

    def read(self, indices: list[int]) -> tuple[Tensor, Tensor, list[str]]:
        """(x_T and x_0 (B C h w or B T C h w), prompts), float32 on the CPU; an index is a place in range(len).

        Reads these rows only; the first time all of their shard, and raises InputError if it is damaged."""
        x_T, x_0, prompts = [], [], []
        for i in indices:
            i = range(len(self))[i]
            k = bisect_right(self.starts, i) - 1
            tensors, row = self.shard(k), i - self.starts[k]
            x_T.append(tensors.rows("x_T", row, row + 1))
            x_0.append(tensors.rows("x_0", row, row + 1))
            prompts.append(self.prompts[k][row])
        return torch.cat(x_T).float(), torch.cat(x_0).float(), prompts


def damaged(path: Path, fault: str) -> str:
    return f"{path}: {fault}; `collect_odes.py --verify --out {path.parent}` checks every shard"


def open_pairs(folder: str | Path, model: str, latent_shape: tuple[int, ...]) -> Pairs:
    """The pairs in a folder of collect_odes.py. Raises InputError for another model or size, when no pair is
    finished, and when a shard is missing or cut short; its bytes are checked when it is first read."""
    folder, manifest = Path(folder), read_manifest(folder)
    found, expected = (" x ".join(map(str, shape)) for shape in (manifest["latent_shape"], latent_shape))
    if (manifest["model"], found) != (model, expected):
        height, width = manifest["size"]
        raise InputError(f"{folder}: pairs of {manifest['model']} at {height}x{width}, latents {found}; "
                         f"expected {model}, latents {expected}")
    for entry in manifest["shards"]:
        fault = shard_fault(folder, manifest, entry, every_byte=False)
        if fault:
            raise InputError(damaged(folder / entry["file"], fault))
    if not manifest["shards"]:
        raise InputError(f"{folder}: 0 of {manifest['count']} pairs are finished; let collect_odes.py go on")
    return Pairs(folder, manifest)


# ---- pictures ----------------------------------------------------------------------------------------------

def to_uint8(image: Tensor) -> Tensor:
    """Images (... 3 H W) from [-1, 1], clamped and rounded, to 0..255; uint8 passes unchanged."""
    if image.dtype == torch.uint8:
        return image
    return image.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()


def picture(image: Tensor, least: int = 0) -> Image.Image:
    """PIL image of one (3 H W); when its short side is below `least`, enlarged by a whole factor."""
    scale = max(1, math.ceil(least / min(image.shape[-2:])))
    pixels = rearrange(to_uint8(image).cpu(), "C H W -> H W C").numpy()
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def save_picture(path: str | Path, picture: Image.Image, text: dict[str, str] | None = None) -> None:
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, str(value))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def save_png(path: str | Path, image: Tensor, text: dict[str, str] | None = None) -> None:
    """One image (3 H W) in [-1, 1] or uint8; `text` (prompt, seed, ...) goes into PNG text chunks."""
    save_picture(path, picture(image), text)


def grid(images: Tensor, columns: int, least: int = 128) -> Image.Image:
    """Images (B 3 H W) in reading order, `columns` to a row, without margins; places left over are black.
    Images whose short side is below `least` are enlarged by a whole factor, to be seen at all."""
    pictures = [picture(image, least) for image in images]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (min(columns, len(images)) * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(pictures):
        canvas.paste(image, (i % columns * width, i // columns * height))
    return canvas


def save_grid(path: str | Path, images: Tensor, columns: int, least: int = 128, fps: int = 8) -> Path:
    """`grid` of images (B 3 H W) as PNG, of videos (B F 3 H W) as MP4, which replaces the path's suffix."""
    if images.ndim == 4:
        save_picture(path, grid(images, columns, least))
        return Path(path)
    path = Path(path).with_suffix(".mp4")
    save_mp4(path, [grid(frame, columns, least) for frame in images.unbind(1)], fps)
    return path


def save_mp4(path: str | Path, frames: list[Image.Image], fps: int,
             text: dict[str, str] | None = None) -> None:
    """H.264 in MP4 through PyAV, with the index in front, as players in browsers want it; `text` becomes its
    comment. An odd last row or column, which H.264's usual pixel format lacks, is cut off."""
    with replacing(path) as temporary, av.open(temporary, "w", format="mp4",
                                               options={"movflags": "faststart"}) as file:
        if text:
            file.metadata["comment"] = json.dumps(text)
        stream = file.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            image = frame.crop((0, 0, stream.width, stream.height))
            file.mux(stream.encode(av.VideoFrame.from_image(image)))
        file.mux(stream.encode())


def film_strip(videos: Tensor, count: int = 6) -> Tensor:
    """Of each video (B F 3 H W) `count` frames, evenly spaced from the first to the last: (B*count 3 H W)."""
    places = torch.linspace(0, videos.shape[1] - 1, min(count, videos.shape[1])).round().long()
    return videos[:, places].flatten(0, 1)


def save_rows(path: str | Path, rows: list[tuple[str, Tensor]], least: int = 128) -> None:
    """One picture of rows (label, images (B 3 H W)), each label above its row; `least` as in `save_grid`."""
    bands = [(label, [picture(image, least) for image in images]) for label, images in rows]
    gap, tallest = 8, max(image.height for _, images in bands for image in images)
    font = ImageFont.load_default(max(16, tallest // 24))
    line = sum(font.getmetrics()) + gap
    width = max(max(math.ceil(font.getlength(label)), sum(image.width + gap for image in images) - gap)
                for label, images in bands)
    height = sum(line + max(image.height for image in images) + gap for _, images in bands)
    canvas = Image.new("RGB", (width + 2 * gap, height + gap), "white")
    y = gap
    for label, images in bands:
        ImageDraw.Draw(canvas).text((gap, y), label, "black", font)
        x, y = gap, y + line
        for image in images:
            canvas.paste(image, (x, y))
            x += image.width + gap
        y += max(image.height for image in images) + gap
    save_picture(path, canvas)


def read_mp4(path: str | Path, frames: int | None = None, stride: int = 1) -> Tensor:
    """Every `stride`-th frame of a video, at most `frames` of them: uint8 (F 3 H W). Raises InputError."""
    images = []
    try:
        with av.open(path) as file:
            for i, frame in enumerate(file.decode(video=0)):
                if i % stride == 0:
                    images.append(torch.from_numpy(frame.to_ndarray(format="rgb24")))
                if len(images) == frames:
                    break
    except (av.FFmpegError, IndexError, OSError) as error:
        raise InputError(f"{path}: not a video, or damaged ({error})") from error
    if not images:
        raise InputError(f"{path}: no frames in this video")
    return rearrange(torch.stack(images), "F H W C -> F C H W")


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
