"""models/checkpoint.py: what is read and when, what is refused and in which words."""
import json
import os
import resource
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import ROOT, golden, read_golden, says
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from models.checkpoint import (
    check_names,
    find,
    load,
    open_tensors,
    replacing,
    save_safetensors,
)
from models.job.motion import merged
from models.parallel import load_sharded


def refusal(call, *args) -> str:
    """The one-sentence message of the InputError that a call must raise."""
    message = says(call, *args)
    assert len(message) < 600
    return message


def small() -> dict[str, torch.Tensor]:
    return {"net.a": torch.randn(5, 3), "net.b": torch.randn(4), "vae.c": torch.randn(2, 2, 2, 2)}


# ---- reading -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", golden("*.safetensors"), ids=lambda p: p.stem)
def test_safetensors_equals_the_safetensors_package(path):
    tensors, (expected, _) = open_tensors(path), read_golden(path)
    with safe_open(path, "pt") as file:
        assert tensors.metadata == file.metadata()
    assert sorted(tensors) == sorted(expected) and len(tensors) == len(expected)
    for name, value in expected.items():
        assert tensors.shapes[name] == tuple(value.shape) and tensors[name].dtype == value.dtype
        assert torch.equal(tensors[name], value)
        if value.ndim:
            half = value.shape[0] // 2
            assert torch.equal(tensors.rows(name, half, value.shape[0]), value[half:])


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the bit; torch.equal does not know every fp8 type."""
    a, b = a.contiguous(), b.contiguous()
    return (a.dtype, a.shape) == (b.dtype, b.shape) and \
        torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))


@pytest.mark.parametrize("dtype", [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (6, 2, 3)])
def test_every_dtype_and_shape(tmp_path, dtype, shape):
    value = (4 * torch.randn(shape)).to(dtype)
    save_file({"x": value}, tmp_path / "x.safetensors")
    tensors = open_tensors(tmp_path / "x.safetensors")
    assert tensors.shapes == {"x": shape} and same(tensors["x"], value)
    if shape:
        assert same(tensors.rows("x", 1, 4), value[1:4])


def test_rows_past_the_end_are_empty_as_in_a_slice(tmp_path):
    """FSDP gives the last ranks no rows when there are fewer rows than ranks."""
    save_file(small(), tmp_path / "x.safetensors")
    torch.save(small(), tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        assert open_tensors(tmp_path / name).rows("net.a", 5, 5).shape == (0, 3)
        assert open_tensors(tmp_path / name).rows("net.a", 8, 9).shape == (0, 3)


def test_reading_gives_memory_of_its_own(tmp_path):
    save_file(small(), tmp_path / "x.safetensors")
    torch.save(small(), tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        tensors = open_tensors(tmp_path / name)
        before = tensors["net.b"].clone()
        tensors["net.b"].add_(1)
        tensors.rows("net.b", 0, 4).add_(1)
        assert torch.equal(tensors["net.b"], before)


def test_a_file_larger_than_memory_is_read_by_its_header_and_rows(tmp_path):
    """1 TiB on paper, a few blocks on disk: neither opening nor reading a row may read or map the whole."""
    rows, width = 2 ** 27, 4096
    size = 2 * rows * width
    head = json.dumps({"w": {"dtype": "F16", "shape": [rows, width], "data_offsets": [0, size]}}).encode()
    with open(tmp_path / "large.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + size)
        file.seek(-2 * width, os.SEEK_END)
        file.write(torch.full((width,), 3.0, dtype=torch.float16).numpy().tobytes())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tensors = open_tensors(tmp_path / "large.safetensors")
    assert tensors.shapes == {"w": (rows, width)} and "w" in tensors
    zeros, threes = tensors.rows("w", rows - 2, rows)
    assert zeros.shape == threes.shape == (width,) and (zeros == 0).all() and (threes == 3).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_torch_files_of_parameters_give_plain_tensors(tmp_path):
    torch.save({"x": nn.Parameter(torch.ones(2))}, tmp_path / "x.pt")
    tensors = open_tensors(tmp_path / "x.pt")
    assert not tensors["x"].requires_grad and not tensors.rows("x", 0, 1).requires_grad


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("wrapped", [None, "state_dict", "module"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
def test_torch_files(tmp_path, suffix, wrapped, zipped):
    expected = small()
    data = {wrapped: expected, "epoch": 3, "optimizer": {"lr": 0.1}} if wrapped else expected | {"epoch": 3}
    torch.save(data, tmp_path / f"x{suffix}", _use_new_zipfile_serialization=zipped)
    tensors = open_tensors(tmp_path / f"x{suffix}")
    assert list(tensors) == list(expected) and tensors.metadata == {}
    assert all(torch.equal(tensors[name], value) for name, value in expected.items())
    assert torch.equal(tensors.rows("net.a", 1, 3), expected["net.a"][1:3])


def shards(folder: Path, suffix: str = ".safetensors") -> dict[str, torch.Tensor]:
    whole, save = small(), save_file if suffix == ".safetensors" else torch.save
    files = {name: f"model-{n}-of-2{suffix}" for name, n in (("net.a", 1), ("net.b", 2), ("vae.c", 2))}
    for file in set(files.values()):
        save({name: value for name, value in whole.items() if files[name] == file}, folder / file)
    (folder / f"model{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return whole


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_by_index_and_by_folder(tmp_path, suffix):
    expected = shards(tmp_path, suffix)
    for path in (tmp_path, str(tmp_path / f"model{suffix}.index.json")):
        tensors = open_tensors(path)
        assert tensors.shapes == {name: tuple(value.shape) for name, value in expected.items()}
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())
        assert torch.equal(tensors.rows("net.a", 2, 4), expected["net.a"][2:4])


def test_what_a_shard_announces_holds_for_all(tmp_path):
    shards(tmp_path)
    for path in tmp_path.glob("*.safetensors"):
        save_file(load_file(path), path, {"modelspec.prediction_type": "v", "dmdx.crc32": path.name})
    assert open_tensors(tmp_path).metadata == {"modelspec.prediction_type": "v"}  # a checksum is of one file


def test_a_folder_prefers_safetensors(tmp_path):
    torch.save({"pickled": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    save_file({"safe": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert list(open_tensors(tmp_path)) == ["safe"]
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7")  # macOS leaves one beside each file
    assert open_tensors(tmp_path).path == tmp_path / "model.safetensors"


def test_groups(tmp_path):
    save_file(small(), tmp_path / "x.safetensors", {"note": "kept"})
    tensors = open_tensors(tmp_path / "x.safetensors")
    group = tensors.group("net.")
    assert (group.path, group.prefix, group.metadata) == (tensors.path, "net.", {"note": "kept"})
    assert group.shapes == {"a": (5, 3), "b": (4,)} and "net.a" not in group and "c" not in group
    assert torch.equal(group["a"], tensors["net.a"])
    assert torch.equal(group.rows("a", 1, 2), tensors["net.a"][1:2])
    assert refusal(tensors.group, "model.diffusion_model.") == \
        f"{tensors.path}: expected tensors named model.diffusion_model.*, found net.a, net.b, vae.c"
    with pytest.raises(KeyError, match="net.c"):
        group["c"]


def test_merged_files_hold_the_names_of_both(tmp_path):
    overlapping = {"motion.d": torch.randn(3, 2), "net.a": torch.zeros(5, 3)}
    for name, file in (("a", small()), ("b", overlapping)):
        save_file(file, tmp_path / f"{name}.safetensors", {"from": name, name: "kept"})
    a, b = (open_tensors(tmp_path / f"{name}.safetensors") for name in "ab")
    motion = b.group("motion.")
    both = merged(a, motion)
    assert both.shapes == a.shapes | {"d": (3, 2)}
    assert both.metadata == {"from": "a", "a": "kept", "b": "kept"}
    assert torch.equal(both["net.b"], a["net.b"]) and torch.equal(both.rows("d", 1, 3), motion["d"][1:])
    assert refusal(merged, a, b) == \
        f"{b.path}: 1 of its 2 tensors are in {a.path} too (net.a); expected other names"


@pytest.mark.parametrize("scale, inputs", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_scaled_fp8_is_multiplied_by_its_scale(tmp_path, scale, inputs):
    stored = torch.randn(6, 4).to(torch.float8_e4m3fn)
    file = {"t5.fc.weight": stored, f"t5.fc.{scale}": torch.tensor(0.25), f"t5.fc.{inputs}": torch.ones(()),
            "t5.fc.bias": torch.ones(6), "t5.scaled_fp8": torch.zeros(0)}
    save_file(file, tmp_path / "x.safetensors")
    tensors = open_tensors(tmp_path / "x.safetensors").group("t5.")
    assert sorted(tensors) == ["fc.bias", "fc.weight"]
    assert torch.equal(tensors["fc.weight"], stored.float() / 4)
    assert torch.equal(tensors.rows("fc.weight", 2, 4), stored.float()[2:4] / 4)
    assert torch.equal(tensors["fc.bias"], torch.ones(6))


def test_scales_per_channel_are_refused(tmp_path):
    save_file({"fc.weight": torch.zeros(6, 4).to(torch.float8_e4m3fn), "fc.scale_weight": torch.ones(6, 1)},
              tmp_path / "x.safetensors")
    assert "fc.scale_weight is (6, 1); expected one" in refusal(open_tensors, tmp_path / "x.safetensors")


# ---- refusals ----------------------------------------------------------------------------------------------

class Hyperparameters:
    """A class of the training script, pickled beside the weights."""


class RunsCode:
    def __reduce__(self):
        return os.system, ("exit 1",)


def test_pickles_that_need_more_than_weights_only(tmp_path):
    trained = {"state_dict": small(), "hyper_parameters": Hyperparameters()}
    cases = {"class.ckpt": (trained, f"{__name__}.Hyperparameters"),
             "code.pth": (RunsCode(), f"{os.name}.system"),
             "module.bin": (nn.Linear(2, 2), "torch.nn.modules.linear.Linear")}
    for name, (data, wants) in cases.items():
        torch.save(data, tmp_path / name)
        assert refusal(open_tensors, tmp_path / name) == (
            f"{tmp_path / name}: refused, because reading it would run code (it calls {wants}); "
            "expected a file of tensors only, such as .safetensors")


ENTRY = b'{"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'


def test_damaged_and_foreign_files(tmp_path):
    save_file(small(), tmp_path / "good.safetensors")
    torch.save(small(), tmp_path / "good.pt")
    torch.save(small(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    good, pt, old = ((tmp_path / name).read_bytes() for name in ("good.safetensors", "good.pt", "old.pt"))

    def with_length(text):
        return struct.pack("<Q", len(text)) + text

    def header(**entry):
        return with_length(json.dumps({"x": json.loads(ENTRY) | entry}).encode()) + bytes(8)

    cases = {
        "short.safetensors": (good[:-3], f"truncated, {len(good) - 3} bytes of {len(good)}"),
        "header.safetensors": (good[:40], "truncated within its header, 40 bytes"),
        "empty.safetensors": (b"", "expected a safetensors file"),
        "page.safetensors": (b"<!doctype html><title>401</title>" * 9, "expected a safetensors file"),
        "pickle.safetensors": (pt, "expected a safetensors file"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "json.safetensors": (struct.pack("<Q", 3) + b"{x}", "damaged safetensors header"),
        "dtype.safetensors": (header(dtype="F4"), "x has the unsupported dtype F4; expected one of F64, F32"),
        "scales.safetensors": (header(dtype="F8_E8M0"), "x has the unsupported dtype F8_E8M0"),
        "number.safetensors": (header(dtype=4), "x has the unsupported dtype 4"),
        "float.safetensors": (header(shape=[2.0]), "no whole numbers in shape and data_offsets of x"),
        "negative.safetensors": (header(shape=[-1, -2]), "no whole numbers in shape and data_offsets of x"),
        "text.safetensors": (header(data_offsets="08"), "no whole numbers in shape and data_offsets of x"),
        "many.safetensors": (header(shape=[1] * 65), "has 65 dimensions"),
        "huge.safetensors": (header(shape=[0, 2 ** 62], data_offsets=[0, 0]), "larger than any memory"),
        "deep.safetensors": (with_length(b'{"x":' + 200_000 * b"["), "header (nested too deep)"),
        "list.safetensors": (with_length(b'{"x":[1]}'), "no dtype, shape and data_offsets of x"),
        "twice.safetensors": (with_length(b'{"x":' + ENTRY + b',"x":' + ENTRY + b"}") + bytes(8), "x stands twice"),
        "shared.safetensors": (with_length(b'{"x":' + ENTRY + b',"y":' + ENTRY + b"}") + bytes(8),
                               "the same bytes are those of x and y"),
        "tail.safetensors": (good + b"other", "5 of its bytes belong to no tensor"),
        "hole.safetensors": (header(data_offsets=[8, 16]) + bytes(8), "8 of its bytes belong to no tensor"),
        "notes.safetensors": (with_length(b'{"__metadata__":{"steps":4}}'), "its metadata are not texts"),
        "lines.safetensors": (with_length(b'{"a\\nb":{}}'), "data_offsets of a\\nb"),
        "size.safetensors": (header(shape=[3]), "sizes do not fit the shapes of x"),
        "short.pt": (pt[:-40], "not a PyTorch file, or truncated"),
        "old_short.pt": (old[:-4], "not a PyTorch file, or truncated"),
        "page.bin": (b"<!doctype html>", "not a PyTorch file, or truncated"),
        "empty.ckpt": (b"", "not a PyTorch file, or truncated"),
        "x.gguf": (b"GGUF", "not a tensor file; expected .safetensors"),
        "list.safetensors.index.json": (b"[]", '"weight_map"'),
        "text.safetensors.index.json": (b"weight_map", '"weight_map"'),
        "deep.safetensors.index.json": (200_000 * b"[", '"weight_map"'),
        "loop.safetensors.index.json": (b'{"weight_map": {"x": "loop.safetensors.index.json"}}',
                                        "names loop.safetensors.index.json; expected tensor files beside it"),
        "away.safetensors.index.json": (b'{"weight_map": {"x": "../good.safetensors"}}', "names ../good.safe"),
    }
    for name, (content, expected) in cases.items():
        (tmp_path / name).write_bytes(content)
        message = refusal(open_tensors, tmp_path / name)
        assert str(tmp_path / name) in message and expected in message


def test_torch_files_without_one_set_of_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    assert "no tensors" in refusal(open_tensors, tmp_path / "none.pt")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    assert "no tensors" in refusal(open_tensors, tmp_path / "list.pt")
    torch.save({"generator": small(), "ema": small()}, tmp_path / "two.pt")
    assert "several sets of tensors (generator, ema)" in refusal(open_tensors, tmp_path / "two.pt")
    torch.save(small() | {"ema": small()}, tmp_path / "average.pt")
    assert "several sets of tensors (ema, at the top)" in refusal(open_tensors, tmp_path / "average.pt")


def test_absent_files_and_folders(tmp_path):
    assert "absent.safetensors: no such file" in refusal(open_tensors, tmp_path / "absent.safetensors")
    (tmp_path / "README.md").touch()
    message = refusal(open_tensors, tmp_path)
    assert str(tmp_path) in message and "no weights in this folder; expected *.safetensors" in message
    for name in ("model.safetensors", "model.fp16.safetensors"):
        save_file(small(), tmp_path / name)
    assert "expected one of model.fp16.safetensors, model.safetensors" in refusal(open_tensors, tmp_path)


def test_incomplete_shards(tmp_path):
    shards(tmp_path)
    save_file({"net.b": torch.zeros(4)}, tmp_path / "model-2-of-2.safetensors")
    message = refusal(open_tensors, tmp_path)
    assert "model.safetensors.index.json" in message and "vae.c in model-2-of-2.safetensors" in message
    (tmp_path / "model-2-of-2.safetensors").unlink()
    message = refusal(open_tensors, tmp_path)
    assert "1 of its 2 files are not beside it: model-2-of-2.safetensors" in message


# ---- loading -----------------------------------------------------------------------------------------------

def meta(build) -> nn.Module:
    with torch.device("meta"):
        return build()


def test_load_materialises_and_upcasts(tmp_path):
    for stored in (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        value = {"weight": torch.randn(3, 2).to(stored), "bias": torch.randn(3).to(stored)}
        save_file(value, tmp_path / "x.safetensors")
        for asked in (torch.float32, torch.bfloat16):
            net = meta(lambda: nn.Linear(2, 3))
            net.bias.requires_grad_(False)
            load(net, open_tensors(tmp_path / "x.safetensors"), asked)
            assert torch.equal(net.weight, value["weight"].to(asked)) and net.weight.dtype == asked
            assert torch.equal(net.bias, value["bias"].to(asked))
            assert net.weight.requires_grad and not net.bias.requires_grad


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_not_finite_are_named(tmp_path, dtype, wrong):
    value = {"net.weight": torch.zeros(3, 2), "net.bias": torch.zeros(3)}
    value["net.weight"][2, 1] = wrong
    save_file({name: t.to(dtype) for name, t in value.items()}, tmp_path / "x.safetensors")
    tensors = open_tensors(tmp_path / "x.safetensors").group("net.")
    words = f"{tmp_path / 'x.safetensors'}: net.weight holds NaN or infinity; expected finite weights"
    assert refusal(load, meta(lambda: nn.Linear(2, 3)), tensors) == words
    assert refusal(load_sharded, nn.Linear(2, 3), tensors) == words


def test_quantised_weights_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3, 2, dtype=torch.int8), "bias": torch.zeros(3)}, tmp_path / "x.safetensors")
    tensors = open_tensors(tmp_path / "x.safetensors")
    for call, net in ((load, meta(lambda: nn.Linear(2, 3))), (load_sharded, nn.Linear(2, 3))):
        assert "weight holds int8 numbers, as quantised files do; expected" in refusal(call, net, tensors)


def test_load_leaves_integers_alone(tmp_path):
    net = meta(lambda: nn.BatchNorm1d(2))
    stored = nn.BatchNorm1d(2).state_dict() | {"num_batches_tracked": torch.tensor(7)}
    save_file(stored, tmp_path / "x.safetensors")
    load(net, open_tensors(tmp_path / "x.safetensors"), torch.bfloat16)
    assert net.num_batches_tracked.dtype == torch.int64 and net.num_batches_tracked == 7
    assert net.running_var.dtype == torch.bfloat16 and not isinstance(net.running_var, nn.Parameter)


def test_load_keeps_a_tied_weight_tied_however_it_is_stored(tmp_path):
    def tied() -> nn.ModuleDict:
        net = nn.ModuleDict({"shared": nn.Embedding(4, 2), "embed_tokens": nn.Embedding(4, 2)})
        net.embed_tokens.weight = net.shared.weight
        return net

    value = torch.randn(4, 2)
    for names in (["shared.weight"], ["embed_tokens.weight"], ["shared.weight", "embed_tokens.weight"]):
        net = meta(tied)
        save_file({name: value.clone() for name in names}, tmp_path / "x.safetensors")
        load(net, open_tensors(tmp_path / "x.safetensors"))
        assert net.shared.weight is net.embed_tokens.weight and torch.equal(net.shared.weight, value)
    save_file({"other": value}, tmp_path / "x.safetensors")
    assert "1 of 1 expected tensors are missing (shared.weight)" in \
        refusal(load, meta(tied), open_tensors(tmp_path / "x.safetensors"))


def test_names_are_strict_both_ways_and_given_in_full(tmp_path):
    file = {f"net.layer{i}.weight": torch.zeros(2, 2) for i in range(8)}
    expected = {name.removeprefix("net."): (2, 2) for name in file}
    path = tmp_path / "x.safetensors"

    def message(change: dict, ignore: tuple = ()) -> str:
        save_file({name: t for name, t in (file | change).items() if t is not None}, path)
        return refusal(check_names, open_tensors(path).group("net."), expected, ignore)

    save_file(file, path)
    check_names(open_tensors(path).group("net."), expected)
    assert message({"net.layer3.weight": None}) == \
        f"{path}: 1 of 8 expected tensors are missing (net.layer3.weight)"
    assert message({"net.layer8.weight": torch.zeros(1), "net.mask": torch.zeros(1)}) == \
        f"{path}: 2 tensors are not expected (net.layer8.weight, net.mask)"
    assert message({"net.layer8.weight": torch.zeros(1), "net.mask": torch.zeros(1)}, ("mask",)) == \
        f"{path}: 1 tensors are not expected (net.layer8.weight)"
    assert message({"net.layer5.weight": torch.zeros(2, 3)}) == \
        f"{path}: 1 tensors have another shape (net.layer5.weight is (2, 3), expected (2, 2))"
    assert message({name: None for name in list(file)[:5]} | {"net.conv.weight": torch.zeros(1)}) == \
        (f"{path}: another architecture: 5 of 8 expected tensors are missing (net.layer0.weight, "
         "net.layer1.weight, net.layer2.weight, ...); 1 tensors are not expected (net.conv.weight)")
    save_file(file | {"net.a.mask": torch.zeros(1)}, path)
    check_names(open_tensors(path).group("net."), expected, ("*.mask", "unused*"))


def test_a_refused_file_changes_nothing(tmp_path):
    net = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    save_file({"weight": torch.zeros(3, 2)}, tmp_path / "x.safetensors")
    assert "missing (bias)" in refusal(load, net, open_tensors(tmp_path / "x.safetensors"))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ---- saving ------------------------------------------------------------------------------------------------

def test_save_and_open_again(tmp_path):
    whole = torch.arange(12.0).view(4, 3)
    tensors = {"whole": whole, "again": whole, "rows": whole[1:3], "column": whole[:, 1],
               "turned": torch.randn(2, 3).T, "half": whole.half(), "scalar": torch.tensor(2.0),
               "parameter": nn.Parameter(torch.ones(2))}
    path = tmp_path / "new" / "folder" / "x.safetensors"
    save_safetensors(path, tensors, {"steps": "4"})
    read = open_tensors(path)
    assert read.metadata == {"format": "pt", "steps": "4"} and sorted(read) == sorted(tensors)
    assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in tensors.items())
    assert os.listdir(path.parent) == ["x.safetensors"]


def test_equal_tensors_and_metadata_are_equal_files(tmp_path):
    """Nine notes have 362,880 orders; the package's own file is one of them by chance."""
    tensors = small()
    notes = {f"note.{i}": f'"{i}" \n\t\x01 \u00e9\U0001f600' for i in range(8)}
    for i in range(3):
        save_safetensors(tmp_path / f"{i}.safetensors", tensors, notes)
    first, *others = [(tmp_path / f"{i}.safetensors").read_bytes() for i in range(3)]
    assert others == [first, first]
    with safe_open(tmp_path / "0.safetensors", "pt") as file:  # what the package reads has not changed
        assert file.metadata() == notes | {"format": "pt"} and sorted(file.keys()) == sorted(tensors)


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    """safetensors' own writer leaves files that nobody else on a cluster can read."""
    before = os.umask(0o022)
    try:
        save_safetensors(tmp_path / "x.safetensors", small())
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_safetensors(path, {"old": torch.zeros(2)})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_safetensors(path, {"new": torch.zeros(2)}, {"steps": 4})
    with pytest.raises(KeyboardInterrupt):
        with replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyboardInterrupt
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]


