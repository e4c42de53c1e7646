"""--cache-text: the same bits as with the encoders, which are loaded only for prompts that are new."""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, refusal_of, rows, run

import adm
import adp
import avdm2
import collect_odes
import dmd
from models.checkpoint import InputError
from models.job import text_cache
from models.shards import read_manifest

SMALL = ["--batch-size", 2, "--micro-batch", 1, "--max-iter", 2, "--ema", 0, "--evaluate", 0, "--lora-rank", 4, "--fake-lora", 4]


def train(*flags, script=adm):
    run(script, *flags)


def losses(out):
    return [[value for name, value in row.items() if name.startswith("loss_")] for row in rows(out)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("a red circle\na blue square on white\na small ring\n")
    return path


@pytest.fixture(scope="module")
def cached(prompts):
    """A folder of encoded prompts and what a run gave with it."""
    folder = prompts.parent / "text"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cache, "SHARD", 8)
        patch.setattr(text_cache, "BATCH", 3)
        train(*SMALL, "--prompts", prompts, "--cache-text", folder, "--out", prompts.parent / "first")
    return folder, losses(prompts.parent / "first")


def test_the_same_bits_as_with_the_encoders(cached, prompts, tmp_path):
    train(*SMALL, "--prompts", prompts, "--out", tmp_path)
    assert losses(tmp_path) == cached[1]


def test_another_run_may_add_prompts_while_one_trains(prompts, tmp_path, monkeypatch):
    """The folder is locked while it is written, not until the run ends. What another process adds between the
    reading and the writing is not swept away."""
    train(*SMALL, "--prompts", prompts, "--cache-text", tmp_path / "text", "--out", tmp_path / "first")
    code = "import pathlib, sys; from models.job.folder import hold; hold(pathlib.Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, tmp_path / "text"], cwd=ROOT, check=True)

    def load_text(*args, load=text_cache.load_text):
        manifest = json.loads((tmp_path / "text" / "manifest.json").read_text())
        (tmp_path / "text" / "manifest.json").write_text(json.dumps(manifest | dict(count=manifest["count"] + 1)))
        return load(*args)
    monkeypatch.setattr(text_cache, "load_text", load_text)
    (tmp_path / "more.txt").write_text("a green triangle\n")
    with pytest.raises(InputError, match="text: another run has added prompts meanwhile"):
        train(*SMALL, "--prompts", tmp_path / "more.txt", "--cache-text", tmp_path / "text", "--out", tmp_path / "second")


def test_the_encoders_are_not_loaded_again(cached, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(text_cache, "load_text", None)  # calling it would raise TypeError
    train(*SMALL, "--prompts", prompts, "--cache-text", cached[0], "--out", tmp_path)
    assert losses(tmp_path) == cached[1]
    train(*SMALL, "--prompts", prompts, "--cache-text", cached[0], "--out", tmp_path / "dmd", script=dmd)


@pytest.mark.parametrize("script", [adp, avdm2])
def test_prompts_of_pairs_and_clips_are_known(tmp_path, monkeypatch, script):
    """ADP's are asked for together, those of two micro-batches of two."""
    asked, encode = [], text_cache.CachedText.encode
    monkeypatch.setattr(text_cache.CachedText, "encode", lambda *args: asked.append(len(args[1])) or encode(*args))
    flags = ["--batch-size", 4, "--micro-batch", 2, "--max-iter", 2, "--evaluate", 0]
    if script is adp:
        made = ["--model", "tiny-sdxl", "--count", 6, "--steps", 1, "--shard-size", 4, "--out", tmp_path / "pairs"]
        collect_odes.main(collect_odes.parse_args(list(map(str, made))))
        flags += ["--pairs", tmp_path / "pairs", "--lambdas", 1, 0]
    else:
        flags += ["--sdm", "none", "--ttur", 1]
    train(*flags, "--out", tmp_path / "without", script=script)
    train(*flags, "--cache-text", tmp_path / "text", "--out", tmp_path / "with", script=script)
    assert losses(tmp_path / "with") == losses(tmp_path / "without") and len(losses(tmp_path / "with")) == 2
    assert asked == [1] + ([4, 4] if script is adp else [2, 2, 2, 2])  # after the unconditional


def test_new_prompts_are_added(cached, tmp_path, capsys):
    folder = tmp_path / "text"
    shutil.copytree(cached[0], folder)
    before = read_manifest(folder, "text")
    (tmp_path / "more.txt").write_text(f"a red circle\na yellow cross\na green cross {'and ' * 80}\n")
    cut = "note: 1 of the first 2 prompts are longer than the text encoders' windows and cut\n"
    flags = [*SMALL, "--prompts", tmp_path / "more.txt", "--cache-text", folder]
    train(*flags, "--out", tmp_path / "run")
    assert f"{folder}: {before['count']} prompts are encoded, 2 left\n{cut}" in capsys.readouterr().out
    after = read_manifest(folder, "text")
    assert after["count"] == before["count"] + 2 and after["shards"][:-1] == before["shards"]
    train(*flags, "--out", tmp_path / "again")
    assert cut not in capsys.readouterr().out


def test_what_is_refused(cached, prompts, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(cached[0], folder)
    flags = [*map(str, SMALL), "--prompts", str(prompts), "--cache-text", str(folder), "--out", str(tmp_path / "run")]
    said = refusal_of("adm.py", *flags, "--no-t5", printed="loading .*\n")
    assert said == (f"adm.py: {folder}: encoded with other settings: no_t5 True (was False); expected another --cache-text "
                    "or the flags and files that it was made with\n")
    shard = folder / read_manifest(folder, "text")["shards"][0]["file"]
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    mend = f"remove {folder}, and --cache-text makes it again"
    assert refusal_of("adm.py", *flags, printed=".*") == (
        f"adm.py: {shard}: its sha256 is not that of the manifest; {mend}\n")
    shard.write_bytes(content[:-1])
    assert refusal_of("adm.py", *flags, printed=".*").endswith(f"expected {len(content)}; {mend}\n")


TWO = """
import os, sys
from models import shards
from models.job import text_cache
import adm
text_cache.SHARD, text_cache.BATCH = 8, 3
adm.main(adm.parse_args(sys.argv[1:]))
read = shards.read_manifest
if os.environ["RANK"] == "1":  # its node does not see yet what is in the folder
    shards.read_manifest = lambda *given: read(*given) | dict(count=0, shards=[])
adm.main(adm.parse_args([*sys.argv[1:], "--out", sys.argv[-1] + "2"]))
"""


def test_two_ranks_write_the_same_shards(cached, prompts, tmp_path):
    (tmp_path / "two.py").write_text(TWO)
    flags = [*map(str, SMALL), "--prompts", str(prompts), "--cache-text", str(tmp_path / "text"), "--out",
             str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", tmp_path / "two.py",
                           *flags], env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    one, two = (read_manifest(folder, "text")["shards"] for folder in (cached[0], tmp_path / "text"))
    assert two == one
    assert torch.tensor(losses(tmp_path / "run")).allclose(torch.tensor(cached[1]), rtol=1e-4)
    assert losses(tmp_path / "run2") == losses(tmp_path / "run")
