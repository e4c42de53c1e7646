"""Wan2.1: denoiser, text and schedule against the original's outputs and the names of its files."""
import copy
import json
import os
import socket
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
import torch.distributed as dist
from conftest import ROOT, check_every_third_block_is_tapped, golden, near, read_golden, wan_golden
from test_sat import in_memory
from test_sequence import same
from torch.multiprocessing import start_processes
from transformers import T5Tokenizer

from models import text as text_module
from models.checkpoint import InputError, Tensors
from models.diffusion import Denoiser, generator_times, q, shift_time, solve, target, teacher_times
from models.parallel import init_distributed, neighbours, shard
from models.sequence import sequence_parallel
from models.text import WAN_NEGATIVE, CogVideoXText, WanText, clean_prompt
from models.text_encoders import load_tokenizers, umt5_tensors
from models.wan import Wan, config_from_shapes, rotary_table, timestep_embedding

SMALL = golden("wan_dit_*.safetensors")
MANIFESTS = golden("wan_1*.keys.json")
pytestmark = pytest.mark.filterwarnings("ignore:ftfy is not installed")  # it need not be
every = pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)


def load_case(path):
    """(network, tensors, inputs, meta)"""
    tensors, weights, meta = wan_golden(path)
    config = config_from_shapes({name: tuple(t.shape) for name, t in weights.items()})
    heads = meta["config"]["num_heads"]  # no shape tells them
    net = Wan(**config | dict(heads=heads), text_len=meta["config"]["text_len"])
    net.load_state_dict(weights, strict=True)
    context = tensors["in/context"]
    inputs = tensors["in/latents"].transpose(1, 2), tensors["in/timesteps"] / 1000, (context, None)
    return net.eval(), tensors, inputs, meta


# ---- network -----------------------------------------------------------------------------------------------

@every
def test_v_taps_and_inner_values_equal_the_original(path):
    net, tensors, inputs, _ = load_case(path)
    seen, block = {}, net.blocks()[0]

    def attend(q, k, v, total, original=block.attend):
        o = original(q, k, v, total)
        seen.update({f"mid/block0.self.{name}": x for name, x in zip("qkvo", (q, k, v, o))})
        return o

    def project(*args, original=block.cross_attn.project):
        qkv = original(*args)
        seen.update({f"mid/block0.cross.{name}": x for name, x in zip("qkv", qkv)})
        return qkv
    block.attend, block.cross_attn.project = attend, project
    block.register_forward_pre_hook(lambda _, args: seen.update(
        {"mid/embeds": args[0], "mid/text": args[1], "mid/e0": args[2]}))
    for i, each in enumerate(net.blocks()):
        each.register_forward_hook(lambda _, __, out, i=i: seen.update({f"mid/block{i}": out}))
    net.head.register_forward_pre_hook(lambda _, args: seen.update({"mid/e": args[1]}))
    net.head.register_forward_hook(lambda _, __, out: seen.update({"mid/head": out}))
    with torch.no_grad():
        seen["out/v"] = net(*inputs).transpose(1, 2)
        maps = net(*inputs, taps=tuple(range(net.depth)))
    for i, m in enumerate(maps):
        assert torch.equal(m.flatten(2).mT, seen[f"mid/block{i}"])
    compared = [name for name in seen if name in tensors]  # some files leave some of them out
    for name in compared:
        near(seen[name], tensors[name])
    assert {"mid/block0", "mid/e", "out/v"} <= set(compared)


@every
def test_gradients_equal_the_original(path):
    net, tensors, (x, t, (context, _)), _ = load_case(path)
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    (net(x, t, (context, None)).transpose(1, 2) * tensors["grad/probe"]).sum().backward()
    near(x.grad.transpose(1, 2), tensors["grad/in.latents"], atol=1e-3)  # WAN.md; a sum over all outputs
    near(context.grad, tensors["grad/in.context"], atol=1e-3)
    names = [name for name in tensors if name.startswith("grad/w/")]
    for name in names:
        near(net.get_parameter(name.removeprefix("grad/w/")).grad, tensors[name], atol=1e-3)
    assert names


def test_every_eps_is_the_originals():
    """Weights so small that an eps of 1e-5 or 1e-7 in place of 1e-6 would change v by 0.11 and more."""
    path, = golden("wan_dit_small.safetensors")
    net, tensors, inputs, meta = load_case(path)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.startswith("patch_embedding") or name.split(".")[-2] in ("q", "k"):
                p *= meta["verify"]["eps_probe_scale"]
        near(net(*inputs).transpose(1, 2), tensors["eps/out.v"])


