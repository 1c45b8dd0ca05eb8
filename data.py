"""Pictures: where they come from, how they are read, how they become batches on the device.

Order and augmentation are functions of (seed, epoch, picture) alone: see augment.py. Needs torch, numpy, pillow;
torchvision only for `--data cifar10|cifar100`.

    python data.py pack PICTURES PICTURES.pack      # one file instead of many, for --data: see pack.py
    python data.py check PICTURES                   # read every picture beforehand, and name the bad ones: see check.py

Shapes: N images, C channels, (H, W) source, (h, w) output pixels.
"""
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from augment import (COLOUR, CROP, MASK, ORDER, PIXELS, SUBSET, augment, central_boxes, grey, per_picture, random_boxes,
                     resample, shuffled, uniform, upload)
from decode import BadFile, Encoded, device_decoder, or_bad_file, to_channels
from reader import Reader, whole

IMAGENET_STATS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DOWNLOADS = ("cifar10", "cifar100")         # the sets that --data fetches by name: all that ever uses the network
EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2")
MEMORY_LIMIT = 4 << 30      # bytes of uint8 pixels up to which pictures of one size are held in memory
MEMORY_SIDE = 128           # and up to which side: larger ones are cropped by workers as they are read
PACK_MAGIC = b"\x89picture pack 1\n"                                       # the first 16 bytes of a pack: see pack.py


class UsageError(ValueError):
    """What was asked for cannot be done as asked: one line, exit code 2."""


class RunError(RuntimeError):
    """The run failed for a reason the user can mend: one line, exit code 1."""


# ---------------------------------------------------------------------------------------- sources of pictures
class Pictures:
    """A set of pictures: `files` under `root`, or uint8 `images` (N, C, H, W) in memory, or both.

    packed: where the files' bytes are when they lie in one file (pack.Packed), in the order of `files`.
    labels: (N,) int64 or None; classes: names; mean, std: of the channels, after scaling to [0, 1].
    """

    def __init__(self, files=None, root=None, images=None, labels=None, classes=None, in_chans=3, name="", packed=None):
        self.files, self.root, self.images, self.packed = files, root, images, packed
        self.labels, self.classes, self.in_chans, self.name = labels, classes, in_chans, name
        self.bad = {}                                                       # index: what is wrong with the file
        self.mean, self.std = channel_stats(in_chans)

    def __len__(self):
        return len(self.files) if self.images is None else len(self.images)

    def file(self, i):
        return self.files[i] if self.files is not None else f"{self.name}/{i}"

    def open(self, i):
        """Picture i with its bytes in memory and its header read (decode.Encoded)."""
        with or_bad_file():
            if self.packed is not None:
                return Encoded(self.packed.content(i))
            with open(os.path.join(self.root, self.files[i]), "rb") as f:
                content = bytearray(os.fstat(f.fileno()).st_size)
                del content[f.readinto(content):]
            return Encoded(content)

    def read(self, i, shrink_to=None):
        """Picture i as a PIL image with in_chans channels of 8 bits; shrink_to(H, W) -> factor allows a smaller one.

        Of an animation or several pages the first. Whatever is wrong with the file is a BadFile.
        """
        with or_bad_file():
            picture = self.open(i)
            factor = shrink_to(picture.size) if shrink_to is not None and picture.is_jpeg else 1
            return to_channels(picture.decode(factor), self.in_chans)

    def select(self, ids):
        """The pictures at ids (a list or tensor of indices), as a set of its own."""
        ids = torch.as_tensor(ids, dtype=torch.long)
        part = Pictures([self.files[i] for i in ids.tolist()] if self.files is not None else None, self.root,
                        self.images[ids.to(self.images.device)] if self.images is not None else None,
                        self.labels[ids] if self.labels is not None else None, self.classes, self.in_chans, self.name,
                        self.packed.select(ids) if self.packed is not None else None)
        part.mean, part.std = self.mean, self.std
        return part

    def hold(self, device):
        """Move pictures that are in memory to the device; others stay files."""
        if self.images is not None:
            self.images = self.images.to(device)
        return self


