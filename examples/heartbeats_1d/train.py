"""Heartbeats: a small set of queries learns to find and to name the beats of a simulated ECG.

    python train.py --image heartbeats.png

Queries start on an even grid, look at the signal at two rates through one-dimensional deformable
attention, and move layer by layer to the beats they find.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from ecg import NORMAL, RATE, SAMPLES, SECONDS, TEST, TRAIN, VENTRICULAR, heartbeats, rule_of_thumb
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

from saccade.nn import MultiScaleDeformableAttention
from saccade.terminal import MAX_THREADS

NONE = 2  # class of a query that predicts no beat
TOLERANCE = 0.05  # seconds between a beat and its prediction
QUERIES, LAYERS, CHANNELS, BATCH = 32, 3, 32, 32

Windows = list[tuple[np.ndarray, np.ndarray, np.ndarray]]
Truth = list[tuple[Tensor, Tensor]]


class Layer(nn.Module):
    """Self attention among the queries, deformable cross attention, and a feed-forward network."""

    def __init__(self) -> None:
        super().__init__()
        self.self_attention = nn.MultiheadAttention(CHANNELS, 4, batch_first=True)
        self.cross_attention = MultiScaleDeformableAttention(
            CHANNELS, 4, num_levels=2, spatial_dims=1
        )
        self.feed_forward = nn.Sequential(
            nn.Linear(CHANNELS, 4 * CHANNELS), nn.ReLU(), nn.Linear(4 * CHANNELS, CHANNELS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(CHANNELS) for _ in range(3))

    def forward(self, query: Tensor, position: Tensor, reference: Tensor, *value: Any) -> Any:
        positioned = query + position
        query = self.norms[0](
            query + self.self_attention(positioned, positioned, query, need_weights=False)[0]
        )
        seen, sampling = self.cross_attention(
            query + position, reference, *value, return_sampling=True
        )
        query = self.norms[1](query + seen)
        return self.norms[2](query + self.feed_forward(query)), sampling


class BeatFinder(nn.Module):
    """A stem of short convolutions, then layers of deformable attention that move the queries."""

    def __init__(self, freeze_offsets: bool = False) -> None:
        super().__init__()
        # A position of the coarse level sees 0.2 s of signal; the attention reads what lies beyond.
        self.fine = nn.Sequential(
            nn.Conv1d(1, CHANNELS, 7, 2, 3), nn.GroupNorm(4, CHANNELS), nn.ReLU(),
            nn.Conv1d(CHANNELS, CHANNELS, 5, 2, 2), nn.GroupNorm(4, CHANNELS),
        )  # fmt: skip
        self.coarse = nn.Sequential(
            nn.ReLU(), nn.Conv1d(CHANNELS, CHANNELS, 3, 2, 1), nn.GroupNorm(4, CHANNELS)
        )
        self.position = nn.Parameter(torch.randn(QUERIES, CHANNELS))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.kind = nn.ModuleList(nn.Linear(CHANNELS, 3) for _ in range(LAYERS))
        self.move = nn.ModuleList(nn.Linear(CHANNELS, 1) for _ in range(LAYERS))
        frozen = [layer.cross_attention.sampling_offsets for layer in self.layers if freeze_offsets]
        for linear in (*self.move, *frozen):  # The queries do not move at first.
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        for linear in frozen:
            linear.requires_grad_(False)

    def forward(self, signal: Tensor) -> tuple[list[tuple[Tensor, Tensor]], Any]:
        """Returns (kind logits [B, Q, 3], times [B, Q] as parts of the window) of each layer."""
        fine = self.fine(signal[:, None])
        coarse = self.coarse(fine)
        value = torch.cat([fine, coarse], -1).transpose(1, 2)
        shapes = [(fine.shape[-1],), (coarse.shape[-1],)]
        query = value.new_zeros(len(signal), QUERIES, CHANNELS)
        reference = (torch.arange(QUERIES) + 0.5).div(QUERIES).expand(len(signal), -1)
        outputs = []
        for layer, kind, move in zip(self.layers, self.kind, self.move, strict=True):
            query, sampling = layer(query, self.position, reference[..., None, None], value, shapes)
            moved = reference + move(query)[..., 0] / QUERIES  # in steps of the grid
            outputs.append((kind(query), moved))
            reference = moved.detach()
        return outputs, sampling


def make_batch(windows: Windows) -> tuple[Tensor, Truth]:
    """Returns signals and, for each, the beats' times as parts of the window and their kinds."""
    # The edge of the map lies half a sample before the first sample.
    truth = [
        (torch.from_numpy((times + 0.5 / RATE) / SECONDS).float(), torch.from_numpy(kinds))
        for _, times, kinds in windows
    ]
    return torch.from_numpy(np.stack([signal for signal, *_ in windows])), truth


def set_loss(logits: Tensor, times: Tensor, truth: Truth) -> Tensor:
    """Matches queries and beats one to one; the target of a query without a beat is `NONE`."""
    target = torch.full(logits.shape[:2], NONE)
    distance, chances = times.new_zeros(()), logits.detach().softmax(-1)
    for i, (true, kinds) in enumerate(truth):
        distances = (times[i][:, None] - true).abs() * QUERIES
        chosen, beat = linear_sum_assignment(distances.detach() - chances[i][:, kinds])
        target[i, chosen] = kinds[beat]
        distance = distance + distances[chosen, beat].sum()
    beats = sum(len(true) for true, _ in truth)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten()) + distance / beats


