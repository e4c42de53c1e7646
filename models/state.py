"""Saved states of a run: trained weights, optimizer state and counters, for any number of ranks.

    save_state(out / "state", global_iter, roles, progress)
    progress = load_state(complete_states(out / "state")[-1], roles)

torch.distributed.checkpoint writes a state: one .distcp file per rank, in which each tensor is a zip archive
of torch.save, and .metadata, the plan that tells where each lies. The plan and an entry of every archive are
pickles, which can run any program when torch loads them. Here they cannot: `read_plan` takes numbers and
texts from a plan, `read_piece` the elements from an archive.
"""
import io
import json
import math
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from models.checkpoint import InputError
from models.parallel import barrier, is_main, local_rows
from models.parse import check_nesting, parse_json
from models.saving import WriteError

COUNTERS = ("gen_iter", "global_iter", "skipped")  # of progress.json
KEPT = 2  # states of a run: where the newest is damaged, the one before it is taken
SUMMED = (".metadata", "progress.json")  # the files of a state without a checksum of their own
# Module -> what a plan names in it, when torch 2.11 to 2.13 wrote it.
NAMES = {
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties",
        "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch": {"Size", "float32"},
    "torch.serialization": {"_get_layout"},
    "builtins": {"getattr"},  # for a member of an enum, in some versions of Python
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
}
# Name -> (named parameters, optimizer).
Roles = dict[str, tuple[dict[str, nn.Parameter], torch.optim.Optimizer]]


def named_tensors(roles: Roles) -> dict[str, Tensor]:
    """Name in a state -> the tensor to save or to fill."""
    tensors = {}
    for role, (params, opt) in roles.items():
        for name, p in params.items():
            tensors[f"{role}.{name}"] = p.detach()
            for key, value in opt.state[p].items():
                tensors[f"opt.{role}.{name}.{key}"] = value
    return tensors


# ---- saving ------------------------------------------------------------------------------------------------

def save_state(folder: Path, iteration: int, roles: Roles, progress: dict[str, int]) -> Path:
    """Write the trained weights, their optimizer state and `progress`, which holds the COUNTERS, to
    folder/iter_XXXXXXXX through a temporary name: a folder without `.tmp` is complete. The KEPT
    newest states stay. Raises WriteError, and leaves the states that are there, when it cannot be written."""
    final, tensors = folder / f"iter_{iteration:08d}", named_tensors(roles)
    # `load_state` reads the elements alone, and could not tell another dtype or another order in memory.
    assert all(t.dtype == torch.float32 and local_rows(t)[0].is_contiguous() for t in tensors.values())
    temporary = final.with_suffix(".tmp")
    try:
        if is_main():
            for unfinished in folder.glob("iter_*.tmp"):  # of killed runs
                remove_state(unfinished)
            temporary.mkdir(parents=True)
        barrier()
        # A single process needs no collectives. Their large tensors would have OpenMP see more threads than cores,
        # and wait slowly from then on: iterations of a small network on a CPU take 2.5 times as long.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # says dcp of `no_dist`
            dcp.save(tensors, checkpoint_id=temporary, no_dist=dist.get_world_size() == 1)
        if is_main():
            (temporary / "progress.json").write_text(json.dumps(progress))
            sums = {name: sha256((temporary / name).read_bytes()).hexdigest() for name in SUMMED}
            (temporary / "sha256.json").write_text(json.dumps(sums))
            if os.path.lexists(final):
                remove_state(final)
            os.replace(temporary, final)
            for old in complete_states(folder)[:-KEPT]:
                remove_state(old)
    except (OSError, CheckpointException) as error:
        free = shutil.disk_usage(folder).free / 1e9 if folder.is_dir() else 0.0
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        failures = [fault for fault, _ in getattr(error, "failures", {}).values()]
        raise WriteError(f"{final} ({reason(failures[0] if failures else error)}; "
                         f"{free:.3g} GB were free)") from error
    barrier()
    return final


def remove_state(path: Path) -> None:
    """Of one that was moved to another disk the link alone."""
    path.unlink() if path.is_symlink() else shutil.rmtree(path)


def complete_states(folder: Path) -> list[Path]:
    """Saved states in `folder`, oldest first; half-written ones and what else may be there are left out."""
    return sorted(path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d+", path.name) and path.is_dir())


# ---- resuming ----------------------------------------------------------------------------------------------

class Piece(NamedTuple):
    """Consecutive rows of a tensor and the bytes that hold them."""
    first: int  # row
    shape: tuple[int, ...]
    file: str
    offset: int
    length: int


class Named:
    """In place of every class and function that a plan names: keeps what it is given, does nothing."""
    __slots__ = ("args", "fields")

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, fields):
        self.fields = fields


class PlanUnpickler(pickle._Unpickler):
    """Builds containers, numbers, texts and Named, and imports nothing. Of Python's own class: the one in C
    takes as much memory as the largest number of a memo says."""

    def find_class(self, module: str, name: str) -> type:
        if name not in NAMES.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {f'{module}.{name}'[:80]!r}")
        return Named


