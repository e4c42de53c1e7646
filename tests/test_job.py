"""models/job/job.py through adm.py: run folders, resuming, the log, the hub, and every refusal as the user meets it."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from inspect import signature

import numpy as np
import pytest
import test_checkpoint as hub
import torch
from conftest import ROOT, golden, refusal_of, rows, run, says
from PIL import Image
from torch import nn
from torch._dynamo.testing import CompileCounter
from tqdm import tqdm

import adm
import sample
from models.job import job as job_module
from models.job import networks
from models.checkpoint import InputError, open_tensors, save_safetensors
from models.data import noise, uniform
from models.diffusion import Denoiser, solve, teacher_times
from models.job.flags import resolve
from models.job.folder import run_folder
from models.job.log import Log, health
from models.job.networks import load_network, load_text, load_vae
from models.job.sampling import deviations
from models.parallel import adamw, init_distributed, shard
from models.presets import PRESETS

ROW = PRESETS["tiny-sd3"]
DENOISER = "model.diffusion_model."
SMALL = ["--batch-size", 2, "--evaluate", 0, "--lora-rank", 4, "--fake-lora", 4]  # states of 13 MB, not 60


def train(*flags):
    run(adm, *flags)


def refusal(*flags) -> str:
    """The one sentence with which adm.py refuses these flags."""
    return says(train, *flags)


def process(script, *flags, **environment):
    command = [sys.executable, *map(str, [script, *flags])]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two updates, both of its states kept. Tests that write to it take a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    train(*SMALL, "--max-iter", 2, "--save-every", 1, "--out", out)
    return out


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


# ---- the run folder -----------------------------------------------------------------------------------------------

def folder(*flags):
    init_distributed()
    return run_folder(adm.parse_args(list(map(str, flags))), "adm")


def test_run_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = job_module.Path("runs")
    assert folder() == runs / "adm-tiny-sd3-000"
    for name in ("adm-tiny-sd3-000", "adm-tiny-sd3-009", "adm-sd3-medium-020", "adp-tiny-sd3-030", "adm-tiny-sd3-old"):
        (runs / name).mkdir(parents=True)
    for name in ("adm-tiny-sd3-000/state/iter_00000005", "adm-tiny-sd3-009/state/iter_00000001.tmp"):
        (runs / name).mkdir(parents=True)
    assert folder() == runs / "adm-tiny-sd3-010"
    assert folder("--resume") == runs / "adm-tiny-sd3-000"  # the newest that can be continued
    assert folder("--model", "sd3-medium") == runs / "adm-sd3-medium-021"
    assert folder("--out", "x") == folder("--out", "x", "--resume") == job_module.Path("x")
    assert folder("--model", "sd3-medium", "--resume") == runs / "adm-sd3-medium-020"  # killed before its first state
    assert folder("--model", "sdxl", "--resume") == runs / "adm-sdxl-000"


def test_a_named_state_continues_the_run_that_saved_it(tmp_path, monkeypatch):
    """Not the newest run, whose metrics.jsonl would be cut."""
    monkeypatch.chdir(tmp_path)
    for name in ("000", "001"):
        (tmp_path / f"runs/adm-tiny-sd3-{name}/state/iter_00000001").mkdir(parents=True)
        (tmp_path / f"runs/adm-tiny-sd3-{name}/config.json").touch()
    assert folder("--resume", "runs/adm-tiny-sd3-000/state/iter_00000001") == tmp_path / "runs/adm-tiny-sd3-000"
    assert folder("--resume", "runs/adm-tiny-sd3-000/state/iter_00000001", "--out", "x") == job_module.Path("x")
    with pytest.raises(InputError, match="--resume elsewhere/iter_00000001: not inside a run folder"):
        folder("--resume", "elsewhere/iter_00000001")


def test_a_state_of_one_run_deletes_nothing_in_the_folder_of_another(tmp_path, finished, copy):
    """What had got further than the named state was deleted there, whichever run's it was."""
    before, state = contents(copy), finished / "state" / "iter_00000001"
    assert refusal(*SMALL, "--max-iter", 3, "--resume", state, "--out", copy) == (
        f"--resume {state}: {copy} holds another run, whose states would be deleted; expected another --out, or --resume "
        "without a state to continue that run")
    assert contents(copy) == before
    (tmp_path / "link").symlink_to(copy)
    assert folder("--resume", copy / "state" / "iter_00000001", "--out", tmp_path / "link") == tmp_path / "link"
    (tmp_path / "last").symlink_to(copy / "state" / "iter_00000001")
    assert folder("--resume", tmp_path / "last") == copy.resolve()


def test_a_run_is_never_overwritten(finished):
    before = contents(finished)
    assert refusal(*SMALL, "--out", finished) == f"{finished} already holds a run: pass --resume to continue it or another --out"
    assert contents(finished) == before


def test_config_json_holds_the_resolved_settings(finished):
    config = json.loads((finished / "config.json").read_text())
    args = config["args"]
    assert (args["model"], args["max_iter"], args["lora_rank"], args["seed"], args["out"]) == ("tiny-sd3", 2, 4, 0, str(finished))
    assert (args["steps"], args["cfg"], args["lr_psi"], args["size"]) == (ROW.steps, list(ROW.cfg), ROW.lr_psi, list(ROW.size))
    assert args["micro_batch"] == 2  # the preset's, cut to the batch
    assert config["preset"]["config"] | {"attn2": ()} == ROW.config | {"attn2": ()}
    assert config["world_size"] == 1 and config["torch"] == torch.__version__ and config["argv"] == sys.argv
    assert config["git"] == "" or len(config["git"]) == 40