def channel_stats(in_chans):
    """ImageNet's mean and std for three channels, their average repeated for another number."""
    if in_chans == 3:
        return IMAGENET_STATS
    return tuple((sum(values) / 3,) * in_chans for values in IMAGENET_STATS)


def list_files(root):
    """Picture files below root, relative and sorted; hidden ones left out."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and not leads_back(folder, f))
        inside = os.path.relpath(folder, root)
        found += [os.path.normpath(os.path.join(inside, name)) for name in sorted(names)
                  if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
    return found


def leads_back(folder, name):
    """Whether a folder is a link to one that it lies in: following it would never end."""
    path = os.path.join(folder, name)
    return os.path.islink(path) and (os.path.realpath(folder) + os.sep).startswith(os.path.realpath(path) + os.sep)


def read_list(path):
    """Names of a list file: one a line, alone or followed by a label; LF or CRLF; bare or with folders.

    A name may have blanks in it: a label is what follows the last one, if it is a number or comes after a picture.
    """
    with open(path, encoding="utf-8", errors="replace") as f:
        lines = [line.strip() for line in f.read().splitlines() if line.strip()]
    names = []
    for line in lines:
        name, *label = line.rsplit(maxsplit=1)
        names.append(name if label and (label[0].isdigit() or name.lower().endswith(EXTENSIONS)) else line)
    for name in names:
        if os.path.isabs(name) or ".." in name.replace("\\", "/").split("/"):
            raise UsageError(f"{path}: the name {name!r} leads out of the data folder")
    if not names:
        raise UsageError(f"{path}: the list is empty")
    return names


def find_listed(files, names, where):
    """Indices into files of the listed names, matched by their last two or one parts; every name must be found."""
    position = {}
    for i, file in enumerate(files):
        parts = file.replace(os.sep, "/").split("/")
        position.setdefault(parts[-1], []).append(i)
    chosen, missing, doubtful = [], [], []
    for name in names:
        parts = name.split("/")
        hits = position.get(parts[-1], [])
        if len(parts) > 1:                                                  # a file in no folder goes by its name alone
            folders = [files[i].replace(os.sep, "/").split("/")[-2:-1] for i in hits]
            hits = [i for i, folder in zip(hits, folders) if folder in ([], parts[-2:-1])]
        if len(hits) == 1:
            chosen.append(hits[0])
        else:
            (doubtful if hits else missing).append(name)
    if missing:
        raise UsageError(f"{where}: {len(missing)} of {len(names)} listed pictures do not exist, first {missing[0]}")
    if doubtful:
        raise UsageError(f"{where}: {doubtful[0]} stands for several pictures; list it with its folder")
    return chosen


def open_folder(path, train, in_chans):
    """A folder with train/ and val/ or test/, any folder of pictures, a list file beside its pictures, or a pack."""
    if in_chans not in (1, 3, 4):
        raise UsageError(f"--in-chans {in_chans}: pictures are read with 1 (grey), 3 (RGB) or 4 (RGBA) channels")
    packed = None
    if is_pack(path):
        import pack
        names, packed = pack.open_pack(path)
        part = part_of(path, train, lambda name: any(file.startswith(name + "/") for file in names))
        rows = [i for i, file in enumerate(names) if file.startswith(f"{part}/")] if part else range(len(names))
        root = os.path.join(path, part)
        files = [names[i].removeprefix(f"{part}/") for i in rows]
        packed = packed.select(torch.tensor(rows, dtype=torch.long))
    elif os.path.isfile(path):
        root = os.path.dirname(os.path.abspath(path))
        files = list_files(root)
        files = [files[i] for i in find_listed(files, read_list(path), path)]
    elif os.path.isdir(path):
        root = os.path.join(path, part_of(path, train, lambda name: os.path.isdir(os.path.join(path, name))))
        files = list_files(root)
    else:
        raise UsageError(f"{path}: no such folder or list file or pack (--data)")
    if not files:
        raise UsageError(f"{path}: no pictures found (looked for {', '.join(EXTENSIONS)})")
    folders = [file.split(os.sep)[0] if os.sep in file else None for file in files]
    classes = sorted({folder for folder in folders if folder is not None})
    labels = None
    if None not in folders and len(classes) > 1:
        number = {name: i for i, name in enumerate(classes)}
        labels = torch.tensor([number[folder] for folder in folders])
    return Pictures(files, root, labels=labels, classes=classes if labels is not None else None, in_chans=in_chans,
                    name=path, packed=packed)


def every_picture(path, in_chans):
    """All pictures below a folder or in a pack, in whatever part of it, without labels; none where there is neither."""
    if is_pack(path):
        import pack
        files, packed = pack.open_pack(path)
        return Pictures(files, path, in_chans=in_chans, name=path, packed=packed)
    return Pictures(list_files(path) if os.path.isdir(path) else [], path, in_chans=in_chans, name=path)


def part_of(path, train, is_there):
    """Which of train/, val/ and test/ to read: its name, or "" for all of a training set that has no such parts."""
    parts = [name for name in ("train", "val", "test") if is_there(name)]
    wanted = [name for name in parts if (name == "train") == train]
    if wanted or (train and not parts):
        return wanted[0] if wanted else ""
    if parts:
        raise UsageError(f"{path}: no {'train/' if train else 'val/ or test/'} in this folder")
    raise UsageError(f"{path}: no train/ and no val/ or test/ in this folder, so nothing to evaluate on")


def is_pack(path):
    """Whether path is a file that `data.py pack` wrote, by its first bytes."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as f:
        return f.read(len(PACK_MAGIC)) == PACK_MAGIC


