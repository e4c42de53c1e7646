"""collect_odes.py and the reader of its pairs: right pairs, nothing lost by a kill, damage mended."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest
import torch
from conftest import ROOT, says
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import collect_odes
from models import checkpoint, data, saving, shards
from models.job import networks
from models.checkpoint import InputError
from models.data import noise, uniform
from models.shards import open_pairs, save_shard, write_manifest
from models.diffusion import Denoiser, solve, teacher_times
from models.job.flags import entry, resolve_model
from models.parallel import init_distributed
from models.presets import PRESETS

MODEL = "tiny-sd3"
ROW = PRESETS[MODEL]
SHAPE = (ROW.latent_channels, ROW.size[0] // ROW.vae_factor, ROW.size[1] // ROW.vae_factor)
# float32: in bf16 a difference between two runs would be rounded away.
FLAGS = ["--model", MODEL, "--steps", 2, "--batch", 4, "--dtype", "fp32", "--shard-size", 8]


def collect(out, *flags):
    """collect_odes.py with these flags in this process."""
    collect_odes.main(collect_odes.parse_args([*map(str, FLAGS), "--out", str(out), *map(str, flags)]))
    return out


def start(*flags):
    """collect_odes.py in a process of its own."""
    command = [sys.executable, ROOT / "collect_odes.py", *FLAGS, *flags]
    return subprocess.Popen(list(map(str, command)), text=True, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def stamps(out):
    """When each shard was written: a shard made again has another stamp even if its bytes are the same."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("*.safetensors")}


def refused(out, *flags) -> str:
    return says(collect, out, *flags)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """28 pairs: three whole shards and half a one."""
    return collect(tmp_path_factory.mktemp("odes") / "finished", "--count", 28)


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


# ---- which pairs -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("model", [model for model in PRESETS if model.startswith("tiny-")])
def test_pairs_are_direct_solves(tmp_path, model):
    """One at a time, with everything stated anew; on a size and a seed that are not the defaults."""
    (tmp_path / "p.txt").write_text("a red circle\na small blue ring\n\na cross on white\n")
    prompts = ["a red circle", "a small blue ring", "a cross on white"]
    args = ["--model", model, "--steps", "3", "--seed", "5", "--cfg", "2", "6", "--size", "16", "32",
            "--dtype", "fp32", "--prompts", str(tmp_path / "p.txt"), "--count", "5", "--batch", "2",
            "--out", str(tmp_path / "out")]
    args = collect_odes.parse_args(args)
    collect_odes.main(args)
    shard = load_file(tmp_path / "out" / "pairs_00000000-00000004.safetensors")
    assert json.loads(shard["prompts"].numpy().tobytes()) == [*prompts, *prompts[:2]]
    row, (device, mesh) = resolve_model(args), init_distributed()
    bound = 5e-3 if row.predicts == "epsilon" else 5e-4
    F_phi = Denoiser(networks.load_network(args, row, mesh, device), row.predicts, row.schedule)
    text, tn = networks.load_text(args, row, mesh, device), teacher_times(3, row.shift, row.schedule)
    for i in range(5):
        x_T = noise(networks.latent_shape(args, row), 5, 0, "x_T", [i])
        w = 2 + 4 * uniform(5, 0, "w", [i])
        with torch.no_grad():
            x_0 = solve(F_phi, x_T, tn, text.encode([prompts[i % 3]]), text.unconditional(), w)
        assert torch.equal(shard["x_T"][i], x_T[0]) and shard["w"][i] == w and shard["index"][i] == i
        # Matrix products of another height round otherwise: 4e-5 for latents of up to 8. An epsilon network's
        # error reaches x_0 enlarged by guidance (2 w - 1, up to 11) and by 1 / alpha_1 = 15: up to 5e-4 on
        # the CPUs tried. Another pair's prompt or noise is 1 away, its scale 0.04.
        torch.testing.assert_close(shard["x_0"][i], x_0[0], rtol=0, atol=bound)
    assert len(set(shard["w"].tolist())) == 5 and shard["x_0"].std() > 0.1


