"""The two training stages in small runs: what they write, what they resume, what they refuse."""
import json
import math

import pytest
import torch

import augment
import data
import graft_train
import mae_pretrain
import model
import run
from conftest import assert_identical, log_of, saved

STAGES = {"mae": mae_pretrain, "graft": graft_train}


@pytest.fixture
def mae_folder(world, encoder):
    return encoder.parent / "mae"


def arguments(stage, out, *more, init="none"):
    """2 epochs of 4 steps, every step logged."""
    options = ["--epochs", "2", "--batch-size", "24", "--log-every", "1", "--amp", "off",
               "--device", "cpu", "--lr", "0.02", "--out", out, "--init", init]
    if stage == "graft":
        options += ["--hidden-dim", "32"]
    if str(init) == "none" and "--init" not in more:
        options += ["--arch", "vit_test"]
    return STAGES[stage].get_args([str(option) for option in (*options, *more)])


def train(stage, out, *more, **where):
    STAGES[stage].main(arguments(stage, out, *more, **where))
    return out


def initial(stage, *more, **where):
    """The weights that a run starts from."""
    args = arguments(stage, "unused", *more, **where)
    torch.manual_seed(args.seed)
    return STAGES[stage].build(args)[0].state_dict()


def assert_close_movement(ours, expected, start, tolerance=2e-3):
    """Weights that moved alike: the difference is small against the way they have come."""
    moved = [k for k, v in start.items()
             if v.is_floating_point() and not torch.equal(v, expected[k])]
    way = math.sqrt(sum((expected[k] - start[k]).square().sum().item() for k in moved))
    apart = math.sqrt(sum((ours[k] - expected[k]).square().sum().item() for k in moved))
    assert way > 0 and apart < tolerance * way, (apart, way)


# ---------------------------------------------------------------------------------- what a run does
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_trains_and_writes_what_it_must(world, tmp_path, capsys, stage):
    lr, more = (0.02, []) if stage == "mae" else (0.2, ["--crop-min", "0.8", "--momentum", "0.9"])
    out = train(stage, tmp_path, "--epochs", "10", "--lr", lr, "--knn-every", "10", *more)
    start, last, encoder = initial(stage), saved(out), saved(out, "encoder.pt")
    moved = {k for k in start if not torch.equal(start[k], last["model"][k])}
    prefix = "base_encoder." if stage == "graft" else ""
    still = {f"{prefix}pos_embed", "decoder_pos_embed", "momentum_encoder.pos_embed"}
    if stage == "graft":                                # frozen at random, as in MoCo v3
        still |= {name for name in start if ".patch_embed." in name}
    assert moved == set(start) - still
    log = log_of(out)
    assert [line["step"] for line in log] == list(range(1, 41))
    for line in log:
        assert {"loss", "lr", "images_per_second", "seconds", "data_wait"} < set(line)
    rates = [lr * 24 / 256 * model.lr_factor(step, 40, 6) for step in range(40)]
    assert [line["lr"][0] for line in log] == pytest.approx(rates)
    assert 0 <= log[-1]["knn"] <= 100 and "knn" not in log[-2]
    losses = [line["loss"] for line in log]
    assert sum(losses[-8:]) < 0.98 * sum(losses[:8]), losses
    groups = last["optimizer"]["param_groups"]
    assert {tuple(g["betas"]) for g in groups} == {(0.9, 0.95) if stage == "mae" else (0.9, 0.999)}
    assert {g["weight_decay"] for g in groups} == ({0.0, 0.05} if stage == "mae" else {0.1})
    # the encoder under the official names, and what rebuilds it
    net = model.VisionTransformer(**encoder["config"])
    plain = {k: v for k, v in encoder["model"].items() if not k.startswith("head.")}
    net.load_state_dict(plain, strict=True)
    assert_identical(plain, {k: last["model"][prefix + k] for k in plain})
    assert encoder["meta"]["system"] == {"mae": "MAE", "graft": "MoCo v3"}[stage]
    assert encoder["meta"]["step"] == 40
    said = capsys.readouterr().out
    assert "96 images of embedded" in said and "40 steps, 6 of warm-up" in said
    if stage == "graft":
        assert f"chance level of the loss: {0.8 * math.log(24):.3f}" in said
        assert {"acc", "std", "rank"} < set(log[0])
    with open(tmp_path / "args.json") as f:
        about = json.load(f)
    assert about["options"]["epochs"] == 10 and about["torch"] == torch.__version__


