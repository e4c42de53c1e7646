"""Many GPUs, one or a CPU by the same lines: processes, FSDP2 sharding, loading, updates.

Trained parameters and optimizer state are float32, computation is bf16 on GPUs (FSDP's mixed precision). At
learning rates of 1e-7 and 1e-8 bf16 weights could not move; `count_stuck` counts float32 ones that do not.
"""
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from models.checkpoint import InputError, Tensors, check_names, check_values
from models.parse import short

# FSDP warns that an in-place operation on a network's output would be wrong; none is made here.
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")


# ---- processes ---------------------------------------------------------------------------------------------

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def init_distributed(shard_ranks: int | None = None) -> tuple[torch.device, DeviceMesh]:
    """Process group and mesh, the same for torchrun and for a plain `python`: (device of this rank, mesh).

    The mesh has the dimensions (replicate, shard): each group of `shard_ranks` ranks (default: those of one
    node) holds one copy of every network (HSDP). Raises InputError when `shard_ranks` does not divide the world
    size, and for variables of torchrun's that are missing or damaged."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():  # not started by torchrun: a group of one that needs no port
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    try:
        rank, world, local = (int(os.environ[name]) for name in TORCHRUN[:3])
        node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
        known = 0 <= rank < world and local >= 0 and node > 0 and (
            world == 1 or dist.is_initialized() or {*TORCHRUN} <= os.environ.keys())
    except (KeyError, ValueError):
        known = False
    if not known:
        found = " ".join(f"{name}={os.environ.get(name, '')}" for name in (*TORCHRUN, "LOCAL_WORLD_SIZE"))
        raise InputError(f"{found}: expected the variables that torchrun sets, or neither RANK nor WORLD_SIZE")
    cuda = torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        raise InputError(f"LOCAL_RANK={local}: expected a process for each of the {torch.cuda.device_count()} GPUs")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        store = dist.HashStore() if world == 1 else None
        try:  # gloo serves the CPU tensors of --offload beside nccl
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
        except (ValueError, dist.DistNetworkError, dist.DistStoreError) as error:
            place = " ".join(f"{name}={os.environ.get(name, '')}" for name in TORCHRUN[3:])
            reason = short(str(error).splitlines()[0])
            raise InputError(f"{place}: {reason}; expected a free port that all processes reach") from error
    shard_ranks = node if shard_ranks is None else shard_ranks
    if shard_ranks < 1 or dist.get_world_size() % shard_ranks:
        raise InputError(f"--shard-ranks {shard_ranks} does not divide the {dist.get_world_size()} processes")
    shape = (dist.get_world_size() // shard_ranks, shard_ranks)
    return device, init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


@cache  # also by `world`: the groups of a process group that was destroyed are of no use to the next
def _neighbours(count: int, world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_subgroups(count)[0]


def neighbours(count: int) -> dist.ProcessGroup:
    """The group of `count` consecutive ranks that this rank is in; the first call is a collective."""
    return _neighbours(count, dist.group.WORLD)


def share_of_rank(count: int, sequence: int) -> list[int]:
    """Which of `count` samples this rank makes, where each `sequence` neighbours make the same: equally many
    on all ranks, because a sharded network runs on all of them at once. Where `count` cannot be divided
    evenly, the last sample is made several times."""
    per_rank = -(-count // (dist.get_world_size() // sequence))
    first = dist.get_rank() // sequence * per_rank
    return [min(i, count - 1) for i in range(first, first + per_rank)]


def is_main() -> bool:
    return dist.get_rank() == 0


def print0(*args) -> None:
    if is_main():
        print(*args, flush=True)


def mean_over_ranks(values: list[Tensor]) -> list[float]:
    """The mean of each scalar over all ranks, in one collective and one wait for the GPU."""
    stacked = torch.stack([v.detach().to(values[0].device, torch.float64, non_blocking=True) for v in values]).cpu()
    dist.all_reduce(stacked)
    return (stacked / dist.get_world_size()).tolist()


def any_rank(flag: bool) -> bool:
    """True on every rank when it is True on one."""
    value = torch.tensor(int(flag))
    dist.all_reduce(value)
    return value.item() > 0


def of_main(value):
    """Rank 0's value on every rank: a disk may show each node another state of a folder."""
    holder = [value]
    dist.broadcast_object_list(holder)
    return holder[0]


