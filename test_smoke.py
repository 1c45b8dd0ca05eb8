"""The two training scripts in small runs: what they write, resuming, several processes, bad input.

    python -m pytest                # this and every other test_*.py
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import copy
import json
import math
import signal
import subprocess
import sys

import pytest
import torch

import augment
import data
import graft_train
import mae_pretrain
import model
import run
from test_checkpoint import damaged, prefixed
from test_data import corrupt, folder_of
from test_model import assert_identical, contrastive

torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))


# -------------------------------------------------------------------------------- the two training scripts
STAGES = {"mae": mae_pretrain, "graft": graft_train}


@pytest.fixture(scope="module")
def small():
    """A still smaller network, and 128 embedded pictures."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model.ARCHS, "vit_test", ((8, 24, 3, 3), (16, 1, 2)))
        drawn = data.embedded
        patch.setattr(data, "embedded", lambda train=True, in_chans=3, n=128: drawn(train, in_chans, n))
        yield


@pytest.fixture(scope="module")
def mae_folder(small, tmp_path_factory):
    return train("mae", tmp_path_factory.mktemp("mae"))


def arguments(stage, out, *more, init="none"):
    """2 epochs of 4 steps, every step logged."""
    options = ["--epochs", "2", "--batch-size", "32", "--log-every", "1", "--amp", "off", "--device", "cpu", "--out",
               str(out)]
    if stage == "graft":
        options += ["--init", str(init), "--hidden-dim", "32", "--lr", "0.02"]
    else:
        options += ["--lr", "0.02"]
    if str(init) == "none" and "--init" not in more:
        options += ["--arch", "vit_test"]
    return STAGES[stage].get_args(options + list(more))


def train(stage, out, *more, **where):
    STAGES[stage].main(arguments(stage, out, *more, **where))
    return out


def initial(stage, *more, **where):
    """The weights that a run starts from."""
    args = arguments(stage, "unused", *more, **where)
    torch.manual_seed(args.seed)
    return STAGES[stage].build(args)[0].state_dict()


def saved(out, name="last.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def assert_close_movement(ours, expected, start, tolerance=2e-3):
    """Weights that moved alike: the difference is small against the way they have come."""
    assert set(ours) == set(expected)
    weights = [k for k in start if start[k].is_floating_point() and not torch.equal(start[k], expected[k])]
    way = math.sqrt(sum((expected[k] - start[k]).square().sum().item() for k in weights))
    apart = math.sqrt(sum((ours[k] - expected[k]).square().sum().item() for k in weights))
    assert way > 0 and apart < tolerance * way, (apart, way)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_trains_and_writes_what_it_must(small, tmp_path, capsys, stage):
    lr, more = (0.02, []) if stage == "mae" else (0.2, ["--crop-min", "0.8", "--momentum", "0.9"])
    out = train(stage, tmp_path, "--epochs", "10", "--lr", str(lr), "--knn-every", "10", *more)
    start, last, encoder = initial(stage), saved(out), saved(out, "encoder.pt")
    moved = {k for k in start if not torch.equal(start[k], last["model"][k])}
    prefix = "base_encoder." if stage == "graft" else ""
    still = {f"{prefix}pos_embed", "decoder_pos_embed", "momentum_encoder.pos_embed"}
    if stage == "graft":                                                    # frozen at random, as in MoCo v3
        still |= {name for name in start if ".patch_embed." in name}
    assert moved == set(start) - still
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 41))
    assert [line["epoch"] for line in log] == [step / 4 for step in range(1, 41)]
    for line in log:
        assert {"loss", "lr", "images_per_second", "seconds", "data_wait"} < set(line) and len(line["lr"]) == 1
        assert 0 <= line["data_wait"] <= 1 and line["images_per_second"] > 0
    rates = [lr * 32 / 256 * model.lr_factor(step, 40, 6) for step in range(40)]
    assert [line["lr"][0] for line in log] == pytest.approx(rates)
    assert 0 <= log[-1]["knn"] <= 100 and "knn" not in log[-2]
    losses = [line["loss"] for line in log]
    assert sum(losses[-8:]) < 0.98 * sum(losses[:8]), losses
    groups = last["optimizer"]["param_groups"]
    assert {tuple(group["betas"]) for group in groups} == {(0.9, 0.95) if stage == "mae" else (0.9, 0.999)}
    assert {group["weight_decay"] for group in groups} == ({0.0, 0.05} if stage == "mae" else {0.1})
    # the encoder under the official names, and what rebuilds it
    net = model.VisionTransformer(**encoder["config"])
    plain = {k: v for k, v in encoder["model"].items() if not k.startswith("head.")}
    net.load_state_dict(plain, strict=True)
    assert_identical(plain, {k: last["model"][prefix + k] for k in plain})
    assert encoder["meta"]["system"] == {"mae": "MAE", "graft": "MoCo v3"}[stage]
    assert encoder["meta"]["step"] == 40 and encoder["meta"]["mean"] == list(data.IMAGENET_STATS[0])
    said = capsys.readouterr().out
    assert "128 pictures of embedded; global batch 32" in said and "40 steps, 6 of warm-up" in said
    if stage == "graft":
        assert f"chance level of the loss: {0.8 * math.log(32):.3f}" in said
        assert {"acc", "std", "rank"} < set(log[0])