def test_metrics_have_every_figure_of_every_iteration(finished):
    first, second = rows(finished)
    assert [first["global_iter"], second["global_iter"], second["gen_iter"], second["skipped"]] == [1, 2, 2, 0]
    names = {f"{kind}_{role}" for kind in ("loss", "grad_norm") for role in ("psi", "theta", "tau")}
    assert names | {"margin", "told_apart", "dmd", "cos_dmd", "grad_x_0", "x_0_mean", "x_0_std", "seconds", "gib"} < set(first) == set(second)
    assert len(first["margin"]) == ROW.config["depth"]  # one a head


# ---- resuming -----------------------------------------------------------------------------------------------------

def test_metrics_are_not_doubled_after_a_resume(copy):
    (copy / "metrics.jsonl").open("a").write('{"global_iter": 3, "gen')  # what kill -9 can leave
    train(*SMALL, "--max-iter", 3, "--resume", copy / "state" / "iter_00000001")
    assert [row["global_iter"] for row in rows(copy)] == [1, 2, 3]
    assert sorted(path.name for path in (copy / "state").iterdir()) == ["iter_00000001", "iter_00000003"]  # of the new branch alone


def test_a_finished_run_is_exported_again(copy):
    before = contents(copy)
    for name in ("generator_lora.safetensors", "generator_lora_kohya.safetensors"):
        (copy / name).unlink()
    train(*SMALL, "--max-iter", 2, "--resume", "--out", copy)
    after = contents(copy)
    assert {path.name for path in before if after[path] != before[path]} <= {"config.json"}


def test_resume_says_which_flags_changed(copy, capsys):
    train(*SMALL, "--max-iter", 2, "--resume", "--out", copy, "--steps", 2)
    assert f"changed since this run was last started: --save-every 500 (was 1), --steps 2 (was {ROW.steps})\n" in capsys.readouterr().out


def test_a_state_without_its_runs_settings_is_refused(copy):
    """They say what the networks predict: a run from a generator of velocity would go on as one of epsilon."""
    (copy / "config.json").unlink()
    assert refusal(*SMALL, "--max-iter", 3, "--resume", "--out", copy) == (
        f"{copy}: no config.json of the run that saved the state, which alone says what its networks predict; expected it "
        "beside state/")


def test_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    train(*SMALL, "--max-iter", 1, "--out", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["git"] == ""


def test_resume_starts_where_no_state_is_complete(tmp_path, finished, capsys):
    """The command of every requeue is that of the first launch."""
    out = tmp_path / "run"
    for _ in range(2):
        train(*SMALL, "--max-iter", 2, "--save-every", 1, "--resume", "--out", out)
        assert f"--resume: {out} holds no complete state, so the run starts there\n" in capsys.readouterr().out
        assert [row["loss_tau"] for row in rows(out)] == [row["loss_tau"] for row in rows(finished)]
        for path in out.glob("generator*"):
            path.unlink()
        shutil.rmtree(out / "state")
        (out / "state" / "iter_00000001.tmp").mkdir(parents=True)  # killed while it saved its first


@pytest.mark.parametrize("state", (True, False))
def test_resume_continues_no_other_run(copy, state):
    """dmd.py's settings in adm.py's folder, another model in the same: with and without a complete state."""
    if not state:
        shutil.rmtree(copy / "state")
    for change, said in (({"script": "dmd"}, "dmd; this one is of adm"),
                         ({"model": "tiny-sdxl"}, "--model tiny-sdxl; this one is of --model tiny-sd3")):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | {"args": config["args"] | change}))
        before = contents(copy)
        assert refusal(*SMALL, "--max-iter", 2, "--resume", "--out", copy) == f"--resume: {copy} holds a run of {said}"
        assert contents(copy) == before
        (copy / "config.json").write_text(json.dumps(config))


def test_resume_does_not_start_where_a_run_has_ended(copy):
    shutil.rmtree(copy / "state")
    before = contents(copy)
    assert refusal(*SMALL, "--max-iter", 2, "--resume", "--out", copy) == (
        f"--resume: {copy} holds no complete state but generator_lora.safetensors of a run that has ended; "
        "expected another --out")
    assert contents(copy) == before


def test_states_on_another_disk(copy, tmp_path):
    """state/ or one of the states is a link; only links are deleted where others take their places."""
    (copy / "state").rename(tmp_path / "disk")
    (copy / "state").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "iter_00000001").rename(tmp_path / "first")
    (tmp_path / "disk" / "iter_00000001").symlink_to(tmp_path / "first")
    train(*SMALL, "--max-iter", 3, "--save-every", 1, "--resume", "--out", copy)
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["iter_00000002", "iter_00000003"]
    assert (tmp_path / "first" / ".metadata").exists()
    assert folder("--resume", copy / "state" / "iter_00000002") == copy


