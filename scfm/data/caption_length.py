"""Captions that are longer than a model reads: said once, not for every batch."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from scfm.types import Family

log = logging.getLogger(__name__)


def warn_of_long_captions(family: Family, captions: Sequence[str]) -> None:
    """Says once how many captions are cut, by the tokenizer of the longest text that the family reads."""
    components = family.pipe.components if hasattr(family, "pipe") else {}
    parts = {name: part for name, part in sorted(components.items()) if name.startswith("tokenizer") and part}
    if not parts:
        return
    tokenizer = list(parts.values())[-1]
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # FLUX.2-dev's is a processor, of images too
    limit = min(family.max_sequence_length, tokenizer.model_max_length)
    texts = sorted(set(captions))
    with fewer_remarks():
        lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    long = [text for text, length in zip(texts, lengths, strict=True) if length > limit]
    if long:
        log.warning(
            "%d of %d captions are longer than %d tokens (max_sequence_length): their ends are not read, "
            "as of %r",
            len(long),
            len(texts),
            limit,
            long[0][:60] + "...",
        )


@contextmanager
def fewer_remarks() -> Iterator[None]:
    """diffusers and transformers print what they cut of every caption, which `warn_of_long_captions` says
    once."""
    both = diffusers_logging, transformers_logging
    levels = [library.get_verbosity() for library in both]
    for library in both:
        library.set_verbosity_error()
    try:
        yield
    finally:
        for library, level in zip(both, levels, strict=True):
            library.set_verbosity(level)
