"""Flags of the scripts, the preset's values for those left out, the run folder, and how a script ends."""
import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from models.checkpoint import InputError
from models.data import read_prompts
from models.job.networks import DTYPES, sizes
from models.parallel import check_heads, complete_states
from models.presets import PRESETS, Preset


def model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that loads a model."""
    add = parser.add_argument
    add("--model", choices=PRESETS, default="tiny-sd3", help="row of models/presets.py")
    add("--ckpt", type=Path, help="original single file; without it the Hugging Face hub is asked")
    add("--text-ckpt", type=Path, help="folder of clip_l, clip_g and t5xxl files, or in diffusers' layout; "
        "CogVideoX: folder or file of T5")
    add("--vae-ckpt", type=Path, help="file or folder of the VAE, where it is not in or beside --ckpt")
    add("--tokenizers", help="folder or hub repository with tokenizer/ and tokenizer_3/")
    add("--no-t5", action="store_true", help="zeros in place of T5's tokens")
    add("--null-prompt", choices=("zeros", "empty"),
        help="CogVideoX's unconditional: zeros (default), as it was trained, or the encoded empty prompt")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels")
    add("--frames", type=int, help="of a video: 8 k + 1")
    add("--seed", type=int, default=0)
    add("--offload", action="store_true", help="parameters and optimizer state on the CPU (FSDP2 offload)")
    add("--shard-ranks", type=int, help="ranks that share one copy of the networks; default: one node")
    add("--sequence-parallel", type=int, default=1, metavar="K", help="ranks that share each video's tokens")
    add("--context-parallel", type=int, metavar="K",
        help="ranks that share the decoding of a video's frames; default: those of --sequence-parallel")
    add("--precision", choices=("bf16", "fp32"), help="of the computation; default bf16 on GPU, fp32 on CPU")
    add("--vae-precision", choices=("bf16", "fp32"), default="fp32", help="of the VAE, whose fp16 overflows")
    parser.set_defaults(no_checkpointing=True, random_weights=False, init=None)  # for those who only sample


def training_parser(script: str, doc: str) -> argparse.ArgumentParser:
    """The flags of every training script; None means the preset's value."""
    parser = argparse.ArgumentParser(prog=f"{script}.py", description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    model_flags(parser)
    add = parser.add_argument
    add("--out", type=Path, help="run folder; default runs/SCRIPT-MODEL-NNN")
    add("--resume", nargs="?", const="newest", metavar="STATE",
        help="continue --out (or the newest run) from its newest complete state")
    add("--max-iter", type=int, help="generator updates")
    add("--batch-size", type=int, help="samples per update, over all ranks and accumulation steps")
    add("--micro-batch", type=int, help="samples per forward on one rank")
    add("--no-checkpointing", action="store_true", default=None, help="do not compute activations twice")
    add("--random-weights", action="store_true", help="full-size networks, no checkpoint or text encoders")
    add("--export-dtype", choices=DTYPES, default="fp32", help="of the exported generator")
    add("--save-every", type=int, default=500, metavar="N", help="generator updates")
    add("--sample-every", type=int, default=500, metavar="N", help="generator updates")
    add("--evaluate", type=int, metavar="N", help="samples of each row of the closing comparison; 0: none")
    add("--evaluate-every", type=int, default=0, metavar="N",
        help="generator updates between figures of --evaluate samples in evaluation.jsonl; 0: never")
    add("--evaluate-metrics", nargs="+", choices=("shapes", "clip", "pickscore", "hpsv2", "mps"),
        metavar="METRIC", help="default: shapes for the tiny models, clip for others (evaluate.py)")
    add("--profile", type=int, metavar="K", help="K iterations, then seconds, GiB and evaluations per phase")
    return parser


def fill(args: argparse.Namespace, row: Preset, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(args, name, 0) is None:
            setattr(args, name, getattr(row, name))


def resolve_model(args: argparse.Namespace) -> Preset:
    """The preset's row, which fills in absent flags. Raises InputError for a size, a number of frames or of
    sequence-parallel ranks that the model cannot take."""
    row = PRESETS[args.model]
    if not row.frames and args.frames:
        raise InputError(f"--frames {args.frames}: {args.model} makes images; expected no --frames")
    fill(args, row, ("ckpt", "tokenizers", "size", "frames"))
    if row.frames and (args.frames < 1 or args.frames % (2 * row.vae_frames) != 1):
        works = [2 * row.vae_frames * k + 1 for k in (1, 2, 3)]
        raise InputError(f"--frames {args.frames}: {args.model} takes {2 * row.vae_frames} k + 1 frames: 1, "
                         f"{', '.join(map(str, works))}, ...; its own are {row.frames}")
    if args.no_t5 and row.frames or args.null_prompt and not row.frames:
        flag = "--no-t5" if args.no_t5 else f"--null-prompt {args.null_prompt}"
        raise InputError(f"{flag}: not for {args.model}; expected none")
    args.null_prompt = args.null_prompt or ("zeros" if row.frames else None)
    if args.context_parallel is None:
        args.context_parallel = args.sequence_parallel
    at_least_1(args, ("sequence_parallel", "context_parallel"))
    if max(args.sequence_parallel, args.context_parallel) > 1 and not row.frames:
        raise InputError(f"--sequence-parallel, --context-parallel: expected 1 for images, {args.model}'s")
    if args.sequence_parallel % args.context_parallel:
        raise InputError(f"--context-parallel {args.context_parallel}: expected a divisor of "
                         f"--sequence-parallel {args.sequence_parallel}, whose ranks hold the same video")
    if row.frames:
        check_heads(row.config["heads"], args.sequence_parallel)
    if dist.get_world_size() % args.sequence_parallel:
        raise InputError(f"--sequence-parallel {args.sequence_parallel} does not divide the "
                         f"{dist.get_world_size()} processes")
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    multiple, largest = sizes(row)
    if any(side % multiple or not multiple <= side <= (largest or side) for side in args.size):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: {args.model} takes multiples of {multiple}"
                         + f" up to {largest}" * (largest is not None))
    return row


def at_least_1(args: argparse.Namespace, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: expected at least 1")


def resolve(args: argparse.Namespace, adp: bool = False) -> Preset:
    """`resolve_model` and the batch of a training run; `adp` takes the row's values for the pre-training.
    Raises InputError for what cannot be cut evenly."""
    row = resolve_model(args)
    world = dist.get_world_size() // args.sequence_parallel  # cuts of the batch
    if adp:
        row = row._replace(lr_theta=row.adp_lr_theta, lr_tau=row.adp_lr_tau, max_iter=row.adp_max_iter)
    fill(args, row, tuple(name for name in row._fields if name != "pixel_ckpt"))  # which is SAM's alone
    args.micro_batch = min(args.micro_batch, max(1, args.batch_size // world))
    args.max_iter = args.profile or args.max_iter
    if args.init and args.lora_rank:
        raise InputError("--init starts from weights of its own, which no adapter on the teacher's can be: "
                         "expected --lora-rank 0")
    if row.family != "mmdit" and (getattr(args, "lora_rank", 0) or getattr(args, "fake_lora", 0)):
        raise InputError(f"--model {args.model}: adapters are for the SD3 family; expected --lora-rank 0 "
                         "and no --fake-lora")
    at_least_1(args, ("steps", "max_iter", "batch_size", "micro_batch", "ttur", "save_every", "sample_every"))
    if args.evaluate < 0 or row.procedural and args.evaluate == 1:
        raise InputError(f"--evaluate {args.evaluate}: expected 0 or at least {1 + row.procedural}")
    if args.evaluate_every < 0 or args.evaluate_every and not args.evaluate:
        raise InputError(f"--evaluate-every {args.evaluate_every} --evaluate {args.evaluate}: expected 0 or "
                         "more updates, and samples to evaluate")
    args.evaluate_metrics = args.evaluate_metrics or ["shapes" if row.procedural else "clip"]
    own = (tuple(args.size), args.frames) == (row.size, row.frames)
    if args.evaluate_every and "shapes" in args.evaluate_metrics and not (row.procedural and own):
        raise InputError(f"--evaluate-metrics shapes: for the tiny models at their own size; {args.model} "
                         "takes clip, pickscore, hpsv2, mps")
    if args.batch_size % (world * args.micro_batch):
        groups = f" groups of {args.sequence_parallel}" * (args.sequence_parallel > 1)
        raise InputError(f"--batch-size {args.batch_size} is no multiple of {world}{groups} processes "
                         f"x --micro-batch {args.micro_batch}")
    return row


def read_training_prompts(args: argparse.Namespace, row: Preset) -> list[str]:
    if args.prompts is None:
        weights = f", and --ckpt {row.file} or access to {row.repo} on the hub (HF_TOKEN)"
        raise InputError(f"--model {args.model} needs --prompts FILE (.txt, .jsonl, .csv or .tsv)"
                         + weights * (args.ckpt is None))
    return read_prompts(args.prompts)


def run_folder(args: argparse.Namespace, script: str) -> Path:
    """This run's folder, same on all ranks: --out, that of the state to resume, or the next free number."""
    runs = sorted(Path("runs").glob(f"{script}-{args.model}-[0-9][0-9][0-9]"))
    if args.out is not None:
        if (args.out / "config.json").exists() and not args.resume:
            raise InputError(f"{args.out} already holds a run: pass --resume to continue it or another --out")
    elif args.resume == "newest":
        runs = [run for run in runs if complete_states(run / "state")]
        if not runs:
            raise InputError(f"--resume: no runs/{script}-{args.model}-NNN holds a complete state; "
                             "pass --out")
        args.out = runs[-1]
    elif args.resume:
        args.out = Path(args.resume).resolve().parent.parent
        if not (args.out / "config.json").exists():
            raise InputError(f"--resume {args.resume}: not inside a run folder; "
                             "pass the folder to continue in as --out")
    else:
        args.out = Path("runs") / f"{script}-{args.model}-{int(runs[-1].name[-3:]) + 1 if runs else 0:03d}"
    holder = [args.out]
    dist.broadcast_object_list(holder)
    return holder[0]


def entry(script: str, parse_args, main) -> None:
    """Run a script: what the user can mend is one sentence on stderr and exit code 2."""
    args = parse_args()
    try:
        main(args)
    except InputError as error:
        print(f"{script}: {error}", file=sys.stderr, flush=True)
        os._exit(2)  # other ranks may be waiting in a collective: an orderly exit would wait for them
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