def into_memory(pictures, max_bad=0.01):
    """Decode pictures that all have one small size into memory; leaves the set as it is when they do not."""
    sizes = set()
    for i in shuffled(len(pictures), 0, SUBSET)[:64].tolist():
        try:
            sizes.add(pictures.open(i).size)
        except BadFile:
            continue
    if len(sizes) != 1:
        return pictures
    h, w = sizes.pop()
    if max(h, w) > MEMORY_SIDE or len(pictures) * h * w * pictures.in_chans > MEMORY_LIMIT:
        return pictures

    def decode(i):
        try:
            image = np.asarray(pictures.read(i))
            return image if image.shape[:2] == (h, w) else None
        except BadFile as error:
            return str(error)

    stack = np.zeros((len(pictures), h, w, pictures.in_chans), np.uint8)
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for i, pixels in enumerate(pool.map(decode, range(len(pictures)), chunksize=256)):
            if pixels is None:                                              # another size: read them as files
                pictures.bad.clear()
                return pictures
            if isinstance(pixels, str):
                pictures.bad[i] = pixels
            else:
                stack[i] = pixels.reshape(stack.shape[1:])
                good.append(i)
    report_bad(pictures, max_bad)
    pictures.images = torch.from_numpy(stack).permute(0, 3, 1, 2).contiguous()
    kept = pictures if len(good) == len(pictures) else pictures.select(good)
    kept.bad = pictures.bad
    return kept


def report_bad(pictures, max_bad, seen=0):
    """Name bad files once; give up when their share of the set is above max_bad."""
    for i in list(pictures.bad)[seen:]:
        print(f"warning: skipped {os.path.join(pictures.root, pictures.files[i])}: {pictures.bad[i]}", flush=True)
    if len(pictures.bad) > max(max_bad * len(pictures), 1):
        raise RunError(f"{len(pictures.bad)} of {len(pictures)} pictures cannot be read, more than --max-bad {max_bad:g} "
                       f"allows; first {pictures.file(next(iter(pictures.bad)))}")
    return len(pictures.bad)


