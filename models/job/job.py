"""What training scripts do around their algorithm: batches, log, save, resume, samples, closing comparison.

No loss is computed here. A script calls, in this order: `parsers.training_parser`, `flags.resolve`, `Job`,
`networks.load_network`, `job.start`, `job.watch`, and in its loop `job.begin`, `job.conditions`, `job.noise`,
`log.add`, `log.update`, `job.phase`, `job.end`, `job.look`; `job.finish` exports and compares. Scorers and
evaluators are imported where they are used: a training run seldom needs them, and they take seconds.
"""
import argparse
import importlib.util
import json
import resource
import signal
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from models import data
from models.checkpoint import InputError
from models.diffusion import Denoiser, generator_times, teacher_times
from models.job.families import FAMILIES
from models.job.flags import exact, read_training_prompts
from models.job.folder import check_unused, hold, noted, open_folder, resume, run_folder, writing
from models.job.networks import export, latent_shape, load_vae, open_denoiser, student_cfg, teacher_files
from models.job.log import Log, health
from models.job.notes import check_teacher
from models.job.sampling import NotFinite, deviations, generate
from models.job.text_cache import open_text
from models.parallel import any_rank, averaged, barrier, count_stuck, is_main, of_all, print0
from models.pictures import film_strip, save_grid, save_rows
from models.presets import Preset
from models.progress import bar, drop_closed_streams, tell
from models.state import save_state
from models.text import Cond

MAX_BAD = 10  # non-finite iterations in a row before a run stops
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # of schedulers, Ctrl-C, a closed terminal