def test_options_reach_the_method(world, tmp_path, monkeypatch):
    options = ["--temperature", "0.7", "--train-patch-embed", "--hidden-dim", "48",
               "--mim-weight", "0.3"]
    net, _ = graft_train.build(arguments("graft", tmp_path, *options))
    assert net.temperature == 0.7 and net.mim_weight == 0.3
    assert net.predictor[0].weight.shape == (48, 256)
    vicreg, _ = graft_train.build(arguments("graft", tmp_path, "--loss", "vicreg"))
    assert vicreg.base_encoder.head[6].weight.shape == (32, 32)         # --hidden-dim, to its end
    assert net.base_encoder.patch_embed.proj.weight.requires_grad
    assert not mae_pretrain.build(arguments("mae", tmp_path, "--no-norm-pix-loss"))[0].norm_pix_loss
    ratios, masking = [], model.MaskedAutoencoder.random_masking
    monkeypatch.setattr(model.MaskedAutoencoder, "random_masking", lambda self, noise, ratio:
                        ratios.append(ratio) or masking(self, noise, ratio))
    train("mae", tmp_path / "mae", "--mask-ratio", "0.6", "--epochs", "1")
    train("graft", tmp_path / "mtl", "--mim-weight", "1", "--mask-ratio", "0.6", "--epochs", "1")
    assert len(ratios) >= 8 and set(ratios) == {0.6}
    scales, momenta = [], []
    monkeypatch.setattr(data, "random_boxes", lambda ids, sizes, scale, *key:
                        scales.append(scale) or augment.random_boxes(ids, sizes, scale, *key))
    monkeypatch.setattr(model.MoCoV3, "update_momentum", lambda self, m: momenta.append(m))
    train("graft", tmp_path / "graft", "--crop-min", "0.3", "--momentum", "0.9")
    assert set(scales) == {(0.3, 1.0)}
    assert momenta == pytest.approx([model.momentum_at(step, 8, 0.9) for step in range(8)])


def test_grafting_starts_from_the_file_with_its_positions(mae_folder, tmp_path):
    path = tmp_path / "moved.pt"
    content = saved(mae_folder, "encoder.pt")
    content["model"]["pos_embed"] = content["model"]["pos_embed"].flip(1)       # another table
    torch.save(content, path)
    start = initial("graft", init=path)
    for net in ("base_encoder", "momentum_encoder"):
        assert_identical({k: start[f"{net}.{k}"] for k in content["model"]}, content["model"])
    encoder = saved(train("graft", tmp_path / "out", init=path), "encoder.pt")
    assert torch.equal(encoder["model"]["pos_embed"], content["model"]["pos_embed"])
    assert encoder["meta"]["system"] == "MoCo v3 from MAE weights"


@pytest.mark.parametrize("stage, more, lowest", [
    ("mae", ["--freeze-blocks", "2"], 2), ("graft", ["--freeze-blocks", "1"], 1),
    ("graft", ["--lr", "0,0,0.02"], 2), ("mae", ["--lr", "0,0.01,0.02"], 1)])
def test_frozen_blocks_stay_to_the_bit(mae_folder, tmp_path, stage, more, lowest):
    out = train(stage, tmp_path, "--weight-decay", "0.5", *more, init=mae_folder)
    start, end = saved(mae_folder, "encoder.pt")["model"], saved(out, "encoder.pt")["model"]
    for name in start:
        still = model.layer_of(name, 3) <= lowest or name == "pos_embed"
        assert torch.equal(start[name], end[name]) == still, name


@pytest.mark.parametrize("stage, more, size", [
    ("mae", [], 11), ("graft", ["--loss", "vicreg"], 7), ("graft", ["--mim-weight", "0.5"], 5)])
def test_the_result_does_not_depend_on_micro_batches(world, tmp_path, stage, more, size):
    more = ["--lr", "0.002", *more]
    whole = saved(train(stage, tmp_path / "whole", *more))["model"]
    parts = saved(train(stage, tmp_path / "parts", *more, "--micro-batch", size))["model"]
    assert_close_movement(parts, whole, initial(stage, *more))


@pytest.mark.parametrize("stage, more", [
    ("mae", []), ("graft", ["--micro-batch", "5", "--mim-weight", "1"])])
def test_bfloat16_is_close_to_float32(world, tmp_path, stage, more):
    more = [*more, "--epochs", "1", "--lr", "0.001", "--amp"]
    single, half = (train(stage, tmp_path / amp, *more, amp) for amp in ("off", "bf16"))
    for a, b in zip(log_of(single), log_of(half)):
        assert a["loss"] != b["loss"] and a["loss"] == pytest.approx(b["loss"], rel=0.02)
    assert {v.dtype for v in saved(half)["model"].values()} <= {torch.float32, torch.int64}


