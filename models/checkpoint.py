"""Checkpoint files: finding them, reading tensors or only rows of tensors, strict loading.

Nothing is read before it is asked for: opening a 16 GB file reads its header. Whatever the user can mend is
an InputError of one sentence: which file, the first few names, what was expected.
"""
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from models.parse import InputError, check_plain, check_stored, parse_json, read_header, short, some
from models.saving import replacing, save_safetensors

__all__ = ["InputError", "replacing", "save_safetensors", "some"]  # of other files, for those who import them from here
TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


class Tensors(Mapping):
    """Read-only mapping name -> tensor in the file's own dtype, read when asked for, into memory of its own.

    `path` file, `shapes` name -> shape, `metadata` strings, `prefix` what `group` has stripped."""

    def __init__(self, path: Path, shapes: dict[str, tuple], read: Callable[[str, slice | None], Tensor],
                 metadata: dict[str, str] | None = None, prefix: str = ""):
        self.path, self.shapes, self.metadata, self.prefix = path, shapes, metadata or {}, prefix
        self.read = read  # of a name: the rows in the slice, or the whole tensor for None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(f"{self.path}: no tensor {self.prefix}{name}")
        return self.read(name, None)

    def __contains__(self, name: str) -> bool:  # Mapping's own would read the tensor
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """tensors[name][start:stop], reading only these rows."""
        return self.read(name, slice(start, stop))

    def group(self, prefix: str) -> "Tensors":
        """The tensors whose names start with `prefix`, without it. Raises InputError when there are none."""
        shapes = {name[len(prefix):]: shape for name, shape in self.shapes.items() if name.startswith(prefix)}
        if not shapes:
            groups = dict.fromkeys(self.prefix + ".".join(name.split(".")[:2]) for name in self.shapes)
            raise InputError(f"{self.path}: expected tensors named {self.prefix}{prefix}*, "
                             f"found {some(groups, 6)}")
        return Tensors(self.path, shapes, lambda name, rows: self.read(prefix + name, rows), self.metadata,
                       self.prefix + prefix)


# ---- reading -----------------------------------------------------------------------------------------------

def open_tensors(path: str | Path) -> Tensors:
    """A .safetensors file, a PyTorch file that `weights_only=True` can read, the `*.index.json` of a sharded
    checkpoint, or a folder with one of these. Raises InputError for all else, and for damaged files."""
    return unwrapped(unscaled(open_file(Path(path))))


