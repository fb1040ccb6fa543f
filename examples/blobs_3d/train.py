"""Blobs: a grid of queries learns to find balls among tubes in a noisy volume.

    python train.py --image blobs.png

Like nodules between the vessels of a lung: a slice can show both as discs, and the third direction
tells them apart. Queries start on an even grid, look at the volume through three-dimensional
deformable attention, and move layer by layer to the balls they find.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from volumes import SHAPE, TEST, TRAIN, blobs, rule_of_thumb

from saccade.nn import DeformableAttention
from saccade.terminal import MAX_THREADS

GRID = (3, 4, 4)  # where the queries start: 8 voxels apart along depth, height and width
TOLERANCE = 2.0  # voxels between a blob's centre and its prediction
LAYERS, HEADS, CHANNELS, BATCH = 3, 4, 32, 8
SIZE = torch.tensor(SHAPE[::-1])  # locations are (x, y, z)
STEP = 1 / torch.tensor(GRID[::-1])  # between neighbouring queries, as parts of the volume
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

Volumes = list[tuple[np.ndarray, np.ndarray, np.ndarray]]


class Layer(nn.Module):
    """Self attention among the queries, deformable cross attention, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        self.cross_attention = DeformableAttention(
            CHANNELS, HEADS, 6, spatial_dims=3, predict_reference_points=False
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(CHANNELS, 4 * CHANNELS), nn.ReLU(), nn.Linear(4 * CHANNELS, CHANNELS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(3))

    def forward(
        self, query: Tensor, position: Tensor, reference: Tensor, feature_map: Tensor
    ) -> Any:
        positioned = query + position
        query = self.norms[0](
            query + self.self_attention(positioned, positioned, query, need_weights=False)[0]
        )
        seen, sampling = self.cross_attention(
            query + position, feature_map, reference, return_sampling=True
        )
        query = self.norms[1](query + seen)
        return self.norms[2](query + self.feed_forward(query)), sampling


class BlobFinder(nn.Module):
    """A stem of short convolutions, then layers of deformable attention that move the queries."""

    def __init__(self, freeze_offsets: bool = False) -> None:
        super().__init__()
        # A position of the map sees 7 voxels across; the attention reads what lies beyond.
        self.stem = nn.Sequential(
            nn.Conv3d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(),
            nn.Conv3d(16, CHANNELS, 3, 1, 1), nn.GroupNorm(4, CHANNELS),
        )  # fmt: skip
        axes = [(torch.arange(n) + 0.5) / n for n in GRID]
        start = torch.stack(torch.meshgrid(*axes, indexing="ij")[::-1], -1).flatten(0, 2)
        self.register_buffer("start", start)
        self.position = nn.Sequential(
            nn.Linear(3, CHANNELS), nn.ReLU(), nn.Linear(CHANNELS, CHANNELS)
        )
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.score = nn.ModuleList(nn.Linear(CHANNELS, 1) for _ in range(LAYERS))
        self.move = nn.ModuleList(nn.Linear(CHANNELS, 3) for _ in range(LAYERS))
        frozen = [layer.cross_attention.sampling_offsets for layer in self.layers if freeze_offsets]
        for linear in (*self.move, *frozen):  # The queries do not move at first.
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in frozen:
            linear.requires_grad_(False)

    def forward(self, volume: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        """Returns (logits [B, Q], centres [B, Q, 3] as parts of the volume) of each layer."""
        feature_map = self.stem(volume[:, None]).permute(0, 2, 3, 4, 1)
        query = feature_map.new_zeros(len(volume), len(self.start), CHANNELS)
        reference = self.start.expand(len(volume), -1, -1)
        outputs = []
        for layer, score, move in zip(self.layers, self.score, self.move, strict=True):
            query, sampling = layer(query, self.position(reference * 4 - 2), reference, feature_map)
            moved = reference + move(query) * STEP
            outputs.append((score(query)[..., 0], moved))
            reference = moved.detach()
        return outputs, sampling


def make_batch(volumes: Volumes) -> tuple[Tensor, list[Tensor]]:
    """Returns volumes and, for each, the centres as parts of the volume."""
    # The volume's edge lies half a voxel before its first voxel.
    truth = [(torch.from_numpy(centres + 0.5) / SIZE).float() for _, centres, _ in volumes]
    return torch.from_numpy(np.stack([volume for volume, *_ in volumes])), truth


def set_loss(logits: Tensor, centres: Tensor, truth: list[Tensor]) -> Tensor:
    """Matches queries and blobs one to one; the target of a query without a blob is 0."""
    target = torch.zeros_like(logits)
    distance, chances = centres.new_zeros(()), logits.detach().sigmoid()
    for i, true in enumerate(truth):
        distances = ((centres[i][:, None] - true) / STEP).abs().sum(-1)
        chosen, blob = linear_sum_assignment(distances.detach() - chances[i][:, None])
        target[i, chosen] = 1
        distance = distance + distances[chosen, blob].sum()
    doubt = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
    return (doubt + distance) / sum(len(true) for true in truth)


@torch.no_grad()
def find(model: nn.Module, volumes: Volumes) -> tuple[list[tuple[np.ndarray, ...]], Any]:
    """Returns centres in voxels and query indices of the predicted blobs, and the last layer's sampling."""
    outputs, sampling = model(make_batch(volumes)[0])
    predictions = []
    for logits, centres in zip(*outputs[-1], strict=True):
        queries = (logits > 0).nonzero()[:, 0]
        predictions.append(((centres[queries] * SIZE - 0.5).numpy(), queries.numpy()))
    return predictions, sampling


def f1(predictions: list[Any], volumes: Volumes) -> float:
    """Returns the F1 score: right means within the tolerance of a blob's centre, one for one."""
    right = total = 0
    for (centres, *_), (_, true, _) in zip(predictions, volumes, strict=True):
        near = np.linalg.norm(centres[:, None] - true, axis=-1) <= TOLERANCE
        right += near[linear_sum_assignment(near, maximize=True)].sum()
        total += len(centres) + len(true)
    return float(2 * right / max(1, total))


def draw(path: Path, volumes: Volumes, predictions: list[Any], sampling: Any) -> None:
    """Draws the first volume of at least three blobs from two sides, with the predictions."""
    shown = next((i for i, (_, true, _) in enumerate(volumes) if len(true) >= 3), 0)
    (volume, true, radii), (centres, queries) = volumes[shown], predictions[shown]
    looked = sampling.sampling_locations[shown, queries].flatten(1, 2) * SIZE - 0.5
    weights = sampling.attention_weights[shown, queries].flatten(1)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for panel, name, axis, row in zip(panels, "zy", (0, 1), (1, 2), strict=True):
        panel.imshow(volume.max(axis), cmap="gray_r", vmin=0.3, vmax=2.2)
        panel.set(title=f"brightest along {name}", xlabel="x", ylabel="xyz"[row])
        # Some points lie far outside, where the map counts as 0.
        panel.set(xlim=(-3, SHAPE[2] + 2), ylim=(SHAPE[2 - row] + 2, -3))
        for centre, radius in zip(true, radii, strict=True):
            panel.add_patch(Circle(centre[[0, row]], radius, fill=False, linewidth=1.5))
        for number, centre in enumerate(centres):
            colour = COLOURS[number % len(COLOURS)]
            points = looked[number]
            panel.scatter(points[:, 0], points[:, row], 90 * weights[number], colour, linewidths=0)
            panel.plot(centre[0], centre[row], "x", color=colour, markersize=9, markeredgewidth=2)
    panel.plot([], [], "ok", mfc="none", markersize=10, label="truth")
    panel.plot([], [], "xk", markersize=8, label="found")
    panel.plot([], [], "ok", markersize=4, label="looked (area: weight)")
    figure.legend(
        *panel.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False
    )
    figure.savefig(path, dpi=100)


def report(name: str, score: float) -> None:
    """Prints a line with an F1 score."""
    print(f"{name:18} F1 {score:.3f}", flush=True)


def main(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the volumes.")] = 0,
    threads: Annotated[
        int,
        typer.Option(min=1, max=MAX_THREADS, help="CPU threads; another number rounds otherwise."),
    ] = 1,
    held_out: Annotated[int, typer.Option(help="Held-out volumes to score.")] = 400,
    freeze_offsets: Annotated[bool, typer.Option(help="Look at the references only.")] = False,
    image_path: Annotated[
        Path | None, typer.Option("--image", help="PNG to draw a held-out volume to.")
    ] = None,
) -> None:
    """Trains on drawn volumes and scores held-out ones before and after."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = BlobFinder(freeze_offsets)
    volumes = [blobs(seed, TEST, index) for index in range(held_out)]
    report("rule of thumb", f1([rule_of_thumb(volume) for volume, *_ in volumes], volumes))
    report("before training", f1(find(model, volumes)[0], volumes))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        numbers = range(step * BATCH, (step + 1) * BATCH)
        batch, truth = make_batch([blobs(seed, TRAIN, number) for number in numbers])
        # Every layer predicts, so that the first layers learn as fast as the last.
        loss = torch.stack([set_loss(*output, truth) for output in model(batch)[0]]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start
    predictions, sampling = find(model, volumes)
    report("after training", f1(predictions, volumes))
    print(f"{seconds:.0f} s of training")
    if image_path:
        draw(image_path, volumes, predictions, sampling)


if __name__ == "__main__":
    typer.run(main)
