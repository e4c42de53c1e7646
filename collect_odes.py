"""ODE pairs of a teacher for ADP (Sec. 4.2): noise x_T and the x_0 that its guided PF-ODE makes of it.

    python collect_odes.py                         # the embedded teacher
    torchrun --nproc_per_node 8 collect_odes.py --model sdxl --prompts FILE --count 50000
    python collect_odes.py --model sdxl --verify   # is every shard there, as it was written?

Writes OUT/pairs_FIRST-LAST.safetensors and OUT/manifest.json. Pair i depends on the settings and on (seed, i)
alone, not on the number of ranks. An interrupted collection goes on when the same command is run again, a
finished one when --count is larger; shards that --verify found damaged are made again.
"""
from pathlib import Path

from models.job import parsers


def parse_args(argv=None):
    parser = parsers.model_parser(__file__, __doc__)
    parser.set_defaults(model="tiny-sdxl")
    add = parser.add_argument_group("pairs").add_argument
    add("--prompts", type=Path, nargs="+",
        help=".txt, .jsonl, .csv, .tsv or .json; in their order, again and again")
    add("--count", type=int, help="pairs in all; default: the preset's")
    add("--cfg", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guidance scale, uniform per pair")
    add("--steps", type=int, help="of the ODE; default: the teacher's full steps")
    add("--shift", type=float, help="of the ODE's times; default: the preset's")
    add("--out", type=Path, help="default runs/odes-MODEL")
    add("--batch", type=int, help="pairs per forward on one rank; default: twice the preset's micro-batch")
    add("--shard-size", type=int,
        help="pairs per file: what an interruption costs at most; default 512, of videos 16")
    add("--dtype", choices=parsers.PRECISIONS, default="bf16", help="of the stored latents")
    add("--verify", action="store_true", help="check every byte in --out and make nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

import json
import math
import shutil

import torch
import torch.distributed as dist
from torch import Tensor

from models import data, shards
from models.job import flags, networks
from models.checkpoint import InputError
from models.diffusion import Denoiser, solve, teacher_times
from models.job.folder import check_out, hold
from models.job.networks import DTYPES
from models.job.notes import check_teacher
from models.job.sampling import note_overlong
from models.parallel import barrier, init_distributed, is_main, print0, share_of_rank
from models.presets import Preset
from models.progress import bar


def settings(args, preset: Preset) -> dict:
    """What all pairs of a folder have in common, as it comes back from JSON."""
    prompts = args.prompts if isinstance(args.prompts, list) else [args.prompts]  # the preset's
    files = [shards.sha256(path) for path in prompts]
    same = dict(model=args.model, size=args.size, latent_shape=networks.latent_shape(args, preset),
                seed=args.seed, steps=args.steps, schedule=preset.schedule, shift=preset.shift, cfg=args.cfg,
                precision=args.precision, dtype=args.dtype, shard_size=args.shard_size,
                prompts=files[0] if len(files) == 1 else files, **networks.teacher_files(args, preset))
    if preset.frames:
        same["frames"] = args.frames
    return json.loads(json.dumps(same))


def plan(args, same: dict) -> tuple[dict, list[tuple[int, int]]]:
    """(manifest with the shards that can stay, (first index, count) of each to make). Raises InputError for
    other settings and when the disk has no room."""
    manifest, todo = shards.resume_shards(args.out, "pairs", same, args.count, args.shard_size)
    left = sum(n for _, n in todo)
    need = left * 2 * math.prod(same["latent_shape"]) * DTYPES[args.dtype].itemsize / 1e9
    exists = next(path for path in (args.out.resolve(), *args.out.resolve().parents) if path.exists())
    free = shutil.disk_usage(exists).free / 1e9
    if need > free:
        raise InputError(f"{args.out}: {left} pairs need {need:.3g} GB, and {free:.3g} GB are free")
    print0(f"{args.out}: {args.count} pairs of {args.model}, {args.steps} steps, guidance {args.cfg[0]:g} to "
           f"{args.cfg[1]:g}; {left} left, {need:.3g} GB of {free:.3g} GB free")
    return manifest, todo


@torch.no_grad()
def solve_shard(F_phi: Denoiser, text, c_null: tuple, tn: Tensor, x_T: Tensor, w: Tensor, prompts: list[str],
                batch: int, dtype: torch.dtype, progress, sequence: int) -> Tensor | None:
    """x_0 (n ...) in `dtype` on rank 0 from latents x_T (n ...), w (n,) and n prompts. The ranks share the
    work; each `sequence` neighbours have the same samples."""
    n, before, world = len(x_T), progress.n, dist.get_world_size() // sequence
    mine, x_0 = share_of_rank(n, sequence), []
    for start in range(0, len(mine), batch):
        places = mine[start:start + batch]
        c = text.encode([prompts[i] for i in places])
        x = solve(F_phi, x_T[places].to(tn.device), tn, c, c_null, w[places].to(tn.device))
        x_0.append(x.to(dtype).cpu())
        progress.update(before + min(n, world * (start + batch)) - progress.n)
    x_0 = torch.cat(x_0).view(torch.uint8)  # gloo does not know every dtype
    gathered = [torch.empty_like(x_0) for _ in range(dist.get_world_size())] if is_main() else None
    dist.gather(x_0, gathered)
    return torch.cat(gathered[::sequence])[:n].view(dtype) if is_main() else None


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    args.out = args.out or Path("runs") / f"odes-{args.model}"
    if args.verify:
        return shards.verify_shards(args.out, "pairs") if is_main() else None
    preset = flags.resolve_model(args)
    check_out(args.out)
    flags.fill(args, preset, ("prompts", "cfg"))
    for name, default in (("count", preset.pair_count), ("steps", preset.teacher_steps),
                          ("batch", 2 * preset.micro_batch), ("shard_size", 16 if preset.frames else 512)):
        setattr(args, name, default if getattr(args, name) is None else getattr(args, name))
    (low, high), dtype = args.cfg, DTYPES[args.dtype]
    if args.prompts is None:
        raise InputError(f"--model {args.model} needs --prompts FILE (.txt, .jsonl, .csv or .tsv)")
    prompts = data.read_prompts(args.prompts)
    check_teacher(networks.open_denoiser(args, preset))
    same = settings(args, preset)
    new = not args.out.exists()
    if is_main() and not new:  # before the manifest is read: another process may be adding to it
        hold(args.out)
    barrier()
    manifest, todo = plan(args, same)
    if todo:
        print0(f"loading {args.model}")
        F_phi = Denoiser(networks.load_network(args, preset, mesh, device), preset.predicts, preset.schedule)
        text = networks.load_text(args, preset, mesh, device)
        note_overlong(text, prompts)
        tn, c_null = teacher_times(args.steps, preset.shift, preset.schedule).to(device), text.unconditional()
    barrier()  # every rank has read the folder before rank 0 writes there
    if is_main():
        hold(args.out)
        if new and (args.out / "manifest.json").exists():
            raise InputError(f"{args.out}: another process began to fill it; run this command again")
        shards.write_manifest(args.out, manifest)
        shards.sweep_shards(args.out, manifest)
    progress = bar(total=args.count, initial=args.count - sum(n for _, n in todo), disable=not is_main(),
                   unit="pair")
    for first, n in todo:
        indices = range(first, first + n)
        x_T = data.noise(tuple(same["latent_shape"]), args.seed, 0, "x_T", indices)
        w = low + (high - low) * data.uniform(args.seed, 0, "w", indices)
        captions = [prompts[i % len(prompts)] for i in indices]
        x_0 = solve_shard(F_phi, text, c_null, tn, x_T, w, captions, args.batch, dtype, progress,
                          args.sequence_parallel)
        if is_main():
            bad = [i for i, x in zip(indices, x_0) if not x.isfinite().all()]
            if bad:
                raise InputError(f"x_0 of pair {bad[0]} is not finite; pass --precision fp32 or --dtype bf16")
            entry = shards.save_shard(args.out, "pairs", first, dict(x_T=x_T.to(dtype), x_0=x_0, w=w), captions)
            shards.add_shard(args.out, manifest, entry)
            shards.sweep_shards(args.out, manifest)
    progress.close()
    print0(shards.Pairs(args.out, manifest))


if __name__ == "__main__":
    flags.entry(__file__, main, args)
