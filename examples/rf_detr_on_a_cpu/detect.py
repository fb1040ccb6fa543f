"""RF-DETR on a CPU: its package as PyPI has it, with and without Saccade.

python detect.py                                        # random weights, a shipped picture
python detect.py photo.jpg --weights rf-detr-nano.pth   # yours
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import rfdetr
import torch
from PIL import Image

import saccade

SCENE = Path(__file__).resolve().parent.parent / "digit_scenes/scenes/scene_0.png"


def main() -> None:
    """Finds objects with and without Saccade, and prints how the results and the times compare."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("picture", nargs="?", type=Path, default=SCENE)
    arguments.add_argument("--weights", help="a checkpoint of RF-DETR; without it, random numbers")
    arguments.add_argument("--rounds", type=int, default=10)
    chosen = arguments.parse_args()

    torch.manual_seed(0)
    detector = rfdetr.RFDETRNano(pretrain_weights=chosen.weights, device="cpu")
    if chosen.weights is None:
        # Fresh queries all look at the same places; let them look at different ones.
        for name, parameter in detector.model.model.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                torch.nn.init.normal_(parameter, std=0.05)
    picture = Image.open(chosen.picture).convert("RGB")
    # With random weights all scores are low.
    threshold = 0.5 if chosen.weights else 0.0

    model = detector.model.model
    print(saccade.patch(model))

    # The two take turns, so that whatever else this machine does slows down both.
    results, seconds = {}, {"as published": [], "on saccade": []}
    for turn in range(chosen.rounds + 1):
        for name, change in (("as published", saccade.unpatch), ("on saccade", saccade.patch)):
            change(model)
            begin = time.perf_counter()
            results[name] = detector.predict(picture, threshold=threshold)
            if turn > 0:  # the first round is slower, in other parts
                seconds[name].append(time.perf_counter() - begin)

    before, after = results["as published"], results["on saccade"]
    boxes = abs(before.xyxy - after.xyxy).max(initial=0)
    scores = abs(before.confidence - after.confidence).max(initial=0)
    print(f"{len(after)} boxes, the same to {boxes:.1g} pixels; their scores to {scores:.1g}")
    times = {name: statistics.median(taken) for name, taken in seconds.items()}
    ratio = times["as published"] / times["on saccade"]
    each = ", ".join(f"{name} {1e3 * taken:.0f} ms" for name, taken in times.items())
    print(f"a picture: {each}: {ratio:.2f} times as fast")


if __name__ == "__main__":
    main()
