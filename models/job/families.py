"""Model families: everything that differs from one architecture to the next, in one table at the end.

A preset (models/presets.py) names its family. Only models/job/notes.py asks for it by name, where files say of
which model they are. A new family is a row of FAMILIES: network, text class, the functions that open its files.

`args` are the flags of `parsers.model_parser`. What the user can mend raises InputError.
"""
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from models import animatediff, cogvideox, cogvideox_vae, diffusers_names, mmdit, sdxl_unet, vae, wan, wan_vae
from models.checkpoint import InputError, Tensors, find, open_tensors, some
from models.diffusers_names import denoiser_of, vae_of
from models.job.motion import DENOISER, base_tensors, merged, motion_tensors
from models.job.notes import check_announced, check_scale
from models.presets import Preset
from models.sat import dit_from_sat, vae_from_sat
from models.text import CogVideoXText, SD3Text, SD15Text, SDXLText, WanText
from models.text_encoders import FOLDERS, hub_tensors, load_tokenizers, t5_tensors, text_parts, umt5_tensors

VAE = "first_stage_model."  # group of a single file, as DENOISER
HUB_DENOISERS = ("unet", "transformer")  # folders of the diffusers layout
MOTION = "motion_module.safetensors"  # beside an exported generator.safetensors of AnimateDiff


class Family(NamedTuple):
    network: type[nn.Module]            # the denoiser
    config_from_shapes: Callable        # its arguments, as far as the shapes of a checkpoint tell them
    vae: type[nn.Module]
    vae_config_from_shapes: Callable
    open_denoiser: Callable             # (args, preset, init) -> Tensors under the network's names
    open_vae: Callable                  # (args, preset) -> Tensors under the VAE's names
    new_text: Callable                  # (args, preset, device) -> (text encoders on meta, their Tensors)
    beside: Callable                    # (ckpt, preset, flag) -> the path for --flag, found next to ckpt
    condition_shapes: Callable          # preset -> shapes (L D) of a prompt's context and (P,) of its vector
    sides: Callable                     # preset -> (pixels that a side is a multiple of, the largest or None)
    single_file: bool                   # the denoiser's file and its exports hold VAE and text encoders too
    flags: tuple[str, ...]              # those it takes of the flags that some families refuse
    names: diffusers_names.Names        # which linear layers adapters sit on, and what LoRA files call them
    null_prompts: tuple[str, ...] = ()  # values of --null-prompt, the default first
    sized: bool = False                 # conditions hold the size of the pictures
    mends: bool = False                 # prompts are mended by ftfy, where that is installed
    frames_per_latent: int = 1          # of a video
    frame_step: int = 0                 # a video has frame_step k + 1 frames; 0: the family makes images
    max_frames: int | None = None
    fps: int = 8


def open_files(path: Path) -> Tensors:
    """A file, or the weights of a folder in diffusers' layout."""
    return hub_tensors(path) if path.is_dir() else open_tensors(path)


def source(args, preset: Preset) -> Tensors:
    """The tensors of --ckpt or of the preset's file on the hub: of a diffusers-layout folder its denoiser's.
    Raises InputError if neither can be read."""
    path = find(preset.file, args.ckpt, preset.repo)
    return open_files(next((path / name for name in HUB_DENOISERS if (path / name).is_dir()), path))


def denoiser_file(args, preset: Preset, init: Path | None) -> Tensors:
    """The file `init`, or `source`. Raises InputError if it says that it is of another kind."""
    tensors = open_tensors(init) if init else source(args, preset)
    check_announced(tensors, preset)
    return tensors


# ---- single files and diffusers' folders: SD3, SDXL, SD1.5 --------------------------------------------------

def hub_folder(ckpt: Path | None, preset: Preset) -> Path | None:
    """The diffusers-layout folder, with unet/ or transformer/ in it, that the denoiser is read from."""
    path = find(preset.file, ckpt, preset.repo) if ckpt else None
    if path and path.name in HUB_DENOISERS and path.is_dir():
        return path.parent
    return path if path and any((path / name).is_dir() for name in HUB_DENOISERS) else None


def open_single_denoiser(args, preset: Preset, init: Path | None) -> Tensors:
    return denoiser_of(denoiser_file(args, preset, init), DENOISER)


def open_single_vae(args, preset: Preset) -> Tensors:
    path = args.vae_ckpt or hub_folder(args.ckpt, preset)
    if path and path.is_dir():
        tensors = hub_tensors(path / "vae" if (path / "vae").is_dir() else path)
    else:
        tensors = open_tensors(path) if path else source(args, preset)
    check_scale(tensors.path, preset.vae)
    return vae_of(tensors, VAE)


