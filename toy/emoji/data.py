"""The emoji and their captions.

A parquet file of PNG images of 64 x 64 pixels on white, with the columns `image`, `name`, `source` (noto or
fluent); other columns are not read. The two sets write their names differently ("waving hand medium light
skin tone", "waving hand medium light"): `parse_name` brings them to one object and its skin tones.

A caption is a draw from a distribution, as people's captions are: the object is always named; the tone, the
style and the word "emoji" only sometimes.
"""

import io
import json
import random
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

SIDE = 64  # pixels
TOKENS = 16  # length of every caption in T5 tokens; the longest caption of `all_words` is shorter
TONES = ("light", "medium light", "medium", "medium dark", "dark")
STYLES = ("noto", "fluent")
CONFIG = Path(__file__).parents[1] / "weights" / "emoji"
TONE = re.compile(r"\b(medium light|medium dark|light|medium|dark) skin tone\b")
END = re.compile(r" (medium light|medium dark|light|medium|dark)$")
SAME = {f"{who} deaf": f"deaf {who}" for who in ("man", "woman", "person")}
SAME |= {f"person {who}": who for who in ("elf", "fairy", "mage", "superhero", "supervillain", "vampire")}
SAME |= {"man merpeople": "merman", "woman merpeople": "mermaid", "person merpeople": "merperson"}


class Emoji(NamedTuple):
    """One image in words: what it shows, its skin tones (none, one or two), and whose drawing it is."""

    object: str
    tones: tuple[str, ...]
    style: str

    @property
    def name(self) -> str:
        return ", ".join([self.object, *(f"{t} skin tone" for t in self.tones), f"{self.style} style"])


class Emojis(NamedTuple):
    """A data set: `pixels` (n, 3, 64, 64) uint8, `rows` in the same order."""

    pixels: torch.Tensor
    rows: list[Emoji]

    def part(self, keep: list[int]) -> "Emojis":
        return Emojis(self.pixels[keep], [self.rows[i] for i in keep])


class Caption(NamedTuple):
    """The words, and what they say of the image: "" and () where they are silent."""

    text: str
    object: str
    tones: tuple[str, ...]
    style: str

    def fits(self, row: Emoji) -> bool:
        """Whether the image of `row` could bear this caption."""
        return row.object == self.object and self.tones in ((), row.tones) and self.style in ("", row.style)


def load_emoji(path: str | Path) -> Emojis:
    """Every image of the parquet file. FileNotFoundError, with the mend, where there is none."""
    import pyarrow.parquet
    from PIL import Image

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: pass --data (or set EMOJI_DATA), a parquet file of emoji")
    table = pyarrow.parquet.read_table(path, columns=["image", "name", "source"]).to_pylist()
    images = [Image.open(io.BytesIO(cell["image"]["bytes"])).convert("RGB") for cell in table]
    wrong = {image.size for image in images} - {(SIDE, SIDE)}
    if wrong:
        raise ValueError(f"images of {SIDE} x {SIDE} pixels are needed, {path} has {sorted(wrong)[0]}")
    pixels = torch.stack(
        [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8) for image in images]
    )
    pixels = pixels.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2).contiguous()
    return Emojis(pixels, parse_names([(cell["name"], cell["source"]) for cell in table]))


def parse_names(names: list[tuple[str, str]]) -> list[Emoji]:
    """(name, source) -> Emoji. A tone at the end of a name is one if the object comes in three."""
    ends = Counter((END.sub("", name), source) for name, source in names if END.search(name))
    return [parse_name(name, source, ends[END.sub("", name), source] >= 3) for name, source in names]


def parse_name(name: str, source: str, toned: bool) -> Emoji:
    tones = tuple(TONE.findall(name))
    name = " ".join(TONE.sub("", name).split())
    if toned and not tones and (end := END.search(name)):
        tones, name = (end[1],), END.sub("", name)
    name = name.replace("blonde", "blond")
    return Emoji(SAME.get(name, name), tones, source)


def choose_held_out(rows: list[Emoji], styles: int = 70, tones: int = 130, seed: int = 0) -> list[str]:
    """Names of combinations that are never trained on: objects whose other style, or whose other tones, are.

    styles: how many objects without tones are left out in one of their two styles
    tones: how many images of one tone are left out, at most one of a drawn object
    """
    draw = random.Random(seed)
    variants = defaultdict(list)
    for row in rows:
        variants[row.object].append(row)
    plain = [
        rs for rs in variants.values() if {r.style for r in rs} == {*STYLES} and not any(r.tones for r in rs)
    ]
    toned = [[r for r in rs if len(r.tones) == 1] for rs in variants.values()]
    toned = [rs for rs in toned if len(rs) >= 5]
    chosen = [draw.choice(rs) for rs in draw.sample(plain, min(styles, len(plain) // 4))]
    chosen += [draw.choice(rs) for rs in draw.sample(toned, min(tones, len(toned) // 2))]
    return sorted(row.name for row in chosen)


def split(data: Emojis, folder: str | Path = CONFIG) -> tuple[Emojis, Emojis]:
    """(to train on, held out). The list of names in `held_out.json` is chosen once, when there is none."""
    path = Path(folder) / "held_out.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(choose_held_out(data.rows), indent=0) + "\n", encoding="utf-8")
    names = set(json.loads(path.read_text(encoding="utf-8")))
    out = [i for i, row in enumerate(data.rows) if row.name in names]
    return data.part([i for i, row in enumerate(data.rows) if row.name not in names]), data.part(out)


def draw_weights(rows: list[Emoji]) -> torch.Tensor:
    """How often each row is drawn, summing to 1: an object's share is the square root of its variants.

    Else 25 pairs of tones of "kiss" would be seen 25 times as often as the one cat.
    """
    variants = Counter((row.object, row.style) for row in rows)
    weights = torch.tensor([variants[row.object, row.style] ** -0.5 for row in rows], dtype=torch.float64)
    return weights / weights.sum()


def draw_caption(row: Emoji, draw: random.Random) -> Caption:
    """One of the captions that people could write under the image, short enough for T5."""
    while True:
        caption = any_caption(row, draw)
        if len(caption.text.replace(",", " ,").split()) < TOKENS:
            return caption


def any_caption(row: Emoji, draw: random.Random) -> Caption:
    tones = row.tones if draw.random() < 0.75 else ()
    style = row.style if draw.random() < 0.5 else ""
    texts = ["{}", "{}", "{}", f"{article(row.object)} {{}}".strip(), "{} emoji", "emoji of {}"]
    text = draw.choice(texts).format(row.object)
    if tones:
        pair = " and ".join(tones)
        text += draw.choice([f", {pair} skin tone", f", {pair} skin tone", f" with {pair} skin"])
    if style:
        text += draw.choice([f", {style} style", f", {style} style", f" in {style} style", f", {style}"])
    return Caption(text, row.object, tones, style)


def article(words: str) -> str:
    several = words.split()[0] in ("men", "women", "people") or words.endswith("s")
    return "" if several else "an" if words[0] in "aeiou" else "a"


def all_words(rows: list[Emoji]) -> list[str]:
    """Every word of every caption, sorted."""
    words = {w for row in rows for w in row.object.split()}
    return sorted(
        words | set("a an and with in of emoji skin tone style light medium dark".split()) | {*STYLES}
    )
