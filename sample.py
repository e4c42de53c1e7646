"""Pictures or videos from a teacher, an exported generator, a LoRA file or a run folder.

    python sample.py                               # the embedded tiny-sd3 teacher
    python sample.py --ckpt runs/adm-tiny-sd3-000  # the student of a run, at its own N steps
    python sample.py --model sd3-medium --ckpt sd3_medium.safetensors --lora FILE --prompt "a red fox"
    torchrun --nproc_per_node 8 sample.py --model cogvideox-5b --sequence-parallel 8

Writes OUT/000.png, 001.png, ... with prompt and settings in their text chunks, and OUT/grid.png; of videos
000.mp4, ..., grid.mp4 and in grid.png six frames of each. A file that this project exported says how many
steps it was trained for, and at which guidance, mostly none; then the generator's schedule is used.
Everything else is sampled as a teacher: Euler or DDIM steps on the original's schedule with guidance.
"""
import argparse
import json
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from models import lora
from models.job import flags, networks, sampling
from models.checkpoint import InputError, open_tensors
from models.data import film_strip, picture, save_grid, save_mp4, save_png
from models.diffusion import Denoiser, generator_times, teacher_times
from models.parallel import any_rank, init_distributed, is_main, print0
from models.presets import PRESETS
from models.eval.prompt_sets import SETS, prompt_set


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="sample.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.model_flags(parser)
    parser.set_defaults(model=None)  # the exported file's own, else tiny-sd3
    add = parser.add_argument
    add("--lora", type=Path, help="adapter in the diffusers, kohya or ComfyUI layout, merged into weights")
    add("--lora-scale", type=float, default=1.0, help="strength of --lora")
    add("--prompt", help="one prompt")
    add("--prompts", help=f"file, or a set by name: {', '.join(SETS)}; default: some of our own")
    add("--count", type=int, help="pictures; prompts repeat with other noise. Default: one a prompt")
    add("--steps", type=int, help="default: the generator's N, or the teacher's full steps")
    add("--cfg", type=float, help="guidance scale; 1 is none. Default: the preset's, none for a generator")
    add("--batch", type=int, default=4, help="pictures per forward")
    add("--out", type=Path, default=Path("samples"))
    return parser.parse_args(argv)


def from_run_folder(args) -> None:
    """Replace --ckpt RUN by what the run exported, a file or base and adapter; take over its model flags."""
    trained = json.loads((args.ckpt / "config.json").read_text()).get("args")
    if trained is None:
        return  # some other program's folder
    folder, args.model, base = args.ckpt, trained["model"], Path(trained["ckpt"]) if trained["ckpt"] else None
    if base and PRESETS[args.model].frames:
        row = PRESETS[args.model]
        for flag in networks.COGVIDEOX_PARTS:
            if trained[flag] in (None, row.tokenizers):
                trained[flag] = networks.beside_denoiser(base, row, flag)
    if base and not trained["text_ckpt"] and (base.parent / "text_encoders").is_dir():
        trained["text_ckpt"] = base.parent  # where training found them
    args.text_ckpt = args.text_ckpt or trained["text_ckpt"] and Path(trained["text_ckpt"])
    vae = trained.get("vae_ckpt")
    args.vae_ckpt = args.vae_ckpt or vae and Path(vae)
    args.tokenizers, args.size = args.tokenizers or trained["tokenizers"], args.size or trained["size"]
    args.frames = args.frames or trained.get("frames")
    args.no_t5 = args.no_t5 or trained["no_t5"]
    if (folder / "generator.safetensors").exists():
        args.ckpt = folder / "generator.safetensors"
    elif (folder / "generator_lora.safetensors").exists():
        args.lora = folder / "generator_lora.safetensors"
        args.ckpt = base
    else:
        raise InputError(f"{folder} has no exported generator yet: let the run end, "
                         "or continue it with --resume")


def exported(args) -> dict[str, str]:
    """What an exported generator or adapter says of itself: dmdx.model, dmdx.steps, dmdx.predicts, ..."""
    files = [path for path in (args.ckpt, args.lora) if path and path.is_file()]
    return {key: value for path in files for key, value in open_tensors(path).metadata.items()
            if key.startswith("dmdx.")}


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    if args.ckpt and (args.ckpt / "config.json").exists():
        from_run_folder(args)
    own = exported(args)
    args.model = args.model or own.get("dmdx.model", "tiny-sd3")
    args.null_prompt = args.null_prompt or own.get("dmdx.null_prompt")
    row = flags.resolve_model(args)
    flags.at_least_1(args, ("count", "steps", "batch"))
    net = networks.load_network(args, row, mesh, device)
    metadata = networks.source(args, row).metadata | own
    if args.lora:
        lora.merge_lora(net, lora.read_lora(open_tensors(args.lora), net), args.lora_scale)
    student = "dmdx.steps" in metadata
    steps = args.steps or int(metadata.get("dmdx.steps", row.teacher_steps))
    shift = float(metadata.get("dmdx.shift", row.shift))
    F = Denoiser(net, metadata.get("dmdx.predicts", row.predicts),
                 metadata.get("dmdx.schedule", row.schedule))
    tn = (generator_times if student else teacher_times)(steps, shift, F.schedule).to(device)
    guidance = float(metadata.get("dmdx.cfg", 1)) if student else row.teacher_cfg
    cfg = args.cfg if args.cfg is not None else guidance

    if args.prompt is not None:
        prompts = [args.prompt]
    else:
        prompts = prompt_set(args.prompts) if args.prompts else list(row.sample_prompts)
    prompts = [prompts[i % len(prompts)] for i in range(args.count or len(prompts))]
    text, vae = networks.load_text(args, row, mesh, device), networks.load_vae(args, row, device)
    shape, shown = networks.latent_shape(args, row), []  # for the grid: as many as a person looks at
    block = args.batch * dist.get_world_size() // args.sequence_parallel
    for first in tqdm(range(0, len(prompts), block), disable=not is_main() or len(prompts) <= block):
        part = prompts[first:first + block]
        images = sampling.generate(F, text, vae, part, tn, shape, args.seed, None if cfg == 1 else cfg,
                                   args.batch, row.decode_batch, args.sequence_parallel,
                                   args.context_parallel, first)
        for i, (image, prompt) in enumerate(zip(images, part) if is_main() else (), first):
            note = dict(prompt=prompt, seed=str(args.seed), index=str(i), steps=str(steps), cfg=f"{cfg:g}",
                        model=args.model)
            if row.frames:
                save_mp4(args.out / f"{i:03d}.mp4", [picture(frame, 128) for frame in image], row.fps, note)
            else:
                save_png(args.out / f"{i:03d}.png", image, note)
        shown += images[:(16 if row.frames else 64) - len(shown)]
        any_rank(False)  # the others wait for the writing on gloo, which is more patient than nccl
    if is_main():
        save_grid(args.out / "grid.png", torch.stack(shown), columns=4, fps=row.fps)
        if row.frames:
            save_grid(args.out / "grid.png", film_strip(torch.stack(shown)), columns=6)
    kind = "videos" if row.frames else "pictures"
    print0(f"{len(prompts)} {kind}, {steps} steps, guidance {cfg:g}: {args.out / 'grid.png'}")


if __name__ == "__main__":
    flags.entry("sample.py", parse_args, main)
