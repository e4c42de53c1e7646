"""Names of the networks' modules in diffusers, for its LoRA files and for checkpoints in its layout.

A family's Names say which linear layers carry an adapter and what each module is called in diffusers. The
last functions present diffusers' files of a UNet, an MMDiT, Wan or an autoencoder under the original names.
"""
import re
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

from torch import Tensor, nn

from models.checkpoint import Tensors, joined, renamed, respelled


class Names(NamedTuple):
    adaptable: tuple[str, ...]  # ends of the names of the linears that the network calls with `lora`
    targets: tuple[str, ...]    # of these, which get an adapter. The paper says LoRA, not where.  # [choice]
    to_diffusers: Callable      # (module, its output rows, net) -> {diffusers module: rows [(start, stop)]}
    prefix: str                 # of the network in a diffusers pipeline
    kohya: Callable             # (module, net) -> its name, dotted, in the files of kohya's sd-scripts
    architecture: str           # in `modelspec.architecture`
    implementation: str = "Stability-AI/generative-models"  # in `modelspec.implementation`, on GitHub
    dotted: str = ""            # prefix of the dotted names in ComfyUI's files, where these have their own


def same(module: str, net: nn.Module) -> str:
    return module


def spellings(net: nn.Module, names: Names) -> dict[str, tuple[str, tuple[int, ...], list[tuple[int, int]]]]:
    """Every module name a file may use, dotted or with underscores -> (weight name, its shape, the rows)."""
    table = {}
    for name, weight in net.named_parameters():
        if name.endswith(".weight") and weight.ndim >= 2:
            module, rows = name.removesuffix(".weight"), len(weight)
            for spelling, cuts in {module: [(0, rows)], **names.to_diffusers(module, rows, net)}.items():
                table[spelling] = table[spelling.replace(".", "_")] = name, tuple(weight.shape), cuts
    return table


def differences(net: nn.Module) -> dict[tuple[str, str], str]:
    """(module, kind of difference) as LoRA files spell them, with dots or underscores -> parameter name."""
    table = {}
    for name, _ in net.named_parameters():
        module, _, last = name.rpartition(".")
        kinds = {"weight": [(module, "diff")], "bias": [(module, "diff_b")],
                 "modulation": [(name, "diff"), (module, "diff_m")]}
        for spelling, kind in kinds.get(last, [(name, "diff")]):
            table[spelling, kind] = table[spelling.replace(".", "_"), kind] = name
    return table


# ---- SD3 ---------------------------------------------------------------------------------------------------