def single_parts(args, preset: Preset) -> tuple[dict[str, Tensors], Path]:
    """The text encoders of --text-ckpt, of the denoiser's file or folder, of the files beside it or of the
    hub, and one of those paths."""
    single = hub_folder(args.ckpt, preset) or source(args, preset).path  # in a folder: the file that is meant
    hub = any((single / folder).is_dir() for folder in FOLDERS.values())
    if args.text_ckpt:
        paths = [args.text_ckpt]
    elif hub or not preset.text_files or any(name.startswith("text_encoders.clip_l.")
                                             for name in open_tensors(single)):
        paths = [single]
    else:
        wanted = preset.text_files[:2] if args.no_t5 else preset.text_files
        paths = [single.parent / name for name in wanted] if args.ckpt else []
        if not paths or not all(path.exists() for path in paths):
            paths = [find(name, None, preset.repo) for name in wanted]
    return text_parts(*paths), paths[0]


def single_tokenizers(args, preset: Preset, t5: bool = False) -> tuple:
    """Of --tokenizers or, without it, of the denoiser's folder before the preset's."""
    given, folder = args.tokenizers != preset.tokenizers, hub_folder(args.ckpt, preset)
    found = not given and folder and (folder / "tokenizer").is_dir()
    return load_tokenizers(folder if found else args.tokenizers, t5=t5)


def new_sd3_text(args, preset: Preset, device: torch.device) -> tuple[SD3Text, dict[str, Tensors]]:
    parts, path = single_parts(args, preset)
    if args.no_t5:
        parts.pop("t5", None)
    elif "t5" not in parts:
        raise InputError(f"{path}: no T5 encoder; pass --text-ckpt with t5xxl_fp16.safetensors in it, "
                         "or --no-t5")
    return SD3Text(parts, single_tokenizers(args, preset, t5=True), preset.t5_length,
                   preset.config["context_dim"], device=device), parts


def new_sdxl_text(args, preset: Preset, device: torch.device) -> tuple[SDXLText, dict[str, Tensors]]:
    parts, _ = single_parts(args, preset)
    return SDXLText(parts, single_tokenizers(args, preset), tuple(args.size), device=device), parts


def new_sd15_text(args, preset: Preset, device: torch.device) -> tuple[SD15Text, dict[str, Tensors]]:
    parts, _ = single_parts(args, preset)
    return SD15Text(parts, single_tokenizers(args, preset), device=device), parts


def beside_single(ckpt: Path, preset: Preset, flag: str) -> Path | None:
    folder = hub_folder(ckpt, preset)
    if folder:
        part = {"text_ckpt": "text_encoder", "tokenizers": "tokenizer", "vae_ckpt": "vae"}[flag]
        return folder if (folder / part).is_dir() else None
    encoders = ckpt.parent / "text_encoders"
    return encoders if flag == "text_ckpt" and encoders.is_dir() else None


def unet_sides(preset: Preset) -> tuple[int, None]:
    return preset.vae_factor * 2 ** (len(preset.config["channel_mult"]) - 1), None


def mmdit_sides(preset: Preset) -> tuple[int, int]:
    multiple = preset.vae_factor * preset.config["patch"]
    return multiple, multiple * preset.config["pos_grid"]


# ---- two files: AnimateDiff --------------------------------------------------------------------------------

def open_sd15(args, preset: Preset, init: Path | None) -> Tensors:
    return base_tensors(denoiser_file(args, preset, init))


def open_animatediff(args, preset: Preset, init: Path | None) -> Tensors:
    """The UNet and the motion modules: an exported generator's are beside it."""
    base = open_sd15(args, preset, init)
    exported = (init or base.path).with_name(MOTION)
    if init or not args.motion_ckpt and "dmdx.steps" in base.metadata:
        path = find(MOTION, exported, "", advice=f"{base.path} is a generator whose motion modules are in "
                    f"{MOTION} beside it, or in --motion-ckpt FILE")
    else:
        path = find(preset.motion_file, args.motion_ckpt or preset.motion_ckpt, preset.motion_repo,
                    advice=f"--motion-ckpt FILE takes a local {preset.motion_file}")
    motion = open_tensors(path)
    check_announced(motion, preset)
    return merged(base, motion_tensors(motion))


# ---- folders: CogVideoX, Wan ---------------------------------------------------------------------------------

# Flag -> where its files are in a download (the first on the hub too), such as CogVideoX's original release.
COGVIDEOX_PARTS = {"vae_ckpt": ("vae/", "vae/3d-vae.pt"), "text_ckpt": ("text_encoder/", "t5-v1_1-xxl/"),
                   "tokenizers": ("tokenizer/", "t5-v1_1-xxl/")}
WAN_PARTS = {"vae_ckpt": ("Wan2.1_VAE.pth", "vae/"), "tokenizers": ("google/umt5-xxl/", "tokenizer/"),
             "text_ckpt": ("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder/")}


