"""Video end to end: the presets against the manifests, the scripts on tiny-cogvideox, sequence parallelism."""
import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from conftest import ROOT, golden, run
from PIL import Image
from test_parallel import figures, rows, weights

import adm
import adp
import collect_odes
import dmd
import sample
from models.job import networks
from models.job.families import DENOISER, FAMILIES, MOTION
from models.checkpoint import InputError, Tensors, open_tensors
from models.cogvideox import CogVideoX
from models.cogvideox import config_from_shapes as dit_config
from models.cogvideox_vae import config_from_shapes as vae_config
from models.data import noise
from models.shards import open_pairs
from models.diffusion import Denoiser, generator_times, solve
from models.job.flags import resolve_model
from models.parallel import init_distributed
from models.pictures import film_strip, save_grid, save_mp4
from models.presets import PRESETS
from models.job.sampling import generate

ROW = PRESETS["tiny-cogvideox"]
# Small rates, as in test_parallel.py: AdamW without momentum makes a full step of a gradient's rounding noise.
RATES = ["--lr-theta", "1e-6", "--lr-psi", "1e-6", "--lr-tau", "1e-7"]
SHORT = ["--model", "tiny-cogvideox", "--batch-size", "2", "--micro-batch", "2", "--max-iter", "2", *RATES]


# ---- full size ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", ["2b", "5b"])
def test_preset_is_the_published_checkpoint(size):
    row = PRESETS[f"cogvideox-{size}"]
    path, = golden(f"cogvideox_{size}.keys.json")
    published = json.loads(path.read_text())["diffusers"]
    for part, config_of, expected in (("transformer", dit_config, row.config), ("vae", vae_config, row.vae)):
        config = config_of({name: tuple(shape) for name, shape in published[part]["keys"].items()})
        assert config == {name: expected[name] for name in config}
    assert row.config["rotary"] == (size == "5b") and row.vae["scale"] == {"2b": 1.15258426, "5b": 0.7}[size]
    assert row.schedule == f"cogvideox-{size}"
    # Sec. 5, Apps. B.2-B.5.
    assert (row.steps, row.cfg, row.batch_size, row.lr_theta) == (8, (5.0, 7.0), 8, 1e-7)
    with torch.device("meta"):
        net = CogVideoX(**row.config)
    args = adm.parse_args(["--model", f"cogvideox-{size}", "--ckpt", "x"])
    init_distributed()
    resolve_model(args)
    assert networks.latent_shape(args, row) == (13, 16, 60, 90)  # 49 frames of 480 x 720
    assert len(net.tap_shapes(13, 16, 60, 90)) == {"2b": 10, "5b": 14}[size]


def sat_of(weights):
    """The same denoiser in the names of the original release."""
    sat, blocks = {}, sorted({int(name.split(".")[1]) for name in weights if name.startswith("transformer_bl")})
    for kind in ("weight", "bias"):
        for ours, theirs in (("time_embedding.linear_1", "time_embed.0"),
                             ("time_embedding.linear_2", "time_embed.2"),
                             ("patch_embed.proj", "mixins.patch_embed.proj"),
                             ("patch_embed.text_proj", "mixins.patch_embed.text_proj"),
                             ("norm_final", "transformer.final_layernorm"),
                             ("norm_out.norm", "mixins.final_layer.norm_final"),
                             ("norm_out.linear", "mixins.final_layer.adaLN_modulation.1"),
                             ("proj_out", "mixins.final_layer.linear")):
            sat[f"{theirs}.{kind}"] = weights[f"{ours}.{kind}"]
        for i in blocks:
            block, layer = f"transformer_blocks.{i}.", f"transformer.layers.{i}."
            for ours, theirs in (("norm1.norm", "input_layernorm"), ("norm2.norm", "post_attention_layernorm"),
                                 ("attn1.to_out.0", "attention.dense"), ("ff.net.0.proj", "mlp.dense_h_to_4h"),
                                 ("ff.net.2", "mlp.dense_4h_to_h")):
                sat[f"{layer}{theirs}.{kind}"] = weights[f"{block}{ours}.{kind}"]
            for ours, theirs in (("norm_q", "query"), ("norm_k", "key")):
                name = f"mixins.adaln_layer.{theirs}_layernorm_list.{i}.{kind}"
                sat[name] = weights[f"{block}attn1.{ours}.{kind}"]
            sat[f"{layer}attention.query_key_value.{kind}"] = torch.cat(
                [weights[f"{block}attn1.to_{part}.{kind}"] for part in "qkv"])
            one, two = (weights[f"{block}norm{j}.linear.{kind}"].chunk(2) for j in (1, 2))
            sat[f"mixins.adaln_layer.adaLN_modulations.{i}.1.{kind}"] = torch.cat([one[0], two[0], one[1], two[1]])
    return {"model.diffusion_model." + name: w for name, w in sat.items()}


