"""Images: where they come from, how they are read, how they become batches on the device.

Order and augmentation are functions of (seed, epoch, image) alone: see augment.py. Needs torch,
numpy and pillow; torchvision, where it is there, decodes JPEGs faster and fetches CIFAR.

    python data.py check IMAGES                 # read every image beforehand, and name the bad ones
    python data.py pack IMAGES IMAGES.tar       # one tar of many files, which is read as the folder

Shapes: N images, C channels, (H, W) source, (h, w) output pixels; boxes (top, left, height, width).
"""
import argparse
import contextlib
import copy
import csv
import fcntl
import functools
import gc
import hashlib
import io
import json
import math
import os
import re
import signal
import stat
import sys
import tarfile
import tempfile
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError, features

from augment import (COLOUR, CROP, MASK, ORDER, PIXELS, SUBSET, augment, central_boxes, grey,
                     per_image, random_bits, random_boxes, resample, shuffled, uniform, upload)

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DOWNLOADS = ("cifar10", "cifar100")     # fetched by name: all that uses the network
EXTENSIONS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".dib", ".tif", ".tiff",
              ".gif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".avif")
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000"]  # no helper programs
if "avif" in features.modules and features.check("avif"):                   # pillow from 11.3 on
    FORMATS.append("AVIF")
MOST_PIXELS = 1 << 27       # of one image: what claims more is refused before it is allocated
LARGE_FILE = 64 << 20       # bytes: beyond, a file's header is read before the rest is allocated
MEMORY_LIMIT = 4 << 30      # bytes of pixels up to which images of one size are held in memory
MEMORY_SIDE = 128           # and up to which side: larger ones are cropped by workers
FEWER_WORKERS = "memory or /dev/shm may be full, give fewer --workers"
CHUNK = 512 * 224 ** 2       # pixels of a view that are drawn at once, which bounds the memory
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class DataError(ValueError):
    """Data that cannot be used as asked (exit_code 2), or fails in a run (1): one line."""

    def __init__(self, message, exit_code=2):
        super().__init__(printable(message))
        self.exit_code = exit_code


class BadFile(ValueError):
    """An image file that cannot be read: what is wrong with it, in one line."""


@contextlib.contextmanager
def or_bad_file():
    """Whatever goes wrong within is a BadFile: pillow raises a dozen kinds."""
    try:
        yield
    except BadFile:
        raise
    except Exception as error:
        raise BadFile(f"{type(error).__name__}: {error}") from None


def printable(text):
    """A text of which a console can show every name of a file, also one that is not UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def show_all_names():
    """Have the output escape what it cannot show, in place of a UnicodeEncodeError."""
    with contextlib.suppress(AttributeError, OSError):      # a notebook's, or closed
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text):
    """Print a line, in the first process of a run alone."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(text), flush=True)


@functools.cache
def note(text):
    """Say once what was assumed or left out."""
    say(f"note: {text}")