@every
def test_what_is_left_out_of_the_text_is_zeros_that_attend(path):
    net, tensors, (x, t, (context, _)), meta = load_case(path)
    length = max(meta["config"]["context_lens"])
    with torch.no_grad():
        whole, short = net(x, t, (context, None)), net(x, t, (context[:, :length], None))
        assert torch.equal(whole, short)
        net.text_len = length
        assert length == context.shape[1] or (net(x, t, (context[:, :length], None)) - whole).abs().max() > 0.1
    with pytest.raises(ValueError, match=f"{length + 1} text tokens; expected at most {length}"):
        net(x, t, (torch.zeros(len(x), length + 1, context.shape[2]), None))


@every
def test_taps_stop_after_the_last_one(path):
    net, _, batch, _ = load_case(path)
    check_every_third_block_is_tapped(net, *batch)


@every
def test_bf16_is_the_same_network_with_tokens_in_float32(path):
    net, tensors, inputs, _ = load_case(path)
    dtypes = set()
    for block in net.blocks():
        block.register_forward_hook(lambda _, args, out: dtypes.update([out.dtype, args[2].dtype]))
    with torch.no_grad():
        v, tap = net.bfloat16()(*inputs).transpose(1, 2), net(*inputs, taps=(1,))[0]
    # bf16 has 3 digits; another function than the original's would be off by about the deviation itself.
    assert (v - tensors["out/v"]).std() / tensors["out/v"].std() < 0.05
    assert v.dtype == torch.float32 and dtypes == {torch.float32} and tap.dtype == torch.bfloat16


def test_odd_sizes_are_refused():
    """The original drops what is over: its v there is that of the even part."""
    path, = golden("wan_dit_wide.safetensors")
    net, tensors, (_, t, (context, _)), _ = load_case(path)
    x = tensors["odd/in.latents"].transpose(1, 2)
    with pytest.raises(ValueError, match="latent 7 x 9 is no multiple of the patch size 2"):
        net(x, t[:1], (context[:1], None))
    with torch.no_grad():
        v = net(x[..., :6, :8], t[:1], (context[:1], None))
    near(v.transpose(1, 2), tensors["odd/out.v"])


# ---- time and places ---------------------------------------------------------------------------------------

def test_tables_of_the_real_sizes():
    tensors, meta = read_golden(golden("wan_flow.safetensors")[0])
    # 1e-5 and 1e-6 (WAN.md)
    near(timestep_embedding(tensors["pos/time256.t"], 256), tensors["pos/time256.emb"], atol=1e-5)
    table = rotary_table(*meta["meta"]["config"]["pos_grid"], 128)
    rows = table[tensors["pos/rope128.idx"]]
    near(rows.real, tensors["pos/rope128.cos"], atol=1e-6)
    near(rows.imag, tensors["pos/rope128.sin"], atol=1e-6)
    total = torch.view_as_real(table.to(torch.complex128)).sum(0).flatten()
    near(total, tensors["pos/rope128.sum64"], atol=1e-2)  # 32,760 terms, each rounded to 6e-8 at most


# ---- full size ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_full_size_state_dict_is_the_manifest(path):
    original = json.loads(path.read_text())["original"]
    expected, published = {name: tuple(shape) for name, shape in original["keys"].items()}, original["config"]
    with torch.device("meta"):
        net = Wan(**config_from_shapes(expected))
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == expected
    assert (net.depth, net.heads, net.width, net.freq_dim, net.text_len) == tuple(
        published[key] for key in ("num_layers", "num_heads", "dim", "freq_dim", "text_len"))
    shapes = net.tap_shapes(21, 16, 60, 104)
    assert len(shapes) == net.depth // 3 and shapes[2] == (net.width, 21, 30, 52)  # 10 and 13


# ---- text --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def umt5():
    """(tensors in transformers' names, text, golden tensors, meta)"""
    path, = golden("wan_t5_small.safetensors")
    tensors, weights, meta = wan_golden(path)
    parts = {"umt5": umt5_tensors(in_memory(weights)[0])}
    return parts, WanText(parts, length=tensors["in/ids"].shape[1]).load(parts), tensors, meta


def test_the_prompts_rows_equal_the_original_and_zeros_follow(umt5):
    _, text, tensors, _ = umt5
    context, pooled = text.encode_ids(tensors["in/ids"])
    near(context, tensors["out/context"])  # 1e-4 (WAN.md); without the mask 3.0
    assert not context[~tensors["in/mask"].bool()].any() and pooled.shape == (len(context), 0)
    bias = text.umt5.encoder.block[0].layer[0].SelfAttention.compute_bias(160, 160)
    near(bias[:, :, [0, 80, 159]], tensors["mid/block0.bias"])


