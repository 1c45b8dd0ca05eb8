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
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import re
import stat
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from array import array
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError

from augment import (COLOUR, CROP, MASK, ORDER, PIXELS, SUBSET, augment, central_boxes, grey,
                     per_image, random_bits, random_boxes, resample, shuffled, uniform, upload)

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DOWNLOADS = ("cifar10", "cifar100")     # fetched by name: all that uses the network
PARTS = ("train", "val", "test")
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
              ".jp2")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # no helper programs
MOST_PIXELS = 1 << 27       # of one image: what claims more is refused before it is allocated
MEMORY_LIMIT = 4 << 30      # bytes of pixels up to which images of one size are held in memory
MEMORY_SIDE = 128           # and up to which side: larger ones are cropped by workers
CHUNK = 512                 # images of a view that are augmented at once, which bounds the memory
OLD_PACK = b"\x89picture pack 1\n"    # how the packs of older versions begin
OPEN_TARS = 256             # tars a process keeps open; what is beyond is opened for each image
SYNC = 64 << 20             # bytes between flushes to the disk while a tar is written
FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class DataError(ValueError):
    """Data that cannot be used as asked (exit_code 2), or fails in a run (1): one line."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self):                   # with its code, from a worker process
        return DataError, (str(self), self.exit_code)


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
    """torchvision's decode(content, in_chans) -> uint8 (C, H, W); None without torchvision.

    The same library as in pillow and the same pixels, without the copies around it: 0.8 of the
    time.
    """
    try:
        from torchvision.io import ImageReadMode
    except (ImportError, OSError, RuntimeError):
        return None
    modes = {1: ImageReadMode.GRAY.value, 3: ImageReadMode.RGB.value}

    def decode(content, in_chans):
        # the operation under torchvision.io.decode_jpeg, which from 0.29 on looks for whom to warn
        # at every call
        content = torch.frombuffer(content, dtype=torch.uint8)
        return torch.ops.image.decode_jpeg(content, modes[in_chans], False)

    return decode


class Encoded:
    """An image file's bytes, a bytearray, with the header read, or a BadFile.

    is_jpeg: whether it can be decoded at 1/2, 1/4 or 1/8 of its size. size: (H, W), for a JPEG as
    it is shown, turned by its EXIF orientation; of others what the header says, which is only right
    when they are not turned. bits: 8, 16 or 32 a value (32: integers or floats).
    """

    def __init__(self, content):
        self.content, self.image = content, open_image(io.BytesIO(content))
        form, mode = self.image.format, self.image.mode
        self.is_jpeg = form in ("JPEG", "MPO")
        with or_bad_file():
            orientation = self.image.getexif().get(0x0112, 1) if self.is_jpeg else 1
        self.size = self.image.size if orientation > 4 else self.image.size[::-1]
        self.channels = {"L": 1, "RGB": 3}.get(mode) if self.is_jpeg and orientation == 1 else None
        is_16 = mode.startswith("I;16") or mode == "I" and form in ("PNG", "PPM")
        self.bits = 16 if is_16 else 32 if mode in ("I", "F") else 8

    def decode(self, factor=1):
        """The PIL image, upright, of ceil(size / factor) pixels; factor 2, 4 or 8 for JPEGs."""
        with or_bad_file():
            if factor > 1:
                width, height = self.image.size
                self.image.draft(None, (width // factor, height // factor))
            return ImageOps.exif_transpose(self.image)

    def pixels(self, in_chans, factor=1):
        """The same as a uint8 tensor (H, W, C) with in_chans channels."""
        decode = jpeg_decoder() if self.channels and factor == 1 else None
        if decode and in_chans in (3, self.channels):
            try:
                return decode(self.content, in_chans).permute(1, 2, 0)
            except RuntimeError:            # pillow decodes more, or says what is wrong
                pass
        with or_bad_file():
            image = to_channels(self.decode(factor), in_chans)
        return torch.from_numpy(np.array(image)).reshape(image.height, image.width, -1)


def to_channels(image, in_chans):
    """Any PIL image with in_chans channels of 8 bits: palette, CMYK, alpha, 16 bits, floats."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float32)
        scale = 1 if values.max(initial=0) <= 255 else 255 / 65535
        image = Image.fromarray((values * scale).clip(0, 255).astype(np.uint8))
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[in_chans]
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def crop(pixels, box, size, mode):
    """A box, in whole pixels, of uint8 pixels (H, W, C) resized to size (h, w): uint8 (C, h, w).

    torch's antialiasing kernels for 8 bits: pillow's resize of the box cut out, but for rounding,
    in a quarter of the time.
    """
    top, left, height, width = map(int, box)
    # the batch axis comes first, so that torch knows channels to be last: it then leaves them
    # there, and saves a third
    part = pixels[top:top + height, left:left + width][None].permute(0, 3, 1, 2)
    return F.interpolate(part, size, mode=mode, antialias=True, align_corners=False)[0]


def exact_crop(pixels, box, size, mode):
    """As `crop`, by pillow's resize, for the fractional boxes of evaluations."""
    top, left, height, width = box
    image = Image.fromarray(pixels.squeeze(2).numpy())
    corners = (left, top, left + width, top + height)
    image = image.resize(size[::-1], FILTERS[mode], box=corners)
    return torch.from_numpy(np.array(image)).reshape(*size, -1).permute(2, 0, 1)


# --------------------------------------------------------------------------------- sources of bytes
class Names:
    """Strings as one run of bytes, a sequence: a million in a worker neither cost nor grow."""

    def __init__(self, names):
        encoded = [os.fsencode(name) for name in names]
        ends = np.cumsum([0] + [len(name) for name in encoded])
        self.first, self.last = ends[:-1], ends[1:]
        self.bytes = b"".join(encoded)

    def __len__(self):
        return len(self.first)

    def __getitem__(self, i):
        return os.fsdecode(self.bytes[self.first[i]:self.last[i]])

    def __iter__(self):
        ends = zip(self.first.tolist(), self.last.tolist())
        return (os.fsdecode(self.bytes[a:b]) for a, b in ends)

    def select(self, ids, cut=0):
        """Those at ids, an array of indices, without their first `cut` bytes."""
        part = copy.copy(self)
        part.first, part.last = self.first[ids] + cut, self.last[ids]
        return part

    def tops(self):
        """The folder that each name begins with, "" for none: numbers (N,) into a sorted list."""
        slashes = np.flatnonzero(np.frombuffer(self.bytes, np.uint8) == ord("/"))
        ends = np.append(slashes, 1 << 62)[np.searchsorted(slashes, self.first)]
        ends = np.where(ends < self.last, ends, self.first).tolist()
        found, text = {}, self.bytes
        ids = [found.setdefault(text[a:b], len(found)) for a, b in zip(self.first.tolist(), ends)]
        tops = list(map(os.fsdecode, found))
        order = sorted(range(len(tops)), key=tops.__getitem__)
        return np.argsort(order)[np.array(ids, np.int64)], [tops[i] for i in order]


