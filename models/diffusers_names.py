"""Names of the networks' modules in diffusers, for its LoRA files and those that convert to them.

A family's Names say which linear layers carry an adapter and what each module is called in diffusers.
"""
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Names(NamedTuple):
    adaptable: tuple[str, ...]  # last parts of the names of the linears that the network calls with `lora`
    targets: tuple[str, ...]    # of these, which get an adapter. The paper says LoRA, not where.  # [choice]
    to_diffusers: Callable      # (module, its output rows, net) -> {diffusers module: rows [(start, stop)]}


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
              to_diffusers=mmdit_to_diffusers)