def test_options_reach_the_method(small, tmp_path, monkeypatch):
    options = ["--temperature", "0.7", "--train-patch-embed", "--hidden-dim", "48", "--mim-weight", "0.3"]
    net, _ = graft_train.build(arguments("graft", tmp_path, *options))
    assert net.temperature == 0.7 and net.mim_weight == 0.3 and net.predictor[0].weight.shape == (48, 256)
    assert net.base_encoder.patch_embed.proj.weight.requires_grad
    assert not mae_pretrain.build(arguments("mae", tmp_path, "--no-norm-pix-loss"))[0].norm_pix_loss
    ratios, masking = [], model.MaskedAutoencoder.random_masking
    monkeypatch.setattr(model.MaskedAutoencoder, "random_masking",
                        lambda self, noise, ratio: ratios.append(ratio) or masking(self, noise, ratio))
    train("mae", tmp_path / "mae", "--mask-ratio", "0.6", "--epochs", "1")
    train("graft", tmp_path / "mtl", "--mim-weight", "1", "--mask-ratio", "0.6", "--epochs", "1")
    assert len(ratios) >= 8 and set(ratios) == {0.6}
    scales, momenta = [], []
    monkeypatch.setattr(data, "random_boxes", lambda ids, sizes, scale, *key: scales.append(scale) or
                        augment.random_boxes(ids, sizes, scale, *key))
    monkeypatch.setattr(model.MoCoV3, "update_momentum", lambda self, m: momenta.append(m))
    train("graft", tmp_path / "graft", "--crop-min", "0.3", "--momentum", "0.9")
    assert set(scales) == {(0.3, 1.0)}
    for options, scale in (([], 0.2), (["--crop-min", "0.6"], 0.6)):
        scales.clear()
        train("mae", tmp_path / f"crop{scale}", "--epochs", "1", *options)
        assert set(scales) == {(scale, 1.0)}
    assert momenta == pytest.approx([model.momentum_at(step, 8, 0.9) for step in range(8)])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_is_a_function_of_its_seed(small, tmp_path, stage):
    runs = [saved(train(stage, tmp_path / name, "--epochs", "1", "--seed", seed))["model"]
            for name, seed in (("a", "3"), ("b", "3"), ("c", "4"))]
    assert_identical(runs[0], runs[1])
    assert not any(torch.equal(runs[0][k], runs[2][k]) for k in runs[0] if k.endswith("mlp.fc1.weight"))


def test_grafting_starts_from_the_file_with_its_positions(mae_folder, tmp_path):
    path = tmp_path / "moved.pt"
    content = saved(mae_folder, "encoder.pt")
    content["model"]["pos_embed"] = content["model"]["pos_embed"].flip(1)   # another table than ours
    torch.save(content, path)
    start = initial("graft", init=path)
    for net in ("base_encoder", "momentum_encoder"):
        assert_identical({k: start[f"{net}.{k}"] for k in content["model"]}, content["model"])
    out = train("graft", tmp_path / "out", init=path)
    assert torch.equal(saved(out, "encoder.pt")["model"]["pos_embed"], content["model"]["pos_embed"])
    assert saved(out, "encoder.pt")["meta"]["system"] == "Layer grafted"


