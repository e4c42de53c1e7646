"""The networks of a run: denoisers in their roles, text encoders, VAE, discriminators; and the export.

`args` are the flags of `parsers.model_parser`. What the user can mend raises InputError.
"""
import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import models.text
from models import checkpoint, lora
from models.checkpoint import InputError, Tensors
from models.diffusion import Denoiser
from models.discriminator import Discriminator, PixelDiscriminator, VideoDiscriminator, shrink_count
from models.job.families import DENOISER, FAMILIES, MOTION, VAE, fitting_text, source
from models.job.motion import split_motion
from models.job.notes import check_adapter, export_notes, parametrisation, read_of, tell_other_base
from models.parallel import (
    barrier,
    fill_random,
    full_tensors,
    is_main,
    load_sharded,
    local_rows,
    materialise,
    neighbours,
    print0,
    reshard,
    settle,
    shard,
)
from models.parse import short
from models.presets import PRESETS, Preset
from models.saving import checksum
from models.sequence import sequence_parallel
from models.shards import Pairs, fingerprint
from models.text_encoders import PREFIXES

ADAPTER = "generator_lora.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def latent_shape(args: argparse.Namespace, preset: Preset) -> tuple[int, ...]:
    """(C h w), of a video (T C h w)."""
    per_latent = FAMILIES[preset.family].frames_per_latent
    frames = ((args.frames - 1) // per_latent + 1,) if preset.frames else ()
    return *frames, preset.latent_channels, *(side // preset.vae_factor for side in args.size)


def check_config(args, tensors: Tensors, config: dict, expected: dict) -> None:
    """Raises InputError if the tensors are those of another architecture than `expected`."""
    wrong = [f"{key} {value} (expected {expected[key]})" for key, value in config.items()
             if value != expected[key]]
    if wrong:
        raise InputError(f"{tensors.path} is not {args.model}: {', '.join(wrong[:3])}")


def open_denoiser(args, preset: Preset, init: Path | None = None) -> Tensors:
    """The denoiser's tensors, of the file `init`, of --ckpt or of the hub. Raises InputError if that holds
    another architecture than the preset's."""
    family = FAMILIES[preset.family]
    tensors = family.open_denoiser(args, preset, init)
    try:
        config = family.config_from_shapes(tensors.shapes)
    except (LookupError, ValueError, ArithmeticError):
        config = {}  # a tensor that tells a size is missing or mis-shaped: `check_names` names it
    check_config(args, tensors, config, preset.config)
    with torch.device("meta"):
        expected = family.network(**preset.config).state_dict()
    checkpoint.check_names(tensors, {name: tuple(t.shape) for name, t in expected.items()})
    return tensors


def check_export(path: Path) -> None:
    """Reads all of an exported file and compares its checksum, where it has one. Raises InputError."""
    tensors = checkpoint.open_tensors(path)
    expected = tensors.metadata.get("dmdx.crc32")
    if expected and checksum(tensors, tensors.metadata) != expected:
        raise InputError(f"{path}: not as it was exported, its CRC-32 is not the {expected} of its metadata; "
                         "expected an undamaged copy, or no dmdx.crc32 in a file that was edited on purpose")


def load_network(args, preset: Preset, mesh: DeviceMesh, device: torch.device, trainable: bool = False,
                 adapters: dict[str, int] = {}, init: Path | None = None) -> nn.Module:
    """A sharded denoiser with the weights of the checkpoint or of the file `init`: float32 when trained, else in
    --precision. adapters: name -> rank, 0 for none, on a frozen base. Raises InputError for another architecture."""
    compute, family = DTYPES[args.precision], FAMILIES[preset.family]
    tensors = None if args.random_weights and not init else open_denoiser(args, preset, init)
    with torch.device("meta"):
        net = family.network(**preset.config).to(torch.float32 if trainable else compute)
    net.requires_grad_(trainable)
    adapters = {name: rank for name, rank in adapters.items() if rank}
    for name, rank in adapters.items():
        lora.add_lora(net, family.names, name, rank)
    if args.sequence_parallel > 1:
        sequence_parallel(net, neighbours(args.sequence_parallel))
    shard(net, mesh, compute, args.offload, not args.no_checkpointing, args.compile, args.no_reshard,
          args.offload_activations)
    materialise(net, device, args.offload)
    if tensors is None:
        fill_random(net, args.seed)
    else:
        load_sharded(net, tensors)
    for i, name in enumerate(adapters):
        lora.init_lora(net, name, seed=i)
    return net


def init_file(args) -> Tensors | None:
    """The exported generator of --init, a run folder or a file: all weights or, with --lora-rank, an adapter.
    Raises InputError for the other of the two and for another model's."""
    init, rank = args.init, getattr(args, "lora_rank", 0)
    if not init:
        return None
    if init.is_dir():
        found = [init / name for name in ("generator.safetensors", ADAPTER) if (init / name).exists()]
        if not found:
            raise InputError(f"--init {init}: no generator.safetensors; expected the folder of a finished run")
        init = found[-1] if rank else found[0]  # where both are there, the one that is asked for
    tensors = checkpoint.open_tensors(init)
    adapter = any(".lora_" in name for name in tensors)
    if rank and not adapter:
        raise InputError("--init starts from weights of its own, which no adapter on the teacher's can be: "
                         "expected --lora-rank 0")
    model = export_notes(tensors).get("dmdx.model")
    if model != args.model:
        raise InputError(f"--init {init}: a generator of {model or 'no run of ours'}; expected one of {args.model}")
    if adapter and not rank:
        raise InputError(f"--init {init}: an adapter on the teacher's weights; expected --lora-rank with its "
                         "rank, or a generator with all weights")
    return tensors


def load_generator(args, preset: Preset, mesh: DeviceMesh, device: torch.device) -> Denoiser:
    """G_theta with weights of its own: the teacher's, or those of --init, which says what its network
    predicts and on which schedule. Raises InputError for another model's."""
    tensors = init_file(args)
    for path in (tensors.path, tensors.path.with_name(MOTION)) if tensors and is_main() else ():
        if path.exists():
            check_export(path)
    notes = export_notes(tensors) if tensors else {}
    preset = preset._replace(**parametrisation(notes))
    net = load_network(args, preset, mesh, device, trainable=True, init=tensors.path if tensors else None)
    return Denoiser(net, preset.predicts, preset.schedule)


def load_adapter(args, preset: Preset, G_theta: Denoiser) -> Denoiser:
    """G_theta, an adapter on the teacher's network, or with --init the adapter of that run: its values, what
    it predicts and on which schedule. Raises InputError for one of another rank or of other layers."""
    tensors = init_file(args)
    if tensors is None:
        return G_theta
    if is_main():
        check_export(tensors.path)
    if not args.random_weights:
        tell_other_base(tensors, source(args, preset).path)
    lora.load_lora(G_theta.net, FAMILIES[preset.family].names, G_theta.lora[0], tensors)
    return replace(G_theta, **parametrisation(export_notes(tensors)))


def open_lora(args, preset: Preset) -> dict[str, list[lora.Piece]]:
    """The adapter of the file --lora. Raises InputError for one that is not of this model."""
    family = FAMILIES[preset.family]
    tensors = checkpoint.open_tensors(args.lora)
    check_adapter(tensors, preset)
    with torch.device("meta"):
        net = family.network(**preset.config)
    return lora.read_lora(tensors, net, family.names)


def teacher_files(args, preset: Preset) -> dict:
    """Fingerprints of the teacher's and the text encoders' local files, and the settings that change conditions.
    Nothing of files that the hub gives. Raises InputError for files that cannot be read."""
    family = FAMILIES[preset.family]
    found = dict(checkpoint=fingerprint(source(args, preset).path), no_t5=args.no_t5)
    for flag, usual in (("text_ckpt", None), ("tokenizers", preset.tokenizers)):
        given = getattr(args, flag)
        path = given if given != usual else args.ckpt and family.beside(args.ckpt, preset, flag)
        found[flag] = read_of(Path(path), flag) if path and Path(path).exists() else path
    found |= dict(motion=fingerprint(args.motion_ckpt)) if args.motion_ckpt else {}
    found |= dict(ftfy=models.text.ftfy is not None) if family.mends else {}
    return found | (dict(null_prompt=args.null_prompt) if args.null_prompt else {})


def check_pairs(args, preset: Preset, pairs: Pairs) -> None:
    """Say how else these ODE pairs were made than the preset has it. Raises InputError for those of another
    teacher or of other conditions than this run's."""
    flags = dict(checkpoint="--ckpt", no_t5="--no-t5", text_ckpt="--text-ckpt", tokenizers="--tokenizers",
                 motion="--motion-ckpt", null_prompt="--null-prompt", ftfy="prompts (is ftfy installed?)")
    now = teacher_files(args, preset)
    other = [flag for key, flag in flags.items()
             if key in pairs.manifest and pairs.manifest[key] != now.get(key)]
    if other:
        raise InputError(f"{pairs.folder}: these pairs were made with other {', '.join(other)}; expected the "
                         "flags and files of this run, or the pairs' flags here")
    usual = dict(schedule=preset.schedule, shift=preset.shift, steps=preset.teacher_steps, cfg=list(preset.cfg))
    unusual = [f"{key} {short(pairs.manifest[key], 60)} (this run's: {value})" for key, value in usual.items()
               if key in pairs.manifest and pairs.manifest[key] != value]
    if unusual:
        print0(f"note: {pairs.folder} was made with {', '.join(unusual)}")


def frame_model(args, preset: Preset) -> tuple[argparse.Namespace, Preset]:
    """(args, preset) with which `load_network` loads the model of a video model's single frames: the weights
    of --teacher-2d, else the file that the video model's own are in."""
    args = argparse.Namespace(**vars(args) | dict(model=preset.base_2d, ckpt=args.teacher_2d or args.ckpt))
    return args, PRESETS[preset.base_2d]


def load_text(args, preset: Preset, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """The sharded text encoders: from --text-ckpt, the denoiser's file, the files beside it, or the hub."""
    text, parts = fitting_text(args, preset, device)
    shard(text.to(DTYPES[args.precision]), mesh, DTYPES[args.precision], args.offload)
    materialise(text, device, args.offload)
    return text.load(parts, load_sharded)


def load_vae(args, preset: Preset, device: torch.device) -> nn.Module:
    """The whole VAE on every rank, frozen, in --vae-precision. Raises InputError for another architecture."""
    family = FAMILIES[preset.family]
    with torch.device("meta"):
        vae = family.vae(**preset.vae)
    if args.random_weights:
        vae.to_empty(device="cpu")
        fill_random(vae, args.seed)
    else:
        tensors = family.open_vae(args, preset)
        try:
            config = family.vae_config_from_shapes(tensors.shapes)
        except (LookupError, ArithmeticError):
            config = {}  # `checkpoint.load` names the tensor
        except ValueError as error:
            raise InputError(f"{tensors.path}: {error}") from error
        check_config(args, tensors, config, preset.vae)
        checkpoint.load(vae, tensors)
    return vae.requires_grad_(False).to(device, DTYPES[args.vae_precision])


def shard_heads(args, build: Callable[[], nn.Module], mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """A discriminator with its heads sharded; their initial values are the same on any number of ranks. They compute
    in float32: real and fake are so near each other that in bf16 one pair in ten is turned round."""  # [choice]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(args.seed)
        D_tau = build()
    D_tau.to("cpu" if args.offload else device)
    settle(shard(D_tau, mesh, torch.float32, args.offload, not args.no_checkpointing))
    return D_tau


def new_discriminator(args, preset: Preset, F_phi: Denoiser, mesh: DeviceMesh, device: torch.device,
                      kind: type = Discriminator) -> Discriminator | VideoDiscriminator:
    """The latent D_tau on F_phi's module or, where --d-precision is not --precision, on a frozen copy of it."""
    if args.d_precision not in (None, args.precision):  # [choice] bf16 on GPUs: a copy takes as much memory again
        args = argparse.Namespace(**vars(args) | dict(precision=args.d_precision))
        F_phi = replace(F_phi, net=load_network(args, preset, mesh, device))
    shape = latent_shape(args, preset)
    taps = F_phi.net.tap_shapes(*(shape if preset.frames else shape[-2:]))
    small = [name for name, tap in taps.items() if kind is Discriminator and not shrink_count(min(tap[-2:]))]
    if small:
        said = "D has no head on" if len(small) < len(taps) else "D's heads are linear on"
        print0(f"note: {said} {', '.join(map(str, small))}, whose maps are too small to be halved")
    taps = {name: tap for name, tap in taps.items() if name not in small} or taps  # [choice] linear ones are noise
    return shard_heads(args, lambda: kind(F_phi, tuple(taps), [*taps.values()], preset.head_width), mesh, device)


def new_pixel_discriminator(args, preset: Preset, mesh: DeviceMesh,
                            device: torch.device) -> PixelDiscriminator:
    """D_tau2 on the features of --pixel-encoder, which every rank holds whole."""
    from models import vision  # transformers' vision models: only ADP needs them, and they import slowly
    path = args.pixel_ckpt or (preset.sam_ckpt if args.pixel_encoder == "sam" else None)
    if args.random_weights and path is None:
        encoder = vision.random_vision(args.pixel_encoder, DTYPES[args.precision], device)
    else:
        encoder = vision.load_vision(args.pixel_encoder, path, DTYPES[args.precision], device)
    return shard_heads(args, lambda: PixelDiscriminator(encoder, preset.head_width), mesh, device)


def trainables(role: Denoiser | nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of what a role trains: its adapter, all of its network, or D_tau's heads."""
    if isinstance(role, nn.Module):
        return dict(role.named_parameters())
    suffixes = tuple(f".lora_{side}.{name}" for name in role.lora for side in "AB")
    return {name: p for name, p in role.net.named_parameters() if not suffixes or name.endswith(suffixes)}


def student_cfg(args) -> float | None:
    """Guidance scale at which the generator is sampled: the middle of --cfg less --generator-cfg-offset;
    None: unguided."""  # [choice]
    offset = getattr(args, "generator_cfg_offset", None)
    return None if offset is None else sum(args.cfg) / 2 - offset


def export(args, preset: Preset, G_theta: Denoiser, out: Path) -> None:
    """The generator as users' tools read it: an adapter in the diffusers and in the kohya/ComfyUI layout, all
    weights in the original layout, with the VAE of this run and the checkpoint's text encoders if that is a
    single file. Raises InputError for weights that are not finite."""
    family = FAMILIES[preset.family]
    reshard()  # the weights that compute may be in half precision
    bad = [name for name, p in trainables(G_theta).items() if not local_rows(p)[0].isfinite().all()]
    if bad:
        raise InputError(f"{out}: the generator is not exported, because {len(bad)} of its tensors are not "
                         f"finite ({checkpoint.some(bad)}); expected a state from before that, as --resume STATE")
    metadata = {"dmdx.model": args.model, "dmdx.steps": str(args.steps), "dmdx.shift": str(preset.shift),
                "dmdx.predicts": G_theta.predicts, "dmdx.schedule": G_theta.schedule}
    metadata |= {"dmdx.rollout": "renoise"} if G_theta.renoise else {}
    if student_cfg(args) is not None:
        metadata["dmdx.cfg"] = str(student_cfg(args))
        metadata |= {"dmdx.null_prompt": args.null_prompt} if args.null_prompt else {}
    if G_theta.lora:
        adapter, = G_theta.lora
        saved = G_theta.net, family.names, adapter, metadata | {"dmdx.base": args.teacher_files["checkpoint"]}
        lora.save_diffusers(out / ADAPTER, *saved)
        lora.save_kohya(out / "generator_lora_kohya.safetensors", *saved)
        if family.names.dotted:
            lora.save_kohya(out / "generator_lora_comfyui.safetensors", *saved, family.names.dotted)
        return
    named = [*G_theta.net.named_parameters(), *G_theta.net.named_buffers()]
    weights = {name: p.to(DTYPES[args.export_dtype]) for name, p in full_tensors(named)}
    if is_main():
        lost = [name for name, p in weights.items() if not p.isfinite().all()]
        if lost:
            raise InputError(f"{out}: the generator is not exported, because --export-dtype {args.export_dtype} "
                             f"overflows in {checkpoint.some(lost)}; expected bf16 or fp32")
        weights, motion = split_motion(weights)
        weights = {DENOISER * family.single_file + name: p for name, p in weights.items()}
        others = beside_denoiser(args, preset) if family.single_file else {}
        metadata |= {"modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": family.names.architecture,
                     "modelspec.title": f"{args.model}, {args.steps} steps",
                     "modelspec.implementation": f"https://github.com/{family.names.implementation}"}
        (out / MOTION).unlink(missing_ok=True)  # an earlier export's would be taken for the new UNet's
        checkpoint.save_safetensors(out / "generator.safetensors", weights | others, metadata)
        if motion:
            checkpoint.save_safetensors(out / MOTION, motion, metadata)
    barrier()  # the others wait for the writing


def beside_denoiser(args, preset: Preset) -> dict[str, Tensor]:
    """What a single file holds beside the denoiser: the VAE of this run and, if they are this run's too, the
    text encoders of the checkpoint. Nothing else: not its EMA, markers or tables of a schedule."""
    vae, single = FAMILIES[preset.family].open_vae(args, preset), source(args, preset)
    texts = [] if args.text_ckpt else [name for name in single if name.startswith(tuple(PREFIXES))]
    if not texts:
        print("note: generator.safetensors holds no text encoders, as they are not in one file with the "
              f"denoiser; they are in {args.text_ckpt or 'or beside ' + str(single.path.parent)}")
    return {VAE + name: vae[name] for name in vae} | {name: single[name] for name in texts}
