"""Files, flags and ends of a run that are wrong in ways no other test has: refused in one sentence, or survived."""
import argparse
import contextlib
import errno
import io
import json
import math
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import adm
import adp
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, refusal_of, says
from PIL import Image
from safetensors.torch import load_file, save_file

from models import parallel
from models.checkpoint import InputError, open_tensors, save_safetensors
from models.data import read_prompts, truncate_jsonl
from models.diffusion import teacher_times
from models.eval.fvd import is_script
from models.eval.lpips import load_lpips
from models.eval.metrics import Item, doubts, kept_scores, read_items, weights_of
from models.eval.vbench import read_results
from models.job import flags, networks
from models.job.families import FAMILIES, open_files
from models.job.folder import check_out, say_what_changed
from models.job.motion import motion_tensors
from models.job.notes import check_adapter, check_announced, check_scale, other_scheduler, run_settings
from models.lora import peft_config, read_lora
from models.pictures import read_mp4, read_picture, save_mp4
from models.presets import PRESETS
from models.state import check_sums, complete_states
from models.videos import files_in
from models.vision import load_vision

TINY = ROOT / "models" / "tiny"


# ---- PyTorch and safetensors files -------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")  # of PyTorch, which is still building some of these kinds
@pytest.mark.parametrize("make", [
    lambda: torch.eye(3).to_sparse(), lambda: torch.eye(3).to_sparse_csr(), lambda: torch.empty(3, device="meta"),
    lambda: torch.zeros(1).expand(10 ** 11), lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    lambda: torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])], ids=range(6))
def test_tensors_that_are_no_plain_arrays(tmp_path, make):
    torch.save({"x": make()}, tmp_path / "x.pt")  # the fourth, of 400 GB, is a file of a kilobyte
    assert says(open_tensors, tmp_path / "x.pt").endswith("x is sparse, nested, quantised, expanded or without values; "
                                                          "expected plain tensors")


def test_a_part_of_a_sharded_tensor_is_no_tensor(tmp_path):
    """What torch.save of FSDP's own state leaves: the shape is the whole tensor's, the values are one process's."""
    from torch.distributed.tensor import DTensor, Shard
    _, mesh = parallel.init_distributed()
    torch.save({"x": DTensor.from_local(torch.ones(2, 3), mesh["shard"], [Shard(0)])}, tmp_path / "x.pt")
    assert "x is sparse, nested, quantised, expanded or without values" in says(open_tensors, tmp_path / "x.pt")


def test_a_compressed_file_is_not_inflated(tmp_path):
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in plain.infolist():
            bomb.writestr(entry.filename, bytes(10 ** 8) if entry.filename.endswith("data.pkl") else plain.read(entry))
    assert "bomb.pt: a compressed archive" in says(open_tensors, tmp_path / "bomb.pt")


def test_headers_that_take_long(tmp_path):
    """A name that stands twice among many is found in one pass, and a header of many megabytes is not parsed."""
    names = [f'"n{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(40_000)]
    for header, words in ((f"{{{','.join([*names, names[-1]])}}}", "n39999 stands twice"),
                          ("{" + " " * 2 ** 24 + "}", "a header of 16777218 bytes; expected at most 16777216")):
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header.encode())
        start = time.process_time()
        assert words in says(open_tensors, tmp_path / "x.safetensors")
        assert time.process_time() - start < 5  # 38 s when each name was counted


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod."))
def test_what_ddp_and_compile_put_before_names(tmp_path, prefix):
    save_file({prefix + "a": torch.ones(2), prefix + "b": torch.zeros(1)}, tmp_path / "x.safetensors")
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert list(tensors) == ["a", "b"] and tensors["a"].tolist() == [1, 1] and tensors.prefix == prefix


def test_a_counter_beside_the_weights(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(2), "b": torch.ones(1)}, "step": torch.tensor(3)}, tmp_path / "x.ckpt")
    assert list(open_tensors(tmp_path / "x.ckpt")) == ["a", "b"]


def test_a_vision_encoder_with_one_nan(tmp_path):
    weights = load_file(PRESETS["tiny-sdxl"].sam_ckpt)
    name = next(name for name in weights if name.endswith("blocks.0.attn.proj.weight"))
    weights[name][0, 0] = float("nan")
    save_file(weights, tmp_path / "sam.safetensors")
    assert "blocks.0.attn.proj.weight holds NaN or infinity" in says(load_vision, "sam", tmp_path / "sam.safetensors")


