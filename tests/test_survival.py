"""What a run survives: other processes, full disks, signals, damaged exports; and what it prints into a log file."""
import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import av
import pytest
import torch
from conftest import ROOT, refusal_of, rows, run, says
from PIL import Image

import adm
import adp
import avdm2
import collect_odes
import evaluate
import models
import sample
from models import progress
from models.checkpoint import InputError, open_tensors, save_safetensors
from models.job import folder
from models.job import job as job_module
from models.job.networks import check_export
from models.parallel import init_distributed
from models.pictures import read_mp4, save_mp4
from models.saving import WriteError, replacing
from models.state import complete_states, save_state
from test_state import PROGRESS, roles

SHORT = ["--batch-size", 2, "--evaluate", 0, "--lora-rank", 4, "--fake-lora", 4, "--max-iter", 2]


def refusal(script, *flags) -> str:
    return says(run, script, *flags)


# ---- one process at a time ---------------------------------------------------------------------------------

HOLDER = """
import pathlib, sys, time
from models.job.folder import hold
hold(pathlib.Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_is_held_by_one_process_until_it_dies(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path / "run"], stdout=subprocess.PIPE, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"run: process {holder.pid} on .* is at work in this folder; expected it to"):
        folder.hold(tmp_path / "run")
    holder.kill()
    holder.communicate()
    folder.hold(tmp_path / "run")


def test_a_file_system_without_locks_is_noted(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "lockf", lockf)
    folder.hold(tmp_path / "run")
    assert capsys.readouterr().out.startswith(f"note: {tmp_path / 'run'}: its file system knows no locks (No locks")


# ---- what cannot be written --------------------------------------------------------------------------------

@contextmanager
def full_disk(room: int):
    """No file can become longer than `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_cannot_be_written_leaves_the_older_ones(tmp_path):
    init_distributed()
    first = save_state(tmp_path / "state", 4, roles(), PROGRESS)
    with full_disk(1000), pytest.raises(InputError) as caught, folder.writing(tmp_path):
        save_state(tmp_path / "state", 5, roles(), PROGRESS)
    assert str(caught.value).startswith(f"could not write {tmp_path / 'state' / 'iter_00000005'} (")
    assert str(caught.value).endswith(f"; {first} is the newest complete state, from which --resume continues")
    assert list((tmp_path / "state").iterdir()) == complete_states(tmp_path / "state") == [first]


def test_a_full_disk_ends_a_run_in_one_sentence(tmp_path):
    out = tmp_path / "run"
    with full_disk(100_000):  # room for its log, not for its state
        message = refusal(adm, *SHORT, "--out", out)
    assert message.startswith(f"could not write {out / 'state' / 'iter_00000002'} (")
    assert message.endswith("; no state is complete yet")
    progress.end_bars()  # as `flags.entry` does


def test_what_stands_in_the_states_way_is_told_before_the_first_update(tmp_path):
    for name, stand in (("file", Path.touch), ("link", lambda path: path.symlink_to(tmp_path / "unmounted"))):
        (tmp_path / name).mkdir()
        stand(tmp_path / name / "state")
        assert refusal(adm, *SHORT, "--out", tmp_path / name) == (
            f"could not write {tmp_path / name / 'state'} (File exists); no state is complete yet")
        assert not (tmp_path / name / "metrics.jsonl").exists()


def test_replacing_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file/x \(Not a directory|File exists"), replacing(tmp_path / "file" / "x"):
        pass
    with full_disk(100), pytest.raises(WriteError, match=r"x.safetensors \(.*File too large"):
        save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1000)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Also where the disk cannot say so; one that says it is full is told."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda _: done.append(sorted(path.name for path in tmp_path.iterdir())))
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("x")
    assert done == [["x.tmp"]]
    for number, left in ((errno.EINVAL, "y"), (errno.ENOSPC, "x")):
        def fsync(_):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "fsync", fsync)
        with suppress(WriteError), replacing(tmp_path / "x") as temporary:
            temporary.write_text(left)
        assert (tmp_path / "x").read_text() == "y"


@pytest.mark.parametrize("script, flags", [(adm, []), (adp, ["--random-weights"]), (collect_odes, []), (sample, []), (evaluate, [])])
def test_out_is_a_file(tmp_path, script, flags):
    (tmp_path / "x").touch()
    for out in (tmp_path / "x", tmp_path / "x" / "run"):
        assert refusal(script, *flags, "--out", out) == (
            f"{out}: {tmp_path / 'x'} is a file; expected a folder or the name of a new one")


def test_other_failures_to_write_are_one_sentence(tmp_path, monkeypatch):
    def main(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "x.jsonl")
    monkeypatch.setattr(evaluate.flags, "check_numbers", main)
    assert refusal_of("evaluate.py") == "evaluate.py: x.jsonl: No space left on device\n"


def test_a_picture_that_cannot_be_written_is_a_note(tmp_path, monkeypatch, capsys):
    def save_grid(*_, **__):
        raise ValueError("no such encoder\nand more")
    monkeypatch.setattr(job_module, "save_grid", save_grid)
    run(adm, *SHORT, "--sample-every", 1, "--out", tmp_path / "run")
    assert "note: could not write a sample of update 2 (no such encoder); the run goes on\n" in capsys.readouterr().out
    assert (tmp_path / "run" / "generator_lora.safetensors").exists()


def test_videos_without_libx264(tmp_path, monkeypatch):
    monkeypatch.setattr(av, "codecs_available", av.codecs_available - {"libx264"})
    save_mp4(tmp_path / "x.mp4", [Image.new("RGB", (32, 32), (200, 30, 30))] * 4, 8, {"prompt": "red"})
    video = read_mp4(tmp_path / "x.mp4").float()
    assert video.shape == (4, 3, 32, 32)
    # Limited range and half the colours' resolution cost up to three steps of 255 on a plain picture.
    assert (video - torch.tensor([200.0, 30, 30]).view(3, 1, 1)).abs().max() < 6


class Board:
    """In place of TensorBoard's writer."""
    made, failing = [], False

    def __init__(self, out, purge_step):
        self.purge_step, self.steps = purge_step, []
        Board.made.append(self)

    def add_scalar(self, name, value, step):
        if Board.failing:
            raise OSError("disk")
        self.steps.append(step)


def test_tensorboard_after_resume_and_failing(tmp_path, monkeypatch, capsys):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(job_module.importlib.util, "find_spec", lambda name: name)
    run(adm, *SHORT, "--out", tmp_path / "run")
    monkeypatch.setattr(Board, "failing", True)
    run(adm, *SHORT[:-1], 4, "--resume", "--out", tmp_path / "run")
    assert [board.purge_step for board in Board.made] == [1, 3] and set(Board.made[0].steps) == {1, 2}
    assert capsys.readouterr().out.count("note: could not write TensorBoard's files (disk); the run goes on") == 1


# ---- signals -----------------------------------------------------------------------------------------------

def start(out, *flags):
    command = [sys.executable, ROOT / "adm.py", *SHORT[:-2], "--out", out, *flags]
    return subprocess.Popen(list(map(str, command)), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # if pytest ignores it


def test_ctrl_c_saves_and_a_signal_in_the_comparison_ends(tmp_path):
    """The same command line starts, continues, and would once more."""
    flags = [tmp_path / "run", "--max-iter", 3, "--resume", "--evaluate", 100_000]
    process = start(*flags)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # as torchrun passes it on
    output, errors = process.communicate(timeout=120)
    last = rows(tmp_path / "run")[-1]["gen_iter"]
    assert process.returncode == 0 and f"stopped at generator update {last}; continue with --resume" in output
    assert errors.count("SIGINT: finishing this update; a second signal ends at once\n") == 1
    assert [int(path.name[5:]) for path in complete_states(tmp_path / "run" / "state")] == [last]
    process = start(*flags)
    assert any(line.startswith("comparing 100000 samples") for line in process.stdout)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert (tmp_path / "run" / "generator_lora.safetensors").exists()


def test_a_reader_of_the_output_that_ends_costs_no_updates(tmp_path):
    """Such as tee, or a pager: what is printed at the end of the loop would meet a broken pipe."""
    process = start(tmp_path / "run", "--max-iter", 20, "--batch-size", 1, "--steps", 1)
    while not (tmp_path / "run" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "generator_lora.safetensors").exists()


def test_a_log_on_a_full_disk_costs_no_updates(tmp_path):
    """Which is another disk than the run's."""
    command = [sys.executable, ROOT / "adm.py", "--out", tmp_path / "run", "--max-iter", 2, "--batch-size", 1, "--steps", 1,
               "--evaluate", 0]
    with open("/dev/full", "w") as full:
        assert subprocess.run(list(map(str, command)), stdout=full, stderr=full, timeout=120).returncode == 0
        assert subprocess.run([sys.executable, ROOT / "adm.py", "--steps", "0"], stderr=full, timeout=60).returncode == 2
        signalled = "from models.progress import tell; tell('SIGTERM: finishing this update')"
        assert subprocess.run([sys.executable, "-c", signalled], cwd=ROOT, stderr=full, timeout=60).returncode == 0
    assert (tmp_path / "run" / "generator.safetensors").exists()


def test_a_signal_that_is_ignored_stays_so(tmp_path):
    """As nohup has it."""
    before = {number: signal.signal(number, handler) for number, handler in
              ((signal.SIGHUP, signal.SIG_IGN), (signal.SIGINT, signal.default_int_handler))}
    try:
        run(adm, *SHORT, "--max-iter", 1, "--out", tmp_path / "run")
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler  # again
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_interrupted_script_says_so(monkeypatch):
    def main(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate.flags, "check_numbers", main)
    with pytest.raises(AssertionError, match="130 == 2"):
        refusal_of("evaluate.py")


# ---- checksums of exports ----------------------------------------------------------------------------------

@pytest.mark.parametrize("part", ["tensor", "metadata"])
def test_one_wrong_bit_in_an_export_is_refused(tmp_path, part):
    path = tmp_path / "generator.safetensors"
    save_safetensors(path, {"a": torch.arange(12.0).view(3, 4), "b": torch.tensor(1.5), "c": torch.ones(2).bfloat16()},
                     {"dmdx.model": "tiny-sd3", "dmdx.steps": "4"})
    check_export(path)
    content = bytearray(path.read_bytes())
    place = len(content) - 3 if part == "tensor" else content.index(b'"dmdx.steps":"4"') + 14
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{path}: not as it was exported, its CRC-32 is not the "):
        check_export(path)
    for script, flags in ((sample, ["--ckpt", path]), (adm, ["--init", path, "--lora-rank", 0])):
        if part == "tensor" and script is sample:  # read before, as another architecture
            continue
        assert "not as it was exported" in refusal(script, *flags, "--out", tmp_path / "x")


def test_what_is_no_export_has_no_checksum(tmp_path):
    save_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"steps": "4"})
    assert "dmdx.crc32" not in open_tensors(tmp_path / "x.safetensors").metadata
    check_export(tmp_path / "x.safetensors")


# ---- numbers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, flags, words", [
    (adm, ["--cfg", "nan", "nan"], "--cfg nan nan: expected a finite number, at most 1000"),
    (adm, ["--cfg", 8, 2], "--cfg 8 2: expected the lower scale first"),
    (adm, ["--lr-theta", "nan"], "--lr-theta nan: expected a finite number, at most 10"),
    (adm, ["--lr-psi", -1], "--lr-psi -1: expected at least 0"), (adm, ["--lr-tau", "inf"], "--lr-tau inf: expected a"),
    (adm, ["--seed", 10 ** 30], f"--seed {10 ** 30}: expected a finite number, at most 9.22337e+18"),
    (adm, ["--seed", -1], "--seed -1: expected at least 0"),
    (adm, ["--shard-ranks", 0], "--shard-ranks 0 does not divide the 1 processes"),
    (adm, ["--profile", 0], "--profile 0: expected at least 1"),
    (adm, ["--lora-rank", 100_000], "--lora-rank 100000: expected a finite number, at most 1024"),
    (adm, ["--fake-lora", 100_000], "--fake-lora 100000: expected"), (adm, ["--steps", 10 ** 9], "--steps 1000000000: expected"),
    (adm, ["--generator-cfg-offset", "nan"], "--generator-cfg-offset nan: expected"),
    (adm, ["--max-iter", 10 ** 18], "--max-iter 1000000000000000000: expected"),
    (adm, ["--size", 10 ** 9, 10 ** 9], "--size 1000000000 1000000000: expected"),
    (adp, ["--lambdas", "nan", 1], "--lambdas nan 1: expected a finite number"),
    (avdm2, ["--lambdas", 1, "inf"], "--lambdas 1 inf: expected"), (avdm2, ["--lr-motion", -1], "--lr-motion -1: expected"),
    (avdm2, ["--warmup", -1], "--warmup -1: expected at least 1"), (avdm2, ["--cfg", "nan"], "--cfg nan: expected"),
    (collect_odes, ["--count", 10 ** 18], "--count 1000000000000000000: expected a finite number, at most 1e+08"),
    (collect_odes, ["--cfg", -1, 2], "--cfg -1 2: expected at least 0"),
    (sample, ["--lora-scale", "nan"], "--lora-scale nan: expected"), (sample, ["--cfg", "inf"], "--cfg inf: expected"),
    (sample, ["--steps", 10 ** 9], "--steps 1000000000: expected"),
    (evaluate, ["--mps-threshold", "nan"], "--mps-threshold nan: expected"), (evaluate, ["--batch", 0], "--batch 0: expected"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_numbers_that_nobody_can_mean(tmp_path, script, flags, words):
    assert refusal(script, *flags, "--out", tmp_path / "run").startswith(words)
    assert not (tmp_path / "run").exists()


# ---- the log -----------------------------------------------------------------------------------------------

def test_a_log_file_gets_a_line_now_and_then(capsys):
    bar = progress.bar(total=5000)
    for i in range(5000):
        bar.set_postfix_str(f"loss {i}", refresh=False)
        bar.update()
    bar.close()
    first, last = capsys.readouterr().err.splitlines()  # within 10 s
    assert first.startswith("0/5000 it in 00:00") and last.startswith("5000/5000 it in ") and last.endswith(", loss 4999")
    assert list(progress.bar(range(3), unit="shard")) == [0, 1, 2]


def test_an_error_has_a_line_to_itself(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress.bar(total=3)
    bar.update()
    progress.end_bars()
    print("error", file=sys.stderr)
    assert capsys.readouterr().err.endswith("\nerror\n")


def test_version_and_an_old_python(capsys, monkeypatch):
    for script in (adm, evaluate):
        with pytest.raises(SystemExit):
            script.parse_args(["--version"])
        assert capsys.readouterr().out == f"DMDX and AVDM2 {models.__version__}, PyTorch {torch.__version__}\n"
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    with pytest.raises(SystemExit, match="expected 3.11 or newer"):
        exec((ROOT / "models" / "__init__.py").read_text(), {})
