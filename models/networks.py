"""Networks of a run from checkpoints: denoisers, text encoders, VAE, discriminator; and the export.

`args` are the flags of `run.model_flags`. Whatever the user can mend raises InputError.
"""
import argparse
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from models import checkpoint, lora
from models.checkpoint import InputError
from models.diffusion import Denoiser
from models.discriminator import Discriminator
from models.mmdit import MMDiT, config_from_shapes
from models.parallel import (
    any_rank,
    fill_random,
    full_tensors,
    is_main,
    load_sharded,
    materialise,
    settle,
    shard,
)
from models.presets import Preset
from models.text import SD3Text, load_tokenizers, text_parts
from models.vae import AutoencoderKL
from models.vae import config_from_shapes as vae_config

DENOISER = "model.diffusion_model."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def latent_shape(args: argparse.Namespace, row: Preset) -> tuple[int, int, int]:
    return row.latent_channels, args.size[0] // row.vae_factor, args.size[1] // row.vae_factor


def text_tokens(row: Preset) -> int:
    return row.clip_length + row.t5_length


def source(args: argparse.Namespace, row: Preset) -> checkpoint.Tensors:
    """The tensors of --ckpt or of the preset's file on the hub. Raises InputError if neither can be read."""
    return checkpoint.open_tensors(checkpoint.find(row.file, args.ckpt, row.repo))


def open_denoiser(args: argparse.Namespace, row: Preset) -> checkpoint.Tensors:
    """The denoiser's tensors. Raises InputError if the file holds another architecture than the preset's."""
    tensors = source(args, row).group(DENOISER)
    try:
        config = config_from_shapes(tensors.shapes)
    except (LookupError, ValueError):  # a tensor that tells a size is missing or mis-shaped: named below
        config = {}
    wrong = [f"{key} {config[key]} (expected {row.config[key]})" for key in config
             if config[key] != row.config[key]]
    if wrong:
        raise InputError(f"{tensors.path} is not {args.model}: {', '.join(wrong[:3])}")
    with torch.device("meta"):
        expected = MMDiT(**row.config).state_dict()
    checkpoint.check_names(tensors, {name: tuple(t.shape) for name, t in expected.items()})
    return tensors


def load_network(args, row: Preset, mesh: DeviceMesh, device: torch.device, trainable: bool = False,
                 adapters: dict[str, int] = {}) -> nn.Module:
    """A sharded denoiser with the checkpoint's weights: float32 when trained, else in --precision.
    adapters: name -> rank, on a frozen base. Raises InputError for another architecture than the preset's."""
    compute = DTYPES[args.precision]
    tensors = None if args.random_weights else open_denoiser(args, row)
    with torch.device("meta"):
        net = MMDiT(**row.config).to(torch.float32 if trainable else compute)
    net.requires_grad_(trainable)
    for name, rank in adapters.items():
        lora.add_lora(net, name, rank)
    shard(net, mesh, compute, args.offload, checkpointing=not args.no_checkpointing)
    materialise(net, device, args.offload)
    if tensors is None:
        fill_random(net, args.seed)
    else:
        load_sharded(net, tensors)
    for i, name in enumerate(adapters):
        lora.init_lora(net, name, seed=i)
    return net


def load_text(args, row: Preset, mesh: DeviceMesh, device: torch.device) -> SD3Text:
    """The sharded text encoders: from --text-ckpt, the denoiser's file, the files beside it, or the hub."""
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
    if args.no_t5:
        parts.pop("t5", None)
    elif "t5" not in parts:
        raise InputError(f"{beside[0]}: no T5 encoder; pass --text-ckpt with t5xxl_fp16.safetensors "
                         "in it, or --no-t5")
    text = SD3Text(parts, load_tokenizers(args.tokenizers), row.t5_length, row.config["context_dim"],
                   device=device)
    shard(text.to(DTYPES[args.precision]), mesh, DTYPES[args.precision], args.offload)
    materialise(text, device, args.offload)
    return text.load(parts, load_sharded)


def load_vae(args, row: Preset, device: torch.device) -> AutoencoderKL:
    """The whole VAE on every rank, float32: it is small, and its float16 form overflows on some images."""
    tensors = source(args, row).group("first_stage_model.")
    try:
        config = vae_config(tensors.shapes)
    except (LookupError, ValueError) as error:
        raise InputError(f"{tensors.path}: the VAE's architecture cannot be read ({error})") from error
    with torch.device("meta"):
        vae = AutoencoderKL(**config, shift=row.vae_shift, scale=row.vae_scale, groups=row.vae_groups)
    checkpoint.load(vae, tensors)
    return vae.requires_grad_(False).to(device)


def new_discriminator(args, row: Preset, F_phi: Denoiser, mesh: DeviceMesh,
                      device: torch.device) -> Discriminator:
    """D_tau on F_phi's own module, its heads sharded, with the same initial values on any number of ranks."""
    taps = F_phi.net.tap_shapes(*latent_shape(args, row)[-2:])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        D_tau = Discriminator(F_phi, tuple(taps), list(taps.values()), row.head_width)
    D_tau.to("cpu" if args.offload else device)
    shard(D_tau, mesh, DTYPES[args.precision], args.offload)
    settle(D_tau)
    return D_tau


def trainables(role: Denoiser | Discriminator) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a role trains: its adapter, all of its network, or D_tau's heads."""
    if isinstance(role, Discriminator):
        return dict(role.named_parameters())
    suffixes = tuple(f".lora_{side}.{name}" for name in role.lora for side in "AB")
    return {name: p for name, p in role.net.named_parameters() if not suffixes or name.endswith(suffixes)}


def export(args, row: Preset, G_theta: Denoiser, out: Path) -> None:
    """The generator as users' tools read it: an adapter in the diffusers and in the kohya/ComfyUI layout, all
    weights in the original single-file layout with the checkpoint's VAE and text encoders unchanged."""
    metadata = {"dmdx.model": args.model, "dmdx.steps": str(args.steps), "dmdx.shift": str(row.shift)}
    if G_theta.lora:
        lora.save_diffusers(out / "generator_lora.safetensors", G_theta.net, G_theta.lora[0], metadata)
        lora.save_kohya(out / "generator_lora_kohya.safetensors", G_theta.net, G_theta.lora[0], metadata)
        return
    named = [*G_theta.net.named_parameters(), *G_theta.net.named_buffers()]
    weights = {DENOISER + name: p.to(DTYPES[args.export_dtype]) for name, p in full_tensors(named)}
    if is_main():
        tensors = source(args, row)
        others = {name: tensors[name] for name in tensors.shapes if not name.startswith(DENOISER)}
        checkpoint.save_safetensors(out / "generator.safetensors", weights | others, metadata)
    any_rank(False)  # the others wait here for the writing, on gloo, which is more patient than nccl