# ---- pictures and videos -----------------------------------------------------------------------------------

def test_no_picture_starts_a_program(tmp_path, monkeypatch):
    """PIL has Ghostscript draw PostScript, whatever the file is called."""
    from PIL import EpsImagePlugin
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n")
    assert "not a picture" in says(read_picture, tmp_path / "x.png")
    assert not (tmp_path / "ran").exists()


def test_a_strip_that_would_fill_memory(tmp_path):
    Image.new("RGB", (60_000, 1)).save(tmp_path / "x.png")  # 13 million pixels wide at a short side of 224
    assert says(read_picture, tmp_path / "x.png").endswith("60000 x 1 pixels; expected sides of at most 64 to 1")


@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile ok.mp4\n",
                                  "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nok.mp4\n#EXT-X-ENDLIST\n"])
def test_a_list_of_other_files_is_no_video(tmp_path, text):
    save_mp4(tmp_path / "ok.mp4", [Image.new("RGB", (64, 64))] * 3, 8)
    (tmp_path / "x.mp4").write_text(text)
    assert len(read_mp4(tmp_path / "ok.mp4")) == 3
    assert "x.mp4: not a video" in says(read_mp4, tmp_path / "x.mp4")


def test_a_video_larger_than_memory(tmp_path, monkeypatch):
    from models import videos
    save_mp4(tmp_path / "x.mp4", [Image.new("RGB", (64, 64))] * 3, 8)
    for largest, words in ((30_000, "more than 30000 bytes of pixels"), (10_000, "frames of 64 x 64 pixels")):
        monkeypatch.setattr(videos, "LARGEST", largest)  # a frame has 12,288
        assert words in says(read_mp4, tmp_path / "x.mp4")


# ---- evaluate.py -------------------------------------------------------------------------------------------

def test_prompts_are_not_given_to_the_wrong_pictures(tmp_path):
    for name in ("000.png", "002.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    items = read_items(tmp_path, ["a", "b", "c"], {})
    assert "numbered 0 to 2; expected none to be missing" in says(doubts, tmp_path, items, ["a", "b", "c"])
    assert doubts(tmp_path, items, None) == []
    items = [Item(tmp_path / "000.png", "a", "sdxl"), Item(tmp_path / "001.png", "other", None)]
    assert doubts(tmp_path, items, ["a"]) == ["1 of 2 files do not say which model made them",
                                              "1 files note prompts that are not in --prompts, and keep them (other)"]


def test_scores_of_weights_that_were_replaced_are_not_kept(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"a")
    before = weights_of(tmp_path / "x.pt", None)
    (tmp_path / "x.pt").write_bytes(b"b")
    assert before.endswith(", hub") and weights_of(tmp_path / "x.pt", None) != before


def test_a_damaged_archive_is_no_program(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"X" * 46 + b"PK\x05\x06" + bytes(4) + struct.pack("<HHIIH", 1, 1, 46, 0, 0))
    assert zipfile.is_zipfile(tmp_path / "x.pt") and not is_script(tmp_path / "x.pt")


@pytest.mark.parametrize("device", ("nonsense", "cuda:99", "meta"))
def test_a_device_that_is_not_there(tmp_path, device):
    said = refusal_of("evaluate.py", "--device", device, "--out", tmp_path / "out")
    assert said.startswith(f"evaluate.py: --device {device}: ") and said.endswith("expected cpu, or cuda where there is one\n")


# ---- prompts -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "<!DOCTYPE html><title>404",
                                  "{\\rtf1 a cat}"])
