"""The UNet of SDXL and SD1.5 against the original implementations' outputs and the published files' names."""
import json
from functools import cache, partial

import pytest
import torch
from conftest import from_recipe, golden, near, read_golden
from torch import nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from models.sdxl_unet import BasicTransformerBlock, UNet, config_from_shapes, timestep_embedding

PREFIX = "model.diffusion_model."
FILES = golden("*_unet_*.safetensors")
SMALL = sorted(FILES, key=lambda p: read_golden(p)[1]["golden"]["n_weights"])[:2]  # an SDXL and an SD1.5
MANIFESTS = [p for p in golden("*.keys.json") if f"{PREFIX}middle_block" in p.read_text()]
every_golden = pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
small_goldens = pytest.mark.parametrize("path", SMALL, ids=lambda p: p.stem)


def shapes_of(tensors):
    return {k.removeprefix(PREFIX): tuple(v.shape) for k, v in tensors.items() if k.startswith(PREFIX)}


@cache
def read(path):
    """(tensors, weights, config) of a golden file."""
    g, meta = read_golden(path)
    about = meta["golden"]
    return g, g if about["weights_stored"] else from_recipe(about), about["config"]


def load(path):
    """(network, (x_t, t, cond), tensors, config) of a golden file."""
    g, weights, c = read(path)
    net = UNet(**config_from_shapes(shapes_of(weights)), head_dim=c.get("num_head_channels", 64),
               heads=c.get("num_heads"), groups=c["norm_groups"])
    net.load_state_dict({k.removeprefix(PREFIX): w for k, w in weights.items() if k.startswith(PREFIX)})
    inputs = g["in.x"], (g["in.timesteps"] + 1) / 1000, (g["in.context"], g.get("in.y"))
    return net.requires_grad_(False), inputs, g, c


@every_golden
def test_noise_taps_and_every_block_equal_the_original(path):
    net, inputs, g, _ = load(path)
    keys = [name.removeprefix("tap.") for name in g if name.startswith("tap.")]
    blocks = [name.removeprefix("aux.") for name in g if name.startswith("aux.") and "block" in name]
    seen = {}
    for name in blocks:
        net.get_submodule(name)[-1].register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out}))
    net.middle_block[0].register_forward_pre_hook(lambda _, args: seen.update(emb=args[1]))
    near(net(*inputs), g["out.eps"])
    maps = net(*inputs, taps=tuple(keys))
    shapes = net.tap_shapes(*inputs[0].shape[2:])
    assert sorted(shapes) == sorted(keys) and len(maps) == len(keys)
    for (key, shape), m in zip(shapes.items(), maps):
        assert m.shape[1:] == shape
        near(m, g[f"tap.{key}"])
    for name in [*blocks, "emb"]:
        near(seen[name], g[f"aux.{name}"])


@every_golden
def test_config_is_the_golden_files(path):
    net, _, _, c = load(path)
    config = config_from_shapes({name: tuple(p.shape) for name, p in net.state_dict().items()})
    depth = c["transformer_depth"]
    if isinstance(depth, int):  # SD1.5's configurations name the resolutions that have blocks instead
        depth = [depth * (2 ** i in c["attention_resolutions"]) for i in range(len(c["channel_mult"]))]
    assert config == dict(
        model_channels=c["model_channels"], channel_mult=tuple(c["channel_mult"]),
        num_res_blocks=c["num_res_blocks"], depth=tuple(depth), middle_depth=max(depth[-1], 1),
        context_dim=c["context_dim"], in_channels=c["in_channels"], vector_dim=c.get("adm_in_channels"),
        linear=c.get("use_linear_in_transformer", False))
    assert all(type(n) is int for n in (*config["channel_mult"], *config["depth"]))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_full_size_state_dict_is_the_manifest(path):
    data = json.loads(path.read_text())
    shapes = {k.removeprefix(PREFIX): tuple(shape) for k, (shape, dtype) in data["tensors"].items()
              if k.startswith(PREFIX)}
    with torch.device("meta"):
        net = UNet(**config_from_shapes(shapes))
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == shapes
    assert sum(p.numel() for p in net.parameters()) == data["_meta"]["groups"]["unet"]["params"]


@every_golden
def test_each_tap_alone_is_the_same_map_and_ends_the_forward(path):
    net, inputs, _, _ = load(path)
    keys = tuple(net.tap_shapes(*inputs[0].shape[2:]))
    maps = net(*inputs, taps=keys)
    ran = []
    for module in net.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda module, _, __: ran.append(module))
    for key, expected in zip(keys, maps):
        ran.clear()
        alone, = net(*inputs, taps=(key,))
        assert torch.equal(alone, expected)  # the same operations in the same order
        assert ran[-1] is net.tapped[key].out_layers[-1]
    assert all(map(torch.equal, net(*inputs, taps=keys[::-1]), maps))  # network order whatever was asked


