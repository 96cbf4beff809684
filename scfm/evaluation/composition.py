"""Whether all that a caption names is in its image, by a network that answers questions."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from scfm.evaluation.image_metrics import (
    Batches,
    Measured,
    MetricUnavailable,
    first_line,
    mark_of,
    not_installed,
    weight_files,
)
from scfm.models.hub import hub_reachable
from scfm.models.loading import no_loading_bars

SCORE = "composition (BLIP-VQA)"
LONGEST = 35  # tokens of a question, as T2I-CompBench cuts them
AT_ONCE = 64  # questions
BETWEEN = re.compile(r"[,;.]|\b(?:and|with)\b", re.IGNORECASE)  # the parts of a caption


class CompositionMetric:
    """The compositional score, in the way of T2I-CompBench's BLIP-VQA (arXiv 2307.06350): each part of a
    caption becomes the question "part?", its share is P(yes) / (P(yes) + P(no)) of the answer's first token,
    and an image's score is the product over its caption's parts; the metric's is the mean, 0 to 1.

    What differs from theirs: the parts lie between commas, "and" and "with", where they take the noun phrases
    that spaCy finds; a question begins with [CLS], as transformers has it, where theirs begins with [ENC];
    the side of the images is that of the folder's processor, theirs 480 pixels. Compare no number with
    theirs.

    folder: of a BlipForQuestionAnswering of transformers, or its name on the hub
    Attributes: `mark`, as from `mark_of`, of the weights' files.
    Raises `MetricUnavailable`.
    """

    name, distance = "composition", None

    def __init__(self, folder: str, device: str | torch.device = "cpu") -> None:
        self.device = device
        try:
            self.model, self.processor = load_blip(folder, device)
            self.mark = mark_of(weight_files(folder))
        except ImportError as error:
            raise not_installed(error) from None
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise MetricUnavailable(f"BLIP could not be loaded from {folder} ({first_line(error)})") from None
        words = self.processor.tokenizer
        self.answers = words.convert_tokens_to_ids(["yes", "no"])
        if words.unk_token_id in self.answers:
            raise MetricUnavailable(f'the tokenizer in {folder} lacks the words "yes" and "no"')

    @torch.no_grad()
    def measure(self, batches: Batches) -> Measured:
        """The mean score of images with their captions; those whose caption has no part are left out."""
        parts = [self.products(images, captions) for images, captions in batches if captions]
        scores = torch.cat(parts) if parts else torch.empty(0)
        scores = scores[~scores.isnan()]
        return Measured(None, {SCORE: scores.mean().item()} if len(scores) else {})

    def products(self, images: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        """(b,): the score of each image; nan where its caption has no part. images: (b, 3, H, W) uint8."""
        pixels = self.processor.image_processor(list(images), return_tensors="pt").pixel_values
        seen = self.model.vision_model(pixel_values=pixels.to(self.device))[0]
        parts = [parts_of(caption) for caption in captions]
        owners = [k for k, group in enumerate(parts) for _ in group]
        questions = self.tokens([f"{part}?" for group in parts for part in group])
        lengths = torch.tensor([len(tokens) for tokens in questions])
        shares = torch.empty(len(questions))
        for length in lengths.unique():  # padding would count: transformers' BLIP masks no cross-attention
            for some in (lengths == length).nonzero()[:, 0].split(AT_ONCE):
                tokens = torch.tensor([questions[i] for i in some])
                shares[some] = self.share_of_yes(seen[[owners[i] for i in some]], tokens)
        groups = shares.split([len(group) for group in parts])
        return torch.stack([group.prod() if len(group) else torch.tensor(torch.nan) for group in groups])

    def tokens(self, questions: Sequence[str]) -> list[list[int]]:
        """The tokens of questions, long ones cut, none padded."""
        longest = min(LONGEST, self.model.config.text_config.max_position_embeddings)
        words = self.processor.tokenizer
        return [words(text, truncation=True, max_length=longest).input_ids for text in questions]

    def share_of_yes(self, seen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """(q,): P(yes) / (P(yes) + P(no)) of questions.

        seen: (q, patches, D), what the network sees in the image of each
        tokens: (q, L)
        """
        states = self.model.text_encoder(
            input_ids=tokens.to(self.device),
            attention_mask=torch.ones_like(tokens).to(self.device),
            encoder_hidden_states=seen,
        )[0]
        start = torch.full((len(tokens), 1), self.model.decoder_start_token_id, device=states.device)
        logits = self.model.text_decoder(input_ids=start, encoder_hidden_states=states).logits
        return logits[:, 0, self.answers].softmax(1)[:, 0].cpu()


def parts_of(caption: str) -> list[str]:
    """["a red star", "a blue ring"] of "a red star and a blue ring"."""
    return [part for piece in BETWEEN.split(caption) if (part := piece.strip())]


def load_blip(folder: str, device: str | torch.device) -> tuple[Any, Any]:
    """The network and the processor in a folder."""
    from transformers import BlipForQuestionAnswering, BlipProcessor

    local = not Path(folder).is_dir() and not hub_reachable()
    with no_loading_bars():
        model: Any = BlipForQuestionAnswering.from_pretrained(
            folder, use_safetensors=True, local_files_only=local
        )
        processor = BlipProcessor.from_pretrained(folder, local_files_only=local)
    return model.eval().to(device), processor
