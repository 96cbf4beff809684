"""Small files of figures."""

from PIL import Image

PHOTOGRAPH = 2**14  # an image of more colours is none of lines and points


def few_colours(image: Image.Image) -> Image.Image:
    """A drawing with a palette of 256: a third of the bytes, and not seen. Photographs stay as they are.

    By the largest error: the median cut, PIL's own choice, loses the colour of small things.
    """
    image = image.convert("RGB")
    if not image.getcolors(PHOTOGRAPH):
        return image
    return image.quantize(256, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