def test_what_is_no_text_is_no_prompt(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    assert "is of a web page, a Git LFS pointer or formatted text" in says(read_prompts, tmp_path / "x.txt")


def test_prompts_of_other_layouts(tmp_path):
    for name, text, words in (
            ("coco.json", '{"images": [{"id": 1}], "annotations": [{"caption": "a"}, {"caption": "b"}]}', None),
            ("x.json", '{"prompts": ["a", "b"]}', None), ("x.jsonl", '"a"\n"b"\n', None),
            ("x.csv", "prompt,prompt\na,b\n", "line 1: 2 fields prompt; expected one"),
            ("y.jsonl", '{"prompt": "a", "prompt": "b"}\n', "line 1 is not JSON (prompt stands twice)"),
            ("long.txt", "a" * (2 ** 24 + 1), "line 1 has more than 16777216 bytes")):
        (tmp_path / name).write_text(text)
        if words:
            assert words in says(read_prompts, tmp_path / name)
        else:
            assert read_prompts(tmp_path / name) == ["a", "b"]


# ---- flags -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, words, given", [
    ("sample.py", "File name too long", ("--out", "x" * 300)), ("sample.py", "File name too long", ("--ckpt", "x" * 300)),
    ("sample.py", "File name too long", ("--tokenizers", "x" * 300)), ("adm.py", "File name too long", ("--prompts", "x" * 300 + ".txt")),
    ("sample.py", "--prompt: '\\udcff' is no character of a text", ("--prompt", "a \udcff")),
    ("sample.py", f"{Path.home()}/nowhere: no such file", ("--ckpt", "~/nowhere")),
    ("sample.py", "--lora-scale 2: of which adapter is not said", ("--lora-scale", 2)),
    ("sample.py", "expected times that differ by 0.001", ("--model", "tiny-sdxl", "--times", 1, 0.9999)),
    ("sample.py", "error: argument --seed: invalid int value: '1e30'", ("--seed", "1e30")),
    ("adm.py", "--random-weights --ckpt x.safetensors: expected one of the two", ("--random-weights", "--ckpt", "x.safetensors")),
    ("adm.py", "--evaluate-metrics clip: expected --evaluate-every N too", ("--evaluate-metrics", "clip")),
    ("adm.py", "--offload-activations: tiny-sd3 runs with --no-checkpointing", ("--offload-activations",)),
    ("adm.py", "argument --out: expected a path of one line, found none", ("--out", "")),
    ("sample.py", "argument --ckpt: expected a path of one line", ("--ckpt", "a\nb")),
    ("adm.py", "error: unrecognized arguments: --foo", ("--foo",)), ("evaluate.py", "invalid choice: 'x'", ("--metrics", "x"))],
    ids=lambda value: value if isinstance(value, str) else "")
def test_flags_that_cannot_be_meant(tmp_path, monkeypatch, script, words, given):
    monkeypatch.chdir(tmp_path)
    said = refusal_of(script, *given, printed=".*")
    assert words in said and said.count("\n") == 1 and len(said) < 600, said