def test_original_release_is_the_same_network_and_its_parts_are_found_beside_it(tmp_path):
    """The folders of the original release: transformer/1/mp_rank_00_model_states.pt, t5-v1_1-xxl/."""
    published = dict(open_tensors(ROW.ckpt / "transformer"))
    file = tmp_path / "transformer" / "1" / "mp_rank_00_model_states.pt"
    file.parent.mkdir(parents=True)
    torch.save({"module": sat_of(published)}, file)
    (tmp_path / "t5-v1_1-xxl").symlink_to(ROW.ckpt / "text_encoder")
    device, mesh = init_distributed()
    nets = []
    for ckpt in (ROW.ckpt, file):
        args = adm.parse_args(["--model", "tiny-cogvideox", "--ckpt", str(ckpt)])
        resolve_model(args)
        nets.append(networks.load_network(args, ROW, mesh, device))
    for (name, p), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(p, other), name
    beside = FAMILIES["cogvideox"].beside
    assert beside(file, ROW, "text_ckpt") == tmp_path / "t5-v1_1-xxl"
    # What is not beside it is the preset's own.
    assert beside(file, ROW, "vae_ckpt").parent == ROW.ckpt


def test_a_file_that_is_no_autoencoder_is_named():
    args = adm.parse_args(["--model", "tiny-cogvideox", "--vae-ckpt", str(ROW.ckpt / "transformer")])
    resolve_model(args)
    with pytest.raises(InputError) as caught:
        networks.load_vae(args, ROW, torch.device("cpu"))
    assert str(caught.value).startswith(
        f"{ROW.ckpt / 'transformer' / 'diffusion_pytorch_model.safetensors'}: no CogVideoX VAE: expected "
        "encoder.down_blocks.0.resnets.0.conv1.conv.weight, ..., found norm_final.bias, ")


# ---- files -------------------------------------------------------------------------------------------------------

def test_mp4_shows_what_was_written(tmp_path):
    ramp = torch.linspace(0, 255, 9).byte()[:, None, None, None].expand(9, 3, 34, 50)
    frames = [Image.fromarray(f.permute(1, 2, 0).numpy()) for f in ramp]
    save_mp4(tmp_path / "x.mp4", frames, 8, {"prompt": "a ramp"})
    with av.open(tmp_path / "x.mp4") as file:
        stream = file.streams.video[0]
        seen = np.stack([f.to_ndarray(format="rgb24") for f in file.decode(stream)])
        assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 8, 9)
        assert json.loads(file.metadata["comment"]) == {"prompt": "a ramp"}
    assert seen.shape == (9, 34, 50, 3)
    # 4 of 255: lossy compression and 16..235 luma.
    assert np.abs(seen.astype(int) - np.stack([np.asarray(f) for f in frames]).astype(int)).max() <= 4
    assert (tmp_path / "x.mp4").read_bytes().find(b"moov") < 100  # the index is in front
    assert not list(tmp_path.glob("*.tmp"))