def test_each_stage_moves_at_its_rate(mae_folder, tmp_path):
    """One step of AdamW moves a weight by its rate, whatever its gradient."""
    rates = [1e-3, 3e-3, 9e-3]
    more = ["--lr", ",".join(map(str, rates)), "--epochs", "1", "--batch-size", "128", "--warmup-epochs", "0",
            "--weight-decay", "0"]
    start = initial("graft", *more, init=mae_folder)
    last = saved(train("graft", tmp_path, *more[:-2], init=mae_folder))
    assert {group["weight_decay"] for group in last["optimizer"]["param_groups"]} == {0.0, 0.1}
    end = saved(train("graft", tmp_path / "no_decay", *more, init=mae_folder))["model"]
    for name in end:
        if name.endswith("fc1.weight") or name in ("base_encoder.head.0.weight", "predictor.0.weight"):
            rate = rates[model.stage_of(model.layer_of(name, 3), 3, 3)] * 128 / 256
            expected = 0 if name.startswith("momentum_encoder") else rate
            assert (end[name] - start[name]).abs().max().item() == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("stage, more, lowest", [
    ("mae", ["--freeze-blocks", "2"], 2), ("graft", ["--freeze-blocks", "1"], 1),
    ("graft", ["--lr", "0,0,0.02"], 2), ("mae", ["--lr", "0,0.01,0.02"], 1)])
def test_frozen_blocks_stay_to_the_bit(mae_folder, tmp_path, stage, more, lowest):
    init = dict(init=mae_folder) if stage == "graft" else {}
    more = more if stage == "graft" else ["--init", str(mae_folder), *more]
    out = train(stage, tmp_path, "--weight-decay", "0.5", *more, **init)
    start, end = saved(mae_folder, "encoder.pt")["model"], saved(out, "encoder.pt")["model"]
    for name in start:
        assert torch.equal(start[name], end[name]) == (model.layer_of(name, 3) <= lowest or name == "pos_embed"), name


@pytest.mark.parametrize("stage, more, other", [
    ("mae", [], ["--accum", "3"]), ("graft", [], ["--micro-batch", "5"]),
    ("graft", ["--loss", "vicreg"], ["--micro-batch", "7"]), ("graft", ["--loss", "simclr"], ["--micro-batch", "32"]),
    ("graft", ["--mim-weight", "0.5"], ["--micro-batch", "11"])])
def test_the_result_of_a_run_does_not_depend_on_its_micro_batches(small, tmp_path, stage, more, other):
    more = ["--lr", "0.002", *more]
    whole, parts = (saved(train(stage, tmp_path / name, *more, *extra))["model"]
                    for name, extra in (("whole", []), ("parts", other)))
    assert_close_movement(parts, whole, initial(stage, *more))


@pytest.mark.parametrize("stage, more", [("mae", []), ("graft", []), ("graft", ["--micro-batch", "5"]),
                                         ("graft", ["--loss", "vicreg", "--mim-weight", "1"])])
def test_bfloat16_is_close_to_float32(small, tmp_path, stage, more):
    single, half = (train(stage, tmp_path / amp, *more, "--epochs", "1", "--lr", "0.001", "--amp", amp)
                    for amp in ("off", "bf16"))
    for a, b in zip(log_of(single), log_of(half)):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert {tensor.dtype for tensor in saved(half)["model"].values()} <= {torch.float32, torch.int64}


def test_micro_batches_are_found_by_the_memory_that_is_free(monkeypatch):
    weight, asked = torch.ones(1000, requires_grad=True), []

    def step(k):
        asked.append(k)
        (torch.ones(k, 1000) * weight).exp().sum().backward()               # keeps about 8,000 bytes an image

    def found(n, free, processes=1):
        monkeypatch.setattr(run, "available_memory", lambda: free)
        return run.micro_batch(0, step, n, torch.device("cpu"), processes, [weight])

    assert found(64, 1 << 30) == 64
    assert 4 <= found(64, 64 * 8000) <= 32
    assert found(64, 1) == 1
    assert asked == [2, 2, 2]
    assert run.micro_batch(5, step, 64, torch.device("cpu"), 1, []) == 5 and len(asked) == 3
    assert run.micro_batch(100, step, 64, torch.device("cpu"), 1, []) == 64


