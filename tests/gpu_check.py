"""The steps of gpu_check.sh, which runs and explains them:

    python tests/gpu_check.py env | mmdit [compiled] | syncs
    python tests/gpu_check.py run SCRIPT FLAGS...   # a training script, with what --profile does not tell
    python tests/gpu_check.py margins RUNS | resume RUNS | table OUT
"""
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
CUDA, GIB = torch.cuda.is_available(), 2 ** 30
DEVICE = torch.device("cuda" if CUDA else "cpu")
# GiB of live tensors at the largest peak, from memory_model.py on one rank.
EXPECTED = dict(sd3_fakelora_m1=7.3, sd3_fakelora_m1_compile=7.3, sd3_lora_m4=30, sdxl_fakelora_m1=7.9,
                sdxl_adm_m4=59.5, sdxl_adm_m4_offload=6.6, sdxl_adp_m4=38, sdxl_adp_m4_offload=11.4, cogvideox_m1=38.5,
                cogvideox_fakelora_m1=12.8, avdm2_m2=37.1, avdm2_video_m2=46.4)


def now() -> float:
    """Seconds, when all that was asked of the GPU is done."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(call, count: int = 5) -> float:
    """A call's mean of `count`, after two that warm up."""
    call()
    call()
    start = now()
    for _ in range(count):
        call()
    return (now() - start) / count


def peak_gib() -> float:
    """Of the memory allocated since the last call."""
    if not CUDA:
        return 0.0
    gib = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return gib


# ---- the machine -------------------------------------------------------------------------------------------

def env() -> None:
    import transformers
    from models.data import noise
    print(f"torch {torch.__version__} cuda {torch.version.cuda} transformers {transformers.__version__} "
          f"threads {torch.get_num_threads()} cpus {os.cpu_count()}")
    drawing = seconds(lambda: noise((16, 128, 128), 0, 1, "z", range(4)))
    print(f"noise of 4 SD3 latents on the CPU: {1000 * drawing:.1f} ms")
    if not CUDA:
        return
    about = torch.cuda.get_device_properties(0)
    print(f"{about.name} {about.total_memory / GIB:.1f} GiB, cudnn {torch.backends.cudnn.version()}")
    for pinned in (False, True):  # --offload lives on these copies
        x = torch.ones(2 ** 28, dtype=torch.uint8, pin_memory=pinned)
        y = torch.empty_like(x, device=DEVICE)
        copying = seconds(lambda: y.copy_(x, non_blocking=True))
        print(f"host to device, pinned {pinned}: {0.25 / copying:.1f} GiB/s")
    backends = torch.nn.attention.SDPBackend
    for label, shape, dtype, bias in (
        ("denoiser bf16, head 64", (2, 24, 4429, 64), torch.bfloat16, False),
        ("VAE fp32, head 512", (1, 1, 16384, 512), torch.float32, False),
        ("VAE bf16, head 512", (1, 1, 16384, 512), torch.bfloat16, False),
        ("SAM bf16 with bias", (1, 12, 4096, 64), torch.bfloat16, True),
    ):
        q = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=True)
        mask = (q @ q.mT).detach().requires_grad_() if bias else None
        for backend in (backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION, backends.CUDNN_ATTENTION):
            def both():
                scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
            try:
                with torch.nn.attention.sdpa_kernel(backend), warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    peak_gib()
                    before = torch.cuda.memory_allocated() / GIB
                    print(f"attention {label:24} {backend.name:20} forward + backward "
                          f"{1000 * seconds(both):8.2f} ms, {peak_gib() - before:.2f} GiB")
            except RuntimeError as error:
                print(f"attention {label:24} {backend.name:20} refused: {str(error).splitlines()[0][:70]}")


# ---- a training script -------------------------------------------------------------------------------------

