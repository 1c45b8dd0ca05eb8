"""From the bytes of a picture file to pixels, with no more work than its crops need. Needs torch, numpy, pillow.

Sizes are (H, W) in pixels, boxes (top, left, height, width).
"""
import io
import struct

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)   # what pillow raises for a bad file
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
START, APP1, SCAN = 0xD8, 0xE1, 0xDA                                        # JPEG's markers
FRAMES = (0xC0, 0xC1, 0xC2)                                                 # baseline, extended and progressive, Huffman


def jpeg_size(content):
    """((H, W), channels) of a JPEG that is grey or of three channels and stands upright, or None.

    Pillow finds the same, but in 0.1 to 0.3 ms. Whatever is not plain is left to it: None is never wrong.
    """
    if content[:2] != bytes((0xFF, START)):
        return None
    at, found = 2, None
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, at + 1)
        if marker == SCAN:
            return found
        if marker == APP1:                                                  # EXIF or XMP: may say that it is to be turned
            segment = content[at:at + 2 + length]
            if b"\x01\x12" in segment or b"\x12\x01" in segment or b"rientation" in segment:
                return None
        if marker in FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", content, at + 4)
            if found or bits != 8 or channels not in (1, 3) or not 0 < height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                return None
            found = (height, width), channels
        at += 2 + length
    return None


class Encoded:
    """A picture file that is in memory and whose header is read.

    is_jpeg: whether it can be decoded at 1/2, 1/4 or 1/8 of its size. size: (H, W), for a JPEG as it is shown, turned by
    its EXIF orientation; of others what the header says, which is only right when they are not turned.
    """

    def __init__(self, content):
        self.content, self.image = content, None
        self.plain = jpeg_size(content)
        if self.plain:
            self.size, self.is_jpeg = self.plain[0], True
            return
        try:
            self.image = Image.open(io.BytesIO(content))
        except UnidentifiedImageError:                                      # its words name an object in memory
            raise UnidentifiedImageError("not a picture that pillow can read") from None
        self.is_jpeg = self.image.format == "JPEG"
        turned = self.is_jpeg and self.image.getexif().get(0x0112, 1) > 4   # on its side
        self.size = self.image.size if turned else self.image.size[::-1]

    def decode(self, factor=1, fast=False):
        """The PIL image, upright, of ceil(size / factor) pixels; factor > 1 for JPEGs only.

        fast: JPEG's fast inverse DCT, and colour not interpolated between its coarser samples. For training: half the
        time, and off by one or two of 255 levels on average.
        """
        if self.plain:
            (height, width), channels = self.plain
            mode = "L" if channels == 1 else "RGB"
            try:
                return Image.frombytes(mode, (-(-width // factor), -(-height // factor)), self.content, "jpeg", mode, "",
                                       factor, int(fast))
            except UNREADABLE:                                              # let pillow say what is wrong with it
                self.image = Image.open(io.BytesIO(self.content))
        if factor > 1:
            width, height = self.image.size
            self.image.draft(None, (width // factor, height // factor))
        return ImageOps.exif_transpose(self.image)


def to_channels(image, in_chans):
    """Any PIL image with in_chans channels of 8 bits: greyscale, palette, CMYK, alpha, 16-bit and float included."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float32)
        scale = 1 if values.max(initial=0) <= 255 else 255 / 65535          # 16 bits unless it all fits 8
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def pixels_of(image):
    """A PIL image of 8 bits -> uint8 tensor (H, W, C) of its own."""
    return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)


def crop(image, box, size, mode, exact=False):
    """A box of a PIL image resized to size (h, w), antialiased: uint8 (h, w, C). Sides of the box in whole pixels, but
    with exact=True, which is for evaluations: pillow's own resize."""
    top, left, height, width = box
    corners = (left, top, left + width, top + height)
    if exact:
        return pixels_of(image.resize(size[::-1], FILTERS[mode], box=corners))
    # torch's kernels for 8 bits are several times as fast as pillow's, and equal to them but for rounding
    pixels = pixels_of(image.crop(corners)).permute(2, 0, 1)[None]
    return F.interpolate(pixels, size, mode=mode, antialias=True, align_corners=False)[0].permute(1, 2, 0)
