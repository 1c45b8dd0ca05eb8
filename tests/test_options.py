"""Every option of every script with every bad value, and options that contradict each other: one
line, exit code 2, no file written."""
import argparse
import contextlib
import importlib
import os

import pytest

import run
from conftest import STAGES, ended, folder_of, refused

PROGRAMS = (*STAGES, "evaluate", "segment", "analyze", "reproduce")


class Captured(Exception):
    pass


def parsers():
    """(script, sub-command words, parser) of every script, its sub-commands one by one."""
    found = []
    for name in PROGRAMS:
        def catch(self, *_):
            raise Captured(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Parser, "parse_args", catch)
            with pytest.raises(Captured) as caught:
                importlib.import_module(name).get_args([])
        parser = caught.value.args[0]
        subs = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        subs = [(name, [word], sub) for a in subs for word, sub in a.choices.items()]
        found += subs or [(name, [], parser)]
    return found


BAD_NUMBERS = ("-1e10", "nan", "inf", "1e30", "1" + "0" * 30, "0x10", "word", "", " ", "1,,2", "5%")


def bad_values(action):
    """What an option must refuse, whatever it means."""
    if action.choices is not None:
        first = list(action.choices)[0]
        return ["misspelt", "", f"{first}x", "2" if isinstance(first, int) else first.upper()]
    if action.type is None:
        return [""]                                         # names of files and the like
    if action.dest in ("img_size", "crop_size"):
        return [*BAD_NUMBERS, "0", "16x0", "x", "16x16x16", "16.5"]
    bad = list(BAD_NUMBERS)
    with contextlib.suppress(argparse.ArgumentTypeError):   # whole, or not within its bounds at all
        value = action.type("2.5")
        return bad + (["2.5"] if isinstance(value, int) else [])
    return [*bad, "2.5"]


REQUIRED = {"finetune": "--checkpoint {encoder}", "evaluate": "--checkpoint {encoder}",
            "graft_train": "--init none", "segment": "--init {encoder} --data {empty}"}
WITHOUT_CHECKPOINT = ("augment", "lr-grid", "partial", "depth")         # sub-commands of analyze.py


def filled(arguments, files):
    """The words of a command line, names in it replaced by paths."""
    for word, path in files.items():
        arguments = arguments.replace(word, str(path))
    return arguments.split()


@pytest.fixture(scope="module")
def files(encoder, tmp_path_factory):
    """{word in an argument: the path that stands for it}."""
    root = tmp_path_factory.mktemp("files")
    names = [f"{part}/{c}/{i}.png" for part in ("train", "val") for c in "abc" for i in range(2)]
    folder_of(root / "images", names)
    folder_of(root / "flat", ["train/1.png", "val/1.png"])
    folder_of(root / "one", ["train/a/1.png", "val/a/1.png"])
    texts = {"file": "", "lacking": "a/0.png\nb/0.png", "single": "a/0.png\na/1.png",
             "unknown": "a/0.png\nno.png"}
    for name, text in texts.items():
        (root / name).write_text(text)
    (root / "empty").mkdir()
    words = {f"{{{name}}}": root / name for name in (*texts, "images", "flat", "one", "empty")}
    return words | {"{encoder}": encoder, "{nowhere}": root / "nowhere"}


@pytest.mark.parametrize("name, words, parser", parsers(), ids=lambda v: (
    v if isinstance(v, str) else "".join(v) if isinstance(v, list) else ""))
def test_every_option_refuses_every_bad_value(files, tmp_path, monkeypatch, name, words, parser):
    monkeypatch.chdir(tmp_path)
    base = words + filled(REQUIRED.get(name, ""), files)
    if name == "analyze" and words[0] not in WITHOUT_CHECKPOINT:
        base += filled("--checkpoint {encoder}", files)
    code, lines, _ = ended(name, *base, work=False)
    assert code is None, lines                              # what is refused is refused for itself
    for action in parser._actions:
        # --common holds options of other scripts
        if not action.option_strings or action.nargs == 0 or action.dest in ("help", "common"):
            continue
        option = action.option_strings[-1]
        for value in bad_values(action):
            more = [option, value, "file"] if action.nargs == 2 else [f"{option}={value}"]
            code, lines, _ = ended(name, *base, *more, work=False)
            assert code == 2 and len(lines) == 1 and ": error: " in lines[0], (more, code, lines)
    assert not os.listdir()                                 # nothing was written