def test_full_size_names_and_shapes_are_the_encoders(umt5):
    path, = golden("wan_t5.keys.json")
    data = json.loads(path.read_text())
    original, theirs = ({name: tuple(shape) for name, shape in data[key]["keys"].items()}
                        for key in ("original", "transformers"))
    parts = umt5_tensors(Tensors(path, original, None))
    text = WanText({"umt5": parts})
    assert parts.shapes == theirs
    assert {name: tuple(p.shape) for name, p in text.umt5.state_dict().items()} == parts.shapes
    assert text.umt5.config.num_heads == 64 and text.umt5.config.d_kv == 64 and text.windows == {"umt5": 512}


def test_transformers_and_comfyuis_files_are_read_too(umt5):
    parts, text, tensors, _ = umt5
    weights = dict(parts["umt5"]) | {"spiece_model": torch.zeros(3, dtype=torch.uint8)}
    for extra in ({}, {"encoder.embed_tokens.weight": weights["shared.weight"]}):
        again = {"umt5": umt5_tensors(in_memory(weights | extra)[0])}
        other = WanText(again, length=text.windows["umt5"]).load(again)
        assert torch.equal(other.encode_ids(tensors["in/ids"]).context, text.encode_ids(tensors["in/ids"]).context)
    with pytest.raises(InputError, match="2 tensors are not expected .*block.1.*relative_attention_bias"):
        CogVideoXText({"t5": parts["umt5"]}).load({"t5": parts["umt5"]})


def test_cleaning_is_the_originals(umt5, monkeypatch):
    pairs = dict(umt5[3]["clean"])
    monkeypatch.setattr(text_module, "ftfy", None)
    with pytest.warns(UserWarning, match="ftfy is not installed: full-width punctuation, .* `pip install ftfy`"):
        WanText(umt5[0])
    plain = {prompt: clean for prompt, clean in pairs.items() if prompt.isascii()}
    assert len(plain) == 5 and all(clean_prompt(prompt) == clean for prompt, clean in plain.items())
    # In place of ftfy, which need not be there: what it does to these prompts.
    monkeypatch.setattr(text_module, "ftfy", SimpleNamespace(fix_text=lambda prompt: pairs.get(prompt, prompt)))
    assert all(clean_prompt(prompt) == clean for prompt, clean in pairs.items())


def test_prompts_are_padded_or_cut_and_the_unconditional_is_the_negative_prompt_or_the_empty_one(umt5, tmp_path):
    parts, _, _, _ = umt5
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), ("\u2581cat", -1.0), (",", -2.0)]
    pieces += [("&", -2.0)]
    T5Tokenizer(vocab=pieces + [(c, -3.0) for c in "abcdefgh"], extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    tokenizers = load_tokenizers(tmp_path, t5=False)
    text = WanText(parts, tokenizers, length=6).load(parts)
    (ids,) = text.tokenize(["cat", "", " cat \n", "cat &amp;amp;cat", "cat " * 9])
    assert ids[:3].tolist() == [[4, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [4, 1, 0, 0, 0, 0]]
    assert ids[3].tolist()[:3] == [4, 3, 6] and ids[4].tolist() == [4, 4, 4, 4, 4, 1]
    empty = WanText(parts, tokenizers, length=6, null="empty").load(parts).unconditional()
    assert torch.equal(empty.context, text.encode([""]).context)
    assert empty.context[:, 0].any() and not empty.context[:, 1:].any()  # the end token's row alone
    assert torch.equal(text.unconditional().context, text.encode([WAN_NEGATIVE]).context)
    assert text.unconditional().context.shape == (1, 6, text.umt5.config.d_model) and text.overlong([WAN_NEGATIVE]) == 1


def test_unknown_characters_are_the_files_own_token(umt5, tmp_path):
    """UMT5's <unk> is 3 and not T5's 2, which transformers 5 takes for both."""
    parts, _, _, _ = umt5
    (tmp_path / "text.txt").write_text("a cat runs\nthe cat\n" * 20)
    (tmp_path / "tokenizer").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer" / "spiece"), vocab_size=14,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2)
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(dict(
        tokenizer_class="T5Tokenizer", extra_ids=0, additional_special_tokens=[], bos_token="<s>")))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "spiece.model"))
    text = WanText(parts, load_tokenizers(tmp_path, t5=False), length=12)
    for prompt in ("the cat", "a \u2603 cat", "\u2603"):
        (ids,) = text.tokenize([prompt])
        expected = [*pieces.encode(prompt), 1]
        assert ids[0, :len(expected)].tolist() == expected and (3 in expected) == ("\u2603" in prompt)


# ---- schedule ----------------------------------------------------------------------------------------------

