"""Make `data/kws_features.npz`: log-mel features of synthetic spoken words.

Run with `python examples/make_kws_features.py`. Needs `espeak-ng` on the PATH, and numpy. The same
version of espeak-ng gives the same features again. See `data/README.md`.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Audio = NDArray[np.float64]
Codes = NDArray[np.uint8]

FEATURES = Path(__file__).parent / "data" / "kws_features.npz"

KEYWORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
CLASSES = (*KEYWORDS, "unknown", "silence")
# A third of these differ from a keyword in one sound or two.
UNKNOWN_WORDS = (
    "less lift cup step goat rice bed bird cat dog five happy house three tree seven water music"
)
ACCENTS = "en-gb en-us en-gb-scotland en-gb-x-gbclan en-gb-x-rp en-gb-x-gbcwmd en-029 en-us-nyc"
# A voice is in one split only, and so are all voices of one family (klatt, klatt2, ...).
VOICES = {
    "train": (
        "m1 m2 m3 m5 m6 m8 f1 f2 f4 whisper whisperf croak "
        "Alex Alicia Andrea Andy AnxiousAndy Denis Diogo Gene Gene2 Henrique Jacky Lee Mario Mike "
        "Nguyen Tweaky adam anika antonio aunty belinda boris ed edward edward2 grandma "
        "gustave iven iven2 iven3 iven4 kaukovalta klatt klatt2 klatt3 klatt4 marcelo max miguel "
        "norbert pablo paul quincy rob robert shelby travis zac"
    ),
    "validation": "m4 f3 Annie Hugo Storm benjamin john michel steph steph2 victor",
    "test": "m7 f5 RicishayMax Marco Michael david grandpa linda pedro sandro robosoft3",
}
EXAMPLES_PER_CLASS = {"train": 300, "validation": 30, "test": 60}

SPEED = (120, 220)  # words per minute
PITCH = (15, 85)  # of espeak-ng's 0 to 99
LEVEL_DB = (-32.0, -14.0)  # of the word, below full scale
SNR_DB = (10.0, 30.0)
SILENCE_DB = (-60.0, -20.0)
NOISE_COLOUR = (0.0, 2.0)  # power falls with frequency to this: 0 is white, 1 pink, 2 brown

SAMPLE_RATE = 16_000
SECONDS = 1
WINDOW = 640  # 40 ms
HOP = 320  # 20 ms
FFT = 1024
MELS = 16
MEL_RANGE = (60.0, 7600.0)
FRAMES = (SAMPLE_RATE * SECONDS - WINDOW) // HOP + 1

# A feature is the natural log of a band's power plus OFFSET. Its code counts steps above LOWEST, so
# the values lie on a grid that eight bits hold exactly. Finer steps would store noise.
STEP = 0.25
LOWEST = -8.0
HIGHEST_CODE = 63
OFFSET = 6.0

SEED = 0


@dataclass(frozen=True)
class Utterance:
    """One example: what is said and how, and what is mixed in."""

    word: str | None
    accent: str
    voice: str
    speed: int
    pitch: int
    level_db: float
    snr_db: float
    position: float
    colour: float
    noise_seed: int


def espeak_version() -> str:
    """Return the version of espeak-ng, such as `1.51`.

    Raises:
        FileNotFoundError: If espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        msg = "espeak-ng is not on the PATH. Install it, for example: apt-get install espeak-ng"
        raise FileNotFoundError(msg)
    said = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"text-to-speech: (\S+)", said.stdout)
    return found[1] if found else "unknown"


