"""The tiny image teachers, in the layouts of their big siblings.

Writes models/tiny/: tiny_sd3.safetensors (MMDiT, flow), tiny_sdxl.safetensors (UNet, epsilon),
tiny_sam.safetensors (a vision encoder in SAM's layout that has learned to outline the shapes), tokenizers and
prompts.

Letters: B pictures, H W pixels, Z h w latent, L tokens, D width.
"""
import math
from itertools import product
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, pixel_shuffle
from transformers import SamVisionConfig, SamVisionModel

from models.checkpoint import open_tensors, save_safetensors
from models.diffusion import Denoiser
from models.eval.shapes import SIZE, Scenes, captions, coverage, draw, random_scenes
from models.mmdit import MMDiT
from models.presets import PRESETS
from models.sdxl_unet import UNet
from models.tiny.text import (
    LENGTH,
    longest_first,
    sd3_text,
    sdxl_text,
    write_clip_tokenizer,
    write_t5_tokenizer,
)
from models.tiny.training import (
    FOLDER,
    denoiser_loss,
    encode_captions,
    identity_convs,
    open_teacher,
    reconstruction_loss,
    report,
    train,
)
from models.vae import AutoencoderKL
from models.vision import VisionEncoder, original_name

PICTURES = 8192  # of a denoiser's training
SAM = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, mlp_dim=256, image_size=SIZE,
           patch_size=4, window_size=4, global_attn_indexes=[1, 3])
STEPS = {"sd3": 5000, "sdxl": 5000, "sam": 2000, "vae": 2500}


# ---- networks before training ------------------------------------------------------------------------------

def position_table(grid: int, width: int) -> Tensor:
    """2D sinusoids (1 grid*grid width), half of the channels for y, half for x, periods from 2 patches up."""
    k = torch.arange(width // 4) / (width // 4)
    angles = torch.arange(grid)[:, None] * math.pi * (1 / (2 * grid)) ** k
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # grid D/2
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=2)
    return rearrange(table, "y x D -> 1 (y x) D").contiguous()


def new_mmdit(config: dict) -> nn.Module:
    """Initialised as diffusion transformers are: gates and output zero, so every block starts as identity."""
    net = MMDiT(**config)
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name or name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    net.pos_embed.copy_(position_table(config["pos_grid"], config["width"]))
    return net


def new_unet(config: dict) -> nn.Module:
    """Initialised as the original: what each residual branch adds, and the output, start at zero."""
    net = UNet(**config)
    for name, p in net.named_parameters():
        if "out_layers.3." in name or "proj_out." in name or name.startswith("out.2."):
            nn.init.zeros_(p)
    return net


# ---- training ----------------------------------------------------------------------------------------------

def vae_loss(net: AutoencoderKL, step: int) -> Tensor:
    """On 16 fresh pictures."""
    images = draw(random_scenes(10, range(step * 16, step * 16 + 16)))
    return reconstruction_loss(net.moments, net.decode, images, step, kl_weight=3e-5)


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a scale per latent channel into the weights: the data's latents then have standard deviation 1."""
    std = vae.encode(images).std((0, 2, 3))
    last = vae.encoder.conv_out
    last.weight[:len(std)] /= std[:, None, None, None]  # the mean's rows
    last.bias[:len(std)] /= std
    last.bias[len(std):] -= 2 * std.log()  # the log-variance's
    vae.decoder.conv_in.weight *= std[:, None, None]


def train_vae(out: Path) -> dict[str, Tensor]:
    """Weights of the autoencoder that both image models use."""
    torch.manual_seed(0)
    vae = train("vae", AutoencoderKL(**PRESETS["tiny-sd3"].vae), vae_loss, STEPS["vae"], 2e-3, out)
    normalise(vae, draw(random_scenes(11, range(1024))))
    return vae.state_dict()


