"""A run's folder: which it is, that one process at a time works in it, and what a run continues from.

One command line serves the first launch and every requeue: `--resume` continues from the newest state that
can be read, and starts the run where there is none.
"""
import argparse
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from models import data
from models.checkpoint import InputError, replacing
from models.job.notes import run_settings
from models.parallel import is_main, of_all, of_main, print0
from models.presets import Preset
from models.saving import WriteError
from models.shards import fingerprint
from models.state import Roles, check_sums, complete_states, load_state, read_progress, reason, remove_state

HELD = []  # lock files: closing one would end its lock


# ---- which folder ------------------------------------------------------------------------------------------

def check_out(out: Path) -> None:
    """Raises InputError unless `out` is a folder to write to, or can become one."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists() or path.is_symlink())
    if not there.is_dir():
        raise InputError(f"{out}: {there} is a {'file' if there.exists() else 'broken link'}; expected a folder or "
                         "the name of a new one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{out}: {there} cannot be written to; expected a folder that can")


def run_folder(args: argparse.Namespace, script: str) -> Path:
    """This run's folder, same on all ranks: --out, that of the state to resume, or the next free number."""
    args.script = script  # config.json keeps it, and what --resume compares of files that are in no state
    args.files = {name: fingerprint(path) for name in ("vae_ckpt", "pixel_ckpt", "teacher_2d")
                  if (path := getattr(args, name, None)) and path.exists()}
    runs = sorted(Path("runs").glob(f"{script}-{args.model}-[0-9][0-9][0-9]"))
    if args.out is None and args.resume == "newest" and runs:
        args.out = max(runs, key=lambda run: (bool(complete_states(run / "state")), run))
    elif args.out is None and args.resume not in (None, "newest"):
        args.out = run_of(args.resume)
        if not (args.out / "config.json").exists():
            raise InputError(f"--resume {args.resume}: not inside a run folder; "
                             "pass the folder to continue in as --out")
    elif args.out is None:
        args.out = Path("runs") / f"{script}-{args.model}-{int(runs[-1].name[-3:]) + 1 if runs else 0:03d}"
    args.out = of_main(args.out)
    if args.resume not in (None, "newest") and not Path(args.resume).is_dir():
        raise InputError(f"--resume {args.resume}: no such folder; expected a saved state, RUN/state/iter_XXXXXXXX")
    if not args.profile:
        check_out(args.out)
    if not args.resume:
        check_unused(args.out)
    elif args.resume != "newest" and (args.out / "config.json").exists() and \
            args.out.resolve() != run_of(args.resume).resolve():
        raise InputError(f"--resume {args.resume}: {args.out} holds another run, whose states would be deleted; "
                         "expected another --out, or --resume without a state to continue that run")
    return args.out


def run_of(state: str | Path) -> Path:
    """The run folder that a state is in. A link may lead into a run, or the state or state/ to another disk."""
    near, far = (Path(path(state)).parent.parent for path in (os.path.abspath, os.path.realpath))
    return near if (near / "config.json").exists() else far


def check_unused(out: Path) -> None:
    if (out / "config.json").exists():
        raise InputError(f"{out} already holds a run: pass --resume to continue it or another --out")


# ---- one process at a time ---------------------------------------------------------------------------------

def hold(out: Path) -> None:
    """Make the folder and lock it until this process ends, however it ends. Raises InputError when another
    process holds it. A lock of POSIX: no child of a killed process keeps it, and network disks know it."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read(200).strip() or "another process"
        raise InputError(f"{out}: {holder} is at work in this folder; expected it to end first, or another "
                         "--out") from None
    except OSError as error:
        print(f"note: {out}: its file system knows no locks ({error.strerror}); see to it that one process at "
              "a time works there", flush=True)
    HELD.append(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()


def release(out: Path) -> None:
    """End this process's lock of a folder before the process ends."""
    for file in [file for file in HELD if Path(file.name) == out / "lock"]:
        HELD.remove(file)
        file.close()


# ---- continuing --------------------------------------------------------------------------------------------

