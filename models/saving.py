"""Files that are written whole or not at all, and the checksum of exported ones."""
import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class WriteError(OSError):
    """What could not be written, and why: "FILE (No space left on device)"."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to. It takes the place of `path` when the block ends and is
    removed when the block fails, so that nobody, killed or reading, ever meets half a file. Raises WriteError."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            settled(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise WriteError(f"{path} ({getattr(error, 'strerror', None) or error})") from error


def settled(path: Path) -> None:
    """Wait until the disk has the file: else a power cut can leave an empty one under the name that it is given next,
    and a folder of shards with an empty manifest.json is lost."""
    with path.open("rb") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network disks do not know it
                raise


def checksum(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> str:
    """CRC-32 of all that an exported file says: names, dtypes, shapes and bytes of its tensors, and its metadata.
    2.5 GB/s on one core."""
    crc = 0
    for name in sorted(tensors):
        t = tensors[name]
        crc = zlib.crc32(f"{name} {t.dtype} {tuple(t.shape)}".encode(), crc)
        crc = zlib.crc32(t.reshape(-1).view(torch.uint8).numpy(), crc)
    notes = sorted((key, value) for key, value in metadata.items() if key != "dmdx.crc32")
    return f"{zlib.crc32(json.dumps(notes).encode(), crc):08x}"


def sort_metadata(path: Path) -> None:
    """Equal tensors and metadata make equal files: safetensors writes the metadata in an order of chance."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length))


def save_safetensors(path: str | Path, tensors: dict[str, Tensor],
                     metadata: dict[str, str] | None = None) -> None:
    """Write a .safetensors file, replacing `path` only when it is whole. An exported generator or adapter, which
    says its dmdx.model, gets a checksum."""
    whole, memory = {}, set()
    for name, t in tensors.items():
        t = t.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory, as tied weights and slices do.
        whole[name] = t.clone() if t.untyped_storage().data_ptr() in memory else t
        memory.add(t.untyped_storage().data_ptr())
    metadata = {"format": "pt", **(metadata or {})}
    if "dmdx.model" in metadata:
        metadata["dmdx.crc32"] = checksum(whole, metadata)
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata)
        sort_metadata(temporary)
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # safetensors leaves it to its owner alone
