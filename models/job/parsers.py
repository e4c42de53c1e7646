"""The scripts' command lines. Imports no PyTorch, which takes seconds: --help answers at once."""
import argparse
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from models import __version__
from models.presets import PRESETS, Preset

try:
    VERSION = f"DMDX and AVDM2 {__version__}, PyTorch {version('torch')}"
except PackageNotFoundError:
    sys.exit("PyTorch is missing: pip install -r requirements.txt")
PRECISIONS = ("fp32", "bf16", "fp16")


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows each flag's default; None is the preset's value where the preset has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "default" in action.help:
            return action.help
        if action.default is None and action.dest in Preset._fields:
            return f"{action.help} (default: the preset's)"
        silent = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return action.help if silent else f"{action.help} (default: %(default)s)"


def path(text: str) -> Path:
    """Of a flag: an empty one, of a shell's unset variable, would be the folder one stands in."""
    if not text or "\n" in text:
        raise argparse.ArgumentTypeError("expected a path of one line" + ", found none" * (not text))
    return Path(text)


def new_parser(script: str, doc: str, formatter: type = Help) -> argparse.ArgumentParser:
    """Without flags; `script` is its file. A wrong flag is one sentence, as all errors are, without the usage."""
    parser = argparse.ArgumentParser(prog=Path(script).name, description=doc, formatter_class=formatter)
    parser.register("type", Path, path)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: error: {message}\n")
    parser.add_argument("--version", action="version", version=VERSION)
    return parser


def model_parser(script: str, doc: str) -> argparse.ArgumentParser:
    """The flags of every script that loads a model; `script` is its file."""
    parser = new_parser(script, doc)
    add = parser.add_argument_group("model files").add_argument
    add("--model", choices=PRESETS, default="tiny-sd3", help="row of models/presets.py")
    add("--ckpt", type=Path, help="original single file, or a folder in diffusers' layout; else the hub's")
    add("--motion-ckpt", type=Path, help="AnimateDiff's motion modules, as mm_sd_v15_v2.ckpt")
    add("--text-ckpt", type=Path, help="folder of clip_l, clip_g and t5xxl files, or in diffusers' layout; "
        "CogVideoX, Wan: folder or file of T5")
    add("--vae-ckpt", type=Path, help="file or folder of the VAE, where it is not in or beside --ckpt")
    add("--tokenizers", help="folder or hub repository with tokenizer/ and tokenizer_3/")
    add("--no-t5", action="store_true", help="SD3: zeros in place of T5's tokens")
    add("--null-prompt", choices=("zeros", "empty", "negative"),
        help="unconditional of CogVideoX: zeros (default), as it was trained, or the encoded empty prompt; of Wan: the "
        "original's negative prompt (default), or the empty one")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="pixels")
    add("--frames", type=int, help="of a video; CogVideoX: 8 k + 1, Wan: 4 k + 1, AnimateDiff: at most 32")
    add = parser.add_argument_group("memory and ranks").add_argument
    add("--precision", choices=("bf16", "fp32"), help="of the computation; default bf16 on GPU, fp32 on CPU")
    add("--vae-precision", choices=("bf16", "fp32"), default="fp32", help="of the VAE, whose fp16 overflows")
    add("--offload", action="store_true", help="parameters and optimizer state on the CPU (FSDP2 offload)")
    add("--no-reshard", action="store_true", help="keep gathered weights until a backward or an update")
    add("--compile", action="store_true", help="torch.compile of each block of the denoisers")
    add("--shard-ranks", type=int, help="ranks that share one copy of the networks; default: one node")
    add("--sequence-parallel", type=int, default=1, metavar="K", help="ranks that share each video's tokens")
    add("--context-parallel", type=int, metavar="K",
        help="ranks that share the decoding of a video's frames; default: those of --sequence-parallel")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.set_defaults(no_checkpointing=True, random_weights=False, init=None, cache_text=None,  # for those without
                        offload_activations=False)
    return parser


def heading(parser: argparse.ArgumentParser, title: str) -> Callable:
    """What adds a flag under a heading that the parser has."""
    return next(group for group in parser._action_groups if group.title == title).add_argument


