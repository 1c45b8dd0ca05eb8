"""Every option of every script with every bad value, and options that contradict each other: one line, exit code 2."""
import contextlib
import io
import os
import sys

import pytest
import torch

import run
from test_faults import PROGRAMS, one_process
from test_faults_files import encoder     # noqa: F401

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------ bad arguments
class Captured(Exception):
    pass


def parsers():
    """(script, sub-command words, parser) of every script, its sub-commands one by one."""
    found = []
    for name, program in PROGRAMS.items():
        def catch(self, *_):
            raise Captured(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Parser, "parse_args", catch)
            with pytest.raises(Captured) as caught:
                program.get_args([])
        parser = caught.value.args[0]
        subs = [a for a in parser._actions if isinstance(a, run.argparse._SubParsersAction)]
        found += [(name, [word], sub) for a in subs for word, sub in a.choices.items()] or [(name, [], parser)]
    return found


# options to which 0 is a valid value; all others refuse it
ZERO_IS_VALID = {
    "--workers", "--max-bad", "--freeze-blocks", "--accum", "--lr", "--weight-decay", "--warmup-epochs", "--seed",
    "--seeds", "--knn-every", "--every-epochs", "--eval-every", "--momentum", "--mim-weight", "--anchor-weight",
    "--anchor-blocks", "--rand-augment", "--mixup", "--cutmix", "--erasing", "--label-smoothing", "--min-lr", "--drop-path",
    "--blocks"}
ZERO_IS_REFUSED = {("finetune", "--lr"), ("evaluate", "--lr")}
REQUIRED = {"finetune": ["--checkpoint", "{encoder}"], "evaluate": ["--checkpoint", "{encoder}"],
            "graft_train": ["--init", "none"]}
BAD_NUMBERS = ("-1", "-0.5", "nan", "inf", "-inf", "1e30", "1" + "0" * 30, "0x10", "word", "", " ", "1,,2", "5%")


def zero_is_valid(name, option):
    return option in ZERO_IS_VALID and (name, option) not in ZERO_IS_REFUSED


def is_number(action):
    return action.type is not None and action.choices is None and action.dest != "img_size"


def bad_values(name, action):
    """What an option must refuse."""
    if action.choices is not None:
        first = list(action.choices)[0]
        return ["misspelt", "", f"{first}x", "2" if isinstance(first, int) else first.upper()]
    if action.dest == "img_size":
        return [*BAD_NUMBERS, "0", "16x0", "x", "16x16x16", "16.5"]
    if not is_number(action):
        return [""]                                                         # names of files and the like
    option, bad = action.option_strings[-1], list(BAD_NUMBERS)
    if not zero_is_valid(name, option):
        bad.append("0")
    with contextlib.suppress(run.argparse.ArgumentTypeError):               # whole, or not within its bounds at all
        value = action.type("2.5")
        assert isinstance(value[0] if isinstance(value, list) else value, float), option
        return bad
    return [*bad, "2.5"]


def base_of(name, words, encoder):
    """Arguments to which one more option is added."""
    more = REQUIRED.get(name, [])
    if name == "analyze" and words[0] in ("gradients", "vic", "attention", "tsne", "reconstruct"):
        more = ["--checkpoint", "{encoder}"]
    return [*words, *(a.replace("{encoder}", str(encoder)) for a in more)]


def attempt(name, arguments, monkeypatch):
    """(exit code or None if the arguments were taken, lines of stderr, the options) of a script whose work is left out."""
    reached, said = [], io.StringIO()
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        run.program(reached.append, PROGRAMS[name].get_args)
    return (None if reached else end.value.code), said.getvalue().splitlines(), reached


@pytest.mark.parametrize("name, words, parser", parsers(), ids=lambda v: v if isinstance(v, str) else "".join(
    v) if isinstance(v, list) else "")
def test_every_option_of_every_script_with_every_bad_value(encoder, tmp_path, monkeypatch, name, words, parser):
    monkeypatch.chdir(tmp_path)
    base, tried = base_of(name, words, encoder), 0
    code, lines, _ = attempt(name, base, monkeypatch)
    assert code is None, lines                                              # what is refused below is refused for itself
    for action in parser._actions:
        if not action.option_strings or action.nargs == 0 or action.dest in ("help", "common"):
            continue                                                        # --common holds options of other scripts
        option = action.option_strings[-1]
        for value in bad_values(name, action):
            arguments = [*base, f"{option}={value}"] if action.nargs != 2 else [*base, option, value, "file"]
            code, lines, reached = attempt(name, arguments, monkeypatch)
            tried += 1
            assert code == 2 and len(lines) == 1 and ": error: " in lines[0], (arguments, code, lines, reached)
        if is_number(action) and zero_is_valid(name, option):
            more = ["--probe-block", "1"] if option == "--blocks" else []
            code, lines, reached = attempt(name, [*base, *more, option, "0"], monkeypatch)
            assert code is None, (option, lines)
            assert getattr(reached[0], action.dest) in (0, [0]), option
    assert not os.listdir(tmp_path)                                         # nothing was written
    assert tried
    print(f"{name} {' '.join(words)}: {tried} bad values refused")