def test_the_old_file_is_whole_until_the_new_one_is(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("ne")
        assert path.read_text() == "old" and temporary.parent == path.parent
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["x.txt"]


# ---- finding -----------------------------------------------------------------------------------------------

def test_find_in_a_local_copy(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "sd3.safetensors").touch()
    assert find("sd3.safetensors", tmp_path / "sd3.safetensors", "o/r") == tmp_path / "sd3.safetensors"
    assert find("sd3.safetensors", str(tmp_path), "o/r") == tmp_path / "sd3.safetensors"
    assert find("transformer/", tmp_path, "o/r") == tmp_path / "transformer"
    assert find("transformer/", tmp_path / "transformer", "o/r") == tmp_path / "transformer"
    assert find("other.safetensors", tmp_path, "o/r") == tmp_path
    message = refusal(find, "sd3.safetensors", tmp_path / "nowhere", "o/r")
    assert message == f"{tmp_path / 'nowhere'}: no such file or folder; expected sd3.safetensors, as in o/r"


REPOSITORY = {
    "README.md": b"R", "sd3.safetensors": b"weights", "transformer/config.json": b"{}",
    "transformer/a.safetensors": b"A", "transformer/a.fp16.safetensors": b"H", "transformer/flax.bin": b"F"}
COMMIT = "c" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as the repository org/open needs; other names are answered with an error each."""

    def do_GET(self):
        _, *parts = self.path.partition("?")[0].split("/")
        owner, name = parts[2:4] if parts[:2] == ["api", "models"] else (parts + ["", ""])[:2]
        self.server.seen.append(f"{self.command} {self.path}")
        if owner != "org":
            return self.answer(b"{}")
        if name != "open":
            status, code = {"gated": (403, "GatedRepo"), "anonymous": (401, "GatedRepo"),
                            "forbidden": (403, ""), "none": (404, "RepoNotFound"), "teapot": (418, "")}[name]
            return self.answer(b"", status, {"X-Error-Code": code} if code else {})
        if parts[0] == "api" and parts[4] == "revision":
            return self.answer(json.dumps({"id": "org/open", "sha": COMMIT, "siblings": []}).encode())
        if parts[0] == "api":
            tree = [{"type": "file", "path": path, "size": len(data), "oid": etag(path)}
                    for path, data in REPOSITORY.items()]
            return self.answer(json.dumps(tree).encode())
        path = "/".join(parts[4:])
        if path not in REPOSITORY:
            return self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        self.answer(REPOSITORY[path], 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(path)}"'})

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200, headers: dict = {}):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


def etag(path: str) -> str:
    return f"{sorted(REPOSITORY).index(path):040x}"


def find_elsewhere(home: Path, endpoint: str, wanted: list[tuple[str, str]], **environment) -> list[list]:
    """find(file, None, repo) for each of `wanted`, in a process of its own because huggingface_hub reads its
    environment once: ["path", path] or ["error", message]."""
    code = ("import json, sys, time; time.sleep = lambda seconds: None\n"  # the waits between attempts
            "from models.checkpoint import InputError, find\n"
            "for file, repo in json.loads(sys.argv[1]):\n"
            "    try: print(json.dumps(['path', str(find(file, None, repo))]))\n"
            "    except InputError as error: print(json.dumps(['error', str(error)]))\n")
    keep = {key: value for key, value in os.environ.items()
            if not key.upper().startswith("HF_") and not key.lower().endswith("_proxy")}
    output = subprocess.check_output([sys.executable, "-c", code, json.dumps(wanted)], cwd=ROOT,
                                     env=keep | {"HF_HOME": str(home), "HF_ENDPOINT": endpoint} | environment)
    return [json.loads(line) for line in output.splitlines()]


GOOD = [("sd3.safetensors", "org/open"), ("transformer/", "org/open")]
REFUSED = "access refused (HTTP {}): check the name, accept the terms on {{url}} and set HF_TOKEN"
BAD = {
    ("x.safetensors", "org/open"): "no such file in {url}", ("vae/", "org/open"): "no such folder in {url}",
    ("x.safetensors", "org/gated"): REFUSED.format(403), ("vae/", "org/gated"): REFUSED.format(403),
    ("x.safetensors", "org/anonymous"): REFUSED.format(401), ("vae/", "org/anonymous"): REFUSED.format(401),
    ("x.safetensors", "org/forbidden"): REFUSED.format(403), ("vae/", "org/forbidden"): REFUSED.format(403),
    ("x.safetensors", "org/none"): "no repository at {url}", ("vae/", "org/none"): "no repository at {url}",
    ("x.safetensors", "org/teapot"): "could not be downloaded from {url} (",
    ("x.safetensors", "not a name"): "could not be downloaded from {url} ("}


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    """HF_HOME after GOOD and BAD were asked for, the endpoint (closed by now), the answers, the requests."""
    home = tmp_path_factory.mktemp("hf_home")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen, endpoint = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = find_elsewhere(home, endpoint, GOOD + list(BAD))
        server.shutdown()
    return home, endpoint, answers, server.seen


def test_download_a_file_and_a_folder(downloads):
    home, _, answers, seen = downloads
    assert [kind for kind, _ in answers[:2]] == ["path", "path"]
    file, folder = (Path(path) for _, path in answers[:2])
    assert file.read_bytes() == b"weights" and home in file.parents
    assert sorted(p.name for p in folder.iterdir()) == ["a.safetensors", "config.json"]
    assert "GET /org/open/resolve/main/sd3.safetensors" in seen
    assert not any("README" in request or "fp16" in request or "flax" in request for request in seen)


def test_failed_downloads_say_what_to_do(downloads):
    _, endpoint, answers, _ = downloads
    assert len(answers) == len(GOOD) + len(BAD)
    for ((file, repo), words), (kind, message) in zip(BAD.items(), answers[len(GOOD):]):
        assert kind == "error" and message.startswith(f"{file} of {repo}: ") and "\n" not in message
        assert words.format(url=f"{endpoint}/{repo}") in message
        assert message.endswith("; --ckpt PATH takes a local copy")


@pytest.mark.parametrize("offline", ["0", "1"])
def test_without_network_only_what_was_downloaded(downloads, offline):
    home, endpoint, answers, _ = downloads
    wanted = [("new.safetensors", "org/other"), ("vae/", "org/other")]
    found = find_elsewhere(home, endpoint, GOOD + wanted, HF_HUB_OFFLINE=offline)
    assert found[:2] == answers[:2]
    for (file, repo), (kind, message) in zip(wanted, found[2:], strict=True):
        reason = ("not downloaded yet, and HF_HUB_OFFLINE is set" if offline == "1"
                  else f"could not be downloaded from {endpoint}/{repo} (")
        assert kind == "error" and message.startswith(f"{file} of {repo}: {reason}")