def beside_part(parts: dict[str, tuple[str, ...]], ckpt: Path | None, preset: Preset, flag: str) -> Path:
    """One of `parts` in or beside ckpt, which is a download's folder or the denoiser in it: a file or transformer/,
    in CogVideoX's original release transformer/1/mp_rank_00_model_states.pt; else of the preset or the hub."""
    above = (ckpt.absolute(), *ckpt.absolute().parents) if ckpt else ()
    beside = above[1:2] if ckpt and ckpt.is_file() else ()
    for root in (*above[:1], *beside, *(path.parent for path in above if path.name == "transformer")):
        for path in (root / place for place in parts[flag]):
            if path.exists():
                return path
    return find(parts[flag][0], preset.ckpt, preset.repo, advice=f"--{flag.replace('_', '-')} takes a local copy")


def text_and_tokenizers(parts: dict[str, tuple[str, ...]], args, preset: Preset) -> tuple[Tensors, tuple]:
    path = args.text_ckpt or beside_part(parts, args.ckpt, preset, "text_ckpt")
    given = args.tokenizers != preset.tokenizers
    tokenizers = Path(args.tokenizers if given else beside_part(parts, args.ckpt, preset, "tokenizers"))
    if tokenizers.name == "tokenizer":
        tokenizers = tokenizers.parent
    return open_files(path), load_tokenizers(tokenizers, t5=False)


def open_cogvideox(args, preset: Preset, init: Path | None) -> Tensors:
    tensors = denoiser_file(args, preset, init)
    check_positions(tensors, preset)
    return dit_from_sat(tensors)