def test_a_named_state_that_is_not_there(tmp_path):
    state = tmp_path / "run" / "state" / "iter_00000007"
    assert refusal(*SMALL, "--resume", state, "--out", tmp_path / "run") == (
        f"--resume {state}: no such folder; expected a saved state, RUN/state/iter_XXXXXXXX")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, words", [
    (["--lora-rank", 8], "Size mismatch"), (["--lora-rank", 0], "Missing key"), (["--fake-lora", 0], "Missing key")],
    ids=["rank", "full", "full-fake"])
def test_a_state_of_other_flags_is_refused(finished, capsys, flags, words):
    before = contents(finished)
    message = refusal(*SMALL, "--max-iter", 4, *flags, "--resume", "--out", finished)
    assert message.startswith(f"{finished / 'state' / 'iter_00000002'}: not a state of this model and these flags, or damaged (")
    assert words in message and f"{flags[0]} {flags[1]} (was 4)" in capsys.readouterr().out
    assert contents(finished) == before


@pytest.mark.parametrize("left", [0.5, 0.999, 0], ids=["half", "end", "all"])
def test_a_damaged_state_is_refused_and_the_one_before_it_is_taken(copy, finished, capsys, left):
    path, = (copy / "state" / "iter_00000002").glob("*.distcp")
    os.truncate(path, int(left * path.stat().st_size))
    before = contents(copy)
    message = refusal(*SMALL, "--max-iter", 2, "--resume", path.parent)
    assert message.startswith(f"{path.parent}: not a state of this model and these flags, or damaged (")
    assert contents(copy) == before
    capsys.readouterr()
    train(*SMALL, "--max-iter", 2, "--resume", "--out", copy)
    older = copy / "state" / "iter_00000001"
    assert f"note: {message}; {older}, the state before it, is taken instead\nresumed {older}: generator update 1\n" in (
        capsys.readouterr().out)
    assert [row["loss_tau"] for row in rows(copy)] == [row["loss_tau"] for row in rows(finished)]
    assert sorted(path.name for path in (copy / "state").iterdir()) == ["iter_00000001", "iter_00000002"]


def test_wrong_counters_are_found(copy, capsys):
    path = copy / "state" / "iter_00000002" / "progress.json"
    path.write_text(path.read_text().replace('"gen_iter": 2', '"gen_iter": 3'))  # one bit
    train(*SMALL, "--max-iter", 2, "--resume", "--out", copy)
    assert f"note: {path}: damaged, its sha256 is another than when it was written; " in capsys.readouterr().out
    assert [row["gen_iter"] for row in rows(copy)] == [1, 2]


