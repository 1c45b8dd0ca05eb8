"""Images: where they come from, how they are read, how they become batches on the device.

Order and augmentation are functions of (seed, epoch, image) alone: see augment.py. Needs torch,
numpy and pillow; torchvision, where it is there, decodes JPEGs faster and fetches CIFAR.

    python data.py check IMAGES                 # read every image beforehand, and name the bad ones

Shapes: N images, C channels, (H, W) source, (h, w) output pixels; boxes (top, left, height, width).
"""
import argparse
import contextlib
import copy
import functools
import io
import math
import os
import stat
import sys
import time
import warnings
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
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm",
              ".jp2")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")  # no helper programs
MOST_PIXELS = 1 << 27       # of one image: what claims more is refused before it is allocated
MEMORY_LIMIT = 4 << 30      # bytes of pixels up to which images of one size are held in memory
MEMORY_SIDE = 128           # and up to which side: larger ones are cropped by workers
CHUNK = 512                 # images of a view that are augmented at once, which bounds the memory
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
        self.ends = np.cumsum([0] + [len(name) for name in encoded])
        self.bytes = b"".join(encoded)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        if not -len(self) <= i < len(self):
            raise IndexError(i)
        i = i % len(self)
        return os.fsdecode(self.bytes[self.ends[i]:self.ends[i + 1]])

    def select(self, ids):
        return Names([self[i] for i in ids])


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
        return FileSource(self.root, self.names.select(ids))


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
    folder of images, or a list file beside its images."""
    if os.path.isfile(path):
        root = os.path.dirname(os.path.abspath(path))
        files = list_files(root)
        return FileSource(root, [files[i] for i in find_listed(files, read_list(path), path)])
    if os.path.isdir(path):
        part = part_of(path, train, lambda name: os.path.isdir(os.path.join(path, name)))
        root = os.path.join(path, part)
        return FileSource(root, list_files(root))
    raise DataError(f"{path}: no such folder or list file (--data)")


def open_folder(path, train, in_chans):
    """The images of `open_source` with their class folders as labels."""
    if in_chans not in (1, 3, 4):
        raise DataError(f"--in-chans {in_chans}: images are read with 1 (grey), 3 (RGB) or 4 "
                        "(RGBA) channels")
    source = open_source(path, train)
    if not len(source):
        raise DataError(f"{path}: no images found (looked for {', '.join(EXTENSIONS)})")
    folders = [file.split("/")[0] if "/" in file else None for file in source.names]
    classes = sorted(set(folders) - {None})
    labels = None
    if None not in folders and len(classes) > 1:
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[folder] for folder in folders])
    return Dataset(source, labels=labels, classes=None if labels is None else classes,
                   in_chans=in_chans, name=path)


def every_image(path, in_chans=3):
    """All images below a folder, in whatever part of it, without labels; none if it is none."""
    files = list_files(path) if os.path.isdir(path) else []
    return Dataset(FileSource(path, files), in_chans=in_chans, name=path)


def part_of(path, train, is_there):
    """Which of train/, val/ and test/ to read: its name, or "" for all of a training set that has
    no such parts."""
    parts = [name for name in ("train", "val", "test") if is_there(name)]
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


def clock(seconds):
    return f"{int(seconds) // 60}:{int(seconds) % 60:02}"


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


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise DataError(f"{message} (--help says what there is)")


def get_args(argv=None):
    parser = Parser(prog="data.py", allow_abbrev=False, description="Commands for sets of images.")
    commands = parser.add_subparsers(dest="command", metavar="check", required=True)
    add = commands.add_parser("check", allow_abbrev=False, help="find bad images",
                              description="Read every image, and name the bad ones.").add_argument
    add("folder", help="folder of images, with all that is below it")
    add("--workers", type=int, default=os.cpu_count(), help="images read at once")
    add("--out", help="file for the list of bad ones: name, tab, kind, tab, what is wrong")
    args = parser.parse_args(argv)
    if not os.path.isdir(args.folder):
        parser.error(f"{args.folder}: no such folder")
    if not 1 <= args.workers <= 256:
        parser.error(f"--workers {args.workers}: 1 to 256")
    if args.out and (os.path.isdir(args.out)
                     or not os.path.isdir(os.path.dirname(args.out) or ".")):
        parser.error(f"--out {args.out}: cannot write there")
    return args


def program(argv=None):
    """The exit code of the command line; what the user can mend is one line."""
    try:
        check(get_args(argv))
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
