"""Kills runs at random moments, and fills their disk: `python tests/survive.py` (a table; not in the suite).

A script's command is run once undisturbed. Then, 20 times, it is killed with SIGKILL at a random moment of that
run's length and its same command is run again until it ends; and 10 times it is run on a disk that is too small,
which then grows (a tmpfs: Linux, root). Counts the runs that end with the same bytes as the undisturbed one, and
the full disks that were one sentence and exit code 2. The table is complete for the attempts it names; moments
depend on --seed alone.
"""
import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--batch-size", "2", "--max-iter", "4", "--save-every", "1", "--resume"]
SCRIPTS = {  # PAIRS stands for the undisturbed pairs of collect_odes.py
    "collect_odes": ["--count", "64", "--shard-size", "8", "--batch", "4", "--steps", "10"],
    "adm": [*SMALL, "--evaluate", "8"],
    "adp": [*SMALL, "--evaluate", "8", "--pairs", "PAIRS"],
    "avdm2": [*SMALL, "--evaluate", "2"],
}
CLOCKS = ("seconds", "gib")  # figures that no two runs share


def command(script: str, out: Path, folder: Path) -> list[str]:
    flags = [flag.replace("PAIRS", str(folder / "collect_odes")) for flag in SCRIPTS[script]]
    return [sys.executable, str(ROOT / f"{script}.py"), *flags, "--out", str(out)]


def run(script: str, out: Path, folder: Path, limit: float | None = None) -> subprocess.CompletedProcess | None:
    """None if it was killed at the limit, in seconds."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # threads change no bit between two runs of as many
    try:
        return subprocess.run(command(script, out, folder), capture_output=True, text=True, timeout=limit, env=env)
    except subprocess.TimeoutExpired:  # subprocess.run has sent SIGKILL
        return None


def contents(out: Path) -> dict[str, object]:
    """What two equal runs have in common: every file but locks, settings, pictures and states, and the figures."""
    found = {}
    for path in sorted(out.glob("*")):
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[path.name] = [{key: row[key] for key in row if key not in CLOCKS} for row in rows]
        elif path.is_file() and path.suffix in (".safetensors", ".png") or path.name in ("comparison.json", "manifest.json"):
            found[path.name] = path.read_bytes()
    return found


def finish(script: str, out: Path, folder: Path, expected: dict) -> str:
    """Run the command until it ends: "" when the result is as it should be."""
    done = run(script, out, folder)
    if done.returncode:
        return f"exit code {done.returncode}: {done.stderr[-300:]}"
    found = contents(out)
    differ = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    return f"differ: {', '.join(sorted(differ))}" if differ else ""


def kill(script: str, folder: Path, expected: dict, after: float) -> str:
    out = folder / "killed"
    shutil.rmtree(out, ignore_errors=True)
    while run(script, out, folder, after):  # the machine is faster now than in the undisturbed run
        after *= 0.9
        shutil.rmtree(out)
    return finish(script, out, folder, expected)


def fill(script: str, folder: Path, expected: dict, share: float, size: int) -> str:
    """On a disk of this share of `size` bytes, what the undisturbed run takes."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(share * size)}", "tmpfs", disk], check=True)
    try:
        done = run(script, disk / "run", folder)
        lines = [line for line in done.stderr.splitlines() if line.startswith(f"{script}.py: ")]
        if done.returncode != 2 or len(lines) != 1 or "Traceback" in done.stderr:
            return f"exit code {done.returncode}: {done.stderr[-300:]}"
        subprocess.run(["mount", "-o", f"remount,size={4 * size}", disk], check=True)
        return finish(script, disk / "run", folder, expected)
    finally:
        subprocess.run(["umount", disk], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", default=list(SCRIPTS), help=", ".join(SCRIPTS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/survive"))
    args = parser.parse_args()
    for script in args.scripts:
        folder, clock = args.out.resolve(), time.time()
        folder.mkdir(parents=True, exist_ok=True)
        out = folder / script
        if not (out / "length").exists():
            shutil.rmtree(out, ignore_errors=True)
            done = run(script, out, folder)
            assert done.returncode == 0, done.stderr
            (out / "length").write_text(str(time.time() - clock))
        length, expected = float((out / "length").read_text()), contents(out)
        size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
        draw, good = random.Random(f"{script} {args.seed}"), {"kills": 0, "full disks": 0}
        for kind, count in (("kills", args.kills), ("full disks", args.disks)):
            for i in range(count):
                share = draw.random()
                fault = (kill(script, folder, expected, share * length) if kind == "kills" else
                         fill(script, folder, expected, 0.02 + 0.93 * share, size))
                good[kind] += not fault
                print(f"{script} {kind} {i + 1}/{count} at {share:.2f}: {fault or 'the same bytes'}", flush=True)
        print(f"| {script}.py | {good['kills']} of {args.kills} kills | {good['full disks']} of {args.disks} full disks |",
              flush=True)


if __name__ == "__main__":
    main()
