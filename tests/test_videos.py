"""Real clips: the right frames of the right videos on any number of ranks, and nothing lost to a bad file."""
import csv
import json
import os
import struct
import warnings
from fractions import Fraction
from functools import partial

import av
import numpy as np
import pytest
import torch
from conftest import GOLDEN, says
from torch.nn.functional import interpolate

from models import videos
from models.checkpoint import InputError
from models.eval.prompt_sets import webvid
from models.videos import Clips, clip_indices, frame_times, read_clip, read_frames

EVERY = range(10 ** 9)
EXPECTED = json.loads((GOLDEN / "clips" / "clips.json").read_text())["clips"]


def make(path, count: int, size=(33, 47), codec="png", options=None):
    """A video whose i-th frame is of the colour (i // 256, i % 256, 7), exactly so with the codec png."""
    with av.open(path, "w", format="mp4", options={"movflags": "faststart"}) as file:
        stream = file.add_stream(codec, rate=30, options=options or {})
        (stream.height, stream.width), stream.pix_fmt = size, "rgb24" if codec == "png" else "yuv420p"
        for i in range(count):
            pixels = np.full((*size, 3), (i // 256, i % 256, 7), np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return path


def numbers(frames) -> list[int]:
    """Which frames of `make` these are."""
    red, green, _ = frames[..., 0, 0].int().unbind(1)
    return (256 * red + green).tolist()


def table(folder, rows, header=("video", "caption"), name="t.csv", encoding="utf-8", **style):
    with (folder / name).open("w", newline="", encoding=encoding) as file:
        csv.writer(file, **style).writerows([header, *rows])
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four good videos, and one each that is too short, empty, no video."""
    folder, names = tmp_path_factory.mktemp("videos"), ["15", "16", "40", "61", "200", "empty", "text"]
    for name in names[:5]:
        make(folder / f"{name}.mp4", int(name))
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("no video")
    return table(folder, [(f"{name}.mp4", f"video {name}") for name in names])


# ---- frames ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", EXPECTED)
def test_golden_videos(name):
    """Rotated, variable rate, 10 bit, cut off, audio only: as many frames, as large, of the same colours."""
    path, expected = GOLDEN / "clips" / name, EXPECTED[name]
    if expected["result"] == "skip":
        assert str(path) in says(read_frames, path, EVERY) and str(path) in says(frame_times, path)
        return
    frames, (width, height) = read_frames(path, EVERY), expected["size"]
    assert frames.shape == (expected["frames"], 3, height, width) and frames.dtype == torch.uint8
    assert len(frame_times(path)) == expected["frames"]  # counted without decoding
    for i, mean in expected["mean_rgb"].items():
        frame, corner = frames[int(i)].float(), expected["top_left_mean_rgb"][i]
        found = torch.stack([frame.mean((1, 2)), frame[:, :height // 2 - 4, :width // 2 - 4].mean((1, 2))])
        assert (found - torch.tensor([mean, corner])).abs().max() < 2  # the golden notes' tolerance


def test_long_videos_are_entered_at_a_key_frame(tmp_path, monkeypatch):
    """The frames are those of decoding from the start, with B frames and from any place of a group."""
    path = make(tmp_path / "x.mp4", 700, (16, 16), "libx264", {"g": "50", "bf": "3", "preset": "ultrafast"})
    times, every, seen, decoded = frame_times(path), read_frames(path, EVERY), [], videos.decoded
    monkeypatch.setattr(videos, "decoded", lambda *stream: (seen.append(1) or f for f in decoded(*stream)))
    for start in (0, 49, 50, 333, 684):
        seen.clear()
        assert torch.equal(read_frames(path, range(start, start + 16), times=times), every[start:start + 16])
        assert len(seen) <= 50 + 16  # a group and the frames
    assert len(read_frames(path, range(690, 800, 5), times=times)) == 2
    late = [time + 1 for time in times]  # at which there are no frames: decoded from the start after all
    assert torch.equal(read_frames(path, [333, 334], times=late), every[333:335])


def test_what_is_left_of_a_video_that_was_cut_off(tmp_path):
    """In the middle of a frame: those before it are there, and a clip is drawn among them."""
    path = make(tmp_path / "x.mp4", 120, (32, 32), "libx264")
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 9 // 10])
    with av.open(path) as file:
        assert file.streams.video[0].frames == 120
    count = len(read_frames(path, EVERY))
    assert 70 < count < 120 and len(frame_times(path)) == count
    assert len(read_clip(path, 0.999, (32, 32), 16, 4)) == 16


@pytest.mark.parametrize("count, start", [(16, None), (60, None), (61, 0), (62, 1), (200, 126)])
def test_which_frames_make_a_clip(count, start):
    """At u = 0.9 of the places to start; too short for that, all of the video as AnimateDiff takes them."""
    short = np.linspace(0, count - 1, 16).astype(int).tolist()
    assert clip_indices(count, 0.9, 16, 4) == (short if start is None else list(range(start, start + 61, 4)))
    assert clip_indices(count, 0, 16, 4)[0] == 0 and clip_indices(count, 1 - 2 ** -24, 16, 4)[-1] == count - 1


def test_frames_and_clips_of_files(folder, monkeypatch):
    assert numbers(read_frames(folder / "40.mp4", [0, 3, 39])) == [0, 3, 39]
    assert numbers(read_frames(folder / "40.mp4", range(30, 70, 4))) == [30, 34, 38]
    assert read_frames(folder / "40.mp4", [5]).shape == (1, 3, 33, 47)
    cut = partial(read_clip, size=(8, 8), frames=16, stride=4)
    for count in (16, 40, 61, 200):
        assert numbers(cut(folder / f"{count}.mp4", 0.7)) == clip_indices(count, 0.7, 16, 4)
    assert numbers(read_clip(folder / "40.mp4", 0.5, (8, 8), 9, 2)) == list(range(12, 29, 2))  # 24 places
    assert says(cut, folder / "15.mp4", 0.7).endswith("15.mp4: 15 frames; expected at least 16")
    # Packets that hold no frame: the start is drawn again among the frames that there are.
    monkeypatch.setattr(videos, "frame_times", lambda path: list(range(300)))
    assert numbers(cut(folder / "200.mp4", 0.9)) == clip_indices(200, 0.9, 16, 4)
    assert "15 frames" in says(cut, folder / "15.mp4", 0.7)


def test_damage_within_a_video_is_told(tmp_path):
    """A decoder would paint over it, and the frames around it be of no caption."""
    data = bytearray(make(tmp_path / "whole.mp4", 60, (64, 64), "mpeg4").read_bytes())
    start = data.index(b"mdat")
    data[start + 2000:start + 2400] = bytes(range(200)) * 2
    (tmp_path / "damaged.mp4").write_bytes(data)
    assert len(read_frames(tmp_path / "whole.mp4", range(60))) == 60
    assert "damaged.mp4" in says(read_frames, tmp_path / "damaged.mp4", range(60))


@pytest.mark.parametrize("matrix, turned", [
    ((-1, 0, 0, 1), lambda x: x.flip(-1)), ((1, 0, 0, -1), lambda x: x.flip(-2)), ((-1, 0, 0, -1), lambda x: x.flip(-1, -2))])
def test_a_video_is_read_as_a_player_shows_it(tmp_path, matrix, turned):
    """The display matrix of an MP4: mirrored, as some front cameras want it, or half turned."""
    path = tmp_path / "x.mp4"
    with av.open(path, "w", format="mp4") as file:
        stream = file.add_stream("png", rate=30)
        stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
        pixels = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
        file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    plain, data = read_frames(path, [0]), bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 4 + 40, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    assert torch.equal(read_frames(path, [0]), turned(plain))


def test_pixels_that_are_no_squares(tmp_path):
    """As of DV and of DVDs: 16 columns that are each as wide as two, of which the middle 8 make a square."""
    pixels = np.random.RandomState(0).randint(0, 256, (16, 16, 3), dtype=np.uint8)
    for wide in (1, 2):
        with av.open(tmp_path / f"{wide}.mp4", "w") as file:
            stream = file.add_stream("ffv1", rate=30)
            stream.height, stream.width, stream.pix_fmt = 16, 16, "bgr0"
            stream.codec_context.sample_aspect_ratio = Fraction(wide)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            file.mux(stream.encode())
    assert torch.equal(read_frames(tmp_path / "1.mp4", [0], (16, 16)), read_frames(tmp_path / "1.mp4", [0]))
    found = read_frames(tmp_path / "2.mp4", [0], (16, 16))[0].permute(1, 2, 0).numpy()
    middle = videos.Image.fromarray(pixels[:, 4:12]).resize((16, 16), videos.Image.Resampling.BILINEAR)
    assert np.abs(found[:, 2:14].astype(int) - np.asarray(middle)[:, 2:14]).max() <= 1


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.mp4")
    assert says(read_frames, tmp_path / "x.mp4", [0]) == f"{tmp_path / 'x.mp4'}: no file; expected a video"


def test_resize_and_crop():
    pixels = torch.randint(256, (3, 64, 96), dtype=torch.uint8)
    image = videos.Image.fromarray(pixels.permute(1, 2, 0).numpy())
    whole = interpolate(pixels[None].float(), (32, 48), mode="bilinear", antialias=True)[0]
    found = torch.from_numpy(np.array(videos.fit(image, (32, 32)))).permute(2, 0, 1)
    assert (found - whole[..., 8:40]).abs().max() <= 1  # rounded once along each axis
    assert videos.fit(image, (48, 16)).size == (16, 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        videos.fit(image, (64, 64))
        with pytest.raises(UserWarning, match="smaller than 128x128 pixels are enlarged"):
            videos.fit(image, (128, 128))


# ---- tables ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("style", [{}, {"encoding": "utf-8-sig"}, {"lineterminator": "\n"}, {"quoting": 1}])
def test_rows_whose_file_is_there(tmp_path, style):
    """Names in other spellings, in folders, twice; captions with commas, quotes and line ends."""
    (tmp_path / "sub").mkdir()
    for name in ("plain.mp4", "UPPER.MP4", "suffix.mp4", "sub/x.mp4", "with space.mp4", "e\u0301\u72d0.mp4"):
        (tmp_path / name).touch()
    names = ["absent.mp4", "plain.mp4", "UPPER.MP4", "suffix.MP4", "sub/x.mp4", "with space.mp4",
             "\u00e9\u72d0.mp4", "plain.mp4", "../t.mp4", ""]
    rows = [(name, 'a dog, a "cat"\r\nand \u72d0') for name in names]
    clips = Clips(table(tmp_path, rows, **style))
    assert str(clips) == f"{tmp_path}: 7 of 10 rows of t.csv have their file"
    found = [clips.row(k) for k in range(len(clips))]
    assert [path.is_file() for path, _ in found] == [True] * 7 and found[0] == found[-1]
    assert {text for _, text in found} == {'a dog, a "cat" and \u72d0'}
    (tmp_path / "t.csv").write_text("video,caption\n")
    assert "changed since" in says(clips.row, 0)


def test_the_tables_of_openvid_and_webvid(tmp_path):
    (tmp_path / "1_5").mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4", "1_5/7.mp4", "8.mp4"):
        (tmp_path / name).touch()
    rows = [("a.mp4", "A", 5.1, 15, 30), ("b.mp4", "B", 5.1, 16.0, 30), ("c.mp4", "C", 5.1, "", 30),
            ("c.mp4", " ", 5.1, 90, 30)]
    clips = Clips(table(tmp_path, rows, ("video", "caption", "aesthetic score", "frame", "fps")))
    assert [clips.row(k)[1] for k in range(len(clips))] == ["B", "C"]
    assert "4 of 4 rows of t.csv have their file, 2 of these no caption or fewer than 16 frames" in str(clips)
    rows = [(7, "1_5", "seven"), (8, "1_5", "eight"), (9, "1_5", "nine")]
    clips = Clips(table(tmp_path, rows, ("videoid", "page_dir", "name")))
    assert len(clips) == 2 and clips.row(0) == (tmp_path / "1_5" / "7.mp4", "seven")
    assert clips.row(1) == (tmp_path / "8.mp4", "eight") and webvid(clips.table)[0] == ("1_5/7.mp4", "seven")


@pytest.mark.parametrize("content, words", [
    (b"", "expected the columns video (or videoid and page_dir) and caption or text"),
    (b"video,caption\n", "0 of 0 rows"), (b"video,score\nx.mp4,1\n", "found video, score"),
    (b"caption\nx\n", "found caption"), (b"video,caption\ny.mp4,a\n", "0 of 1 rows of t.csv have their file"),
    (b"video,caption\nx.mp4,a, b\n", "line 2 has 3 fields, the header 2"),
    (b"video,text\nx.mp4\n", "line 2 has 1 fields"), (b"video,caption\rx.mp4,a\r", "line 1 is not CSV"),
    (b'video,caption\nx.mp4,"a\nb\n', "line 2 is not CSV"), (b"video,text\n\nx,\xff\n", "line 3 is not CSV"),
    (b"video,caption\nx.mp4, \n", "1 of these no caption"), (None, "captions of its videos, found nothing")])
def test_tables_that_are_says(tmp_path, content, words):
    (tmp_path / "x.mp4").touch()
    if content is not None:
        (tmp_path / "t.csv").write_bytes(content)
    assert words in says(Clips, tmp_path)


def test_names_that_differ_in_letters_alone(tmp_path):
    """The exact name is meant where both are there."""
    for count, name in ((16, "x.mp4"), (17, "x.MP4")):
        make(tmp_path / name, count)
    clips = Clips(table(tmp_path, [("x.MP4", "upper"), ("x.mp4", "lower")]))
    assert [clips.row(k)[0].name for k in range(2)] == ["x.MP4", "x.mp4"]


def test_captions_are_checked_as_prompts_are(tmp_path):
    for name in ("x.mp4", "y.mp4"):
        (tmp_path / name).touch()
    clips = Clips(table(tmp_path, [("x.mp4", "\u200b"), ("y.mp4", "\ufeffa cat")]))
    assert len(clips) == 1 and clips.row(0)[1] == "a cat"  # an invisible caption is none
    for caption, words in (("a\0b", "is no character of a text"), ("<html>", "is of a web page")):
        said = says(Clips, table(tmp_path, [("y.mp4", "a cat"), ("x.mp4", caption)]))
        assert words in said and "t.csv: line 3: " in said


def test_the_table_is_found_or_given(tmp_path):
    (tmp_path / "x.mp4").touch()
    for name in ("a.CSV", "b.csv", "._a.csv"):
        table(tmp_path, [("x.mp4", name)], name=name)
    assert "found a.CSV, b.csv; --prompts FILE.csv names one" in says(Clips, tmp_path)
    assert Clips(tmp_path, tmp_path / "b.csv").row(0)[1] == "b.csv"
    assert "c.csv: no such file" in says(Clips, tmp_path, tmp_path / "c.csv")
    assert "nowhere: no such folder" in says(Clips, tmp_path / "nowhere")


# ---- draws -------------------------------------------------------------------------------------------------

def test_any_cut_of_a_batch_gives_the_same_clips(folder):
    """Prefetched or not, in any order; a bad video's place is taken by the next that is drawn."""
    clips, *ranks = [Clips(folder, size=(8, 8), seed=3) for _ in range(4)]
    whole, captions = clips.read(2, range(12))
    assert whole.shape == (12, 16, 3, 8, 8) and whole.dtype == torch.float32
    assert set(captions) == {f"video {n}" for n in (16, 40, 61, 200)} and clips.skipped >= len(clips.bad) == 3
    starts = set()
    for clip, count in zip(((whole + 1) * 127.5).round(), (int(caption.split()[1]) for caption in captions)):
        found = numbers(clip)
        assert found == clip_indices(count, (found[0] + 0.5) / max(1, count - 60), 16, 4)
        starts.add(found[0])
    assert len(starts) > 2
    cuts = (range(0, 4), range(4, 8), range(8, 12))
    for rank, mine in zip(ranks, cuts):
        rank.prefetch(1, [0, 1])  # never read
        rank.prefetch(2, mine)
    parts = [rank.read(2, mine) for rank, mine in zip(ranks, cuts)]
    assert torch.equal(torch.cat([part for part, _ in parts]), whole)
    assert not any(rank.ahead for rank in ranks)
    assert sum((texts for _, texts in parts), []) == captions
    assert sum(rank.skipped for rank in ranks) == clips.skipped
    assert Clips(folder, size=(8, 8), seed=4).read(2, range(12))[1] != captions
    again, texts = clips.read(2, [7, 3, 3], rows=[4, 4, 0])  # rows given: only the last, 15 frames, is bad
    assert texts[:2] == ["video 200"] * 2 and texts[2] != "video 15"
    assert again[0].ne(again[1]).any() and clips.read(3, [7], rows=[4])[0].ne(again[:1]).any()


def test_eight_bad_videos_in_a_row_end_it(tmp_path, monkeypatch):
    for i in range(9):
        (tmp_path / f"{i}.mp4").touch()
    clips, tried = Clips(table(tmp_path, [(f"{i}.mp4", "a") for i in range(9)])), []
    assert f"{tmp_path}: 8 videos in a row are of no use, the last: {tmp_path}" in says(clips.read, 1, [0])

    def seven_bad(path, *_):
        tried.append(path.name)
        if len(tried) < 8:
            raise InputError(f"{path}: bad")
        return torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(videos, "read_clip", seven_bad)
    clips.read(1, [1])
    assert len(tried) == len(set(tried)) == 8 and clips.skipped == len(clips.bad) == 7  # no video twice
    monkeypatch.setattr(videos, "read_clip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # an error in a worker is no skip
        clips.read(1, [2])