def training_parser(script: str, doc: str) -> tuple[argparse.ArgumentParser, Callable]:
    """The flags of every training script, and what adds one under the heading "algorithm"."""
    parser = model_parser(script, doc)
    add = heading(parser, "memory and ranks")
    add("--micro-batch", type=int, help="samples per forward on one rank")
    add("--no-checkpointing", action="store_true", default=None,
        help="keep activations, do not compute them twice")
    add("--offload-activations", action="store_true",
        help="what checkpointing keeps of a forward waits on the CPU: for long videos")
    add("--cache-text", type=Path, metavar="FOLDER",
        help="encode every prompt into this folder, once, and train without the text encoders")
    algorithm = parser.add_argument_group("algorithm").add_argument
    algorithm("--max-iter", type=int, help="generator updates")
    algorithm("--batch-size", type=int, help="samples per update, over all ranks and accumulation steps")
    algorithm("--lr-theta", type=float, help="learning rate of the generator")
    algorithm("--shift", type=float, help="of the generator's times, and of a flow teacher's")
    algorithm("--lr-decay", type=float, metavar="SHARE",
        help="last share of the updates, over which all rates fall to 0")
    algorithm("--ema", type=float, metavar="DECAY",
        help="of the generator's moving average, which is sampled and exported; 0: none")
    add = parser.add_argument_group("run").add_argument
    add("--out", type=Path, help="run folder; default runs/SCRIPT-MODEL-NNN")
    add("--resume", nargs="?", const="newest", metavar="STATE",
        help="continue --out (or the newest run) from its newest complete state")
    add("--save-every", type=int, default=500, metavar="N", help="generator updates")
    add("--sample-every", type=int, default=500, metavar="N", help="generator updates")
    # [choice] --init goes on from it exactly; in bf16 it computes as it did in training on GPUs
    add("--export-dtype", choices=PRECISIONS, default="fp32", help="of the exported generator")
    add = parser.add_argument_group("evaluation").add_argument
    add("--evaluate", type=int, metavar="N", help="samples of each row of the closing comparison; 0: none")
    add("--evaluate-every", type=int, default=0, metavar="N",
        help="generator updates between figures of --evaluate samples in evaluation.jsonl; 0: never")
    add("--evaluate-metrics", nargs="+", choices=("shapes", "clip", "pickscore", "hpsv2", "mps"),
        metavar="METRIC", help="default: shapes for the tiny models, clip for others (evaluate.py)")
    add = parser.add_argument_group("profiling").add_argument
    add("--profile", type=int, metavar="K", help="K generator updates, then seconds, GiB and evaluations per phase")
    add("--random-weights", action="store_true", help="full-size networks, no checkpoint or text encoders")
    return parser, algorithm


def distillation_parser(script: str, doc: str) -> tuple[argparse.ArgumentParser, Callable]:
    """`training_parser` with the flags that ADM and its baseline DMD have in common."""
    parser, add = training_parser(script, doc)
    add("--prompts", type=Path, nargs="+", help=".txt, .jsonl, .csv, .tsv or .json")
    add("--init", type=Path, metavar="RUN",
        help="start the generator from this run's, as of adp.py; with --lora-rank from its adapter")
    add("--steps", type=int, help="N, steps of the generator")
    add("--ttur", type=int, default=1, help="updates of the fake model per update of the generator")
    add("--cfg", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of the real score's guidance")
    add("--generator-cfg-offset", type=float, metavar="X",
        help="guide the generator too, at the real score's scale less X (Table 3, w/ CFG: 2)")
    add("--lora-rank", type=int, help="rank of the generator's adapter; 0 trains all weights")
    add("--fake-lora", type=int, nargs="?", const=64, default=0, metavar="RANK",
        help="the fake model is an adapter too (rank 64): with --lora-rank all networks share one base")
    add("--lr-psi", type=float, help="learning rate of the fake model")
    return parser, add


def add_discriminator_flags(parser: argparse.ArgumentParser, add: Callable) -> None:
    add("--lr-tau", type=float, help="learning rate of the discriminator, or of both")
    heading(parser, "memory and ranks")("--d-precision", choices=("bf16", "fp32"),
        help="of the latent discriminator and its backbone; default: --precision, which needs no copy of the teacher")


def add_clip_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("real clips").add_argument
    add("--videos", type=Path, help="folder of videos and a .csv file with their captions")
    add("--prompts", "--table", dest="table", type=Path, help="the .csv file, where it is not the only one in --videos")
    add("--latents", type=Path, help="folder that `python -m models.job.latents` has made, in place of --videos")
    add("--stride", type=int, default=4, help="of the frames")
    add("--workers", type=int, default=4, help="videos that a rank decodes side by side")