class FileSource:
    """Image files: `names` below the folder `root`. Any source of bytes has these four methods."""

    def __init__(self, root, names):
        self.root = root
        self.names = names if isinstance(names, Names) else Names(names)

    def __len__(self):
        return len(self.names)

    def name(self, i):
        """The name below what --data names, with / between its parts."""
        return self.names[i]

    def content(self, i):
        """The bytes of file i, a bytearray; OSError when it cannot be read."""
        with open(os.path.join(self.root, self.names[i]), "rb") as f:
            content = bytearray(os.fstat(f.fileno()).st_size)
            del content[f.readinto(content):]
        return content

    def select(self, ids):
        """The files at ids, a list of indices."""
        return FileSource(self.root, self.names.select(np.asarray(ids, np.int64)))


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


class Progress:
    """After five seconds how many images are done, on the error stream: on a terminal in one line
    that is rewritten, elsewhere in a line every 30 seconds."""

    def __init__(self, what, total=None):
        self.what, self.total, self.done = what, total, 0
        self.started = time.perf_counter()
        self.due = self.started + 5

    def step(self):
        self.done += 1
        now = time.perf_counter()
        if now < self.due:
            return
        terminal, rate = sys.stderr.isatty(), self.done / (now - self.started)
        self.due = now + (0.5 if terminal else 30)
        line = f"{self.what}: {self.done} images, {rate:.3g}/s"
        if self.total:
            left = clock((self.total - self.done) / rate)
            line = f"{self.what}: {self.done} of {self.total} images, {rate:.3g}/s, left {left}"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n",
              file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- tar files
class TarSource(FileSource):
    """Images in tars, named and ordered as in the folder that the tars unpack to.

    tars: their paths, with their sizes when indexed. places (N, 3): number of the tar, offset and
    length of each image. labels (N,) int64 into classes, from WebDataset's .cls files; the first class, "",
    is that of images without.
    """

    def __init__(self, root, names, tars, places, labels=None, classes=None):
        self.root, self.names, self.tars, self.places = root, names, tars, places
        self.labels, self.classes = labels, classes

    def content(self, i):
        """The bytes of image i, a bytearray. OSError when its tar is not what it was."""
        which, at, length = self.places[i].tolist()
        return self.tars.read(which, at, length)

    def select(self, ids, cut=0):
        """The images at ids, a list of indices, without the first `cut` bytes of their names."""
        ids = np.asarray(ids, np.int64)
        labels = None if self.labels is None else self.labels[ids]
        return TarSource(self.root, self.names.select(ids, cut), self.tars, self.places[ids],
                         labels, self.classes)


class Tars:
    """Tar files, opened by whoever reads first: each process by itself, and pickled unopened."""

    def __init__(self, paths, sizes):
        self.paths, self.sizes, self.fds = paths, sizes, {}

    def __getstate__(self):
        return self.__dict__ | dict(fds={})

    def __del__(self):
        for fd in self.fds.values():
            os.close(fd)

    def read(self, which, at, length):
        content, kept = bytearray(length), self.fds.get(which)
        fd = os.open(self.paths[which], os.O_RDONLY) if kept is None else kept
        if len(self.fds) < OPEN_TARS:
            kept = self.fds.setdefault(which, fd)           # another thread may have been faster
        try:
            size = os.fstat(fd).st_size
            if os.preadv(fd, [content], at) < length or size != self.sizes[which]:
                raise OSError(f"{self.paths[which]} has changed since it was opened")
            return content
        finally:
            if fd != kept:
                os.close(fd)


def find_tars(path):
    """Paths of the tars that a file, a pattern such as shard-{000..146}.tar or a folder stands for.

    None where path is something else: a folder of images, or a list file. DataError: a compressed
    tar, a pack of an older version, a tar of a pattern that is not there.
    """
    if os.path.isdir(path):
        return tars_below(path)
    if os.path.isfile(path):
        with open(path, "rb") as f:
            head = f.read(512)
        if head.startswith(OLD_PACK):
            raise DataError(f"{path} is a pack of an older version; make a tar, which any tool can "
                            "read, from the folder again: python data.py pack FOLDER FILE.tar")
        if head.startswith((b"\x1f\x8b", b"\xfd7zXZ", b"(\xb5/\xfd")) or head[4:10] == b"1AY&SY":
            raise DataError(f"{path} is compressed, which cannot be read at random; unpack it")
        return [path] if head[257:262] == b"ustar" or path.lower().endswith(".tar") else None
    braces = re.search(r"\{([^{}]*)\}", path)
    if braces is None:
        return None
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    parts = braces[1].split(",")
    if ends:
        numbers = range(int(ends[1]), int(ends[2]) + 1)
        parts = [str(i).zfill(len(ends[1])) for i in numbers]
    found = []
    for one in (path[:braces.start()] + part + path[braces.end():] for part in parts):
        tars = find_tars(one)
        if tars is None:
            raise DataError(f"{one}: no such tar")
        found += tars
    return found


def tars_below(folder):
    """Tars in a folder and in those below it, sorted; None if there are images or other folders."""
    tars, folders = [], []
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or leads_back(folder, entry.name):
                continue
            if entry.name.lower().endswith(EXTENSIONS):
                return None
            if entry.is_dir():
                folders.append(entry.path)
            elif entry.name.lower().endswith(".tar"):
                tars.append(entry.path)
    tars.sort()
    for inner in map(tars_below, sorted(folders)):
        if inner is None:
            return None
        tars += inner
    return tars or None


def tar_number(field):
    """A number of a tar header: octal or, with its first bit set, the bytes themselves."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.rstrip(b"\0 ") or b"0", 8)


def pax_records(content):
    """{key: value} of a pax header, whose records are "length key=value\\n"."""
    found = {}
    while content:
        length = int(content.split(b" ", 1)[0])
        key, value = content[:length - 1].split(b" ", 1)[1].split(b"=", 1)
        found[key] = value
        content = content[length:]
    return found


def tar_members(fd, at, end, where):
    """(type, name, offset, size) of each member of the tar between two places of a file.

    Types and names are bytes; reads headers alone, in a quarter of tarfile's time. DataError: the
    tar is damaged or cut short, or has sparse files, which do not lie in one place.
    """
    special = {}
    while True:
        head = os.pread(fd, 512, at) if at + 512 <= end else b""
        if head == bytes(512):
            if os.pread(fd, min(10240, end - at), at).strip(b"\0"):
                raise DataError(f"{where}: another tar begins after byte {at}; tar -A joins tars")
            return
        kind, data, size = head[156:157], at + 512, 0
        try:
            if head and tar_number(head[148:156]) != sum(head[:148]) + sum(head[156:]) + 8 * 32:
                raise ValueError
            if head and kind not in (b"1", b"2", b"3", b"4", b"5", b"6"):   # all without content
                size = int(special.get(b"size") or tar_number(head[124:136]))
            if size < 0:
                raise ValueError
            if kind == b"x":
                special |= pax_records(os.pread(fd, min(size, 1 << 20), data))
        except ValueError:
            raise DataError(f"{where}: damaged, there is no header at byte {at}") from None
        at = data + -(-size // 512) * 512
        if at > end:
            raise DataError(f"{where}: cut short, this tar has no end; copy or pack it again")
        if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in special):
            raise DataError(f"{where}: has sparse files; make it again without --sparse")
        if kind == b"L":
            special[b"path"] = os.pread(fd, min(size, 1 << 20), data).rstrip(b"\0")
        elif kind not in (b"x", b"g", b"K"):
            name = head[:100].split(b"\0", 1)[0]
            if head[257:263] == b"ustar\0" and head[345]:
                name = head[345:500].split(b"\0", 1)[0] + b"/" + name
            yield kind, special.get(b"path", name), data, size
            special = {}


def tar_images(path, labels):
    """(name, offset, size) of each image in a tar, and of those of tars in it, in a folder of the
    inner tar's name; {KEY: label} of .cls files goes into labels."""
    with open(path, "rb") as f:
        todo, links = [(0, os.fstat(f.fileno()).st_size, "")], 0
        while todo:
            start, end, folder = todo.pop()
            for kind, name, offset, size in tar_members(f.fileno(), start, end, path):
                name = os.fsdecode(name)
                parts = [part for part in name.split("/") if part not in ("", ".")]
                if name.startswith("/") or ".." in parts:
                    raise DataError(f"{path}: refused, {name!r} in this tar leads out of it")
                name = folder + "/".join(parts)
                stem, ending = os.path.splitext(name)
                ending = ending.lower()
                links += kind in (b"1", b"2") and ending in EXTENSIONS
                if kind not in (b"0", b"\0", b"7") or any(part[0] == "." for part in parts):
                    continue
                if ending == ".tar":
                    todo.append((offset, offset + size, stem + "/"))
                elif ending == ".cls":
                    text = os.pread(f.fileno(), min(size, 4096), offset)
                    labels[stem] = text.decode("utf-8", "replace").strip()
                elif ending in EXTENSIONS:
                    yield name, offset, size
    if links:
        print(f"warning: {path}: passed over {links} links; tar --dereference packs the files",
              flush=True)


