"""Images in tar files: read at random through an index, and written. To be a section of data.py."""
import fcntl
import functools
import glob
import hashlib
import io
import json
import os
import re
import tarfile
import tempfile
import zipfile
from array import array
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from data import EXTENSIONS
from decode import Encoded

OLD_PACK = b"\x89picture pack 1\n"
TAR_END = bytes(512)
OPEN_TARS = 256             # kept open by a process; those beyond are opened for each image
SYNC = 64 << 20             # bytes between flushes to the disk while a tar is written


class DataError(ValueError):
    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------------------------ tar files
class TarFiles:
    """The tars at `paths`, with their sizes when indexed.

    They are opened by whoever reads first: a process gets its own descriptors, pickling needs none.
    """

    def __init__(self, paths, sizes):
        self.paths, self.sizes, self.fds = paths, sizes, {}

    def __getstate__(self):
        return self.__dict__ | dict(fds={})

    def __del__(self):
        for fd in self.fds.values():
            os.close(fd)

    def read(self, which, at, length):
        """`length` bytes at `at` of a tar. OSError when it is not what it was when indexed."""
        content, kept = bytearray(length), self.fds.get(which)
        fd = os.open(self.paths[which], os.O_RDONLY) if kept is None else kept
        if len(self.fds) < OPEN_TARS:
            kept = self.fds.setdefault(which, fd)                           # another thread may have been faster
        try:
            if os.preadv(fd, [content], at) < length or os.fstat(fd).st_size != self.sizes[which]:
                raise OSError(f"{self.paths[which]} has changed since it was opened")
            return content
        finally:
            if fd != kept:
                os.close(fd)


def stamp(file):
    """Size and time of change of a path or descriptor: [bytes, nanoseconds]."""
    status = os.stat(file)
    return [status.st_size, status.st_mtime_ns]


class TarSource:
    """Images in tars, named and ordered as in the folder that the tars unpack to.

    names: bytes of all names; first, last (N,) where each begins and ends there; tar, offsets, lengths (N,): where the
    images are; labels (N,) int64 into classes from the .cls files of WebDataset, -1 where there is none, or None.
    """

    def __init__(self, files, names, first, last, tar, offsets, lengths, labels=None, classes=None):
        self.files, self.names, self.first, self.last = files, names, first, last
        self.tar, self.offsets, self.lengths = tar, offsets, lengths
        self.labels, self.classes = labels, classes

    def __len__(self):
        return len(self.first)

    def name(self, i):
        return os.fsdecode(self.names[self.first[i]:self.last[i]])

    def content(self, i):
        """The bytes of image i. OSError when its tar is not what it was."""
        return self.files.read(int(self.tar[i]), int(self.offsets[i]), int(self.lengths[i]))

    def select(self, ids, cut=0):
        """The images at ids, an array of indices, without the first `cut` bytes of their names."""
        ids = np.asarray(ids)
        labels = None if self.labels is None else self.labels[ids]
        return TarSource(self.files, self.names, self.first[ids] + cut, self.last[ids], self.tar[ids],
                         self.offsets[ids], self.lengths[ids], labels, self.classes)

    def below(self, folder):
        """The images in a folder, with their names below it."""
        start = np.frombuffer(os.fsencode(folder) + b"/", np.uint8)
        places = np.minimum(self.first[:, None] + np.arange(len(start)), len(self.names) - 1)
        inside = (np.frombuffer(self.names, np.uint8)[places] == start).all(1)
        return self.select(np.flatnonzero(inside & (self.last - self.first > len(start))), len(start))


def is_tar(path):
    """Whether a path names tars: one, a pattern or a folder that holds no other images. DataError: a compressed one."""
    if os.path.isdir(path):
        return bool(tars_of(path))
    if not os.path.isfile(path):
        return "{" in path and ".tar" in path
    with open(path, "rb") as f:
        head = f.read(512)
    if head.startswith(OLD_PACK):
        raise DataError(f"{path} is a pack of an older version; make a tar from its folder, which any tool can read: "
                        "python data.py pack FOLDER FILE.tar")
    if head[:2] in (b"\x1f\x8b", b"BZ", b"\xfd7", b"\x28\xb5") and re.search(r"\.(tar|tgz|tbz)", path):
        raise DataError(f"{path} is compressed and cannot be read at random: unpack it to a plain .tar")
    return head[257:262] == b"ustar" or path.lower().endswith(".tar")


