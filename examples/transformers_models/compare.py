"""A transformers model, with and without Saccade: one call, the same detections.

python compare.py                                       # the detector that comes with Saccade
python compare.py --model SenseTime/deformable-detr photo.jpg
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

import saccade
from saccade.doctor import DEFAULT_MODEL

SCENE = Path(__file__).resolve().parent.parent / "digit_scenes/scenes/scene_0.png"


def main() -> None:
    """Finds objects with and without Saccade, and prints how the results and the times compare."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("picture", nargs="?", type=Path, default=SCENE)
    arguments.add_argument("--model", default=DEFAULT_MODEL, help="a name on the hub, or a folder")
    arguments.add_argument("--rounds", type=int, default=10)
    chosen = arguments.parse_args()

    # Code that comes with a model does not run.
    options = {"trust_remote_code": False}
    processor = AutoImageProcessor.from_pretrained(chosen.model, **options)
    model = AutoModelForObjectDetection.from_pretrained(chosen.model, **options).eval()
    picture = Image.open(chosen.picture).convert("RGB")
    inputs = processor(images=picture, return_tensors="pt")
    sizes = [(picture.height, picture.width)]

    print(saccade.patch(model))

    # The two take turns, so that whatever else this machine does slows down both.
    detections, seconds = {}, {"transformers": [], "saccade": []}
    for turn in range(chosen.rounds + 1):
        for name, change in (("transformers", saccade.unpatch), ("saccade", saccade.patch)):
            change(model)
            begin = time.perf_counter()
            with torch.inference_mode():
                outputs = model(**inputs)
            if turn > 0:  # the first round is slower, in other parts
                seconds[name].append(time.perf_counter() - begin)
            (detections[name],) = processor.post_process_object_detection(
                outputs, threshold=0.5, target_sizes=sizes
            )

    before, after = detections["transformers"], detections["saccade"]
    print(f"{len(after['boxes'])} objects in {chosen.picture.name}:")
    for label, score, box in zip(after["labels"], after["scores"], after["boxes"], strict=True):
        name = model.config.id2label[label.item()]
        print(f"  {name} {score:.3f} at {[round(number) for number in box.tolist()]}")
    same = torch.equal(before["labels"], after["labels"])
    moved = (before["boxes"] - after["boxes"]).abs().max() if same else float("nan")
    print(f"without saccade: {'the same' if same else 'other'} labels, boxes to {moved:.1g} pixels")
    times = {name: statistics.median(taken) for name, taken in seconds.items()}
    each = ", ".join(f"{name} {1e3 * taken:.0f} ms" for name, taken in times.items())
    print(f"a picture: {each}: {times['transformers'] / times['saccade']:.2f} times as fast")


if __name__ == "__main__":
    main()