# Original module -> diffusers modules; those of a stream inside joint_blocks.<i> and transformer_blocks.<i>.
# Three names: a third of a fused weight's rows each.
MMDIT_MODULES = {
    "pos_embed": ["pos_embed.pos_embed"],
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["time_text_embed.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["time_text_embed.timestep_embedder.linear_2"],
    "y_embedder.mlp.0": ["time_text_embed.text_embedder.linear_1"],
    "y_embedder.mlp.2": ["time_text_embed.text_embedder.linear_2"],
    "context_embedder": ["context_embedder"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
    "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "x_block.attn.proj": ["attn.to_out.0"],
    "x_block.attn.ln_q": ["attn.norm_q"], "x_block.attn.ln_k": ["attn.norm_k"],
    "x_block.attn2.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"],
    "x_block.attn2.proj": ["attn2.to_out.0"],
    "x_block.attn2.ln_q": ["attn2.norm_q"], "x_block.attn2.ln_k": ["attn2.norm_k"],
    "x_block.mlp.fc1": ["ff.net.0.proj"], "x_block.mlp.fc2": ["ff.net.2"],
    "x_block.adaLN_modulation.1": ["norm1.linear"],
    "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "context_block.attn.proj": ["attn.to_add_out"],
    "context_block.attn.ln_q": ["attn.norm_added_q"], "context_block.attn.ln_k": ["attn.norm_added_k"],
    "context_block.mlp.fc1": ["ff_context.net.0.proj"], "context_block.mlp.fc2": ["ff_context.net.2"],
    "context_block.adaLN_modulation.1": ["norm1_context.linear"],
}


def mmdit_to_diffusers(module: str, rows: int, net: nn.Module) -> dict[str, list[tuple[int, int]]]:
    """Diffusers modules that a module of MMDiT with so many output rows becomes -> its rows (start, stop)."""
    block = re.fullmatch(r"joint_blocks\.(\d+)\.(.+)", module)
    names = MMDIT_MODULES[block[2] if block else module]
    prefix = f"transformer_blocks.{block[1]}." if block else ""
    last = f"joint_blocks.{net.depth - 1}.context_block.adaLN_modulation.1"
    if module in ("final_layer.adaLN_modulation.1", last):
        # No gate here, only shift and scale; diffusers stores the scale first.
        return {prefix + names[0]: [(rows // 2, rows), (0, rows // 2)]}
    cut = rows // len(names)
    return {prefix + name: [(i * cut, (i + 1) * cut)] for i, name in enumerate(names)}


MMDIT = Names(adaptable=("qkv", "proj", "fc1", "fc2"), targets=("qkv", "proj"),
              to_diffusers=mmdit_to_diffusers, prefix="transformer.", kohya=same,
              architecture="stable-diffusion-3")


# ---- SDXL, SD1.5, AnimateDiff, CogVideoX, Wan -------------------------------------------------------------------

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
          "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_ENDS = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
             "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
             "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
RESNET_THEIRS, UNET_ENDS_THEIRS = ({ours: theirs for theirs, ours in table.items()} for table in (RESNET, UNET_ENDS))
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MOTION_BLOCK = (("attention_blocks.0.", "attn1."), ("attention_blocks.1.", "attn2."), ("ff_norm", "norm3"),
                ("norms.0", "norm1"), ("norms.1", "norm2"))


def unet_name(module: str, net: nn.Module) -> str:
    """What diffusers calls a module of a UNet, or of AnimateDiff's."""
    if ".temporal_transformer." in module:
        module = module.replace(".temporal_transformer.", ".")
        for ours, theirs in MOTION_BLOCK:
            module = module.replace(".transformer_blocks.0." + ours, ".transformer_blocks.0." + theirs)
        return module
    if module in UNET_ENDS_THEIRS:
        return UNET_ENDS_THEIRS[module]
    way, rest = module.split("_", 1)
    rest = rest.split(".", 1)[1]
    if way == "middle":
        place, rest = rest.split(".", 1)
        block, layer, i = "mid_block", "attentions" if place == "1" else "resnets", int(place) // 2
    else:
        number, place, rest = rest.split(".", 2)
        per_level = len(net.input_blocks) // len(net.widths)  # ResNets and what follows them
        down = way == "input"
        level, i = divmod(int(number) - down, per_level)
        block = f"{'down' if down else 'up'}_blocks.{level}"
        if rest in ("op", "conv"):
            return f"{block}.{'down' if down else 'up'}samplers.0.conv"
        layer = "attentions" if place == "1" else "resnets"
    if layer == "resnets":
        rest = RESNET_THEIRS[rest]
    return f"{block}.{layer}.{i}.{rest}"


def unet_to_diffusers(module: str, rows: int, net: nn.Module) -> dict[str, list[tuple[int, int]]]:
    return {unet_name(module, net): [(0, rows)]}


def sd15_kohya(module: str, net: nn.Module) -> str:
    """sd-scripts writes SD1.5's adapters under diffusers' names and SDXL's under the original ones. Motion
    modules keep AnimateDiff's, as in its MotionLoRA files."""
    return module if ".temporal_transformer." in module else unet_name(module, net)


UNET = Names(adaptable=(*ATTENTION, "net.0.proj", "net.2", "proj_in", "proj_out"), targets=ATTENTION,
             to_diffusers=unet_to_diffusers, prefix="unet.", kohya=same,
             architecture="stable-diffusion-xl-v1-base")
SD15 = UNET._replace(kohya=sd15_kohya, architecture="stable-diffusion-v1")
COGVIDEOX = Names(adaptable=(*ATTENTION, "net.0.proj", "net.2"), targets=ATTENTION,
                  to_diffusers=lambda module, rows, net: {module: [(0, rows)]}, prefix="transformer.",
                  kohya=same, architecture="cogvideox", implementation="zai-org/CogVideo")

# Original module -> that of diffusers; those of a block inside blocks.<i> of both.
WAN_MODULES = {"patch_embedding": "patch_embedding", "time_projection.1": "condition_embedder.time_proj",
               "head.head": "proj_out", "head.modulation": "scale_shift_table"} | {
    f"{kind}_embedding.{2 * i}": f"condition_embedder.{kind}_embedder.linear_{i + 1}"
    for kind, i in product(("text", "time"), (0, 1))}
WAN_BLOCK = {"norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table"} | {
    f"{ours}_attn.{name}": f"{theirs}.{new}"
    for (ours, theirs), (name, new) in product((("self", "attn1"), ("cross", "attn2")), (
        ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"), ("norm_k", "norm_k")))}


def wan_to_diffusers(module: str, rows: int, net: nn.Module) -> dict[str, list[tuple[int, int]]]:
    block = re.fullmatch(r"(blocks\.\d+\.)(.+)", module)
    return {block[1] + WAN_BLOCK[block[2]] if block else WAN_MODULES[module]: [(0, rows)]}


WAN = Names(adaptable=("q", "k", "v", "o", "ffn.0", "ffn.2"), targets=("q", "k", "v", "o"),
            to_diffusers=wan_to_diffusers, prefix="transformer.", kohya=same, architecture="wan2.1",
            implementation="Wan-Video/Wan2.1",
            dotted="diffusion_model.")


# ---- files in diffusers' layout under the original names ----------------------------------------------------

VAE_RULES = (  # within one name, in this order
    (r"\.down_blocks\.(\d+)\.", r".down.\1."), (r"\.resnets\.", ".block."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."), (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.mid_block\.block\.0\.", ".mid.block_1."), (r"\.mid_block\.block\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."), (r"\.conv_norm_out\.", ".norm_out."),
    # Attention layers have two generations of names.
    (r"attn_1\.group_norm\.", "attn_1.norm."), (r"attn_1\.(to_q|query)\.", "attn_1.q."),
    (r"attn_1\.(to_k|key)\.", "attn_1.k."), (r"attn_1\.(to_v|value)\.", "attn_1.v."),
    (r"attn_1\.(to_out\.0|proj_attn)\.", "attn_1.proj_out."))

WAN_VAE_RULES = (
    (r"\.down_blocks\.", ".downsamples."), (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."), (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.norm1\.", ".residual.0."), (r"\.conv1\.", ".residual.2."), (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."), (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."), (r"\.conv_in\.", ".conv1."), (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."))


def denoiser_from_diffusers(tensors: Tensors) -> Tensors:
    """A UNet or an MMDiT in diffusers' layout under the original names; other files pass unchanged. A name
    that no rule knows stays, so that strict loading refuses it."""
    if "conv_in.weight" in tensors and "time_embedding.linear_1.weight" in tensors:
        return unet_from_diffusers(tensors)
    if "pos_embed.proj.weight" in tensors and "context_embedder.weight" in tensors:
        return mmdit_from_diffusers(tensors)
    return tensors


def denoiser_of(tensors: Tensors, prefix: str) -> Tensors:
    """A denoiser under its original names: of a single file with this prefix, of a file that holds nothing
    else, or in diffusers' layout. Raises InputError where none of these names is there."""
    if any(name in tensors for name in ("input_blocks.0.0.weight", "x_embedder.proj.weight")):
        return tensors
    found = denoiser_from_diffusers(tensors)
    return tensors.group(prefix) if found is tensors else found


def vae_of(tensors: Tensors, prefix: str) -> Tensors:
    """A 2D autoencoder in the same ways, without what its training may have left in the file."""
    alone = "decoder.conv_in.weight" in tensors
    found = vae_from_diffusers(tensors if alone else tensors.group(prefix))
    kept = {name: name for name in found if not name.startswith(("loss.", "model_ema."))}
    return found if len(kept) == len(found) else renamed(found, kept)


def mmdit_from_diffusers(tensors: Tensors) -> Tensors:
    depth = len({name.split(".")[1] for name in tensors if name.startswith("transformer_blocks.")})
    last, parts = f"joint_blocks.{depth - 1}.context_block.adaLN_modulation.1", {}
    left = {name: [(name, 0, (shape or (0,))[0])] for name, shape in tensors.shapes.items()}
    for original, names in MMDIT_MODULES.items():
        blocks = range(depth) if original.startswith(("x_block.", "context_block.")) else (None,)
        for i, kind in product(blocks, (".weight", ".bias", "")):
            ours, theirs = ("", "") if i is None else (f"joint_blocks.{i}.", f"transformer_blocks.{i}.")
            sources = [theirs + name + kind for name in names]
            if not all(left.get(source) for source in sources):
                continue
            rows = [left.pop(source)[0] for source in sources]
            if ours + original in ("final_layer.adaLN_modulation.1", last):  # as in `mmdit_to_diffusers`
                (source, _, count), = rows
                rows = [(source, count // 2, count), (source, 0, count // 2)]
            parts[ours + original + kind] = rows
    return joined(tensors, parts | left)


def unet_from_diffusers(tensors: Tensors) -> Tensors:
    """SDXL's and SD1.5's. Original blocks are counted through all levels: as many ResNets in each going down,
    one more going up, and after each level's the layer that halves or doubles the map."""
    count = len({name.split(".")[3] for name in tensors if name.startswith("down_blocks.0.resnets.")})

    def original(name: str) -> str:
        module, _, kind = name.rpartition(".")
        found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.+)", module)
        if not found:
            return f"{UNET_ENDS.get(module, module)}.{kind}"
        way, level, layer, i, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
        inner = RESNET.get(rest, rest) if layer == "resnets" else rest
        if way == "mid":
            place = f"middle_block.{2 * i if layer == 'resnets' else 1}"
        elif layer == "downsamplers":
            return f"input_blocks.{(count + 1) * (level + 1)}.0.op.{kind}"
        elif layer == "upsamplers":
            after = 2 if f"up_blocks.{level}.attentions.0.norm.weight" in tensors else 1
            return f"output_blocks.{(count + 1) * level + count}.{after}.{rest}.{kind}"
        else:
            block = f"input_blocks.{1 + (count + 1) * level + i}" if way == "down" else \
                f"output_blocks.{(count + 1) * level + i}"
            place = f"{block}.{int(layer == 'attentions')}"
        return f"{place}.{inner}.{kind}"

    return renamed(tensors, {original(name): name for name in tensors})


def vae_from_diffusers(tensors: Tensors) -> Tensors:
    """The 2D autoencoder in diffusers' layout under the original names; other files pass unchanged."""
    if "encoder.down_blocks.0.resnets.0.conv1.weight" not in tensors:
        return tensors
    levels = [re.match(r"decoder\.up_blocks\.(\d+)\.", name) for name in tensors]
    top = max((int(level[1]) for level in levels if level), default=0)

    def original(name: str) -> str:
        # Diffusers counts the decoder's levels from the latent, the original from the image.
        name = re.sub(r"\.up_blocks\.(\d+)\.", lambda level: f".up.{top - int(level[1])}.", name)
        return respelled(name, VAE_RULES)

    found = renamed(tensors, {original(name): name for name in tensors})
    matrices = {name for name, shape in found.shapes.items() if ".attn_1." in name and len(shape) == 2}
    shapes = {name: shape + (1, 1) if name in matrices else shape for name, shape in found.shapes.items()}

    def read(name: str, rows: slice | None) -> Tensor:  # diffusers has linear layers for 1x1 convolutions
        t = found.read(name, rows)
        return t[:, :, None, None] if name in matrices else t

    return Tensors(tensors.path, shapes, read, tensors.metadata)


def wan_from_diffusers(tensors: Tensors) -> Tensors:
    """Wan's denoiser in diffusers' layout under the original names; other files pass unchanged."""
    if "condition_embedder.time_proj.weight" not in tensors:
        return tensors
    ends, inner = ({theirs: ours for ours, theirs in table.items()} for table in (WAN_MODULES, WAN_BLOCK))

    def original(name: str) -> str:
        block, module, kind = re.fullmatch(r"(?s)(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name).groups("")
        return block + (inner if block else ends).get(module, module) + kind
    return renamed(tensors, {original(name): name for name in tensors})


def wan_vae_from_diffusers(tensors: Tensors) -> Tensors:
    """Wan's 3D autoencoder in the same way. Diffusers has a level's ResNets, three in the published one, and its
    upsampling apart."""
    if "encoder.conv_in.weight" not in tensors:
        return tensors
    count = len({name.split(".")[4] for name in tensors if name.startswith("decoder.up_blocks.0.resnets.")})

    def original(name: str) -> str:
        name = re.sub(r"\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.",
                      lambda found: f".upsamples.{(count + 1) * int(found[1]) + int(found[2] or count)}.", name)
        return respelled(name, WAN_VAE_RULES)
    return renamed(tensors, {original(name): name for name in tensors})