def load_data(source, train=True, in_chans=3, stats="imagenet", max_bad=0.01):
    """The pictures that --data names: None the embedded set, cifar10, cifar100, a folder or a list file."""
    source = source or os.environ.get("DATA")
    if not source:
        pictures = embedded(train, in_chans)
    elif source in DOWNLOADS:
        import torchvision
        reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[source]
        try:
            raw = reader("downloads", train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise RunError(f"--data {source}: not in downloads/ and cannot be downloaded ({error})") from None
        images = torch.from_numpy(np.ascontiguousarray(raw.data)).permute(0, 3, 1, 2).contiguous()
        if in_chans != 3:
            raise UsageError(f"--data {source} has three channels, not {in_chans}")
        pictures = Pictures(images=images, labels=torch.tensor(raw.targets), classes=raw.classes, name=source)
    else:
        pictures = into_memory(open_folder(source, train, in_chans), max_bad)
    if stats == "data":
        pictures.mean, pictures.std = measure_stats(pictures)
    return pictures


def decoder(choice, device):
    """The Loader's decoder for --decode cpu|gpu: None where the workers decode."""
    found = None if choice == "cpu" else device_decoder(device)
    if choice == "gpu" and found is None:
        raise UsageError("--decode gpu needs a CUDA device and torchvision")
    return found


def labelled(pictures, spec=None, seed=0):
    """Indices of the pictures whose labels may be used, sorted, and how they were chosen.

    spec: None for all; "1%" or "5 per class", a class-balanced draw by seed; or a list file (SimCLR's lists).
    """
    if pictures.labels is None:
        raise UsageError(f"{pictures.name}: no labels (a labelled set has one folder a class in train/ and val/ or test/)")
    labels = pictures.labels
    counts = labels.bincount(minlength=len(pictures.classes))
    if spec is None:
        ids, how = torch.arange(len(labels)), "all"
    elif os.path.isfile(spec):
        if pictures.files is None:
            raise UsageError(f"--labels {spec}: a list names files, and {pictures.name} has none")
        ids = torch.tensor(sorted(find_listed(pictures.files, read_list(spec), f"--labels {spec}")))
        how = f"list {os.path.basename(spec)}"
    else:
        text = spec.replace("per class", "").strip()
        number = text.removesuffix("%")
        try:
            value = float(number) if text.endswith("%") else int(number)
        except ValueError:
            raise UsageError(f"--labels {spec!r}: neither a share (1%), nor '5 per class', nor a list file") from None
        if not (0 < value <= 100 if text.endswith("%") else value > 0):
            raise UsageError(f"--labels {spec!r}: out of range")
        wanted = (counts * value / 100).round().clamp_min(1).long() if text.endswith("%") else torch.full_like(counts, value)
        short = (counts < wanted).nonzero()[:, 0].tolist()
        if short:
            raise UsageError(f"--labels {spec!r}: class {pictures.classes[short[0]]} has only {counts[short[0]]} pictures")
        order = shuffled(len(labels), SUBSET, 3, seed)
        rank = torch.empty_like(order)                                      # place of each picture within its class
        for c in range(len(counts)):
            mine = order[labels[order] == c]
            rank[mine] = torch.arange(len(mine))
        ids, how = (rank < wanted[labels]).nonzero()[:, 0], f"{spec}, balanced draw, seed {seed}"
    found = labels[ids].unique()
    if len(found) < 2:
        raise UsageError(f"{pictures.name}: one class only among the {len(ids)} labelled pictures, nothing to tell apart")
    if len(found) < len(pictures.classes):
        absent = sorted(set(range(len(pictures.classes))) - set(found.tolist()))
        raise UsageError(f"--labels {spec!r}: no picture of {len(absent)} of the {len(pictures.classes)} classes, "
                         f"first {pictures.classes[absent[0]]}")
    return ids, how


def same_classes(train, test):
    """Give the test set the class numbers of the training set; every test class must be known there."""
    if test.labels is None:
        raise UsageError(f"{test.name}: the test pictures have no class folders")
    unknown = [c for c in test.classes if c not in train.classes]
    if unknown:
        raise UsageError(f"{test.name}: the test class {unknown[0]} is not among the training classes")
    test.labels = torch.tensor([train.classes.index(c) for c in test.classes])[test.labels]
    test.classes = train.classes
    return test


def measure_stats(pictures, most=5000):
    """Mean and std of each channel over at most 5,000 pictures, chosen by hash."""
    total, squares, count = 0.0, 0.0, 0
    for i in shuffled(len(pictures), 1, SUBSET)[:most].tolist():
        if pictures.images is not None:
            x = pictures.images[i].double().flatten(1)
        else:
            try:
                x = torch.from_numpy(np.array(pictures.read(i))).double().reshape(-1, pictures.in_chans).T
            except BadFile:
                continue
        total, squares, count = total + x.sum(1), squares + x.square().sum(1), count + x.shape[1]
    if not count:
        raise RunError(f"--stats data: none of the pictures of {pictures.name} can be read")
    mean = total / count / 255
    std = (squares / count / 255 ** 2 - mean ** 2).clamp_min(0).sqrt().clamp_min(1e-3)
    return tuple(mean.tolist()), tuple(std.tolist())


# ------------------------------------------------------------------------------------------------ batches
class View:
    """A view of a batch that augments what is sliced from it: `view[a:b]` is (b - a, C, h, w), normalised.

    A function under "pixels" in the view's dict gets each crop as uint8 (C, h, w); files: in the reading process.
    """

    def __init__(self, batch, number):
        self.batch, self.number = batch, number

    def __len__(self):
        return len(self.batch.ids)

    def __getitem__(self, part):
        # micro-batches are drawn inside the model, where autocast is on: pixels stay in float32
        with torch.autocast(self.batch.loader.device.type, enabled=False):
            return self.draw(part)

    def draw(self, part):
        batch, loader = self.batch, self.batch.loader
        spec, ids = loader.views[self.number], batch.ids[part]
        key = (loader.seed, batch.epoch)
        if batch.crops is None:
            images = loader.pictures.images
            sizes = torch.tensor([images.shape[2:]]).expand(len(ids), 2)
            boxes = loader.boxes(ids, sizes, self.number, batch.epoch)
            x = resample(images[upload(ids, images.device)], boxes, loader.size, spec["mode"])
            if spec.get("pixels"):
                x = (x * 255 + 0.5).to(torch.uint8)
                x = per_picture(x, ids, spec["pixels"], PIXELS, self.number, *key).float() / 255
        else:
            x = batch.crops[self.number][part].to(loader.device, non_blocking=True).contiguous().float() / 255
        x = augment(x, ids, spec, COLOUR, self.number, *key)
        return (x - loader.mean) / loader.std


class Batch:
    """ids (n,) of the pictures on the CPU; views[k] a lazy View; noise(L) the uniform numbers that choose masks.

    shown (n,): as ids, but where a picture cannot be read the one that stands in for it: labels go by `shown`.
    """

    def __init__(self, loader, ids, epoch, crops=None, shown=None):
        self.loader, self.ids, self.epoch, self.crops = loader, ids, epoch, crops
        self.shown = ids if shown is None else shown

    @property
    def views(self):
        return [View(self, k) for k in range(len(self.loader.views))]

    def __len__(self):
        return len(self.ids)

    def noise(self, length):
        return uniform(upload(self.ids, self.loader.device), length, MASK, self.loader.seed, self.epoch)


class Loader:
    """Batches of a set, in hashed order: for batch in loader.epoch(e, start): ... Every process gets its share.

    batch_size is this process's share of the global batch; the rest of an epoch that fills no global batch is left
    out, or with shuffle=False handed out as a shorter batch. `waited` counts seconds spent waiting for data.
    decoder: see `decode.device_decoder`; workers then hand over JPEGs of random crops as they are in the file.
    """

    def __init__(self, pictures, views, size, batch_size, seed=0, workers=0, device="cpu", rank=0, processes=1,
                 shuffle=True, max_bad=0.01, mean=None, std=None, decoder=None):
        self.pictures, self.views, self.size = pictures, views, tuple(size)
        self.batch_size, self.seed, self.device = batch_size, seed, torch.device(device)
        self.rank, self.processes, self.shuffle, self.max_bad = rank, processes, shuffle, max_bad
        self.mean = torch.tensor(mean or pictures.mean, device=device)[:, None, None]
        self.std = torch.tensor(std or pictures.std, device=device)[:, None, None]
        self.waited = 0.0
        self.keys = []                                                      # what self.reader is to read, by batch
        self.reader = None
        if pictures.images is None:
            self.reader = torch.utils.data.DataLoader(
                Reader(self, decoder), batch_sampler=self.keys, num_workers=workers, collate_fn=whole,
                pin_memory=self.device.type == "cuda", persistent_workers=workers > 0)

    def __len__(self):
        if self.shuffle:
            return len(self.pictures) // (self.batch_size * self.processes)
        return math.ceil(len(self.pictures) / (self.batch_size * self.processes))

    def boxes(self, ids, sizes, number, epoch):
        scale = self.views[number]["scale"]
        if scale is None:
            return central_boxes(sizes, self.size)
        return random_boxes(ids, sizes, scale, CROP, number, self.seed, epoch)

    def __getstate__(self):                                                 # workers need the plan, not the reader
        return {k: v for k, v in self.__dict__.items() if k not in ("reader", "keys", "mean", "std")}

    def batches(self, epoch, start=0):
        """The indices of each batch of this process, from batch `start` on."""
        n, share = self.batch_size * self.processes, self.batch_size
        order = shuffled(len(self.pictures), ORDER, self.seed, epoch) if self.shuffle else torch.arange(
            len(self.pictures))
        for b in range(start, len(self)):
            ids = order[b * n + self.rank * share:min(b * n + (self.rank + 1) * share, len(order))]
            if len(ids):
                yield ids

    def epoch(self, epoch, start=0):
        if self.reader is None:
            for ids in self.batches(epoch, start):
                yield Batch(self, ids, epoch)
            return
        self.keys[:] = [[(epoch, i) for i in ids.tolist()] for ids in self.batches(epoch, start)]
        seen = len(self.pictures.bad)
        items = iter(self.reader)
        while True:
            before = time.perf_counter()
            item = next(items, None)
            self.waited += time.perf_counter() - before
            if item is None:
                return
            ids, shown, bad, crops, encoded = item
            if encoded:
                crops, shown = self.reader.dataset.decode(encoded, ids, shown, bad, crops, epoch, self.device)
            if bad:
                self.pictures.bad.update((i, t) for i, t in bad.items() if i not in self.pictures.bad)
                seen = report_bad(self.pictures, self.max_bad, seen)
            yield Batch(self, ids, epoch, crops, torch.tensor(shown))


# ------------------------------------------------------------------------------------------- embedded set
SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("columns", "rows", "checks", "dots")


def embedded(train=True, in_chans=3, n=None, side=32):
    """4,096 (train) or 2,048 (test) drawn pictures of 16 classes, a shape filled with a texture: picture i is a
    function of i alone. Colours, place, size, turn, ground and light are random, so that no pixel tells the class."""
    n = n or (4096 if train else 2048)
    first = 0 if train else 1 << 20
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                                # many small operations: faster alone
    images = torch.cat([draw(torch.arange(first + i, first + min(i + 32, n)), side) for i in range(0, n, 32)])
    torch.set_num_threads(threads)
    if in_chans == 1:
        images = (grey(images.float()) + 0.5).to(torch.uint8)
    elif in_chans != 3:
        raise UsageError(f"--in-chans {in_chans}: the embedded pictures have 3 channels, or 1 in grey")
    labels = (torch.arange(n) * 5) % 16
    classes = [f"{shape} of {texture}" for shape in SHAPES for texture in TEXTURES]
    return Pictures(images=images, labels=labels, classes=classes, in_chans=in_chans, name="embedded")


def texture(kind, x, y, u):
    """Pattern in [0, 1] at coordinates x, y (N, s, s) for kinds (N,), with u (N, 4): frequency, turn, two phases."""
    angle = (u[:, 1] - 0.5) * 0.4
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    frequency = (14.0 + 5.0 * u[:, 0])[:, None, None]
    a = frequency * (x * cos + y * sin) + 6.28 * u[:, 2, None, None]
    b = frequency * (y * cos - x * sin) + 6.28 * u[:, 3, None, None]
    patterns = torch.stack([3 * a.sin(), 3 * b.sin(), 6 * a.sin() * b.sin(),
                            8 * (0.7 * a).sin().abs() * (0.7 * b).sin().abs() - 4.5], 1)
    return patterns[torch.arange(len(kind)), kind].sigmoid()


def draw(ids, side=32):
    """Embedded pictures with these numbers: (N, 3, side, side) uint8. Drawn at twice the size, then averaged."""
    n, s = len(ids), 2 * side
    u = uniform(ids, 40, 20230501)
    label = (ids % (1 << 20) * 5) % 16
    line = (torch.arange(s) + 0.5) / s * 2 - 1
    y, x = line[:, None].expand(n, s, s), line[None].expand(n, s, s)

    def pick(column):
        return u[:, column, None, None]

    scale, turn = 0.62 + 0.28 * pick(0), (pick(1) - 0.5) * 0.5
    dx, dy = x - (pick(2) - 0.5) * 0.4, y - (pick(3) - 0.5) * 0.4
    px, py = (dx * turn.cos() + dy * turn.sin()) / scale, (dy * turn.cos() - dx * turn.sin()) / scale
    triangle = torch.maximum(py - 0.7, px.abs() * 1.8 - py - 0.9)
    cross = torch.maximum(torch.maximum(px.abs(), py.abs()) - 1, torch.minimum(px.abs(), py.abs()) - 0.38)
    inside = torch.stack([px.square() + py.square() - 0.9, torch.maximum(px.abs(), py.abs()) - 0.83, triangle, cross], 1)
    inside = (inside[torch.arange(n), label // 4] < 0).float()[:, None]

    def colour(column, low, high):
        """A random light in [low, high] with a tint of its own, (N, 3, 1, 1)."""
        light = low + (high - low) * u[:, column:column + 1]
        return (light + 0.3 * (u[:, column + 1:column + 4] - 0.5))[:, :, None, None]

    # the ground is a smooth wave between two middling colours, the figure's texture a dark and a light one
    wave = (1.5 * (x * (6.28 * pick(4)).cos() + y * (6.28 * pick(4)).sin()) + 6.28 * pick(5)).sin() * 0.5 + 0.5
    ground = torch.lerp(colour(6, 0.3, 0.7), colour(10, 0.3, 0.7), wave[:, None])
    figure = torch.lerp(colour(14, 0.0, 0.3), colour(18, 0.7, 1.0), texture(label % 4, x, y, u[:, 22:26])[:, None])
    image = torch.where(inside.bool(), figure, ground)
    light = 1 + 0.5 * (pick(26) - 0.5) * x + 0.5 * (pick(27) - 0.5) * y
    noise = uniform(ids, 3 * side * side, 20230502).reshape(n, 3, side, side) - 0.5
    image = torch.nn.functional.avg_pool2d(image * light[:, None], 2) + 0.04 * noise
    return (image.clamp(0, 1) * 255 + 0.5).to(torch.uint8)


if __name__ == "__main__":                                                  # the sub-commands, each in its own file
    import run
    asked, rest = sys.argv[1:2], sys.argv[2:]
    if asked == ["pack"]:
        import pack
        run.program(pack.main, lambda: pack.get_args(rest))
    if asked == ["check"]:
        import check
        run.program(check.main, lambda: check.get_args(rest))
    run.Parser(usage="data.py pack|check ...").error("which command? pack: many pictures into one file; check: find bad "
                                                     "ones")
