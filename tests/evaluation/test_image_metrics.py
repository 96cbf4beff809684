"""The metrics of images beside torchmetrics and transformers."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torchmetrics.image.fid import FrechetInceptionDistance
from transformers import CLIPModel, CLIPProcessor

from scfm.evaluation.feature_distances import frechet
from scfm.evaluation.find_metrics import find_metrics
from scfm.evaluation.image_metrics import (
    CLIPMetric,
    CustomMetric,
    InceptionMetric,
    MetricUnavailable,
)

CAPTIONS = ["a large red cross", "a small blue ring on the left", "a pink star"]


class Small(torch.nn.Module):
    """Stands in for Inception: eight features of bytes."""

    num_features = 8

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Conv2d(3, 8, 4, 4)

    def forward(self, images):
        return self.body(images.float() / 255).square().mean((2, 3))


@torch.no_grad()
def test_our_fid_is_that_of_torchmetrics():
    torch.manual_seed(1)
    a, b = (torch.randint(low, 256, (40, 3, 16, 16), dtype=torch.uint8) for low in (0, 90))
    theirs, network = FrechetInceptionDistance(feature=Small()), Small()
    theirs.update(a, real=True)
    theirs.update(b, real=False)
    assert frechet(network(a), network(b)) == pytest.approx(theirs.compute().item(), rel=1e-3)
    assert frechet(network(a[:1]), network(b)) is None and frechet(None, network(b)) is None


def test_inception_takes_weights_from_a_file_and_unpickles_no_code(tmp_path):
    from torchmetrics.image.fid import NoTrainInceptionV3

    # torch-fidelity's network, which wants a file: random weights of its shapes
    network = NoTrainInceptionV3.__mro__[1]
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "load_state_dict", lambda *_: None)
        torch.save({}, tmp_path / "empty.pth")
        empty = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(tmp_path / "empty.pth"))
        state = empty.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    save_file(state, tmp_path / "weights.safetensors")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    both = [
        InceptionMetric(str(tmp_path / name)).measure([(images, None)]).features
        for name in ("weights.pth", "weights.safetensors")
    ]
    assert both[0].shape == (2, 2048) and torch.equal(*both)

    torch.save({"weights": SimpleNamespace()}, tmp_path / "code.pth")
    for name, word in (
        ("code.pth", "could not be loaded"),
        ("nowhere.pth", "nowhere.pth"),
        ("empty.pth", "Missing key"),
    ):
        with pytest.raises(MetricUnavailable, match=word):
            InceptionMetric(str(tmp_path / name))


def test_the_clip_score_is_the_cosine_of_transformers(clip_folder):
    """transformers 5 wraps what torchmetrics 1.9 expects plain; a caption longer than the model keeps its end
    mark."""
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    captions = [*CAPTIONS[:2], "an image of a small red star at the top at the top at the top"]
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    inputs = processor(
        text=captions,
        images=list(images),
        return_tensors="pt",
        padding=True,
        truncation=True,
        max_length=8,
    )
    with torch.no_grad():
        out = model(**inputs)
    cosines = (out.logits_per_image / model.logit_scale.exp()).diagonal()
    batches = [(images[:2], captions[:2]), (images[2:], captions[2:])]
    features, scores = CLIPMetric(str(clip_folder)).measure(batches)
    assert features is None
    assert scores["CLIP score"] == pytest.approx(max(0.0, 100 * cosines.mean().item()), abs=1e-3)


def test_a_metric_of_ones_own():
    metric = CustomMetric("toy.judge:look")
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    batches = [(images[:3], CAPTIONS), (images[3:], ["a red star", "nothing of the kind"])]
    features, scores = metric.measure(batches)
    assert features.shape == (5, 64) and 0 <= scores["prompt accuracy"] <= 1
    assert metric.measure([(images, None)]).scores == {}


def test_what_is_left_out_or_cannot_be_loaded_is_named(clip_folder):
    metrics, missing = find_metrics("toy.judge:look", "nowhere.pth", str(clip_folder), imagenet="none")
    assert [metric.name for metric in metrics] == ["toy.judge:look", "CLIP"]
    assert [metric.distance is None for metric in metrics] == [False, True]
    assert "could not be loaded from nowhere.pth" in missing["Inception (FID)"] and len(missing) == 2
    assert find_metrics("", "none", "none", imagenet="none") == (
        [],
        dict.fromkeys(missing | {"CLIP score": ""}, "left out by the settings"),
    )


def test_without_a_network_weights_are_missing_at_once(tmp_path, monkeypatch):
    """The libraries would try again and again."""

    def clip(folder, local_files_only=False, **_):
        assert local_files_only
        raise OSError("no copy here")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://localhost:9")
    monkeypatch.setattr("scfm.models.hub.urlopen", refused)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("asked"))
    monkeypatch.setattr("transformers.CLIPModel.from_pretrained", clip)
    metrics, missing = find_metrics("", "", "me/clip", imagenet="none")
    assert not metrics
    assert "cannot be reached, and they are not in torch's cache; name a file" in missing["Inception (FID)"]
    assert "no copy here" in missing["CLIP score"]


def refused(*_, **__):
    raise OSError("no network")