@torch.no_grad()
def repeated_weights(net: torch.nn.Module, seed: int) -> None:
    """In place of `fill_random`: 4 M weights are drawn and repeated. On a core, to which --offload gives the
    weights, drawing SDXL's takes a minute."""
    from models.parallel import local_rows
    drawn = {}
    for name, p in [*net.named_parameters(), *net.named_buffers()]:
        local, _ = local_rows(p)
        if name.endswith("bias"):
            local.zero_()
        elif local.ndim == 1:
            local.fill_(1)
        else:
            kind = local.device, local.dtype
            if kind not in drawn:
                drawn[kind] = torch.empty(2 ** 22, device=local.device, dtype=local.dtype).normal_(0, 0.02)
            for part in local.view(-1).split(2 ** 22):
                part.copy_(drawn[kind][:len(part)])


def run(script: str, *flags: str) -> None:
    """The script; beside its own output the seconds of its set-up, memory allocated then, memory reserved in
    each phase, and each iteration's losses."""
    from models.job import networks
    from models.job.job import Job
    begun, reserved = time.perf_counter(), defaultdict(float)
    phase, start, end = Job.phase, Job.start, Job.end

    def noting_phase(job, name):
        if CUDA:
            reserved[name] = max(reserved[name], torch.cuda.max_memory_reserved() / GIB)
        phase(job, name)

    def noting_start(job, **roles):
        start(job, **roles)
        gib = torch.cuda.memory_allocated() / GIB if CUDA else 0
        print(f"set-up: {now() - begun:.1f} s, {gib:.2f} GiB allocated", flush=True)

    def noting_end(job, log, gen_iter):
        stop = end(job, log, gen_iter)
        print("record", {key: value for key, value in log.record.items()
                         if key.startswith(("loss", "grad", "seconds"))}, flush=True)
        return stop

    # `patch` raises AttributeError when a name is gone.
    with patch.multiple(Job, phase=noting_phase, start=noting_start, end=noting_end), \
            patch.object(networks, "fill_random", repeated_weights):
        module = importlib.import_module(script.removesuffix(".py"))
        try:
            module.main(module.parse_args(list(flags)))
        except torch.cuda.OutOfMemoryError as error:
            sys.exit(f"OUT OF MEMORY with {peak_gib():.2f} GiB allocated: {str(error).splitlines()[0]}")
    for name, gib in reserved.items():
        print(f"reserved {name:14} {gib:6.2f} GiB")


def train(runs: str, name: str, *flags) -> subprocess.Popen:
    """adm.py on tiny-sd3 in a process of its own, into RUNS/name."""
    return subprocess.Popen([sys.executable, ROOT / "adm.py", "--sample-every", "100000", "--evaluate", "0",
                             "--out", Path(runs) / name, *map(str, flags)])


def records(runs: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (Path(runs) / name / "metrics.jsonl").read_text().splitlines()]


def margins(runs: str) -> None:
    """The same 30 updates of tiny-sd3 in float32 and in bf16."""
    for precision in ("fp32", "bf16"):
        train(runs, precision, "--precision", precision, "--max-iter", 30).wait()
    for i in (0, 9, 19, 29):
        both = [records(runs, precision)[i] for precision in ("fp32", "bf16")]
        for record in both:
            record["margin"] = sum(record["margin"]) / len(record["margin"])
        figures = [f"{key} {both[0][key]:.5g} {both[1][key]:.5g}" for key in both[0]
                   if key == "margin" or key.startswith(("loss", "grad", "seconds"))]
        print(f"margins, update {i + 1}, fp32 and bf16: {'; '.join(figures)}", flush=True)


def resume(runs: str) -> None:
    """A run that is killed and resumed, against one that is not."""
    train(runs, "whole", "--max-iter", 40, "--save-every", 10).wait()
    process = train(runs, "killed", "--max-iter", 400, "--save-every", 10)
    while not (Path(runs) / "killed/state/iter_00000020").exists() and process.poll() is None:
        time.sleep(0.1)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rc = train(runs, "killed", "--max-iter", 40, "--save-every", 10, "--resume").wait()
    whole, killed = records(runs, "whole"), records(runs, "killed")
    in_order = [record["gen_iter"] for record in killed] == list(range(1, len(whole) + 1))
    worst = max(abs(a[key] / b[key] - 1) for a, b in zip(whole, killed)
                for key in ("loss_psi", "loss_theta", "loss_tau"))
    print(f"resume: rc {rc}, each update once and in order: {in_order}, losses differ by {worst:.1e} at most")


