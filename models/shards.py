"""Folders of shards: ODE pairs of collect_odes.py, latents of real clips, and encoded prompts.

A shard is a file of x_T and x_0 (B C h w or B T C h w) and guidance scales w (B,), of x_0 alone, or of context
(B L D), which the manifest then calls latents, and pooled (B P), whose width is in its "shapes"; with index (B,)
and prompts (the bytes of a JSON list). manifest.json has the settings, the "count" asked for, and the "shards"
that are finished. A shard is written before the manifest names it: what is not named there does not count.
"""
import json
import re
from bisect import bisect_right
from collections.abc import Collection
from hashlib import file_digest
from hashlib import sha256 as new_sha256
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import (
    TORCH_SUFFIXES,
    InputError,
    Tensors,
    open_tensors,
    replacing,
    save_safetensors,
    some,
)
from models.parse import parse_json, short
from models.progress import bar


class Kind(NamedTuple):
    noun: str
    command: str                # that makes and verifies the folder
    tensors: tuple[str, ...]
    mend: str = "`{0} --verify --out {1}` checks every shard"  # command and folder


# The manifest's "kind", and how its files' names begin; one without is of pairs.
KINDS = {"pairs": Kind("ODE pairs", "collect_odes.py", ("x_T", "x_0", "w")),
         "latents": Kind("latents of video clips", "python -m models.job.latents", ("x_0",)),
         "text": Kind("encoded prompts", "--cache-text", ("context", "pooled"), "remove {1}, and {0} makes it again")}