def test_grid_of_videos_and_film_strip(tmp_path):
    videos = torch.zeros(3, 9, 3, 8, 8, dtype=torch.uint8)
    videos[1], videos[2, -1] = 255, 128
    save_grid(tmp_path / "grid.png", videos, 2, least=16)
    with av.open(tmp_path / "grid.mp4") as file:
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
    assert len(frames) == 9 and frames[0].shape == (32, 32, 3)
    assert frames[0][4, 20].min() > 250 and frames[0][4, 4].max() < 5  # the second clip is white, the first black
    assert frames[-1][20, 4].min() > 110 and frames[0][20, 4].max() < 5
    strip = film_strip(videos, 3)
    assert strip.shape == (9, 3, 8, 8) and (strip[3:6] == 255).all() and (strip[8] == 128).all()


# ---- flags -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, sentence", [
    (["--frames", "10"], r"--frames 10: tiny-cogvideox takes 8 k \+ 1 frames: 1, 9, 17, 25, ...; its own are 9"),
    (["--frames", "5"], r"--frames 5: tiny-cogvideox takes 8 k \+ 1"),
    (["--size", "36", "32"], "takes multiples of 8"),
    (["--sequence-parallel", "2"], "--sequence-parallel 2 does not divide the 1 processes"),
    (["--no-t5"], "--no-t5: not for tiny-cogvideox"),
    (["--model", "tiny-sd3", "--null-prompt", "empty"], "--null-prompt empty: not for tiny-sd3"),
    (["--sequence-parallel", "4"], "4 does not divide the network's 6 attention heads; expected one of 1, 2, 3, 6"),
    (["--context-parallel", "2"], "--context-parallel 2: expected a divisor of --sequence-parallel 1"),
    (["--model", "tiny-sd3", "--frames", "9"], "tiny-sd3 makes images; expected no --frames"),
    (["--model", "tiny-sd3", "--sequence-parallel", "2"], "--sequence-parallel 2: not for tiny-sd3"),
])
def test_what_does_not_fit_is_one_sentence(flags, sentence):
    with pytest.raises(InputError, match=sentence):
        run(adm, "--model", "tiny-cogvideox", "--random-weights", "--profile", 1, *flags)


def test_pixels_of_videos_are_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(InputError, match="--lambdas 0.85 0.15: the pixel discriminator takes pictures"):
        run(adp, "--model", "tiny-cogvideox", "--pairs", tmp_path)


# ---- training ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("video") / "run"
    run(adm, *SHORT, "--sample-every", 2, "--evaluate", 5, "--out", out)
    return out


def test_a_run_leaves_videos_figures_and_an_export(finished):
    assert [row["gen_iter"] for row in rows(finished)] == [1, 2]
    assert len(rows(finished)[0]["margin"]) == 2  # blocks 2 and 5
    assert {p.name for p in (finished / "samples").iterdir()} == {"00000002.mp4"}
    figures = json.loads((finished / "comparison.json").read_text())
    assert list(figures) == ["teacher, 50 steps, guidance 3", "teacher, 2 steps, guidance 3", "student, 2 steps"]
    assert all({"accuracy", "direction", "consistency"} < figure.keys() for figure in figures.values())
    assert (finished / "compare.png").exists() and (finished / "compare.mp4").exists()
    export = open_tensors(finished / "generator.safetensors")
    assert export.metadata["dmdx.predicts"] == "v" and export.metadata["dmdx.schedule"] == "cogvideox-2b"
    assert export.shapes == open_tensors(ROW.ckpt / "transformer").shapes  # the published names