def synthesise(utterance: Utterance) -> Audio:
    """Let espeak-ng say the word of an utterance; return it at SAMPLE_RATE, pauses cut off."""
    command = ["espeak-ng", "--stdout", "-v", f"{utterance.accent}+{utterance.voice}"]
    command += ["-s", str(utterance.speed), "-p", str(utterance.pitch), str(utterance.word)]
    wave = subprocess.run(command, capture_output=True, check=True).stdout
    rate = int.from_bytes(wave[24:28], "little")
    # Written to a pipe, the header has no length; the samples start behind its 44 bytes.
    samples = np.frombuffer(wave[44 : len(wave) // 2 * 2], dtype="<i2") / 32768.0
    loud = np.flatnonzero(np.abs(samples) > 0.01 * np.abs(samples).max())
    return resample(samples[loud[0] : loud[-1] + 1], rate)


def resample(samples: Audio, rate: int) -> Audio:
    """Change to SAMPLE_RATE by cutting the spectrum; `rate` must be the higher one."""
    common = np.gcd(rate, SAMPLE_RATE)
    padded = np.pad(samples, (0, -len(samples) % (rate // common)))
    length = len(padded) // (rate // common) * (SAMPLE_RATE // common)
    spectrum = np.fft.rfft(padded)[: length // 2 + 1]
    return np.fft.irfft(spectrum, length) * (length / len(padded))


def noise_of(colour: float, seed: int) -> Audio:
    """Return noise of mean power 1 whose power falls with the frequency to the `colour`."""
    length = SAMPLE_RATE * SECONDS
    spectrum = np.fft.rfft(np.random.default_rng(seed).standard_normal(length))
    frequency = np.maximum(np.arange(len(spectrum)) / SECONDS, MEL_RANGE[0])
    noise = np.fft.irfft(spectrum * frequency ** (-colour / 2), length)
    return noise / np.sqrt(np.mean(noise**2))


def mix(utterance: Utterance) -> Audio:
    """Return one second of audio: the word somewhere in it, and noise."""
    level = 10 ** (utterance.level_db / 20)
    noise = noise_of(utterance.colour, utterance.noise_seed)
    if utterance.word is None:
        return level * noise
    word = synthesise(utterance)
    word = word[: len(noise)] * (level / np.sqrt(np.mean(word**2)))
    audio = level * 10 ** (-utterance.snr_db / 20) * noise
    start = int(utterance.position * (len(audio) - len(word)))
    audio[start : start + len(word)] += word
    return audio


def mel_filters() -> Audio:
    """Return triangular filters, one row per mel band."""
    low, high = (2595 * np.log10(1 + f / 700) for f in MEL_RANGE)
    edges = 700 * (10 ** (np.linspace(low, high, MELS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(FFT, 1 / SAMPLE_RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(audio: Audio) -> Codes:
    """Return the codes of the features of one second of audio, [FRAMES, MELS]."""
    frames = np.lib.stride_tricks.sliding_window_view(np.clip(audio, -1, 1), WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW), FFT)) ** 2 / WINDOW
    features = np.log(power @ mel_filters().T + 1e-12) + OFFSET
    return np.clip(np.round((features - LOWEST) / STEP), 0, HIGHEST_CODE).astype(np.uint8)


def plan(split: str, rng: np.random.Generator) -> list[tuple[int, Utterance]]:
    """Draw the examples of a split: class numbers and utterances, shuffled."""
    drawn = []
    voices = VOICES[split].split()
    words = UNKNOWN_WORDS.split()
    accents = ACCENTS.split()
    for label, name in enumerate(CLASSES):
        for index in range(EXAMPLES_PER_CLASS[split]):
            word = {"unknown": words[index % len(words)], "silence": None}
            silent = name == "silence"
            utterance = Utterance(
                word=word.get(name, name),
                accent=str(rng.choice(accents)),
                voice=voices[(index + label) % len(voices)],
                speed=int(rng.integers(*SPEED)),
                pitch=int(rng.integers(*PITCH)),
                level_db=float(rng.uniform(*(SILENCE_DB if silent else LEVEL_DB))),
                snr_db=float(rng.uniform(*SNR_DB)),
                position=float(rng.uniform()),
                colour=float(rng.uniform(*NOISE_COLOUR)),
                noise_seed=int(rng.integers(2**31)),
            )
            drawn.append((label, utterance))
    return [drawn[index] for index in rng.permutation(len(drawn))]


def make(path: Path = FEATURES) -> Path:
    """Synthesise all examples and write their features to a file."""
    version = espeak_version()
    rng = np.random.default_rng(SEED)
    names = [voice for voices in VOICES.values() for voice in voices.split()]
    arrays: dict[str, NDArray[np.generic]] = {}
    for split in VOICES:
        examples = plan(split, rng)
        with ThreadPoolExecutor() as pool:
            codes = list(pool.map(lambda example: log_mel(mix(example[1])), examples))
        arrays[f"{split}_codes"] = np.stack(codes)
        arrays[f"{split}_labels"] = np.array([label for label, _ in examples], np.uint8)
        arrays[f"{split}_voices"] = np.array([names.index(u.voice) for _, u in examples], np.uint8)
    metadata = {
        "made_by": f"examples/make_kws_features.py with espeak-ng {version}",
        "value": "step * code + lowest",
        "sample_rate": SAMPLE_RATE,
        "window": WINDOW,
        "hop": HOP,
        "mel_range": MEL_RANGE,
        "seed": SEED,
    }
    arrays["step"] = np.float32(STEP)
    arrays["lowest"] = np.float32(LOWEST)
    arrays["classes"] = np.array(CLASSES)
    arrays["voices"] = np.array(names)
    arrays["metadata"] = np.array(json.dumps(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, allow_pickle=False, **arrays)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FEATURES)
    print(make(parser.parse_args().out))
