"""The tiny video teacher: CogVideoX for captioned shapes that move, in the published layout.

    python -m models.tiny --only cogvideox    # VAE 24, denoiser 117 minutes of one core

Writes models/tiny/cogvideox/: transformer/, vae/, text_encoder/, tokenizer/ and scheduler/ with the
config.json of each, and prompts.txt. The VAE halves size and frames twice: 9 frames of 32 x 32 are 3 latents
of 8 x 8.

Letters: B clips, F frames, T latent frames, Z h w latent, L tokens, D width.
"""
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from models.checkpoint import load, open_tensors, save_safetensors
from models.cogvideox import CogVideoX
from models.cogvideox_vae import CogVideoXVAE
from models.diffusion import Denoiser
from models.eval.moving_shapes import Scenes, captions, draw_clip, random_scenes
from models.job.families import FAMILIES
from models.job.networks import load_text
from models.presets import PRESETS
from models.tiny.text import longest_first, t5_text, write_t5_tokenizer
from models.tiny.training import (
    BATCH,
    FOLDER,
    denoiser_loss,
    encode_captions,
    open_part,
    open_teacher,
    reconstruction_loss,
    report,
    snr_times,
    train,
)

NAME = "tiny-cogvideox"
PRESET = PRESETS[NAME]
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLIPS = 8192  # of the denoiser's training
STEPS = {"vae": 2400, "vae_noise": 1400}
# Of the denoiser: name, steps, learning rate, probability of each attribute to be named, mean logit of the
# noise. Little noise teaches outlines; shape and direction are decided in much, at t of 0.6 to 0.8; the last
# stage has more prompts that leave most things open, where a sample must choose.
STAGES = (
    ("cogvideox", 7000, 2e-3, 0.7, lambda step: 0.0 if step < 3000 else 1.2),
    ("cogvideox_noise", 7000, 2e-3, 0.7, lambda step: 1.6),
    ("cogvideox_open", 3500, 1e-3, 0.5, lambda step: 1.6),
)


# ---- files -------------------------------------------------------------------------------------------------

def new_denoiser() -> CogVideoX:
    """Initialised as diffusion transformers are: gates and output zero, so every block starts as identity."""
    net = CogVideoX(**PRESET.config)
    for name, p in net.named_parameters():
        if name.endswith("bias") or ".linear.weight" in name or name == "proj_out.weight":
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    return net


def write_configs(folder: Path, words: int) -> None:
    """What diffusers reads beside the weights; `words`: size of T5's vocabulary."""
    net, vae, side = PRESET.config, PRESET.vae, PRESET.size[0] // PRESET.vae_factor
    levels = len(vae["ch"])
    configs = {
        "transformer": dict(
            _class_name="CogVideoXTransformer3DModel", num_layers=net["depth"],
            num_attention_heads=net["heads"], attention_head_dim=net["head_dim"], patch_size=net["patch"],
            in_channels=net["in_channels"], out_channels=net["in_channels"], text_embed_dim=net["text_dim"],
            time_embed_dim=net["time_dim"], max_text_seq_length=PRESET.t5_length, sample_height=side,
            sample_width=side, sample_frames=PRESET.frames,
            temporal_compression_ratio=FAMILIES[PRESET.family].frames_per_latent,
            use_rotary_positional_embeddings=net["rotary"], spatial_interpolation_scale=net["interpolation"],
            temporal_interpolation_scale=1.0),
        "vae": dict(
            _class_name="AutoencoderKLCogVideoX", block_out_channels=vae["ch"],
            layers_per_block=vae["num_res_blocks"], latent_channels=vae["z_channels"],
            norm_num_groups=vae["groups"], scaling_factor=vae["scale"],
            temporal_compression_ratio=FAMILIES[PRESET.family].frames_per_latent,
            sample_height=PRESET.size[0], sample_width=PRESET.size[1],
            down_block_types=["CogVideoXDownBlock3D"] * levels,
            up_block_types=["CogVideoXUpBlock3D"] * levels),
        "text_encoder": dict(
            architectures=["T5EncoderModel"], model_type="t5", vocab_size=words, d_model=net["text_dim"],
            d_kv=64, d_ff=128, num_heads=2, num_layers=1, feed_forward_proj="gated-gelu"),
        "scheduler": dict(
            _class_name="CogVideoXDDIMScheduler", beta_schedule="scaled_linear", beta_start=0.00085,
            beta_end=0.012, prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0,
            timestep_spacing="trailing", clip_sample=False),
    }
    for name, config in configs.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(config, indent=2) + "\n")
    index = dict(_class_name="CogVideoXPipeline", scheduler=["diffusers", "CogVideoXDDIMScheduler"],
                 text_encoder=["transformers", "T5EncoderModel"], tokenizer=["transformers", "T5Tokenizer"],
                 transformer=["diffusers", "CogVideoXTransformer3DModel"],
                 vae=["diffusers", "AutoencoderKLCogVideoX"])
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save(part: str, weights: dict[str, Tensor], name: str = WEIGHTS) -> None:
    save_safetensors(PRESET.ckpt / part / name, {key: p.half() for key, p in weights.items()})


def write_text() -> None:
    size = write_t5_tokenizer(PRESET.ckpt / "tokenizer", longest_first(captions()), PRESET.t5_length)
    write_configs(PRESET.ckpt, size)
    save("text_encoder", t5_text("", size, torch.Generator().manual_seed(0)), "model.safetensors")
    PRESET.prompts.write_text("\n".join(captions()[:-1]) + "\n")


