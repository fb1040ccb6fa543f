"""A detector of MMDetection on a CPU, with and without Saccade, without compiling mmcv.

python compare.py                                    # Deformable DETR, random weights
python compare.py --config my_config.py --checkpoint my.pth photo.jpg
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

import saccade
from saccade.integrations import extensions

# Called before mmcv.ops is imported, which needs its compiled module. Nothing is compiled.
extensions.install("mmcv._ext")

import mmdet  # noqa: E402
from mmdet.apis import inference_detector, init_detector  # noqa: E402

SCENE = Path(__file__).resolve().parent.parent / "digit_scenes/scenes/scene_0.png"
CONFIG = "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"


def main() -> None:
    """Finds objects with and without Saccade, and prints how the results and the times compare."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("picture", nargs="?", default=SCENE)
    arguments.add_argument(
        "--config", default=Path(mmdet.__file__).parent / ".mim/configs" / CONFIG
    )
    arguments.add_argument("--checkpoint", help="without it, random numbers")
    arguments.add_argument("--rounds", type=int, default=3)
    chosen = arguments.parse_args()

    torch.manual_seed(0)
    model = init_detector(str(chosen.config), chosen.checkpoint, palette="random", device="cpu")
    if chosen.checkpoint is None:
        # Fresh queries all look at the same places; let them look at different ones.
        for name, parameter in model.named_parameters():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                torch.nn.init.normal_(parameter, std=0.05)

    print(saccade.patch(model))
    # For each decoder layer the scores and boxes of all queries, before the best are chosen.
    predicted: list[torch.Tensor] = []
    model.bbox_head.register_forward_hook(lambda head, given, output: predicted.extend(output))

    # The two take turns, so that whatever else this machine does slows down both.
    outputs, seconds = {}, {"mmcv": [], "saccade": []}
    for turn in range(chosen.rounds + 1):
        for name, change in (("mmcv", saccade.unpatch), ("saccade", saccade.patch)):
            change(model)
            predicted.clear()
            begin = time.perf_counter()
            detections = inference_detector(model, str(chosen.picture)).pred_instances
            if turn > 0:  # the first round is slower, in other parts
                seconds[name].append(time.perf_counter() - begin)
            outputs[name] = list(predicted)

    pairs = zip(outputs["mmcv"], outputs["saccade"], strict=True)
    difference = max(float((before - after).abs().max()) for before, after in pairs)
    print(
        f"{len(detections)} boxes; scores and boxes of all queries differ by {difference:.1g} at most"
    )
    times = {name: statistics.median(taken) for name, taken in seconds.items()}
    each = ", ".join(f"{name} {taken:.2f} s" for name, taken in times.items())
    print(f"a picture: {each}: {times['mmcv'] / times['saccade']:.2f} times as fast")


if __name__ == "__main__":
    main()
