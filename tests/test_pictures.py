"""models/pictures.py: pictures to files and back, grids, and files that are no picture or an odd one."""
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from models.checkpoint import InputError
from models.pictures import read_picture, read_text, rgb, save_grid, save_png, save_rows, to_uint8


def pixels(path) -> np.ndarray:
    image = Image.open(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_to_uint8_rounds_and_clamps():
    value = torch.tensor([-9.0, -1.0, -0.999, -1 / 255, 0.0, 1 / 255, 0.999, 1.0, 9.0])
    assert to_uint8(value).tolist() == [0, 0, 0, 127, 128, 128, 255, 255, 255]
    assert to_uint8(value.bfloat16()).dtype == torch.uint8
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every / 127.5 - 1), every) and torch.equal(to_uint8(every), every)


def test_png_holds_the_image_and_its_text(tmp_path):
    image = torch.rand(3, 5, 7) * 2 - 1
    text = {"prompt": 'a "fox" — 狐\nsecond line', "seed": "7"}
    save_png(tmp_path / "new" / "x.png", image, text)
    assert (pixels(tmp_path / "new" / "x.png") == to_uint8(image).permute(1, 2, 0).numpy()).all()
    assert Image.open(tmp_path / "new" / "x.png").text == text
    assert os.listdir(tmp_path / "new") == ["x.png"]
    save_png(tmp_path / "y.png", to_uint8(image))
    assert (pixels(tmp_path / "y.png") == pixels(tmp_path / "new" / "x.png")).all()
    assert Image.open(tmp_path / "y.png").text == {}


def test_a_failed_save_keeps_the_old_picture(tmp_path):
    save_png(tmp_path / "x.png", torch.zeros(3, 4, 4))
    before = (tmp_path / "x.png").read_bytes()
    with pytest.raises(UnicodeEncodeError):
        save_png(tmp_path / "x.png", torch.ones(3, 4, 4), {"狐": "a PNG keyword must be Latin-1"})
    assert (tmp_path / "x.png").read_bytes() == before and os.listdir(tmp_path) == ["x.png"]


def test_grid_in_reading_order(tmp_path):
    images = to_uint8(torch.rand(5, 3, 4, 6) * 2 - 1)
    save_grid(tmp_path / "x.png", images, columns=3, least=4)
    grid, tiles = pixels(tmp_path / "x.png"), images.permute(0, 2, 3, 1).numpy()
    assert grid.shape == (8, 18, 3)
    for i, tile in enumerate(tiles):
        top, left = i // 3 * 4, i % 3 * 6
        assert (grid[top:top + 4, left:left + 6] == tile).all()
    assert (grid[4:, 12:] == 0).all()
    save_grid(tmp_path / "x.png", images[:2], columns=3, least=0)
    assert pixels(tmp_path / "x.png").shape == (4, 12, 3)


def test_small_images_are_enlarged_by_whole_pixels(tmp_path):
    images = to_uint8(torch.rand(2, 3, 32, 48) * 2 - 1)
    save_grid(tmp_path / "x.png", images, columns=2, least=100)  # 32 -> 128, the first multiple from 100
    grid = pixels(tmp_path / "x.png")
    assert grid.shape == (128, 2 * 192, 3)
    assert (grid[:, :192] == images[0].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1)).all()


def test_rows_with_labels(tmp_path):
    rows = [("teacher, 28 steps", torch.full((3, 3, 32, 32), 1.0)),
            ("student, 2 steps", torch.full((2, 3, 32, 32), -1.0))]
    rows[0][1][:, 1:] = -1  # red above, black below, on white
    save_rows(tmp_path / "x.png", rows, least=64)
    picture = pixels(tmp_path / "x.png")
    red = (picture == (255, 0, 0)).all(-1)
    assert red.sum() == 3 * 64 * 64
    tops, lefts = np.nonzero(red.any(1))[0], np.nonzero(red.any(0))[0]
    assert len(tops) == 64 and np.ptp(tops) == 63 and len(lefts) == 3 * 64 and np.ptp(lefts) > 3 * 64
    dark = (picture < 128).all(-1)
    below = dark[tops[-1] + 1:]
    second = np.nonzero(below.sum(1) == 2 * 64)[0]
    assert len(second) == 64 and np.ptp(second) == 63
    # A label, dark on white, above each of the two rows.
    assert dark[:tops[0]].any() and below[:second[0]].any() and not below[second[-1] + 1:].any()


