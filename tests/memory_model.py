"""GPU memory of a training script, without a GPU: the script itself, on tensors that have no values.

    python tests/memory_model.py adm.py --model sd3-medium --fake-lora --batch-size 1 --micro-batch 1
    python tests/memory_model.py --world 32 --trace adm.py --model sdxl --batch-size 128 --offload
    CONFIG='{"depth": 4}' python tests/memory_model.py adm.py --model sd3-medium   # with 4 of its blocks

Prints, for each phase of one iteration, the largest GiB of live tensors on rank 0 of --world; with --trace
also what lives at the largest of all. --random-weights and --profile 1 are added to the script's flags.

Shapes, dtypes and devices are those of a run on GPUs: torch's FakeTensorMode checks them, FSDP shards,
offloads and gathers, collectives return at once. A number that the script reads is 0.5, an integer 0. Not
counted: the allocator's rounding above 512 bytes and its fragmentation, workspaces of cuDNN, buffers of NCCL,
the CUDA context.

Needs g++, which compiles guard.cpp into out/ at the first run, and a torch without CUDA (2.13.0+cpu).
"""
import argparse
import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
import weakref
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent


def build_guard() -> Path:
    source, guard = ROOT / "tests" / "guard.cpp", ROOT / "out" / f"guard-{version('torch')}.so"
    if not guard.exists() or guard.stat().st_mtime < source.stat().st_mtime:
        guard.parent.mkdir(exist_ok=True)
        part = guard.with_suffix(f".{os.getpid()}")  # another process may be building it too
        torch_folder = Path(find_spec("torch").origin).parent
        subprocess.run(["g++", "-O1", "-fPIC", "-shared", "-std=c++20", f"-I{torch_folder}/include", source,
                        "-o", part, f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu",
                        f"-Wl,-rpath,{torch_folder}/lib"], check=True)
        part.rename(guard)
    return guard


ctypes.CDLL(str(build_guard()))  # before torch, which looks once whether there is CUDA, when it is imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.distributed.fsdp._fully_shard import _fsdp_init  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

sys.path.insert(0, str(ROOT))
# No module of the project is imported here: they take the attention out of torch that `install` puts into it.
GIB = 2 ** 30


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations return for as long as they live: "cuda" and "cpu" -> bytes."""

    def __init__(self, trace: bool = False):
        super().__init__()
        self.live, self.peak, self.storages = Counter(), Counter(), {}
        self.trace, self.largest, self.at_largest = trace, 0, ""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 0.5 if args[0].is_floating_point() else 0
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor this rank's part has memory
                self.add(tensor.untyped_storage(), tensor, operation)
        return out

    def add(self, storage, tensor: Tensor, operation) -> None:
        key, device = id(storage), tensor.device.type
        if key not in self.storages:
            label = f"{operation} {list(tensor.shape)} at {where()}" if self.trace else ""
            gone = weakref.ref(storage, lambda _: self.drop(key))
            self.storages[key] = gone, device, 0, label
            self.resize(storage, storage.nbytes())

    def resize(self, storage, size: int) -> None:
        if id(storage) in self.storages:
            gone, device, before, label = self.storages[id(storage)]
            size = -(-size // 512) * 512  # the CUDA allocator's step
            self.storages[id(storage)] = gone, device, size, label
            self.live[device] += size - before
            self.peak[device] = max(self.peak[device], self.live[device])
            if self.trace and device == "cuda" and self.live["cuda"] > 1.005 * self.largest:
                self.largest, self.at_largest = self.live["cuda"], self.listing()

    def drop(self, key: int) -> None:
        _, device, size, _ = self.storages.pop(key)
        self.live[device] -= size

    def listing(self) -> str:
        groups = Counter()
        for _, device, size, label in self.storages.values():
            groups[label] += size * (device == "cuda")
        return "\n".join([f"{self.live['cuda'] / GIB:.2f} GiB at {where()}:"]
                         + [f"{size / GIB:8.3f}  {label}" for label, size in groups.most_common(25)])


def where() -> str:
    """The innermost three lines of the project that are running: in a backward, those that it recomputes."""
    frame, lines = sys._getframe(1), []
    while frame and len(lines) < 3:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and "site-packages" not in path.parts:
            lines.append(f"{path.name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines) or "backward"


class Idle:
    """A CUDA stream and a CUDA event, on which nothing runs."""
    device = torch.device("cuda:0")

    def __init__(self, *args, **options):
        pass

    def record_event(self):
        return self

    def nothing(self, *args):
        pass

    wait_stream = wait_event = record = wait = synchronize = is_capturing = nothing


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
              scale: float | None = None, dropout_p: float = 0.0, enable_gqa: bool = False) -> Tensor:
    """What scaled_dot_product_attention runs on CUDA: flash attention if that takes the input, else the
    memory-efficient one. Neither allocates the matrix of all queries and keys."""
    if len({q.dtype, k.dtype, v.dtype}) > 1:
        raise RuntimeError(f"attention of {q.dtype}, {k.dtype} and {v.dtype}")
    if q.dtype != torch.float32 and q.shape[-1] <= 256 and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*q.shape[:2], *attn_mask.shape[-2:])
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, keep, 0.0, is_causal, scale=scale)[0]


class SiLU(torch.autograd.Function):
    """With one kernel each way, as on CUDA: of fake tensors torch takes the backward apart into seven."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]


