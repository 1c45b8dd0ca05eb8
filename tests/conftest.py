"""What the tests share: files, a tiny network and few images, and runs as processes of their own.

Processes are forked from a server that has imported torch: they start in a tenth of a second.
"""
import contextlib
import csv
import importlib
import io
import json
import multiprocessing
import os
import socket
import struct
import sys
import time
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([ROOT, HERE])
os.environ.pop("DATA", None)
for place in (HERE, ROOT):
    if place not in sys.path:
        sys.path.insert(0, place)

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import data
import model
import run

torch.set_num_threads(1)

STAGES = ("mae_pretrain", "graft_train", "finetune")
# as this is imported, since test_smoke.py forks from the same server, and first
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["conftest", *STAGES, "evaluate", "segment", "analyze", "reproduce"])
SMALL_SET = 96                                              # embedded images of the small world
QUIET = ["--amp", "off", "--device", "cpu", "--workers", "0"]


# ------------------------------------------------------------------------------------------ files
def images_like(n, h, w, seed=0):
    """Random uint8 images (n, 3, h, w) with large and small structure."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 4, 4, generator=generator)
    fine = torch.rand(n, 3, h, w, generator=generator)
    x = 0.7 * F.interpolate(coarse, size=(h, w), mode="bilinear") + 0.3 * fine
    return (x * 255).to(torch.uint8)


def folder_of(root, names, size=(16, 16), seed=0):
    """A folder with an image, each another one, for each name. Returns its path."""
    pixels = images_like(len(names), *size, seed).permute(0, 2, 3, 1).numpy()
    for name, image in zip(names, pixels):
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Image.fromarray(image).save(path)
    return str(root)


def png_of_16_bits(values, orientation=1):
    """The bytes of a PNG of (H, W, 3) values below 65,536, which pillow does not write."""
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, raw, orientation)


def png(width, height, bits, raw, orientation=1):
    """The bytes of an RGB PNG: its header, EXIF and rows."""
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)), (b"eXIf", exif),
              (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks)


def class_folder(root, train=6, val=6, classes=("cat", "dog"), sizes=1):
    """train/CLASS and val/CLASS of embedded images, so many of each class: of one size they are
    held in memory, of several (width 32, 33, ...) read as files."""
    images = iter(data.draw(torch.arange((train + val) * len(classes))))
    for part, each in (("train", train), ("val", val)):
        for name in classes if each else ():
            (root / part / name).mkdir(parents=True)
            for i in range(each):
                image = Image.fromarray(next(images).permute(1, 2, 0).numpy())
                image.resize((32 + i % sizes, 32)).save(root / part / name / f"{i}.png")
    return root


def corrupt(path, content=b"this is no image\n" * 9):
    """Put other bytes into a file."""
    with open(path, "wb") as f:
        f.write(content)


def saved(out, name="last.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)


def log_of(out):
    """The entries of a run's log, each JSON to the letter."""
    def refuse(word):
        pytest.fail(f"{word} is not JSON")

    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line, parse_constant=refuse) for line in f]


def rows_of(path):
    """A CSV as a list of dicts."""
    with open(path) as f:
        return list(csv.DictReader(f))


def essence(out):
    """What a run's log says, without how fast it was."""
    timing = ("images_per_second", "data_wait", "seconds")
    return [{k: v for k, v in line.items() if k not in timing} for line in log_of(out)]


def assert_identical(ours, expected):
    """Two state dicts are equal to the bit."""
    assert set(ours) == set(expected)
    different = [name for name in ours if not torch.equal(ours[name], expected[name])]
    assert not different, different


def assert_same_run(ours, expected):
    """Two folders hold the same run: weights, optimiser, log."""
    a, b = saved(ours), saved(expected)
    assert a["step"] == b["step"]
    assert_identical(a["model"], b["model"])
    for key in a["optimizer"]["state"]:
        assert_identical(a["optimizer"]["state"][key], b["optimizer"]["state"][key])
    for name in ("encoder.pt", "classifier.pt"):
        there = [os.path.exists(os.path.join(out, name)) for out in (ours, expected)]
        assert there[0] == there[1]
        if there[0]:
            assert_identical(saved(ours, name)["model"], saved(expected, name)["model"])
    assert essence(ours) == essence(expected)


# -------------------------------------------------------------------------------- the small world
def small_world(setitem, setattribute):
    """A network of three blocks, vit_test, and few embedded images, drawn once."""
    setitem(model.ARCHS, "vit_test", ((8, 24, 3, 3), (16, 1, 2)))
    drawn, embedded = {}, data.embedded

    def few(train=True, in_chans=3, n=None):
        key = train, in_chans, n or (SMALL_SET if train else 50)
        if key not in drawn:
            drawn[key] = embedded(train, in_chans, n=key[2])
        return drawn[key].select(range(key[2]))

    setattribute(data, "embedded", few)


@pytest.fixture
def world(monkeypatch):
    small_world(monkeypatch.setitem, monkeypatch.setattr)