# ---- flags and prompts --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--batch-size", 5, "--micro-batch", 2], "--batch-size 5 is no multiple of 1 processes x --micro-batch 2"),
    (["--batch-size", 0], "--batch-size 0: expected at least 1"), (["--micro-batch", 0], "--micro-batch 0: expected at least 1"),
    (["--steps", 0], "--steps 0: expected at least 1"), (["--max-iter", 0], "--max-iter 0: expected at least 1"),
    (["--ttur", 0], "--ttur 0: expected at least 1"), (["--save-every", 0], "--save-every 0: expected at least 1"),
    (["--sample-every", 0], "--sample-every 0: expected at least 1"), (["--evaluate", 1], "--evaluate 1: expected 0 or at least 2"),
    (["--evaluate", -1], "--evaluate -1"), (["--lora-rank", -1], "--lora-rank -1: expected at least 0"),
    (["--fake-lora", -1], "--fake-lora -1: expected at least 0"),
    (["--shard-ranks", 3], "--shard-ranks 3 does not divide the 1 processes"), (["--shard-ranks", -1], "--shard-ranks -1"),
    (["--lora-rank", 4, "--export-dtype", "bf16"], "--export-dtype bf16: adapters are exported in float32; expected --lora-rank 0"),
    (["--profile", 2, "--resume"], "--profile 2 --resume: expected a profile from the first update on, without --resume"),
    (["--size", 32, 30], "--size 32 30: tiny-sd3 takes multiples of 8 up to 64"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_flags_that_cannot_work(tmp_path, flags, words):
    assert words in refusal("--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name, text, words", [
    ("empty.txt", "\n  \n", "no prompt in this file"), ("bad.jsonl", '{"prompt": "a"}\n{"prompt"\n', "line 2 is not JSON"),
    ("other.jsonl", '{"label": "a"}\n', "line 1"), ("prompts.docx", "a", "not a prompt file; expected one of .txt"),
    ("absent.txt", None, "no such file")])
def test_prompt_files_that_cannot_be_read(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text)
    message = refusal(*SMALL, "--prompts", tmp_path / name, "--out", tmp_path / "run")
    assert message.startswith(f"{tmp_path / name}: ") and words in message and not (tmp_path / "run").exists()


def test_a_model_without_prompts_and_checkpoint_says_what_to_pass(tmp_path):
    row = PRESETS["sd3-medium"]
    assert refusal("--model", "sd3-medium", "--out", tmp_path / "run") == (
        "--model sd3-medium needs --prompts FILE (.txt, .jsonl, .csv or .tsv), "
        f"and --ckpt {row.file} or access to {row.repo} on the hub (HF_TOKEN)")
    message = refusal("--model", "sd3-medium", "--ckpt", ROW.ckpt, "--out", tmp_path / "run")
    assert message == "--model sd3-medium needs --prompts FILE (.txt, .jsonl, .csv or .tsv)"


# ---- checkpoints --------------------------------------------------------------------------------------------------

def damaged(path, kind):
    """A damaged or foreign checkpoint at `path`: (the file, words of its refusal)."""
    source = open_tensors(ROW.ckpt)
    tensors = {name: source[name] for name in source}
    name = DENOISER + "joint_blocks.0.x_block.attn.qkv.weight"
    sizes = DENOISER + "x_embedder.proj.weight"  # the architecture is read from this one
    if kind == "absent":
        return path, "no such file or folder"
    if kind == "truncated":
        path.write_bytes(ROW.ckpt.read_bytes()[:-100])
        return path, "truncated, "
    if kind == "no checkpoint":
        path.write_text("<html>")
        return path, "expected a safetensors file"
    if kind == "pickle":
        torch.save({"state_dict": tensors, "args": argparse.Namespace(lr=1)}, path.with_suffix(".ckpt"))
        return path.with_suffix(".ckpt"), "refused, because reading it would run code (it calls argparse.Namespace)"
    if kind == "no text":
        tensors = {key: t for key, t in tensors.items() if not key.startswith("text_encoders.")}
        words = "no text encoders; expected"
    elif kind == "no VAE":
        tensors = {key: t for key, t in tensors.items() if not key.startswith("first_stage_model.")}
        words = "expected tensors named first_stage_model.*, found "
    elif kind == "VAE of another layout":
        tensors = {key.replace("encoder.down.", "encoder.down_blocks."): t for key, t in tensors.items()}
        words = "no VAE in the original layout: expected encoder.down.0.block.0.conv1.weight, ..., found decoder."
    elif kind == "no T5":
        tensors, words = {key: t for key, t in tensors.items() if "t5xxl" not in key}, "no T5 encoder; pass --text-ckpt"
    elif kind == "SDXL":
        tensors = {DENOISER + "input_blocks.0.0.weight": torch.zeros(3)}
        words = "another architecture: "
    elif kind.startswith("missing"):
        key = {"missing": name, "missing size": sizes, "missing in VAE": "first_stage_model.encoder.conv_in.weight",
               "missing in text": "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias"}[kind]
        del tensors[key]
        words = key
    elif kind.startswith("extra"):
        key = {"extra": DENOISER, "extra in VAE": "first_stage_model.",
               "extra in text": "text_encoders.t5xxl.transformer."}[kind] + "unknown.weight"
        tensors[key], words = torch.zeros(3), f"1 tensors are not expected ({key})"
    else:
        key = {"shape": name, "shape of size": sizes}[kind]
        tensors[key], words = tensors[key][None], f"1 tensors have another shape ({key} is (1, "
    save_safetensors(path, tensors)
    return path, words


@pytest.mark.parametrize("kind", [
    "absent", "truncated", "no checkpoint", "pickle", "no text", "no VAE", "VAE of another layout", "no T5",
    "SDXL", "missing", "missing size", "missing in VAE", "missing in text", "extra", "extra in VAE", "extra in text", "shape", "shape of size"])
def test_checkpoints_that_do_not_fit(tmp_path, kind):
    path, words = damaged(tmp_path / "x.safetensors", kind)
    message = refusal("--batch-size", 2, "--ckpt", path, "--out", tmp_path / "run")
    assert message.startswith(f"{path}: ") and words in message and not (tmp_path / "run").exists()


def test_another_architecture_is_refused_before_text_encoders_are_looked_for(tmp_path):
    """For sd3-medium those would come from the hub, 11 GB."""
    path = golden("mmdit_*.safetensors")[0]
    assert refusal(*SMALL, "--ckpt", path, "--out", tmp_path / "run").startswith(f"{path} is not tiny-sd3: depth ")
    message = refusal("--model", "sd3-medium", "--prompts", ROW.prompts, "--ckpt", ROW.ckpt, "--out", tmp_path / "run")
    assert message == f"{ROW.ckpt} is not sd3-medium: depth 6 (expected 24), width 96 (expected 1536), heads 6 (expected 24)"


def test_a_refusal_is_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "x.jsonl").write_text("{\n")
    message = refusal_of("adm.py", *SMALL, "--prompts", tmp_path / "x.jsonl", "--out", tmp_path / "run")
    assert message.startswith(f"adm.py: {tmp_path / 'x.jsonl'}: line 1 is not JSON") and message.count("\n") == 1
    path, words = damaged(tmp_path / "x.safetensors", "missing")
    result = process(ROOT / "adm.py", *SMALL, "--ckpt", path, "--out", tmp_path / "run")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"adm.py: {path}: ") and words in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_refusal_on_two_ranks_ends_at_once(tmp_path):
    """After both ranks have met in collectives. torchrun exits with 1 and tells its own story; ours is the sentence."""
    result = process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, ROOT / "adm.py", *SMALL, "--resume",
                     tmp_path / "absent", "--out", tmp_path / "run")
    assert result.returncode == 1
    assert 1 <= result.stderr.count(f"adm.py: --resume {tmp_path / 'absent'}: no such folder; expected a saved state") <= 2
    assert f'{ROOT / "adm.py"}", line' not in result.stderr and "models/job/job.py" not in result.stderr  # no traceback of ours
    assert not (tmp_path / "run").exists()


