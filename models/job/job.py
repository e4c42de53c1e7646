"""What training scripts do around their algorithm: batches, log, save, resume, samples, closing comparison.

Nothing here touches a loss. A script calls, in this order: `flags.training_parser`, `flags.resolve`, `Job`,
`networks.load_network`, `job.start`, and in its loop `job.begin`, `job.conditions`, `log.add`, `log.update`,
`job.end`; `job.finish` exports and compares.
"""
import argparse
import importlib.util
import json
import math
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

from models.eval import moving_shapes, shapes
from models.checkpoint import InputError
from models.data import append_jsonl, film_strip, noise, prompt_index, save_grid, save_rows, truncate_jsonl
from models.diffusion import Denoiser, generator_times, teacher_times
from models.job.flags import read_training_prompts, run_folder
from models.eval.metrics import quick_scores
from models.job.networks import (
    condition_shapes,
    export,
    latent_shape,
    load_text,
    load_vae,
    open_denoiser,
    student_cfg,
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
from models.presets import Preset
from models.job.sampling import generate
from models.eval.scores import load_scorer
from models.text import Cond

MAX_BAD = 10  # non-finite iterations in a row before a run stops


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
        ranks, M = args.sequence_parallel, args.micro_batch  # as many ranks share their samples' tokens
        rank, world = dist.get_rank() // ranks, dist.get_world_size() // ranks
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
            kinds = [kind for kind in args.evaluate_metrics if kind != "shapes" and args.evaluate_every]
            self.scorers = {kind: load_scorer(kind, device=device) for kind in kinds if is_main()}

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
            truncate_jsonl(self.out / "evaluation.jsonl", "gen_iter", self.gen_iter)
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
                        2 * self.args.micro_batch, self.row.decode_batch, self.args.sequence_parallel,
                        self.args.context_parallel)

    def look(self, G_theta: Denoiser, tn: Tensor) -> None:
        """samples/XXXXXXXX.png or .mp4 of the generator every --sample-every updates, and a line of figures
        in evaluation.jsonl every --evaluate-every: of the same prompts and noise each time."""
        args, row = self.args, self.row
        if self.text is not None and self.gen_iter % args.sample_every == 0:
            images = self.sample(G_theta, list(row.sample_prompts), tn, student_cfg(args))
            if is_main():
                save_grid(self.out / "samples" / f"{self.gen_iter:08d}.png", images, 4, fps=row.fps)

        if self.text is not None and args.evaluate_every and self.gen_iter % args.evaluate_every == 0:
            prompts = self.known_prompts()
            images = self.sample(G_theta, prompts, tn, student_cfg(args))
            if is_main():
                figures = quick_scores(images, prompts, args.evaluate_metrics, self.scorers)
                append_jsonl(self.out / "evaluation.jsonl", dict(gen_iter=self.gen_iter) | figures)
                self.bar.write(f"{self.gen_iter}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                for name, value in figures.items() if self.board else ():
                    self.board.add_scalar(name, value, self.global_iter)
            any_rank(False)  # the others wait for the scores on gloo, which is more patient than nccl

    def known_prompts(self) -> list[str]:
        """--evaluate prompts: those whose answers are known, or the preset's, again and again."""
        count, few = self.args.evaluate, self.row.sample_prompts
        if self.row.procedural:
            return (moving_shapes if self.row.frames else shapes).evaluation_prompts(count)
        return [few[i % len(few)] for i in range(count)]

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
        """Teacher at full steps, teacher and student at N steps, from the same noise: compare.png, of videos
        compare.mp4 too, and where the data are procedural the exact figures in comparison.json."""
        row, args, N, w = self.row, self.args, len(tn) - 1, self.row.teacher_cfg
        exact = row.procedural and (tuple(args.size), args.frames) == (row.size, row.frames)
        prompts = self.known_prompts()
        full = teacher_times(row.teacher_steps, row.shift, row.schedule).to(self.device)
        few = generator_times(N, row.shift, row.schedule).to(self.device)
        lines, figures = [], {}
        for label, F, times, cfg in ((f"teacher, {row.teacher_steps} steps, guidance {w:g}", F_phi, full, w),
                                     (f"teacher, {N} step{'s' * (N > 1)}, guidance {w:g}", F_phi, few, w),
                                     (f"student, {N} step{'s' * (N > 1)}", G_theta, tn,
                                      student_cfg(args))):
            images = self.sample(F, prompts, times, cfg)
            lines.append((label, images[:12]))
            if exact and is_main():
                figures[label] = quick_scores(images, prompts, ["shapes"], {})
        if is_main():
            if row.frames:
                save_grid(self.out / "compare.mp4", torch.cat([clips[:6] for _, clips in lines]),
                          min(6, len(prompts)), fps=row.fps)
                lines = [(label, film_strip(clips[:2])) for label, clips in lines]
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
