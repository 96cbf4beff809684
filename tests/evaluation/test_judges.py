"""The judges that are asked for: a model of preferences, questions of a caption's parts, FID on patches.

Their networks are tiny random ones of the real classes.
"""

import hashlib

import pytest
import torch
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipForQuestionAnswering,
    BlipImageProcessor,
    BlipProcessor,
)

from scfm.evaluation import image_metrics
from scfm.evaluation.composition import SCORE, CompositionMetric, parts_of
from scfm.evaluation.find_metrics import find_metrics
from scfm.evaluation.image_metrics import (
    CLIPMetric,
    InceptionMetric,
    MetricUnavailable,
    PatchInceptionMetric,
    PreferenceMetric,
    mark_of,
)

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "yes",
    "no",
    "?",
    *"a red blue star ring small on".split(),
]
CAPTIONS = ["a red star", "a small red star and a blue ring, a star", "a blue ring with a star", " , "]


def build_blip(folder, words):
    """A tiny random BlipForQuestionAnswering and its processor, saved as transformers saves them."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer.from_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **small,
        "vocab_size": len(words) + 2,
        "encoder_hidden_size": 16,
        "max_position_embeddings": 16,
        "bos_token_id": len(words),
        "sep_token_id": 3,
        "pad_token_id": 0,
        "initializer_range": 1.0,  # so that answers differ between questions
    }
    vision = {**small, "image_size": 32, "patch_size": 8, "initializer_range": 0.3}
    torch.manual_seed(0)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
    BlipForQuestionAnswering(config).eval().save_pretrained(folder)
    size = {"height": 32, "width": 32}
    BlipProcessor(BlipImageProcessor(size=size), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory):
    return build_blip(tmp_path_factory.mktemp("blip") / "words", WORDS)


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_a_caption_has_parts():
    assert parts_of("A red star, a blue ring and a sand hill With two stars.") == [
        "A red star",
        "a blue ring",
        "a sand hill",
        "two stars",
    ]
    assert parts_of("a band without ands") == ["a band without ands"] and parts_of(" , and ") == []


def test_the_composition_is_the_product_of_what_transformers_answers(blip_folder, images):
    """Each question alone, by the model's own `generate`; here they are padded and in one batch."""
    model = BlipForQuestionAnswering.from_pretrained(blip_folder).eval()
    processor = BlipProcessor.from_pretrained(blip_folder)
    want = []
    for image, caption in zip(images, CAPTIONS[:3], strict=False):
        product = 1.0
        for part in parts_of(caption):
            inputs = processor(images=image, text=f"{part}?", return_tensors="pt")
            inputs.pop("token_type_ids", None)
            how = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
            chances = model.generate(**inputs, **how).logits[0].softmax(1)[0]
            yes, no = (chances[WORDS.index(word)].item() for word in ("yes", "no"))
            product *= yes / (yes + no)
        want.append(product)
    metric = CompositionMetric(str(blip_folder))
    assert metric.products(images, CAPTIONS)[:3].tolist() == pytest.approx(want, rel=1e-4)
    assert max(want) - min(want) > 0.05  # not the same answer to whatever is asked
    features, scores = metric.measure([(images[:1], CAPTIONS[:1]), (images[1:], CAPTIONS[1:])])
    assert features is None and scores == {SCORE: pytest.approx(sum(want) / 3, rel=1e-4)}
    assert metric.measure([(images, None)]).scores == metric.measure([(images[:1], [","])]).scores == {}


def test_many_questions_are_asked_in_turns(blip_folder, images, monkeypatch):
    metric = CompositionMetric(str(blip_folder))
    whole = metric.products(images, CAPTIONS)
    monkeypatch.setattr("scfm.evaluation.composition.AT_ONCE", 2)
    torch.testing.assert_close(metric.products(images, CAPTIONS), whole, equal_nan=True)


def test_a_tokenizer_without_yes_answers_nothing(tmp_path):
    folder = build_blip(tmp_path / "mute", [word for word in WORDS if word != "yes"])
    with pytest.raises(MetricUnavailable, match='lacks the words "yes" and "no"'):
        CompositionMetric(str(folder))


def test_a_preference_model_is_a_clip_score_of_its_own_name(clip_folder, images):
    captions = ["a large red cross", "a pink star", "a small blue ring", "a red star"]
    preference, clip = PreferenceMetric(str(clip_folder)), CLIPMetric(str(clip_folder))
    name = f"preference ({clip_folder.name})"
    assert list(preference.measure([(images, captions)]).scores) == [name] and preference.name != clip.name
    (ours,), (theirs,) = (m.measure([(images, captions)]).scores.values() for m in (preference, clip))
    assert ours == theirs
    digest = hashlib.sha256((clip_folder / "model.safetensors").read_bytes()).hexdigest()
    assert preference.mark == clip.mark == digest[:16]


class Small(torch.nn.Module):
    """Stands in for Inception: what it is shown, as features."""

    def forward(self, images):
        return images.flatten(1).double()


def test_a_patch_is_cut_from_the_middle_without_resizing(monkeypatch, tmp_path):
    monkeypatch.setattr(image_metrics, "load_inception", lambda path: Small())
    images = torch.randint(0, 256, (2, 3, 309, 401), dtype=torch.uint8)
    metric = PatchInceptionMetric(str(tmp_path / "weights"), size=(309, 401))
    patches = images[:, :, 5 : 5 + 299, 51 : 51 + 299]
    assert torch.equal(metric.measure([(images, None)]).features, patches.flatten(1).double())
    assert metric.distance == "patch FID" != InceptionMetric.distance


def test_what_is_asked_for_is_there_or_missing_with_its_reason(blip_folder, clip_folder, monkeypatch):
    monkeypatch.setattr(image_metrics, "load_inception", lambda path: Small())
    none = {"custom_metric": "", "clip": "none", "imagenet": "none"}
    found, missing = find_metrics(
        **none,
        inception="somewhere.pth",
        preference=str(clip_folder),
        composition=str(blip_folder),
        patch_size=(512, 300),
    )
    names = ["Inception", "Inception on patches", f"preference model {clip_folder.name}", "composition"]
    assert [metric.name for metric in found] == names and len(missing) == 2
    found, missing = find_metrics(
        **none, inception="a.pth", preference="nowhere", composition="nowhere", patch_size=(512, 299)
    )
    assert [metric.name for metric in found] == ["Inception"]
    assert missing["patch FID"] == "images of 512 x 299 pixels are not larger than a patch of 299 x 299"
    assert "could not be loaded from nowhere" in missing["preference"]
    assert "could not be loaded from nowhere" in missing["composition"]
    left_out = find_metrics(**none, inception="none", patch_size=(512, 512))[1]
    assert left_out["patch FID"] == "left out by the settings"


def test_a_mark_is_the_beginning_of_the_hash_of_all_files(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).write_bytes(content)
    assert mark_of([tmp_path / "a", tmp_path / "b"]) == hashlib.sha256(b"onetwo").hexdigest()[:16]
    assert mark_of([tmp_path / "nowhere"]) == mark_of([]) == ""