def test_sample_writes_the_runs_own_videos(finished, tmp_path):
    run(sample, "--ckpt", finished, "--out", tmp_path, "--count", 3)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["000.mp4", "001.mp4", "002.mp4", "grid.mp4", "grid.png"]
    with av.open(tmp_path / "000.mp4") as file:
        note = json.loads(file.metadata["comment"])
        assert len(list(file.decode(video=0))) == 9 and file.streams.video[0].average_rate == 8  # frames a second
    assert note["prompt"] == ROW.sample_prompts[0] and note["steps"] == "2" and note["cfg"] == "1"
    assert Image.open(tmp_path / "grid.png").size == (6 * 128, 3 * 128)  # six frames of each


def test_guided_generator_is_guided_everywhere(tmp_path):
    """Table 3, w/ CFG: training rolls G_theta out at the real score's scale less the offset; so does sampling."""
    seen = []
    guided = torch.full  # of `generate`, the only caller
    run(adm, *SHORT, "--max-iter", 1, "--evaluate", 0, "--generator-cfg-offset", "1.5", "--out", tmp_path / "cfg")
    plain = tmp_path / "plain"
    run(adm, *SHORT, "--max-iter", 1, "--evaluate", 0, "--out", plain)
    assert open_tensors(tmp_path / "cfg" / "generator.safetensors").metadata["dmdx.cfg"] == "1.5"  # the middle of --cfg 2 4, less 1.5
    assert "dmdx.cfg" not in open_tensors(plain / "generator.safetensors").metadata
    assert rows(tmp_path / "cfg")[0]["loss_psi"] != rows(plain)[0]["loss_psi"]
    assert rows(tmp_path / "cfg")[0]["x_0_std"] != rows(plain)[0]["x_0_std"]
    try:
        torch.full = lambda size, value, **kwargs: seen.append(value) or guided(size, value, **kwargs)
        run(sample, "--ckpt", tmp_path / "cfg", "--out", tmp_path, "--count", 1)
    finally:
        torch.full = guided
    assert seen == [1.5]


def test_dmd_trains_video_too(tmp_path):
    run(dmd, *SHORT[:-2], "--evaluate", 0, "--generator-cfg-offset", 1, "--out", tmp_path / "run")
    first, second = rows(tmp_path / "run")
    assert first["loss_theta"] > 0 and first["grad_norm_theta"] > 0 and second["grad_norm_psi"] > 0


@pytest.mark.parametrize("script", [adm, dmd], ids=["adm", "dmd"])
def test_animatediff_is_trained_as_any_video_model(tmp_path, script):
    flags = ["--model", "tiny-animatediff", "--batch-size", 1, "--max-iter", 1, "--evaluate", 0]
    run(script, *flags, "--out", tmp_path)
    assert all(row["grad_norm_theta"] > 0 and row["grad_norm_psi"] > 0 for row in rows(tmp_path))
    for name, teacher in (("generator.safetensors", "tiny_sd15.safetensors"), (MOTION, "tiny_mm.safetensors")):
        export, before = open_tensors(tmp_path / name), open_tensors(PRESETS["tiny-sd15"].ckpt.parent / teacher)
        assert before.shapes.items() <= export.shapes.items()
        assert export.metadata["dmdx.predicts"] == "epsilon" and "dmdx.rollout" not in export.metadata
        moved = [key for key in before if not torch.equal(export[key], before[key].float())]
        assert moved and all("motion_modules" in key or key.startswith(DENOISER) for key in moved)


def test_pairs_of_video(tmp_path):
    run(collect_odes, "--model", "tiny-cogvideox", "--count", 3, "--steps", 2, "--dtype", "fp32", "--out", tmp_path)
    args = adm.parse_args(["--model", "tiny-cogvideox"])
    resolve_model(args)
    pairs = open_pairs(tmp_path, "tiny-cogvideox", networks.latent_shape(args, ROW))
    x_T, x_0, prompts = pairs.read([0, 1, 2])
    assert x_T.shape == x_0.shape == (3, 3, 4, 8, 8) and len(set(prompts)) == 3
    assert torch.equal(x_T, noise((3, 4, 8, 8), 0, 0, "x_T", [0, 1, 2])) and x_0.isfinite().all()


