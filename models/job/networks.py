"""Networks of a run from checkpoints: denoisers, text encoders, VAE, discriminator; and the export.

`args` are the flags of `flags.model_flags`. Whatever the user can mend raises InputError.
"""
import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from models import checkpoint, lora
from models.checkpoint import InputError
from models.cogvideox import CogVideoX
from models.cogvideox import config_from_shapes as cogvideox_config
from models.cogvideox import from_sat as cogvideox_from_sat
from models.cogvideox_vae import CogVideoXVAE
from models.cogvideox_vae import config_from_shapes as cogvideox_vae_config
from models.cogvideox_vae import from_sat as cogvideox_vae_from_sat
from models.diffusion import Denoiser
from models.discriminator import Discriminator, PixelDiscriminator, load_vision, random_vision
from models.mmdit import MMDiT
from models.mmdit import config_from_shapes as mmdit_config
from models.parallel import (
    any_rank,
    fill_random,
    full_tensors,
    is_main,
    load_sharded,
    materialise,
    neighbours,
    sequence_parallel,
    settle,
    shard,
)
from models.presets import Preset
from models.sdxl_unet import UNet
from models.sdxl_unet import config_from_shapes as unet_config
from models.text import (
    CogVideoXText,
    SD3Text,
    SDXLText,
    hub_tensors,
    load_tokenizers,
    t5_tensors,
    text_parts,
)
from models.vae import AutoencoderKL
from models.vae import config_from_shapes as vae_config

DENOISER = "model.diffusion_model."
# Preset.family -> the denoiser's class, and its arguments as far as a checkpoint's shapes tell them.
FAMILIES = {"mmdit": (MMDiT, mmdit_config), "unet": (UNet, unet_config),
            "cogvideox": (CogVideoX, cogvideox_config)}
