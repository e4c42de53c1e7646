"""Which values the flags of the scripts take, the preset's for those left out, and how a script ends."""
import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from models.checkpoint import InputError
from models.data import digest, read_prompts
from models.job.families import FAMILIES, Family
from models.job.folder import note_old_export
from models.job.networks import init_file
from models.job.notes import export_notes
from models.parallel import barrier
from models.parse import short
from models.presets import PRESETS, Preset
from models.progress import drop_closed_streams, end_bars, outlive_full_logs
from models.saving import WriteError
from models.sequence import check_heads

# What a user can mend: a disk that is full or read-only, what must not be written, a name that no file can have.
MENDABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
            errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE,
            errno.ESTALE, errno.EPIPE)
COUNT, SHARE, RATE, RANK, SCALE = (1, 10 ** 8), (0, 1), (0, 10), (0, 1024), (-1000, 1000)
# Flag -> the smallest and the largest value that anybody could mean.
LIMITS = {
    "batch": COUNT, "batch_size": (1, 10 ** 6), "cfg": (0, 1000), "context_parallel": COUNT, "count": COUNT,
    "dt": (0.001, 0.999), "ema": (0, 0.99999), "evaluate": (0, 10 ** 6), "evaluate_every": (0, 10 ** 8),
    "fake_lora": RANK, "frames": (0, 10 ** 4), "frames_sdm": COUNT,
    "generator_cfg_offset": SCALE, "lambdas": (-10 ** 6, 10 ** 6), "lora_rank": RANK, "lora_scale": SCALE,
    "lr_decay": SHARE, "lr_motion": RATE, "lr_psi": RATE, "lr_tau": RATE, "lr_theta": RATE, "max_iter": COUNT,
    "micro_batch": COUNT, "mps_threshold": SHARE, "profile": COUNT, "r1": (0, 10 ** 6), "sample_every": COUNT,
    "save_every": COUNT, "seed": (0, 2 ** 63 - 1),
    "sequence_parallel": COUNT, "shard_size": COUNT, "shift": (0.01, 100), "size": (1, 10 ** 5),
    "steps": (1, 1000), "stride": COUNT, "times": (0.001, 1), "ttur": COUNT, "warmup": COUNT, "workers": (1, 1000),
}


def fill(args: argparse.Namespace, preset: Preset, names: tuple[str, ...] = Preset._fields) -> None:
    """The preset's values for those flags of these names that are left out."""
    for name in names:
        if getattr(args, name, 0) is None:
            setattr(args, name, getattr(preset, name))


def resolve_model(args: argparse.Namespace) -> Preset:
    """The model's preset, which fills in absent flags. Raises InputError for a size, a number of frames or of
    sequence-parallel ranks that the model cannot take."""
    preset = PRESETS[args.model]
    family = FAMILIES[preset.family]
    check_numbers(args)
    for name, absent in (("no_t5", (False,)), ("motion_ckpt", (None,)),
                         ("sequence_parallel", (1,)), ("context_parallel", (None, 1))):
        value = getattr(args, name)
        if value not in absent and name not in family.flags:
            given = f"--{name.replace('_', '-')}" + f" {value}" * (value is not True)
            raise InputError(f"{given}: not for {args.model}; expected none")
    if args.null_prompt not in (None, *family.null_prompts):
        raise InputError(f"--null-prompt {args.null_prompt}: not for {args.model}; "
                         f"expected {' or '.join(family.null_prompts) or 'none'}")
    check_frames(args, preset, family)
    fill(args, preset, ("ckpt", "tokenizers", "size", "frames"))
    args.null_prompt = args.null_prompt or next(iter(family.null_prompts), None)
    if args.context_parallel is None:
        args.context_parallel = args.sequence_parallel if "context_parallel" in family.flags else 1
    if args.sequence_parallel % args.context_parallel:
        raise InputError(f"--context-parallel {args.context_parallel}: expected a divisor of "
                         f"--sequence-parallel {args.sequence_parallel}, whose ranks hold the same video")
    if "sequence_parallel" in family.flags:
        check_heads(preset.config["heads"], args.sequence_parallel)
    if dist.get_world_size() % args.sequence_parallel:
        raise InputError(f"--sequence-parallel {args.sequence_parallel} does not divide the "
                         f"{dist.get_world_size()} processes")
    args.precision = args.precision or ("bf16" if torch.cuda.is_available() else "fp32")
    multiple, largest = family.sides(preset)
    if any(side % multiple or not multiple <= side <= (largest or side) for side in args.size):
        raise InputError(f"--size {args.size[0]} {args.size[1]}: {args.model} takes multiples of {multiple}"
                         + f" up to {largest}" * (largest is not None))
    return preset._replace(shift=args.shift or preset.shift) if "shift" in args else preset


