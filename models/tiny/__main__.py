"""Train the embedded teachers of captioned shapes.

    python -m models.tiny                # all of them
    python -m models.tiny --only sdxl    # one: sd3 (with the image models' VAE), sdxl, sam, cogvideox, animatediff
"""
import argparse
from pathlib import Path

from models.tiny.animatediff import train_animatediff
from models.tiny.images import train_sam, train_teacher
from models.tiny.video import train_video


def main() -> None:
    names = ("sd3", "sdxl", "sam", "cogvideox", "animatediff")
    parser = argparse.ArgumentParser(description="Train the tiny teachers on captioned shapes.")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="resumable state, sample grids")
    parser.add_argument("--only", choices=names, help="default: all of them")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in (args.only,) if args.only else names:
        if name == "sam":
            train_sam(args.out)
        elif name == "cogvideox":
            train_video(args.out)
        elif name == "animatediff":
            train_animatediff(args.out)
        else:
            train_teacher(name, args.out)


if __name__ == "__main__":
    main()
