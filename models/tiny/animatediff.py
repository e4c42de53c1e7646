"""The tiny AnimateDiff teacher: SD1.5 and motion modules for captioned shapes that move, in the original files.

    python -m models.tiny --only animatediff

Writes models/tiny/animatediff/: tiny_sd15.safetensors (UNet, VAE and CLIP-L in SD1.5's single-file layout:
the teacher of single frames), tiny_mm.safetensors (motion modules in v2's layout), tokenizer/, prompts.txt.
As in the original, the UNet is trained on single frames with scaled-linear betas, then the motion modules on clips
with linear betas in the frozen UNet. The UNet's first frames are of each clip's second half, where "left" and
"right" are places: of all frames it would not learn to tell the two words apart, and later could not. Last, both
losses, now of all frames, train all weights.

Letters: B clips, T frames, Z h w latent, H W pixels.
"""
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from models.animatediff import AnimateDiff
from models.checkpoint import save_safetensors
from models.diffusion import Denoiser, teacher_times
from models.eval import shapes
from models.eval.moving_shapes import Scenes, captions, draw_clip, evaluation_prompts, parse, random_scenes
from models.job.motion import split_motion
from models.job.networks import load_text
from models.presets import PRESETS
from models.sdxl_unet import UNet
from models.text import Cond
from models.tiny.images import new_unet, normalise
from models.tiny.text import clip_encoder, longest_first, write_clip_tokenizer
from models.tiny.training import (
    BATCH,
    FOLDER,
    denoiser_loss,
    encode_captions,
    generate,
    identity_convs,
    open_part,
    open_teacher,
    reconstruction_loss,
    report,
    snr_times,
    train,
)
from models.vae import FramesVAE

NAME = "tiny-animatediff"
PRESET, FRAMES = PRESETS[NAME], PRESETS["tiny-sd15"]
CLIPS = 8192  # of both denoisers' training
STEPS = {"vae": 2500, "vae_noise": 1500, "unet": 6000, "motion": 4000, "both": 7000}  # that the decay is planned for
STOP = {"unet": 3000, "motion": 750}
MOTION_BATCH, BOTH_BATCH = 16, (12, 16)  # clips; clips and single frames
MATRICES = r"(?!input_blocks\.0\.0|out\.|time_embed)"  # Muon's: all but the first and last layer and the times'
NOISE = {"unet": 0.9, "motion": 1.6}  # mean logit of the noise at which outlines and directions are decided
POWER = {"unet": 1.0, "motion": 1.0, "both": 0.7}  # alpha^-power weights the loss: much noise decides the direction


# ---- the autoencoder ---------------------------------------------------------------------------------------

def frames(seed: int, indices: range) -> Tensor:
    """One frame (B 3 H W) of each of these clips, at a random time."""
    clips = draw_clip(random_scenes(seed, indices))
    which = torch.randint(PRESET.frames, (len(clips),), generator=torch.Generator().manual_seed(indices[0]))
    return clips[torch.arange(len(clips)), which]


def vae_loss(seed: int, noise: float, kl_weight: float) -> Callable:
    """On 16 fresh frames; `noise` as in `reconstruction_loss`."""
    def loss_at(net: FramesVAE, step: int) -> Tensor:
        images = frames(seed, range(16 * step, 16 * step + 16))
        return reconstruction_loss(net.moments, net.decode, images, step, kl_weight, noise)
    return loss_at


def train_vae(out: Path) -> dict[str, Tensor]:
    """Weights of the VAE, trained twice: to reconstruct, then to bear noise in the latent, without which the
    denoiser's small errors decode to no shape at all. Its 1x1 convolutions around the latent are identities."""
    torch.manual_seed(0)
    first = vae_loss(seed=30, noise=0.0, kl_weight=3e-5)
    vae = train("ad_vae", FramesVAE(**PRESET.vae | dict(quant=False)), first, STEPS["vae"], 2e-3, out)
    second = vae_loss(seed=31, noise=0.3, kl_weight=1e-3)
    vae = train("ad_vae_noise", vae.requires_grad_(), second, STEPS["vae_noise"], 1.5e-3, out)
    normalise(vae, frames(32, range(1024)))
    return vae.state_dict() | identity_convs(PRESET.latent_channels)


# ---- the denoiser ------------------------------------------------------------------------------------------

def export(net: nn.Module, others: dict[str, Tensor]) -> None:
    """Write the two files: the UNet with `others`, and the motion modules if there are some."""
    unet, motion = split_motion(net.state_dict())
    weights = others | {f"model.diffusion_model.{name}": p for name, p in unet.items()}
    save_safetensors(FRAMES.ckpt, {name: p.half() for name, p in weights.items()})
    if motion:
        save_safetensors(PRESET.motion_ckpt, {name: p.half() for name, p in motion.items()})


