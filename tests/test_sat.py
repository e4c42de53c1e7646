"""CogVideoX's original release (SAT) under the published names: every name, every row, nothing else read."""
import json
import re

import pytest
import torch
from conftest import GOLDEN, golden, read_golden
from test_cogvideox import MANIFESTS, build, read_case
from test_cogvideox_vae import files, shapes_of, vae_of

from models.checkpoint import InputError, Tensors, check_names, load, open_tensors
from models.cogvideox_vae import CogVideoXVAE, config_from_shapes
from models.sat import dit_from_sat, vae_from_sat

PREFIX = "model.diffusion_model."
each_manifest = pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
each_dit = pytest.mark.parametrize("path", golden("cogvideox_dit_*.sat_weights.safetensors"),
                                   ids=lambda p: p.stem)


def in_memory(tensors):
    """Tensors of a dictionary, and the list of (name, rows) that are read from it."""
    reads = []

    def read(name, rows):
        reads.append((name, rows))
        return tensors[name] if rows is None else tensors[name][rows]
    return Tensors("memory", {name: tuple(t.shape) for name, t in tensors.items()}, read), reads


def shapes_in(path, layout, part, *keys) -> dict[str, tuple]:
    """Name -> shape of a full-size checkpoint."""
    entry = json.loads(path.read_text())[layout][part]
    return {name: tuple(shape) for key in keys for name, shape in entry[key].items()}


# ---- denoiser ----------------------------------------------------------------------------------------------

@each_manifest
def test_full_size_denoiser_has_the_published_names_and_shapes(path):
    expected = shapes_in(path, "diffusers", "transformer", "keys")
    for keys in (("required",), ("required", "optional")):
        tensors = Tensors(path, shapes_in(path, "sat", "transformer", *keys), read=None)
        assert dit_from_sat(tensors).shapes == expected


@each_dit
def test_sat_file_is_the_published_network(path):
    tensors, _, expected = read_case(path.with_name(path.name.replace(".sat_weights", "")))
    stored, meta = read_golden(path)
    sat, reads = in_memory(stored)
    published = dit_from_sat(sat)
    depth = len({name.split(".")[1] for name in published if name.startswith("transformer_blocks.")})
    assert depth > 0
    expected = {name: value for name, value in expected.items()  # some files leave some of the blocks out
                if not name.startswith("transformer_blocks.") or int(name.split(".")[1]) < depth}
    assert published.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(published[name], value), name
        cuts = sorted({0, 1, value.shape[0] // 2, value.shape[0] - 1, value.shape[0]})
        for start, stop in zip(cuts, cuts[1:] + cuts[-1:]):  # the last one is empty: a rank without rows
            reads.clear()
            assert torch.equal(published.rows(name, start, stop), value[start:stop]), name
            assert sum(rows.stop - rows.start for _, rows in reads) == stop - start  # and no others are read
    net = build(meta["meta"]["config"], published.shapes)
    load(net, published)
    assert all(torch.equal(p, expected[name]) for name, p in net.state_dict().items())


@each_dit
def test_either_layout_is_strict_but_for_tables_that_are_not_used(path):
    stored, meta = read_golden(path)
    net = build(meta["meta"]["config"], dit_from_sat(in_memory(stored)[0]).shapes)
    expected = {name: tuple(t.shape) for name, t in net.state_dict().items()}
    optional = ("mixins.pos_embed.pos_embedding", "mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos",
                "transformer.position_embeddings.weight", "transformer.word_embeddings.weight")
    published = dict(dit_from_sat(in_memory(stored)[0]))
    kept = {name: t for name, t in stored.items() if name.removeprefix(PREFIX) not in optional}

    def check(tensors):
        check_names(dit_from_sat(in_memory(tensors)[0]), expected)
    check(kept)
    check(kept | {PREFIX + name: torch.zeros(3) for name in optional})
    check(published)
    check(published | {"patch_embed.pos_embedding": torch.zeros(3)})
    with pytest.raises(InputError, match="1 tensors are not expected .mixins.ofs_embed.weight"):
        check(stored | {PREFIX + "mixins.ofs_embed.weight": torch.zeros(3)})
    fused = PREFIX + "transformer.layers.0.attention.query_key_value.bias"
    with pytest.raises(InputError, match="3 of .* missing .transformer_blocks.0.attn1.to_q.bias"):
        check({name: t for name, t in stored.items() if name != fused})


# ---- autoencoder -------------------------------------------------------------------------------------------

def published(name: str) -> str:
    """The published name of a tensor of the original file, by the rules of the file beside the manifests."""
    rules = json.loads((GOLDEN / "cogvideox_sat_to_diffusers_map.json").read_text())["vae"]["rules"]
    for rule in rules:
        if m := re.match(rule["re"], name):
            to = re.sub(r"<flip:(\d)>", lambda flip: str(3 - int(m[int(flip[1])])), rule["to"])
            return m.expand(to)
    return name


@each_manifest
def test_full_size_autoencoder_has_the_published_names_and_shapes(path):
    sat = shapes_in(path, "sat", "vae", "required")
    renamed = vae_from_sat(Tensors(path, sat | {"loss.logvar": ()}, lambda name, rows: name))
    assert renamed.shapes == shapes_in(path, "diffusers", "vae", "keys")
    assert dict(renamed) == {published(name): name for name in sat}


@torch.no_grad()
@pytest.mark.parametrize("path", files(), ids=lambda p: p.stem)
def test_original_file(path, tmp_path):
    vae, g = vae_of(path)
    twin, weights = path.with_suffix(".sat_weights.safetensors"), vae.state_dict()
    if twin.exists():
        original = read_golden(twin)[0]
    else:  # the golden's levels are the full model's, its blocks per level are fewer
        names = shapes_in(MANIFESTS[0], "sat", "vae", "required")
        original = {name: weights[published(name)] for name in names if published(name) in weights}
    assert len(original) == len(weights)
    file = tmp_path / "3d-vae.pt"
    torch.save({"state_dict": original | {"loss.discriminator.weight": torch.zeros(3)}}, file)
    tensors = vae_from_sat(open_tensors(file))
    with torch.device("meta"):
        other = CogVideoXVAE(**config_from_shapes(tensors.shapes), scale=vae.scale,
                             groups=vae.encoder.norm_out.num_groups)
    load(other, tensors)
    for name, value in weights.items():
        assert torch.equal(other.state_dict()[name], value), name
    again = vae_from_sat(Tensors(file, shapes_of(weights), lambda name, rows: weights[name]))
    assert again.shapes == shapes_of(weights)  # published names stay
