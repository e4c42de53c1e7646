"""Speed of models/cogvideox.py against diffusers' CogVideoXTransformer3DModel: same weights, input and thread
count, alternating in one run, for the position embeddings of 2b and of 5b.

    pip install diffusers && OMP_NUM_THREADS=1 python tests/bench_cogvideox.py

Prints the largest difference of the two outputs and the ratio of the fastest times, ours / theirs.
"""
import sys
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.cogvideox import CogVideoX  # noqa: E402
from tests.bench import race  # noqa: E402

DEPTH, HEADS, HEAD_DIM, TEXT, BATCH, ROUNDS = 4, 6, 64, 32, 2, 12
T, H, W = 5, 16, 24

for rotary in (False, True):
    torch.manual_seed(0)
    ours = CogVideoX(depth=DEPTH, heads=HEADS, head_dim=HEAD_DIM, in_channels=16, text_dim=512, time_dim=512,
                     rotary=rotary, grid=(H // 2, W // 2))
    theirs = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=16, out_channels=16,
        time_embed_dim=512, text_embed_dim=512, num_layers=DEPTH, sample_width=W, sample_height=H,
        sample_frames=4 * T - 3, max_text_seq_length=TEXT, use_rotary_positional_embeddings=rotary)
    theirs.load_state_dict(ours.state_dict())

    x, index = torch.randn(BATCH, T, 16, H, W), torch.randint(1000, (BATCH,))
    context, table = torch.randn(BATCH, TEXT, 512), None
    if rotary:  # made once per video, as the pipeline does; ours is kept from call to call
        table = get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), (H // 2, W // 2)), (H // 2, W // 2), T)
    calls = {"ours": lambda: ours(x, (index + 1) / 1000, (context, None)),
             "diffusers": lambda: theirs(x, context, index, image_rotary_emb=table, return_dict=False)[0]}
    print("rotary" if rotary else "sincos")
    race(calls, ROUNDS)