CONTRADICTIONS = [
    ("mae_pretrain", ["--init", "{encoder}", "--arch", "vit_base"], "go without --init"),
    ("mae_pretrain", ["--init", "{encoder}", "--patch-size", "4"], "go without --init"),
    ("mae_pretrain", ["--epochs", "3", "--warmup-epochs", "4"], "--warmup-epochs 4 is more than --epochs 3"),
    ("mae_pretrain", ["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    ("mae_pretrain", ["--data", "{tmp}/nowhere"], "no such folder"),
    ("mae_pretrain", ["--out", "{file}"], "cannot write there"),
    ("mae_pretrain", ["--out", "{file}/below/it"], "cannot write there"),
    ("mae_pretrain", ["--epo", "3"], "unrecognized arguments"),
    ("mae_pretrain", ["3"], "unrecognized arguments"),
    ("mae_pretrain", ["--seed"], "expected one argument"),
    ("graft_train", ["--init", "{encoder}", "--arch", "vit_base"], "go with --init none"),
    ("graft_train", ["--init", "none", "--anchor-weight", "1"], "it cannot go with --init none"),
    ("graft_train", ["--init", "{tmp}/nowhere"], "no checkpoint"),
    ("graft_train", ["--init", "none", "--epochs", "3", "--warmup-epochs", "4"], "is more than --epochs 3"),
    ("graft_train", ["--init", "none", "--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    ("graft_train", ["--init", "none", "--out", "{file}"], "cannot write there"),
    ("finetune", ["--checkpoint", "{encoder}", "--from-projector", "--freeze-blocks", "1"], "not allowed with"),
    ("finetune", ["--checkpoint", "{encoder}", "--probe-block", "1", "--freeze-blocks", "1"], "not allowed with"),
    ("finetune", ["--checkpoint", "{encoder}", "--blocks", "1"], "--blocks goes with --probe-block"),
    ("finetune", ["--checkpoint", "{encoder}", "--epochs", "3", "--warmup-epochs", "4"], "is more than --epochs 3"),
    ("finetune", ["--checkpoint", "{encoder}", "--results", "{file}"], "cannot write there"),
    ("finetune", ["--checkpoint", "{tmp}/nowhere"], "no checkpoint"),
    ("evaluate", ["--checkpoint", "{tmp}/nowhere"], "no checkpoint"),
    ("evaluate", ["--mode", "predict"], "--mode predict needs"),
    ("evaluate", ["--mode", "predict", "--classifier", "{file}"], "--mode predict needs"),
    ("evaluate", ["--export", "onnx", "file"], "it must be timm or hf"),
    ("evaluate", ["--mode", "finetune", "--blocks", "1", "--checkpoint", "{encoder}"], "--blocks goes with"),
    ("evaluate", ["--checkpoint", "{encoder}", "--block", "2"], "--block goes with --mode features"),
    ("evaluate", ["--checkpoint", "{encoder}", "--classifier", "{file}"], "--classifier goes with --mode predict"),
    ("evaluate", ["--checkpoint", "{encoder}", "--input", "{tmp}"], "--input goes with --mode"),
    ("evaluate", ["--export", "timm", "file", "--table"], "--export and --table"),
    ("analyze", [], "required"),
    ("analyze", ["everything"], "invalid choice"),
    ("analyze", ["vic", "--checkpoint", "{tmp}/nowhere"], "no such file or folder"),
    ("analyze", ["augment", "--out", "{file}"], "cannot write there"),
    ("reproduce", ["--only", "table9"], "--only table9"),
    ("reproduce", ["--preset", "imagenet"], "needs --data FOLDER"),
    ("reproduce", ["--data", "{tmp}/nowhere"], "no such folder"),
    ("reproduce", ["--out", "{file}"], "cannot write there"),
]


@pytest.mark.parametrize("name, arguments, message", CONTRADICTIONS, ids=str)
def test_options_that_contradict_each_other_end_before_anything_is_made(encoder, tmp_path, monkeypatch, name, arguments,
                                                                        message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    places = {"{encoder}": encoder, "{tmp}": tmp_path, "{file}": tmp_path / "file"}
    for word, place in places.items():
        arguments = [a.replace(word, str(place)) for a in arguments]
    code, lines, _ = attempt(name, arguments, monkeypatch)
    assert code == 2 and len(lines) == 1 and message in lines[0], lines
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("stage, arguments", [
    ("mae_pretrain", ["--arch", "vit_test", "--img-size", "20"]), ("mae_pretrain", ["--arch", "vit_test", "--lr", "1,1"]),
    ("mae_pretrain", ["--arch", "vit_test", "--batch-size", "1000"]), ("mae_pretrain", ["--init", "{tmp}/nowhere.pt"]),
    ("graft_train", ["--init", "none", "--arch", "vit_test", "--freeze-blocks", "9"]),
    ("graft_train", ["--init", "{encoder}", "--lr", "0"]),
    ("finetune", ["--checkpoint", "{encoder}", "--freeze-blocks", "9"]),
    ("finetune", ["--checkpoint", "{encoder}", "--probe-block", "9"]),
    ("finetune", ["--checkpoint", "{encoder}", "--labels", "0%"]),
    ("evaluate", ["--checkpoint", "{encoder}", "--labels", "nan%", "--mode", "fewshot"]),
    ("evaluate", ["--checkpoint", "{encoder}", "--mode", "features", "--block", "9"])], ids=str)
def test_what_only_data_or_weights_can_tell_ends_before_a_file_is_written(encoder, tmp_path, monkeypatch, stage, arguments):
    one_process(monkeypatch)
    arguments = [a.replace("{encoder}", str(encoder)).replace("{tmp}", str(tmp_path)) for a in arguments]
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *arguments, "--device", "cpu", "--out", str(tmp_path / "out")])
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        run.program(PROGRAMS[stage].main, PROGRAMS[stage].get_args)
    assert end.value.code == 2 and len(said.getvalue().splitlines()) == 1, said.getvalue()
    assert not os.path.exists(tmp_path / "out") or os.listdir(tmp_path / "out") in ([], ["lock"])
