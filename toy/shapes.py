"""Captioned images, drawn on the spot: 32 x 32 pixels, antialiased, with captions that leave much unsaid.

A caption names the colour and the shape of the main figure, and sometimes its size or its place. Everything
else
(the exact place and size, a tilt, the background, a small companion figure) is left to chance. That is what
makes
the flow worth shortening: a caption that fixed the image would make its flow nearly straight, and three Euler
steps of any teacher would do.
"""

import itertools
import math
from typing import NamedTuple

import torch

SIDE = 32  # pixels

COLOURS = {
    "red": (0.86, 0.14, 0.14),
    "orange": (0.97, 0.55, 0.08),
    "yellow": (0.98, 0.90, 0.18),
    "green": (0.16, 0.64, 0.24),
    "cyan": (0.20, 0.82, 0.86),
    "blue": (0.14, 0.30, 0.86),
    "purple": (0.52, 0.18, 0.74),
    "pink": (0.98, 0.56, 0.78),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
SIZES = {"small": (5.0, 6.5), "large": (8.5, 10.5)}  # radius in pixels
PLACES = ("on the left", "on the right", "at the top", "at the bottom")
OPENINGS = ("", "a picture of", "there is")

# What a caption can name, and what the attribute reader reads. "side" and "height" are the two axes of a
# place.
ATTRIBUTES = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "size": tuple(SIZES),
    "side": ("left", "right"),
    "height": ("top", "bottom"),
}

# Every colour and every shape is seen in training, these eight pairs never are.
HELD_OUT = frozenset(
    {
        ("red", "star"),
        ("orange", "ring"),
        ("yellow", "square"),
        ("green", "triangle"),
        ("cyan", "cross"),
        ("blue", "circle"),
        ("purple", "star"),
        ("pink", "triangle"),
    }
)


class Captions(NamedTuple):
    """A batch of captions and what each of them names.

    `text`: n strings. `named`: (n, 5) integers in the order of `ATTRIBUTES`, -1 where the caption is silent.
    """

    text: list
    named: torch.Tensor


def article(word):
    return "an" if word[0] in "aeiou" else "a"


def write_caption(colour, shape, size=None, place=None, opening=""):
    """One English caption, e.g. 'a picture of a small red star at the top'."""
    words = [w for w in (size, colour, shape) if w]
    return " ".join([*opening.split(), article(words[0]), *words, *(place or "").split()])


def pairs(held_out):
    """The (colour, shape) pairs of training (False) or the ones kept from it (True)."""
    return [p for p in itertools.product(COLOURS, SHAPES) if (p in HELD_OUT) == held_out]