def options(stage, encoder, out, *more):
    """A short run of the small world: every step logged and saved."""
    own = {"mae_pretrain": ["--arch", "vit_test"],
           "graft_train": ["--init", encoder, "--hidden-dim", "32", "--mim-weight", "1"],
           "finetune": ["--checkpoint", encoder, "--mixup", "0.8", "--cutmix", "1", "--drop-path",
                        "0.3", "--erasing", "0.5", "--rand-augment", "9"]}[stage]
    every = ["--log-every", "1", "--save-minutes", "1e-9"]
    return [str(x) for x in (*own, "--lr", "0.02", "--batch-size", "16", *every, *QUIET,
                             "--out", out, *more)]


def train(stage, encoder, out, *more):
    """The same in the process of the test, which must be in the small `world`."""
    program = importlib.import_module(stage)
    return program.main(program.get_args(options(stage, encoder, out, *more)))


def ended(program, *arguments, work=True):
    """(exit code, lines of its errors, what it printed) of a script as from the command line, in
    this process. work=False: its options alone, and None as code where they are taken."""
    module, reached = importlib.import_module(program), []
    errors, printed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
        with pytest.raises(SystemExit) as end, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{program}.py", *map(str, arguments)])
            run.program(module.main if work else reached.append, module.get_args)
    code = None if reached else end.value.code
    return code, errors.getvalue().splitlines(), printed.getvalue()


def refused(program, *arguments, code=2):
    """The one line in which a script ends."""
    found, lines, _ = ended(program, *arguments)
    assert found == code and len(lines) == 1 and ": error: " in lines[0], lines
    return lines[0]


# --------------------------------------------------------------------------- runs as processes
def child(program, arguments, log, environment, prepare):
    """The body of a process: a script as from the command line, or a function, what it says in a
    file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)    # of reading processes, as everywhere
    small_world(lambda where, key, value: where.update({key: value}), setattr)
    if prepare:
        prepare()
    if callable(program):
        run.program(lambda _: program(*arguments), lambda: None)
    sys.argv = [f"{program}.py", *map(str, arguments)]
    module = importlib.import_module(program)
    run.program(module.main, module.get_args)


class Started:
    """A script that runs, or several processes of it. prepare: called in each before the script,
    or {rank: function}."""

    def __init__(self, server, log, program, *arguments, processes=1, prepare=None):
        self.log = str(log)
        environments = [{}]
        if processes > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(s.getsockname()[1]))
            meet["WORLD_SIZE"] = meet["LOCAL_WORLD_SIZE"] = str(processes)      # as torchrun does
            environments = [dict(meet, RANK=str(r), LOCAL_RANK=str(r)) for r in range(processes)]
        if not isinstance(prepare, dict):
            prepare = dict.fromkeys(range(processes), prepare)
        self.jobs = []
        for r, environment in enumerate(environments):
            what = (program, arguments, self.log, environment, prepare.get(r))
            self.jobs.append(server.Process(target=child, args=what))
            self.jobs[-1].start()

    def said(self):
        with contextlib.suppress(FileNotFoundError), open(self.log) as f:
            return f.read()
        return ""

    def until(self, words, seconds=120):
        """Wait for it to say these words."""
        end = time.monotonic() + seconds
        while words not in self.said():
            alive = any(job.is_alive() for job in self.jobs)
            assert time.monotonic() < end and alive, self.said()
            time.sleep(0.005)
        return self

    def codes(self, seconds=180):
        """The exit codes, when all have ended."""
        for job in self.jobs:
            job.join(seconds)
            if job.exitcode is None:
                for other in self.jobs:
                    other.kill()
                pytest.fail(f"still running after {seconds} s: {self.said()}")
        return [job.exitcode for job in self.jobs]

    def errors(self):
        """Its one-line errors; a traceback fails the test."""
        assert "Traceback" not in self.said(), self.said()
        return [line for line in self.said().splitlines() if ": error: " in line]


@pytest.fixture(scope="session")
def server():
    """Where processes are forked from: it has imported everything, and done nothing else."""
    return multiprocessing.get_context("forkserver")


@pytest.fixture
def start(server, tmp_path):
    """start(program, *arguments, processes=1, prepare=None) -> Started, ended with the test."""
    started = []

    def begin(program, *arguments, **more):
        log = tmp_path / f"said{len(started)}.txt"
        started.append(Started(server, log, program, *arguments, **more))
        return started[-1]

    yield begin
    for job in started:
        for process in job.jobs:
            process.kill()
            process.join()


@pytest.fixture(scope="session")
def encoder(server, tmp_path_factory):
    """The folder of a grafting run: an encoder.pt to graft onto and to fine-tune."""
    place = tmp_path_factory.mktemp("encoder")
    first, second = place / "mae", place / "graft"
    for program, init, out, more in (("mae_pretrain", None, first, []),
                                     ("graft_train", first, second, ["--mim-weight", "0"])):
        arguments = options(program, init, out, "--epochs", "1", "--save-minutes", "10", *more)
        job = Started(server, place / f"{program}.txt", program, *arguments)
        assert job.codes() == [0], job.said()
    return second
