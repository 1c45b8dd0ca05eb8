"""Every option of every script with every bad value, and options that contradict each other: one
line, exit code 2, no file written."""
import argparse
import contextlib
import importlib
import io
import os
import sys

import pytest

import run
from conftest import STAGES

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


def attempt(name, arguments, monkeypatch):
    """(exit code or None if the arguments were taken, lines of stderr) of a script whose work is
    left out."""
    reached, said = [], io.StringIO()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        with pytest.raises(SystemExit) as end:
            run.program(reached.append, importlib.import_module(name).get_args)
    return None if reached else end.value.code, said.getvalue().splitlines()


REQUIRED = {"finetune": ["--checkpoint", "{encoder}"], "evaluate": ["--checkpoint", "{encoder}"],
            "graft_train": ["--init", "none"],
            "segment": ["--init", "{encoder}", "--data", "{tmp}"]}


def base_of(name, words, places):
    """Arguments that a script takes, to which one more option is added."""
    more = REQUIRED.get(name, [])
    if name == "analyze" and words[0] not in ("augment", "lr-grid", "partial", "depth"):
        more = ["--checkpoint", "{encoder}"]
    return words + filled(more, places)


def filled(arguments, places):
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    return arguments


@pytest.fixture
def places(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    return {"{encoder}": encoder, "{tmp}": tmp_path, "{file}": tmp_path / "file"}


@pytest.mark.parametrize("name, words, parser", parsers(), ids=lambda v: (
    v if isinstance(v, str) else "".join(v) if isinstance(v, list) else ""))
def test_every_option_refuses_every_bad_value(places, monkeypatch, name, words, parser):
    base = base_of(name, words, places)
    code, lines = attempt(name, base, monkeypatch)
    assert code is None, lines                              # what is refused is refused for itself
    tried = 0
    for action in parser._actions:
        # --common holds options of other scripts
        if not action.option_strings or action.nargs == 0 or action.dest in ("help", "common"):
            continue
        for value in bad_values(action):
            more = [f"{action.option_strings[-1]}={value}"]
            if action.nargs == 2:
                more = [action.option_strings[-1], value, "file"]
            code, lines = attempt(name, base + more, monkeypatch)
            assert code == 2 and len(lines) == 1 and ": error: " in lines[0], (more, code, lines)
            tried += 1
    assert os.listdir() == ["file"]                         # nothing was written
    print(f"{name} {' '.join(words)}: {tried} bad values refused")


CONTRADICTIONS = [
    ("mae_pretrain", "--init {encoder} --arch vit_base", "go with --init none"),
    ("mae_pretrain", "--init {encoder} --patch-size 4", "go with --init none"),
    ("mae_pretrain", "--epochs 3 --warmup-epochs 4", "--warmup-epochs 4 is more than --epochs 3"),
    ("mae_pretrain", "--amp fp16 --device cpu", "--amp fp16 needs a GPU"),
    ("mae_pretrain", "--data {tmp}/nowhere", "no such folder"),
    ("mae_pretrain", "--out {file}/below/it", "cannot write there"),
    ("mae_pretrain", "--epo 3", "unrecognized arguments"), ("mae_pretrain", "3", "unrecognized"),
    ("mae_pretrain", "--seed", "expected one argument"),
    ("graft_train", "--init {encoder} --arch vit_base", "go with --init none"),
    ("graft_train", "--init none --anchor-weight 1", "it cannot go with --init none"),
    ("graft_train", "--init {tmp}/nowhere", "no checkpoint"),
    ("graft_train", "--init none --out {file}", "cannot write there"),
    ("finetune", "--checkpoint {encoder} --from-projector --freeze-blocks 1", "not allowed with"),
    ("finetune", "--checkpoint {encoder} --probe-block 1 --freeze-blocks 1", "not allowed with"),
    ("finetune", "--checkpoint {encoder} --blocks 1", "--blocks goes with --probe-block"),
    ("finetune", "--checkpoint {encoder} --epochs 3 --warmup-epochs 4", "is more than --epochs 3"),
    ("finetune", "--checkpoint {encoder} --results {file}", "cannot write there"),
    ("finetune", "--checkpoint {tmp}/nowhere", "no checkpoint"),
    ("evaluate", "--checkpoint {tmp}/nowhere", "no checkpoint"),
    ("evaluate", "--mode predict", "--mode predict needs"),
    ("evaluate", "--export none file", "it must be"),
    ("evaluate", "--checkpoint {encoder} --classifier {file}", "--classifier goes with"),
    ("evaluate", "--checkpoint {encoder} --input {tmp}", "--input goes with"),
    ("evaluate", "--export timm file --table", "--export and --table"),
    ("analyze", "", "required"), ("analyze", "everything", "invalid choice"),
    ("analyze", "vic --checkpoint {tmp}/nowhere", "no checkpoint"),
    ("analyze", "augment --out {file}", "cannot write there"),
    ("reproduce", "--only table9", "--only table9"),
    ("reproduce", "--preset imagenet", "needs --data FOLDER"),
    ("reproduce", "--data {tmp}/nowhere", "no such folder"),
    ("reproduce", "--out {file}", "cannot write there")]


@pytest.mark.parametrize("name, arguments, message", CONTRADICTIONS, ids=str)
def test_contradictions_end_before_anything_is_made(places, monkeypatch, name, arguments, message):
    code, lines = attempt(name, filled(arguments.split(), places), monkeypatch)
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert os.listdir() == ["file"]


@pytest.mark.parametrize("stage, arguments", [
    ("mae_pretrain", "--arch vit_test --img-size 20"), ("mae_pretrain", "--arch vit_test --lr 1,1"),
    ("mae_pretrain", "--arch vit_test --batch-size 1000"), ("mae_pretrain", "--init {tmp}/no.pt"),
    ("graft_train", "--init none --arch vit_test --freeze-blocks 9"),
    ("graft_train", "--init {encoder} --lr 0"), ("finetune", "--checkpoint {encoder} --labels 0%"),
    ("finetune", "--checkpoint {encoder} --freeze-blocks 9"),
    ("finetune", "--checkpoint {encoder} --probe-block 9"),
    ("evaluate", "--checkpoint {encoder} --labels nan% --mode fewshot"),
    ("evaluate", "--checkpoint {encoder} --mode features --block 9")], ids=str)
def test_what_data_or_weights_tell_ends_before_a_file_is_written(world, places, monkeypatch, stage,
                                                                 arguments):
    more = ["--device", "cpu", "--out", "out"]
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *filled(arguments.split(), places), *more])
    said, module = io.StringIO(), importlib.import_module(stage)
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        run.program(module.main, module.get_args)
    lines = said.getvalue().splitlines()
    assert end.value.code == 2 and len(lines) == 1, lines
    assert not os.path.exists("out") or os.listdir("out") in ([], ["lock"])
