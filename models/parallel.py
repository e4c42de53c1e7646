"""Many GPUs, one or a CPU by the same lines: processes, FSDP2 sharding, loading, updates, save and resume.

Parameters and optimizer state stay float32, computation is bf16 on GPUs (FSDP's mixed precision). At learning
rates of 1e-7 and 1e-8 bf16 weights could not move; `count_stuck` counts the float32 ones that cannot either.
"""
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import get_total_norm
from torch.utils.checkpoint import checkpoint

from models.checkpoint import InputError, Tensors, check_names

# FSDP warns that an in-place operation on a network's output would be wrong; none is made here.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


# ---- processes ---------------------------------------------------------------------------------------------

def init_distributed(shard_ranks: int | None = None) -> tuple[torch.device, DeviceMesh]:
    """Process group and mesh, the same for torchrun and for a plain `python`: (device of this rank, mesh).

    The mesh has the dimensions (replicate, shard): each group of `shard_ranks` ranks (default: those of one
    node) holds one copy of every network (HSDP). Raises InputError when it does not divide the world size."""
    if "RANK" not in os.environ:  # not started by torchrun: a group of one that needs no port
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        world = int(os.environ["WORLD_SIZE"])
        store = dist.HashStore() if world == 1 else None
        # gloo serves the CPU tensors of --offload beside nccl.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store,
                                rank=int(os.environ["RANK"]), world_size=world)
    shard_ranks = shard_ranks or int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    if shard_ranks < 1 or dist.get_world_size() % shard_ranks:
        raise InputError(f"--shard-ranks {shard_ranks} does not divide the {dist.get_world_size()} processes")
    shape = (dist.get_world_size() // shard_ranks, shard_ranks)
    return device, init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


@cache
def _neighbours(count: int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_subgroups(count)[0]


def neighbours(count: int) -> dist.ProcessGroup:
    """The group of `count` consecutive ranks that holds this one; the first call is a collective."""
    return _neighbours(count, dist.group.WORLD)


def own_share(count: int, sequence: int = 1) -> list[int]:
    """Which of `count` samples this rank makes, where each `sequence` neighbours make the same: equally many
    on all ranks, because a sharded network needs all of them at once; the last sample fills the rest."""
    per_rank = -(-count // (dist.get_world_size() // sequence))
    first = dist.get_rank() // sequence * per_rank
    return [min(i, count - 1) for i in range(first, first + per_rank)]


def is_main() -> bool:
    return dist.get_rank() == 0


def print0(*args) -> None:
    if is_main():
        print(*args, flush=True)


def mean_over_ranks(values: list[Tensor]) -> list[float]:
    """The mean of each scalar over all ranks, in one collective."""
    stacked = torch.stack([v.detach().double().cpu() for v in values])
    dist.all_reduce(stacked)
    return (stacked / dist.get_world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """True on every rank when it is True on one."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value)
    return value.item() > 0


# ---- sharding ----------------------------------------------------------------------------------------------

def shard(net: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, offload: bool = False,
          checkpointing: bool = False) -> nn.Module:
    """FSDP2 per `net.blocks()`: computation in `dtype`, gradients reduced in float32, optional CPU offload,
    and non-reentrant activation checkpointing inside each unit. In place, also on `meta`."""
    cuda = mesh.device_type == "cuda"
    options = dict(
        mesh=mesh if mesh.shape[0] > 1 else mesh["shard"],
        # Inputs are cast by the networks themselves: FSDP would round the time t to bf16 too.
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                       cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy(),
        # The root too: else its gathered weights outlive an optimizer step when a no-grad forward came last.
        reshard_after_forward=True)
    # One process in float32 has nothing to share or cast; FSDP's hooks cost as much as a tiny network itself.
    alone = mesh.size() == 1 and dtype == torch.float32 and not offload
    for block in net.blocks():
        if checkpointing:  # as an instance attribute: parameter names stay those of the checkpoint
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        if not alone:
            fully_shard(block, **options)
    return net if alone else fully_shard(net, **options)


def settle(net: nn.Module) -> None:
    """Have FSDP initialise now and not at the first forward, where parameters that are frozen for a phase
    would count as never trained and have their gradients reduced in bf16."""
    if isinstance(net, FSDPModule):
        net._get_fsdp_state()._lazy_init()


def local_rows(p: Tensor) -> tuple[Tensor, int]:
    """This rank's part of a parameter and its first row in the whole; a plain tensor is its own part."""
    if not isinstance(p, DTensor):
        return p, 0
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), offset[0] if offset else 0


def materialise(net: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Give a sharded `meta` network its memory: parameters on the CPU under offload, buffers on the device.

    Whatever will be trained must require its gradient now: FSDP settles here the dtype of their reduction."""
    net.to_empty(device="cpu" if offload else device)
    settle(net)
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def load_sharded(net: nn.Module, tensors: Tensors, ignore: tuple[str, ...] = ()) -> None:
    """Fill a materialised network from a checkpoint, each rank reading only its own rows. Strict: raises
    InputError for missing, extra or mis-shaped tensors. Adapters (`.lora_`), which no base checkpoint holds,
    are left alone."""
    own = {name: p for name, p in [*net.named_parameters(), *net.named_buffers()] if ".lora_" not in name}
    check_names(tensors, {name: tuple(p.shape) for name, p in own.items()}, ignore)
    for name, p in own.items():
        local, first = local_rows(p)
        if isinstance(p, DTensor):
            local.copy_(tensors.rows(name, first, first + local.shape[0]))
        else:
            local.copy_(tensors[name])


@torch.no_grad()
def fill_random(net: nn.Module, seed: int) -> None:
    """Weights for --random-weights: normal with deviation 0.02, norms at 1, biases at 0."""
    for i, (name, p) in enumerate([*net.named_parameters(), *net.named_buffers()]):
        local, first = local_rows(p)
        # Equal on HSDP's copies.
        generator = torch.Generator(local.device).manual_seed(hash((seed, i, first)) % 2 ** 63)
        if name.endswith("bias"):
            local.zero_()
        elif local.ndim == 1:
            local.fill_(1)
        else:
            local.normal_(0, 0.02, generator=generator)


def full_tensors(named: list[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """(name, whole CPU tensor), one at a time, on rank 0 alone; a collective: every rank must exhaust it."""
    for name, p in named:
        whole = p.detach().full_tensor() if isinstance(p, DTensor) else p.detach()
        if is_main():
            yield name, whole.cpu()


# ---- updates -----------------------------------------------------------------------------------------------

def adamw(params: dict[str, nn.Parameter], lr: float) -> torch.optim.AdamW:
    """AdamW of App. B.5: betas (0, 0.99), no weight decay. Its state exists from the start: saving needs no
    special case. Fused: one kernel, where a loop over sharded tensors costs as much as a tiny network, and
    over offloaded ones would use one core."""
    opt = torch.optim.AdamW(params.values(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0, fused=True)
    for p in params.values():
        opt.state[p] = {"step": torch.zeros((), device=p.device),
                        "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return opt


def set_trainable(params: dict[str, nn.Parameter], on: bool) -> None:
    for p in params.values():
        p.requires_grad_(on)


def update(opt: torch.optim.Optimizer, loss: Tensor) -> tuple[float, float]:
    """Step and clear the gradients that `loss` (detached, this rank's mean) left: (loss over all ranks,
    gradient norm). A non-finite loss or norm skips the step on every rank alike; the caller sees it in the
    returned values."""
    grads = [p.grad for group in opt.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm(grads) if grads else torch.zeros(())
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    loss, = mean_over_ranks([loss])
    if math.isfinite(loss) and math.isfinite(norm):
        opt.step()
    opt.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def count_stuck(params: list[nn.Parameter], lr: float) -> tuple[int, int]:
    """(float32 weights that a change of lr would not move, all weights), over all ranks. AdamW's steps are
    about lr large, up to ten times that where a gradient is larger than its past. The bf16 copy that computes
    moves later still."""
    local = [local_rows(p)[0] for p in params]
    counts = torch.tensor([sum(((p - lr) == p).sum().item() for p in local), sum(p.numel() for p in local)])
    dist.all_reduce(counts)
    copies = counts[1].item() // sum(p.numel() for p in params)  # under HSDP
    return counts[0].item() // copies, counts[1].item() // copies


# ---- save and resume ---------------------------------------------------------------------------------------

def _state(roles: dict[str, tuple[dict[str, nn.Parameter], torch.optim.Optimizer]]) -> dict[str, Tensor]:
    state = {}
    for role, (params, opt) in roles.items():
        for name, p in params.items():
            state[f"{role}.{name}"] = p.detach()
            for key, value in opt.state[p].items():
                state[f"opt.{role}.{name}.{key}"] = value
    return state


def save_state(folder: Path, iteration: int, roles: dict, progress: dict, keep: int = 2) -> Path:
    """Write the trainable weights, optimizer state and counters to folder/iter_XXXXXXXX through a temporary
    name: a folder without `.tmp` is complete. roles: name -> (named parameters, optimizer). The `keep` newest
    are kept."""
    final = folder / f"iter_{iteration:08d}"
    temporary = final.with_suffix(".tmp")
    if is_main():
        for unfinished in folder.glob("iter_*.tmp"):  # of killed runs
            shutil.rmtree(unfinished)
        temporary.mkdir(parents=True)
    dist.barrier()
    dcp.save(_state(roles), checkpoint_id=temporary)
    if is_main():
        (temporary / "progress.json").write_text(json.dumps(progress))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in complete_states(folder)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def complete_states(folder: Path) -> list[Path]:
    """Saved states in `folder`, oldest first; half-written ones are left out."""
    return sorted(p for p in folder.glob("iter_*") if p.suffix != ".tmp")


def load_state(path: Path, roles: dict) -> dict:
    """Read what `save_state` wrote, in place, on the same or another number of ranks; returns its progress.
    Raises InputError for a state of another model or a damaged one."""
    try:
        progress = json.loads((path / "progress.json").read_text())
        dcp.load(_state(roles), checkpoint_id=path)
    except (Exception, dcp.CheckpointException) as error:
        # Torch's own is no Exception, and its first line says nothing.
        own = isinstance(error, dcp.CheckpointException)
        cause = next(iter(error.failures.values()))[0] if own else error
        reason = (str(cause) or type(cause).__name__).splitlines()[0]
        raise InputError(f"{path}: not a state of this model and these flags, or damaged "
                         f"({reason})") from error
    return progress


# ---- sequence parallel -------------------------------------------------------------------------------------

def sequence_parallel(net: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Have the ranks of `group` share the tokens of their common samples, in place, before or after `shard`:
    each runs the blocks on its part of the sequence, and attends with its part of the heads to all of it
    (Ulysses, Jacobs et al. 2023). Works on networks with `heads`, `cut`, `join` and `blocks()` that `attend`.

    Every rank computes the same before `cut` and after `join`, and so the same loss, of which it seems to be
    the only owner. Therefore `join` sends back each rank's gradient times the group's size, and `cut` divides
    by it again: inputs get their exact gradient on every rank, and the mean over the ranks, which FSDP takes,
    is exact for all weights. Raises InputError if the ranks cannot share the heads evenly."""
    check_heads(net.heads, group.size())
    net.cut, net.join = partial(cut, group=group), partial(join, group=group)
    for block in net.blocks():
        block.attend = partial(ulysses, group=group, attend=block.attend)
    return net


def check_heads(heads: int, ranks: int) -> None:
    if heads % ranks:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise InputError(f"--sequence-parallel {ranks} does not divide the network's {heads} attention "
                         f"heads; expected one of {divisors}")


def shares(total: int, first: int, last: int, ranks: int) -> list[int]:
    """How many of the tokens [first, last) each rank holds: all `total` are cut evenly, to one token."""
    bounds = [total * rank // ranks for rank in range(ranks + 1)]
    return [max(0, min(stop, last) - max(start, first)) for start, stop in pairwise(bounds)]


def cut(x: Tensor, first: int, total: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's share of x (B n ...), the tokens from `first` on of a sequence of `total`."""
    return Cut.apply(x, shares(total, first, first + x.shape[1], group.size()), group)


def join(x: Tensor, first: int, total: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' shares (B l ...) of the tokens [first, total): (B n ...)."""
    return Join.apply(x, shares(total, first, total, group.size()), group)


def ulysses(q: Tensor, k: Tensor, v: Tensor, total: int, group: dist.ProcessGroup,
            attend: Callable) -> Tensor:
    """Attention of the whole sequence on q, k, v (B N l D) of this rank's tokens: tokens are exchanged for
    heads (B N/ranks L D) and back."""
    ranks, here = group.size(), [q.shape[2]] * group.size()
    sizes = shares(total, 0, total, ranks)
    # Tokens first: a rank's parts lie together then, and the exchanged ones need no copy.
    parts = [rearrange(x, "B (P N) l D -> P l B N D", P=ranks) for x in (q, k, v)]
    qkv = Exchange.apply(torch.stack(parts, dim=2).flatten(0, 1), here, sizes, group)  # L 3 B N/P D
    out = attend(*rearrange(qkv, "L three B N D -> three B N L D"), total)
    out = Exchange.apply(rearrange(out, "B N L D -> L B N D"), sizes, here, group)
    return rearrange(out, "(P l) B N D -> B (P N) l D", P=ranks)


def exchange(x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of x (sum(sends) ...) along the first dimension: (sum(receives) ...)."""
    out = x.new_empty(sum(receives), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=group)
    return out


def gather(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' x (B l ...), of these lengths, one after the other."""
    copies = x.transpose(0, 1).expand(len(sizes), -1, *x.shape[:1], *x.shape[2:]).flatten(0, 1)
    return exchange(copies, [x.shape[1]] * len(sizes), sizes, group).transpose(0, 1)


def own(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's part of x (B n ...), in memory of its own."""
    return x.split(sizes, dim=1)[group.rank()].clone(memory_format=torch.contiguous_format)


class Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sends: list[int], receives: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.back = receives, sends, group
        return exchange(x, sends, receives, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return exchange(grad, *ctx.back), None, None, None


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.args = sizes, group
        return own(x, sizes, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return gather(grad / ctx.args[1].size(), *ctx.args), None, None


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.args = sizes, group
        return gather(x, sizes, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return own(grad, *ctx.args) * ctx.args[1].size(), None, None
