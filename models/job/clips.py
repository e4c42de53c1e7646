"""Where AVDM2's real clips come from: (x_0, c) of its data set, one draw per global sample index.

--videos reads files, decoded ahead in threads, and encodes them; --latents reads what models/job/latents.py
has encoded; a tiny model's are drawn. --random-weights has noise in their place.
"""
import argparse
from collections.abc import Callable

import torch
from torch import Tensor

from models.checkpoint import InputError
from models.data import digest
from models.eval.metrics import procedural
from models.job.job import Job
from models.job.latents import vae_digest
from models.job.networks import latent_shape
from models.parallel import of_main, print0
from models.presets import PRESETS, Preset
from models.shards import Pairs, fingerprint, open_pairs
from models.text import Cond
from models.videos import Clips

SEED = 1000  # of clips that are drawn; the held-out ones have others


def open_source(args: argparse.Namespace, preset: Preset) -> Clips | Pairs | list[str]:
    """Videos, latents, or the captions of which clips are drawn. Raises InputError where the flags name no real
    clips, or two sources, and for files that cannot be read."""
    given, drawn = bool(args.videos) + bool(args.latents), bool(preset.data) or args.random_weights
    if given > 1 or args.table and not args.videos or not (given or drawn):
        raise InputError(f"--model {args.model}: expected real clips from --videos FOLDER, with --prompts FILE.csv "
                         "where that has not one .csv file, or from --latents FOLDER")
    if not given and not args.random_weights and tuple(args.size) != preset.size:
        raise InputError(f"--size {args.size[0]} {args.size[1]}: the clips of {args.model} are drawn at "
                         f"{preset.size[0]} {preset.size[1]}; expected that, --videos or --latents")
    if args.latents:
        alike = [name for name, row in PRESETS.items() if (row.family, row.vae) == (preset.family, preset.vae)]
        source = of_main(open_pairs(args.latents, args.model, latent_shape(args, preset), "latents", alike))
        args.prompts_digest = source.digest()
        return source
    if args.videos:
        source = Clips(args.videos, args.table, tuple(args.size), args.frames, args.stride, args.seed, args.workers)
        args.prompts_digest = digest([f"{len(source)} rows", fingerprint(source.table)])
        return source
    return procedural(preset.data).captions()[:-1] if preset.data else []  # the last is the empty one


def captions_of(source: Clips | Pairs | list[str], most: int | None = None) -> list[str]:
    """Every caption that training may ask for, or the first `most` of them."""
    if isinstance(source, Clips):
        return [source.row(k)[1] for k in range(len(source))[:most]]
    return source.all_prompts(most) if isinstance(source, Pairs) else source[:most]


def open_clips(job: Job, source: Clips | Pairs | list[str]) -> Callable[[list[int]], tuple[Tensor, Cond]]:
    """A function of global sample indices: latents x_0 (B T C h w) of a sample of the VAE's posterior, and
    the conditions of their captions."""
    args, preset, device = job.args, job.preset, job.device
    if args.random_weights:
        return lambda indices: (job.noise("x_0", indices), job.random_conditions(indices))

    if args.latents:
        print0(source)
        now = {"vae": ("--vae-ckpt or --vae-precision", vae_digest(job.vae)), "stride": ("--stride", args.stride)}
        other = [flag for key, (flag, value) in now.items() if source.manifest.get(key, value) != value]
        if other:
            print0(f"note: {args.latents} was made with another {' and another '.join(other)}")

        def real(indices):
            x_0, captions = source.read(job.shuffled(indices, len(source)))
            return x_0.to(device), job.text.encode(captions)
        return real

    if args.videos:
        print0(source)

        def read(indices):
            before = source.skipped
            found = source.read(job.global_iter, indices)
            source.prefetch(job.global_iter + 1, indices)  # decoded while the networks work
            job.faults, job.bad_videos = source.bad, job.bad_videos + source.skipped - before
            return found
    else:
        data = procedural(preset.data)

        def read(indices):
            drawn = [source[i] for i in job.shuffled(indices, len(source))]
            first = (job.global_iter - 1) * args.batch_size
            scenes = data.random_scenes(SEED + args.seed, [first + i for i in indices], data.parse(drawn))
            return data.draw_clip(scenes, args.frames), drawn

    def real(indices):
        clips, captions = read(indices)
        eps = job.noise("posterior", indices)
        weight = next(job.vae.parameters())
        with torch.no_grad():
            x_0 = job.vae.encode(clips.to(device, weight.dtype), eps.to(weight.dtype)).float()
        return x_0, job.text.encode(captions)
    return real