@pytest.mark.parametrize("variables", [dict(RANK="0", WORLD_SIZE="two", LOCAL_RANK="0"), dict(RANK="0", WORLD_SIZE="1"),
                                       dict(RANK="3", WORLD_SIZE="2"), dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")],
                         ids=str)
def test_variables_that_torchrun_would_not_set(monkeypatch, variables):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for name in parallel.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "expected the variables that torchrun sets" in says(parallel.init_distributed)


@pytest.mark.parametrize("changed, said", [
    ({"MASTER_PORT": "abc"}, "MASTER_PORT=abc: "), ({"MASTER_PORT": "99999"}, "expected a free port that all processes reach"),
    ({"MASTER_ADDR": ""}, "expected a free port"), ({"LOCAL_WORLD_SIZE": "abc"}, "LOCAL_WORLD_SIZE=abc: expected the variables"),
    ({"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: expected the variables"), ({"WORLD_SIZE": None}, "WORLD_SIZE= "),
    ({"RANK": None}, "RANK= ")])
def test_a_rendezvous_that_cannot_be(changed, said):
    """In a process of its own: the group of this one is there already."""
    variables = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
    variables = {name: value for name, value in (variables | changed).items() if value is not None}
    environment = {name: value for name, value in os.environ.items() if name not in variables and name not in changed}
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--count", "1"], env=environment | variables, text=True,
                          capture_output=True, timeout=60)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_out_is_a_broken_link(tmp_path):
    (tmp_path / "x").symlink_to("nowhere")
    assert f"{tmp_path / 'x'} is a broken link" in says(check_out, tmp_path / "x")


@pytest.mark.parametrize("error, words", [
    (MemoryError(), "out of memory"), (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory (CUDA out of memory."),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), "could not write: Broken pipe")])
def test_ends_that_a_user_can_mend(monkeypatch, capsys, error, words):
    def main(_):
        raise error
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit, match="2"):
        flags.entry("adm.py", main, adm.parse_args([]))
    assert capsys.readouterr().err.startswith(f"adm.py: {words}")


def test_a_closed_terminal_does_not_end_a_run(tmp_path):
    """SIGHUP's handler writes a line to a terminal that is gone; what is printed after that must not fail either."""
    main, terminal = os.openpty()
    code = ("import sys; from models.progress import tell; sys.stdin.readline(); tell('SIGHUP\\n'); print('x', flush=True); "
            "print('y', file=sys.stderr, flush=True)")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=terminal, stderr=terminal)
    os.close(terminal)
    os.close(main)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0


# ---- run folders and states --------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [dict(size=[1]), dict(size=["x", 2]), dict(size=[]), dict(frames="9"), dict(vae_ckpt=3),
                                    dict(motion_ckpt=[1]), dict(teacher_files="x")], ids=str)
def test_settings_of_a_run_that_none_has(tmp_path, change):
    args = dict(model="tiny-sd3", ckpt=None, text_ckpt=None, tokenizers="x", size=[32, 32], no_t5=False)
    (tmp_path / "config.json").write_text(json.dumps({"args": args}))
    assert run_settings(tmp_path) == args
    (tmp_path / "config.json").write_text(json.dumps({"args": args | change}))
    (name, value), = change.items()
    assert f"has {name} {value}" in says(run_settings, tmp_path)


def test_json_that_is_nested_too_deep(tmp_path):
    (tmp_path / "sha256.json").write_text("[" * 100_000)
    assert "sha256.json: damaged (nested too deep)" in says(check_sums, tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + "\n{}\n")
    assert "metrics.jsonl: line 1" in says(truncate_jsonl, tmp_path / "metrics.jsonl", "global_iter", 3)


def test_a_file_is_no_state(tmp_path):
    (tmp_path / "iter_00000003").mkdir()
    (tmp_path / "iter_00000004").write_text("")
    assert complete_states(tmp_path) == [tmp_path / "iter_00000003"]


def test_a_generator_that_overflows_in_half_precision_is_not_exported(tmp_path, monkeypatch):
    monkeypatch.setattr(networks, "full_tensors", lambda named: ((name, p.detach() * 0 + 1e6) for name, p in named))
    with pytest.raises(InputError, match="--export-dtype fp16 overflows in .*; expected bf16 or fp32"):
        adm.main(adm.parse_args(["--max-iter", "1", "--evaluate", "0", "--batch-size", "2", "--export-dtype", "fp16",
                                 "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run" / "generator.safetensors").exists()


# ---- files that are meant for something else ---------------------------------------------------------------

@pytest.mark.parametrize("metadata, words", [
    ({"ss_v_parameterization": "True"}, "of another prediction or noise schedule (ss_v_parameterization True)"),
    ({"ss_zero_terminal_snr": "True"}, "ss_zero_terminal_snr True"), ({"modelspec.prediction_type": "v"}, "modelspec.prediction_type v"),
    ({"modelspec.architecture": "stable-diffusion-v1/lora"}, "of another model")])
def test_adapters_of_another_prediction_or_model(tmp_path, metadata, words):
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", metadata)
    said = says(check_adapter, open_tensors(tmp_path / "x.safetensors"), PRESETS["sdxl"])
    assert f"an adapter {words}" in said or words in said
    save_file({"x": torch.zeros(1)}, tmp_path / "y.safetensors", {
        "ss_v_parameterization": "False", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    check_adapter(open_tensors(tmp_path / "y.safetensors"), PRESETS["sdxl"])


@pytest.mark.parametrize("architecture, model", [
    ("stable-diffusion-3-medium/lora", "sd3.5-medium"), ("stable-diffusion-v3.5-medium/lora", "sd3-medium"),
    ("stable-diffusion-3.5-medium/lora", "sd3-medium")])
def test_adapters_of_the_other_medium(tmp_path, architecture, model):
    """SD3 and SD3.5 Medium have the same shapes."""
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors", {"modelspec.architecture": architecture})
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert "of another model (modelspec.architecture" in says(check_adapter, tensors, PRESETS[model])
    check_adapter(tensors, PRESETS["sd3.5-medium" if model == "sd3-medium" else "sd3-medium"])


def test_adapters_of_whole_numbers_or_on_changed_weights(tmp_path):
    preset, module = PRESETS["tiny-sdxl"], "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    with torch.device("meta"):
        net = FAMILIES["unet"].network(**preset.config)
    weights = {f"{module}.lora_A.weight": torch.ones(4, 64), f"{module}.lora_B.weight": torch.ones(64, 4)}

    def read(weights):
        save_file(weights, tmp_path / "adapter_model.safetensors")
        return read_lora(open_tensors(tmp_path / "adapter_model.safetensors"), net, FAMILIES["unet"].names)

    assert "found whole numbers" in says(read, {name: t.to(torch.int8) for name, t in weights.items()})
    for settings in (dict(use_dora=True), dict(init_lora_weights="pissa_niter_16"), dict(peft_type="LOHA")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(dict(lora_alpha=4) | settings))
        assert "expected plain LoRA on the model's unchanged weights" in says(read, weights)
    (tmp_path / "adapter_config.json").write_text(json.dumps(dict(lora_alpha=4, peft_type="LORA", init_lora_weights=True)))
    assert len(read(weights)) == 1


def test_a_vae_whose_settings_leave_the_scale_out(tmp_path):
    """Diffusers then takes 0.18215, as for sd-vae-ft-mse, whose tensors fit SDXL too."""
    for model, settings, words in (
            ("sdxl", {}, "scaling_factor 0.18215; expected 0.13025"), ("sd1.5", {}, None),
            ("sdxl", {"scaling_factor": 0.13025, "latents_mean": [1, 2, 3, 4]}, "latents_mean [1, 2, 3, 4]"),
            ("sd3-medium", {"scaling_factor": 1.5305}, "shift_factor 0.0"),
            ("cogvideox-2b", {"_class_name": "AutoencoderKLCogVideoX", "scaling_factor": 0.7}, "scaling_factor 0.7"),
            ("cogvideox-2b", {"_class_name": "AutoencoderKLCogVideoX", "shift_factor": None}, None)):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"} | settings))
        if words:
            assert words in says(check_scale, tmp_path / "x", PRESETS[model].vae)
        else:
            check_scale(tmp_path / "x", PRESETS[model].vae)


@pytest.mark.parametrize("table", [torch.zeros(3), torch.zeros(1000, dtype=torch.complex64), torch.zeros(1000, dtype=torch.int8)],
                         ids=range(3))
def test_a_table_that_is_no_noise_schedule(tmp_path, table):
    torch.save({"alphas_cumprod": table}, tmp_path / "x.pt")
    assert "another noise schedule" in says(check_announced, open_tensors(tmp_path / "x.pt"), PRESETS["sdxl"])


# ---- read as something else --------------------------------------------------------------------------------

def student(path, **metadata):
    """A copy of the tiny SD3 that says it is a generator of one step, with its checksum."""
    notes = {"dmdx.model": "tiny-sd3", "dmdx.steps": "1", "dmdx.predicts": "velocity", "dmdx.schedule": "flow"}
    save_safetensors(path, load_file(PRESETS["tiny-sd3"].ckpt), notes | metadata)
    return path


def test_a_generator_is_no_teacher(tmp_path):
    said = "generator.safetensors: a generator of 1 step; expected the teacher (training goes on from a generator with --init)\n"
    ckpt = student(tmp_path / "generator.safetensors")
    for script, more in (("collect_odes.py", ["--model", "tiny-sd3", "--count", 2, "--steps", 1]), ("adm.py", ["--max-iter", 1])):
        assert refusal_of(script, "--ckpt", ckpt, *more, "--out", tmp_path / "out").endswith(said)
    assert not (tmp_path / "out").exists()


def test_a_bit_of_an_export_in_any_folder(tmp_path):
    path = student(tmp_path / "generator.safetensors")
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    for ckpt in (path, tmp_path):
        said = refusal_of("sample.py", "--model", "tiny-sd3", "--ckpt", ckpt, "--out", tmp_path / "out", printed=".*")
        assert "generator.safetensors: not as it was exported, its CRC-32 is not" in said


def test_samples_that_are_not_finite(tmp_path):
    tensors = load_file(PRESETS["tiny-sd3"].ckpt)
    name = "model.diffusion_model.final_layer.linear.weight"
    save_file(tensors | {name: torch.full(tensors[name].shape, 1e38)}, tmp_path / "x.safetensors")
    said = refusal_of("sample.py", "--ckpt", tmp_path / "x.safetensors", "--steps", 2, "--count", 2,
                      "--out", tmp_path / "out", printed=".*")
    assert said.startswith("sample.py: samples with values that are not finite; ") and not list((tmp_path / "out").glob("*.png"))


def test_text_encoders_that_do_not_fit(tmp_path):
    t5 = PRESETS["tiny-cogvideox"].ckpt / "text_encoder"
    wide = {name: torch.cat([w, w], -1) if w.shape[-1] == 128 and "wo" not in name else w
            for name, w in dict(open_files(t5)).items()}
    wide = {name: torch.cat([w, w]) if name.endswith(("wo.weight", ".o.weight")) else w for name, w in wide.items()}
    save_file(wide, tmp_path / "model.safetensors")
    said = refusal_of("sample.py", "--model", "tiny-cogvideox", "--text-ckpt", tmp_path / "model.safetensors",
                      "--count", 1, "--out", tmp_path / "out", printed=".*")
    assert "model.safetensors: text encoders 256 wide; expected 128, tiny-cogvideox's" in said
    save_file(wide | {"shared.weight": torch.zeros(5)}, tmp_path / "model.safetensors")
    said = refusal_of("sample.py", "--model", "tiny-cogvideox", "--text-ckpt", tmp_path / "model.safetensors",
                      "--count", 1, "--out", tmp_path / "out", printed=".*")
    assert "expected a T5 v1.1 encoder, but shared.weight is (5,)" in said


@pytest.mark.parametrize("model, name, shape", [
    ("tiny-sdxl", "model.diffusion_model.input_blocks.0.0.weight", (0, 0, 0, 0)),
    ("tiny-sdxl", "first_stage_model.encoder.conv_in.weight", (0,)),
    ("tiny-sdxl", "conditioner.embedders.1.model.text_projection", ()),
    ("tiny-sd3", "model.diffusion_model.x_embedder.proj.weight", (0,))])
def test_shapes_that_no_network_has(tmp_path, model, name, shape):
    tensors = dict(open_files(PRESETS[model].ckpt))
    assert name in tensors
    save_file(tensors | {name: torch.zeros(shape)}, tmp_path / "x.safetensors")
    said = refusal_of("sample.py", "--model", model, "--ckpt", tmp_path / "x.safetensors", "--count", 1, "--out",
                      tmp_path / "out", printed=".*")
    assert "x.safetensors: " in said and name.rpartition(".")[0].rpartition(".")[2] in said


def test_pixel_encoders_and_lpips_of_odd_shapes(tmp_path):
    for name, shape in (("cls_token", (3,)), ("blocks.0.attn.qkv.weight", ())):
        save_file({name: torch.zeros(shape)}, tmp_path / "x.safetensors")
        assert "no architecture can be read from it" in says(load_vision, "dinov2", tmp_path / "x.safetensors")
    save_file({"net": torch.zeros(1), "lins": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert "LPIPS are missing" in says(load_lpips, "vgg", [tmp_path / "x.safetensors"])


def test_a_pipeline_that_is_entered_from_within(tmp_path, monkeypatch):
    for folder, settings in (("unet", {}), ("scheduler", dict(_class_name="EulerDiscreteScheduler", prediction_type="v_prediction"))):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{folder}_config.json").write_text(json.dumps(settings))
    monkeypatch.chdir(tmp_path / "unet")
    assert other_scheduler(Path("diffusion_pytorch_model.safetensors"), PRESETS["sdxl"])


def test_pairs_that_changed_between_two_launches(tmp_path):
    args = argparse.Namespace(script="adp", model="tiny-sdxl", init=None, prompts_digest="a", ckpt=None, text_ckpt=None,
                              tokenizers="", size=[32, 32], no_t5=False)
    (tmp_path / "config.json").write_text(json.dumps(dict(args=vars(args))))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        say_what_changed(argparse.Namespace(**vars(args) | dict(prompts_digest="b")), tmp_path)
    assert "ODE pairs" in said.getvalue()


def test_a_checkpoint_that_changed_between_two_launches(tmp_path):
    args = argparse.Namespace(script="adm", model="tiny-sdxl", init=None, ckpt=None, text_ckpt=None, tokenizers="",
                              size=[32, 32], no_t5=False, teacher_files=dict(checkpoint="a", tokenizers="b"))
    (tmp_path / "config.json").write_text(json.dumps(dict(args=vars(args))))
    now = argparse.Namespace(**vars(args) | dict(teacher_files=dict(checkpoint="c", tokenizers="b")))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        say_what_changed(now, tmp_path)
    assert "last started: what is in the file of --ckpt\n" in said.getvalue()


def test_a_vae_and_a_pixel_encoder_that_changed_between_two_launches(tmp_path, capsys):
    files = {"--vae-ckpt": PRESETS["tiny-sdxl"].ckpt, "--pixel-ckpt": PRESETS["tiny-sdxl"].sam_ckpt}
    flags = ["--random-weights", "--max-iter", 1, "--batch-size", 2, "--out", tmp_path / "run"]
    for flag, path in files.items():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        flags += [flag, tmp_path / path.name]
    adp.main(adp.parse_args(list(map(str, flags))))
    for flag, path in files.items():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        (tmp_path / path.name).write_bytes(data)
        capsys.readouterr()
        adp.main(adp.parse_args(list(map(str, [*flags, "--resume"]))))
        assert f"last started: what is in the file of {flag}\n" in capsys.readouterr().out


# ---- without bound -----------------------------------------------------------------------------------------

def test_numbers_beyond_all_others():
    for flag, value in (("seed", 10 ** 400), ("seed", -10 ** 400), ("size", [10 ** 400, 32]), ("frames", 8 * 10 ** 18 + 1),
                        ("batch_size", 10 ** 8), ("cfg", [math.nan, 1.0]), ("dt", math.inf)):
        assert says(flags.check_numbers, argparse.Namespace(**{flag: value})).startswith(f"--{flag.replace('_', '-')} ")


@pytest.mark.parametrize("schedule", ("animatediff", "sdxl", "flow", "wan", "cogvideox-2b"))
def test_as_many_steps_as_there_are_times(schedule):
    times = teacher_times(1000, 3.0, schedule)
    assert len(times) == 1001 and times.max() <= 1 and (times.diff() >= 0).all()


def test_links_to_a_folder_above(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "x.mp4").touch()
    for name in "ab":
        (tmp_path / name).symlink_to(".")
        (tmp_path / "clips" / name).symlink_to("..")
    (tmp_path / "other").symlink_to("clips")
    assert sorted(files_in(tmp_path)) == ["clips/x.mp4", "other/x.mp4"]


def test_scores_that_are_no_numbers(tmp_path):
    for score in ('"abc"', "[1, null]", "1" + "0" * 400, "NaN", "true"):
        (tmp_path / "scores.jsonl").write_text('{"metric": "clip", "score": ' + score + "}\n")
        assert says(kept_scores, tmp_path / "scores.jsonl").endswith("line 1: expected a record with a score")
        (tmp_path / "x_eval_results.json").write_text('{"scene": [' + score + ", []]}")
        if score != "true":
            assert "x_eval_results.json" in says(read_results, [tmp_path])


@pytest.mark.parametrize("config", [dict(lora_alpha=10 ** 400), dict(alpha_pattern={"x{99999999999}": 1}),
                                    dict(alpha_pattern={"(" * 5000 + ")" * 5000: 1}), dict(init_lora_weights="lora_ga")],
                         ids=lambda config: next(iter(config)))
def test_settings_of_an_adapter_that_cannot_be(tmp_path, config):
    save_file({"context_embedder.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "x.safetensors",
              {"lora_adapter_metadata": json.dumps(config)})
    assert "x.safetensors: its lora_adapter_metadata: " in says(peft_config, open_tensors(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("shape", [(), (32,), (1, 32, 7), (2, 32, 8)])
def test_positions_of_another_shape(tmp_path, shape):
    unit = "down_blocks.0.motion_modules.0.temporal_transformer"
    tensors = {f"{unit}.norm.weight": torch.zeros(8), f"{unit}.transformer_blocks.0.attention_blocks.0.pos_encoder.pe": torch.zeros(shape)}
    save_file(tensors, tmp_path / "x.safetensors")
    assert "expected a motion file of AnimateDiff" in says(motion_tensors, open_tensors(tmp_path / "x.safetensors"))


def test_a_name_that_is_not_utf8(tmp_path):
    path = tmp_path / os.fsdecode(b"m\xff.safetensors")
    path.symlink_to(PRESETS["tiny-sd3"].ckpt)
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--model", "tiny-sd3", "--ckpt", path, "--steps", "1", "--count", "1",
                           "--out", tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "m\\udcff.safetensors" in done.stdout and (tmp_path / "out" / "000.png").exists()
