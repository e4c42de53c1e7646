"""Sequence parallelism (App. B.4): neighbouring ranks share the tokens of one video.

    sequence_parallel(net, neighbours(4))  # in place; every rank then computes a quarter of the tokens

Letters: B samples, L tokens of the whole sequence, n of a stretch of it (the text, the video), l of those the
ones that this rank holds, N heads, D width of a head, P ranks.
"""
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from models.checkpoint import InputError


def sequence_parallel(net: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Have the ranks of `group` share the tokens of their common samples, in place, before or after `shard`:
    each runs the blocks on its part of the sequence, and attends with its part of the heads to all of it
    (Ulysses, Jacobs et al. 2023). Works on networks with `heads`, `cut`, `join` and `blocks()` that `attend`.

    Before `cut` and after `join` all ranks of the group compute the same, and so each has the whole loss.
    `join` therefore multiplies the gradient by the number of ranks, and `cut` divides by it: inputs get
    their exact gradient on every rank, and so do all weights in the mean over the ranks, which FSDP takes.
    Raises InputError if the ranks cannot share the heads evenly."""
    check_heads(net.heads, group.size())
    net.cut, net.join = partial(cut, group=group), partial(join, group=group)
    for block in net.blocks():
        block.attend = partial(ulysses, group=group, attend=block.attend)
    return net


def check_heads(heads: int, ranks: int) -> None:
    """Raises InputError if the ranks cannot share the heads evenly."""
    if heads % ranks:
        divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise InputError(f"--sequence-parallel {ranks} does not divide the network's {heads} attention "
                         f"heads; expected one of {divisors}")


def lengths(total: int, first: int, last: int, ranks: int) -> list[int]:
    """How many of the tokens [first, last) each rank holds, of a sequence of `total` that is cut into
    consecutive parts of equal length, give or take one token."""
    bounds = [total * rank // ranks for rank in range(ranks + 1)]
    return [max(0, min(stop, last) - max(start, first)) for start, stop in pairwise(bounds)]


def cut(x: Tensor, first: int, total: int, group: dist.ProcessGroup) -> Tensor:
    """This rank's part (B l ...) of x (B n ...), the tokens from `first` on of a sequence of `total`."""
    return Cut.apply(x, lengths(total, first, first + x.shape[1], group.size()), group)


def join(x: Tensor, first: int, total: int, group: dist.ProcessGroup) -> Tensor:
    """The tokens [first, total) of all ranks (B n ...) from this rank's part of them (B l ...)."""
    return Join.apply(x, lengths(total, first, total, group.size()), group)


def ulysses(q: Tensor, k: Tensor, v: Tensor, total: int, group: dist.ProcessGroup,
            attend: Callable) -> Tensor:
    """Attention to the whole sequence of q, k, v (B N l D) of this rank's tokens: the ranks exchange tokens
    for heads (B N/P L D), attend, and exchange back."""
    ranks, here = group.size(), [q.shape[2]] * group.size()
    sizes = lengths(total, 0, total, ranks)
    # Tokens first: what one rank gets lies together then, and no copy follows the exchange.
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
    """The parts x (B l ...) of all ranks, l as in `sizes`, one after the other (B n ...)."""
    # An all-to-all in which everybody gets the same: all_gather wants parts of equal length.
    copies = x.transpose(0, 1).expand(len(sizes), -1, *x.shape[:1], *x.shape[2:]).flatten(0, 1)
    return exchange(copies, [x.shape[1]] * len(sizes), sizes, group).transpose(0, 1)


def part_of_rank(x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
    """This rank's part (B l ...) of x (B n ...): a copy, so that the whole can be freed."""
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
        ctx.sizes, ctx.group = sizes, group
        return part_of_rank(x, sizes, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return gather(grad / ctx.group.size(), ctx.sizes, ctx.group), None, None


class Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, sizes: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return gather(x, sizes, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple:
        return part_of_rank(grad, ctx.sizes, ctx.group) * ctx.group.size(), None, None
