"""memory_model.py on a network of one block, and the steps of gpu_check.py that CPUs can run."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

import gpu_check
from conftest import ROOT

MEASURE = """
import json, os
import memory_model
counted = memory_model.LiveBytes()
memory_model.install(1, counted)
import adm  # once for both
for depth in (1, 2):
    if os.fork() == 0:
        flags = ["--model", "tiny-sd3", "--batch-size", "1"]
        print(json.dumps(memory_model.measure("adm.py", flags, dict(depth=depth), counted)), flush=True)
        os._exit(0)
    os.wait()
"""


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++, which compiles guard.cpp")
needs_cpu_torch = pytest.mark.skipif(torch.version.cuda is not None, reason="memory_model.py needs a torch without CUDA")


@needs_compiler
@needs_cpu_torch
def test_adapters_of_a_unet_on_two_ranks_are_modelled():
    """FSDP gathers a unit in vain, which it waits for by another name of the stream."""
    flags = ["--model", "tiny-sdxl", "--lora-rank", "4", "--fake-lora", "4", "--batch-size", "2", "--micro-batch", "1"]
    run = subprocess.run([sys.executable, "memory_model.py", "--world", "2", "adm.py", *flags], cwd=ROOT / "tests",
                         text=True, capture_output=True)
    assert run.returncode == 0 and "generator      peak" in run.stdout, run.stderr[-2000:]


@needs_compiler
@needs_cpu_torch
def test_a_deeper_network_needs_more_memory_in_each_phase():
    run = subprocess.run([sys.executable, "-c", MEASURE], cwd=ROOT / "tests", text=True, stdout=subprocess.PIPE)
    one, two = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert list(one) == list(two) == ["fake", "generator", "discriminator", "update"]
    assert all(0 < one[phase] < two[phase] for phase in one)


def test_run_prints_what_the_script_does_not_and_table_sums_it_up(tmp_path, capsys):
    gpu_check.run("adm.py", "--model", "tiny-sd3", "--random-weights", "--profile", "1", "--batch-size", "1")
    log = capsys.readouterr().out
    assert "set-up: " in log and "record {'seconds': " in log
    (tmp_path / "steps.tsv").write_text("sd3_fakelora_m1\t0\t9\nsyncs\tskipped\t0\n")
    (tmp_path / "sd3_fakelora_m1.log").write_text(log)
    gpu_check.table(tmp_path)
    _, title, first, second = capsys.readouterr().out.splitlines()
    assert title.split()[:3] == ["step", "rc", "wall"]
    assert re.match(r"sd3_fakelora_m1 +0 +9 +[\d.]+ +[\d.]+  fake: [\d.]+, - \(-\); generator: ", first)
    assert second.split() == ["syncs", "skipped", "0"]


def test_the_other_steps_find_the_names_that_they_replace(capsys):
    gpu_check.mmdit()
    gpu_check.syncs()  # nothing waits for a GPU here
    assert capsys.readouterr().out.startswith("mmdit eager: forward ")