# ---- the hub ------------------------------------------------------------------------------------------------------

HUB = """
import sys
import adm, sample
from models.checkpoint import InputError
from models.presets import PRESETS
out, tiny = sys.argv[1], PRESETS["tiny-sd3"]
PRESETS["tiny-sd3"] = tiny._replace(ckpt=None, repo="org/open")
adm.main(adm.parse_args(f"--batch-size 2 --max-iter 1 --evaluate 0 --lora-rank 4 --out {out}/run".split()))
sample.main(sample.parse_args(f"--ckpt {out}/run --out {out}/hub --count 2".split()))
PRESETS["sd3-medium"] = PRESETS["sd3-medium"]._replace(repo="org/gated")
try:
    adm.main(adm.parse_args(f"--model sd3-medium --prompts {tiny.prompts} --out {out}/refused".split()))
except InputError as error:
    print(error)
"""


def test_weights_come_from_the_hub_when_no_path_is_given(tmp_path, monkeypatch):
    """Training, and sampling of the run: its config.json has no checkpoint either. In a process of its own, because
    huggingface_hub reads its environment once."""
    monkeypatch.setitem(hub.REPOSITORY, ROW.file, ROW.ckpt.read_bytes())
    with ThreadingHTTPServer(("127.0.0.1", 0), hub.Hub) as server:
        server.seen = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = process("-c", HUB, tmp_path, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="0", HF_TOKEN="",
                         HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}", no_proxy="127.0.0.1")
        server.shutdown()
    assert result.returncode == 0, result.stderr
    assert server.seen.count(f"GET /org/open/resolve/main/{ROW.file}") == 1  # many readers, one download
    assert json.loads((tmp_path / "run" / "config.json").read_text())["args"]["ckpt"] is None
    flags = ["--lora", tmp_path / "run" / "generator_lora.safetensors", "--count", 2, "--out", tmp_path / "local"]
    sample.main(sample.parse_args(list(map(str, flags))))
    for name in ("000.png", "001.png"):
        assert np.array_equal(Image.open(tmp_path / "hub" / name), Image.open(tmp_path / "local" / name))
    words = f"{PRESETS['sd3-medium'].file} of org/gated: access refused (HTTP 403): check the name, accept the terms on "
    assert words in result.stdout and "--ckpt PATH takes a local copy" in result.stdout
    assert not (tmp_path / "refused").exists()


# ---- health and profile -------------------------------------------------------------------------------------------

def history(count, **changed):
    """Log rows of a healthy run; `changed` values are numbers, or functions of the row's place in [0, 1]."""
    def row(place):
        values = dict(margin=[0.02, 0.04], loss_tau=1.97, grad_norm_psi=1.0, grad_norm_theta=0.1, grad_norm_tau=0.2, x_0_mean=[0.1, -0.1],
                      x_0_std=[1.0, 1.0], told_apart=[0.5, 0.6]) | changed
        return {key: value(place) if callable(value) else value for key, value in values.items()}
    return [row(i / max(1, count - 1)) for i in range(count)]


@pytest.mark.parametrize("rows, words", [
    (history(100), "margin +0.0300 told apart 0.55 loss_tau 1.970 x_0 +0.000 +- 1.000 health: good"),
    (history(100, margin=[1e-5, -2e-5]), "health: D cannot tell fake from real"),
    (history(100, told_apart=[0.3, 0.6]), "health: D cannot tell fake from real"),  # or the wrong way round
    (history(100, loss_tau=1e-3), "health: D has won: its loss is 0"),
    (history(100, x_0_std=lambda place: [1, 1 + place]), "health: channel 1 of x_0: its deviation changed 1.87-fold over 100 iterations"),
    (history(100, x_0_std=lambda place: [1 - place / 2, 1]), "health: channel 0 of x_0: its deviation changed 0.53-fold over 100 iterations"),
    (history(100, x_0_std=lambda place: [float("nan")]), "health: channel 0 of x_0: its deviation changed nan-fold"),
    (history(100, cos_dmd=[0.25, 0.1, None, 0.4]), "cos +0.25 (+0.10 +nan +0.40) x_0"),
    (history(100, cos_dmd=[0.1], grad_x_0=[0.034]), "gradient 0.034 cos +0.10 () x_0"),
    (history(100, cos_dmd=[-0.1]), "health: the generator's gradient points away from DMD's direction"),
    (history(100, grad_norm_theta=0.0), "health: theta has no gradient"),
    (history(3, grad_norm_psi=0.0, grad_norm_tau=0.0), "health: psi has no gradient; tau has no gradient"),
    (history(3, grad_norm_psi=lambda place: place), "health: good"),  # it was 0 once
    (history(49, margin=[0.0], loss_tau=0.0), "health: good"),  # too early to tell
], ids=["good", "D blind", "D the wrong way", "D won", "drift up", "drift down", "nan", "cosines", "gradient", "away", "theta dead", "two dead", "not dead", "early"])
def test_health_names_what_is_wrong(rows, words):
    line = health(rows)
    assert words in line and (words.startswith(("margin", "gradient", "cos")) or line.endswith(words) or "nan" in words)


