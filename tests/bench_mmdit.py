"""Speed of models/mmdit.py against diffusers' SD3Transformer2DModel: same weights, input and thread count,
alternating in one run.

    pip install diffusers && OMP_NUM_THREADS=1 python tests/bench_mmdit.py

Prints the largest difference of the two outputs and the ratio of the fastest times, ours / theirs.
"""
import sys
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.diffusers_names import mmdit_to_diffusers  # noqa: E402
from models.mmdit import MMDiT  # noqa: E402
from tests.bench import race  # noqa: E402

DEPTH, WIDTH, LATENT, TEXT, BATCH, ROUNDS = 6, 384, 32, 154, 2, 15

torch.manual_seed(0)
ours = MMDiT(depth=DEPTH, width=WIDTH, heads=DEPTH, patch=2, in_channels=16, pos_grid=24, context_dim=512,
             pooled_dim=256, qk_norm=True, attn2=())
theirs = SD3Transformer2DModel(
    sample_size=LATENT, patch_size=2, in_channels=16, num_layers=DEPTH, attention_head_dim=WIDTH // DEPTH,
    pos_embed_max_size=24, num_attention_heads=DEPTH, joint_attention_dim=512, caption_projection_dim=WIDTH,
    pooled_projection_dim=256, qk_norm="rms_norm")
torch.nn.init.normal_(ours.pos_embed, std=0.02)
state = {}
for name, value in ours.state_dict().items():
    module, _, kind = name.rpartition(".") if name != "pos_embed" else (name, "", "")
    for spelling, cuts in mmdit_to_diffusers(module, value.shape[0] if module != "pos_embed" else 1, ours).items():
        state[f"{spelling}.{kind}".rstrip(".")] = torch.cat([value[a:b] for a, b in cuts])
theirs.load_state_dict(state)

x, t = torch.randn(BATCH, 16, LATENT, LATENT), torch.rand(BATCH)
context, pooled = torch.randn(BATCH, TEXT, 512), torch.randn(BATCH, 256)
calls = {"ours": lambda: ours(x, t, (context, pooled)),
         "diffusers": lambda: theirs(x, context, pooled, 1000 * t, return_dict=False)[0]}
race(calls, ROUNDS)
