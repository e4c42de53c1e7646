"""LoRA: golden outputs of the reference libraries, every spelling of the files, adapters on one base.

Without a remark the tolerance is that of the goldens, 1e-4 max abs in float32 (themselves 1.5e-5 off).
"""
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import golden, read_golden
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from models.checkpoint import InputError, load, open_tensors
from models.diffusers_names import MMDIT, mmdit_to_diffusers
from models.lora import (
    add_lora,
    init_lora,
    load_lora,
    lora_layers,
    lora_state,
    merge_lora,
    peft_config,
    read_lora,
    save_diffusers,
    save_kohya,
)
from models.mmdit import MMDiT, config_from_shapes

EXPECTED = [path for path in golden("sd3_lora_*.safetensors") if "base_file" in read_golden(path)[1]]
OUTPUTS = [(path, name) for path in EXPECTED for name in read_golden(path)[0] if name.startswith("out.")]
MAP = json.loads(golden("sd3_to_diffusers_map.json")[0].read_text())["expanded"]


def base(path, dtype=torch.float32):
    """The MMDiT on which the adapters of this golden sit."""
    file = path.parent / read_golden(path)[1]["base_file"]
    tensors = open_tensors(file).group("model.diffusion_model.")
    config = config_from_shapes(tensors.shapes) | {"heads": read_golden(file)[1]["config"]["num_heads"]}
    with torch.device("meta"):
        net = MMDiT(**config)
    load(net, tensors, dtype)
    return net.requires_grad_(False)


def file(path, layout):
    return path.parent / read_golden(path)[1]["files"][layout]


@torch.no_grad()
def velocity(net, path, *adapter):
    tensors, _ = read_golden(path)
    cond = tensors["in.context"], tensors["in.y"]
    return net(tensors["in.x"], tensors["in.t"] / 1000, cond, lora=adapter)


def lora_parameters(net, name):
    return [p for layer in lora_layers(net, name).values() for p in (layer.lora_A[name], layer.lora_B[name])]


def train(net, name):
    """Stands for training: values of ordinary size in the up weights, which start at zero."""
    for i, (down, up) in enumerate(lora_state(net, name).values()):
        up.copy_(torch.randn(up.shape, generator=torch.Generator().manual_seed(i)) * down.shape[1] ** -0.5)


def write(path, tensors, **metadata):
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, path, metadata or None)
    return open_tensors(path)


def equal(a, b):
    """Equality of two read LoRAs, bit by bit, whatever the order of the pieces."""
    def plain(pieces):
        return sorted((p.start, p.stop, p.scale, p.down.tolist(), p.up.tolist()) for p in pieces)
    return a.keys() == b.keys() and all(plain(a[name]) == plain(b[name]) for name in a)


# ---- golden outputs

@pytest.mark.parametrize("path, output", OUTPUTS, ids=[f"{p.stem}-{name}" for p, name in OUTPUTS])
def test_golden(path, output, tmp_path):
    tensors, meta = read_golden(path)
    net, case = base(path), output.split(".", 1)[1].removesuffix(".velocity")
    if case != "base":
        layout, case = case.split(".", 1)
        lora = open_tensors(file(path, layout))
        if alpha := re.fullmatch(r"alpha([\d.]+)_metadata", case):
            config = {"transformer.r": meta["rank"], "transformer.lora_alpha": float(alpha[1])}
            lora = write(tmp_path / "lora.safetensors", read_golden(file(path, layout))[0],
                         lora_adapter_metadata=json.dumps(config))
        merge_lora(net, read_lora(lora, net, MMDIT), float(case.removeprefix("scale")) if not alpha else 1.0)
    torch.testing.assert_close(velocity(net, path), tensors[output], atol=1e-4, rtol=0)


