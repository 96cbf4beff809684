"""The feature network that stands in for Inception, and its training, on noise."""

import pytest
import torch
from safetensors.torch import load_file

from toy.features import Features, load_features, look, recipe
from toy.train_features import PEAK, augment, main, rate, save


def test_the_network_comes_back_and_sees_the_same_in_bytes_and_floats(tmp_path):
    torch.manual_seed(0)
    network = Features().eval()
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    seen = look(network, pixels, batch=2)
    assert torch.allclose(seen.features, network.features(pixels.float() / 127.5 - 1), atol=1e-5)
    assert seen.logits.shape == (5, 10)
    path = tmp_path / "w.safetensors"
    save(network, path, {"test_accuracy": 0.5})
    assert recipe(path) == {"test_accuracy": 0.5}
    assert torch.allclose(look(load_features(path), pixels).features, seen.features, atol=1e-2)
    with pytest.raises(FileNotFoundError, match="toy.train_features"):
        load_features(tmp_path / "none")


def test_augmented_images_are_shifts_of_the_image_with_a_grey_hole():
    pixels = torch.full((50, 3, 32, 32), 255, dtype=torch.uint8)
    x = augment(pixels, torch.Generator().manual_seed(0))
    assert x.shape == (50, 3, 32, 32) and set(x.unique().tolist()) == {0.0, 1.0}
    holes = (x == 0).sum((2, 3))[:, 0]
    assert holes.max() == 81 and holes.min() >= 25  # 9 x 9 and less at the border
    ramp = torch.arange(32, dtype=torch.uint8).expand(1, 3, 32, 32)
    for seed in range(20):
        row = augment(ramp, torch.Generator().manual_seed(seed))[0, 0]
        middle = row[:, 8:24][(row[:, 8:24] != 0).all(1)][0]
        assert torch.allclose(middle.diff().abs(), torch.full((15,), 1 / 127.5), atol=1e-6)


def test_the_learning_rate_rises_and_falls_twice_the_second_time_half_as_high():
    rates = [rate(i / 10, (10, 5)) for i in range(151)]
    assert rates[0] == rates[100] == rates[150] == 0 and rates[20] == max(rates) == PEAK
    assert rates[110] == max(rates[100:]) == PEAK / 2


@pytest.mark.slow
def test_a_second_cycle_is_trained_and_goes_on_from_its_checkpoint(noise_images, tmp_path):
    def train(cycles, name):
        words = [
            noise_images,
            "--work",
            str(tmp_path),
            "--epochs",
            *cycles,
            "--output_dir",
            str(tmp_path / name),
        ]
        assert main(words) == 0

    train(["1", "1"], "whole")
    (tmp_path / "features-1-1-0.pt").rename(tmp_path / "whole.pt")
    train(["1", "0"], "half")
    (tmp_path / "features-1-0-0.pt").rename(tmp_path / "features-1-1-0.pt")
    train(["1", "1"], "resumed")
    half, whole, resumed = (load_file(tmp_path / name) for name in ("half", "whole", "resumed"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert any(not torch.equal(whole[k], half[k]) for k in whole)
