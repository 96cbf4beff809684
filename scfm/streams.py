"""Random draws without a state to save: a generator for each seed, number and purpose."""

import hashlib
from enum import IntEnum

import torch


class Stream(IntEnum):
    """What a generator's random numbers are for. One registry: two purposes never share their draws."""

    JUMPS = 0  # times, kinds and noise of a training step
    DATA = 1  # which examples, in which order
    GUIDANCE = 2  # guidance scale of each example
    EVAL = 3  # captions or noise of validation and selection
    EXAMPLE_NOISE = 4  # noise of each example by its number in the run
    START_NOISE = 7  # the noise that a generated image starts from
    RESOLUTION = 8  # the size of each of the teacher's images


def keyed_generator(seed: int, index: int, stream: int = Stream.JUMPS) -> torch.Generator:
    """A CPU generator that depends on three whole numbers alone: random draws without a state to save.

    seed: of the run
    index: number within the stream: a step of training, an image
    stream: what the draws are for, a `Stream`

    torch's CPU generator keeps 32 bits of its seed, so indices count on from a number that seed and stream
    determine: within one seed and stream no two of 2**32 indices share a generator; across them a clash is
    improbable, not impossible.
    """
    first = int.from_bytes(hashlib.sha256(f"{seed},{int(stream)}".encode()).digest()[:4], "big")
    return torch.Generator().manual_seed((first + index) % 2**32)