def check_frames(args: argparse.Namespace, preset: Preset, family: Family) -> None:
    if args.frames is None or not (args.frames or family.frame_step):
        return
    if not family.frame_step:
        raise InputError(f"--frames {args.frames}: {args.model} makes images; expected no --frames")
    if family.max_frames and not 1 <= args.frames <= family.max_frames:
        raise InputError(f"--frames {args.frames}: {args.model} takes 1 to {family.max_frames} frames; its own "
                         f"are {preset.frames}")
    if args.frames < 1 or (args.frames - 1) % family.frame_step:
        works = [family.frame_step * k + 1 for k in (1, 2, 3)]
        raise InputError(f"--frames {args.frames}: {args.model} takes {family.frame_step} k + 1 frames: 1, "
                         f"{', '.join(map(str, works))}, ...; its own are {preset.frames}")


def check_numbers(args: argparse.Namespace) -> None:
    """Raises InputError for a number that is not finite or outside of LIMITS, and for a range the wrong way
    round."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list | tuple) else [value]
        numbers = [v for v in values if isinstance(v, int | float)]
        least, most = LIMITS.get(name, (-math.inf, math.inf))
        words = [f"{v:g}" if isinstance(v, float) else str(v) for v in values]
        given = f"--{name.replace('_', '-')} {' '.join(words)}"
        most, least = min(most, 2 ** 63 - 1), max(least, -2 ** 63)
        if any(v != v or v > most for v in numbers):
            limit = f", at most {most:g}" * (name in LIMITS)
            raise InputError(f"{given}: expected a finite number{limit}")
        if any(v < least for v in numbers):
            raise InputError(f"{given}: expected at least {least:g}")
        if name == "cfg" and numbers != sorted(numbers):
            raise InputError(f"{given}: expected the lower scale first")


def resolve(args: argparse.Namespace, adp: bool = False) -> Preset:
    """`resolve_model` and the batch of a training run; `adp` takes the preset's values for the pre-training.
    Raises InputError for what cannot be cut evenly."""
    preset = resolve_model(args)
    if args.random_weights and args.ckpt != preset.ckpt:
        raise InputError(f"--random-weights --ckpt {args.ckpt}: expected one of the two")
    if adp:
        preset = preset._replace(lr_theta=preset.adp_lr_theta, lr_tau=preset.adp_lr_tau,
                                 max_iter=preset.adp_max_iter, lora_rank=0)
    # Not motion_ckpt: `open_animatediff` takes the preset's where none is given.
    fill(args, preset, tuple(name for name in Preset._fields if name != "motion_ckpt"))
    world = dist.get_world_size() // args.sequence_parallel  # cuts of the batch
    args.micro_batch = min(args.micro_batch, max(1, args.batch_size // world))
    if args.profile and args.resume:
        raise InputError(f"--profile {args.profile} --resume: expected a profile from the first update on, "
                         "without --resume")
    args.max_iter = args.profile or args.max_iter
    if args.offload_activations and args.no_checkpointing:
        raise InputError(f"--offload-activations: {args.model} runs with --no-checkpointing, by its preset or the "
                         "flag; expected checkpointing, of which it moves what is kept")
    if getattr(args, "lora_rank", 0) and args.export_dtype != "fp32":
        raise InputError(f"--export-dtype {args.export_dtype}: adapters are exported in float32; "
                         "expected --lora-rank 0")
    init = init_file(args)
    predicts = export_notes(init).get("dmdx.predicts") if init else "velocity"
    if init and args.init.is_dir():
        note_old_export(args.init)
    if adp and predicts != "velocity":
        raise InputError(f"--init {args.init}: a generator that predicts {predicts}; expected a run of adp.py")
    procedural = bool(preset.data)
    if procedural and args.evaluate == 1:
        raise InputError(f"--evaluate {args.evaluate}: expected 0 or at least 2")
    if args.evaluate_every and not args.evaluate:
        raise InputError(f"--evaluate-every {args.evaluate_every} --evaluate {args.evaluate}: expected 0 or "
                         "more updates, and samples to evaluate")
    usual = ["shapes" if procedural else "clip"]
    if args.evaluate_metrics not in (None, usual) and not args.evaluate_every:
        raise InputError(f"--evaluate-metrics {' '.join(args.evaluate_metrics)}: expected --evaluate-every N too, "
                         "which asks for their figures")
    args.evaluate_metrics = args.evaluate_metrics or usual
    if args.evaluate_every and "shapes" in args.evaluate_metrics and not exact(args, preset):
        raise InputError(f"--evaluate-metrics shapes: for the tiny models at their own size; {args.model} "
                         "takes clip, pickscore, hpsv2, mps")
    if args.batch_size % (world * args.micro_batch):
        groups = f" groups of {args.sequence_parallel}" * (args.sequence_parallel > 1)
        raise InputError(f"--batch-size {args.batch_size} is no multiple of {world}{groups} processes "
                         f"x --micro-batch {args.micro_batch}")
    return preset


def exact(args: argparse.Namespace, preset: Preset) -> bool:
    """Are these samples of procedural data at the one size at which their evaluator reads them exactly?"""
    return bool(preset.data) and (tuple(args.size), args.frames) == (preset.size, preset.frames)


def read_training_prompts(args: argparse.Namespace, preset: Preset) -> list[str]:
    if args.prompts is None:
        weights = f", and --ckpt {preset.file} or access to {preset.repo} on the hub (HF_TOKEN)"
        raise InputError(f"--model {args.model} needs --prompts FILE (.txt, .jsonl, .csv or .tsv)"
                         + weights * (args.ckpt is None))
    prompts = read_prompts(args.prompts)
    args.prompts_digest = digest(prompts)  # config.json keeps it, and --resume compares it
    return prompts


def entry(script: str, main: Callable, args: argparse.Namespace) -> None:
    """Run the script of file `script`: what the user can mend is one sentence on stderr and exit code 2."""
    code = 2
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name need not be UTF-8
    outlive_full_logs()
    for name, value in vars(args).items():  # a shell leaves the ~ of --ckpt=~/file as it is
        if isinstance(value, Path) or name in ("prompts", "tokenizers", "resume") and isinstance(value, str):
            setattr(args, name, type(value)(os.path.expanduser(value)))
        elif isinstance(value, list) and value and isinstance(value[0], Path):
            setattr(args, name, [Path(os.path.expanduser(path)) for path in value])
    try:
        main(args)
        message = None
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    except (InputError, WriteError) as error:
        message = "could not write " * isinstance(error, WriteError) + str(error)
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        message = f"{short(error.filename or 'could not write')}: {error.strerror}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        message = (f"out of memory ({short(error)}); expected smaller samples or batches, --offload, an adapter or "
                   "more memory, as README's table of GPUs has it")
    if message is not None:
        drop_closed_streams()
        end_bars()
        if sys.stdout:  # None where it was closed
            sys.stdout.flush()
        print(f"{Path(script).name}: {message}", file=sys.stderr, flush=True)
        os._exit(code)  # other ranks may be waiting in a collective: an orderly exit would wait for them
    if dist.is_initialized():
        barrier()  # the others wait for rank 0's last files
        dist.destroy_process_group()
