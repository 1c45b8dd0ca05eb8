"""From the bytes of a picture file to pixels, with no more work than its crops need. Needs torch, numpy, pillow.

Sizes are (H, W) in pixels, boxes (top, left, height, width).
"""
import contextlib
import functools
import io
import struct
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # and none that pillow needs a program for
MOST_PIXELS = 1 << 27       # of one picture, 134 million: what claims more is refused before its pixels are allocated
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}
START, APP1, SCAN = 0xD8, 0xE1, 0xDA                                        # JPEG's markers
FRAMES = (0xC0, 0xC1, 0xC2)                                                 # baseline, extended, progressive; Huffman


class BadFile(ValueError):
    """A picture file that cannot be read: what is wrong with it, in one line."""


@contextlib.contextmanager
def or_bad_file():
    """Whatever goes wrong within is a BadFile: pillow raises a dozen kinds."""
    try:
        yield
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(f"{type(error).__name__}: {error}") from None


def open_picture(file):
    """A picture file, a path or a file object, opened by pillow and not yet decoded; a BadFile if it is none or claims
    too many pixels."""
    with or_bad_file(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # its limit is not ours
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:                                      # its words name an object in memory
            raise UnidentifiedImageError("not a picture that pillow can read") from None
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise BadFile(f"DecompressionBombError: it claims {image.width} x {image.height} pixels")
    return image


@functools.cache
def jpeg_decoder():
    """torchvision's decode(content, in_chans) -> uint8 (C, H, W), or None where torchvision cannot be imported.

    The same library as in pillow and the same pixels, but without the copies around it: 0.8 of the time.
    """
    try:
        from torchvision.io import ImageReadMode
    except (ImportError, OSError, RuntimeError):
        return None
    modes = {1: ImageReadMode.GRAY.value, 3: ImageReadMode.RGB.value}

    def decode(content, in_chans):
        # the operation under torchvision.io.decode_jpeg, which from 0.29 on looks for whom to warn at every call
        return torch.ops.image.decode_jpeg(torch.frombuffer(content, dtype=torch.uint8), modes[in_chans], False)

    return decode


def device_decoder(device):
    """decode(list of uint8 (bytes,) on the CPU) -> list of uint8 (3, H, W) on the CUDA device; RuntimeError when one of
    them cannot be decoded. nvJPEG, through torchvision; None where there is none of the two. Not run on a GPU."""
    if device.type != "cuda" or jpeg_decoder() is None:
        return None
    from torchvision.io import ImageReadMode, decode_jpeg
    return functools.partial(decode_jpeg, mode=ImageReadMode.RGB, device=device)


def plain_jpeg(content):
    """((H, W), channels) of a JPEG that is grey or of three channels and stands upright, or None.

    Pillow finds the same in ten times the time. Whatever is unusual is left to it: None is never wrong.
    """
    if content[:2] != bytes((0xFF, START)):
        return None
    at, found = 2, None
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, at + 1)
        if marker == SCAN:
            return found
        if marker == APP1:                                                  # EXIF or XMP, which may turn the picture
            segment = content[at:at + 2 + length]
            if b"\x01\x12" in segment or b"\x12\x01" in segment or b"rientation" in segment:
                return None
        if marker in FRAMES:
            bits, height, width, channels = struct.unpack_from(">BHHB", content, at + 4)
            if found or bits != 8 or channels not in (1, 3) or not 0 < height * width <= MOST_PIXELS:
                return None
            found = (height, width), channels
        at += 2 + length
    return None


class Encoded:
    """A picture file's bytes, a bytearray, with the header read.

    is_jpeg: whether it can be decoded at 1/2, 1/4 or 1/8 of its size. size: (H, W), for a JPEG as it is shown, turned
    by its EXIF orientation; of others what the header says, which is only right when they are not turned. plain: size
    and channels of a JPEG as `plain_jpeg` finds them, or None. Whatever is wrong with the file is a BadFile.
    """

    def __init__(self, content):
        self.content, self.plain = content, plain_jpeg(content)
        if self.plain:
            self.is_jpeg, self.size = True, self.plain[0]
            return
        image = self.image
        self.is_jpeg = image.format == "JPEG"
        with or_bad_file():
            orientation = image.getexif().get(0x0112, 1) if self.is_jpeg else 1
        self.size = image.size if orientation > 4 else image.size[::-1]     # above 4: on its side
        if self.is_jpeg and orientation == 1 and image.mode in ("L", "RGB"):
            self.plain = self.size, len(image.mode)

    @functools.cached_property
    def image(self):
        """The PIL image, not yet decoded."""
        return open_picture(io.BytesIO(self.content))

    def decode(self, factor=1):
        """The PIL image, upright, of ceil(size / factor) pixels; factor 2, 4 or 8 for JPEGs only."""
        with or_bad_file():
            if factor > 1:
                width, height = self.image.size
                self.image.draft(None, (width // factor, height // factor))
            return ImageOps.exif_transpose(self.image)

    def pixels(self, in_chans, factor=1):
        """The same as a uint8 tensor (H, W, C) with in_chans channels."""
        decode = jpeg_decoder() if self.plain and factor == 1 else None
        if decode and (in_chans == 3 or in_chans == self.plain[1]):
            try:
                return decode(self.content, in_chans).permute(1, 2, 0)
            except RuntimeError:                                            # pillow decodes more, or says what is wrong
                pass
        with or_bad_file():
            image = to_channels(self.decode(factor), in_chans)
        return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)


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


def crop(pixels, box, size, mode):
    """A box, in whole pixels, of pixels (H, W, C) in 0 to 255 resized to size (h, w), antialiased: uint8 (C, h, w).

    torch's kernels for 8 bits: pillow's resize of the box cut out, but for rounding, in a quarter of the time.
    """
    top, left, height, width = map(int, box)
    # the batch axis comes first, so that torch knows channels to be last: it then leaves them there, and saves a third
    part = pixels[top:top + height, left:left + width][None].permute(0, 3, 1, 2)
    part = F.interpolate(part, size, mode=mode, antialias=True, align_corners=False)[0]
    return part.round().clamp(0, 255).to(torch.uint8) if part.is_floating_point() else part     # floats: on a GPU


def exact_crop(pixels, box, size, mode):
    """As `crop`, by pillow's resize, for the fractional boxes of evaluations."""
    top, left, height, width = box
    image = Image.fromarray(pixels.squeeze(2).numpy())
    image = image.resize(size[::-1], FILTERS[mode], box=(left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).reshape(*size, -1).permute(2, 0, 1)
