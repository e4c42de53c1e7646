"""Malformed files at every file flag of every script: one sentence that names the file, exit code 2, at once."""
import pickle
import re
import struct
import time
import zipfile

import pytest
import torch
from conftest import refusal_of
from safetensors.torch import save

from models.checkpoint import InputError, open_tensors
from models.eval.mps import open_module
from models.state import read_plan

SMALL = ("--max-iter", "1", "--evaluate", "0", "--batch-size", "2")
PAYLOAD = pickle.dumps(print, 0).replace(b"print", b"eval")  # a name that would be called is never looked up
CONTENTS = {  # of a file that should hold tensors
    "empty": b"",
    "zeros": bytes(4096),
    "text": b"<!DOCTYPE html><title>Sign in to continue</title>\n" * 20,
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:%b\nsize 9269614\n" % (b"0" * 64),
    "pickle": PAYLOAD,
    "cut off": save({"x": torch.zeros(100)})[:-10],
    "half a header": save({"x": torch.zeros(100)})[:20],
    "a long header": struct.pack("<Q", 2 ** 62) + b"{}",
    "a deep header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "other tensors": save({"x": torch.zeros(2, 2), "y.weight": torch.zeros(3)}),
    "no tensors": save({}),
    "zip": b"PK\x03\x04" + bytes(100),
}
PLACES = {"a folder": lambda path: path.mkdir(), "nothing": lambda path: None}
JSONS = {"empty": "", "cut off": '{"model": "tiny-sdxl", "size": [32', "a list": "[1, 2]", "a number": "7", "null": "null",
         "numbers for names": '{"model": 3, "size": [1, 2], "latent_shape": [], "count": 0, "shards": []}',
         "negative": '{"model": "tiny-sdxl", "size": [-1, 2], "latent_shape": [4], "count": 1, "shards": []}',
         "deep": "[" * 100_000, "NaN": '{"count": NaN}'}
TENSORS = {  # script and flag -> its other flags; all take a file of tensors
    ("adm.py", "--ckpt"): SMALL, ("adm.py", "--vae-ckpt"): SMALL, ("adm.py", "--init"): SMALL,
    ("dmd.py", "--ckpt"): SMALL, ("dmd.py", "--init"): (*SMALL, "--model", "tiny-sdxl"),
    ("adp.py", "--init"): SMALL,
    ("avdm2.py", "--ckpt"): SMALL, ("avdm2.py", "--motion-ckpt"): SMALL, ("avdm2.py", "--teacher-2d"): SMALL,
    ("avdm2.py", "--init"): SMALL,
    ("sample.py", "--ckpt"): ("--count", "1", "--steps", "1"), ("sample.py", "--lora"): ("--count", "1", "--steps", "1"),
    ("collect_odes.py", "--ckpt"): ("--count", "2", "--steps", "1"),
}
MANIFESTS = {  # script and flag that takes a folder with manifest.json
    ("adp.py", "--pairs"): SMALL, ("avdm2.py", "--latents"): SMALL, ("adm.py", "--cache-text"): SMALL,
    ("collect_odes.py", "--out"): ("--count", "2", "--steps", "1"),
}
PROMPTS = {".json": (b"", b"[", b'{"a": 1}', b"[[]]", b'["\\ud83d"]', b"[1, 2]"), ".jsonl": (b"", b"{}\n", b'{"prompt": 3}\n', b"[\n"),
           ".csv": (b"", b"id,name\n1,x\n", b"\xff\xfe\x00\n"), ".tsv": (b"", b"id\tname\n"), ".txt": (b"", b"\n\n", b"\xff\xfe\xfa"),
           ".xlsx": (b"PK\x03\x04",), ".parquet": (b"PAR1",)}


