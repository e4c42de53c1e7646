"""Tokenizers and random, frozen text encoders of the tiny teachers, in the layouts of the published ones.

Random is enough: token embeddings of unit variance keep words apart, and the denoiser learns the rest.
Letters: L tokens, D width.
"""
import json
from pathlib import Path

import torch
from torch import Tensor
from transformers import T5Tokenizer

LENGTH = 8  # tokens of each text encoder of the image models: start, six words, end


def longest_first(captions: list[str]) -> list[str]:
    """The words of captions, in an order in which no merge of a short word cuts a long one."""
    return sorted({word for text in captions for word in text.split()}, key=lambda word: (-len(word), word))


def write_clip_tokenizer(folder: Path, words: list[str], length: int) -> int:
    """One token for each word, letters for others. Returns the size of the vocabulary."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = {}  # an ordered set
    for word in words:
        stem = word[0]
        for c in (*word[1:-1], word[-1] + "</w>") if len(word) > 1 else ():
            merges[stem, c] = None
            stem += c
    tokens = ["!", *letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # CLIP's pooling finds the end as the largest id
    files = {"vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
             "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]),
             "tokenizer_config.json": json.dumps(dict(tokenizer_class="CLIPTokenizer",
                                                      model_max_length=length))}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return len(tokens)


def write_t5_tokenizer(folder: Path, words: list[str], length: int) -> int:
    """One token for each word, letters for others. Returns the size of the vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words] + [(c, -4.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length).save_pretrained(folder)
    return len(pieces)


def random_matrix(tensors: dict, g: torch.Generator, name: str, *shape: int, std: float | None = None,
                  bias: bool = False) -> None:
    tensors[f"{name}.weight"] = torch.randn(shape, generator=g) * (std or shape[1] ** -0.5)
    tensors.update({f"{name}.bias": torch.zeros(shape[0])} if bias else {})


def clip_encoder(root: str, words: int, g: torch.Generator, length: int = LENGTH) -> dict[str, Tensor]:
    """A random CLIP of two layers and one head of 64, transformers' names."""
    tensors = {}
    random_matrix(tensors, g, root + "embeddings.token_embedding", words, 64, std=1.0)
    random_matrix(tensors, g, root + "embeddings.position_embedding", length, 64, std=0.5)
    for norm in ("final_layer_norm", *(f"encoder.layers.{i}.layer_norm{j}" for i in "01" for j in "12")):
        tensors |= {f"{root}{norm}.weight": torch.ones(64), f"{root}{norm}.bias": torch.zeros(64)}
    for layer in (f"{root}encoder.layers.0.", f"{root}encoder.layers.1."):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            random_matrix(tensors, g, f"{layer}self_attn.{part}", 64, 64, bias=True)
        random_matrix(tensors, g, layer + "mlp.fc1", 256, 64, bias=True)
        random_matrix(tensors, g, layer + "mlp.fc2", 64, 256, bias=True)
    return tensors


def t5_text(root: str, words: int, g: torch.Generator) -> dict[str, Tensor]:
    """A random T5 v1.1 of one block and two heads of 64, transformers' names."""
    tensors = {}
    random_matrix(tensors, g, root + "shared", words, 128, std=1.0)
    for norm in ("final_layer_norm", "block.0.layer.0.layer_norm", "block.0.layer.1.layer_norm"):
        tensors[f"{root}encoder.{norm}.weight"] = torch.ones(128)
    attention = root + "encoder.block.0.layer.0.SelfAttention."
    feed = root + "encoder.block.0.layer.1.DenseReluDense."
    random_matrix(tensors, g, attention + "relative_attention_bias", 32, 2, std=1.0)
    # q carries the 1 / sqrt(64) that T5 leaves out.
    random_matrix(tensors, g, attention + "q", 128, 128, std=128 ** -0.5 / 8)
    for name in [attention + part for part in "kvo"] + [feed + part for part in ("wi_0", "wi_1", "wo")]:
        random_matrix(tensors, g, name, 128, 128)
    return tensors


def sd3_text(clip_words: int, t5_words: int) -> dict[str, Tensor]:
    """Random, frozen CLIP-L, CLIP-G and T5, names of SD3's single file."""
    tensors, g = {}, torch.Generator().manual_seed(0)
    for name in ("clip_l", "clip_g"):
        tensors |= clip_encoder(f"text_encoders.{name}.transformer.text_model.", clip_words, g)
    random_matrix(tensors, g, "text_encoders.clip_g.transformer.text_projection", 64, 64)
    root = "text_encoders.t5xxl.transformer."
    tensors |= t5_text(root, t5_words, g)
    tensors[root + "encoder.embed_tokens.weight"] = tensors[root + "shared.weight"].clone()
    return tensors


def sdxl_text(clip_words: int) -> dict[str, Tensor]:
    """Random, frozen CLIP-L and CLIP-G, names of SDXL's single file: the second in open_clip's."""
    g = torch.Generator().manual_seed(0)
    tensors = clip_encoder("conditioner.embedders.0.transformer.text_model.", clip_words, g)
    hub, root = clip_encoder("", clip_words, g), "conditioner.embedders.1.model."
    tensors[root + "token_embedding.weight"] = hub["embeddings.token_embedding.weight"]
    tensors[root + "positional_embedding"] = hub["embeddings.position_embedding.weight"]
    tensors[root + "text_projection"] = torch.randn(64, 64, generator=g) / 8
    for kind in ("weight", "bias"):
        tensors[f"{root}ln_final.{kind}"] = hub[f"final_layer_norm.{kind}"]
        for i in range(2):
            ours, theirs = f"{root}transformer.resblocks.{i}.", f"encoder.layers.{i}."
            for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                         ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")):
                tensors[f"{ours}{a}.{kind}"] = hub[f"{theirs}{b}.{kind}"]
            tensors[f"{ours}attn.in_proj_{kind}"] = torch.cat(
                [hub[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"])
    return tensors