def test_health_compares_with_the_teachers_deviation():
    rows = history(100, x_0_std=[0.9, 1.4])
    assert "deviation / teacher's 0.90 to 1.12 x_0" in health(rows, [1.0, 1.25]) and health(rows, [1.0, 1.25]).endswith("good")
    assert health(rows, [1.2, 1.4]).endswith("health: channel 0 of x_0 has 0.75 times the teacher's deviation")


def test_the_teachers_deviation_is_that_of_its_samples():
    _, mesh = init_distributed()
    args = adm.parse_args(["--evaluate", "16"])
    preset = resolve(args)
    net, text = load_network(args, preset, mesh, torch.device("cpu")), load_text(args, preset, mesh, torch.device("cpu"))
    F, prompts = Denoiser(net, preset.predicts, preset.schedule), list(preset.sample_prompts)[:3]
    found = deviations(F, text, prompts, args, preset, (4, 8, 8), torch.device("cpu"))
    with torch.no_grad():
        x_0 = solve(F, noise((4, 8, 8), 0, 0, "sample", [0, 1, 2]), teacher_times(28, 3.0), text.encode(prompts),
                    text.unconditional(), torch.full((3,), 2.0))  # the middle of --cfg 1.5 2.5
    assert found == pytest.approx(x_0.std((0, 2, 3), correction=0).tolist(), rel=1e-4)


def test_diagnostics_by_hand():
    """Two micro-batches; no time in the second third of [0, 1]."""
    init_distributed()
    log, x = Log(), torch.tensor([[[[1.0, 3.0]], [[0.0, 2.0]]]])  # B 1, C 2, H 1, W 2
    for t, scale in ((torch.tensor([0.1, 1.0]), 1.0), (torch.tensor([0.3, 0.9]), 3.0)):
        log.latents(scale * x)
        log.pairs(torch.tensor([[0.0, 1.0]]), torch.tensor([[scale, 0.0]]))
        grad = torch.tensor([[3.0, 4.0], [0.0, scale]])
        log.gradient(t, grad.view(2, 1, 1, 2), torch.tensor([[3.0, 4.0], [1.0, 0.0]]).view(2, 1, 1, 2))
    log.close()
    assert log.record["x_0_mean"] == pytest.approx([4.0, 2.0])  # of 1, 3, 3, 9 and of 0, 2, 0, 6
    assert log.record["x_0_std"] == pytest.approx([3.0, 6 ** 0.5])
    assert log.record["margin"] == pytest.approx([0.5]) and log.record["told_apart"] == pytest.approx([0.5])
    assert log.record["cos_dmd"] == [pytest.approx(0.5), pytest.approx(1.0), None, pytest.approx(0.0)]
    assert log.record["grad_x_0"] == [pytest.approx(3.5), pytest.approx(5.0), None, pytest.approx(2.0)]


def idle_job(out, *flags):
    """A job that has started and has nothing to train."""
    _, mesh = init_distributed()
    args = adm.parse_args(["--random-weights", "--out", str(out), *map(str, flags)])
    job = job_module.Job("adm", args, resolve(args), mesh, torch.device("cpu"))
    job.start()
    return job


