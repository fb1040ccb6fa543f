"""Makes the README's image: `python docs/images/make.py`, from what `saccade detect` writes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
SCENE = HERE.parent.parent / "examples/digit_scenes/scenes/scene_0.png"
HEIGHT = 640
GAP = 16


def main() -> None:
    """Detections and looks of the shipped scene, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "saccade", "detect", SCENE, "--out", folder], check=True
        )
        parts = []
        for kind in ("detections", "looked"):
            with Image.open(Path(folder) / f"{SCENE.stem}_{kind}.png") as image:
                width = round(image.width * HEIGHT / image.height)
                parts.append(image.convert("RGB").resize((width, HEIGHT), Image.Resampling.LANCZOS))
    total = sum(part.width for part in parts) + GAP
    whole = Image.new("RGB", (total, HEIGHT), "white")
    whole.paste(parts[0], (0, 0))
    whole.paste(parts[1], (parts[0].width + GAP, 0))
    whole.save(HERE / "readme.png", optimize=True)


if __name__ == "__main__":
    main()
