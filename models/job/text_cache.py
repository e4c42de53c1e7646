"""--cache-text FOLDER: every prompt of a run is encoded once, and then no text encoder is in memory.

The folder is one of models/shards.py, of context (n L D) and pooled (n P) in the precision of the encoders, which
loses nothing; the first entry is the unconditional. A later run encodes what it does not find there.
"""
import gc
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from models import shards
from models.checkpoint import InputError
from models.job.families import FAMILIES
from models.job.folder import check_out, hold, release
from models.job.networks import DTYPES, load_text
from models.job.sampling import note_overlong
from models.parallel import barrier, is_main, of_all, of_main, print0
from models.parse import short
from models.presets import Preset
from models.progress import bar
from models.text import Cond, Text

SHARD = 256  # prompts per file: of SD3 in bf16 0.7 GB
BATCH = 16


class CachedText:
    """In place of the encoders, for the prompts that were encoded. Raises InputError for a damaged shard."""

    def __init__(self, folder: Path, manifest: dict, device: torch.device):
        self.pairs, self.device = shards.Pairs(folder, manifest), device
        self.places = {prompt: i for i, prompt in enumerate(self.pairs.all_prompts())}

    def encode(self, prompts: list[str | None]) -> Cond:
        """Context (B L D) and pooled (B P) of these prompts, float32."""
        context, pooled, _ = self.pairs.read([self.places[prompt] for prompt in prompts])
        return Cond(context.to(self.device), pooled.to(self.device))

    def unconditional(self) -> Cond:
        return self.encode([None])


def encode_shard(text: Text, null: Cond, folder: Path, first: int, prompts: list[str | None], dtype: torch.dtype,
                 batches: int) -> dict | None:
    """Write the conditions of these prompts, the entries from `first` on: their entry for the manifest. A rank
    without prompts only takes part in the `batches` of the others, as the sharding of the encoders asks for."""
    found = [null] if None in prompts else []
    known = [prompt for prompt in prompts if prompt is not None]
    for start in range(0, batches * BATCH, BATCH):
        encoded = text.encode(known[start:start + BATCH] or [""])
        if start < len(known):
            found.append(encoded)
    if not prompts:
        return None
    context, pooled = (torch.cat(parts).to("cpu", dtype) for parts in zip(*found))
    return shards.save_shard(folder, "text", first, dict(context=context, pooled=pooled), prompts)


@torch.no_grad()
def open_text(args, preset: Preset, mesh: DeviceMesh, device: torch.device, prompts: list[str]) -> Text | CachedText:
    """The text encoders, or with --cache-text what they give for these prompts and the unconditional; what is
    not there yet is encoded. The ranks share the work. Raises InputError for a folder of other encoders."""
    folder, precision = args.cache_text, DTYPES[args.precision]
    if folder is None:
        text = load_text(args, preset, mesh, device)
        note_overlong(text, prompts)
        return text
    context, pooled = FAMILIES[preset.family].condition_shapes(preset)
    size = args.size if FAMILIES[preset.family].sized else [0, 0]
    same = dict(kind="text", model=args.model, size=size, latent_shape=context, shapes=dict(pooled=pooled),
                precision=args.precision, **args.teacher_files)
    same = json.loads(json.dumps(same))
    check_out(folder)
    manifest = same | dict(count=0, shards=[])
    if (folder / "manifest.json").exists():
        manifest = shards.read_manifest(folder, "text")
    manifest = of_main(manifest)  # another run may add to it at this moment
    changed = [f"{key} {short(value, 60)} (was {short(manifest.get(key), 60)})" for key, value in same.items()
               if manifest.get(key) != value]
    if changed:
        raise InputError(f"{folder}: encoded with other settings: {', '.join(changed)}; expected another "
                         "--cache-text or the flags and files that it was made with")
    shards.check_shards(folder, manifest)
    cached = CachedText(folder, manifest, device)
    left = [prompt for prompt in dict.fromkeys([None, *prompts]) if prompt not in cached.places]
    barrier()  # every rank has read the folder before rank 0 writes there
    if not left:
        return cached
    text = load_text(args, preset, mesh, device)
    print0(f"{folder}: {len(cached.places)} prompts are encoded, {len(left)} left")
    note_overlong(text, [prompt for prompt in left if prompt is not None])
    encode_left(text, folder, manifest, left, precision, len(cached.places))
    del text
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return CachedText(folder, of_main(manifest), device)


def encode_left(text: Text, folder: Path, manifest: dict, left: list[str | None], dtype: torch.dtype,
                first: int) -> None:
    """Write the conditions of these prompts as the entries from `first` on."""
    rank, world, null = dist.get_rank(), dist.get_world_size(), text.unconditional()
    if is_main():
        hold(folder)
        known = shards.read_manifest(folder, "text") if (folder / "manifest.json").exists() else manifest
        if known != manifest:  # what is swept would be the other's
            raise InputError(f"{folder}: another run has added prompts meanwhile; expected this one to be started "
                             "again")
        shards.sweep_shards(folder, manifest)
    barrier()  # nobody writes before that is swept
    parts = [(first + i, left[i:i + SHARD]) for i in range(0, len(left), SHARD)]
    for start in bar(range(0, len(parts), world), disable=not is_main(), unit="shard"):
        batches = -(-len(parts[start][1]) // BATCH)  # no shard is longer than the one before it
        mine = (parts[start:] + world * [(0, [])])[rank]  # in the last round some ranks have none
        made = encode_shard(text, null, folder, *mine, dtype, batches)
        entries = filter(None, of_all(made))
        for entry in entries if is_main() else ():
            manifest["count"] += entry["count"]
            shards.add_shard(folder, manifest, entry)
    if is_main():
        release(folder)  # other runs may add to it while this one trains
    barrier()  # the manifest is written before it is read
