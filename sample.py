"""Pictures or videos from a teacher, an exported generator, a LoRA file or a run folder.

    python sample.py                               # the embedded tiny-sd3 teacher
    python sample.py --ckpt runs/adm-tiny-sd3-000  # the student of a run, at its own N steps
    python sample.py --model sd3-medium --ckpt sd3_medium.safetensors --lora FILE --prompt "a red fox"
    torchrun --nproc_per_node 8 sample.py --model cogvideox-5b --sequence-parallel 8

Writes OUT/000.png, 001.png, ... with prompt and settings in their text chunks, and OUT/grid.png; of videos
000.mp4, ..., grid.mp4 and in grid.png six frames of each. An OUT with samples of other settings is refused:
evaluate.py scores a folder as one generator's. An exported file says its steps and its guidance (mostly none)
and is sampled on the generator's schedule, as is anything with --shift or --times. All else is sampled as a
teacher: Euler or DDIM steps on the original's schedule with guidance.
"""
from pathlib import Path

from models.job import parsers
from models.presets import PRESETS, PROMPT_SETS


def parse_args(argv=None):
    parser = parsers.model_parser(__file__, __doc__)
    parser.set_defaults(model=None)  # what an exported file says, else tiny-sd3
    add = parser.add_argument_group("samples").add_argument
    add("--lora", type=Path, help="adapter in the diffusers, kohya or ComfyUI layout, merged into weights")
    add("--lora-scale", type=float, default=1.0, help="strength of --lora")
    add("--prompt", help="one prompt")
    add("--prompts", help=f"file, or a set by name: {', '.join(PROMPT_SETS)}; default: the preset's")
    add("--count", type=int, help="pictures, for which prompts repeat with other noise; default: one a prompt")
    add("--steps", type=int, help="default: the generator's N, or the teacher's full steps")
    add("--shift", type=float, metavar="X",
        help="sample as a few-step student: even times, shifted by X (1: not), no guidance by default")
    add("--times", type=float, nargs="+", metavar="T", help="a student's own times, falling from 1: 1 0.75 0.5 0.25")
    add("--renoise", action="store_true", help="fresh noise between the steps, as LCM and DMD2 are sampled")
    add("--cfg", type=float, help="guidance scale, 1 for none; default: the teacher's, or the generator's, mostly none")
    add("--batch", type=int, default=4, help="pictures per forward")
    add("--out", type=Path, default=Path("samples"), help="folder, for samples of one generator and settings")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

import torch
import torch.distributed as dist

from models import lora
from models.checkpoint import InputError, open_tensors, weights_in
from models.data import check_text
from models.diffusion import Denoiser, generator_times, on_grid, teacher_times
from models.eval.prompt_sets import prompt_set
from models.job import flags, networks, sampling
from models.job.families import FAMILIES, MOTION, source
from models.job.folder import check_out, hold, note_old_export
from models.job.notes import export_notes, parametrisation, read_of, run_settings, tell_other_base
from models.parallel import barrier, init_distributed, is_main, print0
from models.parse import short
from models.pictures import film_strip, picture, read_text, save_grid, save_mp4, save_png
from models.progress import bar
from models.shards import fingerprint


def from_run_folder(args) -> None:
    """Replace --ckpt RUN by what the run exported, a file or base and adapter; take over its model flags."""
    trained = run_settings(args.ckpt)
    if not trained:
        return  # some other program's folder

    def path_of(flag: str) -> Path | None:
        return Path(trained[flag]) if trained.get(flag) else None
    folder, args.model, base = args.ckpt, trained["model"], path_of("ckpt")
    preset = PRESETS[args.model]
    full, adapter = folder / "generator.safetensors", folder / networks.ADAPTER
    holds_vae = full.exists() and FAMILIES[preset.family].single_file  # as it was
    files = trained.get("teacher_files", {}) | trained.get("files", {})
    for flag in ("vae_ckpt", "text_ckpt", "tokenizers"):  # where training found what it was not told
        if base and trained.get(flag) in (None, preset.tokenizers):
            trained[flag] = FAMILIES[preset.family].beside(base, preset, flag) or trained.get(flag)
        path, used = trained.get(flag), not getattr(args, flag) and not (flag == "vae_ckpt" and holds_vae)
        if used and files.get(flag) and path and Path(path).exists() and read_of(Path(path), flag) != files[flag]:
            print0(f"note: {path} is not as it was when {folder} was trained")
    args.text_ckpt = args.text_ckpt or path_of("text_ckpt")
    args.vae_ckpt = args.vae_ckpt or (None if holds_vae else path_of("vae_ckpt"))
    args.tokenizers, args.size = args.tokenizers or trained["tokenizers"], args.size or trained["size"]
    args.frames = args.frames or trained.get("frames")
    args.no_t5 = args.no_t5 or trained["no_t5"]
    if full.exists():
        args.ckpt = full
    elif adapter.exists():
        if args.lora:
            raise InputError(f"--lora {args.lora}: {folder} is an adapter itself; expected no --lora")
        args.lora = adapter
        args.ckpt, args.motion_ckpt = base, args.motion_ckpt or path_of("motion_ckpt")
    else:
        raise InputError(f"{folder} has no exported generator yet: let the run end, "
                         "or continue it with --resume")
    note_old_export(folder)