def walk_order(name):
    """The key that sorts names as list_files: in each folder its files, then its folders."""
    folder, _, file = name.rpartition("/")
    return ("\1" + folder.replace("/", "\0\1") + "\0\0" if folder else "\0") + file


def index_tars(path, tars):
    """{names, ends, places, labels, classes}: arrays with all that open_tars needs of tars."""
    names, places, labels = [], array("q"), []
    progress = Progress(f"indexing {path}")
    for number, tar in enumerate(tars):
        found, first = {}, len(names)
        for name, offset, size in tar_images(tar, found):
            names.append(name)
            places.extend((number, offset, size))
            progress.step()
        for name in names[first:]:          # WebDataset's KEY ends at the first dot of the file
            stem, (folder, file) = os.path.splitext(name)[0], os.path.split(name)
            key = os.path.join(folder, file.split(".", 1)[0])
            labels.append(found.get(stem) or found.get(key, "") if found else "")
    places = np.frombuffer(places, np.int64).reshape(-1, 3)
    if len(tars) > 1:
        names = in_folders(path, tars, names, places[:, 0].tolist(), any(labels))
    elif names:                             # made from outside of the folder: name/train/...
        top = names[0].split("/")[0]
        inner = {name.split("/")[1] for name in names if name.startswith(top + "/")}
        if all(name.startswith(top + "/") for name in names) and top not in PARTS and (
                top == os.path.basename(path)[:-4] or inner & set(PARTS)):
            names = [name[len(top) + 1:] for name in names]
    keys = [walk_order(name) for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    order = [i for i, j in zip(order, order[1:] + [-1])     # the last of one name, as when unpacked
             if j < 0 or names[i] != names[j]]
    classes = sorted(set(labels) - {""})
    if all(text.isdecimal() for text in classes):
        classes.sort(key=int)
    classes = ["", *classes]
    number = {text: i for i, text in enumerate(classes)}
    ordered = Names([names[i] for i in order])
    return dict(names=np.frombuffer(ordered.bytes, np.uint8), ends=ordered.last,
                places=places[order], labels=np.array([number[labels[i]] for i in order], np.int64),
                classes=np.frombuffer(json.dumps(classes).encode(), np.uint8))


def in_folders(path, tars, names, tar, labelled):
    """The names of images in several tars, with the folders that their tars stand for.

    Tars below a folder keep the folders they lie in. Where each is named as train, val or test and
    not all the same, these are the parts. Images without folders and .cls files have the tar's name
    as their class, but for numbered shards, unless images are named after the tar as ImageNet's.
    """
    stems = [os.path.splitext(os.path.basename(one))[0] for one in tars]
    folders = [""] * len(tars)
    if os.path.isdir(path):
        folders = [os.path.relpath(os.path.dirname(one), path) + "/" for one in tars]
        folders = ["" if folder == "./" else folder for folder in folders]
    pattern = r"(?:.*[^a-z])?(train|val|test)(?:ing|id|idation)?(?:[^a-z].*)?"
    parts = [re.fullmatch(pattern, stem.lower()) for stem in stems]
    if all(parts) and len({part[1] for part in parts}) > 1:
        folders = [f"{folder}{part[1]}/" for folder, part in zip(folders, parts)]
    elif not labelled and not any("/" in name for name in names):
        shards = len({re.sub(r"\d+", "", stem) for stem in stems}) == 1
        if not shards or all(name.startswith(stems[t]) for t, name in zip(tar, names)):
            folders = [f"{folder}{stem}/" for folder, stem in zip(folders, stems)]
    names = [folders[t] + name for t, name in zip(tar, names)]
    if len(set(names)) < len(set(zip(tar, names))):         # keys that begin anew in each shard
        split = map(os.path.split, names)
        names = [os.path.join(folder, f"{stems[t]}_{file}")
                 for t, (folder, file) in zip(tar, split)]
    return names


def open_tars(path, tars):
    """TarSource of every image in the tars that `path` stands for.

    Their index is read, or made and kept: beside them, or where that cannot be written in the
    temporary folder. It holds as long as names, sizes and times of the tars do.
    """
    status = [os.stat(tar) for tar in tars]
    made = [[tar, s.st_size, s.st_mtime_ns] for tar, s in zip(map(os.path.basename, tars), status)]
    made = json.dumps([1, EXTENSIONS, made]).encode()
    full = os.path.abspath(path)
    cache = os.path.join(tempfile.gettempdir(), f"tar-index-{os.getuid()}")
    places = (os.path.join(full, "tars.index.npz") if os.path.isdir(path) else f"{full}.index.npz",
              os.path.join(cache, f"{hashlib.sha256(os.fsencode(full)).hexdigest()[:32]}.npz"))
    kept = next(filter(None, (read_index(place, made) for place in places)), None)
    if kept is None:
        kept = index_tars(path, tars)
        with contextlib.suppress(OSError):
            os.makedirs(cache, mode=0o700, exist_ok=True)
        index = kept | dict(made=np.frombuffer(made, np.uint8))
        any(write_index(place, index) for place in places)
    names = Names([])
    names.bytes, names.last = kept["names"].tobytes(), kept["ends"]
    names.first = np.append(0, names.last)[:-1]
    classes = json.loads(kept["classes"].tobytes())
    return TarSource(path, names, Tars(tars, [s.st_size for s in status]), kept["places"],
                     *(kept["labels"], classes) if len(classes) > 1 else ())


def read_index(place, made):
    """The arrays of an index, or None where there is none, or a damaged one or that of others."""
    try:
        with np.load(place, allow_pickle=False) as kept:
            if kept["made"].tobytes() == made:
                return {key: kept[key] for key in ("names", "ends", "places", "labels", "classes")}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_index(place, arrays):
    """Whether the index could be written; a reader finds it whole or not at all."""
    part = f"{place}.{os.getpid()}.part"
    try:
        with open(part, "wb") as f:
            np.savez(f, **arrays)
        os.replace(part, place)
        return True
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)
        return False