BAD = [
    ("mae_pretrain", "--init {encoder} --arch vit_base", "go with --init none"),
    ("mae_pretrain", "--init {encoder} --patch-size 4", "go with --init none"),
    ("mae_pretrain", "--epochs 3 --warmup-epochs 4", "--warmup-epochs 4 is more than --epochs 3"),
    ("mae_pretrain", "--amp fp16", "--amp fp16 needs a GPU"),
    ("mae_pretrain", "--data {nowhere}", "no such folder or list file"),
    ("mae_pretrain", "--arch vit_test --data {empty}", "no images found"),
    ("mae_pretrain", "--arch vit_test --data {flat} --knn-every 1 --batch-size 1", "needs labels"),
    ("mae_pretrain", "--out {file}/below/it", "cannot write there"),
    ("mae_pretrain", "--epo 3", "unrecognized arguments"), ("mae_pretrain", "3", "unrecognized"),
    ("mae_pretrain", "--seed", "expected one argument"),
    ("mae_pretrain", "--arch vit_test --img-size 20", "not a multiple of --patch-size 8"),
    ("mae_pretrain", "--arch vit_test --lr 1,1", "number of stages must divide the depth"),
    ("mae_pretrain", "--arch vit_test --batch-size 97", "97 is more than the 96 images"),
    ("mae_pretrain", "--init {nowhere}", "no checkpoint"),
    ("graft_train", "", "run `python mae_pretrain.py` first"),
    ("graft_train", "--init {encoder} --arch vit_base", "go with --init none"),
    ("graft_train", "--init none --anchor-weight 1", "it cannot go with --init none"),
    ("graft_train", "--init {nowhere}", "no checkpoint"),
    ("graft_train", "--init none --out {file}", "cannot write there"),
    ("graft_train", "--init {encoder} --freeze-blocks 9", "nothing is left to train"),
    ("graft_train", "--init {encoder} --lr 0", "nothing is left to train"),
    ("finetune", "--checkpoint {encoder} --from-projector --freeze-blocks 1", "not allowed with"),
    ("finetune", "--checkpoint {encoder} --probe-block 1 --freeze-blocks 1", "not allowed with"),
    ("finetune", "--checkpoint {encoder} --blocks 1", "--blocks goes with --probe-block"),
    ("finetune", "--checkpoint {encoder} --probe-block 2 --blocks 0", "at least 1"),
    ("finetune", "--checkpoint {encoder} --rand-augment 11", "at most 10"),
    ("finetune", "--checkpoint {encoder} --epochs 3 --warmup-epochs 4", "is more than --epochs 3"),
    ("finetune", "--checkpoint {encoder} --results {file}", "cannot write there"),
    ("finetune", "--checkpoint {nowhere}", "no checkpoint"),
    ("finetune", "--checkpoint {encoder} --labels 0%", "out of range"),
    ("finetune", "--checkpoint {encoder} --labels some", "neither a share"),
    ("finetune", "--checkpoint {encoder} --labels 90", "has only"),
    ("finetune", "--checkpoint {encoder} --freeze-blocks 9", "has 3 blocks"),
    ("finetune", "--checkpoint {encoder} --probe-block 9", "the encoder has 3 blocks"),
    ("finetune", "--checkpoint {encoder} --data {images} --labels {lacking}", "1 of the 3 classes"),
    ("finetune", "--checkpoint {encoder} --data {images} --labels {single}", "one class only"),
    ("finetune", "--checkpoint {encoder} --data {images} --labels {unknown}", "not exist"),
    ("finetune", "--checkpoint {encoder} --data {flat}", "no class folders"),
    ("evaluate", "--checkpoint {nowhere}", "no checkpoint"),
    ("evaluate", "--mode predict", "--mode predict needs --classifier"),
    ("evaluate", "--mode linaer", "invalid choice"),
    ("evaluate", "--mode finetune", "finetune.main"),
    ("evaluate", "--export none file", "it must be timm, hf or onnx"),
    ("evaluate", "--checkpoint {encoder} --classifier {file}", "--classifier goes with"),
    ("evaluate", "--checkpoint {encoder} --input {empty}", "--input goes with"),
    ("evaluate", "--all-probabilities", "--mode predict"),
    ("evaluate", "--export timm file --table", "--export and --table"),
    ("evaluate", "--mode features --checkpoint {encoder} --block 9", "has 3 blocks"),
    ("evaluate", "--mode fewshot --checkpoint {encoder} --labels nan%", "out of range"),
    ("evaluate", "--mode fewshot --checkpoint {encoder} --labels 500", "has only"),
    ("evaluate", "--mode fewshot --checkpoint {encoder} --labels x", "neither a share"),
    ("evaluate", "--mode fewshot --checkpoint {encoder} --data {images} --labels {single}",
     "one class only"),
    ("evaluate", "--mode knn --checkpoint {encoder} --data {one}", "one class folder only"),
    ("evaluate", "--mode knn --checkpoint {encoder} --out /proc/nothing", "cannot write there"),
    ("analyze", "", "required"), ("analyze", "everything", "invalid choice"),
    ("analyze", "vic --checkpoint {nowhere}", "no checkpoint"),
    ("analyze", "vic", "mae_pretrain.py"), ("analyze", "gradients", "--mim-weight 1"),
    ("analyze", "vic --images 1", "out of range"),
    ("analyze", "augment --out {file}", "cannot write there"),
    ("reproduce", "--only table9", "--only table9"), ("reproduce", "--preset huge", "choice"),
    ("reproduce", "--preset imagenet --only tuning", "preset imagenet has none of it"),
    ("reproduce", "--preset imagenet", "needs --data FOLDER"),
    ("reproduce", "--preset imagenet --data . --only table6", "needs --ade20k"),
    ("reproduce", "--mae {nowhere}", "no such file"),
    ("reproduce", "--data {nowhere}", "no such folder"),
    ("reproduce", "--out {file}", "cannot write there"),
    ("bench.bench", "--only none", "invalid choice: 'none'"),
    ("bench.bench", "--data {nowhere}", "no such folder")]


@pytest.mark.parametrize("name, arguments, message", BAD, ids=str)
def test_what_cannot_be_done_ends_in_a_line_and_writes_nothing(world, files, tmp_path, monkeypatch,
                                                               name, arguments, message):
    """Whether the options, the data or the weights tell."""
    monkeypatch.chdir(tmp_path)
    where = []
    if name in (*STAGES, "evaluate") and "--export" not in arguments:
        where = ["--device", "cpu", *["--out", "out"] * ("--out" not in arguments)]
    assert message in refused(name, *filled(arguments, files), *where)
    left = [os.path.join(place, name) for place, _, names in os.walk(".") for name in names]
    assert left in ([], ["./out/lock"])
