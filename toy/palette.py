"""Small files of figures."""

from PIL import Image

PHOTOGRAPH = 2**14  # an image of more colours is none of lines and points


def few_colours(image: Image.Image) -> Image.Image:
    """A drawing with a palette of 256: a third of the bytes, and not seen. Photographs stay as they are."""
    image = image.convert("RGB")
    return image.quantize(256, dither=Image.Dither.NONE) if image.getcolors(PHOTOGRAPH) else image
