"""The keyed draws: what a key gives is fixed for good, and no two keys give the same."""

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from experiments.streams import Stream as StudyStream
from scfm.streams import Stream, keyed_generator

MANY = 2**32  # seeds that torch's CPU generator tells apart


def draw(*key):
    return torch.rand(4, generator=keyed_generator(*key))


def test_keyed_generators_repeat_and_differ():
    assert torch.equal(draw(3, 7, 1), draw(3, 7, 1))
    seen = {
        tuple(draw(seed, update, stream).tolist())
        for seed in range(5)
        for update in range(40)
        for stream in range(3)
    }
    assert len(seen) == 5 * 40 * 3


@given(st.integers(0, 2**63), st.integers(0, 2**40), st.sampled_from(Stream))
def test_numbers_count_on_from_the_hash_of_seed_and_stream(seed, index, stream):
    """So a run that was begun with another version of the library goes on with the draws that it had."""
    start = int(hashlib.sha256(f"{seed},{stream.value}".encode()).hexdigest()[:8], 16)
    assert keyed_generator(seed, index, stream).initial_seed() == (start + index) % MANY
    assert torch.equal(draw(seed, index, stream), draw(seed, index + MANY, stream))


def test_a_plain_key_is_one_of_training_steps():
    assert torch.equal(draw(0, 5), draw(0, 5, Stream.JUMPS)) and not torch.equal(draw(0, 5), draw(0, 5, 1))


def test_the_studies_share_no_stream_with_the_library():
    assert not set(map(int, Stream)) & set(map(int, StudyStream))