class Dataset:
    """A set of images: a `source` of their files' bytes, or uint8 `images` (N, C, H, W) in memory,
    or both.

    labels: (N,) int64 or None; classes: their names. mean, std: of the channels, after scaling to
    [0, 1]. bad: {index: what is wrong with the file}, as far as is known.
    """

    def __init__(self, source=None, images=None, labels=None, classes=None, in_chans=3, name=""):
        self.source, self.images = source, images
        self.labels, self.classes, self.in_chans, self.name = labels, classes, in_chans, name
        self.bad = {}
        self.mean, self.std = channel_stats(in_chans)

    def __len__(self):
        return len(self.source) if self.images is None else len(self.images)

    @property
    def files(self):
        """The names of all files, a sequence, or None."""
        return self.source and self.source.names

    def file(self, i):
        return self.source.name(i) if self.source else f"{self.name}/{i}"

    def open(self, i):
        """Image i with its bytes in memory and its header read (`Encoded`), or a BadFile."""
        with or_bad_file():
            return Encoded(self.source.content(i))

    def read(self, i):
        """Image i, upright, as uint8 (H, W, C), of several frames the first, or a BadFile."""
        return self.open(i).pixels(self.in_chans)

    def select(self, ids):
        """The images at ids (a list or tensor of indices), as a set of its own."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        part = copy.copy(self)
        part.source = self.source and self.source.select(ids.tolist())
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


def channel_stats(in_chans):
    """ImageNet's mean and std for three channels, their average repeated for another number."""
    if in_chans == 3:
        return IMAGENET_STATS
    return tuple((sum(values) / 3,) * in_chans for values in IMAGENET_STATS)