def test_states_are_saved_every_so_many_updates_and_at_the_end(tmp_path, monkeypatch):
    """Once each, although --ttur has passes without an update."""
    saved = []
    monkeypatch.setattr(job_module, "save_state", lambda folder, iteration, roles, progress: saved.append(
        (iteration, progress["gen_iter"])))
    job = idle_job(tmp_path / "run", "--max-iter", 5, "--save-every", 2, "--ttur", 3)
    for i in range(1, 16):
        job.end(job.begin(i), i // 3)
    assert saved == [(6, 2), (12, 4), (15, 5)]


def test_a_profile_leaves_the_first_update_out(tmp_path, monkeypatch, capsys):
    """It loads kernels and fills caches. Here it takes 100 s, the others 2 and 4."""
    now = [0.0]
    monkeypatch.setattr(job_module.time, "perf_counter", lambda: now[0])
    job = idle_job(tmp_path / "run", "--profile", 3)
    for i, seconds in enumerate((100, 2, 4), 1):
        log = job.begin(i)
        now[0] += seconds
        job.phase("generator")
        job.end(log, i)
    job.finish(None, None, None)
    assert f"{'generator':14} {3:8.3f} s/it\n" in capsys.readouterr().out


@pytest.mark.parametrize("flags, told", [([], False), (["--lora-rank", 4], True), (["--lora-rank", 4, "--lr-theta", 0.5], False)])
def test_a_rate_that_the_preset_has_for_the_other_kind_of_weights(tmp_path, capsys, flags, told):
    """The paper's are 1e-6 for SD3-Medium's adapter and 1e-8 for all of SD3.5-Large."""
    idle_job(tmp_path / "run", *flags)
    assert ROW.lora_rank == 0 and ("is the preset's for --lora-rank 0, not for 4\n" in capsys.readouterr().out) == told


def test_a_resumed_run_counts_on(tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "resume", lambda *args: dict(gen_iter=3, global_iter=7, skipped=2))
    job = idle_job(tmp_path / "run", "--resume")
    assert (job.gen_iter, job.global_iter, job.skipped) == (3, 7, 2)


def test_a_guided_generator_is_guided_wherever_it_is_looked_at(tmp_path, monkeypatch):
    """At the middle of --cfg less the offset; the teacher at its own scale. And as often as the flags say, with the
    moving average of its weights, here 0."""
    asked, p = [], nn.Parameter(torch.ones(1))

    def sample(job, F, prompts, tn, cfg=None):
        asked.append((job.gen_iter, F, cfg, p.item()))
        return torch.zeros(len(prompts), 3, *ROW.size, dtype=torch.uint8)
    monkeypatch.setattr(job_module.Job, "sample", sample)
    monkeypatch.setattr("models.eval.metrics.quick_scores", lambda *args, **named: {})
    job = idle_job(tmp_path / "run", "--cfg", 2, 4, "--generator-cfg-offset", 0.5, "--sample-every", 2, "--evaluate", 2,
                   "--evaluate-every", 3)
    job.text, tn = object(), torch.tensor([0.0, 1.0])
    job.roles["theta"] = {}, adamw(({"p": p}, 0.1), ema=0.5)
    job.roles["theta"][1].state[p]["ema"].zero_()
    for job.gen_iter in range(1, 5):
        job.look("G", tn)
    job.compare("F", "G", tn)
    w = ROW.teacher_cfg
    looks = [(2, "G", 2.5, 0), (3, "G", 2.5, 0), (4, "G", 2.5, 0)]
    assert asked == [*looks, (4, "F", w, 1), (4, "F", w, 1), (4, "G", 2.5, 1)]
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == ["00000002.png", "00000004.png"]
    assert [row["gen_iter"] for row in map(json.loads, (tmp_path / "run" / "evaluation.jsonl").open())] == [3]


def test_what_is_evaluated_and_exported_is_the_moving_average(tmp_path):
    """0.75 of the weights before the only update and 0.25 of those after it."""
    for decay in ("0", "0.75"):
        train("--batch-size", 2, "--max-iter", 1, "--lr-theta", 1e-2, "--evaluate", 8, "--evaluate-every", 1,
              "--ema", decay, "--out", tmp_path / decay)
    files = ROW.ckpt, tmp_path / "0" / "generator.safetensors", tmp_path / "0.75" / "generator.safetensors"
    before, after, average = map(open_tensors, files)
    for name in (name for name in before if name.startswith(DENOISER)):
        torch.testing.assert_close(average[name], 0.75 * before[name].float() + 0.25 * after[name], rtol=0, atol=1e-6)
    looked = json.loads((tmp_path / "0.75" / "evaluation.jsonl").read_text())
    compared = json.loads((tmp_path / "0.75" / "comparison.json").read_text())[f"student, {ROW.steps} steps"]
    assert {name: looked[name] for name in compared} == compared


def test_a_signal_that_another_rank_got_ends_this_one_too(tmp_path, monkeypatch):
    """Alone it would wait for the others in the next collective."""
    saved = []
    monkeypatch.setattr(job_module, "save_state", lambda *args: saved.append(args))
    monkeypatch.setattr(job_module, "any_rank", lambda flag: True)
    job = idle_job(tmp_path / "run")
    assert job.end(job.begin(1), 0) and len(saved) == 1


def test_ten_bad_iterations_that_do_not_follow_one_another_end_no_run(tmp_path):
    job = idle_job(tmp_path / "run")
    for i in range(1, 31):
        log = job.begin(i)
        log.record["loss_psi"] = float("nan") if i % 10 else 1.0
        job.end(log, i)
    assert job.skipped == 27


def test_health_is_printed_every_100_updates(tmp_path, monkeypatch):
    """Job.end on a log of fixed values; the bar keeps the line apart from itself."""
    lines = []
    monkeypatch.setattr(tqdm, "write", lambda self, line: lines.append(line))
    monkeypatch.setattr(job_module, "save_state", lambda *args: None)
    job = idle_job(tmp_path / "run", "--max-iter", 250)
    for i in range(1, 251):
        log = job.begin(i)
        for role in ("psi", "theta", "tau"):
            log.record |= {f"loss_{role}": 2.0, f"grad_norm_{role}": 1.0}
        log.pairs(torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1.5, 0.5], [0.6, 0.8]]))
        log.latents(torch.tensor([-1.0, 1.0]).view(1, 1, 1, 2))
        assert not job.end(log, i)
    assert lines == [f"{i}: margin +0.6000 told apart 0.75 loss_tau 2.000 x_0 +0.000 +- 1.000 health: good" for i in (100, 200)]
    job.text, job.stop, asked = object(), True, []  # the teacher's samples, minutes of them, do not keep a signal waiting
    monkeypatch.setattr(job_module, "deviations", lambda *args: asked.append(args))
    assert job.end(log, 300) and not asked


@pytest.mark.parametrize("flags", [[], ["--lora-rank", 4, "--fake-lora", 4],
                                   ["--lora-rank", 4, "--precision", "bf16", "--d-precision", "fp32"]],
                         ids=["full", "fake-lora", "D in float32"])