def test_the_teachers_times_are_the_originals():
    tensors, meta = read_golden(golden("wan_flow.safetensors")[0])
    config = meta["meta"]["config"]
    for shift, steps in product(config["shifts"], config["steps"]):
        times = teacher_times(steps, shift, "wan").flip(0)
        near(times.double(), tensors[f"euler/shift{shift}.n{steps}.sigmas"], atol=1e-6)  # float32: 6e-8
    assert torch.equal(teacher_times(4, 5.0, "wan"), generator_times(4, 5.0, "wan"))
    x_0, noise, u = (tensors[f"train/{name}"] for name in ("x0", "noise", "t"))
    t = shift_time(u, 3)
    near(t, tensors["train/shift3.sigma"], atol=1e-12)
    near(q("wan", x_0, t, noise), tensors["train/shift3.x_t"], atol=1e-6)
    near(target("velocity", "wan", x_0, t, noise), tensors["train/v"], atol=1e-6)


def test_eight_guided_steps_are_the_originals():
    net, _, _, _ = load_case(golden("wan_dit_small.safetensors")[0])
    tensors, meta = read_golden(golden("wan_flow.safetensors")[0])
    config = meta["meta"]["config"]
    F, x = Denoiser(net, "velocity", "wan"), tensors["traj/in.noise"].transpose(1, 2)
    c, c_null = ((tensors[f"traj/in.{name}"], torch.zeros(1, 0)) for name in ("context", "context_uncond"))
    times = teacher_times(config["traj_steps"], config["traj_shift"], "wan")
    with torch.no_grad():
        for last in (4, 8):
            end = solve(F, x, times[8 - last:], c, c_null, torch.tensor([config["cfg"]]))
            # 2e-4 (WAN.md): diffusers differs by 2e-5.
            near(end.transpose(1, 2), tensors[f"traj/euler.step{last}.latents"], atol=2e-4)


# ---- ranks -------------------------------------------------------------------------------------------------

def outputs_and_gradients(net, x, t, context):
    """[v, a tap, gradient of x] of the mean over the samples; the gradients of the weights stay in the network."""
    x = x.clone().requires_grad_()
    outputs = net(x, t, (context, None)), net(x, t, (context, None), taps=(1,))[0]
    probes = [torch.linspace(-1, 1, y[0].numel()).view(y[0].shape) for y in outputs]
    sum((probe * y).flatten(1).sum(1).mean() for probe, y in zip(probes, outputs)).backward()
    return [*outputs, x.grad]


def rank(i, world, port):
    """Process i of `world`, which share the tokens of all samples: 30 tokens, 6 heads. Blocks are checkpointed."""
    os.environ.update(RANK=str(i), WORLD_SIZE=str(world), LOCAL_RANK=str(i), LOCAL_WORLD_SIZE=str(world),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port))
    _, mesh = init_distributed()
    torch.manual_seed(0)
    net = Wan(depth=2, width=72, heads=6, ffn_dim=16, freq_dim=8, text_dim=5, in_channels=4, text_len=7)
    one, batch = copy.deepcopy(net), (torch.randn(2, 5, 4, 4, 6), torch.rand(2), torch.randn(2, 3, 5))
    shard(sequence_parallel(net, neighbours(world)), mesh, torch.float32, checkpointing=True)
    held = []
    net.blocks()[0].register_forward_pre_hook(lambda _, args: held.append(args[0].shape[1]))
    for n, pair in enumerate(zip(outputs_and_gradients(net, *batch), outputs_and_gradients(one, *batch))):
        same(*pair, f"result {n}")
    for (name, p), e in zip(net.named_parameters(), one.parameters(), strict=True):
        same(p.grad.full_tensor(), e.grad, name)
    print(f"{i} of {world}: {held[0]} tokens\n", end="", flush=True)
    dist.destroy_process_group()


def test_shared_tokens_are_one_process():
    run = subprocess.run([sys.executable, __file__], env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=ROOT,
                         capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(run.stdout.splitlines()) == [f"{i} of 3: 10 tokens" for i in range(3)]


@pytest.mark.parametrize("heads, works", [(12, "1, 2, 3, 4, 6, 12"), (40, "1, 2, 4, 5, 8, 10, 20, 40")])
def test_ranks_that_cannot_share_the_heads_are_told_how_many_can(heads, works):
    net, group = SimpleNamespace(heads=heads), SimpleNamespace(size=lambda: 16)
    with pytest.raises(InputError, match=f"16 does not divide .* {heads} attention heads; expected one of {works}$"):
        sequence_parallel(net, group)


if __name__ == "__main__":
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    start_processes(rank, (3, port), nprocs=3, start_method="fork")