@pytest.mark.parametrize("model", MAP)
def test_map(model):
    rows = 12  # any number that has halves and thirds
    ops = {f"rows:{i}/3": [(i * rows // 3, (i + 1) * rows // 3)] for i in range(3)}
    ops |= {"copy": [(0, rows)], "swap_halves": [(rows // 2, rows), (0, rows // 2)]}
    names = {original for _, original, _ in MAP[model]}
    depth = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("joint_blocks."))
    built = {}
    for name in names:
        module, dot, kind = name.rpartition(".") if name.endswith((".weight", ".bias")) else (name, "", "")
        built |= {(new + dot + kind, name): cuts for new, cuts in mmdit_to_diffusers(module, rows, SimpleNamespace(depth=depth)).items()}
    assert built == {(diffusers, original): ops[op] for diffusers, original, op in MAP[model]}


# ---- adapters

@pytest.mark.parametrize("path", EXPECTED)
def test_new_adapter_is_identity(path):
    net = base(path)
    before = velocity(net, path)
    names = set(net.state_dict())
    add_lora(net, MMDIT, "generator", rank=4)
    assert names <= set(net.state_dict())
    assert torch.equal(velocity(net, path, "generator"), before)
    assert torch.equal(velocity(net, path), before)
    for down, up in lora_state(net, "generator").values():
        assert 0 < down.abs().max() <= down.shape[1] ** -0.5 and not up.any()
    trainable = [p for p in net.parameters() if p.requires_grad]
    assert len(trainable) == len(lora_parameters(net, "generator")) > 0


@pytest.mark.parametrize("path", EXPECTED)
@pytest.mark.parametrize("save", [save_diffusers, save_kohya])
@pytest.mark.parametrize("alpha", [None, 3.0, 4.0])
@pytest.mark.parametrize("targets", [("qkv", "proj"), ("qkv", "fc1", "fc2")])
def test_written_file_is_the_adapter(path, save, alpha, targets, tmp_path):
    net, rank = base(path), 4
    add_lora(net, MMDIT, "generator", rank, alpha, targets)
    train(net, "generator")
    with_adapter = velocity(net, path, "generator")
    save(tmp_path / "lora.safetensors", net, MMDIT, "generator")
    tensors = open_tensors(tmp_path / "lora.safetensors")
    described = "lora_adapter_metadata" in tensors.metadata
    assert described == (save is save_diffusers and alpha not in (None, rank))

    merged = base(path)
    lora = read_lora(tensors, merged, MMDIT)
    for module, (down, up) in lora_state(net, "generator").items():
        pieces = sorted(lora.pop(module + ".weight"))
        assert torch.equal(torch.cat([p.up for p in pieces]), up)
        assert all(torch.equal(p.down, down) and p.scale == (alpha or rank) / rank for p in pieces)
    assert not lora
    merge_lora(merged, read_lora(tensors, merged, MMDIT))
    assert (with_adapter - velocity(net, path)).abs().max() > 0.01  # the adapter does something
    torch.testing.assert_close(velocity(merged, path), with_adapter, atol=1e-4, rtol=0)
    loaded = base(path)
    add_lora(loaded, MMDIT, "generator", rank, targets=targets)  # whose alpha, the rank, may be another than the file's
    load_lora(loaded, MMDIT, "generator", tensors)
    torch.testing.assert_close(velocity(loaded, path, "generator"), with_adapter, atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", EXPECTED)
def test_two_adapters_on_one_base(path):
    net, tensors = base(path), read_golden(path)[0]
    add_lora(net, MMDIT, "generator", rank=4)
    add_lora(net, MMDIT, "fake", rank=2, alpha=1, targets=("proj", "fc1"), seed=1)
    before = velocity(net, path, "fake")
    train(net, "generator")
    assert torch.equal(velocity(net, path, "fake"), before)
    assert not torch.equal(velocity(net, path, "generator"), before)

    cond = tensors["in.context"], tensors["in.y"]
    net(tensors["in.x"], tensors["in.t"] / 1000, cond, lora=("fake",)).square().sum().backward()
    assert all(p.grad is None for p in lora_parameters(net, "generator"))
    for down, up in zip(*[iter(lora_parameters(net, "fake"))] * 2):
        assert up.grad.any() and not down.grad.any()  # up = 0 hides down at the first step
    assert all(p.grad is None for name, p in net.named_parameters() if "lora_" not in name)
    with pytest.raises(ValueError, match="already"):
        add_lora(net, MMDIT, "fake", rank=2)
    with pytest.raises(KeyError, match="teacher"):
        velocity(net, path, "teacher")
    with pytest.raises(ValueError, match="no adapter called teacher"):
        lora_parameters(net, "teacher")


def test_float32_adapter_on_bf16_base():
    net = nn.ModuleDict({"qkv": nn.Linear(16, 48, dtype=torch.bfloat16)})
    add_lora(net, MMDIT, "generator", rank=2, targets=("qkv",))
    assert {p.dtype for p in lora_parameters(net, "generator")} == {torch.float32}
    y = net["qkv"](torch.randn(3, 16, dtype=torch.bfloat16), "generator")
    assert y.dtype == torch.bfloat16


def test_adapter_on_meta_gets_the_same_values():
    def build(device):
        net = nn.Sequential(nn.ModuleDict({"qkv": nn.Linear(16, 48), "proj": nn.Linear(16, 16)})).to(device)
        add_lora(net, MMDIT, "generator", rank=2)
        return net

    net = build("meta")
    assert all(p.is_meta for p in net.parameters())
    net.to_empty(device="cpu")
    init_lora(net, "generator")
    for here, there in zip(lora_parameters(net, "generator"), lora_parameters(build("cpu"), "generator")):
        assert torch.equal(here, there)


@pytest.mark.parametrize("targets, rank, words", [
    (("qkv", "nowhere"), 4, "nowhere"), ((), 4, "nothing"), (("qkv",), 0, "rank 0")])
def test_bad_adapter(targets, rank, words):
    with pytest.raises(InputError, match=words):
        add_lora(nn.ModuleDict({"qkv": nn.Linear(4, 12)}), MMDIT, "generator", rank, targets=targets)


# ---- merging

@pytest.mark.parametrize("path", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_merge_rounds_once_and_in_place(path, dtype):
    net, exact = base(path, dtype), base(path, dtype).float()
    lora = read_lora(open_tensors(file(path, "diffusers")), net, MMDIT)
    weights = dict(net.state_dict())
    places = {name: w.data_ptr() for name, w in weights.items()}
    merge_lora(weights, lora, 0.7)
    merge_lora(exact, lora, 0.7)
    for name, weight in exact.state_dict().items():
        assert weights[name].dtype == dtype and weights[name].data_ptr() == places[name]
        assert torch.equal(weights[name], weight.to(dtype)), name


def sharded_worker(rank, world, path, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    whole, net = base(path, torch.bfloat16), base(path, torch.bfloat16)
    for n in (whole, net):
        add_lora(n, MMDIT, "generator", rank=3)  # rows that cannot be divided evenly among two processes
        train(n, "generator")
    up = [up for _, up in lora_state(whole, "generator").values()]
    for block in net.blocks():
        fully_shard(block, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    fully_shard(net)
    tensors = read_golden(path)[0]
    x, t, cond = tensors["in.x"], tensors["in.t"] / 1000, (tensors["in.context"], tensors["in.y"])
    assert all(torch.equal(a, b) for a, (_, b) in zip(up, lora_state(net, "generator").values()))
    net(x, t, cond, lora=("generator",)).float().square().sum().backward()
    whole(x, t, cond, lora=("generator",)).float().square().sum().backward()
    for sharded, p in zip(lora_parameters(net, "generator"), lora_parameters(whole, "generator")):
        grad = sharded.grad.full_tensor()
        assert grad.dtype == torch.float32
        # bf16 activations: directions agree, digits do not.
        assert torch.cosine_similarity(grad.flatten(), p.grad.flatten(), dim=0) > 0.99
    lora = read_lora(open_tensors(file(path, "kohya")), whole, MMDIT)
    for n in (net, whole):
        merge_lora(n, lora)
        init_lora(n, "generator", seed=5)
    for (name, sharded), p in zip(net.named_parameters(), whole.parameters()):
        assert torch.equal(sharded.full_tensor(), p), name
    save_kohya(os.path.join(os.path.dirname(rendezvous), "lora.safetensors"), net, MMDIT, "generator")
    dist.barrier()
    dist.destroy_process_group()


def test_sharded(tmp_path):
    path = EXPECTED[0]
    mp.spawn(sharded_worker, (2, path, tmp_path / "rendezvous"), nprocs=2)
    net = base(path)
    add_lora(net, MMDIT, "generator", rank=3, seed=5)
    lora = read_lora(open_tensors(tmp_path / "lora.safetensors"), net, MMDIT)
    for module, (down, _) in lora_state(net, "generator").items():
        assert torch.equal(lora[module + ".weight"][0].down, down)


# ---- spellings of files

def respell(tensors, module, down="lora_A", up="lora_B"):
    """transformer.<m>.lora_A.weight, lora_unet_<m>.lora_down.weight ... -> <module(m)>.<down>.weight ..."""
    new = {}
    for key, value in tensors.items():
        name, part = re.fullmatch(r"(?:transformer\.|lora_unet_)(.+?)\.((?:lora|alpha).*)", key).groups()
        part = re.sub("lora_A|lora_down", down, re.sub("lora_B|lora_up", up, part))
        new[f"{module(name)}.{part}"] = value
    return new


@pytest.mark.parametrize("path", EXPECTED)
def test_diffusers_spellings(path, tmp_path):
    tensors, _ = read_golden(file(path, "diffusers"))
    net = base(path)
    expected = read_lora(open_tensors(file(path, "diffusers")), net, MMDIT)
    for number, spelled in enumerate([
        respell(tensors, lambda m: m),
        respell(tensors, lambda m: "base_model.model." + m),
        respell(tensors, lambda m: "base_model.model." + m, "lora_A.default", "lora_B.default"),
        respell(tensors, lambda m: "transformer." + m, "lora_down", "lora_up"),
        respell(tensors, lambda m: "lora_transformer_" + m.replace(".", "_"), "lora_down", "lora_up"),
        respell(tensors, lambda m: "lycoris_" + m.replace(".", "_"), "lora_down", "lora_up"),
        respell(tensors, lambda m: "lycoris_" + m.replace(".", "_")),
    ]):
        assert spelled.keys() != tensors.keys()
        assert equal(read_lora(write(tmp_path / f"{number}.safetensors", spelled), net, MMDIT), expected), number


@pytest.mark.parametrize("path", EXPECTED)
def test_original_spellings(path, tmp_path):
    tensors, _ = read_golden(file(path, "kohya"))
    net = base(path)
    dotted = {name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight")
              for name, _ in net.named_parameters()}
    expected = read_lora(open_tensors(file(path, "kohya")), net, MMDIT)
    for number, spelled in enumerate([
        respell(tensors, lambda m: "diffusion_model." + dotted[m]),
        respell(tensors, lambda m: "diffusion_model." + dotted[m], "lora_down", "lora_up"),
        respell(tensors, lambda m: "model.diffusion_model." + dotted[m], "lora_down", "lora_up"),
        respell(tensors, lambda m: dotted[m]),
    ]):
        assert equal(read_lora(write(tmp_path / f"{number}.safetensors", spelled), net, MMDIT), expected), number
    torch.save(tensors, tmp_path / "lora.pt")
    assert equal(read_lora(open_tensors(tmp_path / "lora.pt"), net, MMDIT), expected)


def test_kohya_split_qkv(tmp_path):
    """One down of three ranks and a block-diagonal up; as other loaders read it, scale = alpha / (3 rank)."""
    net = base(EXPECTED[0])
    rank, weight = 2, net.joint_blocks[0].x_block.attn.qkv.weight.clone()
    downs, ups = torch.randn(3, rank, weight.shape[1]), torch.randn(3, weight.shape[0] // 3, rank)
    key = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    tensors = write(tmp_path / "lora.safetensors", {
        f"{key}.lora_down.weight": downs.flatten(0, 1), f"{key}.lora_up.weight": torch.block_diag(*ups),
        f"{key}.alpha": torch.tensor(6.0)})
    merge_lora(net, read_lora(tensors, net, MMDIT))
    change = net.joint_blocks[0].x_block.attn.qkv.weight - weight
    # atol: float32 sums of rank products of size 1.
    torch.testing.assert_close(change, 6.0 / (3 * rank) * (ups @ downs).flatten(0, 1), atol=1e-5, rtol=0)


# ---- alpha

@pytest.mark.parametrize("prefix", ["transformer.", ""])  # a diffusers pipeline's file, a diffusers model's
@pytest.mark.parametrize("config, q_scale, rest_scale", [
    ({"lora_alpha": 8, "r": 4}, 2, 2),
    ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"to_q": 2}, "rank_pattern": {}}, 0.5, 2),
    ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 2}}, 0.5, 2),
    ({"lora_alpha": 8, "r": 4, "alpha_pattern": {"o_q": 2}}, 2, 2),
    ({"lora_alpha": 8, "r": 4, "use_rslora": True}, 4, 4),
    ({"r": 4}, 1, 1),
])
def test_alpha_of_metadata(prefix, config, q_scale, rest_scale, tmp_path):
    net = base(EXPECTED[0])
    width, m = net.context_embedder.out_features, "transformer_blocks.0.attn"
    tensors = {f"{prefix}{m}.{name}.lora_{side}.weight": torch.ones((4, width) if side == "A" else (width, 4))
               for name in ("to_q", "to_k") for side in "AB"}
    metadata = json.dumps({prefix + key: value for key, value in config.items()})
    lora = read_lora(write(tmp_path / "a.safetensors", tensors, lora_adapter_metadata=metadata), net, MMDIT)
    q, k = sorted(lora["joint_blocks.0.x_block.attn.qkv.weight"], key=lambda p: p.start)
    assert (q.scale, k.scale) == (q_scale, rest_scale)

    # The same settings in the file that peft writes beside its weights; an .alpha tensor has the last word.
    peft = {key.removeprefix("transformer."): value for key, value in tensors.items()}
    peft = {"base_model.model." + key: value for key, value in peft.items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    q, k = sorted(read_lora(write(tmp_path / "adapter_model.safetensors", peft), net, MMDIT).popitem()[1],
                  key=lambda p: p.start)
    assert (q.scale, k.scale) == (q_scale, rest_scale)
    peft[f"base_model.model.{m}.to_q.alpha"] = torch.tensor(1.0)
    q, k = sorted(read_lora(write(tmp_path / "adapter_model.safetensors", peft), net, MMDIT).popitem()[1],
                  key=lambda p: p.start)
    assert (q.scale, k.scale) == (0.25, rest_scale)


@pytest.mark.parametrize("config, words", [
    ({"use_rslora": "false"}, "use_rslora false"), ({"lora_alpha": 0}, "0 for a number that is not 0"),
    ({"lora_alpha": 4, "alpha_pattern": {"to_q": "2"}}, "2 for a number")])
def test_settings_that_would_be_read_wrongly(config, words, tmp_path):
    """A word is true to Python, whatever it says; an alpha of 0 would switch the adapter off."""
    tensors = write(tmp_path / "a.safetensors", {"x": torch.ones(1)}, lora_adapter_metadata=json.dumps(config))
    with pytest.raises(InputError) as caught:
        peft_config(tensors)
    assert words in str(caught.value)


# ---- what is not read

def test_text_encoder_parts_are_announced(tmp_path):
    path = EXPECTED[0]
    tensors, _ = read_golden(file(path, "kohya"))
    net = base(path)
    expected = read_lora(open_tensors(file(path, "kohya")), net, MMDIT)
    text = {name: torch.zeros(1, 1) for name in (
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight", "lora_te3_encoder.hada_w1_a",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_A.weight",
        "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight")}
    with pytest.warns(UserWarning, match=f"{len(text)} text-encoder tensors are not applied") as warned:
        assert equal(read_lora(write(tmp_path / "lora.safetensors", tensors | text), net, MMDIT), expected)
    assert len([w for w in warned if w.category is UserWarning]) == 1
    with pytest.raises(InputError, match="lora_te1"):
        read_lora(write(tmp_path / "text.safetensors", text), net, MMDIT)


REFUSED = {
    "transformer.transformer_blocks.0.attn.to_q.lokr_w1": "plain LoRA",
    "lycoris_transformer_blocks_0_attn_to_q.lokr_w2_a": "plain LoRA",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a": "plain LoRA",
    "lora_unet_joint_blocks_0_x_block_attn_qkv.dora_scale": "plain LoRA",
    "base_model.model.transformer_blocks.0.attn.to_q.lora_magnitude_vector": "plain LoRA",
    "diffusion_model.joint_blocks.0.x_block.attn.qkv.diff": "of the shape of",
    "diffusion_model.final_layer.linear.diff_b": "of the shape of",
    "diffusion_model.final_layer.linear.w_norm": "plain LoRA",
    "diffusion_model.joint_blocks.99.x_block.attn.qkv.diff": "this model's modules",
    "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": "this model's modules",
    "transformer.transformer_blocks.999.attn.to_q.lora_A.weight": "this model's modules",
    "lora_unet_input_blocks_1_1_proj_in.lora_down.weight": "this model's modules",
    "transformer.transformer_blocks.0.attn.to_q.weight": "this model's modules",
    "joint_blocks.0.x_block.attn.qkv.lora_B.bias": "this model's modules",
    "diffusion_model.context_embedder.lora_down.weight": "together",
    "lora_unet_context_embedder.alpha": "together",
}


@pytest.mark.parametrize("key", REFUSED)
def test_refused(key, tmp_path):
    net = base(EXPECTED[0])
    with pytest.raises(InputError, match=REFUSED[key]) as error:
        read_lora(write(tmp_path / "lora.safetensors", {key: torch.zeros(2, 2)}), net, MMDIT)
    assert "lora.safetensors" in str(error.value) and "\n" not in str(error.value)
    assert key in str(error.value) or REFUSED[key] == "together" and "context_embedder" in str(error.value)


def test_whole_differences_are_added_as_they_are(tmp_path):
    """Extracted LoRAs hold `.diff` of what has no rank, norms and biases, as ComfyUI adds them."""
    net = base(EXPECTED[0])
    before = {name: p.clone() for name, p in net.named_parameters()}
    norm = "joint_blocks.0.x_block.attn.ln_q"
    diffs = {"final_layer.linear.bias": ("diffusion_model.final_layer.linear.diff_b", 0.25),
             "context_embedder.weight": ("diffusion_model.context_embedder.diff", -0.5),
             f"{norm}.weight": (f"diffusion_model.{norm}.diff", 2.0)}
    tensors = {key: torch.full_like(before[name], value) for name, (key, value) in diffs.items()}
    merge_lora(net, read_lora(write(tmp_path / "lora.safetensors", tensors), net, MMDIT), 0.5)
    for name, p in net.named_parameters():
        assert torch.equal(p, before[name] + (0.5 * diffs[name][1] if name in diffs else 0)), name


def test_first_few_unknown_keys_are_named(tmp_path):
    tensors = {f"flux.{i}.lora_A.weight": torch.zeros(2, 2) for i in range(9)}
    with pytest.raises(InputError, match=r"flux\.0\S+, flux\.1\S+, flux\.2\S+ \.\.\.$"):
        read_lora(write(tmp_path / "lora.safetensors", tensors), base(EXPECTED[0]), MMDIT)


@pytest.mark.parametrize("change", ["down", "up", "rank", "zero rank", "scalar"])
def test_wrong_shape_is_refused(change, tmp_path):
    net, rank = base(EXPECTED[0]), 4
    rows, columns = net.context_embedder.weight.shape
    down, up = torch.zeros(rank, columns), torch.zeros(rows, rank)
    down, up = {"down": (down[:, 1:], up), "up": (down, up[1:]), "rank": (down[1:], up),
                "zero rank": (down[:0], up[:, :0]), "scalar": (down, torch.zeros(()))}[change]
    key = "diffusion_model.context_embedder.lora_"
    torch.save({key + "A.weight": down, key + "B.weight": up}, tmp_path / "lora.pt")
    with pytest.raises(InputError, match=r"do not fit context_embedder\.weight"):
        read_lora(open_tensors(tmp_path / "lora.pt"), net, MMDIT)


def test_weight_given_twice_is_refused(tmp_path):
    path = EXPECTED[0]
    tensors, _ = read_golden(file(path, "diffusers"))
    fused = {key: value for key, value in read_golden(file(path, "kohya"))[0].items() if "qkv" in key}
    for number, (again, words) in enumerate([
        (respell(tensors, lambda m: "base_model.model." + m), "given twice: "),
        ({key.replace("lora_A", "lora_down"): value for key, value in tensors.items()}, "given twice: "),
        (fused, "under two names: "),
    ]):
        with pytest.raises(InputError, match=words):
            read_lora(write(tmp_path / f"{number}.safetensors", tensors | again), base(path), MMDIT)
