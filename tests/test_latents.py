"""Latents of clips: as a run would encode them, nothing lost by a kill, damage found and mended."""
import os
from functools import partial

import pytest
import torch
from conftest import says
from test_videos import make, table

from models import saving
from models.data import noise
from models.job import latents
from models.parallel import init_distributed
from models.presets import PRESETS
from models.shards import open_pairs
from models.vae import AutoencoderKL
from models.videos import Clips


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four good videos, then one that is empty."""
    folder, names = tmp_path_factory.mktemp("videos"), ["16", "40", "61", "100", "empty"]
    for name in names[:4]:
        make(folder / f"{name}.mp4", int(name))
    (folder / "empty.mp4").touch()
    return table(folder, [(f"{name}.mp4", f"video {name}") for name in names])


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    init_distributed()
    return AutoencoderKL(8, (1, 2), 1, 4, shift=0.0, scale=0.5, groups=4).requires_grad_(False)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_latents_are_live_encodings(folder, vae, tmp_path):
    clips, out = Clips(folder, size=(8, 16), frames=9, stride=2), tmp_path / "a"
    encode = partial(latents.encode_clips, vae, model="m", folder=out, count=9, shard_size=4)
    encode(clips)
    cache = open_pairs(out, "m", (9, 4, 4, 8), "latents")
    for i in range(9):  # row 4 is bad, and from 5 on the rows come again
        (x_0, captions), (clip, texts) = cache.read([i]), clips.read(0, [i], [i % 5])
        live = vae.encode(clip[0], noise((9, 4, 4, 8), 0, 0, "posterior", [i])[0])
        assert captions == texts
        torch.testing.assert_close(x_0[0], live, rtol=4e-3, atol=0)  # bf16 rounds to half of 2^-7
        assert (live - vae.encode(clip[0])).std() > 0.1  # a sample, not the mean
    before, name = contents(out), "latents_00000004-00000007.safetensors"
    encode(clips)
    assert contents(out) == before
    assert "stride 3 (was 2)" in says(encode, Clips(folder, size=(8, 16), frames=9, stride=3))
    assert "of latents; expected a folder of ODE pairs" in says(open_pairs, out, "m", ())
    verify = partial(latents.main, latents.parse_args(["--verify", "--out", str(out)]))
    verify()
    (out / name).write_bytes(before[name][:-1] + bytes([before[name][-1] ^ 1]))
    assert f"5 of 9 latents are there and whole; damaged: {name}" in says(verify)
    encode(clips)  # makes it again
    assert contents(out) == before


@pytest.mark.parametrize("writes", range(5))
def test_latents_stopped_before_each_write(folder, vae, tmp_path, monkeypatch, writes):
    left, replace = iter(range(writes)), os.replace

    def stop(a, b):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(a, b)
    encode = partial(latents.encode_clips, vae, Clips(folder, size=(8, 8)), "m", count=4, shard_size=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving.os, "replace", stop)
        encode(folder=tmp_path / "a")
    (tmp_path / "a" / "latents_00000002-00000003.safetensors.tmp").write_bytes(b"half a fi")
    encode(folder=tmp_path / "a")
    encode(folder=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b") and len(contents(tmp_path / "a")) == 4  # the lock too


def test_latents_that_are_not_finite_are_not_written(folder, vae, tmp_path, monkeypatch):
    """SDXL's own VAE overflows in fp16."""
    monkeypatch.setattr(vae, "encode", lambda clip, eps: torch.full_like(eps, torch.inf))
    clips = Clips(folder, size=(8, 8), frames=9, stride=2)
    message = says(latents.encode_clips, vae, clips, "m", tmp_path / "a", 2, 2)
    assert "the VAE gives latents of clip 0 that are not finite" in message
    assert not list((tmp_path / "a").glob("latents_*"))


@pytest.mark.parametrize("model", ["tiny-sd3", "tiny-cogvideox"])
def test_models_that_avdm2_does_not_train(folder, tmp_path, model):
    args = latents.parse_args(["--model", model, "--out", str(tmp_path / "a"), "--videos", str(folder)])
    assert says(latents.main, args) == f"--model {model}: expected one that avdm2.py trains, such as animatediff"


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    row = PRESETS["tiny-sdxl"]
    row = row._replace(frames=9)
    monkeypatch.setitem(PRESETS, "tiny-sdxl", row)
    args = ["--model", "tiny-sdxl", "--out", str(tmp_path / "a")]
    assert "expected --videos FOLDER" in says(latents.main, latents.parse_args(args))
    latents.main(latents.parse_args([*args, "--videos", str(folder), "--count", "2"]))
    assert "5 of 5 rows of t.csv have their file" in capsys.readouterr().out
    x_0, captions = open_pairs(tmp_path / "a", "tiny-sdxl", (9, 4, 8, 8), "latents").read([0, 1])
    assert x_0.shape == (2, 9, 4, 8, 8) and captions == ["video 16", "video 40"]
