"""The small trainings among the examples: their data, their scores, and that they run."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from scipy.signal import peak_widths

import saccade

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(folder: str, name: str) -> ModuleType:
    """Imports an example's module under a name of its own: every example has a `train`."""
    spec = importlib.util.spec_from_file_location(
        f"{folder}_{name}", EXAMPLES / folder / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES / folder))  # for what it imports from its own folder
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(EXAMPLES / folder))
    return module


beats = load("heartbeats_1d", "train")
ecg = sys.modules["ecg"]
blobs = load("blobs_3d", "train")
volumes = sys.modules["volumes"]


@pytest.fixture(autouse=True)
def _threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("make", [ecg.heartbeats, volumes.blobs], ids=["heartbeats", "blobs"])
def test_data_depend_on_their_numbers_alone(make):
    first, again = make(3, ecg.TEST, 5), make(3, ecg.TEST, 5)
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    for other in (make(4, ecg.TEST, 5), make(3, ecg.TRAIN, 5), make(3, ecg.TEST, 6)):
        assert not np.array_equal(first[0], other[0])


def test_beats_lie_where_the_quiet_signal_peaks():
    kinds_seen = set()
    for index in range(20):
        signal, times, kinds = ecg.heartbeats(0, ecg.TRAIN, index, noise=0.0)
        inner = (times > 0.2) & (times < ecg.SECONDS - 0.2)
        for moment, kind in zip(times[inner], kinds[inner], strict=True):
            at = round(moment * ecg.RATE)
            around = signal[at - 12 : at + 13]
            peak = at - 12 + int(around.argmax())
            assert abs(peak / ecg.RATE - moment) <= 1 / ecg.RATE
            assert around.max() - around.min() > 0.25
            kinds_seen.add(int(kind))
    assert kinds_seen == {ecg.NORMAL, ecg.VENTRICULAR}


def test_the_quiet_signal_is_steep_at_beats_only():
    for index in range(20):
        signal, times, _ = ecg.heartbeats(0, ecg.TRAIN, index, noise=0.0)
        steep = np.abs(np.diff(signal))
        moments = (np.flatnonzero(steep > 0.5 * steep.max()) + 0.5) / ecg.RATE
        moments = moments[(moments > 0.2) & (moments < ecg.SECONDS - 0.2)]
        assert len(moments) > 0
        assert np.abs(moments[:, None] - times).min(1).max() < 0.1


def test_ventricular_beats_are_broad_and_early():
    widths: dict[int, list[float]] = {ecg.NORMAL: [], ecg.VENTRICULAR: []}
    for index in range(20):
        signal, times, kinds = ecg.heartbeats(0, ecg.TRAIN, index, noise=0.0)
        for number in range(1, len(times) - 1):
            at = round(times[number] * ecg.RATE)
            peak = at - 4 + int(signal[at - 4 : at + 5].argmax())
            width = peak_widths(signal, [peak], rel_height=0.5)[0][0] / ecg.RATE
            widths[int(kinds[number])].append(width)
            if kinds[number] == ecg.VENTRICULAR:
                before, after = np.diff(times[number - 1 : number + 2])
                assert before < after
    assert np.median(widths[ecg.VENTRICULAR]) > 1.8 * np.median(widths[ecg.NORMAL])


def test_blobs_lie_where_the_quiet_volume_is_bright():
    for index in range(20):
        volume, centres, radii = volumes.blobs(0, volumes.TRAIN, index, noise=0.0)
        assert volume.shape == volumes.SHAPE
        parts, _ = label(volume > 0.3)
        seen = set()
        for (x, y, z), radius in zip(centres, radii, strict=True):
            part = parts[round(z), round(y), round(x)]
            assert part > 0
            assert part not in seen  # each blob is a piece by itself
            seen.add(part)
            inside = np.argwhere(parts == part)[:, ::-1]
            reach = np.linalg.norm(inside - (x, y, z), axis=1).max()
            assert reach < radius + 1.0
            edge = min(x, y, z, *(np.array(volumes.SHAPE[::-1]) - 1 - (x, y, z)))
            if edge > radius + 1:  # whole: the mean of its voxels is its centre
                np.testing.assert_allclose(inside.mean(0), (x, y, z), atol=0.35)


def test_training_reads_the_map_where_the_truth_says():
    """A map of its own coordinates, read at the locations that training aims at."""
    _, times, _ = window = ecg.heartbeats(0, ecg.TRAIN, 0)
    line = (torch.arange(ecg.SAMPLES) / ecg.RATE).view(1, -1, 1, 1)
    where = beats.make_batch([window])[1][0][0].view(1, -1, 1, 1, 1)
    read = saccade.deformable_attention(
        line, [(ecg.SAMPLES,)], where, torch.ones(where.shape[:-1]), num_points=1, padding="border"
    )
    np.testing.assert_allclose(read.flatten(), times.clip(0, float(line.max())), atol=1e-4)

    _, centres, _ = volume = volumes.blobs(0, volumes.TRAIN, 0)
    axes = torch.meshgrid(*(torch.arange(float(n)) for n in volumes.SHAPE), indexing="ij")
    value = torch.stack(axes[::-1], -1).view(1, -1, 1, 3)
    where = blobs.make_batch([volume])[1][0].view(1, -1, 1, 1, 3)
    read = saccade.deformable_attention(
        value, [volumes.SHAPE], where, torch.ones(where.shape[:-1]), num_points=1
    )
    np.testing.assert_allclose(read[0], centres, atol=1e-3)