def sha256(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> str:
    """Tells checkpoints and tokenizers apart; files above 64 MiB by size and 4 KiB at 256 places: a fine-tune has its
    base's header, and to hash all of 16 GB at each start would take minutes."""
    path = path.parent if path.name.endswith(".index.json") else path
    files = [file for file in path.rglob("*") if file.suffix in (".safetensors", *TORCH_SUFFIXES)]
    files = files or [file for file in path.rglob("*") if file.is_file()]  # of tokenizers
    digest = new_sha256()
    for file in sorted(files) if path.is_dir() else [path]:
        size = file.stat().st_size
        digest.update(f"{size} ".encode())
        with file.open("rb") as f:
            if size <= 2 ** 26:
                digest.update(f.read())
                continue
            for i in range(256):
                f.seek((size - 4096) * i // 255)
                digest.update(f.read(4096))
    return digest.hexdigest()


def kind_of(manifest: dict) -> str:
    return manifest.get("kind", "pairs")


def read_manifest(folder: str | Path, kind: str = "pairs") -> dict:
    """Raises InputError when there is none, it is damaged or it is of another kind."""
    path, (noun, command, *_) = Path(folder) / "manifest.json", KINDS[kind]
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a folder of {noun} made by {command}")
    try:
        manifest = parse_json(path.read_bytes())
        height, width = manifest["size"]
        numbers = [height, width, *manifest["latent_shape"], manifest["count"]]
        names = [manifest["model"], kind_of(manifest)]
        for entry in manifest["shards"]:
            numbers += [entry["first"], entry["count"], entry["bytes"]]
            names += [entry["file"], entry["sha256"]]
        if not all(type(n) is int and n >= 0 for n in numbers) or \
                not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError("sizes are whole numbers, files stand beside it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: damaged, not the manifest of {noun} "
                         f"({type(error).__name__}: {short(error)})") from error
    if kind_of(manifest) != kind:
        raise InputError(f"{path}: of {short(kind_of(manifest))}; expected a folder of {noun} made by {command}")
    return manifest


def write_manifest(folder: str | Path, manifest: dict) -> None:
    with replacing(Path(folder) / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest, indent=1))


def save_shard(folder: str | Path, kind: str, first: int, tensors: dict[str, Tensor],
               prompts: list[str]) -> dict:
    """Write what a shard of this kind holds from index `first` on: its entry for the manifest."""
    n = len(prompts)
    path = Path(folder) / f"{kind}_{first:08d}-{first + n - 1:08d}.safetensors"
    # Not in the file's metadata, whose order in the file differs from one writing to the next.
    text = torch.frombuffer(bytearray(json.dumps(prompts).encode()), dtype=torch.uint8)
    save_safetensors(path, tensors | dict(index=torch.arange(first, first + n), prompts=text))
    return dict(file=path.name, first=first, count=n, bytes=path.stat().st_size, sha256=sha256(path))


def shard_fault(folder: str | Path, manifest: dict, entry: dict, every_byte: bool = True) -> str:
    """What is wrong with a finished shard, "" if nothing; without `every_byte` only size and header count."""
    path, n = Path(folder) / entry["file"], entry["count"]
    if not path.is_file():
        return "missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{path.stat().st_size} bytes, expected {entry['bytes']}"
    try:
        tensors = open_tensors(path)
    except InputError:
        return "damaged header"
    kind, latents = kind_of(manifest), (n, *manifest["latent_shape"])
    expected = {name: (n,) if name == "w" else latents for name in KINDS[kind].tensors} | {"index": (n,)}
    expected |= dict(pooled=(n, *manifest["shapes"]["pooled"])) if kind == "text" else {}
    wrong = [name for name, shape in expected.items() if tensors.shapes.get(name) != shape]
    if wrong or "prompts" not in tensors:
        return f"another shape of {some(wrong or ['prompts'])}"
    if every_byte and sha256(path) != entry["sha256"]:
        return "its sha256 is not that of the manifest"
    if every_byte and tensors["index"].tolist() != list(range(entry["first"], entry["first"] + n)):
        return f"not the {kind} {entry['first']} to {entry['first'] + n - 1}"
    return ""


def resume_shards(folder: Path, kind: str, same: dict, count: int,
                  size: int) -> tuple[dict, list[tuple[int, int]]]:
    """(manifest with the shards that can stay, (first index, count) of each to make) for `count` pairs or
    latents, `size` to a shard. `same`: the settings, as JSON gives them back; InputError for other ones."""
    manifest = {"shards": []}
    if (folder / "manifest.json").exists():
        manifest = read_manifest(folder, kind)
    elif any(folder.glob(f"{kind}_*-*.safetensors")):
        raise InputError(f"{folder}: holds shards but no manifest.json; pass another --out")
    changed = [f"{name} {short(value, 60)} (was {short(manifest.get(name), 60)})" for name, value in same.items()
               if manifest["shards"] and manifest.get(name) != value]
    if changed:
        raise InputError(f"{folder}: begun with other settings: {', '.join(changed)}; pass another --out "
                         "or the flags and files that it was begun with")
    stay = [entry for entry in manifest["shards"]
            if not shard_fault(folder, manifest, entry, every_byte=False)]
    done = {entry["first"]: entry["count"] for entry in stay}
    todo = [(first, n) for first in range(0, count, size)
            if done.get(first, 0) < (n := min(size, count - first))]
    return same | {"count": count, "shards": stay}, todo


def add_shard(folder: Path, manifest: dict, entry: dict) -> None:
    """Name a shard in the manifest, in place of one that begins where it does."""
    others = [other for other in manifest["shards"] if other["first"] != entry["first"]]
    manifest["shards"] = sorted([*others, entry], key=lambda entry: entry["first"])
    write_manifest(folder, manifest)


def sweep_shards(folder: Path, manifest: dict) -> None:
    """Remove what killed runs left half written, and shards that others have replaced."""
    named = {entry["file"] for entry in manifest["shards"]}
    ours = re.compile(kind_of(manifest) + r"_\d{8,}-\d{8,}\.safetensors(\.tmp)?")
    for path in folder.iterdir():  # half-written ones end in .tmp; what somebody has laid beside them stays
        if ours.fullmatch(path.name) and path.name not in named:
            path.unlink()


def verify_shards(folder: Path, kind: str) -> None:
    """Check every byte. Damaged shards leave the manifest, so that the next run makes them again."""
    manifest = read_manifest(folder, kind)
    faults = {entry["file"]: fault for entry in bar(manifest["shards"], unit="shard")
              if (fault := shard_fault(folder, manifest, entry))}
    manifest["shards"] = [entry for entry in manifest["shards"] if entry["file"] not in faults]
    whole = sum(entry["count"] for entry in manifest["shards"])
    found = f"{folder}: {whole} of {manifest['count']} {kind} are there and whole"
    if faults:  # of what the manifest names by now: a collection may be under way
        now = read_manifest(folder, kind)
        write_manifest(folder, now | dict(shards=[entry for entry in now["shards"] if entry["file"] not in faults]))
        found += "; damaged: " + ", ".join(f"{file} ({fault})" for file, fault in faults.items())
    if faults or whole < manifest["count"]:
        raise InputError(f"{found}; run again without --verify to make the others")
    print(found)


class Pairs:
    """The finished ODE pairs, latents or encoded prompts of a folder, whose kind the manifest says. `total`: how
    many it will have."""

    def __init__(self, folder: Path, manifest: dict):
        self.folder, self.manifest, self.kind = folder, manifest, KINDS[kind_of(manifest)]
        self.shards, self.total = manifest["shards"], manifest["count"]
        self.starts = [0, *accumulate(entry["count"] for entry in self.shards)]
        self.opened: dict[int, Tensors] = {}
        self.prompts: dict[int, list[str]] = {}  # of the shards whose bytes have been checked

    def __len__(self) -> int:
        return self.starts[-1]

    def __str__(self) -> str:
        height, width = self.manifest["size"]
        unfinished = f" of {self.total}, not all collected yet" * (len(self) < self.total)
        return (f"{self.folder}: {self.kind.noun} of {self.manifest['model']} at {height}x{width}, "
                f"{len(self)}{unfinished}")

    def digest(self) -> str:
        """Tells whether the folder is still what it was when a run began."""
        return new_sha256(json.dumps([entry["sha256"] for entry in self.shards]).encode()).hexdigest()[:16]

    def all_prompts(self, most: int | None = None) -> list[str | None]:
        """Of every entry, in order, or of the first `most`; the shards' other bytes are not read. Raises InputError
        for damaged prompts."""
        found = []
        for entry in self.shards:
            if most is not None and len(found) >= most:
                break
            found += self.prompts_of(entry, open_tensors(self.folder / entry["file"]))
        return found[:most]

    def prompts_of(self, entry: dict, tensors: Tensors) -> list[str | None]:
        """Only encoded prompts have None, their unconditional. Raises InputError for damaged prompts."""
        kinds = str | None if kind_of(self.manifest) == "text" else str
        try:
            prompts = parse_json(tensors["prompts"].numpy().tobytes())
            if len(prompts) != entry["count"] or not all(isinstance(prompt, kinds) for prompt in prompts):
                raise ValueError
            "".join(filter(None, prompts)).encode()  # no halves of a surrogate pair, which no tokenizer takes
        except (ValueError, TypeError):
            raise InputError(damaged(tensors.path, "damaged prompts", self.kind)) from None
        return prompts

    def shard(self, k: int) -> Tensors:
        if k not in self.opened:
            path = self.folder / self.shards[k]["file"]
            fault = shard_fault(self.folder, self.manifest, self.shards[k], every_byte=k not in self.prompts)
            if fault:
                raise InputError(damaged(path, fault, self.kind))
            if len(self.opened) >= 256:  # an open file each
                self.opened.pop(next(iter(self.opened)))
            self.opened[k] = open_tensors(path)
            if k not in self.prompts:
                self.prompts[k] = self.prompts_of(self.shards[k], self.opened[k])
        return self.opened[k]

    def read(self, indices: list[int]) -> tuple[Tensor | list[str], ...]:
        """(x_T and x_0 (B C h w or B T C h w), prompts), of latents (x_0, prompts), of encoded prompts (context
        (B L D), pooled (B P), prompts); float32 on the CPU. An index is a place in range(len).

        Reads these only; the first time all of their shard, and raises InputError if it is damaged."""
        latents = {name: [] for name in self.kind.tensors if name != "w"}
        prompts = []
        for i in indices:
            i = range(len(self))[i]
            k = bisect_right(self.starts, i) - 1
            tensors, place = self.shard(k), i - self.starts[k]
            for name in latents:
                latents[name].append(tensors.rows(name, place, place + 1))
            prompts.append(self.prompts[k][place])
        return *(torch.cat(parts).float() for parts in latents.values()), prompts


def damaged(path: Path, fault: str, kind: Kind) -> str:
    return f"{path}: {fault}; " + kind.mend.format(kind.command, path.parent)


def check_shards(folder: Path, manifest: dict) -> None:
    """Raises InputError when a finished shard is missing or cut short; its bytes are not read."""
    for entry in manifest["shards"]:
        if fault := shard_fault(folder, manifest, entry, every_byte=False):
            raise InputError(damaged(folder / entry["file"], fault, KINDS[kind_of(manifest)]))


def open_pairs(folder: str | Path, model: str, latent_shape: tuple[int, ...], kind: str = "pairs",
               alike: Collection[str] = ()) -> Pairs:
    """The pairs in a folder of collect_odes.py, or the "latents" in one of models/job/latents.py, of this model or
    one of those `alike`. Raises InputError for another model or size, when none is finished, and when a shard is
    missing or cut short; its bytes are checked when it is first read."""
    folder, manifest = Path(folder), read_manifest(folder, kind)
    found, expected = (" x ".join(map(str, shape)) for shape in (manifest["latent_shape"], latent_shape))
    if manifest["model"] not in (model, *alike) or found != expected:
        height, width = manifest["size"]
        raise InputError(f"{folder}: {kind} of {manifest['model']} at {height}x{width}, latents {found}; "
                         f"expected {model}, latents {expected}")
    check_shards(folder, manifest)
    if not manifest["shards"]:
        raise InputError(f"{folder}: 0 of {manifest['count']} {kind} are finished; "
                         f"let {KINDS[kind].command} go on")
    return Pairs(folder, manifest)
