"""Speed of models/wan.py against diffusers' WanTransformer3DModel: same weights, input and thread count,
alternating in one run.

    pip install diffusers && OMP_NUM_THREADS=1 python tests/bench_wan.py

Prints the largest difference of the two outputs and the ratio of the fastest times, ours / theirs.
"""
import sys
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.diffusers_names import wan_to_diffusers  # noqa: E402
from models.wan import Wan  # noqa: E402
from tests.bench import race  # noqa: E402

DEPTH, HEADS, HEAD_DIM, FFN, BATCH, ROUNDS = 4, 3, 128, 1536, 1, 12
T, H, W = 5, 16, 24

torch.manual_seed(0)
ours = Wan(depth=DEPTH, width=HEADS * HEAD_DIM, heads=HEADS, ffn_dim=FFN, freq_dim=256, text_dim=512,
           in_channels=16, patch=2)
theirs = WanTransformer3DModel(num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=512, ffn_dim=FFN,
                               num_layers=DEPTH)
state = {}
for name, value in ours.state_dict().items():
    module, dot, kind = name.rpartition(".") if name.endswith(("weight", "bias")) else (name, "", "")
    (spelling, _), = wan_to_diffusers(module, len(value), ours).items()
    state[spelling + dot + kind] = value
theirs.load_state_dict(state)

x, t, context = torch.randn(BATCH, T, 16, H, W), torch.rand(BATCH), torch.randn(BATCH, 512, 512)  # 512 text tokens
clip = x.transpose(1, 2)
calls = {"ours": lambda: ours(x, t, (context, None)).transpose(1, 2),
         "diffusers": lambda: theirs(clip, 1000 * t, context, return_dict=False)[0]}
race(calls, ROUNDS)