def test_score_of_beats():
    kinds = np.array([0, 0, 1, 0])
    truth = [(np.zeros(1024), np.array([1.0, 2.0, 3.0, 4.0]), kinds)]

    def score(times, kinds):
        return beats.f1([(np.array(times), np.array(kinds, dtype=int))], truth)

    assert score([1.0, 2.0, 3.0, 4.0], kinds) == (1.0, 1.0)
    assert score([1.04, 1.96, 3.04, 4.0], kinds) == (1.0, 1.0)
    assert score([1.06, 2.0, 3.0, 4.0], kinds) == (pytest.approx(2 / 3), 1.0)
    assert score([1.0, 2.0, 3.0, 4.0], [0, 0, 0, 0]) == (pytest.approx(6 / 7), 0.0)
    assert score([0.99, 1.01, 3.0], [0, 0, 1]) == (pytest.approx(2 / 5), 1.0)  # a beat counts once
    assert score([], []) == (0.0, 0.0)


def test_score_of_blobs():
    truth = [(np.zeros((24, 32, 32)), np.array([[5.0, 5.0, 5.0], [20.0, 9.0, 12.0]]), np.ones(2))]

    def score(*centres):
        return blobs.f1([(np.array(centres, dtype=float).reshape(-1, 3),)], truth)

    assert score((5, 5, 5), (20, 9, 12)) == 1.0
    assert score((5, 5, 6.9), (20, 9, 12)) == 1.0
    assert score((5, 5, 7.1), (20, 9, 12)) == 0.5
    assert score((5, 5, 5), (5, 5, 6)) == 0.5  # a blob counts once
    assert score((5, 5, 5)) == pytest.approx(2 / 3)
    assert score((12, 9, 20)) == 0.0  # (x, y, z), not (z, y, x)
    assert score() == 0.0


def test_a_perfect_answer_has_the_least_loss_and_the_full_score():
    windows = [ecg.heartbeats(0, ecg.TRAIN, index) for index in range(2)]
    _, truth = beats.make_batch(windows)
    logits = torch.zeros(2, beats.QUERIES, 3)
    logits[..., beats.NONE] = 20.0
    times = torch.rand(2, beats.QUERIES)
    for i, (true, kinds) in enumerate(truth):
        # The last queries answer: the pairs must be found, their order does not reveal them.
        times[i, -len(true) :] = true
        logits[i, -len(true) :] = 20.0 * torch.nn.functional.one_hot(kinds, 3)
    assert beats.set_loss(logits, times, truth) < 1e-3
    assert beats.set_loss(logits, times + 0.01, truth) > 0.1
    assert beats.set_loss(logits.roll(1, -1), times, truth) > 1

    class Oracle(torch.nn.Module):
        def forward(self, _):
            return [(logits, times)], None

    assert beats.f1(beats.find(Oracle(), windows)[0], windows) == (1.0, 1.0)


def test_a_perfect_blob_answer_has_the_least_loss_and_the_full_score():
    drawn = [volumes.blobs(0, volumes.TRAIN, index) for index in range(2)]
    _, truth = blobs.make_batch(drawn)
    logits, centres = torch.full((2, 48), -20.0), torch.rand(2, 48, 3)
    for i, true in enumerate(truth):
        centres[i, -len(true) :] = true
        logits[i, -len(true) :] = 20.0
    assert blobs.set_loss(logits, centres, truth) < 1e-3
    assert blobs.set_loss(logits, centres + 0.02, truth) > 0.1
    assert blobs.set_loss(-logits, centres, truth) > 1

    class Oracle(torch.nn.Module):
        def forward(self, _):
            return [(logits, centres)], None

    assert blobs.f1(blobs.find(Oracle(), drawn)[0], drawn) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize(
    ("module", "finder"), [(beats, "BeatFinder"), (blobs, "BlobFinder")], ids=["beats", "blobs"]
)
def test_training_learns_and_scores_before_and_after(
    module, finder, freeze, tmp_path, capsys, monkeypatch
):
    made = []
    whole = getattr(module, finder)
    monkeypatch.setattr(module, finder, lambda *args: made.append(whole(*args)) or made[-1])
    monkeypatch.setattr(module, "BATCH", 2)
    path = tmp_path / "image.png"
    module.main(steps=3, seed=1, threads=1, held_out=4, freeze_offsets=freeze, image_path=path)
    printed = capsys.readouterr().out
    for name in ("rule of thumb", "before training", "after training"):
        assert re.search(rf"^{name} +F1 [01]\.\d\d\d", printed, flags=re.MULTILINE), printed
    assert path.read_bytes().startswith(b"\x89PNG")
    for layer in made[0].layers:
        assert bool(layer.cross_attention.sampling_offsets.weight.any()) is not freeze


@pytest.mark.slow
def test_the_same_seed_gives_the_same_training(monkeypatch, capsys):
    weights = []
    for module, finder in ((beats, "BeatFinder"), (blobs, "BlobFinder")):
        whole = getattr(module, finder)
        made: list[torch.nn.Module] = []
        monkeypatch.setattr(module, finder, lambda *a, m=made, w=whole: m.append(w(*a)) or m[-1])
        monkeypatch.setattr(module, "BATCH", 2)
        for seed in (0, 0, 1):
            module.main(
                steps=2, seed=seed, threads=1, held_out=2, freeze_offsets=False, image_path=None
            )
        weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in made]
        assert torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[0], weights[2])
    capsys.readouterr()