def test_labels_are_never_cut(tmp_path):
    image = torch.ones(1, 3, 32, 32)
    save_rows(tmp_path / "short.png", [("teacher", image)])
    save_rows(tmp_path / "long.png", [("teacher " * 20, image)])
    short, long = pixels(tmp_path / "short.png"), pixels(tmp_path / "long.png")
    assert long.shape[0] == short.shape[0] and long.shape[1] > 5 * short.shape[1]
    assert (long[:, -8:] == 255).all() and (long[:, -100:] < 128).any()


# ---- files of others ---------------------------------------------------------------------------------------

def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG written by hand; colour 0 is grey, 2 RGB."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def odd_pictures(folder) -> tuple[list[str], dict[str, str]]:
    """Write pictures as others make or break them: (names of those to be read, name -> reason of the others)."""
    folder.mkdir(exist_ok=True)
    frames = [Image.fromarray(np.random.RandomState(i).randint(0, 256, (8, 8, 3), np.uint8)) for i in range(3)]
    palette = frames[0].quantize(16)
    palette.save(folder / "palette.png", transparency=bytes([0] * 8 + [255] * 8))
    frames[0].convert("CMYK").save(folder / "cmyk.jpg")
    frames[0].convert("LA").save(folder / "grey_alpha.png")
    frames[0].convert("1").save(folder / "one_bit.png")
    frames[0].save(folder / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    (folder / "rgb16.png").write_bytes(png(8, 8, 16, 2, b"".join(b"\0" + bytes(48) for _ in range(8))))
    good = sorted(path.name for path in folder.iterdir())
    frames[0].save(folder / "animated.png", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "animated.webp", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "gif.png", format="GIF", save_all=True, append_images=frames[1:])
    (folder / "grey16.png").write_bytes(png(8, 8, 16, 0, b"".join(b"\0" + bytes(16) for _ in range(8))))
    (folder / "zero.png").write_bytes(b"")
    whole = (folder / "palette.png").read_bytes()
    (folder / "half.png").write_bytes(whole[:len(whole) // 2])
    (folder / "half.jpg").write_bytes((folder / "cmyk.jpg").read_bytes()[:-200])
    (folder / "huge.png").write_bytes(png(60000, 60000, 8, 2, b""))
    return good, {"animated.png": "an animation of 3 frames", "animated.webp": "an animation of 3 frames",
                  "gif.png": "an animation of 3 frames", "grey16.png": "not a picture of 8 bits a channel",
                  "zero.png": "not a picture", "half.png": "not a picture", "half.jpg": "not a picture",
                  "huge.png": "or damaged (Image size (3600000000 pixels) exceeds limit"}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_pictures_of_others_are_read_or_refused_by_name(tmp_path):
    good, bad = odd_pictures(tmp_path)
    for name in good:
        assert rgb(read_picture(tmp_path / name)).shape == (3, 8, 8), name
    for name, reason in bad.items():
        with pytest.raises(InputError) as caught:
            read_text(tmp_path / name)
            read_picture(tmp_path / name)
        message = str(caught.value)
        assert message.startswith(f"{tmp_path / name}: not a picture") and reason in message and "\n" not in message


def test_training_scripts_load_no_video_library_and_no_evaluator():
    code = ("import sys, adm; print([name for name in sys.modules if name == 'av' or name.startswith('models.eval.')"
            " and name != 'models.eval.metrics'])")
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"
