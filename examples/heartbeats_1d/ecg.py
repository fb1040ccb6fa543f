"""The data: windows of a simulated ECG with early beats, and a rule of thumb that finds the beats."""

from __future__ import annotations

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.signal import butter, find_peaks, lfilter, sosfiltfilt

RATE, SECONDS = 128, 8
SAMPLES = RATE * SECONDS
TRAIN, TEST = 0, 1
NORMAL, VENTRICULAR = 0, 1

# Waves P Q R S T as (angle on the cycle, height, width). The normal beat has the values of the
# paper; a ventricular one has no P wave, a broad QRS complex and a T wave turned upside down.
WAVES = np.array(
    [
        [[-np.pi / 3, 1.2, 0.25], [-np.pi / 12, -5, 0.1], [0, 30, 0.1], [np.pi / 12, -7.5, 0.1],
         [np.pi / 2, 0.75, 0.4]],
        [[-np.pi / 3, 0, 0.25], [-np.pi / 12, 0, 0.1], [0, 4, 0.3], [np.pi / 4, -1, 0.2],
         [np.pi / 2, -0.9, 0.4]],
    ]
)  # fmt: skip

Window = tuple[np.ndarray, np.ndarray, np.ndarray]


def rhythm(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the times in seconds and the kinds of all beats from before to after a window."""
    interval, phases = rng.uniform(0.6, 1.0), rng.uniform(0, 2 * np.pi, 2)
    now, beats = -4 + rng.uniform(0, interval), []
    while now < SECONDS + 4:
        beats.append((now, NORMAL))
        # Blood pressure and breathing modulate the heart rate, at about 0.1 and 0.25 Hz.
        waves = np.sin(2 * np.pi * np.array([0.1, 0.25]) * now + phases).sum()
        step = interval * (1 + 0.04 * waves + 0.02 * rng.standard_normal())
        chance = rng.random()
        if chance < 0.15:  # a ventricular beat comes early; the next normal one keeps its time
            beats.append((now + step * rng.uniform(0.55, 0.8), VENTRICULAR))
            step *= 2
        elif chance < 0.25:  # an atrial beat comes early too, but looks normal
            step *= rng.uniform(0.6, 0.8)
        now += step
    times, kinds = zip(*beats, strict=True)
    return np.array(times), np.array(kinds)


def heartbeats(seed: int, split: int, index: int, noise: float = 1.0) -> Window:
    """Simulates a window: the signal [SAMPLES], times in seconds and kinds of the beats inside.

    Source:
        McSharry et al., A dynamical model for generating synthetic electrocardiogram signals, 2003,
        https://doi.org/10.1109/TBME.2003.808805
    """
    rng = np.random.default_rng([seed, split, index])
    times, kinds = rhythm(rng)
    # Every patient has other waves, and every beat differs a little from the one before.
    patient = rng.uniform([0.75, 0.85], [1.25, 1.15], (2, 5, 2))
    waves = WAVES[kinds]
    waves[..., 1:] *= patient[kinds] * (1 + 0.05 * rng.standard_normal((len(kinds), 5, 2)))
    # The model runs round its limit cycle once a beat, so the angle follows from the beats' times.
    # The waves push the signal, which decays to the breathing baseline: dz/dt = push - (z - z0).
    moments = np.arange(-2 * RATE, SAMPLES) / RATE  # two seconds more to forget the start
    midpoints = moments - 0.5 / RATE
    angle = PchipInterpolator(times, 2 * np.pi * np.arange(len(times)))(midpoints)
    beat = np.rint(angle / (2 * np.pi)).astype(int)
    centre, height, width = np.moveaxis(waves[beat], -1, 0)
    off = (angle - 2 * np.pi * beat)[:, None] - centre
    push = -(height * off * np.exp(-0.5 * (off / width) ** 2)).sum(1)
    breath = 0.01 * np.sin(2 * np.pi * 0.25 * midpoints + rng.uniform(0, 2 * np.pi))
    decay = np.exp(-1 / RATE)
    signal = lfilter([1 - decay], [1, -decay], push + breath)[-SAMPLES:]
    speed = 2 * np.pi / np.diff(times).mean()
    signal *= speed / 0.3 * rng.uniform(0.7, 1.3)  # an R wave is about 1 high
    # Electrodes add a slow drift, muscles and electronics white noise.
    cycles = rng.uniform(0.05, 0.5) * moments[-SAMPLES:] + rng.random()
    signal += noise * rng.uniform(0, 0.4) * np.sin(2 * np.pi * cycles)
    signal += noise * rng.uniform(0.05, 0.25) * rng.standard_normal(SAMPLES)
    inside = (times >= 0) & (times < SECONDS)
    return signal.astype(np.float32), times[inside], kinds[inside]


def rule_of_thumb(window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Returns high peaks of the filtered signal; early with a pause behind it is ventricular."""
    # The numbers are the best of a small search on training windows.
    band = butter(2, [3, 30], "bandpass", fs=RATE, output="sos")
    signal = sosfiltfilt(band, window[0])
    height = 0.4 * np.quantile(signal, 0.995)
    times = find_peaks(signal, height, distance=int(0.4 * RATE))[0] / RATE
    steps = np.diff(times)
    usual = np.median(steps) if len(steps) else 1.0
    early = np.append(usual, steps) < 0.85 * usual
    paused = np.append(steps, usual) > 1.15 * usual
    return times, np.where(early & paused, VENTRICULAR, NORMAL)