def counts(values: Iterable) -> tuple[int, ...]:
    """The values, if they are counts. Raises ValueError."""
    values = tuple(values)
    if not all(type(value) is int and 0 <= value < 2 ** 63 for value in values):
        raise ValueError("a count is no whole number, or negative, or too large")
    return values


def read_plan(file: Path) -> dict[str, tuple[tuple[int, ...], list[Piece]]]:
    """Name -> (shape, pieces) of the tensors in a state; one without dimensions becomes a row of one element.
    Raises InputError for a plan that names anything outside of NAMES, and for a damaged one."""
    try:
        content = file.read_bytes()
        check_nesting(content)
        plan, tensors, places = PlanUnpickler(io.BytesIO(content)).load().fields, {}, {}
        for index, place in plan["storage_data"].items():
            places[index.fields["fqn"], counts(index.fields["offset"].args[0])] = place.fields
        for name, entry in plan["state_dict_metadata"].items():
            shape = counts(entry.fields["size"].args[0])
            tensors[name] = shape or (1,), []
            for chunk in entry.fields["chunks"]:
                start, size = (counts(chunk.fields[key].args[0]) for key in ("offsets", "sizes"))
                place = places[name, start]
                if any(start[1:]) or len(start) != len(shape) or size[1:] != shape[1:]:
                    raise ValueError(f"{name!r} is not cut along its first dimension")
                if not re.fullmatch(r"__\d+_\d+\.distcp", place["relative_path"]):
                    raise ValueError("a tensor outside of the .distcp files")
                tensors[name][1].append(Piece(start[0] if start else 0, size or (1,), place["relative_path"],
                                              *counts((place["offset"], place["length"]))))
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{file}: refused or damaged ({reason(error)}); expected the plan of a saved state, "
                         "which names nothing but tensors") from error
    return tensors


def read_progress(file: Path) -> dict[str, int]:
    """The COUNTERS of a state. Raises InputError for other contents."""
    try:
        progress = parse_json(file.read_bytes())
        return dict(zip(COUNTERS, counts(progress[name] for name in COUNTERS)))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{file}: not the counters of a saved state ({reason(error)}); "
                         f"expected whole numbers {', '.join(COUNTERS)}") from error


def read_piece(file: BinaryIO, piece: Piece) -> Tensor:
    """The elements from an archive of torch.save, whose pickle, `archive/data.pkl`, is not read. zipfile
    compares their CRC-32. Raises ValueError, or what zipfile raises, for a damaged archive."""
    file.seek(piece.offset)
    archive = zipfile.ZipFile(io.BytesIO(file.read(piece.length)))
    entry = archive.getinfo("archive/data/0")
    if archive.infolist()[0].header_offset:  # zipfile passes over what stands before an archive
        raise ValueError("an archive does not begin where the plan says")
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != 4 * math.prod(piece.shape):
        raise ValueError(f"{entry.file_size} bytes for a tensor {piece.shape}")
    return torch.frombuffer(bytearray(archive.read(entry)), dtype=torch.float32).view(piece.shape)


@torch.no_grad()
def load_state(path: Path, roles: Roles) -> dict[str, int]:
    """Read what `save_state` wrote, in place, on the same or another number of ranks; returns its progress.
    Runs nothing that the files contain. Raises InputError for a state of another model or a damaged one."""
    progress, plan = read_progress(path / "progress.json"), read_plan(path / ".metadata")
    opened = cache(lambda file: (path / file).open("rb"))
    try:
        for name, target in named_tensors(roles).items():
            target = target if target.ndim else target[None]
            if name.endswith(".ema") and name not in plan:  # its run kept no average: it begins at the weights
                name = name.removeprefix("opt.").removesuffix(".ema")
            if name not in plan:
                raise ValueError(f"Missing key {name}")
            shape, pieces = plan[name]
            if shape != tuple(target.shape):
                raise ValueError(f"Size mismatch: {name} is {shape}, expected {tuple(target.shape)}")
            rows, first = local_rows(target)
            last, absent = first + len(rows), len(rows)
            for piece in pieces:
                start, stop = max(first, piece.first), min(last, piece.first + piece.shape[0])
                if start < stop:
                    saved = read_piece(opened(piece.file), piece)
                    rows[start - first:stop - first] = saved[start - piece.first:stop - piece.first]
                    absent -= stop - start
            if absent > 0:
                raise ValueError(f"{absent} rows of {name} are missing")
    except Exception as error:  # a damaged archive can raise anything
        raise InputError(f"{path}: not a state of this model and these flags, or damaged "
                         f"({reason(error)})") from error
    return progress


def check_sums(path: Path) -> None:
    """Raises InputError if the small files of a state are not as they were written; without sha256.json they are
    not compared. `load_state` compares the CRC-32 of every tensor that it reads."""
    try:
        sums = parse_json((path / "sha256.json").read_bytes())
        damaged = [name for name in SUMMED if sha256((path / name).read_bytes()).hexdigest() != sums[name]]
    except FileNotFoundError:
        return
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"{path / 'sha256.json'}: damaged ({reason(error)})") from error
    if damaged:
        raise InputError(f"{path / damaged[0]}: damaged, its sha256 is another than when it was written")


def reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
