"""Peak host memory of sharded loading on each rank: `torchrun --nproc_per_node 2 tests/sharded_load.py FILE`.

Writes FILE with float16 weights first if it does not exist; `--model sd3-medium`: full size (4.2 GB)."""
import argparse
import json
import resource
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from models.checkpoint import open_tensors  # noqa: E402
from models.mmdit import MMDiT, config_from_shapes  # noqa: E402
from models.parallel import init_distributed, is_main, load_sharded, local_rows, materialise, shard  # noqa: E402
from models.presets import PRESETS  # noqa: E402

SMALL = dict(depth=6, width=768, heads=6, patch=2, in_channels=16, pos_grid=64, context_dim=1024,
             pooled_dim=512, qk_norm=False, attn2=())


def parse_args(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--model", choices=PRESETS)
    return parser.parse_args(argv)


def resident():  # bytes of this process's own memory; file-backed pages that the kernel can drop do not count
    pages = [int(n) for n in Path("/proc/self/statm").read_text().split()]
    return (pages[1] - pages[2]) * resource.getpagesize()


def main(args):
    _, mesh = init_distributed()
    if is_main() and not args.file.exists():
        with torch.device("meta"):
            net = MMDiT(**(PRESETS[args.model].config if args.model else SMALL)).half()
        weights = {name: torch.full_like(p, 0.01, device="cpu") for name, p in net.state_dict().items()}
        save_file(weights, args.file)
        del weights
    dist.barrier()
    before, seen, done = resident(), [resident()], threading.Event()

    def watch():
        while not done.wait(0.005):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    tensors = open_tensors(args.file)
    with torch.device("meta"):
        net = MMDiT(**config_from_shapes(tensors.shapes))
    shard(net, mesh, torch.float32)
    materialise(net, torch.device("cpu"))
    load_sharded(net, tensors)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    full = 4 * sum(p.numel() for p in net.parameters())
    own = 4 * sum(local_rows(p)[0].numel() for p in net.parameters())
    stored = torch.tensor(0.01, dtype=torch.float16).float()
    assert all((local_rows(p)[0] == stored).all() for p in net.parameters())
    mine = dict(rank=dist.get_rank(), full_gib=full / 2 ** 30, shard_gib=own / 2 ** 30,
                peak_gib=(max(seen) - before) / 2 ** 30, seconds=round(seconds, 2))
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, mine)
    if mine["rank"] == 0:  # lines that two processes print can run into each other
        print("\n".join(map(json.dumps, ranks)), flush=True)
    dist.barrier()


if __name__ == "__main__":
    main(parse_args())
    dist.destroy_process_group()