def look_at_frames(net: UNet, vae: FramesVAE, table: Cond, step: int) -> None:
    """Print how many of 256 single frames show what their prompt names."""
    prompts, tn = evaluation_prompts(256), teacher_times(FRAMES.teacher_steps, FRAMES.shift, FRAMES.schedule)
    F = Denoiser(net, FRAMES.predicts, FRAMES.schedule)
    images = generate(FRAMES._replace(data=PRESET.data), F, vae, table, prompts, tn.to(table.context.device),
                      FRAMES.teacher_cfg)
    print(f"frames at step {step}: accuracy {shapes.accuracy(shapes.read(images), parse(prompts)[:, :4]):.4f}",
          flush=True)


def train_animatediff(out: Path) -> None:
    """Write models/tiny/animatediff/ and samples of it. The denoisers are trained on a GPU if there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = write_clip_tokenizer(PRESETS[NAME].ckpt.parent / "tokenizer", longest_first(captions()),
                                 PRESET.clip_length)
    PRESET.prompts.write_text("\n".join(captions()[:-1]) + "\n")
    g = torch.Generator().manual_seed(0)
    others = {f"first_stage_model.{name}": p for name, p in train_vae(out).items()}
    others |= clip_encoder("cond_stage_model.transformer.text_model.", words, g, PRESET.clip_length)

    torch.manual_seed(0)
    unet = new_unet(FRAMES.config)
    export(unet, others)
    vae = FramesVAE(**PRESET.vae).requires_grad_(False)
    vae.load_state_dict({name.removeprefix("first_stage_model."): p.half().float() for name, p in others.items()
                         if name.startswith("first_stage_model.")})
    vae.to(device)
    table = Cond(*(part.to(device) for part in encode_captions(PRESET, open_part("tiny-sd15", load_text))))
    scenes = random_scenes(11, range(CLIPS))
    with torch.no_grad():
        parts = zip(*(x.split(64) for x in scenes))
        latents = torch.cat([vae.encode(draw_clip(Scenes(*part)).to(device)) for part in parts])  # B T Z h w

    scaled = PRESET._replace(schedule=FRAMES.schedule)

    def frames_loss(batch: int, stage: str, first: int = 0) -> Callable:
        """Of the frames from `first` on."""
        chosen = latents[:, first:]
        labels = scenes.labels.repeat_interleave(chosen.shape[1], 0)
        return denoiser_loss(scaled, chosen.flatten(0, 1), labels, table, batch=batch, power=POWER[stage],
                             times=lambda step, g: snr_times(FRAMES.schedule, NOISE["unet"], batch, g))

    def clips_loss(batch: int, stage: str) -> Callable:
        return denoiser_loss(PRESET, latents, scenes.labels, table, batch=batch, power=POWER[stage],
                             times=lambda step, g: snr_times(PRESET.schedule, NOISE["motion"], batch, g))

    def look(average: nn.Module, step: int) -> None:
        report(out / f"animatediff_{step:06d}.png", PRESET,
               Denoiser(average, PRESET.predicts, PRESET.schedule), vae, table,
               [(PRESET.steps, 3.0), (PRESET.teacher_steps, 3.0)], 256)

    unet = train("ad_unet", unet.to(device), frames_loss(BATCH, "unet", PRESET.frames // 2 + 1), STEPS["unet"], 2e-3,
                 out, stop=STOP["unet"], muon=MATRICES, muon_lr=4e-3,
                 look=lambda average, step: look_at_frames(average, vae, table, step))
    torch.manual_seed(0)
    net = AnimateDiff(**PRESET.config)
    net.load_state_dict({name: p.half().float() for name, p in unet.state_dict().items()}, strict=False)
    for name, p in net.named_parameters():
        p.requires_grad_("motion_modules." in name)
    net = train("ad_motion", net.to(device), clips_loss(MOTION_BATCH, "motion"), STEPS["motion"], 2e-3, out,
                stop=STOP["motion"], muon=MATRICES, muon_lr=4e-3)
    of_clips, of_frames = clips_loss(BOTH_BATCH[0], "both"), frames_loss(BOTH_BATCH[1], "both")

    def both(net: nn.Module, step: int) -> Tensor:
        return of_clips(net, 10_000 + step) + 0.5 * of_frames(net, 10_000 + step)
    net = train("ad_both", net.requires_grad_(True), both, STEPS["both"], 1.5e-3, out, muon=MATRICES, muon_lr=3e-3,
                look=look)
    export(net.cpu(), others)
    F, vae, text = open_teacher(NAME)
    report(FOLDER / "teacher_animatediff.png", PRESET, F, vae, encode_captions(PRESET, text),
           list(product((1, 2, 4, PRESET.teacher_steps), (None, 3.0))), 512)
    total = sum(path.stat().st_size for path in PRESET.ckpt.parent.rglob("*") if path.is_file())
    print(f"{PRESET.ckpt.parent}: {total / 1e6:.2f} MB", flush=True)