def resume(args: argparse.Namespace, out: Path, roles: Roles) -> dict[str, int] | None:
    """The progress of the state that --resume names, else of the newest that can be read, which fills `roles`;
    None where the folder holds none. Raises InputError when none can be read, and for another --init than
    that of the state's run."""
    states = of_main([Path(args.resume)] if args.resume != "newest" else complete_states(out / "state")[::-1])
    refused = []
    if states:
        started = run_of(states[0])
        if states[0].exists() and not run_settings(started):
            raise InputError(f"{started}: no config.json of the run that saved the state, which alone says what its "
                             "networks predict; expected it beside state/")
        say_what_changed(args, started)
    for path in states:
        fault = ""
        try:
            progress = load_state(path, roles)
            check_sums(path)
        except InputError as error:
            fault = str(error)
        faults = of_all(fault)  # a rank reads its rows alone
        if not any(faults):
            for state, why in refused:
                print0(f"note: {why}; {path}, the state before it, is taken instead")
                if is_main():  # the next state that is saved removes it
                    os.replace(state, state.with_suffix(".tmp"))
            print0(f"resumed {path}: generator update {progress['gen_iter']}")
            return progress
        refused.append((path, next(filter(None, faults))))
    if refused:
        raise InputError(refused[0][1])
    say_what_changed(args, out)
    if exported := sorted(out.glob("generator*.safetensors")):
        raise InputError(f"--resume: {out} holds no complete state but {exported[0].name} of a run that has "
                         "ended; expected another --out")
    print0(f"--resume: {out} holds no complete state, so the run starts there")
    return None


def say_what_changed(args: argparse.Namespace, started: Path) -> None:
    """A flag forgotten on the command line of --resume would otherwise change the run unnoticed. Raises
    InputError for another script, --model or --init than that of the run in the folder `started`."""
    before, now = run_settings(started), json.loads(json.dumps(vars(args), default=str))
    changed = [f"--{name.replace('_', '-')} {now[name]} (was {value})" for name, value in before.items()
               if name not in ("out", "resume", "max_iter", "prompts_digest", "teacher_files", "files")
               and now.get(name, value) != value]
    if before.get("prompts_digest") not in (None, now.get("prompts_digest")):
        changed.append({"adp": "ODE pairs", "avdm2": "clips"}.get(args.script, "prompts"))
    files, were = (run.get("teacher_files", {}) | run.get("files", {}) for run in (now, before))
    changed += [f"what is in the file of --{flag}" for flag, name in (
        ("ckpt", "checkpoint"), ("text-ckpt", "text_ckpt"), ("tokenizers", "tokenizers"), ("motion-ckpt", "motion"),
        ("vae-ckpt", "vae_ckpt"), ("pixel-ckpt", "pixel_ckpt"), ("teacher-2d", "teacher_2d"))
        if name in files and files[name] != were.get(name, files[name])]
    for name, said in (("script", ""), ("model", "--model ")):
        if (was := before.get(name, now[name])) != now[name]:
            raise InputError(f"--resume: {started} holds a run of {said}{was}; this one is of {said}{now[name]}")
    if before and before.get("init") != now.get("init"):  # the state does not tell what the network predicts
        raise InputError(f"--init {now.get('init')}: expected {before.get('init')}, with which this run was started")
    if changed:
        print0(f"changed since this run was last started: {', '.join(changed)}")


def note_old_export(out: Path) -> None:
    """Say so where a run went on after it had exported its generator, and has not come to its end again."""
    try:
        most = run_settings(out).get("max_iter")
        reached = [read_progress(state / "progress.json")["gen_iter"] for state in complete_states(out / "state")[-1:]]
    except InputError:
        return  # --resume says what is wrong there
    if type(most) is int and reached and reached[0] < most:
        print0(f"note: {out} is at update {reached[0]} of {most}; the generator there is of an end before that")


def open_folder(args: argparse.Namespace, preset: Preset, out: Path, gen_iter: int, global_iter: int) -> None:
    """Before the first update of a launch, on rank 0: what a run that got further has left is deleted, and
    config.json is written."""
    for state in complete_states(out / "state"):
        if int(state.name[5:]) > global_iter:
            remove_state(state)
    data.truncate_jsonl(out / "metrics.jsonl", "global_iter", global_iter)
    data.truncate_jsonl(out / "evaluation.jsonl", "gen_iter", gen_iter)
    git = "" if not shutil.which("git") else subprocess.run(  # many containers have none
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    config = dict(args=vars(args), preset=preset._asdict(), argv=sys.argv, git=git, torch=torch.__version__,
                  world_size=dist.get_world_size())
    (out / "state").mkdir(exist_ok=True)  # what stands in the way of it is told now, not at the first state
    with replacing(out / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=1, default=str))


# ---- what cannot be written --------------------------------------------------------------------------------

@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Raises InputError for what cannot be written, on a full disk above all, and names the newest complete
    state."""
    try:
        yield
    except OSError as error:
        what = error if isinstance(error, WriteError) else f"{error.filename or out} ({error.strerror or error})"
        states = complete_states(out / "state")
        newest = f"{states[-1]} is the newest complete state, from which --resume continues" if states else ""
        raise InputError(f"could not write {what}; {newest or 'no state is complete yet'}") from error


@contextmanager
def noted(what: str) -> Iterator[None]:
    """For what a run can do without: a failure is a note."""
    try:
        yield
    except Exception as error:  # of PIL, PyAV and TensorBoard, of many kinds
        tqdm.write(f"note: could not write {what} ({reason(error)}); the run goes on")