# ---- processes ---------------------------------------------------------------------------------------------------

RANKS = """
import sys, json
import adm, collect_odes, sample
for name, flags in json.load(open(sys.argv[1])):
    script = dict(adm=adm, collect_odes=collect_odes, sample=sample)[name]
    script.main(script.parse_args(flags))
"""


def test_ranks_that_share_a_video_are_one_rank(finished, tmp_path):
    """Two ranks with half of the tokens each: training, sampling (VAE shared too) and ODE pairs."""
    pairs = ["--model", "tiny-cogvideox", "--count", "2", "--steps", "2", "--dtype", "fp32"]
    videos = ["--ckpt", str(finished), "--count", "2"]
    share = ["--sequence-parallel", "2"]
    jobs = [("adm", [*SHORT, "--evaluate", "0", "--out", str(tmp_path / "run"), *share]),
            ("collect_odes", [*pairs, "--out", str(tmp_path / "pairs"), *share]),
            ("sample", [*videos, "--out", str(tmp_path / "videos"), *share])]
    (tmp_path / "ranks.py").write_text(RANKS)
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(tmp_path / "ranks.py"), str(tmp_path / "jobs.json")]
    result = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, text=True,
                            capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    for ours, theirs in zip(map(figures, rows(tmp_path / "run")), map(figures, rows(finished)), strict=True):
        for name in ours.keys() - {"seconds", "gib", "told_apart"}:
            # 1e-4: float32 sums in another order, after one update at these rates; a lost or doubled part of a
            # gradient would change its norm by half. Eq. (8)'s gradient is a difference that nearly cancels.
            rel = 5e-2 if name == "grad_norm_tau" else 2e-3 if "grad" in name else 1e-4
            assert ours[name] == pytest.approx(theirs[name], rel=rel, abs=1e-4), name
    for name, value in weights(finished).items():
        # Two updates of about the learning rate, 1e-6, each of which rounding may turn round.
        torch.testing.assert_close(weights(tmp_path / "run")[name], value, rtol=0, atol=5e-6)
    run(collect_odes, *pairs, "--out", tmp_path / "pairs1")
    shard = "pairs_00000000-00000001.safetensors"
    ours, theirs = (open_tensors(tmp_path / folder / shard)["x_0"] for folder in ("pairs", "pairs1"))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # two guided steps
    run(sample, *videos, "--out", tmp_path / "videos1")
    both = [np.asarray(Image.open(tmp_path / folder / "grid.png")) for folder in ("videos", "videos1")]
    assert np.abs(both[0].astype(int) - both[1].astype(int)).max() <= 1  # rounding to 8 bits


def test_generate_decodes_a_clip_as_solve_and_decode_do():
    device, mesh = init_distributed()
    args = adm.parse_args(["--model", "tiny-cogvideox"])
    resolve_model(args)
    F = Denoiser(networks.load_network(args, ROW, mesh, device), ROW.predicts, ROW.schedule)
    text, vae = networks.load_text(args, ROW, mesh, device), networks.load_vae(args, ROW, device)
    tn, prompts, shape = generator_times(2, 1.0, ROW.schedule), list(ROW.sample_prompts[:3]), (3, 4, 8, 8)
    videos = generate(F, text, vae, prompts, tn, shape, 5, None, 2, 1)
    with torch.no_grad():
        x_0 = solve(F, noise(shape, 5, 0, "sample", [2]), tn, text.encode(prompts[2:]))
        expected = (vae.decode(x_0) * 127.5 + 127.5).round().clamp(0, 255).byte()
    assert videos.shape == (3, 9, 3, 32, 32) and videos.dtype == torch.uint8
    assert (videos[2].int() - expected[0].int()).abs().max() <= 1  # another batch, another rounding
    assert isinstance(open_tensors(ROW.ckpt / "vae"), Tensors)