def of_all(value) -> list:
    """Every rank's value, in the order of the ranks, on every rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


@cache
def _patient(world: dist.ProcessGroup) -> dist.ProcessGroup:
    return dist.new_group(backend="gloo", timeout=timedelta(days=1))


def barrier() -> None:
    """Wait until every rank is here, a day if need be."""
    # On gloo with a timeout of its own: rank 0 may write or score for longer than nccl's collectives wait.
    dist.barrier(_patient(dist.group.WORLD))


# ---- sharding ----------------------------------------------------------------------------------------------

GATHERED: WeakSet[FSDPModule] = WeakSet()  # units whose weights stay whole after a forward


def reshard() -> None:
    """Free the whole weights that `shard(..., keep=True)` has left: they are copies, which no step changes."""
    for unit in GATHERED:
        unit.reshard()


def saving_on_cpu(forward: Callable, pinned: bool) -> Callable:
    """`forward`, whose tensors saved for the backward wait on the CPU."""
    def call(*args, **named):
        with torch.autograd.graph.save_on_cpu(pin_memory=pinned):
            return forward(*args, **named)
    return call


def shard(net: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, offload: bool = False,
          checkpointing: bool = False, compiled: bool = False, keep: bool = False, away: bool = False) -> nn.Module:
    """FSDP2 per `net.blocks()`: computation in `dtype`, gradients reduced in float32, optional CPU offload, and
    non-reentrant activation checkpointing and torch.compile inside each unit. In place, also on `meta`. `keep`:
    weights stay gathered after a forward, until a backward or `reshard`. `away`: what checkpointing keeps, the
    inputs of the units, waits on the CPU for the backward."""
    cuda = mesh.device_type == "cuda"
    options = dict(
        mesh=mesh if mesh.shape[0] > 1 else mesh["shard"],
        # Inputs are cast by the networks themselves: FSDP would round the time t to bf16 too.
        mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32,
                                       cast_forward_inputs=False),
        offload_policy=CPUOffloadPolicy(pin_memory=cuda) if offload else OffloadPolicy(),
        # The root too: left gathered by a forward without gradient, its weights would miss the optimizer's step
        # and changes of requires_grad. With `keep`, `update` and `set_trainable` call `reshard` instead.
        reshard_after_forward=not keep)
    # One process shares nothing and may have nothing to cast (adapters cast themselves): FSDP's hooks cost as
    # much as a tiny network itself.
    cast = any(p.dtype != dtype for name, p in net.named_parameters() if ".lora_" not in name)
    alone = mesh.size() == 1 and not cast and not offload
    if compiled:
        torch._dynamo.config.recompile_limit = 64  # of a UNet's shapes; above it Dynamo runs without compiling
    for block in net.blocks():
        # As instance attributes: parameter names stay those of the checkpoint.
        if compiled:  # within the checkpointing, which Dynamo would leave out
            block.forward = torch.compile(block.forward, dynamic=False)
        if checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
            if away:
                block.forward = saving_on_cpu(block.forward, cuda)
        if not alone:
            fully_shard(block, **options)
    if alone:
        return net
    GATHERED.update([*net.blocks(), net] if keep else [])
    return fully_shard(net, **options)


def settle(net: nn.Module) -> None:
    """Have FSDP initialise now and not at the first forward: a parameter that is frozen at that moment would
    later have its gradient reduced in bf16."""
    if isinstance(net, FSDPModule):
        net._get_fsdp_state()._lazy_init()


def local_rows(p: Tensor) -> tuple[Tensor, int]:
    """(the rows of a parameter that this rank holds, the index of the first of them); of a plain tensor all.
    FSDP cuts along the first dimension alone."""
    if not isinstance(p, DTensor):
        return p, 0
    _, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return p.to_local(), offset[0] if offset else 0


def materialise(net: nn.Module, device: torch.device, offload: bool = False) -> None:
    """Give a sharded `meta` network its memory: parameters on the CPU under offload, buffers on the device.

    Whatever will be trained must require its gradient already, because of `settle`."""
    net.to_empty(device="cpu" if offload else device)
    settle(net)
    for module in net.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


@torch.no_grad()
def load_sharded(net: nn.Module, tensors: Tensors, ignore: tuple[str, ...] = ()) -> None:
    """Fill a materialised network from a checkpoint, each rank reading only the rows that it holds. Strict:
    raises InputError for missing, extra or mis-shaped tensors and for NaN in these rows. Adapters (`.lora_`),
    which no base checkpoint holds, are left alone."""
    named = [*net.named_parameters(), *net.named_buffers()]
    targets = {name: p for name, p in named if ".lora_" not in name}
    check_names(tensors, {name: tuple(p.shape) for name, p in targets.items()}, ignore)
    for name, p in targets.items():
        local, first = local_rows(p)
        sharded = isinstance(p, DTensor)
        value = tensors.rows(name, first, first + local.shape[0]) if sharded else tensors[name]
        check_values(tensors, name, value, p.is_floating_point())
        local.copy_(value)


@torch.no_grad()
def fill_random(net: nn.Module, seed: int) -> None:
    """Weights for --random-weights: normal with deviation 0.02, norms at 1, biases at 0."""
    for i, (name, p) in enumerate([*net.named_parameters(), *net.named_buffers()]):
        local, first = local_rows(p)
        # Seeded by the row, not by the rank: HSDP's copies of a network must be equal.
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

def adamw(*groups: tuple[dict[str, nn.Parameter], float], betas: tuple[float, float] = (0.0, 0.99),
          weight_decay: float = 0.0, ema: float = 0.0) -> torch.optim.AdamW:
    """AdamW on groups of (parameters, learning rate), by default with the settings of App. B.5. Its state is
    made here and not at the first step: it can be saved and resumed at any time. Fused: one kernel, where a
    loop over sharded tensors takes as long as a tiny network, and over offloaded ones would use one core.
    With beta_1 = 0 it keeps no exp_avg: `update` lends it the gradient, which exp_avg would equal. ema: decay of
    the weights' moving average, which `update` keeps in the state; 0: none."""
    rates = [dict(params=params.values(), lr=lr, initial_lr=lr, ema=ema) for params, lr in groups]
    opt = torch.optim.AdamW(rates, betas=betas, weight_decay=weight_decay, fused=True)
    for p in (p for params, _ in groups for p in params.values()):
        opt.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg_sq": torch.zeros_like(p)}
        opt.state[p] |= {"exp_avg": torch.zeros_like(p)} if betas[0] else {}
        opt.state[p] |= {"ema": p.detach().clone()} if ema else {}
    return opt


