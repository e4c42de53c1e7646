"""MMDiT against the original implementation's outputs and the full-size checkpoints' names and shapes."""
import pytest
import torch
from conftest import golden, manifest, read_golden

from models.mmdit import MMDiT, config_from_shapes

PREFIX = "model.diffusion_model."


def load_golden_net(path):
    """(network, tensors, metadata); heads come from the file's config where it states them."""
    tensors, meta = read_golden(path)
    weights = {k.removeprefix(PREFIX): v.float() for k, v in tensors.items() if k.startswith(PREFIX)}
    config = config_from_shapes({k: tuple(v.shape) for k, v in weights.items()})
    config["heads"] = meta["config"]["num_heads"]
    net = MMDiT(**config)
    net.load_state_dict(weights, strict=True)
    return net.eval(), tensors, meta


def case_inputs(tensors, case):
    get = lambda name: tensors[f"in.{case}.{name}"].float()  # noqa: E731
    return get("x"), get("t") / 1000, (get("context"), get("y"))


@pytest.mark.parametrize("path", golden("mmdit_*.safetensors"), ids=lambda p: p.stem)
def test_velocity_and_every_tap_equal_the_original(path):
    net, tensors, meta = load_golden_net(path)
    depth = meta["config"]["depth"]
    assert net.depth == depth
    for case in meta["cases"]:
        x, t, cond = case_inputs(tensors, case)
        with torch.no_grad():
            velocity = net(x, t, cond)
            maps = net(x, t, cond, taps=tuple(range(depth)))
        # 1e-4: float32 knows 1000 t to 3e-5, which shows as 6e-5 at 500.5; erf GELU changes 7e-4 (SD3.md).
        torch.testing.assert_close(velocity, tensors[f"out.{case}.velocity"], atol=1e-4, rtol=0)
        for i, m in enumerate(maps):
            torch.testing.assert_close(m.flatten(2).mT, tensors[f"out.{case}.tap.{i}"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("path", golden("mmdit_*.safetensors"), ids=lambda p: p.stem)
def test_inner_values_equal_the_original(path):
    net, tensors, meta = load_golden_net(path)
    for case in meta["cases"]:
        seen = {}
        modules = {"t_emb": net.t_embedder, "y_emb": net.y_embedder, "context_tokens": net.context_embedder,
                   "final_tokens": net.final_layer}
        hooks = [m.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
                 for name, m in modules.items()]
        hooks += [block.register_forward_hook(lambda _, __, out, i=i: seen.update({f"ctx.{i}": out[1]}))
                  for i, block in enumerate(net.joint_blocks[:-1])]
        with torch.no_grad():
            net(*case_inputs(tensors, case))
        compared = 0
        for name, value in seen.items():
            if f"out.{case}.{name}" in tensors:  # some files leave some of them out
                torch.testing.assert_close(value, tensors[f"out.{case}.{name}"], atol=1e-4, rtol=0)
                compared += 1
        assert compared >= net.depth - 1 + 2  # text of every block but the last, and the two embeddings
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("path", [p for p in golden("sd3*.keys.json") if "mmdit" in manifest(p)[1]],
                         ids=lambda p: p.stem)
def test_full_size_state_dict_is_the_manifest(path):
    shapes, meta = manifest(path)
    shapes = {k.removeprefix(PREFIX): v for k, v in shapes.items() if k.startswith(PREFIX)}
    config = config_from_shapes(shapes)
    with torch.device("meta"):
        net = MMDiT(**config)
    assert {k: tuple(v.shape) for k, v in net.state_dict().items()} == shapes
    expected = tuple(meta["mmdit"][k] for k in ("depth", "hidden", "heads"))
    assert (config["depth"], config["width"], config["heads"]) == expected


def test_taps_stop_after_the_last_one():
    net, tensors, meta = load_golden_net(golden("mmdit_*.safetensors")[0])
    x, t, cond = case_inputs(tensors, next(iter(meta["cases"])))
    ran = []
    for i, block in enumerate(net.joint_blocks):
        block.register_forward_hook(lambda *_, i=i: ran.append(i))
    maps = net(x, t, cond, taps=(0,))
    assert ran == [0] and len(maps) == 1
    assert maps[0].shape == (x.shape[0], net.pos_embed.shape[-1], *(n // net.patch for n in x.shape[2:]))


def test_gradient_reaches_the_input_through_frozen_weights():
    net, tensors, meta = load_golden_net(golden("mmdit_*.safetensors")[0])
    x, t, cond = case_inputs(tensors, next(iter(meta["cases"])))
    net.requires_grad_(False)
    net(x.requires_grad_(), t, cond).square().mean().backward()
    assert x.grad.abs().min() > 0 and all(p.grad is None for p in net.parameters())


def test_attention_seam_is_used_by_every_block():
    net, tensors, meta = load_golden_net(golden("mmdit_*.safetensors")[0])
    x, t, cond = case_inputs(tensors, next(iter(meta["cases"])))
    calls = []
    for block in net.blocks():
        block.attend = lambda q, k, v: calls.append(q.shape) or torch.zeros_like(q)
    with torch.no_grad():
        net(x, t, cond)
    tokens = cond[0].shape[1] + (x.shape[2] // net.patch) * (x.shape[3] // net.patch)
    assert len(calls) == net.depth + len(meta["config"]["x_block_self_attn_layers"]) and calls[0][2] == tokens


def test_sizes_the_model_cannot_take_are_named():
    net, tensors, meta = load_golden_net(golden("mmdit_*.safetensors")[0])
    x, t, cond = case_inputs(tensors, next(iter(meta["cases"])))
    with pytest.raises(ValueError, match="multiple of the patch"):
        net(x[..., :-1], t, cond)
    with pytest.raises(ValueError, match="position table"):
        net(x.repeat(1, 1, net.pos_grid, 1), t, cond)