class Job:
    """Run folder, prompts, micro-batches, log, state and samples of a run. `prompts`: the data's, for --cache-text."""

    def __init__(self, script: str, args: argparse.Namespace, preset: Preset, mesh: DeviceMesh,
                 device: torch.device, prompts: list[str] = []):
        self.args, self.preset, self.device = args, preset, device
        self.out = run_folder(args, Path(script).stem)
        # Ranks that share the tokens of their samples have the same samples.
        M, group = args.micro_batch, args.sequence_parallel
        rank, world = dist.get_rank() // group, dist.get_world_size() // group
        # Global sample indices of this rank's micro-batches: draws depend on these, not on the number of ranks.
        self.micro_batches = [list(range((k * world + rank) * M, (k * world + rank + 1) * M))
                              for k in range(args.batch_size // (world * M))]
        self.latent_shape, self.fps = latent_shape(args, preset), FAMILIES[preset.family].fps
        self.draw_noise, self.random = data.NoiseAhead(self.latent_shape, args.seed), []
        self.gen_iter = self.global_iter = self.bad = self.skipped = 0
        self.history, self.board = deque(maxlen=100), None
        self.seconds, self.gib, self.evaluations = defaultdict(float), defaultdict(float), defaultdict(int)
        self.text, self.vae, self.scorers, self.F_phi, self.teacher_std = None, None, {}, None, None
        # With --videos: what was wrong with this rank's first bad ones, and how many it met in this iteration.
        self.faults, self.bad_videos = None, 0
        if args.random_weights:
            self.vae = load_vae(args, preset, device) if args.script == "adp" else None  # which decodes in training
            self.c_null = self.random_conditions([0])
        else:
            self.prompts = read_training_prompts(args, preset) if hasattr(args, "prompts") else []
            args.teacher_files = teacher_files(args, preset)  # config.json keeps them, and --resume compares them
            check_teacher(open_denoiser(args, preset))  # a wrong file is refused before the long download
            print0(f"loading {args.model}")
            self.vae = load_vae(args, preset, device)
            known = [*self.prompts, *prompts, *preset.sample_prompts, *self.known_prompts()]
            self.text = open_text(args, preset, mesh, device, known)
            self.c_null = self.text.unconditional()
            kinds = [kind for kind in args.evaluate_metrics if kind != "shapes" and args.evaluate_every]
            if kinds and is_main():
                from models.eval.scores import load_scorer
                self.scorers = {kind: load_scorer(kind) for kind in kinds}

    def random_conditions(self, indices: list[int]) -> Cond:
        """Of the true shapes: --random-weights has no text encoders."""
        shapes = FAMILIES[self.preset.family].condition_shapes(self.preset)
        return Cond(*(data.noise(shape, self.args.seed, 0, name, indices).to(self.device)
                      for shape, name in zip(shapes, Cond._fields)))

    # ---- draws: functions of the seed, the iteration, a name and the global sample indices

    def noise(self, name: str, indices: list[int]) -> Tensor:
        """Standard normal latents (B C H W), of videos (B T C H W)."""
        return self.draw_noise(self.global_iter, name, indices).to(self.device, non_blocking=True)

    def uniform(self, name: str, indices: list[int]) -> Tensor:
        """U[0, 1), (B,)."""
        return data.uniform(self.args.seed, self.global_iter, name, indices).to(self.device)

    def integer(self, name: str, high: int) -> int:
        """Uniform in 1, ..., high, the same on every rank."""
        return 1 + int(high * data.uniform(self.args.seed, self.global_iter, name, [0]))

    def shuffled(self, indices: list[int], count: int) -> list[int]:
        """Which of `count` prompts or pairs each global sample index gets in this iteration."""
        first = (self.global_iter - 1) * self.args.batch_size
        return [data.prompt_index(self.args.seed, first + i, count) for i in indices]

    def conditions(self, prompts: list[str] | None = None) -> list[Cond]:
        """Of each micro-batch: one prompt per global sample index, by default of --prompts and the same for both
        updates of an iteration. Encoded together: sharded or offloaded encoders are gathered once."""  # [choice]
        if self.text is None:  # made once, or --profile would measure it
            self.random = self.random or [self.random_conditions(indices) for indices in self.micro_batches]
            return self.random
        indices, size = sum(self.micro_batches, []), len(self.micro_batches[0])
        prompts = prompts or [self.prompts[i] for i in self.shuffled(indices, len(self.prompts))]
        return [Cond(*parts) for parts in zip(*(part.split(size) for part in self.text.encode(prompts)))]

    def start(self, **roles: tuple[dict[str, nn.Parameter], torch.optim.Optimizer]) -> None:
        """Write config.json, or resume; say what is trained. roles: log name -> (parameters, optimizer)."""
        self.roles, args = roles, self.args
        for role, (params, opt) in roles.items():
            for group in opt.param_groups:
                stuck, total = count_stuck(group["params"], group["lr"])
                print0(f"{role}: {total / 1e6:.2f} M weights trained, lr {group['lr']:g}; a change of that "
                       f"size is lost to float32 rounding in {100 * stuck / total:.1f} % of them")
        rank, usual = getattr(args, "lora_rank", self.preset.lora_rank), self.preset.lora_rank
        if bool(rank) != bool(usual) and args.lr_theta == self.preset.lr_theta:
            print0(f"note: --lr-theta {args.lr_theta:g} is the preset's for --lora-rank {usual}, not for {rank}")
        main = is_main() and not args.profile
        if main:
            with writing(self.out):
                hold(self.out)
            if not args.resume:
                check_unused(self.out)  # another run may have taken it while this one has loaded
        if args.resume and (progress := resume(args, self.out, roles)):
            self.gen_iter, self.global_iter = progress["gen_iter"], progress["global_iter"]
            self.skipped = progress["skipped"]
        if main:
            with writing(self.out):
                open_folder(args, self.preset, self.out, self.gen_iter, self.global_iter)
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter
                with noted("TensorBoard's files"):
                    self.board = SummaryWriter(self.out, purge_step=self.global_iter + 1)
        self.bar = bar(total=args.max_iter, initial=self.gen_iter, disable=not is_main())
        self.stop, self.asked = False, 0.0
        self.handlers = {number: signal.signal(number, self._request_stop) for number in STOP_SIGNALS
                         if signal.getsignal(number) != signal.SIG_IGN}  # nohup ignores SIGHUP

    def _request_stop(self, number: int, _) -> None:
        """Have the loop finish its update, save and end. A second signal ends the process at once, but one
        within a second is the first again: a scheduler sends it, and torchrun passes it on."""
        if self.stop and time.monotonic() - self.asked > 1:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        elif not self.stop:
            self.stop, self.asked = True, time.monotonic()
            line = f"{signal.Signals(number).name}: finishing this update; a second signal ends at once\n"
            tell(line if is_main() else "")

    def watch(self, **roles: Denoiser) -> None:
        """F_phi's samples are what `health` compares the generator's with. With --profile, count the samples
        that each role's network and D_tau's backbone see, recomputation not included."""
        self.F_phi = roles["F_phi"]
        for net in {role.net for role in roles.values()} if self.args.profile else ():
            def hook(_, positional, named, net=net):
                name = "D_tau features" if named.get("taps") else next(
                    name for name, role in roles.items()
                    if role.net is net and role.lora == named.get("lora", ()))
                self.evaluations[name] += len(positional[0])
            net.register_forward_pre_hook(hook, with_kwargs=True)

    # ---- inside the loop

    def begin(self, global_iter: int) -> Log:
        self.global_iter, self.bad_videos = global_iter, 0
        self.began = self.lap = time.perf_counter()
        updates_left = self.args.max_iter - self.gen_iter
        return Log(min(1.0, updates_left / max(1.0, self.args.lr_decay * self.args.max_iter)))

    def phase(self, name: str) -> None:
        """Close a phase: --profile keeps its seconds, without those of the first update, and its peak memory."""
        if self.args.profile:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                self.gib[name] = max(self.gib[name], torch.cuda.max_memory_allocated() / 2 ** 30)
                torch.cuda.reset_peak_memory_stats()
            if self.gen_iter or self.args.profile == 1:
                self.seconds[name] += time.perf_counter() - self.lap
            self.lap = time.perf_counter()

    def end(self, log: Log, gen_iter: int) -> bool:
        """Log, and save when due. True: a signal asked to stop. InputError after MAX_BAD non-finite ones in a row."""
        args, updated, bad = self.args, gen_iter > self.gen_iter, bool(log.not_finite())
        drop_closed_streams()  # a reader of this output that has ended costs no updates
        self.gen_iter = gen_iter
        self.bad = self.bad + 1 if bad else 0
        self.skipped += bad
        peak = (torch.cuda.max_memory_allocated() if self.device.type == "cuda"
                else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        if self.faults is not None:  # on every rank, or the ranks' lists of figures would differ in length
            log.add(bad_videos=torch.tensor(float(self.bad_videos * dist.get_world_size())))
        log.close(global_iter=self.global_iter, gen_iter=gen_iter, skipped=self.skipped,
                  seconds=time.perf_counter() - self.began, gib=peak / 2 ** 30)
        if log.record.get("bad_videos"):
            faults = of_all(self.faults)
            if is_main() and not args.profile:
                with noted("bad_videos.txt"):
                    text = "\n".join(sorted(set(sum(faults, [])))[:20]) + "\n"
                    (self.out / "bad_videos.txt").write_text(text)
        if is_main() and not args.profile:
            with writing(self.out):
                data.append_jsonl(self.out / "metrics.jsonl", log.record)
            self.mirror(log.record)
        if updated:
            self.history.append(log.record)
            self.bar.set_postfix_str(" ".join(f"{key} {value:.3f}" for key, value in log.record.items()
                                              if key.startswith("loss_")), refresh=False)
            self.bar.update()
            if gen_iter % 100 == 0:
                if self.teacher_std is None and self.text is not None and args.evaluate and not any_rank(self.stop):
                    self.teacher_std = deviations(self.F_phi, self.text, self.known_prompts()[:64], args,
                                                  self.preset, self.latent_shape, self.device)
                if is_main():
                    self.bar.write(f"{gen_iter}: {health(self.history, self.teacher_std)}")
        stop = any_rank(self.stop) or self.bad >= MAX_BAD
        due = updated and (gen_iter % args.save_every == 0 or gen_iter == args.max_iter)
        if not args.profile and (stop or due):
            progress = dict(gen_iter=gen_iter, global_iter=self.global_iter, skipped=self.skipped)
            with writing(self.out):
                save_state(self.out / "state", self.global_iter, self.roles, progress)
        if self.bad >= MAX_BAD:
            raise InputError(f"{MAX_BAD} iterations in a row had a non-finite loss or gradient; "
                             f"state saved in {self.out / 'state'}")
        return stop

    def mirror(self, record: dict) -> None:
        """The figures in TensorBoard, of a list its mean; no more of them after a failure."""
        board, self.board = self.board, None
        with noted("TensorBoard's files"):
            for name, value in record.items() if board else ():
                known = [v for v in value if v is not None] if isinstance(value, list) else [value]
                board.add_scalar(name, sum(known) / len(known), self.global_iter)
            self.board = board

    # ---- pictures, export, closing comparison

    def sample(self, F: Denoiser, prompts: list[str], tn: Tensor, cfg: float | None = None) -> Tensor:
        """Images as `generate`'s; black ones, and a note, where that refuses them: no sample ends a run."""
        args = self.args
        try:
            return generate(F, self.text, self.vae, prompts, tn, self.latent_shape, args.seed, cfg,
                            2 * args.micro_batch, self.preset.decode_batch, args.sequence_parallel,
                            args.context_parallel)
        except NotFinite as error:
            print0(f"note: {error}; the run goes on")
            return torch.zeros(len(prompts), *[args.frames] * bool(args.frames), 3, *args.size, dtype=torch.uint8)

    def look(self, G_theta: Denoiser, tn: Tensor) -> None:
        """samples/XXXXXXXX.png or .mp4 of the generator every --sample-every updates, and a line of figures
        in evaluation.jsonl every --evaluate-every: of the same prompts and noise each time."""
        args = self.args
        if self.text is not None and self.gen_iter % args.sample_every == 0:
            with averaged(self.roles["theta"][1]):
                images = self.sample(G_theta, list(self.preset.sample_prompts), tn, student_cfg(args))
            with noted(f"a sample of update {self.gen_iter}"):
                if is_main():
                    save_grid(self.out / "samples" / f"{self.gen_iter:08d}.png", images, 4, fps=self.fps)

        if self.text is not None and args.evaluate_every and self.gen_iter % args.evaluate_every == 0:
            prompts = self.known_prompts()
            with averaged(self.roles["theta"][1]):
                images = self.sample(G_theta, prompts, tn, student_cfg(args))
            if is_main():
                from models.eval.metrics import quick_scores
                figures = quick_scores(images, prompts, args.evaluate_metrics, self.scorers, device=self.device)
                with writing(self.out):
                    data.append_jsonl(self.out / "evaluation.jsonl", dict(gen_iter=self.gen_iter) | figures)
                self.bar.write(f"{self.gen_iter}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
                self.mirror(figures)
            barrier()  # the others wait for the scores

    def known_prompts(self) -> list[str]:
        """--evaluate prompts: those whose answers are known, or the preset's, again and again."""
        count, few = self.args.evaluate, self.preset.sample_prompts
        if self.preset.data:
            from models.eval.metrics import procedural
            return procedural(self.preset.data).evaluation_prompts(count)
        return [few[i % len(few)] for i in range(count)]

    def finish(self, F_phi: Denoiser, G_theta: Denoiser, tn: Tensor) -> None:
        """Export the generator, then compare teacher and student; or print the profile."""
        self.bar.close()
        for number, handler in self.handlers.items():
            signal.signal(number, handler)  # no update is left to finish
        if self.args.profile:
            return self.print_profile()
        if any_rank(self.stop) or self.gen_iter < self.args.max_iter:
            return print0(f"stopped at generator update {self.gen_iter}; continue with --resume --out {self.out}")
        if self.text is None:
            return
        print0(f"exporting the generator to {self.out}")
        with averaged(self.roles["theta"][1]):
            with writing(self.out):
                export(self.args, self.preset, G_theta, self.out)
            if self.args.evaluate:
                print0(f"comparing {self.args.evaluate} samples of the student with as many of the teacher")
                self.compare(F_phi, G_theta, tn)

    def compare(self, F_phi: Denoiser, G_theta: Denoiser, tn: Tensor) -> None:
        """Teacher at full steps, teacher and student at N steps, from the same noise: compare.png, of videos
        compare.mp4 too, and where the data are procedural the exact figures in comparison.json."""
        preset, args, N, w = self.preset, self.args, len(tn) - 1, self.preset.teacher_cfg
        prompts, few_steps = self.known_prompts(), f"{N} step{'s' * (N > 1)}"
        full = teacher_times(preset.teacher_steps, preset.shift, preset.schedule).to(self.device)
        few = generator_times(N, preset.shift, preset.schedule).to(self.device)
        lines, figures = [], {}
        for label, F, times, cfg in (
                (f"teacher, {preset.teacher_steps} steps, guidance {w:g}", F_phi, full, w),
                (f"teacher, {few_steps}, guidance {w:g}", F_phi, few, w),
                (f"student, {few_steps}", G_theta, tn, student_cfg(args))):
            images = self.sample(F, prompts, times, cfg)
            lines.append((label, images[:12]))
            if exact(args, preset) and is_main():
                from models.eval.metrics import quick_scores
                figures[label] = quick_scores(images, prompts, ["shapes"], {})
        if is_main():
            if preset.frames:
                with noted("compare.mp4"):
                    save_grid(self.out / "compare.mp4", torch.cat([clips[:6] for _, clips in lines]),
                              min(6, len(prompts)), fps=self.fps)
                lines = [(label, film_strip(clips[:2])) for label, clips in lines]
            with noted("compare.png"):
                save_rows(self.out / "compare.png", lines)
            for label, values in figures.items():
                print(f"{label:34}" + "".join(f"  {name} {value:.4f}" for name, value in values.items()))
            if figures:
                (self.out / "comparison.json").write_text(json.dumps(figures, indent=1))
            print(f"pictures: {self.out / 'compare.png'}, generator: {self.out}", flush=True)

    def print_profile(self) -> None:
        iterations = max(1, self.args.profile - 1)
        samples = self.gen_iter * sum(map(len, self.micro_batches))  # an iteration: all up to a generator update
        lines = [(name, seconds / iterations, self.gib.get(name)) for name, seconds in self.seconds.items()]
        total, peak = sum(self.seconds.values()), max(self.gib.values(), default=None)
        lines.append(("iteration", total / iterations, peak))
        for name, seconds, gib in lines:
            print0(f"{name:14} {seconds:8.3f} s/it" + (f"  peak {gib:6.2f} GiB" if gib else ""))
        print0(f"peak host memory of rank 0: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")
        print0("network evaluations per sample and iteration: "
               + ", ".join(f"{name} {count / samples:.2f}" for name, count in self.evaluations.items()))