# ------------------------------------------------------------------------------------- image files
def open_image(file):
    """An image file, a path or file object, opened by pillow and not yet decoded, or a BadFile."""
    with or_bad_file(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # its limit is not ours
        try:
            image = Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:      # its words name an object in memory
            raise UnidentifiedImageError("not an image that pillow can read") from None
    if image.width * image.height > MOST_PIXELS:
        image.close()
        raise BadFile(f"DecompressionBombError: it claims {image.width} x {image.height} pixels")
    return image


@functools.cache
def jpeg_decoder():
    """torchvision's operation (bytes, channels, False) -> uint8 (C, H, W); None without it.

    Pillow's pixels in 0.8 of its time. decode_jpeg around it looks for whom to warn at every call.
    """
    try:
        import torchvision
        return torch.ops.image.decode_jpeg
    except (ImportError, OSError, RuntimeError, AttributeError):
        return None


class Encoded:
    """An image file's bytes, a bytearray, with the header read, or a BadFile.

    is_jpeg: whether it can be decoded at 1/2, 1/4 or 1/8 of its size. size: (H, W), of a JPEG as
    its EXIF orientation turns it, of others as in the header. bits: 8, 16 or 32 a value.
    """

    def __init__(self, content):
        if not content:
            raise BadFile("empty file")
        self.content, self.image = content, open_image(io.BytesIO(content))
        form, mode = self.image.format, self.image.mode
        self.is_jpeg = form in ("JPEG", "MPO")
        with or_bad_file():
            orientation = self.image.getexif().get(0x0112, 1) if self.is_jpeg else 1
        self.size = self.image.size if orientation > 4 else self.image.size[::-1]
        self.channels = {"L": 1, "RGB": 3}.get(mode) if self.is_jpeg and orientation == 1 else None
        # of colours of 16 bits pillow keeps 8
        self.is_deep = form == "PNG" and content[24] == 16 and mode in ("LA", "RGB", "RGBA")
        is_16 = mode.startswith("I;16") or mode == "I" and form in ("PNG", "PPM") or self.is_deep
        self.bits = 16 if is_16 else 32 if mode in ("I", "F") else 8
        self.tags = getattr(self.image, "tag_v2", {})                   # a TIFF's
        self.depth = max(self.tags.get(258, (8,)))                      # bits of a stored value
        if form == "JPEG2000":                              # its marker SIZ, the first component
            self.depth = (content[content.find(b"\xff\x4f\xff\x51") + 42] & 127) + 1
        elif form == "PPM" and isinstance(self.image.tile[0][3], tuple):
            self.depth = self.image.tile[0][3][-1].bit_length()
        # MinIsWhite, which pillow turns in 8 bits alone
        self.whites_least = mode.startswith("I;16") and self.tags.get(262) == 0

    def decode(self, factor=1):
        """The PIL image, upright, of ceil(size / factor) pixels; factor 2, 4 or 8 for JPEGs."""
        with or_bad_file():
            if factor > 1:
                width, height = self.image.size
                self.image.draft(None, (width // factor, height // factor))
            image = ImageOps.exif_transpose(self.image)
            if self.whites_least:
                image = Image.fromarray((1 << self.tags[258][0]) - 1 - np.array(image))
            return image

    def pixels(self, in_chans, factor=1, value_range=None):
        """The same as a uint8 tensor (H, W, C) with in_chans channels; see `to_channels`."""
        decode = jpeg_decoder() if self.channels and factor == 1 else None
        if decode and in_chans in (3, self.channels):
            with contextlib.suppress(RuntimeError):     # pillow decodes more, or says what is wrong
                content = torch.frombuffer(self.content, dtype=torch.uint8)
                return decode(content, in_chans, False).permute(1, 2, 0)
        if self.bits == 32 and value_range is None:
            raise BadFile("values of 32 bits in a set of 8 or 16 bits: give --range")
        with or_bad_file():
            trouble = self.lacking(in_chans)
            if trouble:
                raise BadFile(trouble)
            if self.is_deep:
                image = Image.fromarray(to_bytes(self.values(), value_range or (0, 65535)))
                if "exif" in self.image.info:               # else pillow would decode all to look
                    image.getexif()[0x0112] = self.image.getexif().get(0x0112, 1)
                    image = ImageOps.exif_transpose(image)
            else:
                image = self.decode(factor)
            image = to_channels(image, in_chans, value_range)
        return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)

    def lacking(self, in_chans):
        """What pillow would leave out of an image or misread unsaid, and what to do about it; else
        None."""
        tags, bands, form = self.tags, len(self.image.getbands()), self.image.format
        if bands > 1 and self.depth > 8:
            return (f"a {form} whose colours have {self.depth} bits, of which pillow reads 8: save "
                    "it as a PNG")
        if self.depth == 8 and 2 in tags.get(339, ()):
            return "a TIFF of 8 bits with a sign, which pillow leaves out: save it with 16 bits"
        if in_chans == 4 and bands < 4 <= tags.get(277, 1):         # it is not called alpha
            return (f"a TIFF of {tags[277]} bands, of which {bands} are read: save it as an RGBA "
                    "PNG, the fourth band as alpha")

    def values(self):
        """Colours of 16 bits as an array (H, W, C)."""
        import torchvision
        if not hasattr(torchvision.io, "decode_png"):           # deprecated from 0.29 on
            raise BadFile("colours of 16 bits, which need torchvision.io.decode_png")
        content = torch.frombuffer(self.content, dtype=torch.uint8)
        values = torchvision.io.decode_png(content, torchvision.io.ImageReadMode.UNCHANGED)
        return values.permute(1, 2, 0).numpy()

    def extremes(self):
        """(least, largest) of the values of an image, a BadFile where some are none."""
        with or_bad_file():
            values = self.values() if self.is_deep else finite(self.decode())
        return float(values.min()), float(values.max())


def finite(image):
    """The values of a PIL image as an array; a BadFile where some are none."""
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadFile("NaN or infinite values")
    return values


def to_bytes(values, value_range):
    """An array of values as uint8: low becomes 0, high 255."""
    low, high = value_range
    values = (values.astype(np.float64) - low) * (255 / (high - low))
    return (values + 0.5).clip(0, 255).astype(np.uint8)


def to_channels(image, in_chans, value_range=None):
    """Any PIL image with in_chans channels of 8 bits: palette, CMYK, alpha, 16 bits, floats.

    value_range (low, high): what becomes black and white of values of more than 8 bits; None: the
    range of 16 bits.
    """
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = Image.fromarray(to_bytes(finite(image), value_range or (0, 65535)))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    return image if image.mode == mode else image.convert(mode)


def plain_bands(image):
    """The image, to be resized: of RGBA pillow would multiply the colours by the fourth band."""
    return Image.merge("CMYK", image.split()) if image.mode == "RGBA" else image


def crop(pixels, box, size, view):
    """A box of uint8 pixels (H, W, C) resized to size (h, w): uint8 (C, h, w).

    Whole boxes by torch's antialiasing: pillow's resize but for rounding, in a quarter of the time;
    the fractional ones of evaluations by pillow.
    """
    if view["scale"] is None:
        top, left, height, width = box
        image = plain_bands(Image.fromarray(pixels.squeeze(2).numpy()))
        box = left, top, left + width, top + height
        image = image.resize(size[::-1], FILTERS[view["mode"]], box=box)
        return torch.from_numpy(np.array(image)).reshape(*size, -1).permute(2, 0, 1)
    top, left, height, width = map(int, box)
    # the batch axis comes first, so that channels stay last in memory, which saves a third
    part = pixels[top:top + height, left:left + width][None].permute(0, 3, 1, 2)
    return F.interpolate(part, size, mode=view["mode"], antialias=True, align_corners=False)[0]


# --------------------------------------------------------------------------------- sources of bytes
class Names:
    """Strings as one numpy array of bytes, a sequence: in a worker a million neither cost nor grow.

    names: strings, or such an array.
    """

    def __init__(self, names):
        if not isinstance(names, np.ndarray):           # joined, since encoding each costs more
            text = os.fsencode("\0".join(names))
            names = np.array(text.split(b"\0") if text else [], bytes)
        self.array = names

    def __len__(self):
        return len(self.array)

    def __getitem__(self, i):
        return os.fsdecode(self.array[i])

    def select(self, ids, cut=0):
        """The names at ids, without their first `cut` bytes."""
        array = self.array[np.asarray(ids, np.int64)]
        return Names(np.array([name[cut:] for name in array.tolist()], bytes) if cut else array)

    def folders(self):
        """The bytes before the first / of each name, b"" where there is none."""
        return [name[:max(name.find(b"/"), 0)] for name in self.array.tolist()]

    def below(self, folder):
        """Indices of the names that begin with folder/."""
        return [i for i, first in enumerate(self.folders()) if first == os.fsencode(folder)]


class FileSource:
    """Image files: `names` below the folder `root`. Any source of bytes has these attributes and
    methods. labels: None, or (N,) names of classes, "" for none."""

    labels = None

    def __init__(self, root, names):
        self.root = root
        self.names = names if isinstance(names, Names) else Names(names)

    def __len__(self):
        return len(self.names)

    def content(self, i):
        """The bytes of file i, a bytearray; OSError or BadFile when it cannot be read."""
        path = os.path.join(self.root, self.names[i])
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):        # a pipe or device may wait or never end
            raise BadFile("not a regular file")
        if status.st_size > LARGE_FILE:             # perhaps sparse: allocated if it is an image
            with open_image(path) as image:
                if status.st_size > LARGE_FILE + 32 * image.width * image.height:
                    raise BadFile(f"{status.st_size / 2 ** 30:.1f} GiB are more than an image of "
                                  f"{image.width} x {image.height} pixels has")
        with open(path, "rb") as f:
            content = bytearray(status.st_size)
            del content[f.readinto(content):]
        return content

    def select(self, ids):
        """The files at ids, indices."""
        return FileSource(self.root, self.names.select(ids))


def duration(seconds):
    """1:02:03 or 2:03."""
    hours, rest = divmod(int(seconds + 0.5), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


class Progress:
    """How far a long job has come, its rate and the time left, after its first five seconds: on a
    terminal one line that is rewritten, elsewhere a line every 30 seconds."""

    def __init__(self, what, total=None, unit="images", quiet=False, done=0):
        self.what, self.total, self.unit, self.done, self.first = what, total, unit, done, done
        self.started = time.perf_counter()
        self.due = float("inf") if quiet else self.started + 5

    def step(self, n=1):
        self.done += n
        now = time.perf_counter()
        if now < self.due or sys.stderr is None:
            return
        terminal = getattr(sys.stderr, "isatty", bool)()                # of a logger's: none
        self.due = now + (0.5 if terminal else 30)
        rate, of, left = (self.done - self.first) / (now - self.started), "", ""
        if self.total:
            of = f" of {self.total}"
            left = f", left {duration((self.total - self.done) / rate)}"
        line = f"{self.what}: {self.done}{of} {self.unit}, {rate:.3g}/s{left}"
        end = "" if terminal and self.done != self.total else "\n"
        print(f"\r{line}\033[K" if terminal else line, end=end, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- tar files
class TarSource(FileSource):
    """Images in tars, named and ordered as in the folder that the tars unpack to.

    tars: their [(path, bytes)]. places (N, 3): number of the tar, offset and length of each image.
    labels: what WebDataset's .cls files say.
    """

    def __init__(self, root, names, tars, places, labels=None):
        super().__init__(root, names)
        self.tars, self.places, self.labels = tars, places, labels

    def content(self, i):
        """The bytes of image i, a bytearray. OSError when its tar is not what it was."""
        tar, at, length = self.places[i].tolist()
        (path, size), content = self.tars[tar], bytearray(length)
        with open(path, "rb", buffering=0) as f:
            read = os.preadv(f.fileno(), [content], at)
            if read < length or os.fstat(f.fileno()).st_size != size:
                raise OSError(f"{path} has changed since it was opened")
        return content

    def select(self, ids, cut=0):
        """The images at ids, indices, without the first `cut` bytes of their names."""
        return TarSource(self.root, self.names.select(ids, cut), self.tars, self.places[ids],
                         None if self.labels is None else self.labels[ids])


def find_tars(path):
    """Paths of the tars that a file, a pattern such as shard-{000..146}.tar or a folder stands for.

    None where path is something else: a folder of images, or a list file. DataError: a pack of an
    older version, a tar of a pattern that is not there.
    """
    if os.path.isdir(path):
        return tars_below(path)
    if os.path.isfile(path):
        with open(path, "rb") as f:
            head = f.read(32)
        return [path] if path.endswith(".tar") and not head.startswith(tuple(NOT_LISTS)) else None
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        return None
    parts, ends = braces[1].split(","), re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if ends:
        parts = [str(i).zfill(len(ends[1])) for i in range(int(ends[1]), int(ends[2]) + 1)]
    tars = []
    for part in parts:
        one = path[:braces.start()] + part + path[braces.end():]
        found = find_tars(one)
        if found is None:
            raise DataError(f"{one}: no such tar")
        tars += found
    return tars


def tars_below(folder, depth=2):
    """Tars in a folder and in those below it, sorted; None if there are images or other folders."""
    tars = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS):
                return None
            if entry.name.endswith(".tar") and entry.name[0] != ".":
                if not os.path.exists(entry.path):
                    raise DataError(f"{entry.path}: a link to a tar that is not there")
                if entry.is_file():
                    tars.append(entry.path)
            elif entry.is_dir() and entry.name[0] != ".":
                below = depth and tars_below(entry.path, depth - 1)
                if not below:
                    return None
                tars += below
    return sorted(tars) or None


def tar_members(f, path, start=0):
    """(name, offset, size) of each file in the tar that begins at a place of an open one, and of
    those of tars in it, in a folder of the inner tar's name; neither hidden ones nor links.
    DataError: it is damaged or cut short."""
    f.seek(start)
    links = 0
    try:
        with tarfile.open(fileobj=f, mode="r:", encoding="utf-8") as tar:
            while member := tar.next():
                tar.members = []            # or a million of them stay in memory
                parts = [part for part in member.name.split("/") if part not in ("", ".")]
                if not member.isreg() or member.issparse():
                    links += not member.isdir()
                elif not parts or any(part[0] == "." for part in parts):
                    continue
                elif parts[-1].endswith(".tar"):
                    inner = "/".join(parts)[:-4]
                    for name, *place in tar_members(f, path, member.offset_data):
                        yield f"{inner}/{name}", *place
                else:
                    yield "/".join(parts), member.offset_data, member.size
    except tarfile.TarError as error:
        raise DataError(f"{path}: this tar is damaged or cut short ({error})") from None
    # tarfile stops without a word at a header that it cannot read, and where tars are joined
    rest = os.pread(f.fileno(), 1024 if start else 10240, tar.offset)
    if len(rest) < 512 or rest.strip(b"\0"):
        raise DataError(f"{path}: this tar is damaged, cut short or two in one at {tar.offset}")
    if links:
        note(f"{path}: passed over {links} links and the like (tar -h packs what they stand for)")


def index_tars(path, tars):
    """{names, places, labels}, arrays: the index of tars [(path, bytes)]."""
    names, places, labels, progress = [], [], [], Progress(f"indexing {path}")
    for number, (tar, _) in enumerate(tars):
        files, texts = {}, {}
        with open(tar, "rb") as f:
            for name, at, size in tar_members(f, tar):
                progress.step()
                if name.endswith(".cls"):
                    text = os.pread(f.fileno(), min(size, 4096), at)
                    texts[name[:-4]] = text.decode("utf-8", "replace").strip()
                else:
                    files[name] = number, at, size      # the last of one name, as when unpacked
        names += files
        places += files.values()
        for name in files:          # 1.2.840.png goes with 1.2.840.cls, a.seg.png with a.cls
            keys = os.path.splitext(name)[0], re.sub(r"\.[^/]*$", "", name)
            labels.append(next((texts[key] for key in keys if key in texts), ""))
    names = in_folders(path, [tar for tar, _ in tars], names, [number for number, *_ in places])
    order = sorted(range(len(names)), key=lambda i: tree_order(names[i]))
    source = TarSource(path, Names(names), tars, np.array(places, np.int64).reshape(-1, 3),
                       np.array(labels, str)).select(order)
    source = images_of(source, warn=True)
    return dict(names=source.names.array, places=source.places, labels=source.labels)


def in_folders(path, tars, names, tar):
    """The names of images as in the folder that their tars, of these numbers, stand for.

    Tars keep the folders they lie in. Where each is named as train, val or test and not all the
    same, these are the parts. Images named after their tar, as ImageNet's, have it as their class.
    A folder around all is left out if the tar has its name, or train/ and the like lie in it.
    """
    root = path if os.path.isdir(path) else os.path.dirname(path.split("{")[0])
    folders = [(os.path.dirname(one)[len(root):] + "/").lstrip("/") for one in tars]
    stems = [os.path.basename(one)[:-4] for one in tars]
    parts = [next(filter(None, map(part_kind, re.split(r"[^a-z]+", stem.lower()))), None)
             for stem in stems]
    if None not in parts and len(set(parts)) > 1:
        folders = [f"{folder}{part}/" for folder, part in zip(folders, parts)]
        tops = [set() for _ in tars]
        for t, name in zip(tar, names):
            tops[t].add(name.split("/")[0])
        around = [len(top) == 1 and part_kind(*top) == part for top, part in zip(tops, parts)]
        names = [name[name.find("/") + 1:] if around[t] else name for t, name in zip(tar, names)]
    elif len(tars) > 1 and all(name.startswith(f"{stems[t]}_") for t, name in zip(tar, names)):
        folders = [f"{folder}{stem}/" for folder, stem in zip(folders, stems)]
    names = [folders[t] + name for t, name in zip(tar, names)]
    top = names[0].split("/")[0] + "/" if names else ""
    if all(name.startswith(top) for name in names) and not part_kind(top[:-1]):
        inner = {name[len(top):].split("/")[0] for name in names}
        if [top[:-1]] == stems or any(map(part_kind, inner)):
            return [name[len(top):] for name in names]
    return names


def open_tars(path, tars):
    """TarSource of every image in the tars that `path` stands for.

    Their index is read, or made and kept: beside them, or where that cannot be written in the
    temporary folder. It holds as long as names, sizes and times of the tars do.
    """
    full, status = os.path.abspath(path), [os.stat(tar) for tar in tars]
    place = os.path.join(full, "tars.index.npz") if os.path.isdir(path) else f"{full}.index.npz"
    if not os.path.exists(place) and not os.access(os.path.dirname(place), os.W_OK):
        name = hashlib.sha256(os.fsencode(full)).hexdigest()[:32]
        place = os.path.join(tempfile.gettempdir(), f"tar-index-{os.getuid()}-{name}.npz")
    tars = [(tar, s.st_size) for tar, s in zip(tars, status)]
    made = [(os.path.basename(tar), size, s.st_mtime_ns) for (tar, size), s in zip(tars, status)]
    made, index = json.dumps([4, EXTENSIONS, made]), {}
    with contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile):
        with np.load(place, allow_pickle=False) as kept:
            index = dict(kept)
    if index.get("made") != made:
        index = index_tars(path, tars)
        part = f"{place}.{os.getpid()}.part"
        try:
            with open(part, "wb") as f:
                np.savez(f, made=made, **index)
            os.replace(part, place)
        except OSError as error:
            note(f"{place}: cannot be written ({error.strerror}), so it is made again each time")
    labels = index["labels"] if (index["labels"] != "").any() else None
    return TarSource(path, Names(index["names"]), tars, index["places"], labels)


class Dataset:
    """A set of images: a `source` of their files' bytes, or uint8 `images` (N, C, H, W) in memory,
    or both.

    labels: (N,) int64 or None, and `unlabelled` says why; classes: their names. mean, std: of the
    channels, after scaling to [0, 1]. range: (low, high) of values of more than 8 bits, what
    becomes black and white; None: all have 8. bits: the most of those looked at. bad: {index: what
    is wrong}, as far as is known.
    """

    def __init__(self, source=None, images=None, labels=None, classes=None, in_chans=3, name=""):
        self.source, self.images = source, images
        self.labels, self.classes, self.in_chans, self.name = labels, classes, in_chans, name
        self.range, self.bits = None, 8
        self.unlabelled, self.bad = "it has no class folders", {}
        self.mean, self.std = IMAGENET_STATS
        if in_chans != 3:
            self.mean, self.std = ((sum(x) / 3,) * in_chans for x in IMAGENET_STATS)

    def __len__(self):
        return len(self.source) if self.images is None else len(self.images)

    @property
    def files(self):
        """The names of all files, a sequence, or None."""
        return None if self.source is None else self.source.names

    def file(self, i):
        return f"{self.name}/{i}" if self.source is None else self.files[i]

    def open(self, i):
        """Image i with its bytes in memory and its header read (`Encoded`), or a BadFile."""
        with or_bad_file():
            return Encoded(self.source.content(i))

    def read(self, i):
        """Image i, upright, as uint8 (H, W, C), of several frames the first, or a BadFile."""
        if self.images is None:
            return self.open(i).pixels(self.in_chans, value_range=self.range)
        if i in self.bad:
            raise BadFile(self.bad[i])
        return self.images[i].permute(1, 2, 0)

    @property
    def digest(self):
        """Changes when an image is added, renamed or removed."""
        text = os.fsencode("\0".join(self.files or [self.name, str(len(self))]))
        return hashlib.sha256(text).hexdigest()[:16]

    @property
    def label_digest(self):
        """Changes when a label or a class's name does; None where there are no labels."""
        if self.labels is None:
            return None
        text = "\0".join(map(str, self.classes)) + str(self.labels.tolist())
        return hashlib.sha256(os.fsencode(text)).hexdigest()[:16]

    def label(self, names, classes):
        """Label each image by the name of its class."""
        number = {name: i for i, name in enumerate(classes)}
        self.labels, self.classes = torch.tensor([number[name] for name in names]), classes

    def label_by_folders(self, train):
        """Labels from the first folder of each name, if all have one; a training set several."""
        folders = self.files.folders()
        known = {name: nfc(os.fsdecode(name)) for name in set(folders)}
        classes = sorted(set(known.values()) - {""})
        if b"" in known and classes:
            stray = self.file(folders.index(b""))
            self.unlabelled = f"{stray} lies beside the class folders"
        elif len(classes) == 1 and train:
            self.unlabelled = f"it has one class folder only, {classes[0]}"
        elif classes:
            self.label([known[folder] for folder in folders], classes)

    def select(self, ids):
        """The images at ids (a list or tensor of indices), as a set of its own."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        part = copy.copy(self)
        part.source = None if self.source is None else self.source.select(ids.numpy())
        part.images = None if self.images is None else self.images[ids.to(self.images.device)]
        part.labels = None if self.labels is None else self.labels[ids]
        rows = enumerate(ids.tolist()) if self.bad else ()
        part.bad = {row: self.bad[i] for row, i in rows if i in self.bad}
        return part

    def hold(self, device):
        """Move images that are in memory to the device; others stay files."""
        if self.images is not None:
            self.images = self.images.to(device)
        return self


# ---------------------------------------------------------------------------------- finding images
PARTS = {"train": "train|training|trn", "val": "val|valid|validation|dev",
         "test": "test|testing|tst|eval"}
COLUMNS = {"file": ("file", "filename", "file_name", "path", "filepath", "image", "image_path",
                    "image_id", "image_name", "img", "name", "id"),
           "label": ("label", "labels", "class", "class_name", "target", "category", "diagnosis",
                     "dx"),
           "split": ("split", "part", "subset", "set")}
# beside images, what segmentation has: in folders of their own, or cell_mask.png beside cell.png
SUFFIX = "s?(8bit|fine|tr|class|[-_].*)?"
MASKS = re.compile(f"(?i)(label|mask|ann|annotation|seg|segmentation|ground.?truth|gt){SUFFIX}")
PICTURES = re.compile(f"(?i)(image|img|jpegimage|leftimg|picture|photo|rgb){SUFFIX}")
MASK_OF = re.compile(rb"(?i)[-_ .](mask|seg(mentation)?|gt|label|label.?ids|ground.?truth|trimap|"
                     rb"superpixel|instance|binary|manual|annotation)s?[-_]?\d*(?=\.)")
NOT_LISTS = {b"PK\3\4": "a zip archive, a spreadsheet or arrays of numpy: unpack it, save it as "
                          "CSV or write its images to files",
             b'{"': "JSON: write a CSV", b"[{": "JSON: write a CSV", b"{\n": "JSON: write a CSV",
             b"PAR1": "a parquet table: write its images to files",
             b"\x93NUMPY": "a numpy array: write its images to files",
             b"\x89HDF": "an HDF5 file: write its images to files",
             b"\x1f\x8b": "compressed by gzip: unpack it", b"BZh": "compressed by bzip2: unpack it",
             b"\xfd7zXZ": "compressed by xz: unpack it",
             b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
             b"\xff\xd8\xff": "an image", b"\x89PNG": "an image", b"SQLite": "a database"}
nfc = functools.partial(unicodedata.normalize, "NFC")


def list_files(root, warn=False):
    """Names of the image files below root: each folder's own, sorted, before those of its folders.

    Hidden ones are left out, and every real folder is visited once, however many links lead there.
    Files of other endings are taken if it is images that they hold; warn: say what is passed over.
    """
    def fail(error):
        raise DataError(f"{error.filename}: cannot be listed ({error.strerror})") from None

    blocks, seen, links = {}, set(), [root]
    while links:                            # after the real folders, the first at the end
        links.sort(reverse=True)
        for folder, inner, files in os.walk(links.pop(), onerror=fail):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                inner.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            inner[:] = [name for name in inner if name[0] != "."]
            paths = (os.path.join(folder, name) for name in inner)
            links += [os.path.join(path, "") for path in paths if os.path.islink(path)]
            prefix = os.path.join(folder, "")[len(os.path.join(root, "")):]
            blocks[prefix] = sorted(name for name in files if name[0] != ".")
    order = sorted(blocks, key=lambda prefix: prefix.split("/"))        # as tree_order, but faster
    source = FileSource(root, [prefix + name for prefix in order for name in blocks[prefix]])
    return images_of(source, warn).names


def tree_order(name):
    """A key that sorts names as folders are listed: in each its files, then its folders."""
    return "\0\0".join(name.rpartition("/")[::2]).replace("/", "\0")


def images_of(source, warn=False):
    """The images of a source: by their endings, or if most of three of an ending are some; warn:
    say how many files of which endings are passed over."""
    other, known = {}, {form(e).encode() for e in EXTENSIONS for form in (str.lower, str.upper)}
    for i, name in enumerate(source.names.array.tolist()):
        if name[name.rfind(b"."):] not in known and not name.decode(
                errors="replace").lower().endswith(EXTENSIONS):
            ending = os.path.splitext(source.names[i])[1].lower()
            ending = ending if len(ending) < 7 and ending[1:2].isalpha() else ""    # or no ending
            other.setdefault(ending, []).append(i)
    passed = {ending: ids for ending, ids in other.items()
              if not are_images(source.select(sorted({ids[0], ids[len(ids) // 2], ids[-1]})))}
    if warn and passed:
        counts = Counter({ending: len(ids) for ending, ids in passed.items()})
        note(f"{source.root}: passed over {counts.total()} files that are no images: "
             + ", ".join(f"{n} {ending or 'without an ending'}"
                         for ending, n in counts.most_common(8)))
    if not passed:
        return source
    return source.select(sorted(set(range(len(source))).difference(*passed.values())))


def are_images(source):
    """Whether most of some files are images."""
    good = 0
    for i in range(len(source)):
        with contextlib.suppress(BadFile), or_bad_file():
            good += bool(Encoded(source.content(i)))
    return 2 * good > len(source)


@functools.cache
def part_kind(name):
    """train, val or test if that is what a folder's or split's name means, else None."""
    return next((kind for kind, words in PARTS.items() if re.fullmatch(
        rf"({words})[-_ ]?(set|split|images|imgs|data)?", name.lower())), None)


def parts_of(path, names):
    """{train, val, test: the folder's own name} of the folders' names of a set."""
    found, others = {}, []
    for name in sorted(names):
        kind = part_kind(name)
        if kind is None:
            others.append(name)
        elif found.setdefault(kind, name) != name:
            raise DataError(f"{path}: is {found[kind]}/ or {name}/ the {kind} part? Rename one")
    if list(found) == ["train"] and len(others) > 2:        # Pascal VOC and COCO have such a class
        raise DataError(f"{path}: is {found['train']}/, beside {', '.join(others[:3])}, a part or "
                        f"a class? Give {os.path.join(path, found['train'])}, or put the classes "
                        "into a folder train/")
    words = {found[0].lower() for found in (re.search(
        "(?i)^(train|val|test)(?=[^a-z])|(?<=[^a-z])(train|val|test)$", name) for name in others)
        if found}
    if not found and len(words) > 1:                # pre-training would mix them up as classes
        raise DataError(f"{path}: the folders {', '.join(others[:4])} look like parts of a set: "
                        "name them train/, val/ and test/")
    return found


def refuse_parts_within(path, folders):
    """A set that lies a folder deeper would be read with its test images."""
    for name in sorted(folders)[:100]:
        inner = next(os.walk(os.path.join(path, name)), ("", [], []))[1]
        if {"train"} < set(map(part_kind, inner)) - {None}:
            raise DataError(f"{path}: {name}/ in it has parts to train and to test on: give "
                            f"{os.path.join(path, name)}")


def choose_part(path, found, train):
    """The name of the folder to read of those found by `parts_of`, or "" for all of a training set
    that has no parts."""
    wanted = found.get("train") if train else found.get("val") or found.get("test")
    if wanted or (train and not found):
        return wanted or ""
    missing = "train/" if train else "val/ or test/"
    if found:
        raise DataError(f"{path}: no {missing} in this folder; it has {', '.join(found.values())}: "
                        "one that is a class needs another name")
    raise DataError(f"{path}: no train/ and no {missing} in this folder, so nothing to evaluate "
                    "on; --val-share splits a set that has neither")


def open_source(path, train=None, whole=False):
    """(source of the images that `path` names, a folder or tars; {train, val, test: its folder}).

    Of its part to train or to test on, if it has parts, but for `whole`; train=None: of all, which
    is not looked through for parts.
    """
    tars = find_tars(path)
    if tars:
        source = open_tars(path, tars)
        tops = list(map(os.fsdecode, set(source.names.folders()) - {b""}))
    elif os.path.isdir(path):
        inner = next(os.walk(path), (path, [], []))[1]
        tops = [name for name in inner if name[0] != "."]
    elif os.path.isfile(path):
        raise DataError(f"{path} is none of what is read here: a folder, tars or an image")
    else:
        raise DataError(f"{path}: no such folder, list file, tar or image")
    parts = {} if train is None else parts_of(path, tops)
    if not parts and not tars and train is not None:
        refuse_parts_within(path, tops)
    part = "" if train is None or whole else choose_part(path, parts, train)
    others = sorted(set(tops) - set(parts.values()))
    if part and others:
        note(f"{path}: {part}/ is read, not {', '.join(others[:4])}{' ...' * (len(others) > 4)}")
    if not tars:
        root = os.path.join(path, part) if part else path
        source = FileSource(root, list_files(root, warn=True))
        tops = next(os.walk(root))[1]
    elif part:
        source = source.select(source.names.below(part), len(os.fsencode(part)) + 1)
        tops = map(os.fsdecode, set(source.names.folders()))
    if not len(source):
        raise DataError(f"{path}: no images found (looked for {', '.join(EXTENSIONS)})")
    return source if train is None or whole else without_masks(source, tops), parts


def without_masks(source, folders):
    """The source without masks that lie beside their images; DataError: the folders of its names
    are of images and of masks."""
    folders = sorted(folders)
    masks, images = (list(filter(kind.fullmatch, folders)) for kind in (MASKS, PICTURES))
    # folders of text beside images are no masks, as YOLO's labels/
    masks = [folder for folder in masks if images and source.names.below(folder)]
    if masks:
        raise DataError(f"{source.root}: {masks[0]}/ beside {images[0]}/ looks like masks, which "
                        f"are not to be learnt from: give a set of {images[0]}/ alone")
    text = source.names.array.tobytes().lower()
    if not any(word in text for word in (b"mask", b"seg", b"gt", b"label", b"truth", b"trimap",
                                         b"pixel", b"instance", b"binary", b"manual", b"annot")):
        return source                       # nearly always, and of a million in 0.1 s
    stems = [os.path.splitext(name)[0] for name in source.names.array.tolist()]
    plain, known = [MASK_OF.sub(b"", stem + b".")[:-1] for stem in stems], set(stems)
    beside = [i for i, stem in enumerate(stems) if plain[i] != stem and plain[i] in known]
    if beside:
        note(f"{source.root}: passed over {len(beside)} masks beside their images, such as "
             f"{source.names[beside[0]]}")
    return source.select(sorted(set(range(len(stems))).difference(beside)))


def read_table(path):
    """[(name, label or None, split or None)] of a list: one name a line, alone or followed by a
    blank and a label; or a CSV of file, label and split (by , ; or tab), with or without a header.

    A name may have blanks in it: a label is what follows the last one, if it is a number or comes
    after an image.
    """
    try:
        with open(path, "rb") as f:
            head = f.read(4096)
            kind = next((kind for start, kind in NOT_LISTS.items() if head.startswith(start)), None)
            wide = head[:2] in (b"\xff\xfe", b"\xfe\xff")     # a spreadsheet's "Unicode text"
            if kind or b"\0" in head and not wide:
                raise DataError(f"{path} is {kind or 'neither text nor a folder'}; what can be "
                                "read is a folder of image files, or a list of them")
            text = head + f.read()
            text = text.decode("utf-16", "replace") if wide else text.decode(
                "utf-8-sig", "surrogateescape")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    lines = [line.strip(" ") for line in text.splitlines() if line.strip(' \t"')]
    while lines and lines[0].lower().startswith(("sep=", "# ")) and not lines[0].lower().endswith(
            EXTENSIONS):
        lines.pop(0)
    rows = table_of(lines, path)
    if rows is None:
        rows = []
        for line in (line.strip().strip('"') for line in lines):
            name, *label = line.rsplit(maxsplit=1)
            has = label and (label[0].isdigit() or name.lower().endswith(EXTENSIONS))
            rows.append((name, label[0], None) if has else (line, None, None))
    if not rows:
        raise DataError(f"{path}: the list is empty")
    return rows


def table_of(lines, path):
    """The rows of a CSV, see `read_table`, or None where the lines are none."""
    for delimiter in ",;\t|":
        rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        with contextlib.suppress(StopIteration, csv.Error):
            first = next(rows)
            heads = [cell.strip().lower() for cell in first]
            if set(heads) & set(COLUMNS["file"]):
                places = [next((heads.index(word) for word in words if word in heads), None)
                          for words in COLUMNS.values()]
                rows = list(rows)
                ends = [c.strip().lower().endswith(EXTENSIONS) for c in rows[0]] if rows else []
                files = [i for i, (head, end) in enumerate(zip(heads, ends))
                         if end and not MASKS.fullmatch(head)]
                if files and not any(ends[places[0]:places[0] + 1]):
                    places[0] = files[0]                # an id beside the column of the files
                for number, row in enumerate(rows, start=2):
                    if any(cell.strip() for cell in row[len(heads):]):
                        raise DataError(f"{path}: row {number} has more cells than the first line "
                                        f"names columns: a cell with a {delimiter!r} in it needs "
                                        "quotes")
                unknown = [head for i, head in enumerate(heads) if head and i not in places]
                if places[1] is None and unknown:
                    note(f"{path}: no column of labels in it, of {', '.join(unknown)} (they are "
                         f"known by their names: {', '.join(COLUMNS['label'])})")
            elif len(first) > 1 and heads[0].endswith(EXTENSIONS):
                rows, places = [first, *rows], range(3)
                if not all(row[1:] and row[0].strip().lower().endswith(EXTENSIONS) for row in rows):
                    continue
            else:
                continue
            rows = [[None if at is None or at >= len(row) else row[at].strip() for at in places]
                    for row in rows]
            return [(name, None if label == "nan" else label, split)    # pandas' for no label
                    for name, label, split in rows]


def other_part(folders, listed):
    """Whether an image's folders say train, val or test, and those of the listed one another."""
    own, asked = (set(map(part_kind, names)) - {None} for names in (folders, listed))
    return bool(own and asked) and not own & asked


def same_folder(one, other):
    """Whether two folders have one name, or both that of the same part, Train/ and training/."""
    return one == other or part_kind(one) is not None and part_kind(one) == part_kind(other)


def find_listed(source, rows, where):
    """Indices into a source of the listed names; all must be found. By the whole name, else by its
    last parts, as many as both have; absolute where they lie below its root; with or without an
    ending."""
    position, whole = {}, all(name and name.lower().endswith(EXTENSIONS) for name, *_ in rows)
    for i, file in enumerate(source.names):
        last = nfc(file[file.rfind("/") + 1:])
        for key in {last} if whole else {last, os.path.splitext(last)[0]}:
            position.setdefault(key, []).append(i)
    chosen, missing, doubtful = [], [], []
    for row, (listed, *_) in enumerate(rows, start=1):
        if not listed:
            raise DataError(f"{where}: row {row} of the table names no file")
        name = nfc(listed if "/" in listed else listed.replace("\\", "/"))
        if re.match("'[-+=@]", name) and name.split("/")[-1] not in position:
            name = name[1:]                                 # as write_csv guards it
        if name.startswith("/"):
            name = os.path.relpath(os.path.realpath(name), os.path.realpath(source.root))
        parts = os.path.normpath(name).split("/")
        if parts[0] in ("", ".."):
            raise DataError(f"{where}: the name {listed!r} leads out of the data folder")
        hits = {i: nfc(source.names[i]).split("/")[:-1] for i in position.get(parts[-1], ())}
        fits = [i for i, folders in hits.items() if folders == parts[:-1]] or [
            i for i, folders in hits.items()    # a file in no folder goes by its name alone
            if all(map(same_folder, folders[::-1], parts[-2::-1]))
            and not other_part(folders, parts[:-1])]
        if len(fits) == 1:
            chosen += fits
        else:
            near = f" (there is {source.names[min(hits)]})" if hits else ""
            (doubtful if fits else missing).append(listed + near * (not fits))
    if missing:
        table = "; a table begins with a line that names its columns, file and label"
        raise DataError(f"{where}: {len(missing)} of {len(rows)} listed images do not exist, "
                        f"first {missing[0]}{table * bool(re.search('[,;|]', missing[0]))}")
    if doubtful:
        raise DataError(f"{where}: {doubtful[0]} stands for several images; list it with its "
                        "folder")
    names = {}
    for i, (listed, *_) in zip(chosen, rows):
        if names.setdefault(i, listed) != listed:
            raise DataError(f"{where}: {names[i]} and {listed} stand for one image, "
                            f"{source.names[i]}")
    return chosen


def open_folder(path, train, in_chans, labels_file=None, val_share=0):
    """The images of a folder, or of a list beside its images: those to train or to test on, with
    the labels of the list, or else of their class folders."""
    if in_chans not in (1, 3, 4):
        raise DataError(f"{in_chans} channels are asked for: images are read with 1 (grey), 3 "
                        "(RGB) or 4 (RGBA)")
    name, part, labels = path, train or val_share > 0, None
    is_list = os.path.isfile(path) and not find_tars(path)
    if is_list and labels_file:
        raise DataError(f"--labels-file {labels_file}: {path} is a list already")
    if is_list:
        path, labels_file = os.path.dirname(os.path.abspath(path)), path
    rows = read_table(labels_file) if labels_file else []
    if rows and not is_list and not any(label for _, label, _ in rows):
        raise DataError(f"--labels-file {labels_file}: no column of labels in it (they are known "
                        f"by their names: {', '.join(COLUMNS['label'])})")
    source, parts = open_source(path, None if is_list else part, whole=bool(rows))
    if rows:
        source, labels, parts = listed_images(source, rows, labels_file, parts, part)
    if val_share and ("val" in parts or "test" in parts):
        raise DataError(f"--val-share: {name} has test images of its own; if these have no labels, "
                        "give the folder of the training images")
    dataset = Dataset(source, in_chans=in_chans, name=name)
    if labels:
        dataset.label(labels, sorted_classes(labels))
        note(f"labels of {labels_file}: {len(dataset.classes)} classes, "
             f"{', '.join(dataset.classes[:4])}{', ...' if len(dataset.classes) > 4 else ''}")
    elif source.labels is None:
        dataset.label_by_folders(train)
    elif "" in source.labels:
        missing = np.flatnonzero(source.labels == "")
        dataset.unlabelled = f"{len(missing)} have no .cls, first {dataset.file(missing[0])}"
    else:
        dataset.label(source.labels.tolist(), sorted_classes(source.labels.tolist()))
    return split_off(dataset, val_share, train) if val_share else dataset


def listed_images(source, rows, table, parts, train):
    """(source, labels or None, parts) of the rows of a list; of the part to train or to test on, by
    its column split, or by the folders `parts`, where there are such."""
    ids = find_listed(source, rows, table)
    named = [source.names[i] for i in ids]
    splits = [split for *_, split in rows]
    if any(splits):
        kinds = [part_kind(split or "") for split in splits]
        if None in kinds:
            raise DataError(f"{table}: {splits[kinds.index(None)]!r} in the column split is none "
                            "of train, val, test")
        parts = {kind: kind for kind in kinds}
        if not train and {"val", "test"} <= set(parts):
            note(f"{table}: images of split val are tested on, not those of test")
        trained = {i for i, kind in zip(ids, kinds) if kind == "train"}
        both = [i for i, kind in zip(ids, kinds) if kind != "train" and i in trained]
        if both:
            raise DataError(f"{table}: {len(both)} images are in split train and in another, first "
                            f"{source.names[both[0]]}")
    else:
        kinds = [name.split("/")[0] for name in named]
    chosen = choose_part(table, parts, train)
    mine = [(i, nfc(label or "")) for i, kind, (_, label, _) in zip(ids, kinds, rows)
            if not chosen or kind == chosen]
    if not mine:
        raise DataError(f"{table}: no row of it names an image of {chosen}/; to test on some of "
                        "the others give their folder, with --val-share")
    source, labels = source.select([i for i, _ in mine]), [label for _, label in mine]
    if not any(labels) and any(label for _, label, _ in rows):
        raise DataError(f"{table}: no image of {chosen} has a label in it, others have")
    if not any(labels):
        return source, None, parts
    known = {}
    for row, (i, label) in enumerate(mine):
        if not label or known.setdefault(i, label) != label:
            trouble = "two labels" if label else (
                f"no label (so {sum(not label for _, label in mine)} of {len(mine)}): take such "
                "rows out of the table")
            raise DataError(f"{table}: {source.names[row]} has {trouble}")
    if len(known) < len(mine):
        note(f"{table}: {len(mine) - len(known)} rows repeat others and are left out")
        first = sorted({i: row for row, (i, _) in reversed([*enumerate(mine)])}.values())
        source, mine = source.select(first), [mine[row] for row in first]
        labels = [label for _, label in mine]
    # numbers for folders, as in ImageNet's lists, are known by the folders' names, in all parts
    folder = {i: os.path.basename(os.path.dirname(name)) for i, name in zip(ids, named)}
    every = {(folder[i], label) for i, (_, label, _) in zip(ids, rows)}
    counts = {len(every), len({place for place, _ in every}), len({label for _, label in every})}
    numbers = all((label or "").isdecimal() for _, label in every)
    own = any(place.isdecimal() or not place for place in folder.values())
    if numbers and not own and len(counts) == 1:
        labels = [folder[i] for i, _ in mine]
    return source, labels, parts


def sorted_classes(labels):
    """Class names in order: of their numbers where all are numbers."""
    classes = sorted(set(labels))
    return sorted(classes, key=int) if all(c.isdecimal() for c in classes) else classes


def split_off(dataset, share, train):
    """A random share of each class, of the whole set where there are none, or to train on what
    remains; the same images in every run."""
    labels = torch.zeros(len(dataset)).long() if dataset.labels is None else dataset.labels
    counts = labels.bincount()
    wanted = (counts * share).round().clamp_min(1).minimum(counts - 1)
    if not wanted.clamp_min(0).any():
        raise DataError(f"--val-share: no class of {dataset.name} has two images, to hold one out")
    held = first_of_each(labels, wanted, shuffled(len(dataset), SUBSET, 5, 0))
    mine = torch.full((len(dataset),), bool(train))
    mine[held] = not train
    return dataset.select(mine.nonzero()[:, 0])


def first_of_each(labels, wanted, order):
    """Indices, sorted, of the first wanted[c] images of each class c in an order."""
    order = order[labels[order].argsort(stable=True)]
    counts = labels.bincount(minlength=len(wanted))
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < wanted[labels[order]]].sort().values


def every_image(path, in_chans=3, value_range=None):
    """All images below a folder or in tars, of all parts, without labels, or the one that path is.
    DataError: none."""
    if os.path.isfile(path) and path.lower().endswith(EXTENSIONS):
        source = FileSource(os.path.dirname(path), [os.path.basename(path)])
    else:
        source, _ = open_source(path)
    dataset = Dataset(source, in_chans=in_chans, name=path)
    dataset.range = find_range(dataset, value_range)
    return dataset


# ------------------------------------------------------------------------------------ loading a set
def load(source, train=True, in_chans=3, stats="imagenet", max_bad=0.01, value_range=None,
         labels_file=None, val_share=0):
    """The images that --data names; None: the embedded set.

    value_range: (low, high), "auto" or None, see `find_range`. labels_file: a CSV of file, label
    and perhaps split. val_share: the share of each class that is the test set.
    """
    if source and source not in DOWNLOADS:
        dataset = open_folder(source, train, in_chans, labels_file, val_share)
        found, measured = sample(dataset), dataset
        if not train and (value_range == "auto" or any(bits == 32 for _, _, bits in found)):
            with contextlib.suppress(DataError):            # one range for both parts
                measured = open_folder(source, True, in_chans, labels_file, val_share)
        dataset.range = find_range(measured, value_range, found)
        dataset.bits = measured.bits
        dataset = into_memory(dataset, {size for _, size, _ in found}, max_bad)
    elif labels_file or val_share:
        raise DataError(f"{source or 'the embedded set'} has labels and test images of its own")
    else:
        dataset = download(source, train, in_chans) if source else embedded(train, in_chans)
    if stats == "data":
        dataset.mean, dataset.std = measure_stats(dataset)
    return dataset


def sample(dataset):
    """[(index, size, bits)] of 64 images chosen by hash, by their headers."""
    found, stacks, without = [], 0, 0
    for i in shuffled(len(dataset), 0, SUBSET)[:64].tolist():
        with contextlib.suppress(BadFile), or_bad_file():
            image = dataset.open(i)
            found.append((i, image.size, image.bits))
            stacks += not image.is_jpeg and getattr(image.image, "n_frames", 1) > 1
            without += dataset.in_chans == 4 and not image.image.has_transparency_data
    if without:
        note(f"{dataset.name}: {without} of {len(found)} images looked at have no fourth channel; "
             "it is 255 throughout")
    if stacks:
        note(f"{dataset.name}: {stacks} of {len(found)} images looked at have several frames, of "
             "which the first is read")
    return found


def value_range(text):
    """An argparse type: auto, or LOW,HIGH -> (low, high)."""
    if text == "auto":
        return text
    with contextlib.suppress(ValueError):
        low, high = map(float, text.split(","))
        if -1e30 < low < high < 1e30:
            return low, high
    raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor LOW,HIGH")


def find_range(dataset, asked=None, found=None):
    """(low, high) of values of more than 8 bits that become black and white, or None for 8 bits.

    What is asked for; else that of 16 bits; "auto", or else of 32 bits and floats, which have no
    range of their own: the least and largest value of a sample.
    """
    found = found or sample(dataset)
    dataset.bits = deepest = max((bits for _, _, bits in found), default=8)
    if asked and deepest == 8:
        note(f"{dataset.name}: none of {len(found)} images looked at has more than 8 bits, and "
             "those of 8 need no --range")
    if asked not in (None, "auto"):
        return tuple(map(float, asked))
    if deepest == 8:
        return None
    if deepest == 16 and asked is None:
        return 0.0, 65535.0
    values = []
    for i, _, bits in sample(dataset):
        with contextlib.suppress(BadFile):
            values += dataset.open(i).extremes() if bits > 8 else ()
    if not values:
        raise DataError(f"{dataset.name}: no image to measure the range of values on", 1)
    low, high = min(values), max(values)
    high = high if high > low else low + 1
    note(f"{dataset.name}: values from {low:g} to {high:g}, measured on a sample, become "
         "black to white; --range sets others")
    return low, high


def download(name, train, in_chans):
    import torchvision
    if in_chans != 3:
        raise DataError(f"--data {name} has three channels, not {in_chans}")
    try:
        raw = getattr(torchvision.datasets, name.upper())("downloads", train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"--data {name}: not in downloads/ and cannot be downloaded ({error})",
                        1) from None
    images = torch.from_numpy(np.ascontiguousarray(raw.data)).permute(0, 3, 1, 2).contiguous()
    return Dataset(images=images, labels=torch.tensor(raw.targets), classes=raw.classes, name=name)


def into_memory(dataset, sizes, max_bad):
    """Decode images that all have one small size into memory; others are left as they are. sizes:
    {(H, W)} of a sample."""
    n, (height, width) = len(dataset), max(sizes, default=(0, 0))
    values = n * height * width * dataset.in_chans
    if len(sizes) != 1 or max(height, width) > MEMORY_SIDE or values > MEMORY_LIMIT:
        return dataset
    images, bad = torch.zeros(n, dataset.in_chans, height, width, dtype=torch.uint8), {}

    def decode(i):
        """Whether image i fits in, or cannot be read."""
        try:
            pixels = dataset.read(i).permute(2, 0, 1)
        except BadFile as error:
            bad[i] = str(error)
            return True
        fits = pixels.shape == images.shape[1:]
        if fits:
            images[i] = pixels
        return fits

    with ThreadPool(os.cpu_count()) as pool:
        if all(pool.imap(decode, range(n))):     # else they are read as files
            dataset.bad = dict(sorted(bad.items()))
            report_bad(dataset, max_bad)
            dataset.images = images
    return dataset


def report_bad(dataset, max_bad, seen=0):
    """Name the bad files after the first `seen`, once where a set has one twice; DataError when
    their share is above max_bad."""
    bad, n = dataset.bad, len(dataset)
    first = {dataset.file(i): i for i in reversed(bad)}
    for i in list(bad)[seen:]:
        path = os.path.join(getattr(dataset.source, "root", dataset.name), dataset.file(i))
        if first[dataset.file(i)] == i:
            print(printable(f"warning: skipped {path}: {bad[i]}"), flush=True)
    if len(first) > max(max_bad * n, 1):
        raise DataError(f"{len(first)} of {n} images cannot be read, more than --max-bad "
                        f"{max_bad:g} allows; first {dataset.file(next(iter(bad)))}", 1)


def labelled(dataset, spec=None, seed=0, draw="balanced"):
    """Indices of the images whose labels may be used, sorted, and how they were chosen.

    spec: None for all; "1%" or "5 per class", drawn by seed; or a list file (SimCLR's lists).
    draw: "balanced", that share or number of each class, or "natural", as many in all, of any.
    """
    if dataset.labels is None:
        raise DataError(f"{dataset.name}: no labels, {dataset.unlabelled} (a labelled set has one "
                        "folder a class in train/ and val/ or test/, or a --labels-file)")
    if spec is None:
        ids, how = torch.arange(len(dataset)), "all"
    elif os.path.isfile(spec):
        if dataset.files is None:
            raise DataError(f"--labels {spec}: a list names files, and {dataset.name} has none")
        rows = read_table(spec)
        listed = find_listed(dataset.source, rows, f"--labels {spec}")
        ids = torch.tensor(sorted(set(listed)))
        if len(ids) < len(listed):
            note(f"--labels {spec}: {len(listed) - len(ids)} lines repeat others and are left out")
        how = f"list {os.path.basename(spec)}"
        if any(label for _, label, _ in rows):
            note(f"--labels {spec} chooses images; the labels in it are not used, but those "
                 f"of {dataset.name}")
    else:
        ids, how = drawn(dataset, spec, seed, draw), f"{spec}, {draw} draw, seed {seed}"
    found = dataset.labels[ids].unique()
    if len(found) < 2:
        raise DataError(f"{dataset.name}: one class only among the {len(ids)} labelled images, "
                        "nothing to tell apart")
    if len(found) < len(dataset.classes) and draw == "balanced":
        absent = sorted(set(range(len(dataset.classes))) - set(found.tolist()))
        raise DataError(f"--labels {spec!r}: no image of {len(absent)} of the "
                        f"{len(dataset.classes)} classes, first {dataset.classes[absent[0]]}")
    return ids, how


def drawn(dataset, spec, seed, draw):
    """Indices of a share or a number of each class, or of all: the first in a hashed order."""
    labels, classes = dataset.labels, dataset.classes
    text = spec.replace("per class", "").strip()
    share = text.endswith("%")
    try:
        value = float(text[:-1]) if share else int(text)
    except ValueError:
        raise DataError(f"--labels {spec!r}: neither a share (1%), nor '5 per class', nor a list "
                        "file") from None
    if not (0 < value <= 100 if share else value > 0):
        raise DataError(f"--labels {spec!r}: out of range")
    order = shuffled(len(labels), SUBSET, 3, seed)
    if draw == "natural":
        n = max(round(len(labels) * value / 100), 1) if share else value * len(classes)
        if n > len(labels):
            raise DataError(f"--labels {spec!r}: there are only {len(labels)} images")
        return order[:n].sort().values
    counts = labels.bincount(minlength=len(classes))
    some = (counts * value / 100).round().clamp_min(1).long()
    wanted = some if share else torch.full_like(counts, value)
    short = (counts < wanted).nonzero()[:, 0].tolist()
    if short:
        raise DataError(f"--labels {spec!r}: class {classes[short[0]]} has only "
                        f"{counts[short[0]]} images")
    return first_of_each(labels, wanted, order)


def same_classes(train, test):
    """Give the test set the class numbers of the training set; all must be known there."""
    for dataset, part in ((train, "training"), (test, "test")):
        if dataset.labels is None:
            raise DataError(f"{dataset.name}: the {part} images have no labels, "
                            f"{dataset.unlabelled}")
    unknown = [c for c in test.classes if c not in train.classes]
    if unknown:
        raise DataError(f"{test.name}: the test class {unknown[0]} is not among the training "
                        "classes")
    test.labels = torch.tensor([train.classes.index(c) for c in test.classes])[test.labels]
    test.classes = train.classes
    return test


def measure_stats(dataset):
    """Mean and std of each channel over at most 5,000 images, chosen by hash."""
    total, squares, count = 0.0, 0.0, 0
    for i in shuffled(len(dataset), 1, SUBSET)[:5000].tolist():
        with contextlib.suppress(BadFile):
            x = dataset.read(i).double().flatten(0, 1)
            total, squares, count = total + x.sum(0), squares + x.square().sum(0), count + len(x)
    if not count:
        raise DataError(f"--stats data: none of the images of {dataset.name} can be read", 1)
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


# ----------------------------------------------------------------------------------------- batches
def stand_ins(dataset, i):
    """Indices of the images to try in the place of image i, which cannot be read."""
    return (random_bits(torch.tensor([i]), 20, SUBSET, 6)[0] % len(dataset)).tolist()


class Reader(torch.utils.data.Dataset):
    """Reads files, decodes no larger than the crops need, crops and resizes: in the workers.

    Also the DataLoader's sampler: what is to be read from `begin`, an (epoch, batch), on. loader: a
    copy without the DataLoader, or both are in a cycle, whose end waits 5 s a worker.
    """

    TOGETHER = 64                           # images that are opened at once

    def __init__(self, loader):
        self.loader, self.dataset, self.begin = loader, loader.dataset, (0, 0)
        jpeg_decoder()                      # imported once, before workers are forked

    def __iter__(self):
        yield from self.loader.stream(*self.begin)

    def __getitem__(self, key):
        """key (epoch, [i, ...]) -> [shown, bad, crops]: the images shown, a list, with others in
        place of those that cannot be read (-1: none is found); {i: what is wrong with it}; for each
        view its crops, uint8 (N, C, h, w) with channels last in memory. Or a DataError to raise."""
        epoch, wanted = key
        loader, shown = self.loader, list(wanted)
        shape = len(wanted), *loader.size, self.dataset.in_chans
        crops = [torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in loader.views]
        bad = failed = self.fill(range(len(wanted)), shown, crops, epoch)
        if loader.shuffle:
            for attempt in range(20):
                for row in failed:
                    shown[row] = stand_ins(self.dataset, wanted[row])[attempt]
                failed = self.fill(failed, shown, crops, epoch)
            for row in failed:
                shown[row] = -1
        if torch.utils.data.get_worker_info():      # here, not in the thread that hands it over,
            try:                                    # where an error is lost
                crops = [view.share_memory_() for view in crops]
            except RuntimeError as error:
                return DataError(f"a data worker has no shared memory ({error}): make /dev/shm "
                                 "larger, or give --workers 0", 1)
        return [shown, {wanted[row]: trouble for row, trouble in bad.items()}, crops]

    def fill(self, rows, shown, crops, epoch):
        """Put the crops of image shown[row] into each row; {row: what is wrong with its image}."""
        loader, opened, failed = self.loader, {}, {}
        for row in rows:
            try:
                opened[row] = self.dataset.open(shown[row])
            except BadFile as error:
                failed[row] = str(error)
        if not opened:
            return failed
        # boxes for all of them at once: a dozen small tensor operations each would cost as much as
        # the decoding
        ids = torch.tensor([shown[row] for row in opened])
        full = torch.tensor([image.size for image in opened.values()])
        # the largest of JPEG's own reductions that keeps every crop at least as large as its output
        room = (self.boxes(ids, full, epoch)[:, :, 2:] / torch.tensor(loader.size)).amin((1, 2))
        room[torch.tensor([not image.is_jpeg for image in opened.values()])] = 1
        factors = 2 ** torch.bucketize(room, torch.tensor([2.0, 4.0, 8.0]), right=True)
        small = -(-full // factors[:, None])
        plans = zip(list(opened), ids.split(1), factors.tolist(), small.tolist(),
                    self.boxes(ids, small, epoch).tolist())
        for row, i, factor, size, boxes in plans:
            try:
                pixels = opened.pop(row).pixels(self.dataset.in_chans, factor, self.dataset.range)
            except BadFile as error:
                failed[row] = str(error)
                continue
            if list(pixels.shape[:2]) != size:      # a format that is turned as it is decoded
                boxes = self.boxes(i, torch.tensor([pixels.shape[:2]]), epoch)[0].tolist()
            for k, (box, view) in enumerate(zip(boxes, loader.views)):
                cut = crop(pixels, box, loader.size, view)
                if view.get("pixels"):
                    cut = per_image(cut[None].contiguous(), i, view["pixels"], PIXELS, k,
                                    loader.seed, epoch)[0]
                crops[k][row] = cut
        return failed

    def boxes(self, ids, sizes, epoch):
        """The boxes (N, views, 4) of images of sizes (N, 2)."""
        views = range(len(self.loader.views))
        return torch.stack([self.loader.boxes(ids, sizes, k, epoch) for k in views], 1)


class Batch:
    """ids (n,) of the images, on the CPU; view(k) draws a view; noise(L) the numbers of masks.

    shown (n,): as ids, but where an image cannot be read the one that stands in for it: labels go
    by `shown`. readable (n,) bool: whether the image itself can be read.
    crops: of each view its crops, uint8 (n, C, h, w), for images that are files.
    """

    def __init__(self, loader, ids, epoch, shown, readable, crops=None):
        self.loader, self.ids, self.epoch = loader, ids, epoch
        self.shown, self.readable, self.crops = shown, readable, crops

    def __len__(self):
        return len(self.ids)

    def view(self, k):
        """View k, augmented and normalised, (n, C, h, w) float32 on the device."""
        size = max(CHUNK // math.prod(self.loader.size), 1)
        parts = [slice(start, start + size) for start in range(0, len(self), size)]
        with torch.autocast(self.loader.device.type, enabled=False):
            parts = [self.draw(k, part) for part in parts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def draw(self, k, part):
        loader, view, shown = self.loader, self.loader.views[k], self.shown[part]
        key = k, loader.seed, self.epoch
        if self.crops is not None:
            x = self.crops[k][part].contiguous().float() / 255
        else:
            images = loader.dataset.images
            sizes = torch.tensor([images.shape[2:]]).expand(len(shown), 2)
            boxes = loader.boxes(shown, sizes, k, self.epoch)
            x = images[upload(shown, images.device)].to(loader.device)
            x = resample(x, boxes, loader.size, view["mode"])
            if view.get("pixels"):
                x = (x * 255 + 0.5).to(torch.uint8)
                x = per_image(x, shown, view["pixels"], PIXELS, *key).float() / 255
        x = augment(x, self.ids[part], view, COLOUR, *key)
        return (x - loader.mean) / loader.std

    def noise(self, length):
        """(n, length) uniform numbers of each image, which choose its mask."""
        ids = upload(self.ids, self.loader.device)
        return uniform(ids, length, MASK, self.loader.seed, self.epoch)


class Loader:
    """Batches of a set, in hashed order: for batch in loader.epoch(e, start): ...

    batch_size is this process's share of the global batch. Every process gets its share; the rest
    of an epoch that fills no global batch is left out. shuffle=False, for evaluations: in order,
    with a shorter batch at the end, and nothing stands in for an image that cannot be read.
    `waited` counts seconds spent waiting for data. A function under "pixels" in a view's dict gets
    each crop as uint8 (C, h, w); for files in the reading process.
    """

    def __init__(self, dataset, views, size, batch_size, seed=0, workers=0, device="cpu", rank=0,
                 processes=1, shuffle=True, max_bad=0.01, mean=None, std=None):
        self.dataset, self.views, self.size = dataset, views, tuple(size)
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.rank, self.processes = rank, processes
        self.shuffle, self.max_bad = shuffle, max_bad
        self.mean = torch.tensor(mean or dataset.mean, device=device)[:, None, None]
        self.std = torch.tensor(std or dataset.std, device=device)[:, None, None]
        self.waited = 0.0
        # a batch is read in parts, by several workers at once; of at least 16 images, since the
        # boxes of a part take 2 ms and an image 3
        self.part = min(Reader.TOGETHER, max(-(-batch_size // max(workers, 1)), 16))
        self.reader = self.items = self.place = None
        if dataset.images is None:
            if workers and len(os.fsencode(tempfile.gettempdir())) > 75:
                raise DataError(f"the temporary folder {tempfile.gettempdir()} has too long a name "
                                "for the sockets of data workers: set TMPDIR to a shorter one", 1)
            ahead = -(-2 * -(-batch_size // self.part) // max(workers, 1))
            reader = Reader(copy.copy(self))
            self.reader = torch.utils.data.DataLoader(
                reader, batch_size=None, sampler=reader, num_workers=workers,
                worker_init_fn=settle, pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
                prefetch_factor=max(ahead, 2) if workers else None)

    def __getstate__(self):                 # for the workers: the device is not theirs
        return {k: v for k, v in self.__dict__.items() if k not in ("mean", "std")}

    def __len__(self):
        n = self.batch_size * self.processes
        return len(self.dataset) // n if self.shuffle else -(-len(self.dataset) // n)

    def boxes(self, ids, sizes, k, epoch):
        """Boxes (n, 4) of view k for images ids (n,) of sizes (n, 2)."""
        scale = self.views[k]["scale"]
        if scale is None:
            return central_boxes(sizes, self.size)
        return random_boxes(ids, sizes, scale, CROP, k, self.seed, epoch)

    def batches(self, epoch, start=0):
        """The indices of each batch of this process, from batch `start` on."""
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = shuffled(len(self.dataset), ORDER, self.seed, epoch)
        for b in range(start, len(self)):
            first = (b * self.processes + self.rank) * self.batch_size
            if first < len(order):
                yield order[first:first + self.batch_size]

    def stream(self, epoch, start):
        """The Reader's keys from a batch on; where shuffled into the epochs that follow, so that
        reading goes on at an epoch's end."""
        while True:
            for ids in self.batches(epoch, start):
                yield from ((epoch, part.tolist()) for part in ids.split(self.part))
            if not self.shuffle or not len(self):
                return
            epoch, start = epoch + 1, 0

    def epoch(self, epoch, start=0):
        """The batches of an epoch, from batch `start` on."""
        if self.reader is not None and self.place != (epoch, start):
            self.reader.dataset.begin = epoch, start
            try:
                self.items = iter(self.reader)
            except OSError as error:
                raise DataError(f"data workers cannot be started ({error.strerror}): give fewer "
                                "--workers", 1) from None
        for b, ids in enumerate(self.batches(epoch, start), start + 1):
            if self.reader is None:
                yield self.batch(ids, epoch, *self.held(ids.tolist()))
                continue
            self.place, before = None, time.perf_counter()
            try:
                parts = [next(self.items) for _ in range(-(-len(ids) // self.part))]
            except (RuntimeError, OSError, EOFError) as error:
                dead = "DataLoader worker (pid" in str(error)
                if not dead and (isinstance(error, RuntimeError) or not self.reader.num_workers):
                    raise
                with contextlib.suppress(ValueError):           # torch would raise once more
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                said = error if dead else f"a DataLoader worker has died ({error})"
                raise DataError(f"{said}: {FEWER_WORKERS}", 1) from None
            self.waited += time.perf_counter() - before
            batch = self.batch(ids, epoch, *self.collect(parts))
            if self.shuffle:
                self.place = (epoch, b) if b < len(self) else (epoch + 1, 0)
            yield batch

    def held(self, ids):
        """(images to show, {i: what is wrong with it}) of images in memory."""
        shown, bad = list(ids), self.dataset.bad
        for row, i in enumerate(ids):
            if i in bad and self.shuffle:
                good = (other for other in stand_ins(self.dataset, i) if other not in bad)
                shown[row] = next(good, -1)
        return shown, bad

    def collect(self, parts):
        """The same of what the workers have read, and the crops."""
        for part in parts:
            if isinstance(part, DataError):
                raise part
        shown, bads, crops = zip(*parts)
        bad, known = {}, len(self.dataset.bad)
        for found in bads:
            bad |= found
        self.dataset.bad |= bad
        report_bad(self.dataset, self.max_bad, known)
        crops = [torch.cat([part.to(self.device, non_blocking=True) for part in view])
                 for view in zip(*crops)]
        return sum(shown, []), bad, crops

    def batch(self, ids, epoch, shown, bad, crops=None):
        if -1 in shown:
            i = int(ids[shown.index(-1)])
            raise DataError("20 images in a row cannot be read, among them "
                            f"{self.dataset.file(i)}: {self.dataset.bad[i]}", 1)
        readable = torch.tensor([i not in bad for i in ids.tolist()])
        return Batch(self, ids, epoch, torch.tensor(shown), readable, crops)


def settle(worker):
    """In a new worker: to collect garbage among what is its parent's would copy 80 MiB of it. A
    signal to the run's group (torchrun, Slurm, timeout, Ctrl-C) is for the run, which then needs
    its workers until it has saved."""
    gc.freeze()
    os.setpgid(0, 0)


# ------------------------------------------------------------------------------------ embedded set
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("columns", "rows", "checks", "dots")


def embedded(train=True, in_chans=3, n=None):
    """4,096 (train) or 2,048 (test) drawn images of 16 classes, a shape filled with a texture.

    Image i is a function of i alone. Colours, place, size, turn, ground and light are random, so
    that no pixel tells the class.
    """
    if in_chans not in (1, 3):
        raise DataError(f"--in-chans {in_chans}: the embedded images have 3 channels, or 1 in grey")
    n = n or (4096 if train else 2048)
    first = 0 if train else 1 << 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                # many small operations: faster alone
    images = torch.cat([draw(ids) for ids in torch.arange(first, first + n).split(32)])
    torch.set_num_threads(threads)
    if in_chans == 1:
        images = (grey(images.float()) + 0.5).to(torch.uint8)
    labels = (torch.arange(n) * 5) % 16
    classes = [f"{shape} of {texture}" for shape in SHAPES for texture in TEXTURES]
    return Dataset(images=images, labels=labels, classes=classes, in_chans=in_chans,
                   name="embedded")


def texture(kind, x, y, frequency, turn, *phases):
    """Pattern in [0, 1] at x, y (N, s, s) for kinds (N,); the others are random (N, 1, 1)."""
    frequency, turn = 14.0 + 5.0 * frequency, (turn - 0.5) * 0.4
    a = frequency * (x * turn.cos() + y * turn.sin()) + 6.28 * phases[0]
    b = frequency * (y * turn.cos() - x * turn.sin()) + 6.28 * phases[1]
    dots = 8 * (0.7 * a).sin().abs() * (0.7 * b).sin().abs() - 4.5
    patterns = torch.stack([3 * a.sin(), 3 * b.sin(), 6 * a.sin() * b.sin(), dots], 1)
    return patterns[torch.arange(len(kind)), kind].sigmoid()


def draw(ids, side=32):
    """Embedded images (N, 3, side, side) uint8 of these numbers: drawn twice as large, averaged."""
    n, s = len(ids), 2 * side
    u = uniform(ids, 40, 20230501)[:, :, None, None]
    pick = u.unbind(1)                                                  # numbers (N, 1, 1)
    label = (ids % (1 << 20) * 5) % 16
    line = (torch.arange(s) + 0.5) / s * 2 - 1
    y, x = line[:, None].expand(n, s, s), line[None].expand(n, s, s)

    def colour(column, low, high):
        """A random light in [low, high] with a tint of its own, (N, 3, 1, 1)."""
        light = low + (high - low) * u[:, column:column + 1]
        return light + 0.3 * (u[:, column + 1:column + 4] - 0.5)

    scale, turn = 0.62 + 0.28 * pick[0], (pick[1] - 0.5) * 0.5
    dx, dy = x - (pick[2] - 0.5) * 0.4, y - (pick[3] - 0.5) * 0.4
    px = (dx * turn.cos() + dy * turn.sin()) / scale
    py = (dy * turn.cos() - dx * turn.sin()) / scale
    disc = px.square() + py.square() - 0.9
    square = torch.maximum(px.abs(), py.abs()) - 0.83
    triangle = torch.maximum(py - 0.7, px.abs() * 1.8 - py - 0.9)
    cross = torch.maximum(torch.maximum(px.abs(), py.abs()) - 1,
                          torch.minimum(px.abs(), py.abs()) - 0.38)
    shapes = torch.stack([disc, square, triangle, cross], 1)
    inside = (shapes[torch.arange(n), label // 4] < 0)[:, None]
    # the ground is a smooth wave between two middling colours, the figure's texture a dark and a
    # light one
    turned = x * (6.28 * pick[4]).cos() + y * (6.28 * pick[4]).sin()
    wave = (1.5 * turned + 6.28 * pick[5]).sin() * 0.5 + 0.5
    ground = torch.lerp(colour(6, 0.3, 0.7), colour(10, 0.3, 0.7), wave[:, None])
    pattern = texture(label % 4, x, y, *pick[22:26])[:, None]
    figure = torch.lerp(colour(14, 0.0, 0.3), colour(18, 0.7, 1.0), pattern)
    image = torch.where(inside, figure, ground)
    light = 1 + 0.5 * (pick[26] - 0.5) * x + 0.5 * (pick[27] - 0.5) * y
    noise = uniform(ids, 3 * side * side, 20230502).reshape(n, 3, side, side) - 0.5
    image = F.avg_pool2d(image * light[:, None], 2) + 0.04 * noise
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


# ---------------------------------------------------------------------------- python data.py check
# what a BadFile says: the kind it is counted under; the first that fits
KINDS = {"empty file": "empty", "DecompressionBomb": "decompression bomb",
         "PermissionError": "no permission", "FileNotFoundError": "vanished",
         "UnidentifiedImageError": "no image", "not a regular file": "not a regular file",
         "NaN": "NaN", "truncated": "truncated", "Truncated": "truncated", "EOF": "truncated"}


def look(dataset, i):
    """(what is special about image i, a list; (least, largest) of its values of more than 8 bits,
    else ()), or the text of its BadFile."""
    try:
        dataset.read(i)
        encoded = dataset.open(i)
        extremes = encoded.extremes() if encoded.bits > 8 else ()
    except BadFile as error:
        return str(error)
    image, ending = encoded.image, os.path.splitext(dataset.file(i))[1].lower()
    named = Image.registered_extensions().get(ending)
    frames = 1
    with contextlib.suppress(Exception):    # of a good image the later ones may be damaged
        frames = getattr(image, "n_frames", 1)
    special = {"animated": frames > 1, "CMYK": image.mode == "CMYK", "16-bit": encoded.bits == 16,
               "32-bit or float": encoded.bits == 32,
               "another format than its name says": named != image.format.replace("MPO", "JPEG")}
    return [word for word, true in special.items() if true], extremes


def counted(kinds):
    """2 truncated, 1 empty: the most first."""
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def say_range(dataset, least, largest):
    """Print the range of the values, and what of it the chosen one loses."""
    low, high = dataset.range or (0, 65535)
    asked = f"--range {least:g},{largest:g} keeps"
    say(f"values of more than 8 bits: {least:g} to {largest:g}; {low:g} to {high:g} become black "
        "to white")
    if least < low or largest > high:
        say(f"warning: values outside become black or white; {asked} them")
    levels = int((min(largest, high) - max(least, low)) / (high - low) * 255) + 1
    if levels < 128:
        say(f"warning: of 256 levels {max(levels, 1)} are left; {asked} all")


def check(args):
    """Read every image below args.folder; DataError: some are bad."""
    dataset = every_image(args.folder, value_range=args.range)
    bad, special, values, n = [], Counter(), [], len(dataset)
    progress = Progress(f"checking {args.folder}", n)
    with ThreadPool(args.workers) as pool:  # pillow decodes outside Python's lock
        found = pool.imap(functools.partial(look, dataset), range(n), chunksize=16)
        for i, what in enumerate(found):
            progress.step()
            if not isinstance(what, str):
                special.update(what[0])
                values += what[1]
                continue
            kind = next((kind for words, kind in KINDS.items() if words in what), "damaged")
            bad.append((dataset.file(i), kind, what))
            say(f"{os.path.join(args.folder, dataset.file(i))}: {kind} ({what})")
    among = f", among them {counted(special)}" if special else ""
    say(f"{n - len(bad)} of {n} images are good{among}")
    if values:
        say_range(dataset, min(values), max(values))
    if args.out:
        with open(args.out, "w", errors="surrogateescape") as f:
            for line in bad:
                print(*(" ".join(part.split()) for part in line), sep="\t", file=f)
    if bad:
        kinds = Counter(kind for _, kind, _ in bad)
        raise DataError(f"{len(bad)} of {n} images are bad: {counted(kinds)}", 1)


# ---------------------------------------------------------------------------- python data.py pack
def shrunk(content, short_side):
    """The bytes to keep of an image file, or a BadFile: as they are (short_side: None), or where
    its short side is longer as a JPEG; images with transparency or 16 bits stay as they are."""
    image = Encoded(content)
    with or_bad_file():
        if short_side is None or min(image.size) <= short_side:
            image.decode(8 if image.is_jpeg else 1).load()  # only to know that it can be decoded
            return content
        fits = [f for f in (8, 4, 2) if image.is_jpeg and min(image.size) >= 2 * f * short_side]
        small = image.decode(max(fits, default=1))
        if image.bits > 8 or small.has_transparency_data or image.lacking(4):
            return content                  # more than a JPEG can hold
        small = small.convert("L" if small.mode in ("1", "L") else "RGB")
        scale = short_side / min(small.size)
        small = small.resize([round(side * scale) for side in small.size], Image.LANCZOS)
        small.info.clear()
        packed = io.BytesIO()
        small.save(packed, "JPEG", quality=90)
        return packed.getvalue()


def pack(args):
    """Write every image of a source into a tar, in order; one that was begun is gone on with."""
    dataset, path = every_image(args.folder), args.tar
    part = f"{path}.{args.short_side or 'full'}.part"       # so that none is of two sizes
    if os.path.exists(path):
        raise DataError(f"{path} is there already; remove it to pack again")
    if dataset.source.labels is not None:
        raise DataError(f"{args.folder}: has its labels in .cls files, which pack does not write")
    begun = os.path.getmtime(part) if os.path.exists(part) else 0
    with open(part, "a+b") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{part} is being written by another process") from None
        done = go_on(f, part)
        root = getattr(dataset.source, "root", "")
        files = {name: os.path.join(root, name) for name in done}
        changed = [file for name, file in files.items() if os.path.exists(file)
                   and os.path.getmtime(file) > begun] + sorted(done - set(dataset.files))
        if changed:
            say(f"{part} was begun with other images, such as {changed[0]}: starts over")
            done = set()
            f.seek(0)
            f.truncate()
        todo = [i for i, name in enumerate(dataset.files) if name not in done]
        if done:
            say(f"going on: {len(done)} of {len(dataset)} images are packed already")
        with tarfile.open(fileobj=f, mode="w", encoding="utf-8") as tar:
            fill(tar, dataset, todo, args)
        f.flush()
        os.fsync(f.fileno())
        os.replace(part, path)
    say(f"wrote {path}: {len(dataset) - len(dataset.bad)} images, "
        f"{os.path.getsize(path) / 2 ** 30:.2f} GiB, {len(dataset.bad)} skipped")


def go_on(f, part):
    """Names of the images in a tar that was begun, which is cut after the last whole one."""
    size, done, end = f.seek(0, os.SEEK_END), set(), 0
    with contextlib.suppress(DataError):    # at what was being written
        for name, at, length in tar_members(f, part):
            after = at + -(-length // 512) * 512
            if after <= size:
                done.add(name)
                end = after
    f.truncate(end)
    f.seek(end)
    return done


def fill(tar, dataset, todo, args):
    """Append the images `todo` to a tar; those that cannot be read go into dataset.bad."""
    def prepare(i):
        try:
            with or_bad_file():
                return shrunk(dataset.source.content(i), args.short_side)
        except BadFile as error:
            return str(error)

    progress, some = Progress(f"packing {dataset.name}", len(todo)), 32 * args.workers
    with ThreadPool(args.workers) as pool:
        for start in range(0, len(todo), some):     # bounds the memory
            ids = todo[start:start + some]
            for i, content in zip(ids, pool.imap(prepare, ids)):
                progress.step()
                if isinstance(content, str):
                    dataset.bad[i] = content
                    report_bad(dataset, args.max_bad, len(dataset.bad) - 1)
                    continue
                member = tarfile.TarInfo(dataset.file(i))
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
                tar.members = []                    # or a million of them stay in memory


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message} (--help says what there is)")


def get_args(argv=None):
    parser = Parser(prog="data.py", allow_abbrev=False, description="Commands for sets of images.")
    commands = parser.add_subparsers(dest="command", metavar="check|pack", required=True)
    check_parser = commands.add_parser("check", allow_abbrev=False, help="read every image, and "
                                       "name the bad ones")
    pack_parser = commands.add_parser("pack", allow_abbrev=False, help="many images into one tar, "
                                      "which --data reads as it does their folder; stopped, it "
                                      "is gone on with")
    for add in (check_parser.add_argument, pack_parser.add_argument):
        add("folder", help="folder of images, with all that is below it, or tars")
        add("--workers", type=int, default=os.cpu_count(), help="images read at once")
    add = check_parser.add_argument
    add("--range", type=value_range, metavar="LOW,HIGH|auto",
        help="values of 16-bit and float images that become black and white")
    add("--out", help="file for the list of bad ones: name, tab, kind, tab, what is wrong")
    add = pack_parser.add_argument
    add("tar", nargs="?", help="tar to write")
    add("--short-side", type=int, help="pixels: shrink larger images to it, as JPEGs; those with "
        "transparency or 16 bits stay as they are (default: keep every byte)")
    add("--max-bad", type=float, default=0.01, help="fail when more than this share is bad")
    add("--verify", action="store_true", help="write nothing, check every image of a tar")
    args = parser.parse_args(argv)
    if not 1 <= args.workers <= 256:
        parser.error(f"--workers {args.workers}: 1 to 256")
    out = args.out if args.command == "check" else args.tar
    if out and (os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or ".")):
        parser.error(f"{out}: cannot write there")
    if args.command == "pack":
        if (args.tar is None) != args.verify:
            parser.error("a tar alone with --verify, else images and the tar to write")
        if args.short_side is not None and not 16 <= args.short_side <= 16384:
            parser.error(f"--short-side {args.short_side}: 16 to 16384")
        args.command, args.out, args.range = "check" if args.verify else "pack", None, None
    if not os.path.isdir(args.folder) and not find_tars(args.folder):
        parser.error(f"{args.folder}: no such folder or tar")
    return args


def program(argv=None):
    """The exit code of the command line; what the user can mend is one line."""
    show_all_names()
    try:
        args = get_args(argv)
        (pack if args.command == "pack" else check)(args)
        return 0
    except KeyboardInterrupt:
        print("data.py: error: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:                 # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (DataError, OSError) as error:
        print(f"data.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", 1)


if __name__ == "__main__":
    sys.exit(program())