def open_file(path: Path) -> Tensors:
    if path.is_dir():
        path = weights_in(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; expected a checkpoint")
    if path.name.endswith(".index.json"):
        return open_shards(path)
    if path.suffix == ".safetensors":
        return open_safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return open_torch(path)
    raise InputError(f"{path}: not a tensor file; expected .safetensors, .index.json or one of "
                     f"{', '.join(TORCH_SUFFIXES)}")


def weights_in(folder: Path) -> Path:
    """The one checkpoint of a folder: an index before its shards, safetensors before pickles."""
    kinds = (".safetensors.index.json", ".safetensors", ".index.json", *TORCH_SUFFIXES)
    for pattern in ("[!.]*" + kind for kind in kinds):  # macOS leaves ._NAME beside each
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise InputError(f"{folder}: holds several checkpoints; expected one of "
                             f"{some((file.name for file in files), 6)}")
        if files:
            return files[0]
    raise InputError(f"{folder}: no weights in this folder; expected *.safetensors, *.index.json or *.bin")


def open_safetensors(path: Path) -> Tensors:
    """Read as a plain file: the safetensors package maps it whole, which counts as memory of every process
    and fails for a file larger than what is free."""
    spans, metadata, before = read_header(path)
    file = path.open("rb")

    def read(name: str, rows: slice | None) -> Tensor:
        dtype, shape, start, stop = spans[name]
        if rows is not None:
            row = math.prod(shape[1:]) * dtype.itemsize
            first, last, _ = rows.indices(shape[0])
            start, stop, shape = start + first * row, start + last * row, (last - first, *shape[1:])
        t = torch.empty(shape, dtype=dtype)
        file.seek(before + start)
        if file.readinto(t.view(-1).view(torch.uint8).numpy()) != stop - start:
            raise InputError(f"{path}: changed while it was being read; {name} is cut short")
        return t

    return Tensors(path, {name: shape for name, (_, shape, *_) in spans.items()}, read, metadata)


def open_torch(path: Path) -> Tensors:
    zipped = zipfile.is_zipfile(path)
    try:
        check_stored(path, zipped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about TorchScript, which is refused below
            # Only the zip format can be mapped; before PyTorch 1.6 files were plain pickles.
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except InputError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        wants = re.search(r"GLOBAL (\S+)", str(error))
        if wants or "TorchScript" in str(error):
            code = f"calls {wants[1]}" if wants else "is a TorchScript program"
            raise InputError(f"{path}: refused, because reading it would run code (it {code}); "
                             "expected a file of tensors only, such as .safetensors") from error
        raise InputError(f"{path}: not a PyTorch file, or truncated ({short(error, 80)})") from error
    # Trainers wrap the weights: {"state_dict": {...}, "epoch": 3}, {"module": {...}}.
    sets, top = {}, tensors_of(data)
    if isinstance(data, dict):
        sets = {key: found for key, value in data.items() if (found := tensors_of(value))}
    if any(top.keys() & found.keys() for found in sets.values()):  # the weights, and beside them their average
        sets["at the top"] = top
    elif not sets or len(top) > max(map(len, sets.values())):  # beside the weights a trainer may keep a counter
        sets = {"": top}
    if len(sets) > 1:
        raise InputError(f"{path}: holds several sets of tensors ({some(sets)}); expected one")
    tensors = next(iter(sets.values()), None)
    if not tensors:
        raise InputError(f"{path}: no tensors in this file; expected a dictionary name -> tensor")
    check_plain(path, tensors)

    def read(name: str, rows: slice | None) -> Tensor:
        return (tensors[name] if rows is None else tensors[name][rows]).clone()

    return Tensors(path, {name: tuple(t.shape) for name, t in tensors.items()}, read)


def tensors_of(data) -> dict[str, Tensor]:
    if not isinstance(data, dict):
        return {}
    return {name: t.detach() for name, t in data.items() if isinstance(name, str) and isinstance(t, Tensor)}


def unwrapped(tensors: Tensors) -> Tensors:
    """Without what DDP or torch.compile has put before every name."""
    for prefix in ("module.", "_orig_mod."):
        if tensors.shapes and all(name.startswith(prefix) for name in tensors):
            return unwrapped(tensors.group(prefix))
    return tensors


def open_shards(path: Path) -> Tensors:
    try:
        places = parse_json(path.read_bytes())["weight_map"]
        files = sorted(set(places.values()))
        outside = [file for file in files if Path(file).name != file or file.endswith(".index.json")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{path}: expected JSON with "weight_map": {{tensor name: file name}}') from error
    if outside:
        raise InputError(f"{path}: names {some(outside)}; expected tensor files beside it")
    absent = [file for file in files if not (path.parent / file).is_file()]
    if absent:
        raise InputError(f"{path}: {len(absent)} of its {len(files)} files are not beside it: {some(absent)}")
    shards = {file: open_file(path.parent / file) for file in files}
    lost = [f"{name} in {file}" for name, file in places.items() if name not in shards[file]]
    if lost:
        raise InputError(f"{path}: {len(lost)} tensors are not in the files it names: {some(lost)}")
    # What one of them announces holds for all; a checksum is that of its own file.
    notes = {key: value for shard in shards.values() for key, value in shard.metadata.items() if key != "dmdx.crc32"}
    return Tensors(path, {name: shards[file].shapes[name] for name, file in places.items()},
                   lambda name, rows: shards[places[name]].read(name, rows), notes)


def unscaled(tensors: Tensors) -> Tensors:
    """ComfyUI's scaled fp8 files hold each weight divided by a scale, and the scale (`scale_weight`, in newer
    files `weight_scale`): multiplied again here, and the scales hidden. Other files pass unchanged."""
    scales = {}
    for name, shape in tensors.shapes.items():
        stem, _, last = name.rpartition(".")
        if last in ("scale_weight", "weight_scale") and f"{stem}.weight" in tensors:
            if math.prod(shape) != 1:
                raise InputError(f"{tensors.path}: {name} is {shape}; expected one fp8 scale per tensor")
            scales[f"{stem}.weight"] = name
    if not scales:
        return tensors
    hidden = ("scale_weight", "weight_scale", "scale_input", "input_scale", "comfy_quant", "scaled_fp8")

    def read(name: str, rows: slice | None) -> Tensor:
        t = tensors.read(name, rows)
        return t.float() * tensors[scales[name]].float() if name in scales else t

    shapes = {name: shape for name, shape in tensors.shapes.items() if name.rpartition(".")[2] not in hidden}
    return Tensors(tensors.path, shapes, read, tensors.metadata)


def joined(tensors: Tensors, parts: dict[str, list[tuple[str, int, int]]]) -> Tensors:
    """Tensors made of rows of others: name -> the [(name in `tensors`, first row, last row + 1), ...] that
    stand in it from top to bottom. Reads no more than the rows asked for."""
    shapes = {name: (sum(stop - start for _, start, stop in rows), *tensors.shapes[rows[0][0]][1:])
              for name, rows in parts.items()}

    def read(name: str, wanted: slice | None) -> Tensor:
        first, last, _ = (wanted or slice(None)).indices(shapes[name][0])
        found, before = [], 0
        for source, start, stop in parts[name]:
            low, high = (start + min(max(bound - before, 0), stop - start) for bound in (first, last))
            found.append(tensors.rows(source, low, high))
            before += stop - start
        return torch.cat(found)

    return Tensors(tensors.path, shapes, read, tensors.metadata)


def renamed(tensors: Tensors, names: dict[str, str]) -> Tensors:
    """The tensors under other names, new name -> name in the file."""
    return Tensors(tensors.path, {new: tensors.shapes[old] for new, old in names.items()},
                   lambda new, rows: tensors.read(names[new], rows), tensors.metadata, tensors.prefix)


def respelled(name: str, rules: Iterable[tuple[str | re.Pattern, str]]) -> str:
    """A tensor's name after these substitutions (pattern, replacement), one after the other."""
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


# ---- loading -----------------------------------------------------------------------------------------------

def check_names(tensors: Tensors, expected: dict[str, tuple], ignore: tuple[str, ...] = ()) -> None:
    """Strict both ways: raises InputError unless the file holds exactly the expected names and shapes.
    `ignore`: fnmatch patterns of names that it may hold on top."""
    missing = [tensors.prefix + name for name in expected if name not in tensors]
    extra = [tensors.prefix + name for name in tensors
             if name not in expected and not any(fnmatchcase(name, pattern) for pattern in ignore)]
    wrong = [f"{tensors.prefix}{name} is {tensors.shapes[name]}, expected {tuple(shape)}"
             for name, shape in expected.items() if name in tensors and tensors.shapes[name] != tuple(shape)]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} expected tensors are missing ({some(missing)})")
    if extra:
        problems.append(f"{len(extra)} tensors are not expected ({some(extra)})")
    if wrong:
        problems.append(f"{len(wrong)} tensors have another shape ({some(wrong)})")
    if problems:
        other = "another architecture: " if 2 * (len(missing) + len(wrong)) > len(expected) else ""
        raise InputError(f"{tensors.path}: {other}{'; '.join(problems)}")


def check_values(tensors: Tensors, name: str, value: Tensor, floating: bool) -> None:
    """Of what was read of a tensor: raises InputError for NaN or infinity, and for whole numbers (`floating`)
    where a weight is expected. One pass without a copy, a hundredth of the time of reading from a disk."""
    if floating and not value.is_floating_point():
        kind = str(value.dtype).removeprefix("torch.")
        raise InputError(f"{tensors.path}: {tensors.prefix}{name} holds {kind} numbers, as quantised files "
                         "do; expected floating-point weights")
    if value.is_floating_point() and value.numel():
        low, high = torch.aminmax(value if value.dtype.itemsize > 1 else value.half())  # fp8 has no aminmax
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"{tensors.path}: {tensors.prefix}{name} holds NaN or infinity; "
                             "expected finite weights")


def load(net: nn.Module, tensors: Tensors, dtype: torch.dtype = torch.float32,
         ignore: tuple[str, ...] = ()) -> None:
    """Fill a whole network, usually built on `meta`; floating-point tensors become `dtype`. As strict as
    `check_names`. A weight that the network has under two names stays one; the file may hold it once."""
    weights, names = net.state_dict(keep_vars=True), {}
    for name, p in weights.items():
        names.setdefault(p, []).append(name)
    source = {p: next((name for name in same if name in tensors), same[0]) for p, same in names.items()}
    expected = {name: tuple(p.shape) for name, p in weights.items() if name in tensors or name == source[p]}
    check_names(tensors, expected, ignore)
    filled = {}
    for p, name in source.items():
        value = tensors[name]
        check_values(tensors, name, value, p.is_floating_point())
        value = value.to(dtype) if value.is_floating_point() else value
        filled[p] = nn.Parameter(value, p.requires_grad) if isinstance(p, nn.Parameter) else value
    net.load_state_dict({name: filled[p] for name, p in weights.items()}, assign=True)


# ---- finding -----------------------------------------------------------------------------------------------

def find(file: str, ckpt: str | Path | None, repo: str, advice: str = "") -> Path:
    """Where `file` is: in `ckpt` when that is given (the file or folder itself, or a local copy of `repo`),
    else downloaded from the Hugging Face repository `repo` as HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE say. A
    name that ends in "/" is a folder of weights, settings and tokenizer files. Raises InputError, whose last
    words are `advice`: the flag that takes the file, where that is not --ckpt."""
    if ckpt is not None:
        if not Path(ckpt).exists():
            advice = advice or f"expected {file}" + f", as in {repo}" * bool(repo)
            raise InputError(f"{ckpt}: no such file or folder; {advice}")
        inside = Path(ckpt) / file
        return inside if inside.exists() else Path(ckpt)
    from huggingface_hub import constants, hf_hub_download, snapshot_download  # slow to import, seldom needed
    url = f"{constants.ENDPOINT}/{repo}"
    try:
        if file.endswith(".index.json"):  # the shards that it names are beside it
            return Path(snapshot_download(repo, allow_patterns=[file.partition(".")[0] + "*"])) / file
        if not file.endswith("/"):
            return Path(hf_hub_download(repo, file))
        patterns = [file + kind for kind in ("*.safetensors", "*.json", "*.txt", "*.model")]
        folder = Path(snapshot_download(repo, allow_patterns=patterns, ignore_patterns=["*.fp16.*"])) / file
        if folder.is_dir():
            return folder
        reason = f"no such folder in {url}"
    except Exception as error:  # of many kinds, which differ between versions of huggingface_hub
        reason = why(error, url)
    raise InputError(f"{file} of {repo}: {reason}; {advice or '--ckpt PATH takes a local copy'}")


def why(error: BaseException, url: str) -> str:
    """The reason of a failed download, in words."""
    from huggingface_hub import errors
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # what stood in the way of the download
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"access refused (HTTP {status}): check the name, accept the terms on {url} and set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no repository at {url}"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "not downloaded yet, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.EntryNotFoundError):
        return f"no such file in {url}"
    return f"could not be downloaded from {url} ({(str(error) or type(error).__name__).splitlines()[0]})"
