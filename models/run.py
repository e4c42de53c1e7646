"""What training scripts do around their algorithm: flags, run folder, networks, batches, log, save, resume.

Nothing here touches a loss. A script calls, in this order: `training_parser`, `resolve`, `Job`,
`load_network`, `job.start`, and in its loop `job.begin`, `job.conditions`, `log.add`, `log.update`,
`job.end`; `job.finish` exports and compares.
"""
import argparse
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from models import shapes
from models.checkpoint import InputError
from models.data import append_jsonl, noise, prompt_index, read_prompts, save_grid, save_rows, truncate_jsonl
from models.diffusion import Denoiser, generator_times, teacher_times
from models.networks import (
    DTYPES,
    condition_shapes,
    export,
    latent_shape,
    load_text,
    load_vae,
    open_denoiser,
    sizes,
)
from models.parallel import (
    any_rank,
    complete_states,
    count_stuck,
    is_main,
    load_state,
    mean_over_ranks,
    print0,
    save_state,
)
from models.presets import PRESETS, Preset
from models.sampling import generate
from models.text import Cond

MAX_BAD = 10  # non-finite iterations in a row before a run stops


# ---- flags and the run folder ------------------------------------------------------------------------------

def model_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of everything that loads a model."""
    add = parser.add_argument
    add("--model", choices=PRESETS, default="tiny-sd3", help="row of models/presets.py")
    add("--ckpt", type=Path, help="original single file; without it the Hugging Face hub is asked")
    add("--text-ckpt", type=Path, help="folder of clip_l, clip_g and t5xxl files, or in diffusers' layout")
    add("--tokenizers", help="folder or hub repository with tokenizer/ and tokenizer_3/")
    add("--no-t5", action="store_true", help="zeros in place of T5's tokens")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels")
    add("--seed", type=int, default=0)
    add("--offload", action="store_true", help="parameters and optimizer state on the CPU (FSDP2 offload)")
    add("--shard-ranks", type=int, help="ranks that share one copy of the networks; default: one node")
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
    add("--profile", type=int, metavar="K", help="K iterations, then seconds, GiB and evaluations per phase")
    return parser


def fill(args: argparse.Namespace, row: Preset, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(args, name, 0) is None:
            setattr(args, name, getattr(row, name))


def resolve_model(args: argparse.Namespace) -> Preset:
    """The preset's row, which fills in absent flags. Raises InputError for a size the model cannot take."""
    row = PRESETS[args.model]
    fill(args, row, ("ckpt", "tokenizers", "size"))
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
    row, world = resolve_model(args), dist.get_world_size()
    if adp:
        row = row._replace(lr_theta=row.adp_lr_theta, lr_tau=row.adp_lr_tau, max_iter=row.adp_max_iter)
    fill(args, row, tuple(name for name in row._fields if name != "pixel_ckpt"))  # which is SAM's alone
    args.micro_batch = min(args.micro_batch, max(1, args.batch_size // world))
    args.max_iter = args.profile or args.max_iter
    if args.init and args.lora_rank:
        raise InputError("--init starts from weights of its own, which no adapter on the teacher's can be: "
                         "expected --lora-rank 0")
    if row.family == "unet" and (getattr(args, "lora_rank", 0) or getattr(args, "fake_lora", 0)):
        raise InputError(f"--model {args.model}: adapters are for the SD3 family; expected --lora-rank 0 "
                         "and no --fake-lora")
    at_least_1(args, ("steps", "max_iter", "batch_size", "micro_batch", "ttur", "save_every", "sample_every"))
    if args.evaluate < 0 or row.procedural and args.evaluate == 1:
        raise InputError(f"--evaluate {args.evaluate}: expected 0 or at least {1 + row.procedural}")
    if args.batch_size % (world * args.micro_batch):
        raise InputError(f"--batch-size {args.batch_size} is no multiple of {world} processes "
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


def count_evaluations(roles: dict[str, Denoiser], counts: dict[str, int]) -> None:
    """Count the samples that each role's network and D_tau's backbone see, recomputation not included."""
    for net in {id(role.net): role.net for role in roles.values()}.values():
        def hook(_, positional, named, net=net):
            owner = [name for name, role in roles.items()
                     if role.net is net and role.lora == named.get("lora", ())]
            counts["D_tau features" if named.get("taps") else owner[0]] += len(positional[0])
        net.register_forward_pre_hook(hook, with_kwargs=True)


def health(history) -> str:
    """One line about the last iterations: what a person would look for in the curves."""
    rows, figures = list(history), ""
    norms = [key for key in rows[-1] if key.startswith("grad_norm_")]
    drift = rows[-1]["x_0_std"] / max(rows[0]["x_0_std"], 1e-12)
    worries = [f"{key.removeprefix('grad_norm_')} has no gradient" for key in norms
               if all(row[key] == 0 for row in rows)]
    if "margin" in rows[-1]:  # there is a discriminator
        margin = sum(sum(row["margin"]) / len(row["margin"]) for row in rows) / len(rows)
        hinge = sum(row["loss_tau"] for row in rows) / len(rows)
        figures = f"margin {margin:+.4f} hinge {hinge:.3f} "
        if len(rows) >= 50:
            worries += ["D cannot tell fake from real"] * (abs(margin) < 1e-4)
            worries += ["D has won: the hinge is at 0"] * (hinge < 0.01)
    if not 0.67 < drift < 1.5:
        worries += [f"x_0's deviation changed {drift:.2f}-fold over {len(rows)} iterations"]
    return (f"{figures}x_0 {rows[-1]['x_0_mean']:+.3f} +- {rows[-1]['x_0_std']:.3f} "
            f"health: {'; '.join(worries or ['good'])}")


# ---- the job -----------------------------------------------------------------------------------------------

class Log:
    """One iteration's scalars: means over the micro-batches and ranks."""

    def __init__(self):
        self.sums, self.row = defaultdict(list), {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[name].append(value.detach())

    def mean(self, name: str) -> Tensor:
        return torch.stack(self.sums[name]).mean(0)

    def update(self, role: str, loss: float, norm: float) -> None:
        self.row |= {f"loss_{role}": loss, f"grad_norm_{role}": norm}

    def close(self, **values) -> None:
        """Take the mean of everything over the ranks; vectors (the margins) stay lists."""
        names = [name for name in self.sums if not name.startswith("loss_")]  # losses are in the row already
        means = [self.mean(name) for name in names]
        flat = iter(mean_over_ranks([v for m in means for v in m.flatten()]) if means else [])
        for name, m in zip(names, means):
            self.row[name] = [next(flat) for _ in m] if m.ndim else next(flat)
        self.row = values | self.row

    def finite(self) -> bool:
        return all(math.isfinite(v) for k, v in self.row.items() if k.startswith(("loss_", "grad_norm_")))


class Job:
    """Run folder, prompts, batch cut, log, state and samples of one training run."""

    def __init__(self, script: str, args: argparse.Namespace, row: Preset, mesh: DeviceMesh,
                 device: torch.device):
        self.args, self.row, self.device = args, row, device
        self.out = run_folder(args, script)
        rank, world, M = dist.get_rank(), dist.get_world_size(), args.micro_batch
        # Global sample indices of this rank's micro-batches. Draws depend on them, not on the cut.
        self.micro_batches = [list(range((k * world + rank) * M, (k * world + rank + 1) * M))
                              for k in range(args.batch_size // (world * M))]
        self.latent_shape = latent_shape(args, row)
        self.gen_iter = self.global_iter = self.bad = self.skipped = 0
        self.history, self.board = deque(maxlen=100), None
        self.seconds, self.gib, self.evaluations = defaultdict(float), defaultdict(float), defaultdict(int)
        self.text = self.vae = None
        if args.random_weights:
            if script == "adp":  # the only one to decode while it trains
                self.vae = load_vae(args, row, device)
            self.c_null = self.random_conditions([0])
        else:
            self.prompts = read_training_prompts(args, row) if hasattr(args, "prompts") else []
            open_denoiser(args, row)  # a wrong file is refused before the text encoders' long download
            self.text, self.vae = load_text(args, row, mesh, device), load_vae(args, row, device)
            self.c_null = self.text.unconditional()

    def random_conditions(self, indices: list[int]) -> Cond:
        """Of the true shapes: --random-weights has no text encoders."""
        context, pooled = (noise(shape, self.args.seed, 0, name, indices).to(self.device)
                           for shape, name in zip(condition_shapes(self.row), Cond._fields))
        return Cond(context, pooled)

    def shuffled(self, indices: list[int], count: int) -> list[int]:
        """Which of `count` prompts or pairs each global sample index gets in this iteration."""
        first = (self.global_iter - 1) * self.args.batch_size
        return [prompt_index(self.args.seed, first + i, count) for i in indices]

    def conditions(self, indices: list[int]) -> Cond:
        """One prompt per global sample index, the same for both updates of an iteration.  # [choice]"""
        if self.text is None:
            return self.random_conditions(indices)
        return self.text.encode([self.prompts[i] for i in self.shuffled(indices, len(self.prompts))])

    def start(self, **roles: tuple[dict[str, nn.Parameter], torch.optim.Optimizer]) -> None:
        """Write config.json, or resume; say what is trained. roles: log name -> (parameters, optimizer)."""
        self.roles, args = roles, self.args
        for role, (params, opt) in roles.items():
            stuck, total = count_stuck(list(params.values()), opt.param_groups[0]["lr"])
            print0(f"{role}: {total / 1e6:.2f} M weights trained, lr {opt.param_groups[0]['lr']:g}; a change "
                   f"of that size is lost to float32 rounding in {100 * stuck / total:.1f} % of them")
        lora_rank = getattr(args, "lora_rank", self.row.lora_rank)
        if bool(lora_rank) != bool(self.row.lora_rank) and args.lr_theta == self.row.lr_theta:
            print0(f"note: --lr-theta {args.lr_theta:g} is the preset's for "
                   f"--lora-rank {self.row.lora_rank}, not for {lora_rank}")
        if args.resume:
            states = complete_states(self.out / "state")
            path = Path(args.resume) if args.resume != "newest" else states[-1] if states else None
            if path is None:
                raise InputError(f"--resume: {self.out} holds no complete state")
            self.say_what_changed(path.resolve().parent.parent)
            progress = load_state(path, roles)
            self.gen_iter, self.global_iter = progress["gen_iter"], progress["global_iter"]
            self.skipped = progress["skipped"]
            print0(f"resumed {path}: generator update {self.gen_iter}")
        if is_main() and not args.profile:
            try:
                unused = not (self.out / "config.json").exists()
                self.out.mkdir(parents=True, exist_ok=bool(args.resume) or unused)
            except FileExistsError:
                raise InputError(f"{self.out}: another run has taken this folder meanwhile; "
                                 "start again") from None
            # What an abandoned branch has left behind goes, as its metrics do.
            for state in complete_states(self.out / "state"):
                if int(state.name[5:]) > self.global_iter:
                    shutil.rmtree(state)
            truncate_jsonl(self.out / "metrics.jsonl", "global_iter", self.global_iter)
            git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                                 text=True).stdout.strip()
            config = dict(args=vars(args), preset=self.row._asdict(), argv=sys.argv, git=git,
                          torch=torch.__version__, world_size=dist.get_world_size())
            (self.out / "config.json").write_text(json.dumps(config, indent=1, default=str))
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.out)
        self.bar = tqdm(total=args.max_iter, initial=self.gen_iter, disable=not is_main(), unit="it",
                        dynamic_ncols=True)
        self.stop = False
        signal.signal(signal.SIGTERM, self._request_stop)

    def say_what_changed(self, started: Path) -> None:
        """A flag forgotten on the command line of --resume would otherwise change the run unnoticed. Raises
        InputError for another --init than that of the run in the folder `started`."""
        if (started / "config.json").exists():
            before = json.loads((started / "config.json").read_text())["args"]
            now = json.loads(json.dumps(vars(self.args), default=str))
            changed = [f"--{name.replace('_', '-')} {now[name]} (was {value})"
                       for name, value in before.items()
                       if name not in ("out", "resume", "max_iter") and now.get(name, value) != value]
            if before.get("init") != now.get("init"):  # the state does not tell what the network predicts
                raise InputError(f"--init {now.get('init')}: expected {before.get('init')}, with which this "
                                 "run was started")
            if changed:
                print0(f"changed since this run was last started: {', '.join(changed)}")

    def _request_stop(self, *_) -> None:
        self.stop = True

    # ---- inside the loop

    def begin(self, global_iter: int) -> Log:
        self.global_iter = global_iter
        self.began = self.lap = time.perf_counter()
        return Log()

    def phase(self, name: str) -> None:
        """Close a phase: --profile keeps its seconds, without the first iteration's, and its peak memory."""
        if self.args.profile:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                self.gib[name] = max(self.gib[name], torch.cuda.max_memory_allocated() / 2 ** 30)
                torch.cuda.reset_peak_memory_stats()
            if self.global_iter > 1 or self.args.profile == 1:
                self.seconds[name] += time.perf_counter() - self.lap
            self.lap = time.perf_counter()

    def end(self, log: Log, gen_iter: int) -> bool:
        """Log, save when due. True: stop now (SIGTERM). InputError after MAX_BAD non-finite ones in a row."""
        args, due = self.args, gen_iter > self.gen_iter
        self.gen_iter = gen_iter
        self.bad = 0 if log.finite() else self.bad + 1
        self.skipped += not log.finite()
        peak = (torch.cuda.max_memory_allocated() if self.device.type == "cuda"
                else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        log.close(global_iter=self.global_iter, gen_iter=gen_iter, skipped=self.skipped,
                  seconds=time.perf_counter() - self.began, gib=peak / 2 ** 30)
        if is_main() and not args.profile:
            append_jsonl(self.out / "metrics.jsonl", log.row)
            for name, value in log.row.items() if self.board else ():
                value = sum(value) / len(value) if isinstance(value, list) else value
                self.board.add_scalar(name, value, self.global_iter)
        if due:
            self.history.append(log.row)
            self.bar.update()
            self.bar.set_postfix_str(" ".join(f"{key} {value:.3f}" for key, value in log.row.items()
                                              if key.startswith("loss_")))
            if gen_iter % 100 == 0 and is_main():
                self.bar.write(f"{gen_iter}: {health(self.history)}")
        stop = any_rank(self.stop) or self.bad >= MAX_BAD
        due = due and (gen_iter % args.save_every == 0 or gen_iter == args.max_iter)
        if not args.profile and (stop or due):
            progress = dict(gen_iter=gen_iter, global_iter=self.global_iter, skipped=self.skipped)
            save_state(self.out / "state", self.global_iter, self.roles, progress)
        if self.bad >= MAX_BAD:
            raise InputError(f"{MAX_BAD} iterations in a row had a non-finite loss or gradient; "
                             f"state saved in {self.out / 'state'}")
        return stop

    def decode(self, x_0: Tensor) -> Tensor:
        """Images (B 3 H W) in [-1, 1] of latents, with gradient; activations are recomputed in backward."""
        parts = x_0.split(self.row.decode_batch)
        return torch.cat([self.vae.decode(part, checkpoint=not self.args.no_checkpointing) for part in parts])

    # ---- pictures, export, closing comparison

    def sample(self, F: Denoiser, prompts: list[str], tn: Tensor, cfg: float | None = None) -> Tensor:
        return generate(F, self.text, self.vae, prompts, tn, self.latent_shape, self.args.seed, cfg,
                        2 * self.args.micro_batch, self.row.decode_batch)

    def sample_grid(self, G_theta: Denoiser, tn: Tensor) -> None:
        """samples/XXXXXXXX.png of the generator every --sample-every updates: same prompts, same noise."""
        if self.text is not None and self.gen_iter % self.args.sample_every == 0:
            images = self.sample(G_theta, list(self.row.sample_prompts), tn)
            if is_main():
                save_grid(self.out / "samples" / f"{self.gen_iter:08d}.png", images, columns=4)

    def finish(self, F_phi: Denoiser, G_theta: Denoiser, tn: Tensor) -> None:
        """Export the generator, then compare teacher and student; or print the profile."""
        self.bar.close()
        if self.args.profile:
            return self.print_profile()
        if self.gen_iter < self.args.max_iter:
            return print0(f"stopped at generator update {self.gen_iter}; "
                          f"continue with --resume --out {self.out}")
        if self.text is None:
            return
        export(self.args, self.row, G_theta, self.out)
        if self.args.evaluate:
            self.compare(F_phi, G_theta, tn)

    def compare(self, F_phi: Denoiser, G_theta: Denoiser, tn: Tensor) -> None:
        """Teacher at full steps, teacher and student at N steps, from the same noise: compare.png, and where
        the data are procedural the exact figures in comparison.json."""
        row, args, N, w = self.row, self.args, len(tn) - 1, self.row.teacher_cfg
        exact = row.procedural and tuple(args.size) == row.size
        prompts = shapes.evaluation_prompts(args.evaluate) if exact else [*row.sample_prompts][:args.evaluate]
        full = teacher_times(row.teacher_steps, row.shift, row.schedule).to(self.device)
        few = generator_times(N, row.shift, row.schedule).to(self.device)
        lines, figures = [], {}
        for label, F, times, cfg in ((f"teacher, {row.teacher_steps} steps, guidance {w:g}", F_phi, full, w),
                                     (f"teacher, {N} step{'s' * (N > 1)}, guidance {w:g}", F_phi, few, w),
                                     (f"student, {N} step{'s' * (N > 1)}", G_theta, tn, None)):
            images = self.sample(F, prompts, times, cfg)
            lines.append((label, images[:12]))
            if exact:
                figures[label] = shapes.evaluate(images, prompts)
        if is_main():
            save_rows(self.out / "compare.png", lines)
            for label, values in figures.items():
                print(f"{label:34}" + "".join(f"  {name} {value:.4f}" for name, value in values.items()))
            if figures:
                (self.out / "comparison.json").write_text(json.dumps(figures, indent=1))
            print(f"pictures: {self.out / 'compare.png'}, generator: {self.out}", flush=True)

    def print_profile(self) -> None:
        iterations = max(1, self.args.profile - 1)
        samples = self.global_iter * sum(map(len, self.micro_batches))
        lines = [(name, seconds / iterations, self.gib.get(name)) for name, seconds in self.seconds.items()]
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        total, peak = sum(self.seconds.values()), max(self.gib.values(), default=None)
        lines.append(("iteration", total / iterations, peak))
        for name, seconds, gib in lines:
            print0(f"{name:14} {seconds:8.3f} s/it" + (f"  peak {gib:6.2f} GiB" if gib else ""))
        print0(f"peak host memory of rank 0: {host:.2f} GiB")
        print0("network evaluations per sample and iteration: "
               + ", ".join(f"{name} {count / samples:.2f}" for name, count in self.evaluations.items()))