def check_positions(tensors: Tensors, preset: Preset) -> None:
    """Raises InputError for a table of positions that was learned: the network computes its sinusoids."""
    for name in (name for name in tensors if name.endswith(("pos_embed.pos_embedding", "patch_embed.pos_embedding"))):
        frames = (preset.frames - 1) // 4 + 1
        h, w = (side // preset.vae_factor // preset.config["patch"] for side in preset.size)
        width = preset.config["heads"] * preset.config["head_dim"]
        expected = torch.zeros(preset.t5_length + frames * h * w, width)
        if not preset.config["rotary"]:
            expected[preset.t5_length:] = cogvideox.sincos_table(
                frames, h, w, width, preset.config.get("interpolation", 1.875), torch.float32)
        if tensors.shapes[name] != (1, *expected.shape) or \
                not (tensors[name][0].float() - expected).abs().max() < 1e-2:  # bf16: 4e-3
            raise InputError(f"{tensors.path}: {name} holds learned positions, or those of another size; "
                             "expected none, or the sinusoids of CogVideoX's text-to-video models")


def open_cogvideox_vae(args, preset: Preset) -> Tensors:
    tensors = open_files(args.vae_ckpt or beside_part(COGVIDEOX_PARTS, args.ckpt, preset, "vae_ckpt"))
    check_scale(tensors.path, preset.vae)
    return vae_from_sat(tensors)


def new_cogvideox_text(args, preset: Preset,
                       device: torch.device) -> tuple[CogVideoXText, dict[str, Tensors]]:
    tensors, tokenizers = text_and_tokenizers(COGVIDEOX_PARTS, args, preset)
    parts = {"t5": t5_tensors(tensors)}
    return CogVideoXText(parts, tokenizers, preset.t5_length, args.null_prompt, device), parts


def open_wan(args, preset: Preset, init: Path | None) -> Tensors:
    """The original's file or shards, ComfyUI's repacks of them, or diffusers' transformer/."""
    tensors = denoiser_file(args, preset, init)
    image = [name for name in tensors if re.search(r"\b(img_emb|k_img|image_embedder|add_k_proj)\.", name)]
    if image:
        raise InputError(f"{tensors.path}: an image-to-video checkpoint (it has {image[0]}); expected one of "
                         "Wan2.1's text-to-video models")
    if any(name.startswith(DENOISER) for name in tensors):
        tensors = tensors.group(DENOISER)
    return diffusers_names.wan_from_diffusers(tensors)


def open_wan_vae(args, preset: Preset) -> Tensors:
    tensors = open_files(args.vae_ckpt or beside_part(WAN_PARTS, args.ckpt, preset, "vae_ckpt"))
    check_scale(tensors.path, dict(mean=wan_vae.MEAN, std=wan_vae.STD))
    return diffusers_names.wan_vae_from_diffusers(tensors)


def new_wan_text(args, preset: Preset, device: torch.device) -> tuple[WanText, dict[str, Tensors]]:
    tensors, tokenizers = text_and_tokenizers(WAN_PARTS, args, preset)
    parts = {"umt5": umt5_tensors(tensors)}
    return WanText(parts, tokenizers, preset.t5_length, args.null_prompt, device), parts


def fitting_text(args, preset: Preset, device: torch.device) -> tuple[nn.Module, dict[str, Tensors]]:
    """The text encoders on meta and their tensors. Raises InputError where they do not fit each other or the
    denoiser: CLIPs of other windows, another width of the context."""
    family = FAMILIES[preset.family]
    text, parts = family.new_text(args, preset, device)
    configs = [net.config for net in text.children()]
    windows = sorted({c.max_position_embeddings for c in configs if hasattr(c, "max_position_embeddings")})
    widths = [c.d_model for c in configs if hasattr(c, "d_model")]  # T5's, beside which CLIP's are padded
    width = widths[0] if widths else sum(config.hidden_size for config in configs)
    (_, expected), _ = family.condition_shapes(preset)
    files = some(dict.fromkeys(str(tensors.path) for tensors in parts.values()))
    if windows not in ([], [preset.clip_length]):
        raise InputError(f"{files}: CLIP of {some(windows)} tokens; expected {preset.clip_length}, {args.model}'s")
    if width != expected and (widths or not preset.t5_length):  # SD3 without T5 pads them too
        raise InputError(f"{files}: text encoders {width} wide; expected {expected}, {args.model}'s")
    return text, parts


# ---- the table ---------------------------------------------------------------------------------------------

SD15 = Family(
    network=sdxl_unet.UNet, config_from_shapes=sdxl_unet.config_from_shapes,
    vae=vae.AutoencoderKL, vae_config_from_shapes=vae.config_from_shapes,
    open_denoiser=open_sd15, open_vae=open_single_vae, new_text=new_sd15_text, beside=beside_single,
    condition_shapes=lambda preset: ((preset.clip_length, preset.config["context_dim"]), (0,)),
    sides=unet_sides, single_file=True, flags=(), names=diffusers_names.SD15)

FAMILIES = {
    "mmdit": Family(
        network=mmdit.MMDiT, config_from_shapes=mmdit.config_from_shapes,
        vae=vae.AutoencoderKL, vae_config_from_shapes=vae.config_from_shapes,
        open_denoiser=open_single_denoiser, open_vae=open_single_vae, new_text=new_sd3_text,
        beside=beside_single,
        condition_shapes=lambda preset: (
            (preset.clip_length + preset.t5_length, preset.config["context_dim"]),
            (preset.config["pooled_dim"],)),
        sides=mmdit_sides, single_file=True, flags=("no_t5",), names=diffusers_names.MMDIT),
    "unet": Family(
        network=sdxl_unet.UNet, config_from_shapes=sdxl_unet.config_from_shapes,
        vae=vae.AutoencoderKL, vae_config_from_shapes=vae.config_from_shapes,
        open_denoiser=open_single_denoiser, open_vae=open_single_vae, new_text=new_sdxl_text,
        beside=beside_single,
        condition_shapes=lambda preset: ((preset.clip_length, preset.config["context_dim"]),
                                         (preset.config["vector_dim"],)),
        sides=unet_sides, single_file=True, flags=(), names=diffusers_names.UNET, sized=True),
    "sd15": SD15,
    "animatediff": SD15._replace(
        network=animatediff.AnimateDiff, config_from_shapes=animatediff.config_from_shapes,
        vae=vae.FramesVAE, open_denoiser=open_animatediff, flags=("motion_ckpt",),
        frame_step=1, max_frames=animatediff.MAX_FRAMES),
    "cogvideox": Family(
        network=cogvideox.CogVideoX, config_from_shapes=cogvideox.config_from_shapes,
        vae=cogvideox_vae.CogVideoXVAE, vae_config_from_shapes=cogvideox_vae.config_from_shapes,
        open_denoiser=open_cogvideox, open_vae=open_cogvideox_vae, new_text=new_cogvideox_text,
        beside=partial(beside_part, COGVIDEOX_PARTS),
        condition_shapes=lambda preset: ((preset.t5_length, preset.config["text_dim"]), (0,)),
        sides=lambda preset: (preset.vae_factor * preset.config["patch"], None),
        single_file=False, flags=("sequence_parallel", "context_parallel"), names=diffusers_names.COGVIDEOX,
        null_prompts=("zeros", "empty"), frames_per_latent=4, frame_step=8),
    "wan": Family(
        network=wan.Wan, config_from_shapes=wan.config_from_shapes,
        vae=wan_vae.WanVAE, vae_config_from_shapes=wan_vae.config_from_shapes,
        open_denoiser=open_wan, open_vae=open_wan_vae, new_text=new_wan_text, beside=partial(beside_part, WAN_PARTS),
        condition_shapes=lambda preset: ((preset.t5_length, preset.config["text_dim"]), (0,)),
        sides=lambda preset: (preset.vae_factor * preset.config["patch"], None),
        single_file=False, flags=("sequence_parallel",), names=diffusers_names.WAN,
        null_prompts=("negative", "empty"), mends=True, frames_per_latent=4, frame_step=4, fps=16),
}
