"""Sequence parallelism: any number of ranks that share a sample's tokens compute what one process does."""
import copy
import os
import socket
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from torch.distributed.fsdp import FSDPModule
from torch.multiprocessing import start_processes

from collect_odes import solve_shard
from models.checkpoint import InputError
from models.cogvideox import CogVideoX
from models.diffusion import Denoiser
from models.job.sampling import NotFinite, generate
from models.parallel import init_distributed, neighbours, shard
from models.sequence import sequence_parallel

WORLDS = [(2, 2), (3, 3), (4, 2)]  # processes, and how many of them share their samples
# 6 heads divide among 2 and 3 ranks; 4 blocks, so that the tap at 2 stops before the end.
SMALL = dict(depth=4, heads=6, head_dim=16, in_channels=4, text_dim=8, time_dim=12, grid=(3, 4))
# rotary, text tokens, latent (T C H W). 5 + 36 and 25 + 4 tokens divide by neither 2 nor 3. In the first case
# all ranks but the first hold no text, in the second all but the last no video.
CASES = [(True, 5, (3, 4, 6, 8)), (False, 25, (1, 4, 4, 4))]
BATCH = 2


def results(net, x, t, context, taps):
    """[v, tap maps, gradients of x and of the context], of the mean over the samples of a function of them;
    the gradients of the weights stay in the network."""
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    outputs = [net(x, t, (context, None)), *net(x, t, (context, None), taps=taps)]
    probes = [torch.linspace(-1, 1, y[0].numel()).view(y[0].shape) for y in outputs]
    sum((probe * y).flatten(1).sum(1).mean() for probe, y in zip(probes, outputs)).backward()
    return [*outputs, x.grad, context.grad]


def input_gradient(net, x, t, context):
    """As the discriminator's backbone: weights are frozen, the text needs no gradient."""
    net.requires_grad_(False)
    x = x.clone().requires_grad_()
    net(x, t, (context, None), taps=(2,))[0].square().mean().backward()
    return x.grad


def same(actual, expected, name):
    # 5e-5: float32 sums of the same terms in another order.
    torch.testing.assert_close(actual, expected, atol=5e-5, rtol=5e-5, msg=lambda m: f"{name}: {m}")


def samples_come_in_order(ranks):
    """Pictures of `generate` and latents of `solve_shard`, of which each group of ranks makes its share: for any noise
    the number in the prompt."""
    numbers, tn = ["-1", "0.5", "1"], torch.tensor([0.0, 1.0])
    F = Denoiser(lambda x, t, c, lora=(): x - c[0][:, :, None, None])
    text = SimpleNamespace(encode=lambda prompts: (torch.tensor([[float(number)] for number in prompts]),))
    images = generate(F, text, SimpleNamespace(decode=lambda x: x), numbers, tn, (1, 1, 1), 0, batch=1, sequence=ranks)
    assert images.flatten().tolist() == [0, 191, 255]
    with pytest.raises(NotFinite):  # on all ranks, which would otherwise wait for the one that has made the last
        generate(F, text, SimpleNamespace(decode=lambda x: x), ["0", "0", "nan"], tn, (1, 1, 1), 0, sequence=ranks)
    x_T, w, progress = torch.randn(3, 1, 1, 1), torch.ones(3), SimpleNamespace(n=0, update=lambda n: None)
    x_0 = solve_shard(F, text, (torch.zeros(1, 1),), tn, x_T, w, numbers, 1, torch.float32, progress, ranks)
    assert x_0 is None if dist.get_rank() else x_0.flatten().tolist() == pytest.approx([-1, 0.5, 1])


def rank(i, world, ranks, port):
    """Process i of `world`: groups of `ranks` share the tokens of their samples, the groups the batch."""
    os.environ.update(RANK=str(i), WORLD_SIZE=str(world), LOCAL_RANK=str(i), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    _, mesh = init_distributed()
    samples_come_in_order(ranks)
    samples = BATCH * ranks // world
    own = slice(i // ranks * samples, (i // ranks + 1) * samples)
    for (rotary, S, latent), checkpointing in product(CASES, (False, True)):
        torch.manual_seed(0)
        net = CogVideoX(**SMALL, rotary=rotary)
        batch = torch.randn(BATCH, *latent), torch.rand(BATCH), torch.randn(BATCH, S, SMALL["text_dim"])
        one, mine = copy.deepcopy(net), [y[own] for y in batch]
        shard(sequence_parallel(net, neighbours(ranks)), mesh, torch.float32, checkpointing=checkpointing)
        assert isinstance(net, FSDPModule)
        held = []
        net.blocks()[0].norm1.register_forward_pre_hook(
            lambda _, args: held.append([y.shape[1] for y in args[:2]]))

        actual, expected = results(net, *mine, taps=(0, 2)), results(one, *batch, taps=(0, 2))
        for n, (a, e) in enumerate(zip(actual, expected, strict=True)):
            # Of the mean over the group's samples, an input's gradient is larger than over all.
            same(a, e[own] * (BATCH // samples if n > 2 else 1), f"result {n}")
        for (name, p), e in zip(net.named_parameters(), one.parameters(), strict=True):
            same(p.grad.full_tensor(), e.grad, name)
        same(input_gradient(net, *mine), input_gradient(one, *mine), "input gradient, frozen")
        # One write with its end of line: the ranks share a pipe.
        print(f"{i} of {world}: {held[0][0]} text tokens and {held[0][1]} of video\n", end="", flush=True)
    dist.destroy_process_group()


def test_shared_tokens_are_one_process():
    # A process of its own that forks the ranks: importing torch once for all of them.
    run = subprocess.run([sys.executable, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    held = run.stdout.splitlines()
    # Twice: without and with activation checkpointing.
    for line in ("0 of 2: 5 text tokens and 15 of video", "1 of 2: 0 text tokens and 21 of video",
                 "0 of 3: 9 text tokens and 0 of video", "1 of 3: 10 text tokens and 0 of video",
                 "2 of 3: 6 text tokens and 4 of video", "3 of 4: 0 text tokens and 21 of video"):
        assert held.count(line) == 2, run.stdout
    assert len(held) == sum(world for world, _ in WORLDS) * len(CASES) * 2


def test_ranks_that_cannot_share_the_heads_are_refused():
    net, group = SimpleNamespace(heads=30), SimpleNamespace(size=lambda: 4)  # 2b's heads
    with pytest.raises(InputError, match="4 does not divide .* 30 .* one of 1, 2, 3, 5, 6, 10, 15, 30$"):
        sequence_parallel(net, group)


if __name__ == "__main__":
    for world, ranks in WORLDS:
        with socket.create_server(("localhost", 0)) as free:
            port = free.getsockname()[1]
        start_processes(rank, (world, ranks, port), nprocs=world, start_method="fork")
