"""Sheets and overlays of segment.py, and their colours. Needs numpy and pillow.

Colours are chosen to differ for every kind of colour vision: see `palette`.
"""
import functools

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GREY = (150, 150, 150)      # of ignored pixels
# linear RGB as seen without L, M or S cones (Machado et al., 2009, severity 1)
DEFICIENCIES = np.array([
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
     [-0.003882, -0.048116, 1.051998]],
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
     [-0.011820, 0.042940, 0.968881]],
    [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
     [0.004733, 0.691367, 0.303900]],
])


def oklab(linear):
    """Linear RGB (..., 3) -> OKLab (Ottosson, 2020), where equal distances look about equal."""
    lms = linear @ np.array([[0.4122214708, 0.2119034982, 0.0883024619],
                             [0.5363325363, 0.6806995451, 0.2817188376],
                             [0.0514459929, 0.1073969566, 0.6299787005]])
    return np.cbrt(lms) @ np.array([[0.2104542553, 1.9779984951, 0.0259040371],
                                    [0.7936177850, -2.4285922050, 0.7827717662],
                                    [-0.0040720468, 0.4505937099, -0.8086757660]])


def appearances(colours):
    """sRGB (n, 3), 0 to 255 -> OKLab (4, n, 3): with all cones, and without each of the kinds."""
    x = np.asarray(colours, np.float64) / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    seen = [linear] + [linear @ matrix.T for matrix in DEFICIENCIES]
    return np.stack([oklab(np.clip(v, 0, 1)) for v in seen])


@functools.cache
def palette(n):
    """n colours (n, 3) uint8: each the farthest from those before it, and from GREY, for the kind
    of colour vision that tells it from them worst."""
    steps = np.linspace(0, 255, 10).round()
    grid = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), -1).reshape(-1, 3)
    seen = appearances(grid)
    chosen = [int(np.abs(grid - np.array([0, 85, 170])).sum(1).argmin())]
    nearest = np.linalg.norm(seen - appearances([GREY]), axis=2).min(0)
    while len(chosen) < n:
        distance = np.linalg.norm(seen - seen[:, chosen[-1:]], axis=2).min(0)
        nearest = np.minimum(nearest, distance)
        chosen.append(int(nearest.argmax()))
    return grid[chosen].astype(np.uint8)


def label_image(labels, classes):
    """Class ids (H, W), 255 = ignored, as a palette image: its pixels are the ids, in colour."""
    image = Image.fromarray(labels.astype(np.uint8))
    table = np.full((256, 3), GREY, np.uint8)
    table[:classes] = palette(classes)
    image.putpalette(table.tobytes())
    return image


def coloured(labels, classes):
    """The same as RGB (H, W, 3) uint8."""
    return np.asarray(label_image(labels, classes).convert("RGB"))


def overlay(image, labels, classes):
    """RGB (H, W, 3) uint8 under the colours of its classes."""
    opacity = 0.55
    mixed = (1 - opacity) * image + opacity * coloured(labels, classes)
    return (mixed + 0.5).astype(np.uint8)


def font(size):
    try:
        return ImageFont.load_default(size)
    except TypeError:       # pillow before 10.1 has one size
        return ImageFont.load_default()


def sheet(path, columns, names):
    """A PNG of columns {title: RGB images (H, W, 3) uint8, one a row}, the first smoothly resized,
    with a legend of the class names."""
    text, width, margin, top, line, swatch = font(12), 240, 6, 22, 19, 13     # pixels
    heights = [round(width * len(image) / image.shape[1]) for image in next(iter(columns.values()))]
    across = len(columns) * (width + margin) + margin
    below = top + sum(heights) + len(heights) * margin
    longest = max(text.getlength(name) for name in names)
    per_line = max(1, int((across - margin) // (longest + swatch + 4 * margin)))
    bottom = -(-len(names) // per_line) * line + margin
    page = Image.new("RGB", (across, below + bottom), "white")
    pen = ImageDraw.Draw(page)
    for column, (title, images) in enumerate(columns.items()):
        left, y = margin + column * (width + margin), top
        pen.text((left, 4), title, fill="black", font=text)
        for image, height in zip(images, heights):
            mode = Image.NEAREST if column else Image.BICUBIC
            page.paste(Image.fromarray(image).resize((width, height), mode), (left, y))
            y += height + margin
    for i, (name, colour) in enumerate(zip(names, palette(len(names)).tolist())):
        left = margin + (i % per_line) * (across - margin) // per_line
        y = below + (i // per_line) * line
        pen.rectangle((left, y, left + swatch, y + swatch), fill=tuple(colour), outline="black")
        pen.text((left + swatch + margin, y), name, fill="black", font=text)
    # few colours for the images, so that the file is small; those of the labels stay as they are
    images = page.crop((margin, top, margin + width, page.height - bottom))
    page.paste(images.quantize(64, dither=Image.Dither.NONE).convert("RGB"), (margin, top))
    page.save(path, format="PNG", optimize=True)