def draw_captions(n, generator, held_out=False):
    """n captions at random: colour and shape always, size in 2 of 5, place in 2 of 5."""

    def choice(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    def chance(p):
        return bool(torch.rand(1, generator=generator) < p)

    text, named = [], []
    for _ in range(n):
        colour, shape = choice(pairs(held_out))
        size = choice(list(SIZES)) if chance(0.4) else None
        place = choice(PLACES) if chance(0.4) else None
        text.append(write_caption(colour, shape, size, place, choice(OPENINGS)))
        named.append(name_attributes(colour, shape, size, place))
    return Captions(text, torch.tensor(named))


def name_attributes(colour, shape, size=None, place=None):
    """The row of `Captions.named` for one caption."""
    given = {
        "colour": colour,
        "shape": shape,
        "size": size,
        "side": place.split()[-1] if place in PLACES[:2] else None,
        "height": place.split()[-1] if place in PLACES[2:] else None,
    }
    return [ATTRIBUTES[a].index(given[a]) if given[a] else -1 for a in ATTRIBUTES]


def draw_images(captions, generator, anywhere=False):
    """Images that obey the captions and leave the rest to chance.

    Figures stand near one of nine places, almost upright; with `anywhere` they stand and tilt freely
    (harder to learn: the flow's first stage, the VAE and the reader see these).

    Returns `images` (n, 3, 32, 32) in [-1, 1] and `truth` (n, 5), every attribute of the main figure, named
    or not.
    """
    named, n = captions.named, len(captions.text)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    def fill(column, count):
        return torch.where(column < 0, torch.randint(count, (n,), generator=generator), column)

    size = fill(named[:, 2], 2)
    low, high = torch.tensor(list(SIZES.values()))[size].T
    radius = low + (high - low) * uniform(0, 1)
    centre = torch.stack(
        [
            _place(named[:, 3], radius, uniform(0, 1), anywhere),
            _place(named[:, 4], radius, uniform(0, 1), anywhere),
        ],
        1,
    )
    colour, shape = named[:, 0], named[:, 1]
    shade = (torch.tensor(list(COLOURS.values()))[colour] + uniform(-0.04, 0.04, 3)).clamp(0, 1)

    image = _background(n, generator)
    image = _companion(image, centre, radius, colour, uniform, generator)
    tilt = uniform(-0.25, 0.25) * (1 if anywhere else 0.3)
    image = _blend(image, _cover(shape, centre, radius, tilt), shade)
    truth = torch.stack(
        [colour, shape, size, (centre[:, 0] > SIDE / 2).long(), (centre[:, 1] > SIDE / 2).long()], 1
    )
    return image * 2 - 1, truth


def _place(named, radius, u, anywhere):
    """A coordinate that keeps the figure inside; the outer 30 % of its range where the caption names the
    side."""
    low, span = radius + 0.5, SIDE - 2 * radius - 1
    u = torch.where(named == 0, 0.3 * u, torch.where(named == 1, 1 - 0.3 * u, u))
    if not anywhere:  # left, middle or right (top, middle or bottom), give or take a little
        third = (3 * u).floor().clamp(max=2)
        u = 0.12 + 0.38 * third + 0.08 * (3 * u - third - 0.5)
    return low + span * u


def _background(n, generator):
    """A muted gradient in a random direction: nothing of it is ever named."""
    ends = (
        0.15
        + 0.7 * torch.rand(n, 2, 1, generator=generator)
        + 0.12 * (torch.rand(n, 2, 3, generator=generator) - 0.5)
    )
    angle = 2 * math.pi * torch.rand(n, 1, 1, generator=generator)
    x, y = _pixels()
    along = ((x - SIDE / 2) * angle.cos() + (y - SIDE / 2) * angle.sin()) / SIDE + 0.5  # (n, H, W)
    along = along.clamp(0, 1)[:, None]
    return ends[:, 0, :, None, None] * (1 - along) + ends[:, 1, :, None, None] * along


def _companion(image, centre, radius, colour, uniform, generator):
    """In two images of five a much smaller figure of another colour, where the main one leaves room."""
    n, small = len(image), uniform(2.3, 3.2)
    tries = 3.5 + (SIDE - 7) * torch.rand(n, 8, 2, generator=generator)
    gap = (tries - centre[:, None]).norm(dim=-1) - radius[:, None]
    spot = tries[torch.arange(n), gap.argmax(1)]
    other = (colour + torch.randint(1, len(COLOURS), (n,), generator=generator)) % len(COLOURS)
    shape = torch.randint(
        2, (n,), generator=generator
    )  # a circle or a square: at this size nothing else can be told
    present = (uniform(0, 1) < 0.4)[:, None, None, None]
    generated = _blend(
        image, _cover(shape, spot, small, uniform(-0.25, 0.25)), torch.tensor(list(COLOURS.values()))[other]
    )
    return torch.where(present, generated, image)


def _pixels():
    y, x = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
    return x, y


def _blend(image, cover, colour):
    cover = cover[:, None]
    return image * (1 - cover) + colour[:, :, None, None] * cover


def _cover(shape, centre, radius, tilt):
    """How much of each pixel the figure covers, (n, H, W) in [0, 1], from its signed distance in pixels."""
    x, y = _pixels()
    x, y = x - centre[:, 0, None, None], y - centre[:, 1, None, None]
    cos, sin = tilt.cos()[:, None, None], tilt.sin()[:, None, None]
    x, y, r = cos * x + sin * y, cos * y - sin * x, radius[:, None, None]
    distance = torch.stack([f(x, y, r) for f in DISTANCES.values()])[shape, torch.arange(len(shape))]
    return (0.5 - distance).clamp(0, 1)


def _triangle(x, y, r):
    down = y - 0.58 * r  # the base lies below the centre, the tip above
    slope = 0.866 * x.abs() - 0.5 * y - 0.58 * r
    return torch.maximum(down, slope)


def _star(x, y, r):
    """Five tips: fold the plane into one tenth, then measure the distance to the line from a tip to a
    notch."""
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle + math.pi / 5, 2 * math.pi / 5) - math.pi / 5).abs()
    rho = torch.sqrt(x * x + y * y + 1e-9)
    px, py = rho * folded.cos(), rho * folded.sin()
    notch = (0.45 * math.cos(math.pi / 5), 0.45 * math.sin(math.pi / 5))
    normal = (notch[1], 1 - notch[0])
    length = math.hypot(*normal)
    return (normal[0] * (px - 1.1 * r) + normal[1] * py) / length


# Signed distances in pixels, negative inside, in the order of SHAPES.
DISTANCES = {
    "circle": lambda x, y, r: torch.sqrt(x * x + y * y) - r,
    "square": lambda x, y, r: torch.maximum(x.abs(), y.abs()) - 0.86 * r,
    "triangle": _triangle,
    "star": _star,
    "ring": lambda x, y, r: (torch.sqrt(x * x + y * y) - 0.74 * r).abs() - 0.25 * r,
    "cross": lambda x, y, r: torch.minimum(
        torch.maximum(x.abs() - r, y.abs() - 0.33 * r), torch.maximum(x.abs() - 0.33 * r, y.abs() - r)
    ),
}