def tars_of(path):
    """Paths of the tars that a file name, a pattern as shard-{000..146}.tar or a folder stands for, in order."""
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        return sorted(glob.glob(os.path.join(glob.escape(path), "**", "*.tar"), recursive=True))
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        if not os.path.isfile(path):
            raise DataError(f"{path}: no such file")
        return [path]
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    parts = found[1].split(",")
    if ends:
        parts = [str(i).zfill(len(ends[1])) for i in range(int(ends[1]), int(ends[2]) + 1)]
    return [tar for part in parts for tar in tars_of(path[:found.start()] + part + path[found.end():])]


def tar_number(field):
    """A number of a tar header: octal, or with its first bit set the bytes themselves."""
    return int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.rstrip(b"\0 ") or b"0", 8)


def pax_records(content):
    """{key: value} of a pax header: records of "length key=value\\n"."""
    found = {}
    while content:
        length = content.split(b" ", 1)[0]
        key, value = content[len(length) + 1:int(length) - 1].split(b"=", 1)
        found[key] = value
        content = content[int(length):]
    return found


def tar_members(fd, at, end, where):
    """(type, name, offset, size) of each member of the tar between two places of a file, by its headers alone.

    Names are bytes. DataError: the tar is damaged or cut short, or holds what has no one place (sparse files).
    """
    longer = {}
    while True:
        head = os.pread(fd, 512, at) if at + 512 <= end else b""
        if head == TAR_END:
            if os.pread(fd, min(10240, end - at), at).strip(b"\0"):
                raise DataError(f"{where}: another tar begins at byte {at}; join tars with tar -A")
            return
        try:
            if len(head) < 512:
                raise DataError(f"{where}: cut short, this tar ends within its members; copy it again")
            if tar_number(head[148:156]) != sum(head) - sum(head[148:156]) + 8 * 32:
                raise ValueError
            kind, data = head[156:157], at + 512
            size = int(longer.pop(b"size", 0)) or tar_number(head[124:136])
            if kind == b"S" or any(key.startswith(b"GNU.sparse") for key in longer):
                raise DataError(f"{where}: holds a sparse file; make it again without tar's --sparse")
            if kind in b"123456" or size < 0:
                size = 0                                                    # links and folders have no content
            at = data + -(-size // 512) * 512
            if at > end:
                raise DataError(f"{where}: cut short, this tar ends within its members; copy it again")
            if kind == b"L":
                longer[b"path"] = os.pread(fd, min(size, 1 << 16), data).rstrip(b"\0")
            elif kind == b"x":
                longer |= pax_records(os.pread(fd, min(size, 1 << 20), data))
            elif kind not in b"gK":
                name = head[:100].split(b"\0", 1)[0]
                if head[257:263] == b"ustar\0" and head[345]:
                    name = head[345:500].split(b"\0", 1)[0] + b"/" + name
                yield kind, longer.get(b"path", name), data, size
                longer = {}
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{where}: damaged, no header of a tar before byte {at + 512}") from None


def listed(fd, path, places, names, texts):
    """Append (offset, size) and name of each image in a tar, of tars in it too, to `places` and `names`.

    texts: {name without ending: label} of its .cls files. Returns how many members were passed over.
    """
    todo, other = [(0, os.fstat(fd).st_size, "")], 0
    while todo:
        at, end, folder = todo.pop()
        for kind, name, offset, size in tar_members(fd, at, end, path):
            name = os.fsdecode(name)
            parts = [part for part in name.split("/") if part not in ("", ".")]
            if name.startswith("/") or ".." in parts:
                raise DataError(f"{path}: refused, the name {name!r} in this tar leads out of it")
            stem, ending = os.path.splitext(name := folder + "/".join(parts))
            ending = ending.lower()
            if kind not in b"0\0007" or any(part.startswith(".") for part in parts):
                other += kind in b"12"
            elif ending in EXTENSIONS:
                names.append(name)
                places.extend((offset, size))
            elif ending == ".tar":
                todo.append((offset, offset + size, stem + "/"))
            elif ending == ".cls":
                texts[stem] = os.pread(fd, min(size, 4096), offset).decode("utf-8", "replace").strip()
    return other


def walk_order(name):
    """Key that sorts names as a folder is walked: in each folder its files, then its folders."""
    folder, _, file = name.rpartition("/")
    return ("\1" + folder.replace("/", "\0\1") + "\0\0" if folder else "\0") + file


def index_tars(path, tars):
    """The arrays of TarSource for the tars that `path` stands for, by name."""
    names, places, tar, labels = [], array("q"), array("i"), []
    for number, one in enumerate(tars):
        texts, before = {}, len(names)
        with open(one, "rb") as f:
            other = listed(f.fileno(), one, places, names, texts)
        if other:
            print(f"warning: {one}: passed over {other} links; tar --dereference packs what they lead to", flush=True)
        tar.extend([number] * (len(names) - before))
        if texts:                                                           # KEY ends at the first dot of the file's name
            keys = (os.path.split(name) for name in names[before:])
            keys = (os.path.join(folder, file.split(".", 1)[0]) for folder, file in keys)
            labels += [texts.get(os.path.splitext(name)[0], texts.get(key, ""))
                       for name, key in zip(names[before:], keys)]
        labels += [""] * (len(names) - len(labels))
    places = np.array(places, np.int64).reshape(-1, 2)
    folders = tar_folders(path, tars, names, tar, any(labels))
    names = [folders[t] + name for t, name in zip(tar, names)]
    if len(tars) > 1 and len(set(names)) < len(set(zip(tar, names))):       # keys that begin anew in each shard
        stems = [os.path.basename(one).removesuffix(".tar") for one in tars]
        names = [os.path.join(os.path.dirname(name), f"{stems[t]}_{os.path.basename(name)}")
                 for t, name in zip(tar, names)]
    keys = [walk_order(name) for name in names]
    order = sorted(range(len(names)), key=keys.__getitem__)
    order = [i for i, after in zip(order, order[1:] + [-1]) if after < 0 or names[i] != names[after]]   # the last holds
    classes = sorted(set(labels) - {""})
    if all(text.isdecimal() for text in classes):
        classes.sort(key=int)
    rank = {text: i for i, text in enumerate(classes)} | {"": -1}
    kept = [os.fsencode(names[i]) for i in order]
    last = np.cumsum([len(name) for name in kept], dtype=np.int64)
    return dict(names=np.frombuffer(b"".join(kept), np.uint8), last=last, tar=np.array(tar, np.int32)[order],
                offsets=places[order, 0], lengths=places[order, 1],
                labels=np.array([rank[labels[i]] for i in order] if classes else [], np.int64),
                classes=np.frombuffer(json.dumps(classes).encode(), np.uint8))


def tar_folders(path, tars, names, tar, labelled):
    """For each of several tars the folder that its images are in, "" or with a slash at its end.

    Tars below a folder keep the folders they are in. A tar's name is its images' class where they have no folder and
    no label of their own: but for numbered shards, unless images are named after their tar as ImageNet's are. In a
    set of which some tars are named train and others val or test these are the parts.
    """
    if len(tars) == 1:
        return [""]
    stems = [os.path.basename(one)[:-4] for one in tars]
    root = path if os.path.isdir(path) else os.path.commonpath([os.path.dirname(os.path.abspath(one)) for one in tars])
    folders = [os.path.relpath(os.path.dirname(os.path.abspath(one)), os.path.abspath(root)) for one in tars]
    folders = ["" if folder == "." else folder + "/" for folder in folders]
    words = [re.search(r"(?:^|[^a-z])(train|val|test)(?:ing|idation|id)?(?:[^a-z]|$)", stem.lower()) for stem in stems]
    if all(words) and len({word[1] for word in words}) > 1:
        folders = [f"{folder}{word[1]}/" for folder, word in zip(folders, words)]
    flat = not labelled and not any("/" in name for name in names)
    series = len({re.sub(r"\d+", "", stem) for stem in stems}) == 1
    if flat and not all(words) and (not series or all(name.startswith(stems[t]) for t, name in zip(tar, names))):
        folders = [f"{folder}{stem}/" for folder, stem in zip(folders, stems)]
    return folders


def index_places(path):
    """Where the index of tars may be kept: beside them, and where that cannot be written in the temporary folder."""
    path = os.path.abspath(path)
    cache = os.path.join(tempfile.gettempdir(), f"tar-index-{os.getuid()}")
    beside = os.path.join(path, "tars.index.npz") if os.path.isdir(path) else f"{path}.index.npz"
    return beside, os.path.join(cache, hashlib.sha256(os.fsencode(path)).hexdigest()[:32] + ".npz")


def open_tars(path):
    """TarSource of every image in the tars that `path` stands for, through their index, made when there is none."""
    tars = tars_of(path)
    stamps = [stamp(one) for one in tars]
    made = json.dumps([1, [os.path.basename(one) for one in tars], stamps]).encode()
    arrays = None
    for place in index_places(path):
        try:
            with np.load(place, allow_pickle=False) as kept:
                if kept["made"].tobytes() == made:
                    arrays = {key: kept[key] for key in kept.files}
                    break
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue
    if arrays is None:
        arrays = index_tars(path, tars) | dict(made=np.frombuffer(made, np.uint8))
        for place in index_places(path):
            if save_index(place, arrays):
                break
    last, classes = arrays["last"], json.loads(arrays["classes"].tobytes())
    first = np.concatenate([[0], last[:-1]]) if len(last) else last
    return TarSource(TarFiles(tars, [size for size, _ in stamps]), arrays["names"].tobytes(), first, last, arrays["tar"], arrays["offsets"],
                     arrays["lengths"], arrays["labels"] if classes else None, classes or None)


def save_index(place, arrays):
    """Write the arrays under a temporary name, then rename them; returns whether that could be done."""
    part = f"{place}.{os.getpid()}.part"
    try:
        if os.path.dirname(place).startswith(os.path.join(tempfile.gettempdir(), "tar-index-")):
            os.makedirs(os.path.dirname(place), mode=0o700, exist_ok=True)
        with open(part, "wb") as f:
            np.savez(f, **arrays)
        os.replace(part, place)
        return True
    except OSError:
        if os.path.exists(part):
            os.remove(part)
        return False


# ----------------------------------------------------------------------------------------- writing a tar
def shrunk(content, short_side=None, quality=90):
    """The bytes to keep of an image file, or in words why it cannot be read."""
    try:
        image = Encoded(content)
        if short_side is None or min(image.size) <= short_side:
            image.decode(8 if image.is_jpeg else 1).load()                  # only to know that it can be decoded
            return content
        reductions = [f for f in (8, 4, 2) if min(image.size) >= 2 * f * short_side] if image.is_jpeg else []
        small = image.decode(max(reductions, default=1))
        if "A" in small.mode or "a" in small.mode or small.mode[0] in "IF" or "transparency" in small.info:
            return content                                                  # more than a JPEG can hold
        small = small.convert("L" if small.mode in ("1", "L") else "RGB")
        scale = short_side / min(small.size)
        small = small.resize([max(round(side * scale), 1) for side in small.size], Image.LANCZOS)
        small.info.clear()
        packed = io.BytesIO()
        small.save(packed, "JPEG", quality=quality)
        return packed.getvalue()
    except Exception as error:                                              # pillow raises a dozen kinds
        return f"{type(error).__name__}: {error}"


def write_tar(source, path, short_side=None, quality=90, workers=1, max_bad=0.01, progress=lambda: None):
    """Write every image of a source into a tar at `path`, in order; one that was begun and stopped is gone on with.

    Returns {i: what is wrong with it} of those left out. DataError when that is more than max_bad, or it cannot write.
    """
    if os.path.exists(path):
        raise DataError(f"{path} is there already; remove it to pack again")
    if source.__dict__.get("labels") is not None:
        raise DataError("these tars have labels in .cls files, which a tar of images alone does not hold")
    kept = functools.partial(shrunk, short_side=short_side, quality=quality)
    settings = {"comment": f"short_side={short_side} quality={quality if short_side else None}"}
    head = tarfile.TarInfo.create_pax_global_header(settings)
    try:
        with open(f"{path}.part", "r+b" if os.path.exists(f"{path}.part") else "w+b") as f:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{path}.part is being written by another process") from None
            done = begun(f, f"{path}.part", head, source, kept)
            todo = [i for i in range(len(source)) if os.fsencode(source.name(i)) not in done]
            if len(todo) < len(source):
                print(f"going on: {len(source) - len(todo)} of {len(source)} images are packed already", flush=True)
            bad = fill_tar(f, source, todo, kept, workers, max_bad, progress)
            if len(bad) == len(source):
                raise DataError("none of the images can be read", 1)
            f.write(bytes(1024 + -(f.tell() + 1024) % 10240))
            f.flush()
            os.fsync(f.fileno())
        os.replace(f"{path}.part", path)
    except OSError as error:
        raise DataError(f"cannot write {path}: {error.strerror or error}", 1) from None
    return bad


def begun(f, path, head, source, kept):
    """Names of the images in a tar that was begun; f is left at, and cut to, the end of its last whole member.

    What the disk may not have had when the power failed, the last 2 SYNC bytes, is compared with its source again.
    """
    size = os.fstat(f.fileno()).st_size
    start, done, end = f.read(len(head)), set(), len(head)
    if start != head[:len(start)]:
        raise DataError(f"{path} was begun with other options, or is something else: remove it, or use the same options")
    if len(start) < len(head):
        f.seek(0)
        f.write(head)
        f.truncate()
        return done
    place = {}
    try:
        for _, name, offset, length in tar_members(f.fileno(), end, size, path):
            if offset + length > size - 2 * SYNC:
                place = place or {os.fsencode(source.name(i)): i for i in range(len(source))}
                if name not in place or kept(source.content(place[name])) != os.pread(f.fileno(), length, offset):
                    break
            done.add(name)
            end = offset + -(-length // 512) * 512
    except DataError:                                                       # the member that was being written
        pass
    f.seek(end)
    f.truncate()
    return done


def fill_tar(f, source, todo, kept, workers, max_bad, progress):
    """Append the images `todo`; returns {i: what is wrong with it} of those that cannot be read."""
    bad, synced = {}, f.tell()

    def prepare(i):
        try:
            return kept(source.content(i))
        except OSError as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(workers) as pool:                               # pillow decodes without Python's lock
        for start in range(0, len(todo), 32 * workers):                     # bounds what is held in memory
            some = todo[start:start + 32 * workers]
            for i, content in zip(some, pool.map(prepare, some)):
                if isinstance(content, str):
                    bad[i] = content
                    print(f"warning: skipped {source.name(i)}: {content}", flush=True)
                    if len(bad) > max(max_bad * len(source), 1):
                        raise DataError(f"{len(bad)} of {len(source)} images cannot be read, more than --max-bad "
                                        f"{max_bad:g} allows; first {source.name(next(iter(bad)))}", 1)
                else:
                    member = tarfile.TarInfo(source.name(i))
                    member.size = len(content)
                    f.write(member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))
                    f.write(content)
                    f.write(bytes(-len(content) % 512))
                progress()
            f.flush()
            if f.tell() - synced > SYNC:
                os.fsync(f.fileno())
                synced = f.tell()
    return bad