# Flag -> where its files are in a CogVideoX download, and in the original release.
COGVIDEOX_PARTS = {"vae_ckpt": ("vae/", "vae/3d-vae.pt"), "text_ckpt": ("text_encoder/", "t5-v1_1-xxl/"),
                   "tokenizers": ("tokenizer/", "t5-v1_1-xxl/")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def latent_shape(args: argparse.Namespace, row: Preset) -> tuple[int, ...]:
    """(C h w), of a video (T C h w)."""
    frames = ((args.frames - 1) // row.vae_frames + 1,) if row.frames else ()
    return *frames, row.latent_channels, args.size[0] // row.vae_factor, args.size[1] // row.vae_factor


def sizes(row: Preset) -> tuple[int, int | None]:
    """(multiple of pixels that a side must be, the largest side or None)."""
    if row.family == "unet":
        return row.vae_factor * 2 ** (len(row.config["channel_mult"]) - 1), None
    multiple = row.vae_factor * row.config["patch"]
    return multiple, multiple * row.config["pos_grid"] if row.family == "mmdit" else None


def condition_shapes(row: Preset) -> tuple[tuple[int, int], tuple[int]]:
    """Shapes (L D) of a prompt's context and (P,) of its vector."""
    if row.family == "cogvideox":
        return (row.t5_length, row.config["text_dim"]), (0,)
    vector = row.config["vector_dim" if row.family == "unet" else "pooled_dim"]
    return (row.clip_length + row.t5_length, row.config["context_dim"]), (vector,)


def source(args: argparse.Namespace, row: Preset) -> checkpoint.Tensors:
    """The tensors of --ckpt or of the preset's file on the hub. Raises InputError if neither can be read."""
    return checkpoint.open_tensors(checkpoint.find(row.file, args.ckpt, row.repo))


def check_config(args, tensors: checkpoint.Tensors, config_from_shapes: Callable, expected: dict) -> None:
    """Raises InputError if the tensors are those of another architecture than `expected`."""
    try:
        config = config_from_shapes(tensors.shapes)
    except (LookupError, ValueError):  # a tensor that tells a size is missing or mis-shaped: loading names it
        return
    wrong = [f"{key} {value} (expected {expected[key]})" for key, value in config.items()
             if value != expected[key]]
    if wrong:
        raise InputError(f"{tensors.path} is not {args.model}: {', '.join(wrong[:3])}")


def open_denoiser(args: argparse.Namespace, row: Preset, init: Path | None = None) -> checkpoint.Tensors:
    """The denoiser's tensors, of the file `init` or of `source`. Raises InputError if that holds another
    architecture than the preset's."""
    tensors = checkpoint.open_tensors(init) if init else source(args, row)
    tensors = cogvideox_from_sat(tensors) if row.family == "cogvideox" else tensors.group(DENOISER)
    Network, config_from_shapes = FAMILIES[row.family]
    check_config(args, tensors, config_from_shapes, row.config)
    with torch.device("meta"):
        expected = Network(**row.config).state_dict()
    checkpoint.check_names(tensors, {name: tuple(t.shape) for name, t in expected.items()})
    return tensors


def load_network(args, row: Preset, mesh: DeviceMesh, device: torch.device, trainable: bool = False,
                 adapters: dict[str, int] = {}, init: Path | None = None) -> nn.Module:
    """A sharded denoiser with the weights of the checkpoint or of the file `init`: float32 when trained, else
    in --precision. adapters: name -> rank, on a frozen base. Raises InputError for another architecture than
    the preset's."""
    compute = DTYPES[args.precision]
    tensors = None if args.random_weights and not init else open_denoiser(args, row, init)
    with torch.device("meta"):
        net = FAMILIES[row.family][0](**row.config).to(torch.float32 if trainable else compute)
    net.requires_grad_(trainable)
    for name, rank in adapters.items():
        lora.add_lora(net, name, rank)
    if args.sequence_parallel > 1:
        sequence_parallel(net, neighbours(args.sequence_parallel))
    shard(net, mesh, compute, args.offload, checkpointing=not args.no_checkpointing)
    materialise(net, device, args.offload)
    if tensors is None:
        fill_random(net, args.seed)
    else:
        load_sharded(net, tensors)
    for i, name in enumerate(adapters):
        lora.init_lora(net, name, seed=i)
    return net


def load_generator(args, row: Preset, mesh: DeviceMesh, device: torch.device) -> Denoiser:
    """G_theta with weights of its own: the teacher's, or those of --init, a run folder or an exported file,
    which says what its network predicts and on which schedule. Raises InputError for another model's."""
    predicts, schedule, init = row.predicts, row.schedule, args.init
    if init:
        if init.is_dir() and not (init / "generator.safetensors").exists():
            raise InputError(f"--init {init}: no generator.safetensors; expected a finished run of adp.py")
        init = init / "generator.safetensors" if init.is_dir() else init
        metadata = checkpoint.open_tensors(init).metadata
        if metadata.get("dmdx.model") != args.model:
            raise InputError(f"--init {init}: a generator of {metadata.get('dmdx.model', 'no run of ours')}; "
                             f"expected one of {args.model}")
        predicts = metadata.get("dmdx.predicts", predicts)
        schedule = metadata.get("dmdx.schedule", schedule)
    return Denoiser(load_network(args, row, mesh, device, trainable=True, init=init), predicts, schedule)


def load_text(args, row: Preset, mesh: DeviceMesh,
              device: torch.device) -> SD3Text | SDXLText | CogVideoXText:
    """The sharded text encoders: from --text-ckpt, the denoiser's file, the files beside it, or the hub."""
    if row.family == "cogvideox":
        path = args.text_ckpt or beside_denoiser(args.ckpt, row, "text_ckpt")
        own = args.tokenizers != row.tokenizers  # not the preset's
        tokenizers = args.tokenizers if own else beside_denoiser(args.ckpt, row, "tokenizers")
        if Path(tokenizers).name == "tokenizer":
            tokenizers = Path(tokenizers).parent
        parts = {"t5": t5_tensors(hub_tensors(path) if path.is_dir() else checkpoint.open_tensors(path))}
        text = CogVideoXText(parts, load_tokenizers(tokenizers, t5=False), row.t5_length,
                             args.null_prompt, device)
        return fill_text(args, text, parts, mesh, device)
    single, beside = checkpoint.find(row.file, args.ckpt, row.repo), []
    if args.text_ckpt:
        beside = [args.text_ckpt]
    elif not row.text_files or any(name.startswith("text_encoders.clip_l.")
                                   for name in checkpoint.open_tensors(single).shapes):
        beside = [single]
    else:
        wanted = row.text_files[:2] if args.no_t5 else row.text_files
        beside = [single.parent / name for name in wanted] if args.ckpt else []
        if not beside or not all(path.exists() for path in beside):
            beside = [checkpoint.find(f, None, row.repo) for f in wanted]
    parts = text_parts(*beside)
    tokenizers = load_tokenizers(args.tokenizers, t5=row.t5_length > 0)
    if row.family == "unet":
        text = SDXLText(parts, tokenizers, tuple(args.size), device=device)
    else:
        if args.no_t5:
            parts.pop("t5", None)
        elif "t5" not in parts:
            raise InputError(f"{beside[0]}: no T5 encoder; pass --text-ckpt with t5xxl_fp16.safetensors "
                             "in it, or --no-t5")
        text = SD3Text(parts, tokenizers, row.t5_length, row.config["context_dim"], device=device)
    return fill_text(args, text, parts, mesh, device)


def fill_text(args, text: nn.Module, parts: dict, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    shard(text.to(DTYPES[args.precision]), mesh, DTYPES[args.precision], args.offload)
    materialise(text, device, args.offload)
    return text.load(parts, load_sharded)


def beside_denoiser(ckpt: Path | None, row: Preset, flag: str) -> Path:
    """What `flag` would give, a part of COGVIDEOX_PARTS, in or beside --ckpt: the folder of a download or of
    the original release, whose denoiser is transformer/1/mp_rank_00_model_states.pt, or that denoiser itself;
    else the preset's own. Raises InputError where neither is there."""
    folder, original = COGVIDEOX_PARTS[flag]
    above = (ckpt.absolute(), *ckpt.absolute().parents) if ckpt else ()
    for root in (*above[:1], *(path.parent for path in above if path.name == "transformer")):
        for path in (root / folder, root / original):
            if path.exists():
                return path
    try:
        return checkpoint.find(folder, row.ckpt, row.repo)
    except InputError as error:
        advice = f"; --{flag.replace('_', '-')} takes a local copy"  # instead of the denoiser's
        raise InputError(str(error).rpartition("; ")[0] + advice) from error


def load_vae(args, row: Preset, device: torch.device) -> AutoencoderKL | CogVideoXVAE:
    """The whole VAE on every rank, frozen, in --vae-precision. Raises InputError for another architecture."""
    video = row.family == "cogvideox"
    with torch.device("meta"):
        vae = (CogVideoXVAE if video else AutoencoderKL)(**row.vae)
    if args.random_weights:
        vae.to_empty(device="cpu")
        fill_random(vae, args.seed)
    elif video:
        path = args.vae_ckpt or beside_denoiser(args.ckpt, row, "vae_ckpt")
        tensors = cogvideox_vae_from_sat(checkpoint.open_tensors(path))
        check_config(args, tensors, cogvideox_vae_config, row.vae)
        checkpoint.load(vae, tensors)
    else:
        tensors = (checkpoint.open_tensors(args.vae_ckpt) if args.vae_ckpt
                   else source(args, row)).group("first_stage_model.")
        check_config(args, tensors, vae_config, row.vae)
        checkpoint.load(vae, tensors)
    return vae.requires_grad_(False).to(device, DTYPES[args.vae_precision])


def shard_heads(args, build: Callable[[], nn.Module], mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """A discriminator with its heads sharded; their initial values are the same on any number of ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        D_tau = build()
    D_tau.to("cpu" if args.offload else device)
    shard(D_tau, mesh, DTYPES[args.precision], args.offload)
    settle(D_tau)
    return D_tau


def new_discriminator(args, row: Preset, F_phi: Denoiser, mesh: DeviceMesh,
                      device: torch.device) -> Discriminator:
    """The latent D_tau on F_phi's own module."""
    shape = latent_shape(args, row)
    taps = F_phi.net.tap_shapes(*(shape if row.frames else shape[-2:]))
    return shard_heads(args, lambda: Discriminator(F_phi, tuple(taps), list(taps.values()), row.head_width),
                       mesh, device)


def new_pixel_discriminator(args, row: Preset, mesh: DeviceMesh, device: torch.device) -> PixelDiscriminator:
    """D_tau2 on the features of --pixel-encoder, which every rank holds whole."""
    path = args.pixel_ckpt or (row.pixel_ckpt if args.pixel_encoder == "sam" else None)
    if args.random_weights and path is None:
        encoder = random_vision(args.pixel_encoder, DTYPES[args.precision], device)
    else:
        encoder = load_vision(args.pixel_encoder, path, DTYPES[args.precision], device)
    return shard_heads(args, lambda: PixelDiscriminator(encoder, row.head_width), mesh, device)


def trainables(role: Denoiser | Discriminator) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a role trains: its adapter, all of its network, or D_tau's heads."""
    if isinstance(role, Discriminator):
        return dict(role.named_parameters())
    suffixes = tuple(f".lora_{side}.{name}" for name in role.lora for side in "AB")
    return {name: p for name, p in role.net.named_parameters() if not suffixes or name.endswith(suffixes)}


def student_cfg(args) -> float | None:
    """Guidance at which a generator is sampled: --cfg's middle less --generator-cfg-offset; None: none."""
    offset = getattr(args, "generator_cfg_offset", None)
    return None if offset is None else sum(args.cfg) / 2 - offset


def export(args, row: Preset, G_theta: Denoiser, out: Path) -> None:
    """The generator as users' tools read it: an adapter in the diffusers and in the kohya/ComfyUI layout, all
    weights in the original single-file layout with the checkpoint's VAE and text encoders unchanged."""
    metadata = {"dmdx.model": args.model, "dmdx.steps": str(args.steps), "dmdx.shift": str(row.shift),
                "dmdx.predicts": G_theta.predicts, "dmdx.schedule": G_theta.schedule}
    if student_cfg(args) is not None:
        metadata["dmdx.cfg"] = str(student_cfg(args))
        metadata |= {"dmdx.null_prompt": args.null_prompt} if row.frames else {}
    if G_theta.lora:
        lora.save_diffusers(out / "generator_lora.safetensors", G_theta.net, G_theta.lora[0], metadata)
        lora.save_kohya(out / "generator_lora_kohya.safetensors", G_theta.net, G_theta.lora[0], metadata)
        return
    named = [*G_theta.net.named_parameters(), *G_theta.net.named_buffers()]
    video = row.family == "cogvideox"  # published in a file of its own, without prefix
    weights = {("" if video else DENOISER) + name: p.to(DTYPES[args.export_dtype])
               for name, p in full_tensors(named)}
    if is_main():
        tensors = {} if video else source(args, row)
        others = {name: tensors[name] for name in tensors if not name.startswith(DENOISER)}
        checkpoint.save_safetensors(out / "generator.safetensors", weights | others, metadata)
    any_rank(False)  # the others wait here for the writing, on gloo, which is more patient than nccl