# ---- the network -------------------------------------------------------------------------------------------

def mmdit(mode: str = "eager") -> None:
    """SD3-Medium's forward and forward + backward at batch 4, without checkpointing. CPUs get tiny-sd3."""
    from models.job.families import FAMILIES
    from models.mmdit import MMDiT
    from models.presets import PRESETS
    from torch.utils.flop_counter import FlopCounterMode
    preset = PRESETS["sd3-medium" if CUDA else "tiny-sd3"]
    net = MMDiT(**preset.config).to(DEVICE, torch.bfloat16 if CUDA else torch.float32)
    for p in net.parameters():
        torch.nn.init.normal_(p, 0, 0.02)
    h, w = (side // preset.vae_factor for side in preset.size)
    x, t = torch.randn(4, preset.latent_channels, h, w, device=DEVICE), torch.rand(4, device=DEVICE)
    c = [torch.randn(4, *shape, device=DEVICE) for shape in FAMILIES[preset.family].condition_shapes(preset)]

    def both():
        net(x, t, c).float().square().mean().backward()

    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            net(x, t, c)
        for block in net.blocks() if mode == "compiled" else ():
            block.forward = torch.compile(block.forward)
        forward = seconds(lambda: net(x, t, c))
    peak_gib()
    backward, tera = seconds(both), counter.get_total_flops() / 1e12
    print(f"mmdit {mode}: forward {1000 * forward:.1f} ms {tera / forward:.0f} TFLOP/s, forward + backward "
          f"{1000 * backward:.1f} ms {3 * tera / backward:.0f} TFLOP/s, {peak_gib():.1f} GiB")


def syncs() -> None:
    """Where three updates of tiny-sd3 wait for the GPU, by torch's own warnings."""
    import adm
    from models.job.job import Job
    begin, places = Job.begin, Counter()

    def watching(job, global_iter):
        if CUDA and global_iter == 2:
            torch.cuda.set_sync_debug_mode("warn")
        return begin(job, global_iter)

    def note(message, *_):
        if "synchronizing" in str(message):
            lines = [f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_stack()
                     if Path(f.filename).is_relative_to(ROOT) and f.filename != __file__]
            places[" < ".join(lines[:-4:-1])] += 1

    with patch.object(Job, "begin", watching), patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        adm.main(adm.parse_args(["--max-iter", "4", "--profile", "4"]))
    for place, times in places.most_common():
        print(f"syncs {times:4} in 3 updates  {place}")


# ---- the table ---------------------------------------------------------------------------------------------

def table(out: str) -> None:
    """What the logs of all steps say."""
    print(f"\n{'step':20} {'rc':>7} {'wall s':>6} {'s/it':>8} {'GiB':>6} {'model':>6}"
          "  of each phase: s/it, GiB allocated (reserved)")
    logs = {}
    for line in (Path(out) / "steps.tsv").read_text().splitlines():
        name, rc, wall = line.split("\t")
        logs[name] = log = (Path(out) / f"{name}.log").read_text(errors="replace") if rc != "skipped" else ""
        reserved = dict(re.findall(r"^reserved (\w+) +([\d.]+) GiB", log, re.M))
        phases = re.findall(r"^(\w+) +([\d.]+) s/it(?:  peak +([\d.]+) GiB)?", log, re.M)
        *phases, (_, total, peak) = phases or [("iteration", "", "")]
        notes = [f"{phase}: {s}, {gib or '-'} ({reserved.get(phase, '-')})" for phase, s, gib in phases]
        notes += re.findall(r"peak host memory of rank 0: .*|OUT OF MEMORY.*", log)
        model = EXPECTED.get(name, "")
        print(f"{name:20} {rc:>7} {wall:>6} {total:>8} {peak:>6} {model:>6}  {'; '.join(notes)}")
        if rc not in ("0", "skipped") and log.strip():
            print("    last line:", log.strip().splitlines()[-1][:200])
    for name in ("env", "mmdit", "compile", "margins", "resume", "syncs"):
        for line in logs.get(name, "").splitlines():
            if name == "env" or line.startswith((name, "mmdit")):
                print(line)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
    if dist.is_initialized():
        dist.destroy_process_group()