# ---- training ----------------------------------------------------------------------------------------------

def new_vae() -> CogVideoXVAE:
    """The decoder's norms start near plain ones: what the latent adds to scale 1 and shift 0 is small."""
    vae = CogVideoXVAE(**PRESET.vae)
    for name, p in vae.named_parameters():
        if name.endswith("conv_y.conv.bias"):
            nn.init.ones_(p)
    return vae


def vae_clips(step: int, windows: int, seed: int) -> Tensor:
    """16 windows of 16 x 16 near the path's middle for the first `windows` steps, then 4 whole clips: at the
    same cost windows show four times as many shapes, and the network learns in half the time."""
    if step >= windows:
        return draw_clip(random_scenes(seed + 1, range(4 * step, 4 * step + 4)), PRESET.frames)
    scenes = random_scenes(seed, range(16 * step, 16 * step + 16))
    g = torch.Generator().manual_seed(step)
    corners = scenes.middle.long() - 10 + 4 * torch.randint(2, (16, 2), generator=g)  # on the latent's grid
    clips = [clip[..., y:y + 16, x:x + 16]
             for clip, (x, y) in zip(draw_clip(scenes, PRESET.frames), corners.clamp(0, 16).tolist())]
    return torch.stack(clips)


def vae_loss(windows: int, seed: int, noise: float, kl_weight: float) -> Callable:
    """Reconstruction and KL; the decoder sees the posterior's sample with `noise` standard deviations of the
    latent on top."""
    def loss_at(net: CogVideoXVAE, step: int) -> Tensor:
        clips = vae_clips(step, windows, seed)
        moments, decode = partial(net.moments, chunk=None), partial(net.decode, chunk=None)
        return reconstruction_loss(moments, decode, clips, step, kl_weight, noise)
    return loss_at


@torch.no_grad()
def normalise(vae: CogVideoXVAE, clips: Tensor) -> None:
    """Fold a shift and a scale per latent channel into the weights: the data's latents then have mean 0 and
    standard deviation 1. The decoder reads the latent in its first layer and in each of its norms; only what
    the first layer's zero padding stands for changes, at the border."""
    z = vae.encode(clips, chunk=None)
    mean, std = z.mean((0, 1, 3, 4)), z.std((0, 1, 3, 4))
    last, Z = vae.encoder.conv_out.conv, len(std)
    last.weight[:Z] /= std[:, None, None, None, None]  # the mean's rows
    last.bias[:Z] = (last.bias[:Z] - mean) / std
    last.bias[Z:] -= 2 * std.log()  # the log-variance's
    for name, conv in vae.decoder.named_modules():
        if name == "conv_in.conv" or name.endswith(("conv_y.conv", "conv_b.conv")):
            conv.bias += (conv.weight * mean[:, None, None, None]).sum((1, 2, 3, 4))
            conv.weight *= std[:, None, None, None]


def train_vae(out: Path) -> CogVideoXVAE:
    """Twice: to reconstruct, then to bear noise in the latent, without which the denoiser's small errors
    decode to no shape at all."""
    data = draw_clip(random_scenes(11, range(256)), PRESET.frames)
    torch.manual_seed(0)
    first = vae_loss(windows=1800, seed=20, noise=0.0, kl_weight=3e-5)
    vae = train("video_vae", new_vae(), first, STEPS["vae"], 2e-3, out)
    normalise(vae, data)
    second = vae_loss(windows=700, seed=22, noise=0.3, kl_weight=1e-3)
    vae = train("video_vae_noise", vae.requires_grad_(), second, STEPS["vae_noise"], 1.5e-3, out)
    normalise(vae, data)
    return vae


def train_video(out: Path) -> None:
    """Write models/tiny/cogvideox/ and samples of it."""
    write_text()
    vae = train_vae(out)
    save("vae", vae.state_dict())
    load(vae, open_tensors(PRESET.ckpt / "vae"))  # as it is stored
    table, scenes = encode_captions(PRESET, open_part(NAME, load_text)), random_scenes(11, range(CLIPS))
    with torch.no_grad():
        parts = zip(*(x.split(64) for x in scenes))
        clips = (draw_clip(Scenes(*part), PRESET.frames) for part in parts)
        latents = torch.cat([vae.encode(clip, chunk=None) for clip in clips])  # B T Z h w

    def look(average: nn.Module, step: int) -> None:
        report(out / f"{name}_{step:06d}.png", PRESET,
               Denoiser(average, PRESET.predicts, PRESET.schedule), vae, table,
               [(PRESET.steps, 3.0), (PRESET.teacher_steps, 3.0)], 256)

    torch.manual_seed(0)
    net = new_denoiser()
    for name, steps, lr, share, noisiness in STAGES:
        loss = denoiser_loss(PRESET, latents, scenes.labels, table, share,
                             lambda step, g: snr_times(PRESET.schedule, noisiness(step), BATCH, g))
        net = train(name, net.requires_grad_(), loss, steps, lr, out, look=look)
    save("transformer", net.state_dict())
    F, vae, _ = open_teacher(NAME)
    settings = list(product((1, 2, 4, 8, PRESET.teacher_steps), (None, 3.0)))
    report(FOLDER / "teacher_cogvideox.png", PRESET, F, vae, table, settings, 640)
    total = sum(path.stat().st_size for path in PRESET.ckpt.rglob("*") if path.is_file())
    print(f"{PRESET.ckpt}: {total / 1e6:.2f} MB", flush=True)