def train_teacher(name: str, out: Path) -> None:
    """sd3 or sdxl: write models/tiny/tiny_NAME.safetensors and samples of it."""
    preset = PRESETS[f"tiny-{name}"]
    if name == "sd3":
        weights = {f"first_stage_model.{key}": p for key, p in train_vae(out).items()}
    else:  # of tiny-sd3; the 1x1 convolutions around SDXL's latent are identities
        shared = open_tensors(PRESETS["tiny-sd3"].ckpt).group("first_stage_model.")
        weights = {f"first_stage_model.{key}": p for key, p in shared.items()}
        weights |= {f"first_stage_model.{key}": p for key, p in identity_convs(preset.latent_channels).items()}
    words = longest_first(captions())
    clip_words = write_clip_tokenizer(FOLDER / "tokenizer", words, LENGTH)
    t5_words = write_t5_tokenizer(FOLDER / "tokenizer_3", words, LENGTH)
    weights |= sd3_text(clip_words, t5_words) if name == "sd3" else sdxl_text(clip_words)
    (FOLDER / "prompts.txt").write_text("\n".join(captions()[:-1]) + "\n")

    def export(net: nn.Module) -> None:
        denoiser = {f"model.diffusion_model.{key}": p for key, p in net.state_dict().items()}
        save_safetensors(preset.ckpt, {key: p.half() for key, p in (denoiser | weights).items()})

    torch.manual_seed(0)
    net = (new_mmdit if name == "sd3" else new_unet)(preset.config)
    export(net)
    _, vae, text = open_teacher(f"tiny-{name}")
    table, scenes = encode_captions(preset, text), random_scenes(11, range(PICTURES))
    with torch.no_grad():
        parts = zip(*(x.split(512) for x in scenes))
        latents = torch.cat([vae.encode(draw(Scenes(*part))) for part in parts])  # B Z h w

    def look(average: nn.Module, step: int) -> None:
        report(out / f"{name}_{step:06d}.png", preset,
               Denoiser(average, preset.predicts, preset.schedule), vae, table,
               [(2, 3.0), (preset.teacher_steps, 3.0)], 256)

    loss = denoiser_loss(preset, latents, scenes.labels, table)
    export(train(name, net, loss, STEPS[name], 2e-3, out, look=look))
    F, vae, _ = open_teacher(f"tiny-{name}")
    settings = list(product((1, 2, 4, preset.teacher_steps), (None, 3.0)))
    report(FOLDER / f"teacher_{name}.png", preset, F, vae, table, settings, 1024)
    print(f"{preset.ckpt}: {preset.ckpt.stat().st_size / 1e6:.2f} MB", flush=True)


def mask_loss(net: nn.ModuleDict, step: int) -> Tensor:
    """Cross-entropy per pixel and kind of shape, on 64 fresh pictures with a little noise."""
    scenes = random_scenes(13, range(step * 64, step * 64 + 64))
    kinds = nn.functional.one_hot(scenes.labels[:, 0], 5)[:, :, None, None]
    masks = coverage(scenes.centre, scenes.radius) * kinds  # B 5 H W
    images = draw(scenes)
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(step))
    logits = net["head"](VisionEncoder(net["encoder"], "sam").features(images)[-1])
    return binary_cross_entropy_with_logits(pixel_shuffle(logits, SAM["patch_size"]), masks)


def train_sam(out: Path) -> None:
    """Write models/tiny/tiny_sam.safetensors, a vision encoder that has learned to outline the shapes."""
    torch.manual_seed(0)
    encoder = SamVisionModel(SamVisionConfig(**SAM)).vision_encoder
    encoder.neck = nn.Identity()
    head = nn.Conv2d(SAM["hidden_size"], 5 * SAM["patch_size"] ** 2, 1)
    net = train("sam", nn.ModuleDict(dict(encoder=encoder, head=head)), mask_loss, STEPS["sam"], 2e-3, out)
    weights = {f"image_encoder.{original_name('sam', name)}": p
               for name, p in net["encoder"].state_dict().items()}
    path = PRESETS["tiny-sdxl"].sam_ckpt
    save_safetensors(path, {name: p.half() for name, p in weights.items()})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, loss on other pictures {mask_loss(net, 10 ** 6):.4f}")