@pytest.mark.parametrize("more, keys, system", [
    (["--loss", "vicreg"], {"invariance", "variance", "covariance"}, "Layer grafted VICReg"),
    (["--loss", "simclr"], {"acc"}, "Layer grafted SimCLR"),
    (["--mim-weight", "1"], {"mim", "contrastive"}, "MTL (MAE + MoCo v3)"),
    (["--anchor-weight", "0.1", "--anchor-norm", "l2"], {"anchor"}, "Layer grafted"),
    (["--freeze-blocks", "2"], {"acc"}, "MIM -> MoCo v3 grafting")])
def test_the_other_systems_train(mae_folder, tmp_path, more, keys, system):
    out = train("graft", tmp_path, "--lr", "0.005,0.01,0.02", *more, init=mae_folder)
    log = log_of(out)
    assert keys < set(log[0]) and all(math.isfinite(value) for line in log for value in
                                      (line["loss"], *(line[key] for key in keys)))
    assert saved(out, "encoder.pt")["meta"]["system"] == system
    if "mim" in keys:
        for line in log:
            assert line["loss"] == pytest.approx(line["contrastive"] + line["mim"], rel=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_anchor_holds_the_lower_layers_near_their_weights(mae_folder, tmp_path, norm):
    def distance(weight, part):
        more = ["--lr", "0.02,0.02,0.02", "--weight-decay", "0", "--anchor-norm", norm, "--anchor-blocks", "2"]
        out = train("graft", tmp_path / f"{weight}", *more, "--anchor-weight", weight, init=mae_folder)
        start, end = saved(mae_folder, "encoder.pt")["model"], saved(out, "encoder.pt")["model"]
        return sum((end[k] - start[k]).abs().sum().item() for k in start if k.startswith(part)), log_of(out)
    for block, held in (("blocks.0.", True), ("blocks.1.", True), ("blocks.2.", False)):
        free, bound = distance("0", block)[0], distance("10", block)[0]
        assert (bound < 0.5 * free) == held, block
    assert distance("10", "blocks.0.")[1][0]["anchor"] == 0                 # the first step starts at the anchor


def test_pictures_that_are_neither_square_nor_coloured(small, tmp_path):
    shape = ["--img-size", "16x32", "--in-chans", "1", "--stats", "data"]
    first = train("mae", tmp_path / "mae", *shape)
    content = saved(first, "encoder.pt")
    assert content["config"]["img_size"] == [16, 32] and content["config"]["in_chans"] == 1
    assert content["model"]["patch_embed.proj.weight"].shape == (24, 1, 8, 8)
    assert content["model"]["pos_embed"].shape == (1, 1 + 2 * 4, 24)
    grey = data.embedded(in_chans=1).images.double() / 255
    assert content["meta"]["mean"] == pytest.approx([grey.mean().item()])
    assert content["meta"]["std"] == pytest.approx([grey.std(unbiased=False).item()])
    second = train("graft", tmp_path / "graft", "--in-chans", "1", init=first)
    assert saved(second, "encoder.pt")["config"]["img_size"] == [16, 32]


def test_mae_goes_on_from_another_encoder_of_any_size(small, tmp_path):
    """CL -> MIM grafting: the file says what the encoder is."""
    path = tmp_path / "moco.pt"
    moco = contrastive("moco", dtype=torch.float32).state_dict()
    torch.save({"state_dict": prefixed("module.", moco)}, path)
    start = initial("mae", "--init", str(path))
    out = train("mae", tmp_path / "out", "--init", str(path), "--freeze-blocks", "2")
    config, end = saved(out, "encoder.pt")["config"], saved(out, "encoder.pt")["model"]
    assert (config["dim"], config["depth"], config["patch_size"], config["img_size"]) == (24, 3, 4, [16, 16])
    for name in end:
        assert torch.equal(start[name], moco[f"base_encoder.{name}"]), name
        assert torch.equal(start[name], end[name]) == (model.layer_of(name, 3) <= 2), name


# ------------------------------------------------------------------------------------------ stop and resume
class Interrupted(Exception):
    pass


def interrupt(monkeypatch, step, action):
    """Do something as a run notes the given step."""
    record = run.Run.record

    def patched(self, number, loss, ids):
        if number == step:
            action()
        record(self, number, loss, ids)

    monkeypatch.setattr(run.Run, "record", patched)


def fail():
    raise Interrupted


@pytest.mark.parametrize("stage, more", [("mae", []), ("graft", []), ("graft", ["--mim-weight", "1"])])
@pytest.mark.parametrize("how", ["error", "SIGTERM", "damaged checkpoint"])
def test_a_resumed_run_is_the_same_to_the_bit(small, tmp_path, monkeypatch, capsys, stage, more, how):
    whole, parts = train(stage, tmp_path / "whole", *more), tmp_path / "parts"
    with monkeypatch.context() as patch:
        if how == "SIGTERM":                                                # in the middle of the second epoch
            interrupt(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
            with pytest.raises(run.Stopped):
                train(stage, parts, *more)
        else:
            interrupt(patch, 6, fail)
            with pytest.raises(Interrupted):
                train(stage, parts, *more, "--save-minutes", "1e-9")
    assert saved(parts)["step"] == (6 if how == "SIGTERM" else 5)
    if how == "damaged checkpoint":
        corrupt(parts / "last.pt")
    train(stage, parts, *more)
    said = capsys.readouterr().out
    assert f"step {dict(error=5, SIGTERM=6).get(how, 4)} of 8" in said
    a, b = saved(whole), saved(parts)
    assert_identical(a["model"], b["model"])
    assert_identical(saved(whole, "encoder.pt")["model"], saved(parts, "encoder.pt")["model"])
    for key in a["optimizer"]["state"]:
        assert_identical(a["optimizer"]["state"][key], b["optimizer"]["state"][key])
    assert [(line["step"], line["loss"], line["lr"]) for line in log_of(whole)] == [
        (line["step"], line["loss"], line["lr"]) for line in log_of(parts)]


def test_a_finished_run_is_left_alone_and_never_starts_over(small, tmp_path, capsys):
    out = train("mae", tmp_path)
    first = saved(out)["model"]
    with pytest.raises(data.UsageError, match="was written with seed 0, now seed is 1.*--resume never"):
        train("mae", out, "--seed", "1")
    train("mae", out)
    assert_identical(saved(out)["model"], first)
    assert len(log_of(out)) == 8
    train("mae", out, "--seed", "1", "--resume", "never")
    assert len(log_of(out)) == 8 and not torch.equal(saved(out)["model"]["norm.bias"], first["norm.bias"])


def test_two_runs_cannot_share_a_folder(small, tmp_path):
    with run.Run(str(tmp_path), 0, 1, torch.device("cpu"), 1, 1, 1):
        with pytest.raises(data.UsageError, match="in use by process"):
            train("mae", tmp_path)
    train("mae", tmp_path, "--epochs", "1")


# ------------------------------------------------------------------------------------- other processes
ALONE = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16", "--epochs", "2", "--batch-size", "8",
         "--log-every", "1", "--amp", "off", "--workers", "0", "--device", "cpu"]


def start(script, *arguments, processes=1):
    """A script of ours in a process of its own, or in several under torchrun."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.Popen([*command, os.path.join(HERE, script), *map(str, arguments)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_two_processes_under_torchrun_equal_one(tmp_path):
    pictures = folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(36)])
    first = ["--data", pictures, *ALONE, "--lr", "0.03"]
    mae_pretrain.main(mae_pretrain.get_args([*first, "--out", str(tmp_path / "mae1")]))
    second = ["--data", pictures, "--init", tmp_path / "mae1", *ALONE[4:], "--lr", "0.01,0.02,0.03",
              "--hidden-dim", "64", "--mim-weight", "1", "--anchor-weight", "1e-4"]
    jobs = [start("mae_pretrain.py", *first, "--accum", "3", "--out", tmp_path / "mae2", processes=2),
            start("graft_train.py", *second, "--micro-batch", "3", "--out", tmp_path / "graft2", processes=2)]
    second = [str(part) for part in [*second, "--out", tmp_path / "graft1"]]
    graft_train.main(graft_train.get_args(second))
    for job in jobs:
        said, _ = job.communicate(timeout=120)
        assert job.returncode == 0, said
    starts = []
    for stage, options in ((mae_pretrain, first), (graft_train, second)):
        torch.manual_seed(0)
        starts.append(stage.build(stage.get_args(options))[0].state_dict())
    for name, begin in zip(("mae", "graft"), starts):
        one, two = tmp_path / f"{name}1", tmp_path / f"{name}2"
        assert_close_movement(saved(two)["model"], saved(one)["model"], begin)
        assert [line["step"] for line in log_of(two)] == [line["step"] for line in log_of(one)] == list(range(1, 9))
        for a, b in zip(log_of(one), log_of(two)):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_sigterm_stops_a_script_cleanly(tmp_path):
    pictures = folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(36)])
    job = start("mae_pretrain.py", "--data", pictures, *ALONE, "--epochs", "100000", "--out", tmp_path / "out")
    for line in job.stdout:
        if " step 9/" in line:
            break
    job.terminate()
    said, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM" in said and "Traceback" not in said
    assert saved(tmp_path / "out")["step"] >= 9


# ---------------------------------------------------------------------------------------------- bad input
def end_of(stage, arguments, capsys, monkeypatch):
    """(exit code, last line of stderr) of a script as from the command line."""
    monkeypatch.setattr(sys, "argv", [f"{stage}.py", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run.program(STAGES[stage].main, STAGES[stage].get_args)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return end.value.code, lines[0]


BOTH, MAE_ONLY, GRAFT_ONLY = ("mae", "graft"), ("mae",), ("graft",)
BAD_INPUT = [
    (BOTH, ["--data", "{tmp}/nowhere"], "no such folder or list file"),
    (BOTH, ["--data", "{tmp}/empty"], "no pictures found"),
    (BOTH, ["--data", "{tmp}/only_val"], "no train/ in this folder"),
    (BOTH, ["--arch", "vit_enormous"], "invalid choice: 'vit_enormous'"),
    (BOTH, ["--lr", "nan"], "nan is out of range"),
    (BOTH, ["--lr", "-1"], "-1 is out of range"),
    (BOTH, ["--lr", "1e-3,inf,1e-3"], "inf is out of range"),
    (BOTH, ["--lr", "1e-3,x"], "'x' is not a number"),
    (BOTH, ["--lr", "1e-3,1e-3"], "the number of stages must divide the depth"),
    (BOTH, ["--lr", "0"], "nothing is left to train"),
    (BOTH, ["--freeze-blocks", "4"], "nothing is left to train"),
    (BOTH, ["--batch-size", "129"], "--batch-size 129 is more than the 128 pictures"),
    (BOTH, ["--batch-size", "0"], "0 is out of range"),
    (BOTH, ["--batch-size", "12.5"], "'12.5' is not a whole number"),
    (BOTH, ["--img-size", "20"], "not a multiple of --patch-size 8"),
    (BOTH, ["--img-size", "16x16x3"], "neither a side"),
    (BOTH, ["--in-chans", "2", "--data", "{tmp}/flat"], "argument --in-chans: invalid choice: 2"),
    (BOTH, ["--in-chans", "4"], "the embedded pictures have 3 channels"),
    (BOTH, ["--mask-ratio", "1"], "1 is out of range"),
    (BOTH, ["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a GPU"),
    (BOTH, ["--knn-every", "1", "--data", "{tmp}/flat", "--batch-size", "2"], "--knn-every needs labels"),
    (BOTH, ["--out", "{tmp}/a_file"], "cannot write there"),
    (BOTH, ["--out", "{tmp}/a_file/below"], "cannot write there"),
    (BOTH, ["--ep", "3"], "unrecognized arguments"),
    (MAE_ONLY, ["--init", "{tmp}/nowhere.pt"], "without --init"),
    (GRAFT_ONLY, ["--init", "{tmp}/shape.pt"], "go with --init none"),
    (GRAFT_ONLY, ["--anchor-weight", "1"], "it cannot go with --init none"),
    (GRAFT_ONLY, ["--temperature", "0"], "0 is out of range, it must be above 0"),
    (GRAFT_ONLY, ["--momentum", "1.5"], "1.5 is out of range"),
    (GRAFT_ONLY, ["--micro-batch", "0"], "0 is out of range"),
]


@pytest.mark.parametrize("stage, options, message", [(stage, options, message) for stages, options, message in BAD_INPUT
                                                     for stage in stages], ids=str)
def test_bad_input_ends_in_one_line(small, tmp_path, capsys, monkeypatch, stage, options, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a_file").write_text("")
    folder_of(tmp_path / "only_val" / "val", ["cat/1.png"])
    folder_of(tmp_path / "flat", ["1.png", "2.png"])
    base = ["--out", tmp_path / "out", "--arch", "vit_test", "--img-size", "32", "--batch-size", "32"]
    base += ["--init", "none"] if stage == "graft" else []
    options = [option.replace("{tmp}", str(tmp_path)) for option in options]
    code, line = end_of(stage, [*base, *options], capsys, monkeypatch)
    assert code == 2 and message in line and line.startswith(f"{stage}.py: error: "), line
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("kind, message", [
    ("absent", "no such checkpoint|no checkpoint"), ("shape", "of another shape"), ("code", "refused"),
    ("truncated", "not a readable"), ("folder", "no such checkpoint")])
def test_bad_init_ends_in_one_line(small, tmp_path, capsys, monkeypatch, stage, kind, message):
    path = tmp_path / "file.pt"
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        damaged(kind, path)
    code, line = end_of(stage, ["--init", path, "--out", tmp_path / "out"], capsys, monkeypatch)
    assert code == 2 and any(part in line for part in message.split("|")), line


def test_grafting_without_a_first_step_says_what_to_run(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, line = end_of("graft", [], capsys, monkeypatch)
    assert code == 2 and "run `python mae_pretrain.py` first" in line


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_that_the_processes_do_not_divide(small, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(run, "setup", lambda *options: (torch.device("cpu"), 0, 3))
    with pytest.raises(data.UsageError, match="--batch-size 32 is not divided by 3 processes"):
        train(stage, tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there(small, tmp_path, capsys, monkeypatch):
    code, line = end_of("mae", ["--device", "cuda", "--out", tmp_path], capsys, monkeypatch)
    assert code == 2 and "no CUDA device here" in line


@pytest.mark.parametrize("stage", STAGES)
def test_many_corrupt_files_stop_the_run(small, tmp_path, capsys, monkeypatch, stage):
    root = folder_of(tmp_path / "pictures", [f"{i}.png" for i in range(8)], (24, 136))
    for i in (1, 3, 5):
        corrupt(tmp_path / "pictures" / f"{i}.png")
    base = ["--arch", "vit_test", "--img-size", "16", "--batch-size", "8", "--workers", "0", "--out", tmp_path / "out"]
    base += ["--init", "none", "--hidden-dim", "32"] if stage == "graft" else []
    code, line = end_of(stage, [*base, "--data", root], capsys, monkeypatch)
    assert code == 1 and "of 8 pictures cannot be read" in line


def broken_pixels(monkeypatch, first, last):
    """From one step to another, every view comes with pixels that are no numbers."""
    draw, note, now = data.View.__getitem__, run.Run.record, {"step": 1}

    def record(self, step, *more):
        note(self, step, *more)
        now["step"] = step + 1

    def pixels(self, part):
        x = draw(self, part)
        return torch.full_like(x, float("nan")) if first <= now["step"] <= last else x

    monkeypatch.setattr(run.Run, "record", record)
    monkeypatch.setattr(data.View, "__getitem__", pixels)


def all_finite(state):
    return all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_skips_its_step_and_leaves_no_trace(small, tmp_path, capsys, monkeypatch, stage):
    broken_pixels(monkeypatch, 3, 3)
    after, save = {}, run.Run.save
    monkeypatch.setattr(run.Run, "save", lambda self, state, before: (save(self, state), after.update(
        {state["step"]: copy.deepcopy(state["model"])})))
    out = train(stage, tmp_path, "--save-minutes", "1e-9")
    assert list(after) == list(range(1, 9)) and all_finite(after[8])
    for name in after[3]:
        if not name.startswith("momentum_encoder.") and "num_batches" not in name:
            assert torch.equal(after[3][name], after[2][name]), name
    assert "loss is nan at step 3, step skipped; pictures embedded/" in capsys.readouterr().out
    assert [line["loss"] is not None for line in log_of(out)] == [step != 3 for step in range(1, 9)]
    assert not torch.equal(after[4]["base_encoder.norm.weight" if stage == "graft" else "norm.weight"],
                           after[3]["base_encoder.norm.weight" if stage == "graft" else "norm.weight"])


@pytest.mark.parametrize("stage", STAGES)
def test_many_losses_that_are_not_finite_stop_the_run(small, tmp_path, capsys, monkeypatch, stage):
    broken_pixels(monkeypatch, 7, 100)
    base = ["--arch", "vit_test", "--epochs", "10", "--batch-size", "32", "--log-every", "1", "--amp", "off", "--lr",
            "0.02", "--out", tmp_path, "--save-minutes", "1e-9"]
    base += ["--init", "none", "--hidden-dim", "32"] if stage == "graft" else []
    code, line = end_of(stage, base, capsys, monkeypatch)
    assert code == 1
    assert "not finite 6 times, last at step 12" in line and str(tmp_path / "last.pt") in line
    assert all_finite(saved(tmp_path)["model"])


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_are_not_finite_are_never_saved(small, tmp_path, capsys, monkeypatch, stage):
    monkeypatch.setattr(STAGES[stage], "lr_factor", lambda *schedule: 1e39)
    base = ["--arch", "vit_test", "--epochs", "6", "--batch-size", "32", "--log-every", "1", "--amp", "off", "--lr",
            "1", "--weight-decay", "0", "--out", tmp_path]
    base += ["--init", "none", "--hidden-dim", "32"] if stage == "graft" else []
    code, line = end_of(stage, base, capsys, monkeypatch)
    assert code == 1 and "not finite" in line and "step" in line and "lower --lr" in line
    assert not (tmp_path / "last.pt").exists() or all_finite(saved(tmp_path)["model"])


@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(small, tmp_path, capsys, monkeypatch, stage):
    train(stage, tmp_path)
    before = saved(tmp_path)
    monkeypatch.setattr(run, "settings", lambda args, **more: before["settings"])   # so that it goes on to 3 epochs

    def full(obj, f):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        base = ["--arch", "vit_test", "--epochs", "3", "--batch-size", "32", "--amp", "off", "--out", tmp_path]
        base += ["--init", "none", "--hidden-dim", "32"] if stage == "graft" else []
        code, line = end_of(stage, base, capsys, patch)
    assert code == 1 and "the disk is full" in line
    assert_identical(saved(tmp_path)["model"], before["model"])


# ------------------------------------------------------------------------- what the stage files repeat on purpose
def repeated_lines(script, start, end):
    """The lines of a stage file between two markers, without blank ones."""
    text = open(os.path.join(HERE, script)).read()
    return [line for line in text[text.index(start):text.index(end, text.index(start))].splitlines() if line.strip()]


@pytest.mark.parametrize("script", ["graft_train.py", "finetune.py"])
def test_common_options_are_the_same_in_every_stage(script):
    def options(name):
        lines = repeated_lines(name, "    # run\n", "    args = parser.parse_args")
        return {line.split('"')[1]: line for line in lines if line.lstrip().startswith("add(")}

    ours, theirs = options("mae_pretrain.py"), options(script)
    for name in ("--resume", "--seed", "--device", "--amp", "--compile", "--log-every", "--save-minutes",
                 "--timeout-minutes", "--deterministic"):
        assert ours[name] == theirs[name]


@pytest.mark.parametrize("start, end", [
    ("    device, rank, processes = run.setup", "    torch.manual_seed"),
    ("        state = job.load(settings)", "        system = "),
    ("                (stop, due), epoch_done", "                    more = "),
    ("                    if stop or due or epoch_done", "        job.say(f\"wrote"),
])
def test_the_two_loops_differ_only_in_the_method(start, end):
    graft_end = {"        system = ": "        meta = "}.get(end, end)
    assert repeated_lines("mae_pretrain.py", start, end) == repeated_lines("graft_train.py", start, graft_end)
