"""The small world: drawings obey their captions, the reader reads them, the vocabularies are fixed."""

import json

import torch

from toy.pipelines import FLUX, TOKENS, WORDS, load_flux
from toy.plane import DATA, ring_mixture
from toy.reader import load_reader, prompt_accuracy, read
from toy.shapes import ATTRIBUTES, COLOURS, HELD_OUT, SHAPES, draw_captions, draw_images, pairs, write_caption


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_captions_read_as_english_and_name_what_they_say():
    captions = draw_captions(300, seeded())
    assert "an orange star" == write_caption("orange", "star")
    assert "there is a large orange star at the top" == write_caption(
        "orange", "star", "large", "at the top", "there is"
    )
    for text, named in zip(*captions, strict=False):
        words = text.split()
        for (attribute, values), i in zip(ATTRIBUTES.items(), named.tolist(), strict=False):
            assert (values[i] in words) if i >= 0 else not (set(values) & set(words)), (text, attribute)


def test_held_out_pairs_are_never_drawn_for_training():
    def seen(held):
        return {
            (list(COLOURS)[c], SHAPES[s]) for c, s, *_ in draw_captions(2000, seeded(), held).named.tolist()
        }

    assert not seen(False) & HELD_OUT and seen(True) == set(HELD_OUT)
    assert len(pairs(False)) + len(pairs(True)) == len(COLOURS) * len(SHAPES)
    assert {c for c, _ in pairs(False)} == set(COLOURS) and {s for _, s in pairs(False)} == set(SHAPES)


def test_images_obey_their_captions_and_vary_otherwise():
    captions = draw_captions(400, seeded())
    images, truth = draw_images(captions, seeded(1))
    assert images.shape == (400, 3, 32, 32) and images.min() >= -1 and images.max() <= 1
    asked = captions.named >= 0
    assert torch.equal(truth[asked], captions.named[asked])
    same = draw_images(captions, seeded(1))[0]
    assert torch.equal(images, same)
    again = draw_images(
        captions._replace(text=captions.text[:1] * 50, named=captions.named[:1].repeat(50, 1)), seeded()
    )[0]
    assert again.std(0).mean() > 0.1


def test_the_reader_reads_drawings():
    captions = draw_captions(600, seeded(3), held_out=True)
    images, truth = draw_images(captions, seeded(4))
    _, seen = read(load_reader(), images)
    assert ((seen == truth).float().mean(0) > 0.97).all()
    assert prompt_accuracy(seen, captions.named)["named"] > 0.99
    wrong = captions.named.clone()
    wrong[:, 0] = (wrong[:, 0] + 1) % 8
    assert prompt_accuracy(seen, wrong)["colour"] < 0.03


def test_vocabularies_know_every_word_and_captions_fit():
    pipe = load_flux()
    assert all(pipe.tokenizer.tokenize(w) == [w + "</w>"] for w in WORDS)
    assert all(pipe.tokenizer_2.tokenize(w) == ["▁" + w] for w in WORDS)
    longest = max(draw_captions(2000, seeded()).text, key=lambda text: len(text.split()))
    assert max(len(t(longest).input_ids) for t in (pipe.tokenizer, pipe.tokenizer_2)) <= TOKENS


def test_the_scheduler_is_the_stock_one_with_a_fixed_shift():
    told = json.loads((FLUX / "scheduler" / "scheduler_config.json").read_text())
    assert (told["_class_name"], told["shift"], told["use_dynamic_shifting"]) == (
        "FlowMatchEulerDiscreteScheduler",
        3.0,
        False,
    )


def test_plane_sets_and_the_exact_field():
    for name, draw in DATA.items():
        x = draw(20000, seeded())
        assert x.shape == (20000, 2) and x.mean(0).abs().max() < 0.05 and 0.7 < x.std() < 1.3, name
    mixture, n = ring_mixture(), 400000
    data, noise = mixture.sample(n, seeded()), torch.randn(n, 2, generator=seeded(1))
    t = 0.6
    x = (1 - t) * data + t * noise
    cell = (x - torch.tensor([0.5, 0.3])).norm(dim=1) < 0.3  # E[noise - data | x_t near a point], by counting
    counted = (noise - data)[cell].mean(0)
    exact = mixture.field(x[cell], torch.full((int(cell.sum()),), t)).mean(0)
    assert int(cell.sum()) > 5000 and (counted - exact).norm() < 0.05
