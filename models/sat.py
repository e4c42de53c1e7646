"""CogVideoX's original release (SwissArmyTransformer, "SAT") under the published tensor names.

The networks in models/cogvideox.py and models/cogvideox_vae.py have the published names. These functions
present SAT files under them; a file that has them already passes unchanged.
"""
import re

from models.checkpoint import Tensors, joined, renamed, respelled

DIT_PREFIX = "model.diffusion_model."
# SAT module ("#" is a block's number) and published module, for weight and bias alike. A SAT tensor that
# holds several published ones is cut into equal chunks of rows: how many, and which the published one takes.
# `query_key_value`: all queries, all keys, all values. Modulations: shift, scale and gate of video for the
# attention, the same for the MLP, then those of text in the same order.
DIT_RULES = (
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("mixins.patch_embed.proj", "patch_embed.proj"),
    ("mixins.patch_embed.text_proj", "patch_embed.text_proj"),
    ("transformer.layers.#.input_layernorm", "transformer_blocks.#.norm1.norm"),
    ("transformer.layers.#.post_attention_layernorm", "transformer_blocks.#.norm2.norm"),
    ("transformer.layers.#.attention.dense", "transformer_blocks.#.attn1.to_out.0"),
    ("transformer.layers.#.mlp.dense_h_to_4h", "transformer_blocks.#.ff.net.0.proj"),
    ("transformer.layers.#.mlp.dense_4h_to_h", "transformer_blocks.#.ff.net.2"),
    ("mixins.adaln_layer.query_layernorm_list.#", "transformer_blocks.#.attn1.norm_q"),
    ("mixins.adaln_layer.key_layernorm_list.#", "transformer_blocks.#.attn1.norm_k"),
    ("transformer.layers.#.attention.query_key_value", "transformer_blocks.#.attn1.to_q", 3, (0,)),
    ("transformer.layers.#.attention.query_key_value", "transformer_blocks.#.attn1.to_k", 3, (1,)),
    ("transformer.layers.#.attention.query_key_value", "transformer_blocks.#.attn1.to_v", 3, (2,)),
    ("mixins.adaln_layer.adaLN_modulations.#.1", "transformer_blocks.#.norm1.linear",
     12, (0, 1, 2, 6, 7, 8)),
    ("mixins.adaln_layer.adaLN_modulations.#.1", "transformer_blocks.#.norm2.linear",
     12, (3, 4, 5, 9, 10, 11)),
    ("transformer.final_layernorm", "norm_final"),
    ("mixins.final_layer.norm_final", "norm_out.norm"),
    ("mixins.final_layer.adaLN_modulation.1", "norm_out.linear"),
    ("mixins.final_layer.linear", "proj_out"),
)
# Position tables, which the network computes, and modules that no forward uses. Some files hold them.
DIT_UNUSED = ("mixins.pos_embed.pos_embedding", "mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos",
              "transformer.position_embeddings.weight", "transformer.word_embeddings.weight",
              "patch_embed.pos_embedding")
VAE_RULES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.block\.", ".resnets."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
)


def dit_from_sat(tensors: Tensors) -> Tensors:
    """The denoiser's tensors of either layout under the published names, without those in DIT_UNUSED. A name
    that no rule knows stays, so that strict loading refuses it. Of a tensor only the rows asked for are read.
    """
    if any(name.startswith(DIT_PREFIX) for name in tensors):
        tensors = tensors.group(DIT_PREFIX)
    parts = {}
    for name, shape in tensors.shapes.items():
        module, _, kind = name.rpartition(".")
        number = "".join(re.findall(r"\.(\d+)", module)[:1])
        patterns = module, re.sub(r"\.\d+", ".#", module, count=1)
        rules = [rule for rule in DIT_RULES if rule[0] in patterns]
        for _, published, *cut in rules:
            count, chunks = cut or (1, (0,))
            rows = (shape or (0,))[0] // count
            parts[f"{published.replace('#', number)}.{kind}"] = [
                (name, chunk * rows, (chunk + 1) * rows) for chunk in chunks]
        if not rules and name not in DIT_UNUSED:
            parts[name] = [(name, 0, (shape or (0,))[0])]
    return joined(tensors, parts)


def vae_from_sat(tensors: Tensors) -> Tensors:
    """The autoencoder's tensors of either layout (SAT: the file `vae/3d-vae.pt`) under the published names,
    without the `loss.` tensors of SAT's training."""
    levels = [re.match(r"decoder\.up\.(\d+)\.", name) for name in tensors]
    top = max((int(level[1]) for level in levels if level), default=0)

    def published(name: str) -> str:
        # SAT counts the decoder's levels from the video, the published names count from the latent.
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{top - int(m[1])}", name)
        return respelled(name, VAE_RULES)

    source = {published(name): name for name in tensors if not name.startswith("loss.")}
    return renamed(tensors, source)
