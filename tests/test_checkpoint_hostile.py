"""Checkpoints that are out to harm, damaged or cannot be written: one line, and nothing is run."""
import json
import os
import pathlib
import pickle
import random
import resource
import time
import zipfile

import numpy as np
import pytest
import torch

import checkpoint
import model
from checkpoint import CheckpointError
from test_checkpoint import vit


class Payload:
    """A pickled object that would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def rezipped(path, change):
    """Write a checkpoint's archive again with other parts: change(name, bytes) -> bytes."""
    with zipfile.ZipFile(path) as archive:
        parts = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts:
            archive.writestr(name, change(name, content))


def listed(path, content, pickled):
    """A file whose list of contents is this pickle."""
    torch.save(content, path)
    rezipped(path, lambda name, old: pickled if name.endswith("data.pkl") else old)


def many_keys(path, legacy):
    keys = dict.fromkeys((f"blocks.{i}.weight" for i in range(60_000)), 0)
    pickled = pickle.dumps({"model": keys}, 2)
    if not legacy:
        return listed(path, {}, pickled)
    torch.save({}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(pickle.dumps({}, 2), pickled, 1))


def ours(path, change):
    """Our own layout, changed in place: change(content)."""
    content = checkpoint.encoder_file(vit(), dict(system="MAE", mean=[0.5] * 3, std=[0.2] * 3))
    change(content)
    torch.save(content, path)


def claims(**config):
    return lambda path: ours(path, lambda content: content.update(
        config=content["config"] | config))


def with_meta(**meta):
    return lambda path: ours(path, lambda content: content["meta"].update(meta))


def tensor(value, name="norm.weight"):
    return lambda path: ours(path, lambda content: content["model"].update({name: value}))


def foreign(change):
    def write(path):
        state = vit().state_dict()
        torch.save(change(state) or state, path)
    return write


def short(path):
    """Every tensor's bytes cut to four, its size in the list of contents left as it was."""
    ours(path, lambda content: None)
    rezipped(path, lambda name, content: content[:4] if "/data/" in name else content)


def bomb(path):
    """A quarter of a gigabyte of zeros, deflated to a megabyte."""
    ours(path, lambda content: None)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("archive/data/zeros", bytes(1 << 28))


def safe(header, content=b""):
    text = json.dumps(header).encode()
    return lambda path: path.write_bytes(len(text).to_bytes(8, "little") + text + content)


