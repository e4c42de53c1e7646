"""Memory and time of the full-size CogVideoX decoder on random weights, in chunks of 2 latents.

    OMP_NUM_THREADS=2 python tests/bench_cogvideox_vae.py  # CPU: 25 frames of 80x120, 1/36 of the area
    python tests/bench_cogvideox_vae.py --size 60 90 --latents 13 --dtype bfloat16  # GPU: 49 frames, 480x720

7 latents are three chunks: the middle one holds the frames kept by the first beside those it keeps itself.
"""
import argparse
import resource
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.cogvideox_vae import CogVideoXVAE  # noqa: E402

parser = argparse.ArgumentParser()
parser.add_argument("--size", type=int, nargs=2, default=(10, 15), help="height and width in latents")
parser.add_argument("--latents", type=int, default=7)
parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
args = parser.parse_args()

cuda = torch.cuda.is_available()
torch.manual_seed(0)
with torch.device("meta"):
    vae = CogVideoXVAE(ch=(128, 256, 256, 512), num_res_blocks=3, z_channels=16, scale=1.0)
del vae.encoder
vae = vae.to(getattr(torch, args.dtype)).to_empty(device="cuda" if cuda else "cpu")


def resident():  # GiB
    if cuda:
        return torch.cuda.memory_allocated() / 2 ** 30
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2 ** 30


with torch.no_grad():
    for p in vae.parameters():
        p.normal_(0, 0.02)
    latent = torch.randn(1, args.latents, 16, *args.size, device="cuda" if cuda else "cpu")
    before, start = resident(), time.perf_counter()
    video = vae.decode(latent)
    if cuda:
        torch.cuda.synchronize()
seconds = time.perf_counter() - start
if cuda:
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # counted in KiB on Linux
print(f"{tuple(video.shape)} {args.dtype}: {seconds:.1f} s, peak {peak:.2f} GiB, before {before:.2f} "
      f"(weights {sum(p.nbytes for p in vae.parameters()) / 2 ** 30:.2f})")
