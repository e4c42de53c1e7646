"""Latents of real video clips for avdm2.py --latents: each video is decoded and encoded once.

    python -m models.job.latents --model MODEL --ckpt FILE --videos FOLDER --out LATENTS
    torchrun --nproc_per_node 8 -m models.job.latents ...     # the same bytes, sooner
    python -m models.job.latents --out LATENTS --verify       # is every shard there, as it was written?

Clip i is of the i-th row whose video is there, again from the first when --count is larger, at one random
start and with one sample of the VAE's posterior. An interrupted run goes on when its command is run again.
"""
from pathlib import Path

from models.job import parsers


def parse_args(argv=None):
    parser = parsers.model_parser("models.job.latents", __doc__)
    add = parser.add_argument_group("clips").add_argument
    add("--videos", type=Path, help="folder of videos and a .csv file with their captions")
    add("--prompts", type=Path, help="the .csv file, where it is not the only one in --videos")
    add("--out", type=Path, required=True)
    add("--count", type=int, help="clips in all; default: the number of videos")
    add("--stride", type=int, default=4, help="of the frames")
    add("--shard-size", type=int, default=16, help="clips per file: what an interruption costs each rank")
    add("--workers", type=int, default=4, help="videos that a rank decodes side by side")
    add("--verify", action="store_true", help="check every byte in --out and make nothing")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

import json
import math
from hashlib import blake2b

import torch
import torch.distributed as dist

from models import data, shards
from models.checkpoint import InputError, some
from models.job import flags, networks
from models.job.families import FAMILIES
from models.job.folder import check_out, hold
from models.parallel import barrier, init_distributed, is_main, of_all, print0
from models.progress import bar
from models.vae import AutoencoderKL
from models.videos import Clips

AHEAD = 8  # clips decoded while one is encoded


def vae_digest(vae: AutoencoderKL) -> str:
    """Tells VAEs apart, and one from itself in another precision."""
    weights = blake2b(digest_size=16)
    for p in vae.state_dict().values():
        weights.update(p.cpu().contiguous().view(torch.uint8).numpy())
    return weights.hexdigest()


def encode_shard(vae: AutoencoderKL, clips: Clips, shape: tuple[int, ...], folder: Path, first: int,
                 n: int) -> dict:
    """Write the latents of n clips from `first` on: the shard's entry for the manifest."""
    weight, x_0, captions = next(vae.parameters()), [], []
    for i in range(first, first + n):
        ahead = range(i, min(i + 1 + AHEAD, first + n))
        clips.prefetch(0, ahead, [j % len(clips) for j in ahead])
        clip, caption = clips.read(0, [i], [i % len(clips)])
        eps = data.noise(shape, clips.seed, 0, "posterior", [i])
        x_0.append(vae.encode(clip[0].to(weight), eps[0].to(weight)).to("cpu", torch.bfloat16))
        captions += caption
        if not x_0[-1].isfinite().all():
            raise InputError(f"{folder}: the VAE gives latents of clip {i} that are not finite; "
                             "expected --vae-precision fp32")
    return shards.save_shard(folder, "latents", first, {"x_0": torch.stack(x_0)}, captions)


@torch.no_grad()
def encode_clips(vae: AutoencoderKL, clips: Clips, model: str, folder: Path, count: int,
                 shard_size: int) -> None:
    """Latents x_0 (T C h w) in bfloat16 of `count` clips and their captions, as shards in a folder that
    `shards.open_pairs(folder, model, shape, "latents")` reads. The ranks share the shards."""
    height, width = clips.size
    shape = (clips.frames, vae.decoder.conv_in.in_channels, height // vae.factor, width // vae.factor)
    same = dict(kind="latents", model=model, size=clips.size, latent_shape=shape, stride=clips.stride,
                seed=clips.seed, shard_size=shard_size, table=shards.sha256(clips.table), videos=len(clips),
                vae=vae_digest(vae))
    if is_main():  # before the manifest is read: another process may be adding to it
        hold(folder)
    barrier()
    manifest, todo = shards.resume_shards(folder, "latents", json.loads(json.dumps(same)), count, shard_size)
    left = sum(n for _, n in todo)
    print0(f"{folder}: latents of {count} clips, {left} left, {left * 2 * math.prod(shape) / 1e9:.3g} GB")
    barrier()  # every rank has read the folder before rank 0 writes there
    if is_main():
        shards.write_manifest(folder, manifest)
        shards.sweep_shards(folder, manifest)
    rank, world = dist.get_rank(), dist.get_world_size()
    barrier()  # nobody writes before that is swept
    for start in bar(range(0, len(todo), world), disable=not is_main(), unit="shard"):
        part = todo[start + rank:start + rank + 1]  # in the last round some ranks have none
        made = [encode_shard(vae, clips, shape, folder, first, n) for first, n in part]
        entries = sum(of_all(made), [])
        for entry in entries if is_main() else ():
            shards.add_shard(folder, manifest, entry)
    if is_main():
        shards.sweep_shards(folder, manifest)
    if clips.bad:
        print(f"{clips.skipped} videos are of no use, and others stand in for them: {some(clips.bad)}")


def main(args):
    device, _ = init_distributed(args.shard_ranks)
    if args.verify:
        return shards.verify_shards(args.out, "latents") if is_main() else None
    preset = flags.resolve_model(args)
    check_out(args.out)
    if args.videos is None:
        raise InputError("expected --videos FOLDER")
    if not args.frames or not issubclass(FAMILIES[preset.family].vae, AutoencoderKL):
        raise InputError(f"--model {args.model}: expected one that avdm2.py trains, such as animatediff")
    clips = Clips(args.videos, args.prompts, tuple(args.size), args.frames, args.stride, args.seed,
                  args.workers)
    print0(clips)
    vae = networks.load_vae(args, preset, device)
    encode_clips(vae, clips, args.model, args.out, args.count or len(clips), args.shard_size)


if __name__ == "__main__":
    flags.entry("models.job.latents", main, args)