def given_notes(args) -> dict[str, str]:
    """What the given files say of themselves: dmdx.model, dmdx.steps, dmdx.predicts, ..."""
    files = [path for path in (args.ckpt, args.lora, args.motion_ckpt) if path and path.is_file()]
    return {key: value for path in files for key, value in export_notes(open_tensors(path)).items()}


def checkpoint_name(args, repo: str) -> str:
    """Which weights a sample is of: file names, of a run's export the run folder's name."""
    names = [path.absolute().parent.name if path.name.startswith("generator") else path.absolute().name
             for path in (args.ckpt, args.motion_ckpt, args.lora) if path]
    strength = f" x {args.lora_scale:g}" * bool(args.lora and args.lora_scale != 1)
    return short(" + ".join(names if args.ckpt else [repo, *names])) + strength


def digest_of(path: Path) -> str:
    """What a sample notes of a file or a folder that it was made with; of a repository its name."""
    return fingerprint(path)[:16] if path.exists() else short(path)


def sample_note(settings: dict[str, str], prompts: list[str], i: int) -> dict[str, str]:
    """What the file of sample i notes."""
    return dict(prompt=prompts[i % len(prompts)], index=str(i)) | settings


def refuse_other_samples(out: Path, settings: dict[str, str], prompts: list[str]) -> None:
    """Raises InputError if `out` holds a sample that these settings, with some --count, would not make."""
    for path in sorted(out.glob("[0-9]*.*")):
        if path.stem.isdecimal() and path.suffix in (".png", ".mp4"):
            found, note = read_text(path), sample_note(settings, prompts, int(path.stem))
            other = [f"{key} {str(found.get(key))[:60]} (now {value[:60]})" for key, value in note.items()
                     if found.get(key) != value]
            if other:
                raise InputError(f"{out}: {path.name} is of other settings: {', '.join(other)}; expected "
                                 "another --out, or this one emptied")


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    asked = args.model
    if args.ckpt and not args.ckpt.exists():
        raise InputError(f"{args.ckpt}: no such file or folder; expected a checkpoint or a run folder")
    if args.ckpt and (args.ckpt / "config.json").exists():
        from_run_folder(args)
    if args.lora and args.lora.is_dir():
        args.lora = weights_in(args.lora)  # a file, whose notes are read
    notes = given_notes(args)
    args.model = notes.get("dmdx.model", args.model or "tiny-sd3")
    if asked not in (None, args.model):
        raise InputError(f"--model {asked}: {args.lora or args.ckpt} was trained for {args.model}; expected "
                         "that one or no --model")
    args.null_prompt = args.null_prompt or notes.get("dmdx.null_prompt")
    preset = flags.resolve_model(args)
    if args.lora_scale != 1 and not args.lora:
        raise InputError(f"--lora-scale {args.lora_scale:g}: of which adapter is not said; expected --lora FILE too")
    check_out(args.out)
    family, teacher = FAMILIES[preset.family], source(args, preset)
    base = export_notes(teacher)
    metadata = base | notes
    student = "dmdx.steps" in metadata or args.times is not None or args.shift is not None
    steps = args.steps or int(metadata.get("dmdx.steps", preset.steps if student else preset.teacher_steps))
    shift = args.shift or float(metadata.get("dmdx.shift", preset.shift))
    if args.times:
        if args.steps or args.shift or any(t <= s for t, s in zip(args.times, args.times[1:])):
            raise InputError(f"--times {' '.join(map(str, args.times))}: expected falling times, no --steps and no "
                             "--shift")
        steps = len(args.times)
    guidance = float(metadata.get("dmdx.cfg", 1)) if student else preset.teacher_cfg
    cfg = args.cfg if args.cfg is not None else guidance
    if args.prompt is not None and args.prompts is not None:
        raise InputError(f"--prompt {short(args.prompt, 60)} --prompts {args.prompts}: expected one of the two")
    if args.prompt is not None:
        check_text(args.prompt, "--prompt")
        prompts = [args.prompt]
    else:
        prompts = prompt_set(args.prompts) if args.prompts is not None else list(preset.sample_prompts)
    size = [args.frames, *args.size] if preset.frames else args.size
    settings = dict(seed=str(args.seed), steps=str(steps), cfg=f"{cfg:g}", model=args.model,
                    ckpt=checkpoint_name(args, preset.repo), size="x".join(map(str, size)))
    motion = args.motion_ckpt or teacher.path.with_name(MOTION) if "motion_ckpt" in family.flags else None
    files = [teacher.path, *(path for path in (motion, args.lora) if path and path.is_file())]
    settings |= dict(precision=f"{args.precision} {args.vae_precision}", weights=" ".join(map(digest_of, files)))
    settings |= {name: str(value) for name in ("shift", "times", "renoise", "null_prompt", "no_t5")
                 if (value := getattr(args, name))}
    settings |= {name: digest_of(Path(value)) for name in ("vae_ckpt", "text_ckpt", "tokenizers")
                 if (value := getattr(args, name)) not in (None, preset.tokenizers)}
    refuse_other_samples(args.out, settings, prompts)

    adapter = networks.open_lora(args, preset) if args.lora else {}
    preset = preset._replace(**parametrisation(base))
    print0(f"loading {settings['ckpt']}")
    if args.lora:
        tell_other_base(open_tensors(args.lora), teacher.path)
    for path in files if is_main() else ():
        networks.check_export(path)
    net = networks.load_network(args, preset, mesh, device)
    lora.merge_lora(net, adapter, args.lora_scale)
    # With an adapter the network may predict something else than its base.
    preset = preset._replace(**parametrisation(metadata))
    renoise = args.renoise or metadata.get("dmdx.rollout") == "renoise"
    F = Denoiser(net, preset.predicts, preset.schedule, renoise=renoise)
    tn = (generator_times if student else teacher_times)(steps, shift, F.schedule)
    if args.times:
        tn = on_grid(torch.tensor([0.0, *args.times[::-1]]), F.schedule)
        if len(tn.unique()) < len(tn):
            raise InputError(f"--times {' '.join(map(str, args.times))}: expected times that differ by 0.001, of which "
                             "this schedule is made")
    given, prompts = prompts, [prompts[i % len(prompts)] for i in range(args.count or len(prompts))]
    text, vae = networks.load_text(args, preset, mesh, device), networks.load_vae(args, preset, device)
    sampling.note_overlong(text, prompts)
    if is_main():
        hold(args.out)
        refuse_other_samples(args.out, settings, given)  # again: another process may have filled it meanwhile
    shape, shown = networks.latent_shape(args, preset), []  # for the grid: as many as a person looks at
    block = args.batch * dist.get_world_size() // args.sequence_parallel
    for first in bar(range(0, len(prompts), block), disable=not is_main() or len(prompts) <= block):
        part = prompts[first:first + block]
        images = sampling.generate(F, text, vae, part, tn.to(device), shape, args.seed, None if cfg == 1 else cfg,
                                   args.batch, preset.decode_batch, args.sequence_parallel,
                                   args.context_parallel, first)
        for i, image in enumerate(images if is_main() else (), first):
            note = sample_note(settings, prompts, i)
            if preset.frames:
                save_mp4(args.out / f"{i:03d}.mp4", [picture(frame, 128) for frame in image],
                         family.fps, note)
            else:
                save_png(args.out / f"{i:03d}.png", image, note)
        shown += images[:(16 if preset.frames else 64) - len(shown)]
        barrier()  # the others wait for the writing
    if is_main():
        save_grid(args.out / "grid.png", torch.stack(shown), columns=4, fps=family.fps)
        if preset.frames:
            save_grid(args.out / "grid.png", film_strip(torch.stack(shown)), columns=6)
        (args.out / "lock").unlink(missing_ok=True)  # a folder of samples holds nothing else
    kind = "videos" if preset.frames else "pictures"
    print0(f"{len(prompts)} {kind}, {steps} steps, guidance {cfg:g}: {args.out / 'grid.png'}")


if __name__ == "__main__":
    flags.entry(__file__, main, args)