# ---------------------------------------------------------------------------------- finding images
def list_files(root):
    """Image files below root, relative and sorted; hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders
                            if not f.startswith(".") and not leads_back(folder, f))
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, name)) for name in sorted(names)
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found


def leads_back(folder, name):
    """Whether a folder is a link to one that it lies in: following it would never end."""
    path = os.path.join(folder, name)
    target = os.path.realpath(path) + os.sep
    return os.path.islink(path) and (os.path.realpath(folder) + os.sep).startswith(target)


def read_list(path):
    """Names of a list file: one a line, alone or followed by a label; bare or with folders.

    A name may have blanks in it: a label is what follows the last one, if it is a number or comes
    after an image.
    """
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f.read().splitlines() if line.strip()]
    names = []
    for line in lines:
        name, *label = line.rsplit(maxsplit=1)
        labelled = label and (label[0].isdigit() or name.lower().endswith(EXTENSIONS))
        names.append(name if labelled else line)
    for name in names:
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise DataError(f"{path}: the name {name!r} leads out of the data folder")
    if not names:
        raise DataError(f"{path}: the list is empty")
    return names


def find_listed(files, names, where):
    """Indices into files of the listed names, by their last two or one parts; all must be found."""
    position = {}
    for i, file in enumerate(files):
        position.setdefault(file.split("/")[-1], []).append(i)
    chosen, missing, doubtful = [], [], []
    for name in names:
        parts = name.split("/")
        hits = position.get(parts[-1], [])
        if len(parts) > 1:                  # a file in no folder goes by its name alone
            folders = [files[i].split("/")[-2:-1] for i in hits]
            hits = [i for i, folder in zip(hits, folders) if folder in ([], parts[-2:-1])]
        if len(hits) == 1:
            chosen.append(hits[0])
        else:
            (doubtful if hits else missing).append(name)
    if missing:
        raise DataError(f"{where}: {len(missing)} of {len(names)} listed images do not exist, "
                        f"first {missing[0]}")
    if doubtful:
        raise DataError(f"{where}: {doubtful[0]} stands for several images; list it with its "
                        "folder")
    return chosen


def open_source(path, train):
    """The source of the images that `path` names: a folder with train/ and val/ or test/, any
    folder of images, tars of such, or a list file beside its images."""
    tars = find_tars(path)
    if tars:
        source = open_tars(path, tars)
        top, tops = source.names.tops()
        part = part_of(path, train, tops.__contains__)
        if not part:
            return source
        return source.select(np.flatnonzero(top == tops.index(part)), len(part) + 1)
    if os.path.isfile(path):
        root = os.path.dirname(os.path.abspath(path))
        files = list_files(root)
        return FileSource(root, [files[i] for i in find_listed(files, read_list(path), path)])
    if os.path.isdir(path):
        part = part_of(path, train, lambda name: os.path.isdir(os.path.join(path, name)))
        root = os.path.join(path, part)
        return FileSource(root, list_files(root))
    raise DataError(f"{path}: no such folder, list file or tar (--data)")


def open_folder(path, train, in_chans):
    """The images of `open_source` with their class folders as labels."""
    if in_chans not in (1, 3, 4):
        raise DataError(f"--in-chans {in_chans}: images are read with 1 (grey), 3 (RGB) or 4 "
                        "(RGBA) channels")
    source = open_source(path, train)
    if not len(source):
        raise DataError(f"{path}: no images found (looked for {', '.join(EXTENSIONS)})")
    number, folders = source.names.tops()
    if getattr(source, "labels", None) is not None:
        number, folders = source.labels, source.classes
        missing = np.flatnonzero(number == 0)
        if len(missing):
            print(f"warning: {path}: labels are not used, {len(missing)} of {len(source)} images "
                  f"have no .cls file, first {source.name(missing[0])}", flush=True)
    used = np.unique(number)
    classes = [folders[i] for i in used]
    labels = None
    if "" not in classes and len(classes) > 1:
        labels = torch.from_numpy(np.searchsorted(used, number))
    return Dataset(source, labels=labels, classes=None if labels is None else classes,
                   in_chans=in_chans, name=path)


def every_image(path, in_chans=3):
    """All images below a folder, in whatever part of it, without labels; none if it is none."""
    tars = find_tars(path)
    if tars:
        return Dataset(open_tars(path, tars), in_chans=in_chans, name=path)
    files = list_files(path) if os.path.isdir(path) else []
    return Dataset(FileSource(path, files), in_chans=in_chans, name=path)


def part_of(path, train, is_there):
    """Which of train/, val/ and test/ to read: its name, or "" for all of a training set that has
    no such parts."""
    parts = [name for name in PARTS if is_there(name)]
    wanted = [name for name in parts if (name == "train") == train]
    if wanted or (train and not parts):
        return wanted[0] if wanted else ""
    if parts:
        missing = "train/" if train else "val/ or test/"
        raise DataError(f"{path}: no {missing} in this folder")
    raise DataError(f"{path}: no train/ and no val/ or test/ in this folder, so nothing to "
                    "evaluate on")


# ------------------------------------------------------------------------------------ loading a set
def load(source, train=True, in_chans=3, stats="imagenet", max_bad=0.01, value_range=None,
         labels_file=None, val_share=0):
    """The images that --data names; None: the embedded set."""
    source = source or os.environ.get("DATA")
    if not source:
        dataset = embedded(train, in_chans)
    elif source in DOWNLOADS:
        dataset = download(source, train, in_chans)
    else:
        dataset = into_memory(open_folder(source, train, in_chans), max_bad)
    if stats == "data":
        dataset.mean, dataset.std = measure_stats(dataset)
    return dataset


def download(name, train, in_chans):
    import torchvision
    if in_chans != 3:
        raise DataError(f"--data {name} has three channels, not {in_chans}")
    cifar = dict(cifar10=torchvision.datasets.CIFAR10, cifar100=torchvision.datasets.CIFAR100)[name]
    try:
        raw = cifar("downloads", train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"--data {name}: not in downloads/ and cannot be downloaded ({error})",
                        1) from None
    images = torch.from_numpy(np.ascontiguousarray(raw.data)).permute(0, 3, 1, 2).contiguous()
    return Dataset(images=images, labels=torch.tensor(raw.targets), classes=raw.classes, name=name)


def into_memory(dataset, max_bad=0.01):
    """Decode images that all have one small size into memory; others are left as they are."""
    sizes = set()
    for i in shuffled(len(dataset), 0, SUBSET)[:64].tolist():
        with contextlib.suppress(BadFile):
            sizes.add(dataset.open(i).size)
    if len(sizes) != 1:
        return dataset
    size = sizes.pop()
    values = len(dataset) * size[0] * size[1] * dataset.in_chans
    if max(size) > MEMORY_SIDE or values > MEMORY_LIMIT:
        return dataset

    def decode(i):
        try:
            return dataset.read(i).numpy()
        except BadFile as error:
            return str(error)

    stack = np.zeros((len(dataset), *size, dataset.in_chans), np.uint8)
    bad = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(decode, range(len(dataset)))):
            if isinstance(pixels, str):
                bad[i] = pixels
            elif pixels.shape[:2] != size:  # read them as files
                return dataset
            else:
                stack[i] = pixels
    dataset.bad = bad
    report_bad(dataset, max_bad)
    dataset.images = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()
    return dataset


def report_bad(dataset, max_bad, seen=0):
    """Name the bad files after the first `seen`; DataError when their share is above max_bad."""
    bad, n = dataset.bad, len(dataset)
    for i in list(bad)[seen:]:
        print(f"warning: skipped {os.path.join(dataset.name, dataset.file(i))}: {bad[i]}",
              flush=True)
    if len(bad) > max(max_bad * n, 1):
        raise DataError(f"{len(bad)} of {n} images cannot be read, more than --max-bad {max_bad:g} "
                        f"allows; first {dataset.file(next(iter(bad)))}", 1)


def labelled(dataset, spec=None, seed=0):
    """Indices of the images whose labels may be used, sorted, and how they were chosen.

    spec: None for all; "1%" or "5 per class", a class-balanced draw by seed; or a list file
    (SimCLR's lists).
    """
    if dataset.labels is None:
        raise DataError(f"{dataset.name}: no labels (a labelled set has one folder a class in "
                        "train/ and val/ or test/)")
    if spec is None:
        ids, how = torch.arange(len(dataset)), "all"
    elif os.path.isfile(spec):
        if dataset.files is None:
            raise DataError(f"--labels {spec}: a list names files, and {dataset.name} has none")
        ids = find_listed(dataset.files, read_list(spec), f"--labels {spec}")
        ids, how = torch.tensor(sorted(ids)), f"list {os.path.basename(spec)}"
    else:
        ids, how = balanced(dataset, spec, seed), f"{spec}, balanced draw, seed {seed}"
    found = dataset.labels[ids].unique()
    if len(found) < 2:
        raise DataError(f"{dataset.name}: one class only among the {len(ids)} labelled images, "
                        "nothing to tell apart")
    if len(found) < len(dataset.classes):
        absent = sorted(set(range(len(dataset.classes))) - set(found.tolist()))
        raise DataError(f"--labels {spec!r}: no image of {len(absent)} of the "
                        f"{len(dataset.classes)} classes, first {dataset.classes[absent[0]]}")
    return ids, how


def balanced(dataset, spec, seed):
    """Indices of a share or a number of each class: the first of it in an order hashed by seed."""
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
    counts = labels.bincount(minlength=len(classes))
    wanted = torch.full_like(counts, value) if not share else (
        (counts * value / 100).round().clamp_min(1).long())
    short = (counts < wanted).nonzero()[:, 0].tolist()
    if short:
        raise DataError(f"--labels {spec!r}: class {classes[short[0]]} has only "
                        f"{counts[short[0]]} images")
    order = shuffled(len(labels), SUBSET, 3, seed)
    order = order[labels[order].argsort(stable=True)]       # by class, within it in hashed order
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < wanted[labels[order]]].sort().values


def same_classes(train, test):
    """Give the test set the class numbers of the training set; all must be known there."""
    if test.labels is None:
        raise DataError(f"{test.name}: the test images have no class folders")
    unknown = [c for c in test.classes if c not in train.classes]
    if unknown:
        raise DataError(f"{test.name}: the test class {unknown[0]} is not among the training "
                        "classes")
    test.labels = torch.tensor([train.classes.index(c) for c in test.classes])[test.labels]
    test.classes = train.classes
    return test


def measure_stats(dataset, most=5000):
    """Mean and std of each channel over at most 5,000 images, chosen by hash."""
    total, squares, count = 0.0, 0.0, 0
    for i in shuffled(len(dataset), 1, SUBSET)[:most].tolist():
        if i in dataset.bad:
            continue
        if dataset.images is not None:
            x = dataset.images[i].double().flatten(1)
        else:
            try:
                x = dataset.read(i).double().reshape(-1, dataset.in_chans).T
            except BadFile:
                continue
        total, squares, count = total + x.sum(1), squares + x.square().sum(1), count + x.shape[1]
    if not count:
        raise DataError(f"--stats data: none of the images of {dataset.name} can be read", 1)
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


# ----------------------------------------------------------------------------------------- batches
def stand_ins(dataset, i):
    """Indices of the images to try in the place of image i, which cannot be read."""
    return (random_bits(torch.tensor([i]), 20, SUBSET, 6)[0] % len(dataset)).tolist()


def no_stand_in(dataset, i):
    return DataError(f"20 images in a row cannot be read, among them {dataset.file(i)}: "
                     f"{dataset.bad[i]}", 1)


class Reader(torch.utils.data.Dataset):
    """Reads files, decodes no larger than the crops need, crops and resizes: in the workers.

    loader: a copy of the Loader that has no DataLoader; else both are collected in a cycle only,
    which waits 5 s for each worker.
    """

    TOGETHER = 64                           # images that are opened at once

    def __init__(self, loader):
        self.loader, self.dataset = loader, loader.dataset
        self.views, self.size = loader.views, loader.size
        jpeg_decoder()                      # imported once, before workers are forked

    def __getitems__(self, key):
        """key (epoch, [i, ...]) -> (shown, bad, crops): the images shown, a list, with others in
        place of those that cannot be read (-1: none is found); {i: what is wrong with it}; for each
        view its crops, uint8 (N, C, h, w) with channels last in memory."""
        epoch, wanted = key
        shown, bad = list(wanted), {}
        shape = len(wanted), *self.size, self.dataset.in_chans
        crops = [torch.zeros(shape, dtype=torch.uint8).permute(0, 3, 1, 2) for _ in self.views]
        for start in range(0, len(wanted), self.TOGETHER):
            rows = range(start, min(start + self.TOGETHER, len(wanted)))
            failed = self.fill(rows, shown, crops, epoch)
            bad.update((wanted[row], trouble) for row, trouble in failed.items())
            for attempt in range(20 if self.loader.shuffle else 0):
                for row in failed:
                    shown[row] = stand_ins(self.dataset, wanted[row])[attempt]
                failed = failed and self.fill(failed, shown, crops, epoch)
            for row in failed:
                shown[row] = -1 if self.loader.shuffle else wanted[row]
        return shown, bad, crops

    def fill(self, rows, shown, crops, epoch):
        """Put the crops of image shown[row] into each row; {row: what is wrong with its image}."""
        opened, failed = {}, {}
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
        sides = torch.stack(self.plan(ids, full, epoch))[:, :, 2:]          # (views, N, 2)
        room = (sides / torch.tensor(self.size)).amin((0, 2))
        room[torch.tensor([not image.is_jpeg for image in opened.values()])] = 1
        factors = 1 + (room >= 2).long() + 2 * (room >= 4).long() + 4 * (room >= 8).long()
        small = -(-full // factors[:, None])
        plans = torch.stack(self.plan(ids, small, epoch), 1).tolist()       # (N, views, 4)
        for at, (row, factor, size) in enumerate(
                zip(list(opened), factors.tolist(), small.tolist())):
            try:
                pixels = opened.pop(row).pixels(self.dataset.in_chans, factor)
            except BadFile as error:
                failed[row] = str(error)
                continue
            boxes = plans[at]
            if list(pixels.shape[:2]) != size:      # a format that is turned as it is decoded
                turned = torch.tensor([pixels.shape[:2]])
                boxes = [plan[0].tolist() for plan in self.plan(ids[at:at + 1], turned, epoch)]
            for k, (box, view) in enumerate(zip(boxes, self.views)):
                cut = (exact_crop if view["scale"] is None else crop)(
                    pixels, box, self.size, view["mode"])
                if view.get("pixels"):
                    cut = per_image(cut[None].contiguous(), ids[at:at + 1], view["pixels"],
                                    PIXELS, k, self.loader.seed, epoch)[0]
                crops[k][row] = cut
        return failed

    def plan(self, ids, sizes, epoch):
        """The boxes (N, 4) of each view for images of sizes (N, 2)."""
        return [self.loader.boxes(ids, sizes, k, epoch) for k in range(len(self.views))]


class Batch:
    """ids (n,) of the images, on the CPU; view(k) draws a view; noise(L) the numbers of masks.

    shown (n,): as ids, but where an image cannot be read the one that stands in for it: labels go
    by `shown`. readable (n,) bool: whether the image itself can be read.
    crops: of each view the list of its parts, uint8 (n', C, h, w), for images that are files.
    """

    def __init__(self, loader, ids, epoch, shown, readable, crops=None):
        self.loader, self.ids, self.epoch = loader, ids, epoch
        self.shown, self.readable, self.crops = shown, readable, crops

    def __len__(self):
        return len(self.ids)

    def view(self, k):
        """View k, augmented and normalised, (n, C, h, w) float32 on the device."""
        parts = []
        with torch.autocast(self.loader.device.type, enabled=False):
            for start in range(0, len(self), CHUNK):
                parts.append(self.draw(k, slice(start, start + CHUNK)))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def draw(self, k, part):
        loader, spec, ids = self.loader, self.loader.views[k], self.ids[part]
        if self.crops is None:
            x = loader.from_memory(self.shown[part], k, self.epoch)
        else:
            x = self.crops[k][part].contiguous().float() / 255
        x = augment(x, ids, spec, COLOUR, k, loader.seed, self.epoch)
        return (x - loader.mean) / loader.std

    def noise(self, length):
        """(n, length) uniform numbers of each image, which choose its mask."""
        ids = upload(self.ids, self.loader.device)
        return uniform(ids, length, MASK, self.loader.seed, self.epoch)


class Keys:
    """What a DataLoader is to read next: it asks for a new iterator where it starts over."""

    def __iter__(self):
        return self.keys


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
        # a batch is read in parts, by several workers at once
        self.part = min(Reader.TOGETHER, -(-batch_size // max(workers, 1)))
        self.reader = self.items = self.place = None
        if dataset.images is None:
            self.plan, self.keys = copy.copy(self), Keys()
            ahead = -(-2 * -(-batch_size // self.part) // max(workers, 1))
            self.reader = torch.utils.data.DataLoader(
                Reader(self.plan), batch_sampler=self.keys, num_workers=workers,
                collate_fn=whole, pin_memory=self.device.type == "cuda",
                persistent_workers=workers > 0,
                prefetch_factor=max(ahead, 2) if workers else None)

    def __getstate__(self):                 # a plan as workers need it; the device is not theirs
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
        n, share = self.batch_size * self.processes, self.batch_size
        order = torch.arange(len(self.dataset))
        if self.shuffle:
            order = shuffled(len(self.dataset), ORDER, self.seed, epoch)
        for b in range(start, len(self)):
            first = b * n + self.rank * share
            ids = order[first:min(first + share, len(order))]
            if len(ids):
                yield ids

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
            self.keys.keys = self.plan.stream(epoch, start)
            self.items = iter(self.reader)
        for b, ids in enumerate(self.batches(epoch, start), start + 1):
            if self.reader is None:
                yield self.held(ids, epoch)
                continue
            self.place, before = None, time.perf_counter()
            parts = [next(self.items) for _ in range(-(-len(ids) // self.part))]
            self.waited += time.perf_counter() - before
            batch = self.collect(ids, epoch, parts)
            if self.shuffle:
                self.place = (epoch, b) if b < len(self) else (epoch + 1, 0)
            yield batch

    def held(self, ids, epoch):
        """A batch of images in memory."""
        shown, bad = ids.tolist(), self.dataset.bad
        readable = torch.tensor([i not in bad for i in shown])
        if bad and self.shuffle:
            for row, i in enumerate(shown):
                if i in bad:
                    good = [other for other in stand_ins(self.dataset, i) if other not in bad]
                    if not good:
                        raise no_stand_in(self.dataset, i)
                    shown[row] = good[0]
        return Batch(self, ids, epoch, torch.tensor(shown), readable)

    def collect(self, ids, epoch, parts):
        """A batch of what the workers have read."""
        shown, bads, crops = zip(*parts)
        shown, known = sum(shown, []), len(self.dataset.bad)
        bad = {i: trouble for found in bads for i, trouble in found.items()}
        self.dataset.bad |= {i: trouble for i, trouble in bad.items() if i not in self.dataset.bad}
        report_bad(self.dataset, self.max_bad, known)
        if -1 in shown:
            raise no_stand_in(self.dataset, int(ids[shown.index(-1)]))
        crops = [torch.cat([part.to(self.device, non_blocking=True) for part in view])
                 for view in zip(*crops)]
        readable = torch.tensor([i not in bad for i in ids.tolist()])
        return Batch(self, ids, epoch, torch.tensor(shown), readable, crops)

    def from_memory(self, ids, k, epoch):
        """The crops of view k of images in memory: float32 (n, C, h, w) in [0, 1]."""
        images, spec = self.dataset.images, self.views[k]
        sizes = torch.tensor([images.shape[2:]]).expand(len(ids), 2)
        boxes = self.boxes(ids, sizes, k, epoch)
        x = resample(images[upload(ids, images.device)], boxes, self.size, spec["mode"])
        if spec.get("pixels"):
            x = (x * 255 + 0.5).to(torch.uint8)
            x = per_image(x, ids, spec["pixels"], PIXELS, k, self.seed, epoch).float() / 255
        return x


def whole(batch):
    """Collates what comes as a batch already."""
    return batch


# ------------------------------------------------------------------------------------ embedded set
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("columns", "rows", "checks", "dots")


def embedded(train=True, in_chans=3, n=None, side=32):
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
    images = torch.cat([draw(torch.arange(first + i, first + min(i + 32, n)), side)
                        for i in range(0, n, 32)])
    torch.set_num_threads(threads)
    if in_chans == 1:
        images = (grey(images.float()) + 0.5).to(torch.uint8)
    labels = (torch.arange(n) * 5) % 16
    classes = [f"{shape} of {texture}" for shape in SHAPES for texture in TEXTURES]
    return Dataset(images=images, labels=labels, classes=classes, in_chans=in_chans,
                   name="embedded")


def texture(kind, x, y, u):
    """Pattern in [0, 1] at x, y (N, s, s) for kinds (N,); u (N, 4): frequency, turn, two phases."""
    angle = (u[:, 1] - 0.5) * 0.4
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    frequency = (14.0 + 5.0 * u[:, 0])[:, None, None]
    a = frequency * (x * cos + y * sin) + 6.28 * u[:, 2, None, None]
    b = frequency * (y * cos - x * sin) + 6.28 * u[:, 3, None, None]
    dots = 8 * (0.7 * a).sin().abs() * (0.7 * b).sin().abs() - 4.5
    patterns = torch.stack([3 * a.sin(), 3 * b.sin(), 6 * a.sin() * b.sin(), dots], 1)
    return patterns[torch.arange(len(kind)), kind].sigmoid()


def draw(ids, side=32):
    """Embedded images (N, 3, side, side) uint8 of these numbers: drawn twice as large, averaged."""
    n, s = len(ids), 2 * side
    u = uniform(ids, 40, 20230501)
    label = (ids % (1 << 20) * 5) % 16
    line = (torch.arange(s) + 0.5) / s * 2 - 1
    y, x = line[:, None].expand(n, s, s), line[None].expand(n, s, s)

    def pick(column):
        return u[:, column, None, None]

    def colour(column, low, high):
        """A random light in [low, high] with a tint of its own, (N, 3, 1, 1)."""
        light = low + (high - low) * u[:, column:column + 1]
        return (light + 0.3 * (u[:, column + 1:column + 4] - 0.5))[:, :, None, None]

    scale, turn = 0.62 + 0.28 * pick(0), (pick(1) - 0.5) * 0.5
    dx, dy = x - (pick(2) - 0.5) * 0.4, y - (pick(3) - 0.5) * 0.4
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
    turned = x * (6.28 * pick(4)).cos() + y * (6.28 * pick(4)).sin()
    wave = (1.5 * turned + 6.28 * pick(5)).sin() * 0.5 + 0.5
    ground = torch.lerp(colour(6, 0.3, 0.7), colour(10, 0.3, 0.7), wave[:, None])
    pattern = texture(label % 4, x, y, u[:, 22:26])[:, None]
    figure = torch.lerp(colour(14, 0.0, 0.3), colour(18, 0.7, 1.0), pattern)
    image = torch.where(inside, figure, ground)
    light = 1 + 0.5 * (pick(26) - 0.5) * x + 0.5 * (pick(27) - 0.5) * y
    noise = uniform(ids, 3 * side * side, 20230502).reshape(n, 3, side, side) - 0.5
    image = F.avg_pool2d(image * light[:, None], 2) + 0.04 * noise
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


# --------------------------------------------------------------------------- python data.py check
NAMED = 20                  # bad files named on the screen; --out names them all
# what a BadFile says: the kind it is counted under; the first that fits
KINDS = (("DecompressionBomb", "decompression bomb"), ("PermissionError", "no permission"),
         ("FileNotFoundError", "vanished"), ("UnidentifiedImageError", "no image"),
         ("truncated", "truncated"), ("Truncated", "truncated"), ("EOF", "truncated"))
ENDINGS = {"JPEG": (".jpg", ".jpeg"), "MPO": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff"),
           "PPM": (".ppm", ".pgm"), "JPEG2000": (".jp2",)}


def look(dataset, i):
    """(what is special about image i, None), or (kind of trouble, what is wrong)."""
    try:
        dataset.read(i)
    except BadFile as error:
        said = str(error)
        with contextlib.suppress(OSError):
            if not dataset.source.content(i):
                return "empty", said
        return next((kind for words, kind in KINDS if words in said), "damaged"), said
    special = []
    # what the rarer parts of a good image are like is no reason to refuse it
    with contextlib.suppress(Exception):
        image = dataset.open(i).image
        ending = os.path.splitext(dataset.file(i))[1].lower()
        special = [word for word, true in (
            ("animated", getattr(image, "n_frames", 1) > 1), ("CMYK", image.mode == "CMYK"),
            ("16-bit", image.mode.startswith("I")),
            ("turned by EXIF", image.getexif().get(0x0112, 1) != 1),
            ("another format than its name says",
             ending not in ENDINGS.get(image.format, (f".{image.format.lower()}",)))) if true]
    return special, None


def counted(kinds):
    """2 truncated, 1 empty: the most first."""
    return ", ".join(f"{n} {kind}" for kind, n in kinds.most_common())


def check(args):
    """Read every image below args.folder; [(file, kind, what is wrong)] of the bad ones."""
    dataset = every_image(args.folder)
    n, root = len(dataset), args.folder
    if not n:
        raise DataError(f"{root}: no images found (looked for {', '.join(EXTENSIONS)})")
    bad, kinds, special = [], Counter(), Counter()
    started = told = time.perf_counter()
    with ThreadPool(args.workers) as pool:  # pillow decodes outside Python's lock
        found = pool.imap(functools.partial(look, dataset), range(n), chunksize=16)
        for i, (what, trouble) in enumerate(found):
            if trouble is None:
                special.update(what)
            else:
                bad.append((dataset.file(i), what, trouble))
                kinds[what] += 1
                if len(bad) <= NAMED:
                    print(f"{os.path.join(root, dataset.file(i))}: {what} ({trouble})", flush=True)
            now = time.perf_counter()
            if now - told > 5:
                told, left = now, (now - started) / (i + 1) * (n - i - 1)
                print(f"{i + 1}/{n} read, {len(bad)} bad, left {clock(left)}", file=sys.stderr,
                      flush=True)
    if len(bad) > NAMED:
        print(f"... and {len(bad) - NAMED} more", flush=True)
    among = f", among them {counted(special)}" if special else ""
    print(f"{n - len(bad)} of {n} images are good{among}; {clock(time.perf_counter() - started)}",
          flush=True)
    if args.out:
        try:
            with open(args.out, "w", errors="surrogateescape") as f:
                for line in bad:
                    print("\t".join(" ".join(part.split()) for part in line), file=f)
        except OSError as error:
            raise DataError(f"cannot write {args.out}: {error.strerror}", 1) from None
    if bad:
        raise DataError(f"{len(bad)} of {n} images are bad: {counted(kinds)}", 1)
    return bad


# ---------------------------------------------------------------------------- python data.py pack
def shrunk(content, short_side=None, quality=90):
    """The bytes to keep of an image file, or a BadFile: as they are, or with a short side given and
    shorter than the image's as a JPEG; images with transparency or 16 bits stay as they are."""
    image = Encoded(content)
    with or_bad_file():
        if short_side is None or min(image.size) <= short_side:
            image.decode(8 if image.is_jpeg else 1).load()  # only to know that it can be decoded
            return content
        fits = [f for f in (8, 4, 2) if image.is_jpeg and min(image.size) >= 2 * f * short_side]
        small = image.decode(max(fits, default=1))
        mode = small.mode
        if "a" in mode.lower() or mode[0] in "IF" or "transparency" in small.info:
            return content                  # more than a JPEG can hold
        small = small.convert("L" if mode in ("1", "L") else "RGB")
        scale = short_side / min(small.size)
        sides = [max(round(side * scale), 1) for side in small.size]
        small = small.resize(sides, Image.LANCZOS)
        small.info.clear()
        packed = io.BytesIO()
        small.save(packed, "JPEG", quality=quality)
        return packed.getvalue()


def tar_header(name, size):
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def pack(args):
    """Write every image of a source into a tar, in order; one that was begun is gone on with."""
    if args.verify:
        return check(argparse.Namespace(folder=args.folder, workers=args.workers, out=None))
    dataset, path, part = every_image(args.folder), args.tar, f"{args.tar}.part"
    if not len(dataset):
        raise DataError(f"{args.folder}: no images found (looked for {', '.join(EXTENSIONS)})")
    if os.path.exists(path):
        raise DataError(f"{path} is there already; remove it to pack again")
    if getattr(dataset.source, "labels", None) is not None:
        raise DataError(f"{args.folder}: has its labels in .cls files, which pack does not write")
    keep = functools.partial(shrunk, short_side=args.short_side, quality=args.quality)
    asked = f"short side {args.short_side}, quality {args.quality}" if args.short_side else "bytes"
    head = tarfile.TarInfo.create_pax_global_header({"comment": f"packed images: {asked}"})
    try:
        with open(part, "r+b" if os.path.exists(part) else "w+b") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{part} is being written by another process") from None
            done = go_on(f, part, head, dataset.source, keep)
            todo = [i for i, name in enumerate(dataset.files) if name not in done]
            if done:
                print(f"going on: {len(dataset) - len(todo)} of {len(dataset)} images are packed "
                      "already", flush=True)
            fill(f, dataset, todo, keep, args.workers, args.max_bad)
            if len(dataset.bad) == len(dataset):
                raise DataError("none of the images can be read", 1)
            f.write(bytes(1024 + -(f.tell() + 1024) % 10240))
            f.flush()
            os.fsync(f.fileno())
            os.replace(part, path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}", 1) from None
    print(f"wrote {path}: {len(dataset) - len(dataset.bad)} images, "
          f"{os.path.getsize(path) / 2 ** 30:.2f} GiB, {len(dataset.bad)} skipped", flush=True)


def go_on(f, part, head, source, keep):
    """Names of the images in a tar that was begun; f is left at the end of the last whole one.

    Of the last 2 SYNC bytes the disk may not have all when the power failed: compared with the
    source again, in order, up to the first difference.
    """
    size, begun, done, end = os.fstat(f.fileno()).st_size, f.read(len(head)), set(), len(head)
    if begun != head[:len(begun)]:
        raise DataError(f"{part} was begun with other options, or is something else: remove it")
    if len(begun) < len(head):
        f.seek(0)
        f.write(head)
    places = {}
    with contextlib.suppress(DataError, BadFile):           # at what was being written
        for _, name, offset, length in tar_members(f.fileno(), 0, size, part):
            name = os.fsdecode(name)
            if offset + length > size - 2 * SYNC:
                places = places or {name: i for i, name in enumerate(source.names)}
                if name not in places:
                    break
                if keep(source.content(places[name])) != os.pread(f.fileno(), length, offset):
                    break
            done.add(name)
            end = offset + -(-length // 512) * 512
    f.seek(end)
    f.truncate()
    return done


def fill(f, dataset, todo, keep, workers, max_bad):
    """Append the images `todo` to a tar; those that cannot be read go into dataset.bad."""
    seen, synced = 0, f.tell()

    def prepare(i):
        try:
            with or_bad_file():
                return keep(dataset.source.content(i))
        except BadFile as error:
            return str(error)

    def prepared():
        with ThreadPoolExecutor(workers) as pool:           # pillow decodes without Python's lock
            for start in range(0, len(todo), 32 * workers):                 # bounds the memory
                some = todo[start:start + 32 * workers]
                yield from zip(some, pool.map(prepare, some))

    progress = Progress(f"packing {dataset.name}", len(todo))
    for i, content in prepared():
        progress.step()
        if isinstance(content, str):
            dataset.bad[i] = content
            seen = report_bad(dataset, max_bad, seen)
            continue
        f.write(tar_header(dataset.file(i), len(content)))
        f.write(content)
        f.write(bytes(-len(content) % 512))
        if f.tell() - synced > SYNC:
            f.flush()
            os.fsync(f.fileno())
            synced = f.tell()


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message} (--help says what there is)")


def get_args(argv=None):
    parser = Parser(prog="data.py", allow_abbrev=False, description="Commands for sets of images.")
    commands = parser.add_subparsers(dest="command", metavar="check|pack", required=True)
    add = commands.add_parser("check", allow_abbrev=False, help="find bad images",
                              description="Read every image, and name the bad ones.").add_argument
    add("folder", help="folder of images, with all that is below it, or tars")
    add("--workers", type=int, default=os.cpu_count(), help="images read at once")
    add("--out", help="file for the list of bad ones: name, tab, kind, tab, what is wrong")
    add = commands.add_parser("pack", allow_abbrev=False, help="many images into one tar",
                              description="Many images into one tar, which --data reads as it does "
                              "their folder; stopped, it is gone on with.").add_argument
    add("folder", help="folder of images, with all that is below it, or tars")
    add("tar", nargs="?", help="tar to write")
    add("--short-side", type=int, help="pixels: shrink larger images to it, as JPEGs; those with "
        "transparency or 16 bits stay as they are (default: keep every byte)")
    add("--quality", type=int, default=90, help="of the JPEGs that are shrunk")
    add("--workers", type=int, default=os.cpu_count(), help="images read at once")
    add("--max-bad", type=float, default=0.01, help="fail when more than this share is bad")
    add("--verify", action="store_true", help="write nothing, decode every image of a tar")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.folder) and not find_tars(args.folder):
        parser.error(f"{args.folder}: no such folder or tar")
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
        if not 1 <= args.quality <= 100:
            parser.error(f"--quality {args.quality}: 1 to 100")
        if not 0 <= args.max_bad <= 1:
            parser.error(f"--max-bad {args.max_bad}: 0 to 1")
    return args


def program(argv=None):
    """The exit code of the command line; what the user can mend is one line."""
    try:
        args = get_args(argv)
        (pack if args.command == "pack" else check)(args)
        return 0
    except DataError as error:
        print(f"data.py: error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                 # `... | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(program())
