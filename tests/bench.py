"""The clock of the bench_*.py scripts."""
import time
from collections.abc import Callable

import torch
from torch import Tensor


def race(calls: dict[str, Callable[[], Tensor]], rounds: int) -> None:
    """Print the largest difference of the two outputs, then, forward and forward + backward, the fastest of
    `rounds` times of each call, in turn, and the ratio of the first call's to the other's."""
    ours, theirs = calls
    with torch.no_grad():
        print(f"largest difference {(calls[ours]() - calls[theirs]()).abs().max():.1e}")
    for mode in ("forward", "forward+backward"):
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                with torch.set_grad_enabled(mode != "forward"):
                    out = call()
                if mode != "forward":
                    out.square().mean().backward()
                best[name] = min(best[name], time.perf_counter() - start)
        print(f"{mode:17}" + "".join(f" {name} {1e3 * s:7.1f} ms  " for name, s in best.items())
              + f"ratio {best[ours] / best[theirs]:.3f}   ({torch.get_num_threads()} threads)")