def test_profile_prints_phases_and_evaluations(tmp_path, capsys, flags):
    train("--profile", 1, "--random-weights", "--batch-size", 4, "--micro-batch", 2, "--out", tmp_path / "run", *flags)
    out = capsys.readouterr().out
    for phase in ("fake", "generator", "discriminator", "iteration"):
        assert any(line.startswith(f"{phase} ") and " s/it" in line for line in out.splitlines()), phase
    N = ROW.steps
    n = 1 + int(N * uniform(0, 1, "n", [0]))
    # G_theta: N steps for x_0 of the fake update, N - n to x_tn, one to x_hat_0. f_psi: its own update, and Alg. 1 l. 20.
    # F_phi with guidance: two. Features: of x_fake and of x_real.
    assert (f"network evaluations per sample and iteration: G_theta {2 * N - n + 1:.2f}, f_psi 2.00, F_phi 2.00, "
            "D_tau features 2.00\n") in out
    assert not (tmp_path / "run").exists()


def test_another_size_has_no_exact_figures_but_pictures(tmp_path):
    """The tiny data, and so their evaluator, exist at one size."""
    train("--batch-size", 2, "--max-iter", 1, "--size", 16, 16, "--evaluate", 2, "--out", tmp_path / "run")
    assert (tmp_path / "run" / "compare.png").exists() and not (tmp_path / "run" / "comparison.json").exists()


@pytest.mark.parametrize("trainable, dtype", [(True, torch.float32), (False, torch.bfloat16)])
def test_precision_of_a_network(trainable, dtype):
    """All compute in bf16. What is trained is kept in float32: at rates of 1e-7 weights in bf16 would not move."""
    device, mesh = init_distributed()
    args = adm.parse_args(["--precision", "bf16"])
    net = load_network(args, resolve(args), mesh, device, trainable)
    assert {p.dtype for p in net.parameters()} == {dtype}
    c = torch.randn(1, 16, 128), torch.randn(1, 128)
    assert net(torch.randn(1, 4, 8, 8), torch.tensor([0.5]), c).dtype == torch.bfloat16


@pytest.mark.parametrize("flags, dtype", [([], torch.float32), (["--vae-precision", "bf16"], torch.bfloat16)])
def test_precision_of_the_vae(flags, dtype):
    device, _ = init_distributed()
    args = adm.parse_args(flags)
    assert {p.dtype for p in load_vae(args, resolve(args), device).parameters()} == {dtype}


@pytest.mark.parametrize("flags, offload, keep", [([], False, False), (["--offload"], True, False), (["--no-reshard"], False, True)],
                         ids=["default", "offload", "no-reshard"])
def test_flags_of_memory_reach_every_network(monkeypatch, flags, offload, keep):
    """One process on CPUs computes the same without them."""
    told, arguments = [], signature(shard)

    def record(*given):
        bound = arguments.bind(*given)
        bound.apply_defaults()
        told.append(tuple(bound.arguments[name] for name in ("offload", "keep", "checkpointing")))
        return shard(*given)
    monkeypatch.setattr(networks, "shard", record)
    device, mesh = init_distributed()
    args = adm.parse_args(flags)
    args.no_checkpointing = False  # which the preset leaves out
    preset = resolve(args)
    F_phi = Denoiser(load_network(args, preset, mesh, device), preset.predicts, preset.schedule)
    load_text(args, preset, mesh, device), networks.new_discriminator(args, preset, F_phi, mesh, device)
    assert told == [(offload, keep, True), (offload, False, False), (offload, False, True)]


@pytest.mark.parametrize("flag", ["--compile", "--offload-activations"])
def test_blocks_that_are_compiled_or_keep_nothing_on_the_card_give_the_same(monkeypatch, flag):
    """With checkpointing around or within. Dynamo's graphs are run as they are: compiling takes minutes."""
    counter, moved = CompileCounter(), []
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

    class Counting(torch.autograd.graph.save_on_cpu):
        def __init__(self, pin_memory):
            super().__init__(pin_memory)
            pack = self.pack_hook
            self.pack_hook = lambda x: moved.append(tuple(x.shape)) or pack(x)
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Counting)
    device, mesh = init_distributed()
    outputs, grads = [], []
    for flags in ([], [flag]):
        args = adm.parse_args(["--model", "tiny-cogvideox", *flags])
        args.no_checkpointing = False  # which the preset leaves out
        preset = resolve(args)
        net = load_network(args, preset, mesh, device, trainable=True)
        torch.manual_seed(0)
        outputs.append(net(torch.randn(2, 3, 4, 8, 8), torch.tensor([0.5, 0.9]), (torch.randn(2, 12, 128), torch.zeros(2, 0))))
        outputs[-1].square().sum().backward()
        grads.append([p.grad for p in net.parameters() if p.grad is not None])
    assert (counter.frame_count > 0) == (flag == "--compile") and torch.equal(*outputs)
    tokens = [shape for shape in moved if shape == (2, 48, 96)]  # each block's input, and nothing within a block
    assert len(tokens) == 6 * (flag == "--offload-activations")
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_twelve_shapes_of_a_block_are_compiled(monkeypatch):
    """Blocks of one class share one cache, which has eight places unless told otherwise: the ninth shape, of another
    level, batch or mode of gradients, would run without a word as if never compiled."""
    torch._dynamo.reset()
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))

    class Block(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).relu()
    _, mesh = init_distributed()
    net = torch.nn.Sequential(*(Block(width, width + 1) for width in range(1, 13)))
    net.blocks = lambda: list(net)
    shard(net, mesh, torch.float32, compiled=True)(torch.zeros(2, 1))
    assert counter.frame_count == 12