def averages_and_weights(opt: torch.optim.Optimizer) -> tuple[list[Tensor], list[Tensor]]:
    """This rank's rows of the moving averages that `adamw` keeps, and of their weights."""
    kept = {p: state["ema"] for p, state in opt.state.items() if "ema" in state}
    return [local_rows(average)[0] for average in kept.values()], [local_rows(p)[0] for p in kept]


@contextmanager
def averaged(opt: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the weights have the values of their moving averages, if `adamw` keeps these."""
    @torch.no_grad()
    def swap():
        reshard()
        for average, p in zip(*averages_and_weights(opt)):
            p[...], average[...] = average.clone(), p.clone()

    swap()
    yield
    swap()


def set_trainable(params: dict[str, nn.Parameter], on: bool) -> None:
    if any(p.requires_grad != on for p in params.values()):
        reshard()  # weights take requires_grad when they are gathered
    for p in params.values():
        p.requires_grad_(on)


def update(opt: torch.optim.Optimizer, loss: Tensor, rate: float = 1.0) -> tuple[float, float]:
    """Step, at `rate` times the learning rates, and clear the gradients that `loss` (detached, this rank's
    mean) left: (loss over all ranks, gradient norm). A non-finite loss or norm skips the step on every rank
    alike; the caller sees it in the returned values."""
    reshard()
    trained = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in trained]) if trained else torch.zeros(())
    norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    loss, = mean_over_ranks([loss])
    for group in opt.param_groups:
        group["lr"] = rate * group["initial_lr"]
    if math.isfinite(loss) and math.isfinite(norm):
        lent = [p for p in trained if "exp_avg" not in opt.state[p]]
        for p in lent:
            opt.state[p]["exp_avg"] = p.grad
        opt.step()
        for p in lent:
            del opt.state[p]["exp_avg"]
        if ema := opt.param_groups[0]["ema"]:
            get_ema_multi_avg_fn(ema)(*averages_and_weights(opt), None)
    opt.zero_grad(set_to_none=True)
    return loss, norm


@torch.no_grad()
def count_stuck(params: list[nn.Parameter], lr: float) -> tuple[int, int]:
    """(float32 weights that a change of size lr would not move, all weights), over all ranks. A step of AdamW
    is about lr, at most ten times that, where a gradient is far larger than those before it. The bf16 copy
    that computes moves later still."""
    local = [local_rows(p)[0] for p in params]
    counts = torch.tensor([sum(((p - lr) == p).sum().item() for p in local), sum(p.numel() for p in local)])
    dist.all_reduce(counts)
    copies = counts[1].item() // sum(p.numel() for p in params)  # of each weight, under HSDP
    return counts[0].item() // copies, counts[1].item() // copies