def apply(module, change, recurse=True):
    """nn.Module._apply with new parameters. Torch's swaps the contents of fake ones, which it cannot while a
    weak reference watches them."""
    for child in module.children():
        child._apply(change)
    with torch.no_grad():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = torch.nn.Parameter(change(p), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return module


def install(world: int, counted: LiveBytes) -> None:
    """Have torch take this process for rank 0 of `world`, each with a GPU. `patch`, here and below, raises
    AttributeError when torch or the project has no such name any more."""
    if torch.version.cuda:
        sys.exit(f"torch {torch.__version__}: expected a build without CUDA, such as {version('torch')}+cpu")
    patch.multiple(
        torch.cuda, Stream=Idle, Event=Idle, current_stream=Idle, is_available=lambda: True,
        device_count=lambda: world,
        stream=contextlib.nullcontext, current_device=lambda: 0, set_device=lambda device: None,
        synchronize=lambda: None, max_memory_allocated=lambda: counted.peak["cuda"], _lazy_init=lambda: None,
        reset_peak_memory_stats=lambda: counted.peak.update(cuda=counted.live["cuda"] - counted.peak["cuda"]),
    ).start()
    patch.multiple(
        Tensor, pin_memory=lambda self: self, is_pinned=lambda self: True,
        new_tensor=lambda self, value, device=None: torch.tensor(value).to(device or self.device, self.dtype),
    ).start()
    patch.object(torch.accelerator, "current_stream", Idle).start()
    save_on_cpu = torch.autograd.graph.save_on_cpu
    patch.object(torch.autograd.graph, "save_on_cpu", lambda pin_memory: save_on_cpu(pin_memory=False)).start()
    patch.object(torch.nn.functional, "scaled_dot_product_attention", attention).start()
    patch.object(torch.nn.functional, "silu", lambda x, inplace=False: SiLU.apply(x)).start()
    patch.object(torch.nn.Module, "_apply", apply).start()
    resize, move = torch.UntypedStorage.resize_, _fsdp_init._move_states_to_device

    def resized(storage, size):  # FSDP frees gathered weights by this, which is no operation
        resize(storage, size)
        counted.resize(storage, size)

    def moved(params, buffers, device):  # which assigns to .data: a fake tensor keeps its device then
        move(params, buffers, device)
        for tensor in [*params, *buffers]:
            if tensor.device.type == "cpu":
                tensor.fake_device = device

    patch.object(torch.UntypedStorage, "resize_", resized).start()
    patch.object(_fsdp_init, "_move_states_to_device", moved).start()
    os.environ.update(RANK="0", WORLD_SIZE=str(world), LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(world))
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


def measure(script: str, argv: list[str], config: dict, counted: LiveBytes) -> dict[str, float]:
    """One iteration of a training script: phase -> GiB at its peak. `config` replaces parts of the
    preset's network."""
    script = importlib.import_module(script.removesuffix(".py"))
    from models import data, lora
    from models.job import job, networks
    from models.presets import PRESETS
    args = script.parse_args(["--random-weights", "--profile", "1", *argv])
    preset, peaks, init_distributed = PRESETS[args.model], {}, script.init_distributed

    def mesh(shard_ranks):  # is made of tensors with values
        with _disable_current_modes():
            return init_distributed(shard_ranks)

    with contextlib.ExitStack() as stack:
        for owner, names in {
            script: dict(init_distributed=mesh),
            data: dict(noise=lambda shape, seed, iteration, name, indices: torch.empty(len(indices), *shape),
                       NoiseAhead=lambda shape, seed: lambda iteration, name, indices: torch.empty(len(indices), *shape),
                       uniform=lambda seed, iteration, name, indices: torch.empty(len(indices))),
            job: dict(count_stuck=lambda params, lr: (0, sum(p.numel() for p in params))),
            job.Job: dict(print_profile=lambda self: peaks.update(self.gib)),
            networks: dict(fill_random=lambda net, seed: None),
            lora: dict(init_lora=lambda net, name, seed: None),
        }.items():
            stack.enter_context(patch.multiple(owner, **names))
        stack.enter_context(patch.dict(PRESETS, {args.model: preset._replace(config=preset.config | config)}))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(counted)
        script.main(args)
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=int, default=1, help="ranks that share each network")
    parser.add_argument("--trace", action="store_true", help="list what lives at the largest peak")
    parser.add_argument("script", help="adm.py, adp.py, dmd.py or avdm2.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()
    counted = LiveBytes(args.trace)
    install(args.world, counted)
    peaks = measure(args.script, args.flags, json.loads(os.environ.get("CONFIG", "{}")), counted)
    for phase, gib in peaks.items():
        print(f"{phase:14} peak {gib:8.3f} GiB")
    print(f"{'host':14} peak {counted.peak['cpu'] / GIB:8.3f} GiB")
    if args.trace:
        print(counted.at_largest)


if __name__ == "__main__":
    main()