def check(script, path, *flags):
    start = time.process_time()
    said = refusal_of(script, *flags, printed=".*")
    assert time.process_time() - start < 2
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"{script}: ") and len(said) < 1200, said
    assert path.name in said, said


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What a script imports for the first time is not in the two seconds."""
    refusal_of("adm.py", "--steps", "0")
    refusal_of("evaluate.py", "--images", "nowhere", "--out", "/dev/null")


@pytest.mark.parametrize("script, flag", TENSORS)
def test_files_of_tensors(tmp_path, script, flag):
    for number, (kind, content) in enumerate([*CONTENTS.items(), *PLACES.items()]):
        path = tmp_path / f"file{number}.safetensors"
        content(path) if callable(content) else path.write_bytes(content)
        check(script, path, *TENSORS[script, flag], flag, path, "--out", tmp_path / f"out{number}")


@pytest.mark.parametrize("script, flag", MANIFESTS)
def test_manifests(tmp_path, script, flag):
    for number, content in enumerate(JSONS.values()):
        folder = tmp_path / f"folder{number}"
        folder.mkdir()
        (folder / "manifest.json").write_text(content)
        out = () if flag == "--out" else ("--out", tmp_path / f"out{number}")
        check(script, folder, *MANIFESTS[script, flag], flag, folder, *out)


@pytest.mark.parametrize("script", ("adm.py", "dmd.py", "sample.py", "collect_odes.py"))
def test_prompt_files(tmp_path, script):
    flags = {"sample.py": ("--count", "1"), "collect_odes.py": ("--count", "2", "--steps", "1")}.get(script, SMALL)
    for suffix, contents in PROMPTS.items():
        for number, content in enumerate(contents):
            path = tmp_path / f"file{number}{suffix}"
            path.write_bytes(content)
            check(script, path, *flags, "--prompts", path, "--out", tmp_path / f"out{suffix}{number}")


def test_there_are_many():
    count = len(TENSORS) * (len(CONTENTS) + len(PLACES)) + len(MANIFESTS) * len(JSONS)
    assert count + 4 * sum(map(len, PROMPTS.values())) > 250


BOMBS = {  # a dictionary whose key takes 2^45 steps to hash, or 1000^8
    "twice": b"2\x86" * 45, "by memo": b"q\x00h\x00h\x00\x86" * 45,
    "wide": (b"q\x00(" + b"h\x00" * 1000 + b"t") * 8}


@pytest.mark.parametrize("key", BOMBS)
def test_tuples_in_one_another_are_refused_before_they_are_hashed(tmp_path, key):
    bomb = b"\x80\x02})" + BOMBS[key] + b"K\x00s."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/DATA.PKL" if key == "wide" else "x/data.pkl", bomb)
        archive.writestr("x/version", "3")
    (tmp_path / "old.pt").write_bytes(bomb)
    (tmp_path / ".metadata").write_bytes(bomb)
    for read, path in ((open_tensors, tmp_path / "x.pt"), (open_tensors, tmp_path / "old.pt"),
                       (open_module, tmp_path / "x.pt"), (read_plan, tmp_path / ".metadata")):
        with pytest.raises(InputError, match=re.escape(str(path)) + ".*a tuple that holds more than 10000 others"):
            read(path)


def test_any_compressed_entry_of_a_pytorch_file_is_refused(tmp_path):
    torch.save({"x": torch.zeros(3)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as old, zipfile.ZipFile(tmp_path / "y.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED if name.endswith("byteorder") else zipfile.ZIP_STORED)
    assert open_tensors(tmp_path / "x.pt")["x"].shape == (3,)
    with pytest.raises(InputError, match="y.pt: a compressed archive"):
        open_tensors(tmp_path / "y.pt")


def test_a_small_file_does_not_fill_memory_with_zeros(tmp_path):
    """PyTorch, too, makes the bytearray that a pickle asks for, with weights_only."""
    zeros = b"\x80\x02}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\xff\xff\xff\x0f\x85Rs."  # 256 MiB
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", zeros)
        archive.writestr("x/version", "3")
    with pytest.raises(InputError, match="x.pt: not a PyTorch file, or truncated .it asks for a bytearray"):
        open_tensors(tmp_path / "x.pt")