def test_no_flags_are_the_presets_settings(tmp_path, monkeypatch):
    """A teacher's full steps, the preset's guidance and prompts, a solve in float32, bf16 in the file."""
    seen = []

    def solve_shard(F_phi, text, c_null, tn, x_T, w, prompts, batch, dtype, bar, sequence):
        seen.append((tn, w, prompts, x_T.dtype))
        return x_T.to(dtype)
    monkeypatch.setattr(collect_odes, "solve_shard", solve_shard)
    monkeypatch.chdir(tmp_path)
    collect_odes.main(collect_odes.parse_args(["--model", MODEL]))
    count, prompts = ROW.pair_count, data.read_prompts(ROW.prompts)
    pairs = open_pairs(tmp_path / "runs" / f"odes-{MODEL}", MODEL, SHAPE)
    assert len(pairs) == count == sum(len(w) for _, w, _, _ in seen)
    assert [p for _, _, own, _ in seen for p in own] == [prompts[i % len(prompts)] for i in range(count)]
    assert all(torch.equal(tn, teacher_times(ROW.teacher_steps, ROW.shift, ROW.schedule)) for tn, *_ in seen)
    assert all(dtype == torch.float32 for *_, dtype in seen)
    w = torch.cat([w for _, w, _, _ in seen])
    # 5 deviations of the mean of 1000 uniform draws: 5 * 0.29 / sqrt(1000) = 0.05 of the range.
    low, high = ROW.cfg
    assert w.min() >= low and w.max() <= high and abs(w.mean() - (low + high) / 2) < 0.05 * (high - low)


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_storage_dtype_rounds_once(finished, tmp_path, name, dtype):
    out = collect(tmp_path / "out", "--count", 8, "--dtype", name)
    full = open_pairs(finished, MODEL, SHAPE).read(list(range(8)))
    with safe_open(out / "pairs_00000000-00000007.safetensors", "pt") as file:
        assert file.get_tensor("x_T").dtype == file.get_tensor("x_0").dtype == dtype
    x_T, x_0, _ = open_pairs(out, MODEL, SHAPE).read(list(range(8)))
    assert x_T.dtype == x_0.dtype == torch.float32
    assert torch.equal(x_T, full[0].to(dtype).float()) and torch.equal(x_0, full[1].to(dtype).float())


# ---- kills -------------------------------------------------------------------------------------------------