@torch.no_grad()
def find(model: nn.Module, windows: Windows) -> tuple[list[tuple[np.ndarray, ...]], Any]:
    """Returns times in seconds, kinds and query indices of the predicted beats, and the last layer's sampling."""
    outputs, sampling = model(make_batch(windows)[0])
    predictions = []
    for logits, times in zip(*outputs[-1], strict=True):
        kinds = logits.argmax(-1)
        queries = (kinds != NONE).nonzero()[:, 0]
        seconds = times[queries].double() * SECONDS - 0.5 / RATE
        predictions.append((seconds.numpy(), kinds[queries].numpy(), queries.numpy()))
    return predictions, sampling


def f1(predictions: list[Any], windows: Windows) -> tuple[float, float]:
    """Returns the F1 score of each kind: right means near a beat of that kind, one for one."""
    scores = []
    for kind in (NORMAL, VENTRICULAR):
        right = total = 0
        for (times, kinds, *_), (_, true_times, true_kinds) in zip(
            predictions, windows, strict=True
        ):
            times, true = times[kinds == kind], true_times[true_kinds == kind]
            near = np.abs(times[:, None] - true) <= TOLERANCE
            right += near[linear_sum_assignment(near, maximize=True)].sum()
            total += len(times) + len(true)
        scores.append(float(2 * right / max(1, total)))
    return scores[0], scores[1]


def draw(path: Path, windows: Windows, predictions: list[Any], sampling: Any) -> None:
    """Draws the first window with both kinds: truth, predictions, and sampling points."""
    shown = next((i for i, window in enumerate(windows) if len(set(window[2])) == 2), 0)
    (signal, true, true_kinds), (times, kinds, queries) = windows[shown], predictions[shown]
    looked = sampling.sampling_locations[shown].flatten(1) * SECONDS - 0.5 / RATE
    weights = sampling.attention_weights[shown].flatten(1)
    row = {query: rank for rank, query in enumerate(queries[np.argsort(times)])}
    figure = Figure(figsize=(9, 5), layout="constrained")
    top, below = figure.subplots(2, sharex=True)
    top.plot(np.arange(SAMPLES) / RATE, signal, color="0.4", linewidth=0.7)
    for kind, name, colour in (
        (NORMAL, "normal", "#0072b2"),
        (VENTRICULAR, "ventricular", "#d55e00"),
    ):
        for values, height, marker, fill, word in (
            (true[true_kinds == kind], 1.35, "v", colour, "truth"),
            (times[kinds == kind], 1.15, "o", "none", "found"),
        ):
            heights = np.full(len(values), height * signal.max())
            top.plot(values, heights, marker, color=colour, mfc=fill, label=f"{name}, {word}")
        for moment in true[true_kinds == kind]:
            below.axvline(moment, color=colour, alpha=0.4, linewidth=0.8)
        for query in queries[kinds == kind]:
            rows = np.full(looked.shape[1], row[query])
            below.scatter(
                looked[query], rows, 300 * weights[query], colour, alpha=0.6, linewidths=0
            )
            below.plot((query + 0.5) * SECONDS / QUERIES, row[query], "|k", markersize=12)
    below.plot([], [], "o", color="0.5", label="looked (area: weight)")
    below.plot([], [], "|k", markersize=12, label="started")
    top.set(ylabel="signal", ylim=(None, 1.5 * signal.max()))
    below.set(xlabel="seconds", ylabel="query that found a beat", xlim=(0, SECONDS), yticks=[])
    for panel in (top, below):
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(path, dpi=100)


def report(name: str, scores: tuple[float, float]) -> None:
    """Prints a line with the mean of both F1 scores, then each of them."""
    mean = sum(scores) / 2
    print(
        f"{name:18} F1 {mean:.3f}  (normal {scores[0]:.3f}, ventricular {scores[1]:.3f})",
        flush=True,
    )


def main(
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the signals.")] = 0,
    threads: Annotated[
        int,
        typer.Option(min=1, max=MAX_THREADS, help="CPU threads; another number rounds otherwise."),
    ] = 1,
    held_out: Annotated[int, typer.Option(help="Held-out windows to score.")] = 400,
    freeze_offsets: Annotated[bool, typer.Option(help="Look at the references only.")] = False,
    image_path: Annotated[
        Path | None, typer.Option("--image", help="PNG to draw a held-out window to.")
    ] = None,
) -> None:
    """Trains on simulated windows and scores held-out ones before and after."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    model = BeatFinder(freeze_offsets)
    windows = [heartbeats(seed, TEST, index) for index in range(held_out)]
    report("rule of thumb", f1([rule_of_thumb(window) for window in windows], windows))
    report("before training", f1(find(model, windows)[0], windows))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(steps):
        numbers = range(step * BATCH, (step + 1) * BATCH)
        signals, truth = make_batch([heartbeats(seed, TRAIN, number) for number in numbers])
        # Every layer predicts, so that the first layers learn as fast as the last.
        loss = torch.stack([set_loss(*output, truth) for output in model(signals)[0]]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 200 == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    seconds = time.perf_counter() - start
    predictions, sampling = find(model, windows)
    report("after training", f1(predictions, windows))
    print(f"{seconds:.0f} s of training")
    if image_path:
        draw(image_path, windows, predictions, sampling)


if __name__ == "__main__":
    typer.run(main)