def test_micro_batches_are_found_by_the_memory_that_is_free(monkeypatch):
    weight, tried = torch.ones(1000, requires_grad=True), []

    def step(k):
        tried.append(k)
        (torch.ones(k, 1000) * weight).exp().sum().backward()           # keeps 4,000 bytes an image

    def found(n, free):
        monkeypatch.setattr(run, "linux_says", lambda *what: free // 1024)
        return run.micro_batch(0, step, n, run.Env(torch.device("cpu")))

    assert found(64, 1 << 30) == 64
    assert found(64, 2 * 24 * 8000) in (22, 32)                         # three equal parts, or two
    assert found(64, 2048) == 1
    assert run.micro_batch(5, step, 64, run.Env(torch.device("cpu"))) == 5
    assert run.micro_batch(100, step, 64, run.Env(torch.device("cpu"))) == 64 and len(tried) == 6


@pytest.mark.parametrize("more, keys, system", [
    (["--loss", "vicreg"], {"invariance", "variance", "covariance"}, "Layer grafted VICReg"),
    (["--loss", "simclr"], {"acc"}, "Layer grafted SimCLR"),
    (["--mim-weight", "1"], {"mim", "contrastive"}, "MTL (MAE + MoCo v3)"),
    (["--freeze-blocks", "2"], {"acc"}, "MIM -> MoCo v3 grafting"),
    (["--lr", "0.01"], {"acc"}, "MoCo v3 from MAE weights")])
def test_the_other_systems_train(mae_folder, tmp_path, more, keys, system):
    out = train("graft", tmp_path, "--lr", "0.005,0.01,0.02", *more, init=mae_folder)
    for line in log_of(out):
        assert keys < set(line) and all(math.isfinite(line[key]) for key in ("loss", *keys))
        if "mim" in keys:
            assert line["loss"] == pytest.approx(line["contrastive"] + line["mim"], rel=1e-5)
    assert saved(out, "encoder.pt")["meta"]["system"] == system


def test_a_longer_run_of_a_system_is_that_system(mae_folder, tmp_path):
    plain = train("graft", tmp_path / "plain", "--lr", "0.01", init="none")
    longer = train("graft", tmp_path / "longer", "--lr", "0.01", init=plain)
    assert saved(longer, "encoder.pt")["meta"]["system"] == "MoCo v3"
    kept = train("mae", tmp_path / "kept", "--freeze-blocks", "1", init=plain)
    assert saved(kept, "encoder.pt")["meta"]["system"] == "CL -> MIM grafting"
    kept = train("mae", tmp_path / "more", "--freeze-blocks", "1", init=mae_folder)
    assert saved(kept, "encoder.pt")["meta"]["system"] == "MAE"


def test_the_anchor_holds_the_lower_layers_near_their_weights(mae_folder, tmp_path):
    def moved(weight):
        more = ["--lr", "0.02,0.02,0.02", "--weight-decay", "0", "--anchor-norm", "l1"]
        more += ["--anchor-blocks", "2", "--anchor-weight", weight]
        out = train("graft", tmp_path / weight, *more, init=mae_folder)
        start, end = saved(mae_folder, "encoder.pt")["model"], saved(out, "encoder.pt")["model"]
        return out, [sum((end[k] - start[k]).abs().sum().item() for k in start
                         if k.startswith(f"blocks.{i}.")) for i in range(3)]

    (_, free), (out, bound) = moved("0"), moved("10")
    assert [b < 0.5 * f for f, b in zip(free, bound)] == [True, True, False]
    assert log_of(out)[0]["anchor"] == 0                            # the first step starts there


def test_channels_statistics_and_range_are_those_of_the_file(world, tmp_path, capsys):
    shape = ["--img-size", "16x32", "--in-chans", "1", "--stats", "data"]
    first = train("mae", tmp_path / "mae", *shape)
    content = saved(first, "encoder.pt")
    assert content["config"]["img_size"] == [16, 32] and content["config"]["in_chans"] == 1
    assert content["model"]["pos_embed"].shape == (1, 1 + 2 * 4, 24)
    grey = data.embedded(in_chans=1).images.double() / 255
    assert content["meta"]["mean"] == pytest.approx([grey.mean().item()])
    capsys.readouterr()
    second = saved(train("graft", tmp_path / "graft", init=first), "encoder.pt")
    assert second["config"]["img_size"] == [16, 32] and second["config"]["in_chans"] == 1
    for name in ("mean", "std"):
        assert second["meta"][name] == content["meta"][name]
    assert f"1 channels of mean {grey.mean().item():.3f}" in capsys.readouterr().out
    third = train("graft", tmp_path / "other", "--stats", "imagenet", init=first)
    assert saved(third, "encoder.pt")["meta"]["mean"] != content["meta"]["mean"]
    capsys.readouterr()
    colour = train("graft", tmp_path / "colour", "--in-chans", "3", init=first)
    assert saved(colour, "encoder.pt")["meta"]["mean"] == list(data.IMAGENET_STATS[0])
    assert "of --init are of 1 channels, not 3: ImageNet's are taken" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- stop and resume
def test_a_finished_run_is_left_alone_and_never_starts_over(world, tmp_path):
    out = train("mae", tmp_path)
    first = saved(out)["model"]
    with pytest.raises(run.UsageError, match="with seed 0, now seed is 1.*--resume never"):
        train("mae", out, "--seed", "1")
    with pytest.raises(run.UsageError, match=f"Go on from its .* --init {out} --lr 0.02 --out"):
        train("mae", out, "--epochs", "3")
    result = mae_pretrain.main(arguments("mae", out))
    assert result["step"] == 8 and result["path"] == str(out / "encoder.pt")
    assert_identical(saved(out)["model"], first)
    assert len(log_of(out)) == 8
    train("mae", out, "--seed", "1", "--resume", "never")
    assert len(log_of(out)) == 8
    assert not torch.equal(saved(out)["model"]["norm.bias"], first["norm.bias"])


@pytest.mark.parametrize("damage", [
    lambda c: c.update(settings=[1]), lambda c: c.update(step="3"), lambda c: c.update(step=99),
    lambda c: c["model"]["norm.bias"].fill_(float("nan")), lambda c: c.pop("optimizer")])
def test_a_checkpoint_that_no_run_wrote_ends_in_a_line_or_starts_over(world, tmp_path, damage):
    out = train("mae", tmp_path, "--epochs", "1")
    (out / "previous.pt").unlink(missing_ok=True)
    content = saved(out)
    damage(content)
    torch.save(content, out / "last.pt")
    try:
        train("mae", out, "--epochs", "1")
    except ValueError as error:
        assert error.exit_code == 2 and "last.pt" in str(error)
    assert all(v.isfinite().all() for v in saved(out, "encoder.pt")["model"].values())


# ---------------------------------------------------------------------------------------- the rest
@pytest.mark.parametrize("stage", STAGES)
def test_a_loss_that_is_not_finite_skips_its_step_and_leaves_no_trace(world, tmp_path, capsys,
                                                                      monkeypatch, stage):
    draw, now, after = data.Batch.view, {"step": 1}, {}
    record, save = run.Job.record, run.Job.save

    def noted(self, *more, **log):
        record(self, *more, **log)
        now["step"] = self.step + 2

    def kept(self, step, *more):
        save(self, step, *more)
        after[step] = {k: v.clone() for k, v in self.net.state_dict().items()}

    monkeypatch.setattr(run.Job, "record", noted)
    monkeypatch.setattr(run.Job, "save", kept)
    monkeypatch.setattr(data.Batch, "view", lambda self, k: draw(self, k) * (
        float("nan") if now["step"] == 3 else 1))
    train(stage, tmp_path, "--save-minutes", "1e-9")
    assert list(after) == list(range(1, 9)) and all(v.isfinite().all() for v in after[8].values())
    for name in after[3]:
        if not name.startswith("momentum_encoder.") and "num_batches" not in name:
            assert torch.equal(after[3][name], after[2][name]), name
    assert "loss is nan at step 3, step skipped; images embedded/" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_groups_and_every_default(stage, capsys):
    with pytest.raises(SystemExit) as end:
        STAGES[stage].get_args(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    for words in ("data:", "model:", "loss:", "optimisation:", "run:", "(default: 0.75)",
                  "(default: 4096, embedded 128)", "(default: auto)"):
        assert words in said and end.value.code == 0, words


def test_tensorboard_gets_the_log_and_the_views(world, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = train("graft", tmp_path, "--tensorboard", "--epochs", "1")
    board = events.EventAccumulator(str(out)).Reload()
    assert [round(e.value, 4) for e in board.Scalars("loss")] == [
        round(line["loss"], 4) for line in log_of(out)]
    assert len(board.Images("views")) == 1
    assert {"acc", "std", "rank", "lr/1"} <= set(board.Tags()["scalars"])
