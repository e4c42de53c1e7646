"""Real video clips with captions: the data set of AVDM2's Eq. (6).

    clips = Clips("OpenVid", size=(512, 512), frames=16, stride=4, seed=0)
    video, captions = clips.read(iteration, indices)      # (B T 3 H W) in [-1, 1], B texts
    clips.prefetch(iteration + 1, indices)                # decoded while the networks work

Which clip a sample gets depends on (seed, iteration, sample index) alone, as all draws of models/data.py.
Letters: B clips, T frames of a clip, H W pixels, F frames of a whole video, N frames asked for.
"""
import csv
import os
import posixpath
import unicodedata
import warnings
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from models.checkpoint import InputError, some
from models.data import LONGEST, cleaned, hashed, prompt_index, uniform

ATTEMPTS = 8  # videos tried for one sample
LONG = 600    # frames from which on seeking is worth it
CAPTIONS = ("caption", "text", "prompt", "name")
# What a file may be whatever its name: not a list of other files or addresses, which FFmpeg would open.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,gif"
LARGEST = 2 ** 32  # bytes of pixels that are read of one video


# ---- frames of one video -----------------------------------------------------------------------------------

@contextmanager
def opened(path: str | Path) -> Iterator[tuple]:
    """PyAV's container and its best video stream. Raises InputError, also for what its use in the block raises."""
    import av  # takes a quarter of a second, and not every run reads videos
    if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
        raise InputError(f"{path}: no file; expected a video")
    try:
        # An absolute path, because "a:b.mp4" alone would be a protocol.
        options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
        with av.open(os.path.abspath(path), metadata_errors="replace", options=options) as file:
            stream = file.streams.best("video")
            if stream is None or stream.codec_context is None:
                raise InputError(f"{path}: no video in this file, or none that can be decoded")
            coder = stream.codec_context
            if 3 * coder.width * coder.height > LARGEST:
                raise InputError(f"{path}: frames of {coder.width} x {coder.height} pixels; expected at most {LARGEST} "
                                 "bytes of pixels")
            coder.options, coder.thread_count = {"err_detect": "explode"}, 1  # damage is told; several run side by side
            yield file, stream
    except InputError:
        raise
    except (av.FFmpegError, OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error  # without the path again
        raise InputError(f"{path}: not a video, or damaged ({reason})") from error


def frame_times(path: str | Path) -> list[int | None]:
    """The time of each frame in the order of the file, in the stream's unit; None where the file tells none.
    Counts what is there and decodes nothing: headers promise more than a file that was cut off holds."""
    with opened(path) as (file, stream):
        return [packet.pts for packet in file.demux(stream)
                if packet.size and not packet.is_discard and not packet.is_corrupt]


def decoded(file, stream) -> Iterator:
    """The frames that are whole, in the order they are shown."""
    for packet in file.demux(stream):
        if not packet.is_corrupt:  # what is left of the last frame of a file that was cut off
            yield from packet.decode()


def mirrored(frame) -> bool:
    """Whether a player shows a frame as a mirror does, beside turning it: some phones' front cameras ask for it."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    a, b, _, c, d = (1, 0, 0, 0, 1) if matrix is None else np.frombuffer(matrix, np.int32)[:5].tolist()
    return a * d < b * c


def read_frames(path: str | Path, indices: Sequence[int], size: tuple[int, int] | None = None,
                times: list[int | None] = ()) -> Tensor:
    """Frames of a video by ascending indices, as a player turns them: uint8 (N 3 H W), fewer where the video
    ends before. `size`: each as `fit` cuts it. Decodes from the first frame on, or of a long video, where
    `times` are those of `frame_times`, from the last key frame before. Raises InputError for no video."""
    frames, wanted, places, i = [], iter(indices), {}, -1
    index = next(wanted, None)
    with opened(path) as (file, stream):
        if len(times) > LONG and None not in times:
            places = {time: i for i, time in enumerate(sorted(times))}
            file.seek(sorted(times)[index], stream=stream)
        for i, frame in enumerate(decoded(file, stream)):
            if (places.get(frame.pts) if places else i) == index:
                shown = frame.to_ndarray(format="rgb24")[::-1 if mirrored(frame) else 1]
                turns = round(frame.rotation / 90)
                pixels, wide = np.rot90(shown, turns), float(stream.sample_aspect_ratio or 1)  # 0: not known
                wide = 1 / wide if turns % 2 else wide
                frames.append(np.array(fit(Image.fromarray(pixels), size, wide) if size else pixels))
                if len(frames) * frames[-1].nbytes > LARGEST:
                    raise InputError(f"{path}: more than {LARGEST} bytes of pixels; expected a shorter video")
                index = next(wanted, None)
                if index is None:
                    break
        if places and len(frames) < len(indices):  # not every format tells where to begin
            return read_frames(path, indices, size)
        if i < 0:
            raise InputError(f"{path}: no frames in this video")
        if not frames:
            return torch.empty(0, 3, *(size or (0, 0)), dtype=torch.uint8)
        return rearrange(torch.from_numpy(np.stack(frames)), "N H W C -> N C H W")


def fit(image: Image.Image, size: tuple[int, int], wide: float = 1.0) -> Image.Image:
    """The largest part from the centre with the proportions of (height, width), bilinear with antialiasing;
    of a square the short side is kept. A smaller picture is enlarged. `wide`: of a pixel, in units of its height."""
    (W, H), (height, width) = image.size, size
    width, columns = width / wide, width
    scale = min(W / width, H / height)
    if scale < 1:
        warnings.warn(f"videos smaller than {height}x{columns} pixels are enlarged", stacklevel=2)
    left, top = max(0.0, (W - scale * width) / 2), max(0.0, (H - scale * height) / 2)
    return image.resize((columns, height), Image.Resampling.BILINEAR, box=(left, top, W - left, H - top))


def clip_indices(F: int, u: float, frames: int, stride: int) -> list[int]:
    """Which of F >= `frames` frames make a clip: every `stride`-th from a start that u in [0, 1) chooses, or
    evenly spaced ones of a video too short for that, from its first to its last."""
    span = (frames - 1) * stride + 1
    if F < span:  # [choice] as AnimateDiff's training does; the paper does not say
        return [i * (F - 1) // (frames - 1) for i in range(frames)]
    start = int(u * (F - span + 1))
    return list(range(start, start + span, stride))


def read_clip(path: str | Path, u: float, size: tuple[int, int], frames: int, stride: int) -> Tensor:
    """uint8 (T 3 H W) of a video: `clip_indices`, each frame as `fit` cuts it. Raises InputError for a video
    that is shorter than `frames` or cannot be read."""
    times = frame_times(path)
    F = len(times)
    for _ in range(2):
        if F < frames:
            raise InputError(f"{path}: {F} frames; expected at least {frames}")
        clip = read_frames(path, clip_indices(F, u, frames, stride), size, times)
        if len(clip) == frames:
            return clip
        with opened(path) as (file, stream):  # some of what is in the file is no frame
            F, times = sum(1 for _ in decoded(file, stream)), ()
    raise InputError(f"{path}: damaged, its frames cannot be counted")


# ---- captions ----------------------------------------------------------------------------------------------

def webvid_files(page_dir: str, videoid: str) -> tuple[str, str]:
    """Where a download of WebVid has a video: in its page's folder, or without that."""
    return f"{page_dir}/{videoid}.mp4", f"{videoid}.mp4"


def records(path: Path, offset: int = 0) -> Iterator[tuple[int, int, list[str]]]:
    """(line number, byte offset, cells) of each row of a CSV file in UTF-8 from `offset` on, with or without
    byte order mark; blank lines are left out. Raises InputError."""
    def lines(file: BinaryIO) -> Iterator[str]:
        for line in iter(lambda: file.readline(LONGEST + 1), b""):
            if len(line) > LONGEST:
                raise csv.Error(f"a line of more than {LONGEST} bytes")
            yield line.decode()

    number = 1
    with path.open("rb") as file:
        file.seek(offset or 3 * (file.read(3) == b"\xef\xbb\xbf"))
        reader = csv.reader(lines(file), strict=True)
        try:
            offset = file.tell()
            for cells in reader:
                if any(cells):
                    yield number, offset, cells
                number, offset = reader.line_num + 1, file.tell()
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{path}: line {number} is not CSV in UTF-8 ({error})") from error


def spelling(name: str) -> str:
    """A file's name as a table and a disk may agree on: x.MP4 is x.mp4, and an accent has one form."""
    stem, suffix = posixpath.splitext(posixpath.normpath(name.strip()))
    return unicodedata.normalize("NFC", stem) + suffix.lower()


def table_in(folder: Path) -> Path:
    """The one .csv file of a folder. Raises InputError."""
    tables = sorted(path for path in folder.iterdir()
                    if path.suffix.lower() == ".csv" and not path.name.startswith("."))
    if len(tables) != 1:
        raise InputError(f"{folder}: expected one .csv file with the captions of its videos, found "
                         f"{some(path.name for path in tables)}; --prompts FILE.csv names one")
    return tables[0]


def files_in(folder: Path) -> Iterator[str]:
    """The files in a folder and below, relative to it. A link to a folder that it stands in is not followed."""
    for above, inner, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(above)
        if os.path.islink(above) and any(os.path.realpath(path) == real for path in Path(above).absolute().parents):
            inner.clear()
            continue
        prefix = "" if above == str(folder) else os.path.relpath(above, folder) + "/"
        yield from (prefix + name for name in names)


def below(text: str, least: int) -> bool:
    """True where a cell holds a smaller number."""
    try:
        return float(text) < least
    except ValueError:
        return False


class Clips:
    """Captioned clips of the videos in a folder. Its one .csv file, or `table`, has a row for each video: the
    file in `video` (OpenVid-1M) or in `page_dir` and `videoid` (WebVid), the caption in one of CAPTIONS.

    `skipped` counts videos that were drawn and are of no use, `bad` says of the first 20 which and why."""

    def __init__(self, folder: str | Path, table: str | Path | None = None, size: tuple[int, int] = (512, 512),
                 frames: int = 16, stride: int = 4, seed: int = 0, workers: int = 4):
        self.folder, self.size, self.frames, self.stride, self.seed = Path(folder), size, frames, stride, seed
        if not self.folder.is_dir():
            raise InputError(f"{folder}: no such folder; expected videos and a .csv file with their captions")
        self.table = Path(table) if table else table_in(self.folder)
        if not self.table.is_file():
            raise InputError(f"{table}: no such file; expected a .csv file with the captions of {folder}")
        self.skipped, self.bad = 0, []
        self.rows, self.total = array("q"), 0  # where the usable rows begin in the table; of how many
        self.spelt: dict[str, str] = {}        # `spelling` of a file -> the file, where they differ
        self.columns: dict[str, int] = {}
        self.scan()
        self.ahead: dict[tuple, Future] = {}   # arguments of `clip` -> its result
        self.pool = ThreadPoolExecutor(workers, "clips")

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        return (f"{self.folder}: {self.found} of {self.total} rows of {self.table.name} have their file"
                + f", {self.found - len(self)} of these no caption or fewer than {self.frames} frames"
                * (self.found > len(self)))

    def scan(self) -> None:
        """Find the rows whose file is there. Kept are their places in the table and not their texts, 700 MB
        in OpenVid-1M. Raises InputError when there are none."""
        spelt = {spelling(name): name for name in files_in(self.folder)}
        rows, self.bytes = records(self.table), self.table.stat().st_size
        _, _, header = next(rows, (1, 0, []))
        names = [name.strip().lower() for name in header]
        self.columns, known = {name: i for i, name in enumerate(names)}, ("video", "videoid", "page_dir", *CAPTIONS)
        twice = any(names.count(name) > 1 for name in known)
        if twice or not ({"video", "videoid"} & {*names} and {*names} & {*CAPTIONS}):
            raise InputError(f"{self.table}: expected the columns video (or videoid and page_dir) and "
                             f"{' or '.join(CAPTIONS)}, none of them twice, found {some(header, 8)}")
        self.found = 0
        for number, offset, cells in rows:
            if len(cells) != len(header):
                raise InputError(f"{self.table}: line {number} has {len(cells)} fields, the header "
                                 f"{len(header)}; expected captions that hold the separator in quotes")
            self.total += 1
            files = self.files(cells)
            if spelt.keys().isdisjoint([*files, *map(spelling, files)]):
                continue
            self.found += 1
            text = cleaned(self.caption(cells), f"{self.table}: line {number}")
            if text and not below(self.cell(cells, "frame"), self.frames):
                self.rows.append(offset)
        if not self.rows:
            raise InputError(f"{self}; expected at least one to train on")
        self.spelt = {other: name for other, name in spelt.items() if other != name}

    def cell(self, cells: list[str], column: str) -> str:
        return cells[self.columns[column]] if column in self.columns else ""

    def caption(self, cells: list[str]) -> str:
        return cells[next(self.columns[name] for name in CAPTIONS if name in self.columns)]

    def files(self, cells: list[str]) -> Sequence[str]:
        """The names that a row's file may have, relative to the folder."""
        if "video" in self.columns:
            return [self.cell(cells, "video")]
        return webvid_files(self.cell(cells, "page_dir"), self.cell(cells, "videoid"))

    def row(self, k: int) -> tuple[Path, str]:
        """(file, caption) of a place in range(len(self))."""
        if self.table.stat().st_size != self.bytes:
            raise InputError(f"{self.table}: changed since this run began to read it")
        _, _, cells = next(records(self.table, self.rows[k]))
        paths = [self.folder / name for file in self.files(cells)  # x.mp4 may stand beside x.MP4
                 for name in (file, self.spelt.get(spelling(file), spelling(file)))]
        caption = " ".join(cleaned(self.caption(cells), str(self.table)).split())
        return next((path for path in paths if path.is_file()), paths[0]), caption

    def clip(self, iteration: int, index: int, row: int | None = None) -> tuple[Tensor, str, list[str]]:
        """(uint8 (T 3 H W), caption, what was wrong with the videos drawn before) of one sample. `row`: the
        first to try, in place of a draw. Raises InputError when ATTEMPTS videos are of no use."""
        u = uniform(self.seed, iteration, "start", [index]).item()
        order, faults = hashed(self.seed, iteration, "video", index), []
        for attempt in range(ATTEMPTS):
            drawn = row is None or attempt > 0
            path, caption = self.row(prompt_index(order, attempt, len(self)) if drawn else row)
            try:
                return read_clip(path, u, self.size, self.frames, self.stride), caption, faults
            except InputError as error:
                faults.append(str(error))
        raise InputError(f"{self.folder}: {ATTEMPTS} videos in a row are of no use, the last: {faults[-1]}")

    def prefetch(self, iteration: int, indices: Sequence[int], rows: Sequence[int] | None = None) -> list[tuple]:
        """Begin to decode what `read` will be asked for, which gives the same without."""
        keys = [(iteration, index, row) for index, row in zip(indices, rows or [None] * len(indices))]
        for key in keys:
            if key not in self.ahead:
                self.ahead[key] = self.pool.submit(self.clip, *key)
        return keys

    def read(self, iteration: int, indices: Sequence[int],
             rows: Sequence[int] | None = None) -> tuple[Tensor, list[str]]:
        """(clips (B T 3 H W) in [-1, 1] float32 on the CPU, captions) of global sample indices."""
        for key in [key for key in self.ahead if key[0] < iteration]:
            self.ahead.pop(key).cancel()
        keys = self.prefetch(iteration, indices, rows)
        clips, captions, faults = zip(*(self.ahead[key].result() for key in keys))
        for key in keys:
            self.ahead.pop(key, None)
        for fault in (fault for of_one in faults for fault in of_one):
            self.skipped += 1
            if len(self.bad) < 20 and fault not in self.bad:
                self.bad.append(fault)
        return torch.stack(clips).float() / 127.5 - 1, list(captions)