def test_kill_9_then_again_is_uninterrupted_byte_for_byte(tmp_path):
    out, flags = tmp_path / "killed", ["--count", 60]
    process = start(*flags, "--out", out)
    while len(list(out.glob("pairs_*.safetensors"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    entries = json.loads((out / "manifest.json").read_text())["shards"]
    assert 0 < len(entries) < 8
    before = {entry["file"]: stamps(out)[entry["file"]] for entry in entries}
    pairs = open_pairs(out, MODEL, SHAPE)  # what is finished can be used
    assert len(pairs) == 8 * len(entries) and f"{len(pairs)} of 60" in str(pairs)
    collect(out, *flags)
    assert before.items() <= stamps(out).items()  # and is not made again
    assert contents(out) == contents(collect(tmp_path / "whole", *flags))


@pytest.mark.parametrize("writes", range(5))
def test_stopped_before_each_write(tmp_path, monkeypatch, finished, writes):
    """The manifest, then for each of two shards its file and the manifest: five moments to be killed in."""
    left, replace = iter(range(writes)), os.replace

    def stop(a, b):
        if next(left, None) is None:
            raise KeyboardInterrupt
        replace(a, b)
    with monkeypatch.context() as patch:
        patch.setattr(saving.os, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            collect(tmp_path / "out", "--count", 16)
    # SIGKILL leaves half files, an exception does not.
    for name in ("manifest.json", *(f"pairs_00000008-000000{last}.safetensors" for last in (11, 15))):
        (tmp_path / "out" / f"{name}.tmp").write_bytes(b"half a fi")
    collect(tmp_path / "out", "--count", 16)
    shards = ["pairs_00000000-00000007.safetensors", "pairs_00000008-00000015.safetensors"]
    assert sorted(contents(tmp_path / "out")) == ["lock", "manifest.json", *shards]
    assert all(contents(tmp_path / "out")[name] == contents(finished)[name] for name in shards)
    assert len(open_pairs(tmp_path / "out", MODEL, SHAPE)) == 16


# ---- again -------------------------------------------------------------------------------------------------

def test_a_finished_collection_loads_no_network(copy, monkeypatch, capsys):
    before = contents(copy), stamps(copy)
    monkeypatch.setattr(networks, "load_network", None)
    collect(copy, "--count", 28)
    assert (contents(copy), stamps(copy)) == before and "0 left" in capsys.readouterr().out


def test_a_larger_count_goes_on(copy, tmp_path, finished):
    """The half shard is made again as a whole one; the others stay."""
    before = stamps(copy)
    collect(copy, "--count", 36)
    assert contents(copy) == contents(collect(tmp_path / "whole", "--count", 36))
    assert len(before.items() & stamps(copy).items()) == 3
    for i, j in ((0, 0), (27, 27)):  # pair i stays pair i; the last was in a shorter batch
        a, b = open_pairs(copy, MODEL, SHAPE).read([i]), open_pairs(finished, MODEL, SHAPE).read([j])
        torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-5)
        assert torch.equal(a[0], b[0]) and a[2] == b[2]


def test_a_smaller_count_takes_nothing_away(copy):
    before = stamps(copy)
    collect(copy, "--count", 10)
    assert stamps(copy) == before and len(open_pairs(copy, MODEL, SHAPE)) == 28


@pytest.mark.parametrize("flags, name", [
    (["--seed", 1], "seed 1 (was 0)"), (["--steps", 3], "steps 3 (was 2)"),
    (["--cfg", 1, 2], "cfg [1.0, 2.0] (was"), (["--size", 16, 32], "size [16, 32] (was [32, 32])"),
    (["--dtype", "bf16"], "dtype bf16 (was fp32)"),
    (["--shard-size", 16], "shard_size 16 (was 8)"),
    (["--precision", "bf16"], "precision bf16 (was fp32)"), (["--prompts", "{folder}/p.txt"], "prompts "),
    (["--ckpt", "{folder}/tuned.safetensors"], "checkpoint "), (["--text-ckpt", "{folder}/tuned.safetensors"], "text_ckpt "),
], ids=lambda value: "" if isinstance(value, str) else str(value[0]))
def test_other_settings_are_refused_by_name(copy, tmp_path, flags, name):
    (tmp_path / "p.txt").write_text("a ring\n")
    tensors = load_file(ROW.ckpt)
    for key, value in tensors.items():
        if key.startswith("model.diffusion_model.") and value.is_floating_point():
            value.add_(0.01)
    save_file(tensors, tmp_path / "tuned.safetensors", {"format": "pt"})
    before = contents(copy)
    words = refused(copy, "--count", 36, *(str(flag).format(folder=tmp_path) for flag in flags))
    assert words.startswith(f"{copy}: begun with other settings: ") and name in words
    assert contents(copy) == before


def test_a_moved_checkpoint_is_the_same_checkpoint(copy, tmp_path):
    shutil.copy(ROW.ckpt, tmp_path / "renamed.safetensors")
    collect(copy, "--count", 28, "--ckpt", tmp_path / "renamed.safetensors")


@pytest.mark.parametrize("flags, words", [
    (["--count", 0], "--count 0: expected at least 1"), (["--batch", 0], "--batch 0"),
    (["--shard-size", 0], "--shard-size 0"), (["--cfg", 3, 2], "--cfg 3 2: expected the lower scale first"),
    (["--steps", 0], "--steps 0"),
    (["--prompts", "nowhere.txt"], "nowhere.txt: no such file"),
    (["--ckpt", "nowhere.safetensors"], "nowhere.safetensors: no such"),
    (["--model", "sd3-medium"], "--model sd3-medium needs --prompts FILE"),
], ids=lambda value: value[0] if isinstance(value, list) else "")
def test_refused_in_words(tmp_path, flags, words):
    assert words in refused(tmp_path / "out", *flags) and not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_beforehand(copy, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    pair = 2 * 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]  # bytes
    monkeypatch.setattr(collect_odes.shutil, "disk_usage", lambda path: usage(1e9, 0, 16 * pair - 1))
    assert "16 pairs need" in refused(tmp_path / "new" / "out", "--count", 16)
    assert not (tmp_path / "new").exists()
    collect(copy, "--count", 32)  # the disk need of what is left: one shard


def test_shards_without_their_manifest_are_left_alone(copy):
    (copy / "manifest.json").unlink()
    before = contents(copy)
    assert "holds shards but no manifest.json" in refused(copy, "--count", 28) and contents(copy) == before


def test_a_teacher_that_overflows_leaves_no_pair(tmp_path, monkeypatch):
    large = torch.tensor([1, 1, 1e6, 1]).view(4, 1, 1, 1)
    monkeypatch.setattr(collect_odes, "solve", lambda F, x_T, *_: large.expand_as(x_T))
    assert "x_0 of pair 2 is not finite" in refused(tmp_path / "out", "--count", 4, "--dtype", "fp16")
    assert sorted(contents(tmp_path / "out")) == ["lock", "manifest.json"]


# ---- damage ------------------------------------------------------------------------------------------------

def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


DAMAGES = [(truncate, "bytes, expected"), (flip, "its sha256 is not that of the"), (remove, "missing")]


@pytest.mark.parametrize("damage, words", DAMAGES)
def test_verify_names_a_damaged_shard_and_a_rerun_mends_it(copy, finished, damage, words):
    damage(copy / "pairs_00000008-00000015.safetensors")
    before = stamps(copy)
    found = refused(copy, "--verify")
    assert f"{copy}: 20 of 28 pairs are there and whole; damaged: pairs_00000008-00000015.safe" in found
    assert words in found and found.count("pairs_") == 1
    assert "20 of 28 pairs are there" in refused(copy, "--verify")  # still not whole
    collect(copy, "--count", 28)
    assert contents(copy) == contents(finished)
    made = {name for name, stamp in stamps(copy).items() if before.get(name) != stamp}
    assert made == {"pairs_00000008-00000015.safetensors"}
    collect(copy, "--verify")


def test_copies_beside_the_shards_are_left_alone(copy):
    kept = [copy / f"pairs_00000000-00000007.safetensors{end}" for end in (".bak", " (1)", ".orig.safetensors")]
    gone = [copy / f"pairs_00000008-000000{end}" for end in ("16.safetensors", "15.safetensors.tmp")]
    for path in (*kept, *gone):
        path.write_bytes(b"x")
    collect(copy, "--count", 28)
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


def test_what_needs_no_hash_is_mended_without_verify(copy, finished):
    truncate(copy / "pairs_00000000-00000007.safetensors")
    remove(copy / "pairs_00000016-00000023.safetensors")
    collect(copy, "--count", 28)
    assert contents(copy) == contents(finished)


def test_verify_compares_ids(copy):
    """Two shards that a hand has exchanged in the manifest, hashes and all."""
    manifest = json.loads((copy / "manifest.json").read_text())
    a, b = manifest["shards"][:2]
    a["first"], b["first"] = b["first"], a["first"]
    write_manifest(copy, manifest)
    words = refused(copy, "--verify")
    assert "00000007.safetensors (not the pairs 8 to 15)" in words
    assert "00000015.safetensors (not the pairs 0 to 7)" in words


def test_verify_leaves_what_is_collected_meanwhile(copy, monkeypatch):
    """The last shard, half a one, gives way to a whole one while the others are checked."""
    fault = shards.shard_fault

    def slow(*args, **named):
        monkeypatch.setattr(shards, "shard_fault", fault)
        collect(copy, "--count", 40)
        return fault(*args, **named)

    monkeypatch.setattr(shards, "shard_fault", slow)
    assert "00000027.safetensors (missing)" in refused(copy, "--verify")
    collect(copy, "--count", 40, "--verify")


def test_verify_exits_2_with_every_damage_named(copy, monkeypatch, capsys):
    truncate(copy / "pairs_00000000-00000007.safetensors")
    flip(copy / "pairs_00000008-00000015.safetensors")
    remove(copy / "pairs_00000024-00000027.safetensors")
    monkeypatch.setattr("os._exit", sys.exit)
    with pytest.raises(SystemExit) as caught:
        entry("collect_odes.py", collect_odes.main, collect_odes.parse_args(["--out", str(copy), "--verify"]))
    output, errors = capsys.readouterr()
    line = [line for line in errors.splitlines() if line.startswith("collect_odes.py: ")]
    assert (caught.value.code, output, len(line)) == (2, "", 1), errors
    assert line[0].count("pairs_") == 3 and "pairs_00000016" not in line[0]
    assert "8 of 28 pairs are there" in line[0]


# ---- the reader --------------------------------------------------------------------------------------------

def test_rows_in_any_order(finished):
    pairs = open_pairs(finished, MODEL, SHAPE)
    shards = [load_file(path) for path in sorted(finished.glob("*.safetensors"))]
    whole = {name: torch.cat([shard[name] for shard in shards]) for name in ("x_T", "x_0")}
    prompts = data.read_prompts(ROW.prompts)
    assert len(pairs) == 28 and str(pairs) == f"{finished}: ODE pairs of tiny-sd3 at 32x32, 28"
    for indices in ([27, 0, 8, 7, 0], [3], list(range(28))):
        x_T, x_0, texts = pairs.read(indices)
        assert torch.equal(x_T, whole["x_T"][indices]) and torch.equal(x_0, whole["x_0"][indices])
        assert texts == [prompts[i] for i in indices]
    with pytest.raises(IndexError):
        pairs.read([28])


def test_a_shard_is_hashed_once_and_then_read_by_rows(finished, monkeypatch):
    pairs, hashed, read = open_pairs(finished, MODEL, SHAPE), [], []
    sha256, rows = shards.sha256, checkpoint.Tensors.rows
    monkeypatch.setattr(shards, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    monkeypatch.setattr(checkpoint.Tensors, "rows",
                        lambda self, *where: read.append(where) or rows(self, *where))
    for indices in ([9, 10], [15], [10, 1]):
        pairs.read(indices)
    assert hashed == ["pairs_00000008-00000015.safetensors", "pairs_00000000-00000007.safetensors"]
    assert read[:2] == [("x_T", 1, 2), ("x_0", 1, 2)] and all(stop - first == 1 for _, first, stop in read)


def test_many_shards_hold_few_files_open(tmp_path):
    """300 shards of one pair, with prompts of any alphabet and length, and a hole where one is to be made."""
    draws, entries = noise((1, 2, 2), 0, 0, "x_T", range(301)), []
    prompts = [f"{i} \u7ea2 \U0001f98a \"q\"\n" * (i % 40) for i in range(301)]
    for i in range(301):
        if i != 100:
            tensors = dict(x_T=draws[[i]], x_0=-draws[[i]], w=torch.ones(1))
            entries.append(save_shard(tmp_path, "pairs", i, tensors, [prompts[i]]))
    write_manifest(tmp_path, dict(model="m", size=[2, 2], latent_shape=[1, 2, 2], count=301, shards=entries))
    pairs = open_pairs(tmp_path, "m", (1, 2, 2))
    there = [i for i in range(301) if i != 100]
    for order in (range(300), range(299, -1, -1)):
        x_T, x_0, texts = pairs.read(list(order))
        kept = [there[i] for i in order]
        assert torch.equal(x_T, draws[kept]) and torch.equal(x_0, -draws[kept])
        assert texts == [prompts[i] for i in kept]
        assert len(pairs.opened) <= 256
    assert "300 of 301" in str(pairs)


@pytest.mark.parametrize("damage, words", DAMAGES)
def test_a_damaged_shard_is_never_read(copy, damage, words):
    damage(copy / "pairs_00000008-00000015.safetensors")
    with pytest.raises(InputError) as caught:
        open_pairs(copy, MODEL, SHAPE).read([0, 9])
    message = str(caught.value)
    assert message.startswith(f"{copy / 'pairs_00000008-00000015.safetensors'}: ") and words in message
    assert f"`collect_odes.py --verify --out {copy}`" in message and "\n" not in message


@pytest.mark.parametrize("prompt", (None, "\ud83d", ["a"]))
def test_a_shard_with_prompts_that_are_no_texts(copy, prompt):
    """Of another tool, in the same layout: known before a tokenizer is asked, in the middle of a run."""
    manifest = json.loads((copy / "manifest.json").read_text())
    shape = (8, *manifest["latent_shape"])
    tensors = dict(x_T=torch.zeros(shape), x_0=torch.zeros(shape), w=torch.ones(8))
    entry = save_shard(copy, "pairs", 0, tensors, [prompt] * 8)
    write_manifest(copy, manifest | {"shards": [entry, *manifest["shards"][1:]]})
    pairs = open_pairs(copy, MODEL, SHAPE)
    for read in (pairs.all_prompts, lambda: pairs.read([0])):
        with pytest.raises(InputError, match="pairs_00000000-00000007.safetensors: damaged prompts; `collect_odes.py --verify"):
            read()


def test_a_shard_of_another_shape(copy):
    wrong = torch.zeros(8, 1, 2, 2)
    entry = save_shard(copy, "pairs", 0, dict(x_T=wrong, x_0=wrong, w=torch.ones(8)), [""] * 8)
    manifest = json.loads((copy / "manifest.json").read_text())
    write_manifest(copy, manifest | {"shards": [entry, *manifest["shards"][1:]]})
    with pytest.raises(InputError, match="pairs_00000000-00000007.safetensors: another shape of x_T, x_0"):
        open_pairs(copy, MODEL, SHAPE)


def test_folders_that_are_not_these_pairs(finished, tmp_path):
    latents = " x ".join(map(str, SHAPE))
    larger = (SHAPE[0], 2 * SHAPE[1], SHAPE[2])
    for model, shape in (("sdxl", (4, 128, 128)), (MODEL, larger), ("sdxl", SHAPE)):
        with pytest.raises(InputError) as caught:
            open_pairs(finished, model, shape)
        assert str(caught.value) == (f"{finished}: pairs of tiny-sd3 at 32x32, latents {latents}; "
                                     f"expected {model}, latents {' x '.join(map(str, shape))}")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="manifest.json: no such file; expected a folder of ODE pairs"):
            open_pairs(folder, MODEL, SHAPE)
    manifest = json.loads((finished / "manifest.json").read_text())
    write_manifest(tmp_path, manifest | {"shards": []})
    with pytest.raises(InputError, match="0 of 28 pairs are finished"):
        open_pairs(tmp_path, MODEL, SHAPE)


@pytest.mark.parametrize("content", ["", "[]", '{"shards": [{}]}', '{"model": "m"}', '{"shards": 3}', "\xff"])
def test_a_damaged_manifest(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content, encoding="latin-1")
    for use in (lambda: open_pairs(tmp_path, MODEL, SHAPE), lambda: collect(tmp_path, "--count", 8),
                lambda: collect(tmp_path, "--verify")):
        with pytest.raises(InputError, match="manifest.json: damaged, not the manifest of ODE") as caught:
            use()
        assert "\n" not in str(caught.value)
