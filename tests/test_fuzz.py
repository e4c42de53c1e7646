"""Mutations of valid files, from fixed seeds: every one is read or refused in one sentence, and soon."""
import io
import json
import pickle
import random
import struct
import time
from functools import cache

import pytest
import torch
from safetensors.torch import save

from models.checkpoint import InputError, check_values, open_tensors
from models.data import read_prompts
from models.eval.prompt_sets import prompt_set
from models.job.families import FAMILIES
from models.job.notes import export_notes, run_settings
from models.lora import read_lora
from models.presets import PRESETS
from models.sdxl_unet import UNet
from models.shards import read_manifest
from models.text_encoders import checked_class

EACH = 160  # mutations of each file: 2,400 in all, 4 s
PIECES = [b"null", b"-1", b"1e999", b"NaN", b"1.5", b"true", b'"', b"'", b"[", b"]", b"{", b"}", b"{}", b"[]", b",", b":", b"\\", b"\0",
          b"\n", b"\r", b"\t", b"\xef\xbb\xbf", b"\xff", b"\\ud83d", b'"shape":', b'"F4"', b"99999999999999999999", b"__metadata__"]


def mutated(content: bytes, rng: random.Random, head: int) -> bytes:
    """One to four edits within the first `head` bytes, where the structure is."""
    for _ in range(rng.randint(1, 4)):
        i = rng.randrange(min(head, len(content)) + 1)
        j = min(len(content), i + rng.choice((1, 2, 8, 40)))
        edit = rng.randrange(6)
        if edit == 0:
            content = content[:i] + bytes([rng.randrange(256)]) + content[i + 1:]
        elif edit == 1:
            content = content[:i] + content[j:]
        elif edit == 2:
            content = content[:j] + content[i:]
        elif edit == 3:
            content = content[:i] + rng.choice(PIECES) + content[i:]
        elif edit == 4:
            content = content[:i] + rng.choice(PIECES) + content[j:]
        elif rng.random() < 0.2:
            content = content[:i]
    return content


def header_of(content: bytes) -> bytes:
    """A safetensors file without its length, which `framed` puts back: else hardly a header would be reached."""
    return content[8:]


def framed(content: bytes) -> bytes:
    end = content.find(b"}}") + 2
    return struct.pack("<Q", max(end, 1)) + content


def read_all(path):
    tensors = open_tensors(path)
    export_notes(tensors)
    for name in tensors:
        check_values(tensors, name, tensors[name], floating=True)


@cache
def sdxl():
    with torch.device("meta"):
        return UNet(**PRESETS["tiny-sdxl"].config)


def read_adapter(path):
    """Peft's settings, beside the weights of an adapter."""
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    weights = {f"base_model.model.{module}.lora_{side}.weight": torch.ones(shape)
               for side, shape in (("A", (4, 64)), ("B", (64, 4)))}
    path.with_name("adapter_model.safetensors").write_bytes(save(weights))
    read_lora(open_tensors(path.with_name("adapter_model.safetensors")), sdxl(), FAMILIES["unet"].names)


TENSORS = {"net.a": torch.randn(3, 4), "net.b": torch.randn(4).half(), "net.c": torch.zeros(()).bfloat16()}
RECORDS = [{"path": "a.mp4", "cap": ["A man, talking."], "fps": 24}, {"prompt": "a \"quoted\" café", "data": 3},
           {"data": {"x-1": {"caption": {"content": "A hand."}}}}]
ENTRY = dict(file="pairs_0-1.safetensors", first=0, count=2, bytes=100, sha256="0" * 64)
MANIFEST = dict(model="tiny-sdxl", size=[32, 32], latent_shape=[4, 8, 8], count=2, shards=[ENTRY])
SETTINGS = dict(model="tiny-sd3", ckpt=None, text_ckpt=None, tokenizers="x", size=[32, 32], no_t5=False)
torch.save(TENSORS, buffer := io.BytesIO())
CASES = {
    "x.safetensors": (header_of(save(TENSORS, {"dmdx.steps": "4", "dmdx.shift": "3.0"})), read_all),
    "x.safetensors.index.json": (json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}), read_all),
    "x.pt": (buffer.getvalue(), read_all),
    "x.txt": ("a red fox\n\n café \r\nthe last\n", read_prompts),
    "x.jsonl": ("\n".join(map(json.dumps, RECORDS)), read_prompts),
    "x.json": (json.dumps(RECORDS), read_prompts),
    "x.csv": ('id,prompt\r\n1,"a, ""b"""\r\n2,c\r\n', read_prompts),
    "x.tsv": ('id\tprompt\n1\t"a\nb"\n2\t"c" d\n', read_prompts),
    "webvid.csv": ("videoid,page_dir,name,duration\n1,a_b,\"A man, talking\",3\n2,c_d,Dogs,4\n", prompt_set),
    "vbench.json": (json.dumps([{"prompt_en": "a cat", "dimension": ["scene"]}]), prompt_set),
    "x.pkl": (pickle.dumps(["a caption", "another"], 2), prompt_set),
    "config.json": (json.dumps({"args": SETTINGS, "preset": {}}), lambda path: run_settings(path.parent)),
    "manifest.json": (json.dumps(MANIFEST), lambda path: read_manifest(path.parent)),
    "adapter_config.json": (json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False, "alpha_pattern":
                                        {"to_q": 2, ".*attn1\\.(to_k|to_v)": 3}}), read_adapter),
    "tokenizer_config.json": (json.dumps({"tokenizer_class": "CLIPTokenizer", "extra_ids": 0}), checked_class),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mutation_is_read_or_refused_in_one_sentence(tmp_path, name):
    content, read = CASES[name]
    content = content.encode() if isinstance(content, str) else content
    frame = framed if name == "x.safetensors" else lambda content: content
    (tmp_path / name).write_bytes(frame(content))
    if "index" not in name:  # whose shards are not there
        read(tmp_path / name)
    rng, refused, start = random.Random(name), 0, time.perf_counter()
    for i in range(EACH):
        (tmp_path / name).write_bytes(frame(mutated(content, rng, 400)))
        try:
            read(tmp_path / name)
        except InputError as error:
            refused += 1
            assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error) and len(str(error)) < 1000, i
    assert refused > EACH // 20  # the mutations reach the checks
    assert time.perf_counter() - start < 20