@small_goldens
def test_gradient_reaches_the_input_through_frozen_weights(path):
    net, (x, t, cond), _, _ = load(path)
    for taps in ((), ("down.0",), ("mid",)):
        x = x.detach().requires_grad_()
        out = net(x, t, cond, taps=taps)
        (out[0] if taps else out).square().sum().backward()
        assert x.grad.abs().min() > 0
    assert all(p.grad is None for p in net.parameters())


def test_time_is_a_fraction_of_the_ddpm_grid():
    net, (x, _, cond), _, _ = load(SMALL[0])
    seen = []
    net.time_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0.0, 0.0005, 0.001, 0.0015, 0.25, 1.0])
    index = torch.tensor([0.0, 0.0, 0.0, 0.5, 249.0, 999.0])
    repeat = [v[:1].expand(6, *v.shape[1:]) for v in (x, cond[0], x if cond[1] is None else cond[1])]
    net(repeat[0], t, tuple(repeat[1:]))
    # 1e-4: at t = 1 float32 knows 1000 t to 6e-5, which is an angle.
    torch.testing.assert_close(seen[0], timestep_embedding(index, net.model_channels), atol=1e-4, rtol=0)
    net.bfloat16()(repeat[0], t, tuple(repeat[1:]))
    assert torch.equal(seen[1], seen[0].bfloat16())  # 998 and 999 are one number in bfloat16


@small_goldens
def test_bfloat16(path):
    net, inputs, g, _ = load(path)
    norm, x = net.out[0], (10 + torch.randn(2, net.model_channels, 32, 32)).bfloat16()
    expected = norm(x.float())
    out = net.bfloat16()(*inputs)
    # 3 %: the rounding of the affine weights and of the result; computed in bfloat16, 100 - 99 would be lost.
    torch.testing.assert_close(norm(x).float(), expected, atol=3e-2, rtol=3e-2)
    assert out.dtype == torch.float32
    # The last layer is not rounded: one value in 2^16 is a bfloat16 by chance.
    assert (out == out.bfloat16()).float().mean() < 0.01
    rounded_weights = net.float()(*inputs)
    # Rounding activations too adds an error like that of rounding the weights: about double was measured.
    # Ten times are 15 % of the deviation; another function would be off by all of it.
    assert (out - g["out.eps"]).std() < 10 * (rounded_weights - g["out.eps"]).std()


@small_goldens
def test_checkpointed_units_give_the_same_gradients(path):
    grads = []
    for checkpointing in (False, True):
        net, (x, t, cond), _, _ = load(path)
        net.requires_grad_(True)
        if checkpointing:
            for block in net.blocks():
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        net(x, t, cond).square().sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name])  # the same operations in the same order


class Recorder(nn.Linear):
    """A linear that takes an adapter's name as LoRALinear does, and notes the calls that name one."""

    def forward(self, x, adapter=None):
        if adapter is not None:
            self.called = adapter
        return linear(x, self.weight, self.bias)


@small_goldens
def test_adapters_reach_every_linear_of_the_transformers(path):
    net, inputs, _, _ = load(path)
    expected = net(*inputs)
    for m in net.modules():
        if type(m) is nn.Linear:
            m.__class__ = Recorder
    assert torch.equal(net(*inputs), expected)
    assert not any(hasattr(m, "called") for m in net.modules())
    net(*inputs, lora=("student",))
    called = {name for name, m in net.named_modules() if getattr(m, "called", None) == "student"}
    # All linears but those of the embeddings.
    assert called == {name for name, m in net.named_modules()
                      if isinstance(m, Recorder) and "emb" not in name}


@small_goldens
def test_attention_seam_is_used_by_every_transformer_block(path):
    net, (x, t, cond), _, c = load(path)
    blocks = [block for block in net.blocks() if isinstance(block, BasicTransformerBlock)]
    calls = []
    for block in blocks:
        block.attend = lambda q, k, v: calls.append((q, k)) or torch.zeros_like(q)
    net(x, t, cond)
    assert len(calls) == 2 * len(blocks) > 0
    for q, k in calls[::2]:
        assert q.shape == k.shape
    for q, k in calls[1::2]:
        assert k.shape[2] == cond[0].shape[1]
    if "num_heads" in c:
        assert {q.shape[1] for q, _ in calls} == {c["num_heads"]}
    else:
        assert {q.shape[3] for q, _ in calls} == {c["num_head_channels"]}


@small_goldens
def test_vector_is_ignored_by_a_network_without_label_embedding(path):
    net, (x, t, (context, y)), _, _ = load(path)
    other = torch.zeros(len(x), 3) if y is None else y + 1
    assert torch.equal(net(x, t, (context, other)), net(x, t, (context, y))) == (y is None)


def test_sizes_the_levels_cannot_halve_are_named():
    net, (x, t, cond), _, _ = load(SMALL[0])
    with pytest.raises(ValueError, match="no multiple of"):
        net(x[..., :-1], t, cond)