PIECE = dict(dtype="F32", shape=[2], data_offsets=[0, 8])
HOSTILE = {
    "code": (lambda p: torch.save({"model": Payload()}, p), "more than tensors.*mkdir"),
    "old code": (lambda p: torch.save({"model": Payload()}, p,
                                      _use_new_zipfile_serialization=False), "more than tensors"),
    "a whole model": (lambda p: torch.save(vit(), p), r"model\.VisionTransformer.*weights_only"),
    "a path": (lambda p: torch.save({"a": pathlib.Path("x")}, p), r"pathlib\.\w*Path.*torch\.save"),
    "many keys": (lambda p: many_keys(p, False), "longer than that of any model"),
    "many old keys": (lambda p: many_keys(p, True), "longer than that of any model"),
    "nesting": (lambda p: listed(p, {}, b"\x80\x02" + b"]" * 40_000 + b"a" * 39_999 + b"."),
                "holds a list"),
    "expanded": (tensor(torch.zeros(1).expand(10 ** 7, 10 ** 8)), "has only 4 bytes"),
    "missing bytes": (short, "not a readable|claim"),
    "a zip bomb": (bomb, "claim more bytes than the file has"),
    "sparse": (tensor(torch.sparse_coo_tensor([[0]], [1.0], (10 ** 12,))), "not dense"),
    "no dimensions": (tensor(torch.tensor(1.0), "patch_embed.proj.weight"), "another shape"),
    "whole numbers": (tensor(torch.zeros(128, dtype=torch.int64)), "holds int64"),
    "eight bits": (tensor(torch.full((128,), torch.nan).to(torch.float8_e4m3fn)), "not a finite"),
    "NaN": (tensor(torch.full((128,), float("nan"))), "norm.weight holds what is not"),
    "1e300": (tensor(torch.full((128,), 1e300, dtype=torch.float64)), "norm.weight holds"),
    "a width of 10^9": (claims(dim=10 ** 9), "dim 1000000000"),
    "more blocks": (claims(depth=200), "200 blocks and has 2"),
    "no heads": (claims(heads=0), "heads 0"),
    "a gigapixel": (claims(img_size=[10 ** 6, 10 ** 6]), "img_size 1000000"),
    "another size": (claims(img_size=[16384, 16384]), "1 of another shape.*pos_embed"),
    "an unknown setting": (claims(backdoor=True), "not a ViT that can be rebuilt"),
    "a mean in words": (with_meta(mean="0.5"), "its mean"),
    "a mean of NaN": (with_meta(mean=[float("nan")] * 3), "its mean"),
    "a std of zero": (with_meta(std=[0.0, 0.2, 0.2]), "its std"),
    "a std of 1e-300": (with_meta(std=[1e-300] * 3), "its std"),
    "a range of nothing": (with_meta(range=[1.0, 1.0]), "its range"),
    "missing": (foreign(lambda s: {k: v for k, v in s.items() if k != "blocks.1.norm1.bias"}),
                "1 encoder tensors missing.*blocks.1.norm1.bias"),
    "a shape": (foreign(lambda s: s.update({"blocks.1.attn.qkv.weight": torch.zeros(128, 128)})),
                "1 of another shape.*blocks.1.attn.qkv"),
    "unknown": (foreign(lambda s: s.update({"blocks.0.new": torch.zeros(1)})), "1 unknown.*0.new"),
    "another network": (lambda p: torch.save({"conv1.weight": torch.zeros(3)}, p), "conv1.weight"),
    "no positions": (foreign(lambda s: {k: v for k, v in s.items() if k != "pos_embed"}),
                     "are not those of a ViT"),
    "a list": (lambda p: torch.save([1, 2], p), "holds a list"),
    "a web page": (lambda p: p.write_text("<!DOCTYPE html><title>x"), "a web page, not weights"),
    "a pointer": (lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid 0"),
                  "Git LFS"),
    "nothing": (lambda p: p.write_bytes(b""), "not a readable"),
    "noise": (lambda p: p.write_bytes(random.Random(0).randbytes(100_000)), "not a readable"),
    "a folder": (lambda p: p.mkdir(), "no such checkpoint"),
    "a named pipe": (os.mkfifo, "no such checkpoint"),
    "safe, long": (safe(PIECE | {"x": "y" * (1 << 23)}), "its header is longer"),
    "safe, short": (safe({"a": PIECE}, bytes(7)), "a claims bytes that are not there"),
    "safe, shared": (safe({str(i): PIECE for i in range(9)}, bytes(8)), "claims bytes that"),
    "safe, shape": (safe({"a": PIECE | dict(shape=[3])}, bytes(8)), "claims bytes"),
    "safe, signs": (safe({"a": PIECE | dict(shape=[-1, -2])}, bytes(8)), "not a readable"),
    "safe, no ViT": (safe({"a": PIECE}, bytes(8)), "no ViT in it.*first keys are a"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_what_harms_is_refused_in_a_line_and_at_once(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "LONGEST", checkpoint.LONGEST // 10)
    write, message = HOSTILE[kind]
    write(tmp_path / "hostile.pt")
    limit, began = resource.getrlimit(resource.RLIMIT_AS), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with open("/proc/self/statm") as f:             # it may take one gigabyte more
            pages = int(f.read().split()[0])
        most = pages * resource.getpagesize() + (1 << 30)
        resource.setrlimit(resource.RLIMIT_AS, (most, limit[1]))
        with pytest.raises(CheckpointError, match=message) as error:
            checkpoint.read_encoder(str(tmp_path / "hostile.pt"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limit)
    assert time.process_time() - began < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10      # in KiB
    said = str(error.value)
    assert "\n" not in said and "hostile.pt" in said and len(said) < 500
    assert error.value.exit_code == 2 and not os.path.exists("payload-was-run")


def test_numbers_of_numpy_are_read_as_plain_ones(tmp_path):
    numbers = [np.float64(0.25), np.float32(-2), np.int64(7), np.uint8(255), np.bool_(True)]
    torch.save({"state_dict": vit().state_dict(), "scores": numbers}, tmp_path / "x.pt")
    content = checkpoint.read(str(tmp_path / "x.pt"))
    assert content["scores"] == [0.25, -2.0, 7, 255, True]
    assert {type(value) for value in content["scores"]} == {float, int, bool}
    checkpoint.read_encoder(str(tmp_path / "x.pt"))


@pytest.mark.parametrize("change", [
    dict(classifier=3), dict(classifier={}), dict(classes=["a"]), dict(classes=list("abc") + [4]),
    dict(mean="x"), dict(checkpoint=3), dict(std=[0.0] * 3), dict(std=[float("nan")] * 3),
    dict(classifier=dict(bias=torch.zeros(3))), dict(classifier=dict(normalise="no")),
    dict(classifier=dict(weight=torch.full((4, 24), float("nan")))),
    dict(classifier=dict(weight=torch.zeros(4, 24, dtype=torch.int64))),
    dict(classifier=dict(weight=torch.zeros(4, 25)))], ids=str)
def test_hostile_linear_classifiers_are_refused(change):
    head = dict(weight=torch.zeros(4, 24), bias=torch.zeros(4), normalise=False)
    good = dict(classifier=head, classes=list("abcd"), checkpoint="x", encoder_digest="x",
                mean=[0.5] * 3, std=[0.5] * 3)
    checkpoint.check_linear(good, "file", 24)
    if change.get("classifier") and isinstance(change["classifier"], dict):
        change = dict(classifier=head | change["classifier"])
    with pytest.raises(CheckpointError, match="^file: "):
        checkpoint.check_linear(good | change, "file", 24)


CLASSIFIERS = {
    "no head": dict(head=3), "a word": dict(classes="cat"),
    "a wide head": dict(head=dict(kind="projector", width=10 ** 9, bias=True)),
    "another head": dict(head=dict(kind="probe", block=1, blocks=10 ** 6)),
    "many classes": dict(classes=["c"] * 100), "numbers": dict(classes=[1, 2, 3, 4]),
    "no mean": dict(mean=None), "a std of zero": dict(std=[0.0] * 3),
    "a huge encoder": dict(config=dict(dim=10 ** 9, depth=3)), "no weights": dict(model={}),
    "words": dict(model={"cls_token": "b"}), "no names": dict(model={1: torch.zeros(1)}),
    "NaN": dict(model={"head.bias": torch.full((4,), float("nan"))})}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_hostile_classifiers_are_refused(tmp_path, kind):
    net = model.Classifier(vit().config, dict(kind="linear"), 4)
    good = dict(model=net.state_dict(), config=net.config, classes=list("abcd"),
                head=dict(kind="linear"), mean=[0.5] * 3, std=[0.5] * 3)
    torch.save(good, tmp_path / "classifier.pt")
    assert len(checkpoint.load_classifier(str(tmp_path))[1]["classes"]) == 4
    change = CLASSIFIERS[kind]
    if kind == "NaN":
        change = dict(model=good["model"] | change["model"])
    torch.save(good | change, tmp_path / "classifier.pt")
    with pytest.raises(CheckpointError, match="classifier.pt: ") as error:
        checkpoint.load_classifier(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("error, message", [
    (OSError(28, "No space left on device"), "the disk is full"),
    (RuntimeError("unexpected pos 64 vs 0: file write failed"), "disk is full"),
    (OSError(5, "Input/output error"), "Input/output error")])
def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch, error, message):
    path = str(tmp_path / "last.pt")
    checkpoint.save({"step": 1}, path)
    assert os.listdir(tmp_path) == ["last.pt"]

    def fail(obj, f):
        f.write(b"half of it")
        raise error

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(CheckpointError, match=f"{message}.*the one before is intact") as raised:
        checkpoint.save({"step": 2}, path)
    assert raised.value.exit_code == 1
    assert checkpoint.read(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]
