"""Pictures and videos: to files that note what made them, and back; grids and strips to look at.

PIL and PyAV are imported where they are needed: a training run without videos loads no PyAV.
Shapes: B samples, F frames of a video, H W pixels.
"""
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from models.checkpoint import InputError, replacing

if TYPE_CHECKING:
    from PIL import Image

PICTURES, VIDEOS = (".png", ".jpg", ".jpeg", ".webp"), (".mp4",)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")  # of a picture whatever its name: for others PIL may start Ghostscript


# ---- to files ----------------------------------------------------------------------------------------------

def to_uint8(image: Tensor) -> Tensor:
    """Images (... 3 H W) from [-1, 1], clamped and rounded, to 0..255; uint8 passes unchanged."""
    if image.dtype == torch.uint8:
        return image
    return image.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()


def picture(image: Tensor, least: int = 0) -> "Image.Image":
    """PIL image of one (3 H W); when its short side is below `least`, enlarged by a whole factor."""
    from PIL import Image
    scale = max(1, math.ceil(least / min(image.shape[-2:])))
    pixels = rearrange(to_uint8(image).cpu(), "C H W -> H W C").numpy()
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def save_picture(path: str | Path, picture: "Image.Image", text: dict[str, str] | None = None) -> None:
    from PIL.PngImagePlugin import PngInfo
    chunks = PngInfo()
    for key, value in (text or {}).items():
        chunks.add_text(key, str(value))
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", pnginfo=chunks)


def save_png(path: str | Path, image: Tensor, text: dict[str, str] | None = None) -> None:
    """One image (3 H W) in [-1, 1] or uint8; `text` (prompt, seed, ...) goes into PNG text chunks."""
    save_picture(path, picture(image), text)


def grid(images: Tensor, columns: int, least: int) -> "Image.Image":
    """Images (B 3 H W) in reading order, `columns` to a line, without margins; places left over are black.
    Images whose short side is below `least` are enlarged by a whole factor, to be seen at all."""
    from PIL import Image
    pictures = [picture(image, least) for image in images]
    width, height = pictures[0].size
    canvas = Image.new("RGB", (min(columns, len(images)) * width, math.ceil(len(images) / columns) * height))
    for i, image in enumerate(pictures):
        canvas.paste(image, (i % columns * width, i // columns * height))
    return canvas


def save_grid(path: str | Path, images: Tensor, columns: int, least: int = 128, fps: int = 8) -> None:
    """`grid` of images (B 3 H W) as PNG, of videos (B F 3 H W) as MP4, which replaces the path's suffix."""
    if images.ndim == 4:
        save_picture(path, grid(images, columns, least))
    else:
        frames = [grid(frame, columns, least) for frame in images.unbind(1)]
        save_mp4(Path(path).with_suffix(".mp4"), frames, fps)


def save_mp4(path: str | Path, frames: list["Image.Image"], fps: int,
             text: dict[str, str] | None = None) -> None:
    """H.264 in MP4 through PyAV, with the index in front, as players in browsers want it; `text` becomes its
    comment. An odd last line or column, which H.264's usual pixel format lacks, is cut off. Where FFmpeg was
    built without libx264, its MPEG-4 Part 2 at a high rate."""
    import av
    with replacing(path) as temporary, av.open(temporary, "w", format="mp4",
                                               options={"movflags": "faststart"}) as file:
        if text:
            file.metadata["comment"] = json.dumps(text)
        x264 = "libx264" in av.codecs_available
        options = {"crf": "17"} if x264 else {}
        stream = file.add_stream("libx264" if x264 else "mpeg4", rate=fps, options=options)
        stream.width, stream.height = (side // 2 * 2 for side in frames[0].size)
        stream.pix_fmt = "yuv420p"
        if not x264:
            stream.bit_rate = 8 * stream.width * stream.height * fps  # 8 bits a pixel
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
    from PIL import Image, ImageDraw, ImageFont
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


# ---- from files --------------------------------------------------------------------------------------------
# A damaged file can make PIL and PyAV raise anything, PIL's refusal of a picture too large is no OSError.

def read_text(path: Path) -> dict[str, str]:
    """What `save_png` or `save_mp4` has noted in a file. Raises InputError for damaged files."""
    try:
        if path.suffix.lower() in VIDEOS:
            from models.videos import opened
            with opened(path) as (file, _):
                note = file.metadata.get("comment", "")
            text = json.loads(note) if note.startswith("{") else {}
        else:
            from PIL import Image
            with Image.open(path, formats=FORMATS) as image:
                text = image.info
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: not a picture or video, or damaged ({error})") from error
    return {key: value for key, value in text.items() if isinstance(value, str)}


def read_picture(path: Path) -> "Image.Image":
    """Raises InputError for damaged files, and for pictures that `rgb` would make something else of."""
    from PIL import Image
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            frames = getattr(image, "n_frames", 1)
    except Exception as error:
        raise InputError(f"{path}: not a picture, or damaged ({error})") from error
    if image.mode[0] in "IF":  # PIL's conversion to RGB clamps them to 255, which leaves white
        raise InputError(f"{path}: not a picture of 8 bits a channel (PIL's mode {image.mode})")
    if max(image.size) > 64 * min(image.size):  # scaled to a short side of 224 it would fill all memory
        raise InputError(f"{path}: {image.width} x {image.height} pixels; expected sides of at most 64 to 1")
    if frames > 1 and image.format != "MPO":  # MPO: a phone's JPEG, whose other pictures are thumbnails
        raise InputError(f"{path}: not a picture but an animation of {frames} frames")
    return image


def rgb(image: "Image.Image") -> Tensor:
    """uint8 (3 H W); transparency is dropped."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def read_mp4(path: str | Path, frames: int | None = None, stride: int = 1) -> Tensor:
    """Every `stride`-th frame of a video, at most `frames` of them: uint8 (F 3 H W). Raises InputError."""
    from models.videos import read_frames  # with PyAV and PIL, which writing a picture does not need
    return read_frames(path, range(0, (frames or 10 ** 9) * stride, stride))
