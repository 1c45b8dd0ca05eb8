"""Tests of finetune.py: what each protocol trains, that nothing else moves, restarts, processes, bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import augment
import checkpoint
import data
import finetune
import graft_train
import mae_pretrain
import model
import run
from data import UsageError
from features import digest, extract

DEPTH, DIM, CLASSES = 3, 24, 16
QUIET = ["--device", "cpu", "--amp", "off", "--workers", "0"]
# everything that draws random numbers
HARD = ["--rand-augment", "9", "--mixup", "0.8", "--cutmix", "1", "--erasing", "0.5", "--drop-path", "0.3"]
torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def small():
    """A tiny vit_mini, and an embedded set of 160 and 83 pictures."""
    patch = pytest.MonkeyPatch()
    sets = {train: data.embedded(train, n=160 if train else 83) for train in (True, False)}
    patch.setattr(data, "embedded", lambda train, in_chans: sets[train].select(range(len(sets[train]))))
    patch.setitem(model.ARCHS, "vit_mini", ((8, DIM, DEPTH, 3), (16, 1, 2)))
    patch.delenv("DATA", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of a MAE and of a grafted run, made by our own scripts."""
    mae, graft = (str(tmp_path_factory.mktemp(name)) for name in ("mae", "graft"))
    short = [*QUIET, "--epochs", "1", "--batch-size", "80"]
    mae_pretrain.main(mae_pretrain.get_args([*short, "--out", mae]))
    graft_train.main(graft_train.get_args([*short, "--init", mae, "--out", graft, "--hidden-dim", "20"]))
    return dict(mae=mae, graft=graft)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of several sizes, so that they are read and not held: 4 classes, 24 pictures to train and 13 to test."""
    root = tmp_path_factory.mktemp("files")
    pictures = data.embedded(True, 3)
    for part, n, first in (("train", 24, 0), ("val", 13, 24)):
        for i in range(n):
            place = root / part / f"class{i % 4}"
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pictures.images[first + i].permute(1, 2, 0).numpy())
            image.resize((32 + i % 3, 40)).save(place / f"{i:02}.png")
    return str(root)


def arguments(checkpoint_path, out, *more):
    return finetune.get_args([*QUIET, "--checkpoint", checkpoint_path, "--out", str(out), "--batch-size", "40",
                              "--epochs", "1", *more])


def tune(checkpoint_path, out, *more):
    """(result, what classifier.pt holds) of a run."""
    entry = finetune.main(arguments(checkpoint_path, out, *more))
    return entry, checkpoint.read(os.path.join(out, "classifier.pt"))


def built(checkpoint_path, *more):
    """(network as it starts, what the checkpoint held)."""
    args = arguments(checkpoint_path, "unused", *more)
    source = checkpoint.read_encoder(args.checkpoint, args.weights)
    return finetune.build(args, source, CLASSES)[0], source


def test_rates_fall_with_depth(made, tmp_path):
    """Adam's first step moves a parameter by its rate, whatever the gradient: so the rates show in the weights."""
    lr, decay = 1e-3, 0.5
    tune(made["graft"], tmp_path, "--lr", str(lr), "--layer-decay", str(decay), "--batch-size", "160",
         "--warmup-epochs", "0", "--drop-path", "0")
    start = checkpoint.read_encoder(made["graft"])["state"]
    last = checkpoint.read(str(tmp_path / "last.pt"))
    assert last["step"] == 1
    scale = 160 / 256
    for name, layer in (("patch_embed.proj.bias", 0), ("blocks.0.mlp.fc2.bias", 1), ("blocks.1.mlp.fc2.bias", 2),
                        ("blocks.2.mlp.fc2.bias", 3), ("norm.weight", 4)):
        moved = (last["model"][name] - start[name]).abs().median().item()
        assert moved == pytest.approx(lr * scale * decay ** (DEPTH + 1 - layer), rel=0.1), name
    assert torch.equal(last["model"]["pos_embed"], start["pos_embed"])
    groups = {name: group for group in last["optimizer"]["param_groups"] for name in group["names"]}
    assert set(groups) == set(last["model"]) - {"pos_embed"}
    assert groups["head.weight"]["weight_decay"] == 0.05 and groups["head.bias"]["weight_decay"] == 0


def test_rate_ends_at_min_lr(made, tmp_path):
    tune(made["graft"], tmp_path, "--lr", "1e-3", "--min-lr", "1e-4", "--log-every", "1", "--warmup-epochs", "0")
    lines = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    scale, floor = 40 / 256, 1e-4
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["lr"] == pytest.approx([1e-3 * scale])
    assert lines[2]["lr"] == pytest.approx([floor + (1e-3 * scale - floor) / 2])
    # with no room above the floor the rate stays where it is
    tune(made["graft"], tmp_path / "b", "--lr", "1e-6", "--min-lr", "1", "--log-every", "1", "--warmup-epochs", "0")
    lines = [json.loads(line) for line in open(tmp_path / "b" / "log.jsonl")]
    assert all(line["lr"] == pytest.approx([1e-6 * scale]) for line in lines)


def test_paper_defaults_with_data(made, folder):
    args = finetune.get_args(["--checkpoint", made["graft"], "--data", folder])
    assert (args.epochs, args.batch_size, args.lr, args.layer_decay, args.warmup_epochs) == (100, 1024, 5e-4, 0.6, 5)
    assert (args.weight_decay, args.min_lr, args.drop_path, args.label_smoothing) == (0.05, 1e-6, 0.1, 0.1)
    assert (args.rand_augment, args.mixup, args.cutmix, args.erasing, args.crop_min) == (9, 0.8, 1.0, 0.25, 0.08)
    args = finetune.get_args(["--checkpoint", made["graft"], "--data", folder, "--from-projector"])
    assert (args.epochs, args.lr, args.layer_decay, args.mixup) == (400, 3e-5, 0.6, 0.8)


def test_classifier_starts_near_zero(made):
    torch.manual_seed(0)
    for more in ((), ("--from-projector",), ("--probe-block", "3", "--blocks", "1")):
        net, _ = built(made["graft"], *more)
        classifier = [m for m in net.modules() if isinstance(m, torch.nn.Linear)][-1]
        assert classifier.out_features == CLASSES
        assert classifier.weight.std().item() == pytest.approx(2e-5, rel=0.2)
        assert torch.equal(classifier.bias, torch.zeros(CLASSES))


def test_full_fine_tuning_moves_everything(made, tmp_path):
    entry, content = tune(made["graft"], tmp_path, *HARD)
    start = checkpoint.read_encoder(made["graft"])
    assert entry["protocol"] == "fine-tune" and entry["labels"] == "all" and entry["labelled"] == 160
    assert entry["tested"] == 83 and entry["system"] == "Layer grafted"
    for name, value in start["state"].items():
        assert torch.equal(content["model"][name], value) == (name == "pos_embed"), name
    assert content["head"] == {"kind": "linear"} and content["encoder_digest"] == entry["digest"]
    encoder = model.VisionTransformer(**start["config"])
    encoder.load_state_dict(start["state"])
    assert entry["digest"] == digest(encoder)
    assert json.loads(open(tmp_path / "results.jsonl").read()) == entry


def test_frozen_blocks_stay(made, tmp_path):
    entry, content = tune(made["graft"], tmp_path, "--freeze-blocks", "2", *HARD)
    assert entry["protocol"] == "partial fine-tune 2"
    for name, value in checkpoint.read_encoder(made["graft"])["state"].items():
        frozen = model.layer_of(name, DEPTH) <= 2
        assert torch.equal(content["model"][name], value) == frozen, name
    net, _ = built(made["graft"], "--freeze-blocks", "2", "--drop-path", "0.5")
    net.train()
    assert [block.training for block in net.blocks] == [False, False, True] and net.norm.training
    x = torch.rand(4, 3, 32, 32)
    assert not net.intermediate(x, [2])[0].requires_grad                    # no graph below: no memory, no time
    assert torch.equal(net.intermediate(x, [2])[0], net.intermediate(x, [2])[0])
    assert not torch.equal(net(x), net(x))                                  # drop path, above
    net(x).sum().backward()
    assert all((p.grad is None) == (model.layer_of(name, DEPTH) <= 2) for name, p in net.named_parameters())


@pytest.mark.parametrize("block, blocks", [(2, 0), (2, 2), (3, 0), (3, 1)])
def test_probe_trains_only_what_is_new(made, tmp_path, block, blocks):
    options = ("--probe-block", str(block), "--blocks", str(blocks))
    entry, content = tune(made["graft"], tmp_path, *options, *HARD)
    source = checkpoint.read_encoder(made["graft"])
    assert entry["protocol"] == f"probe block {block} + {blocks} blocks"
    assert all(torch.equal(content["model"][name], value) for name, value in source["state"].items())
    net, _ = finetune.load_classifier(str(tmp_path))
    assert digest(net, checkpoint.is_encoder) == entry["digest"]
    torch.manual_seed(0)
    fresh, _ = built(made["graft"], *options)
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    assert trained == {name for name in content["model"] if name.startswith("head.")}
    assert not any(torch.equal(content["model"][name], value) for name, value in fresh.state_dict().items()
                   if name in trained)
    assert len(net.head.blocks) == blocks
    # the definition, written out with a plain encoder
    encoder = model.VisionTransformer(**source["config"])
    encoder.load_state_dict(source["state"])
    x = torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        tokens = encoder.tokens(x) if block == DEPTH else encoder.intermediate(x, [block])[0]
        for new in net.head.blocks:
            tokens = new(tokens)
        feature = net.head.norm(tokens)[:, 0] if blocks else tokens[:, 0]
        expected = feature @ content["model"]["head.classifier.weight"].T + content["model"]["head.classifier.bias"]
        assert torch.allclose(net(x), expected, atol=1e-6)


def test_from_projector(made, tmp_path):
    entry, content = tune(made["graft"], tmp_path, "--from-projector", "--labels", "20%", "--layer-decay", "0.6")
    assert entry["protocol"] == "20% from projector" and entry["labelled"] == 32 and entry["batch_size"] == 32
    assert entry["labels"].startswith("20%")
    net, source = built(made["graft"], "--from-projector")
    weight = source["rest"]["head.0.weight"]
    assert weight.shape == (20, DIM) and torch.equal(net.head[0].weight, weight) and net.head[0].bias is None
    moved = (content["model"]["head.0.weight"] - weight).abs().max()
    assert 0 < moved < 1e-2                                                 # started there, and trained
    x = torch.rand(2, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        expected = net.forward_features(x) @ weight.T @ net.head[1].weight.T
        assert torch.allclose(net(x), expected, rtol=1e-4, atol=1e-9)


def test_no_projector_no_from_projector(made, tmp_path):
    with pytest.raises(UsageError, match="no projector in it"):
        tune(made["mae"], tmp_path, "--from-projector")
    tune(made["mae"], tmp_path / "a")
    with pytest.raises(UsageError, match="no projector in it"):             # nor in a fine-tuned classifier
        tune(str(tmp_path / "a" / "classifier.pt"), tmp_path / "b", "--from-projector")


def test_official_layout_and_weights(made, tmp_path):
    """A file as MoCo v3 writes them: the base or the momentum encoder, each with its own projector."""
    last = checkpoint.read(os.path.join(made["graft"], "last.pt"))["model"]
    state = {f"module.{name}": value for name, value in last.items()}
    path = str(tmp_path / "moco.pth")
    torch.save({"state_dict": state, "arch": "vit", "epoch": 1}, path)
    for which in ("base", "momentum"):
        net, source = built(path, "--from-projector", "--weights", which)
        assert torch.equal(net.head[0].weight, last[f"{which}_encoder.head.0.weight"])
        assert torch.equal(net.blocks[2].mlp.fc1.weight, last[f"{which}_encoder.blocks.2.mlp.fc1.weight"])
    assert not torch.equal(last["base_encoder.head.0.weight"], last["momentum_encoder.head.0.weight"])


def test_projector_with_bias(tmp_path):
    """VICReg's expander has biases: they come along."""
    net = model.VICReg(model.VisionTransformer(32, 8, 3, DIM, DEPTH, 3), 20, 20)
    torch.nn.init.normal_(net.base_encoder.head[0].bias)
    path = str(tmp_path / "encoder.pt")
    checkpoint.save(checkpoint.encoder_file(net, {}), path)
    tuned, _ = built(path, "--from-projector")
    assert torch.equal(tuned.head[0].bias, net.base_encoder.head[0].bias)


def test_stop_and_resume_is_exact(made, tmp_path, monkeypatch):
    """A signal in the middle of the second epoch, then the same command: bit for bit what an unbroken run gives."""
    options = [*HARD, "--epochs", "3", "--log-every", "1"]
    entry, content = tune(made["graft"], tmp_path / "whole", *options)
    record = run.Run.record

    def stop_at_six(job, step, *rest):
        record(job, step, *rest)
        if step == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(run.Run, "record", stop_at_six)
    with pytest.raises(run.Stopped):
        tune(made["graft"], tmp_path / "broken", *options)
    monkeypatch.undo()
    state = checkpoint.read(str(tmp_path / "broken" / "last.pt"))
    assert state["step"] == 6 and not os.path.exists(tmp_path / "broken" / "classifier.pt")
    torch.rand(7)                                                           # torch's generator stands elsewhere now
    resumed, again = tune(made["graft"], tmp_path / "broken", *options)
    assert resumed | {"seconds": 0} == entry | {"seconds": 0}
    assert all(torch.equal(again["model"][name], value) for name, value in content["model"].items())
    whole, broken = ([json.loads(line)["loss"] for line in open(tmp_path / name / "log.jsonl")]
                     for name in ("whole", "broken"))
    assert len(whole) == 12 and whole == broken
    with pytest.raises(UsageError, match="mixup"):                          # nor does it go on with other settings
        tune(made["graft"], tmp_path / "broken", *options, "--mixup", "0.1")


def test_seed_matters(made, tmp_path):
    states = [tune(made["graft"], tmp_path / seed, *HARD, "--seed", seed)[1]["model"] for seed in "01"]
    assert not torch.equal(states[0]["blocks.0.attn.qkv.weight"], states[1]["blocks.0.attn.qkv.weight"])


def logits_of(path, folder):
    net, content = finetune.load_classifier(str(path))
    pictures = data.load_data(folder, False)
    return extract(net, pictures, function=lambda net, x: net(x), mean=content["mean"], std=content["std"])


def test_two_processes_and_micro_batches_change_nothing(made, folder, tmp_path):
    """To rounding, where no batch is mixed and no path dropped; RandAugment and erasing go by picture."""
    options = ["--data", folder, "--batch-size", "12", "--epochs", "2", "--lr", "5e-3", "--layer-decay", "0.6",
               "--warmup-epochs", "0", "--drop-path", "0", "--mixup", "0", "--cutmix", "0"]
    one, content = tune(made["graft"], tmp_path / "one", *options)
    assert one["tested"] == 13 and one["epochs"] == 2
    reference = logits_of(tmp_path / "one", folder)
    assert (reference.std(0) > 1e-3).all()                                  # it has learnt to tell pictures apart
    tune(made["graft"], tmp_path / "parts", *options, "--accum", "3")
    assert torch.allclose(logits_of(tmp_path / "parts", folder), reference, atol=1e-4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "finetune.py", *QUIET, "--checkpoint", made["graft"], "--out", str(tmp_path / "two"), *options]
    result = subprocess.run(command, cwd=os.path.dirname(finetune.__file__), capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    two = json.loads(open(tmp_path / "two" / "results.jsonl").read())
    same = ("protocol", "top1", "top5", "digest", "tested", "labelled", "batch_size", "lr")
    assert {k: two[k] for k in same} == {k: one[k] for k in same}
    assert torch.allclose(logits_of(tmp_path / "two", folder), reference, atol=1e-4)


@pytest.mark.parametrize("n, processes", [(83, 1), (83, 2), (83, 3), (10, 4), (3, 4)])
def test_every_test_picture_is_counted_once(n, processes, monkeypatch):
    pictures = data.embedded(False, 3).select(range(n))
    seen, totals = [], []
    monkeypatch.setattr(finetune.dist, "all_reduce", totals.append)

    class Right(torch.nn.Module):
        """Knows the label of the pictures whose number is even; for the others the right class comes third."""

        def forward(self, x):
            ids = batches.pop(0)
            seen.extend(ids.tolist())
            logits = torch.arange(CLASSES).float().expand(len(x), -1).clone()
            place = torch.where(ids % 2 == 0, 100.0, CLASSES - 2.5)
            return logits.scatter(1, pictures.labels[ids, None], place[:, None])

    for rank in range(processes):
        loader = data.Loader(pictures, [augment.TEST_VIEW], (32, 32), 4, rank=rank, processes=processes, shuffle=False)
        batches = list(loader.batches(0))
        if not batches:
            totals.append(torch.zeros(3, dtype=torch.long))
            continue
        first, five, count = finetune.evaluate(Right(), loader, None)
        if processes == 1:
            totals.append((torch.tensor([first, five, 100]) * count / 100).round().long())
    assert sorted(seen) == list(range(n))
    assert sum(totals).tolist() == [(n + 1) // 2, n, n]


@pytest.mark.parametrize("mixup, cutmix, kinds", [(0.8, 0, {"MixUp"}), (0, 1.0, {"CutMix"}),
                                                  (0.8, 1.0, {"MixUp", "CutMix"})])
def test_mixed_targets_say_what_is_in_the_picture(mixup, cutmix, kinds):
    """Pictures of one value each: the mean of a mixed one is the mean of the values, weighted by its target."""
    mix = finetune.mixing(SimpleNamespace(mixup=mixup, cutmix=cutmix), 6)
    values = torch.tensor([1.0, 5.0, -2.0, 0.0, 3.0, 9.0])
    images, labels = values[:, None, None, None].expand(6, 3, 16, 16).clone(), torch.arange(6)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        mixed, targets = mix(images, labels)
        assert targets.shape == (6, 6) and torch.allclose(targets.sum(1), torch.ones(6)) and (targets >= 0).all()
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ values, atol=1e-4)
        seen.add("CutMix" if torch.isin(mixed, values).all() else "MixUp")
    assert seen == kinds


def test_no_mixing_leaves_the_labels():
    images, labels = torch.rand(2, 3, 4, 4), torch.tensor([1, 0])
    mixed, targets = finetune.mixing(SimpleNamespace(mixup=0, cutmix=0), 2)(images, labels)
    assert mixed is images and targets is labels


def test_rand_augment_goes_by_picture(made, folder):
    """Every picture its own operations, the same whatever batch or process it comes in, others in the next epoch."""
    args = arguments(made["graft"], "unused", "--rand-augment", "9")
    for pictures in (data.embedded(True, 3).select(range(24)), data.load_data(folder, True)):
        plain_view = finetune.train_view(arguments(made["graft"], "unused", "--rand-augment", "0"), pictures)
        view = finetune.train_view(args, pictures)

        def crops(view, batch_size, epoch=0, workers=0, pictures=pictures):
            loader = data.Loader(pictures, [view], (32, 32), batch_size, 3, workers)
            parts = [(batch.ids, batch.views[0][:]) for batch in loader.epoch(epoch)]
            ids, x = (torch.cat(values) for values in zip(*parts))
            return x[ids.argsort()]

        x = crops(view, 24)
        assert torch.equal(x, crops(view, 8, workers=2 if pictures.images is None else 0))
        untouched = (x - crops(plain_view, 24)).abs().amax((1, 2, 3)) < 0.02
        assert 2 <= untouched.sum() <= 15                                   # 1/4 and a little more is left alone
        assert not torch.equal(x, crops(view, 24, epoch=1))


def test_reading_processes_end_with_their_loader(folder):
    loader = data.Loader(data.load_data(folder), [augment.TRAIN_VIEW], (32, 32), 8, workers=2)
    batches = list(loader.epoch(0))
    workers, started = loader.reader._iterator._workers, time.perf_counter()
    del loader, batches
    assert not any(worker.is_alive() for worker in workers) and time.perf_counter() - started < 4


def test_erasing_goes_by_picture():
    x, ids = torch.zeros(40, 3, 16, 16), torch.arange(40)
    eraser = finetune.v2.RandomErasing(0.25, value="random")
    state = torch.get_rng_state()
    erased = augment.per_image(x, ids, eraser, augment.ERASE, 0, 0)
    assert torch.equal(torch.get_rng_state(), state)
    changed = erased.abs().amax((1, 2, 3)) > 0
    assert 3 <= changed.sum() <= 18
    assert torch.equal(erased[7:20], augment.per_image(x[7:20], ids[7:20], eraser, augment.ERASE, 0, 0))
    assert not torch.equal(erased, augment.per_image(x, ids, eraser, augment.ERASE, 0, 1))


def test_unreadable_pictures(made, tmp_path, folder):
    """One in training is replaced by another, with that one's label; one in the test set is not counted."""
    shutil.copytree(folder, tmp_path / "files")
    for name in ("train/class1/01.png", "val/class2/02.png"):
        path = tmp_path / "files" / name
        path.write_bytes(path.read_bytes()[:60])
    pictures = data.load_data(str(tmp_path / "files"), True)
    loader = data.Loader(pictures, [augment.TRAIN_VIEW], (32, 32), 24)
    batch = next(loader.epoch(0))
    bad = pictures.files.index("class1/01.png")
    assert batch.shown[batch.ids == bad] != bad and (batch.shown == batch.ids).sum() == 23
    shown = batch.views[0][:][batch.ids == bad]
    stand_in = int(batch.shown[batch.ids == bad])
    alone = data.Loader(pictures, [augment.TRAIN_VIEW | dict(flip=0)], (32, 32), 24)
    own = next(alone.epoch(0)).views[0][:][batch.ids == stand_in]
    assert torch.allclose(shown, own) or torch.allclose(shown, own.flip(3))
    entry, _ = tune(made["graft"], tmp_path / "out", "--data", str(tmp_path / "files"), "--max-bad", "0.1")
    assert entry["tested"] == 12 and entry["labelled"] == 24


def test_saved_classifier_gives_the_same_logits(made, tmp_path, monkeypatch):
    kept = []
    evaluate = finetune.evaluate
    monkeypatch.setattr(finetune, "evaluate", lambda net, *rest: kept.append(net) or evaluate(net, *rest))
    for i, more in enumerate(((), ("--from-projector",), ("--probe-block", "2", "--blocks", "1"))):
        entry, content = tune(made["graft"], tmp_path / str(i), *more, "--lr", "1e-2", "--epochs", "3")
        net, loaded = finetune.load_classifier(str(tmp_path / str(i)))
        assert loaded["classes"] == data.embedded(True, 3).classes and not net.training
        test = data.embedded(False, 3)
        x = extract(net, test, function=lambda net, x: net(x), mean=loaded["mean"], std=loaded["std"])
        with torch.no_grad():
            assert torch.equal(net(torch.ones(2, 3, 32, 32)), kept[-1].eval()(torch.ones(2, 3, 32, 32)))
        assert (x.argmax(1) == test.labels).float().mean().item() * 100 == pytest.approx(entry["top1"], abs=0.006)
        assert x.argmax(1).unique().numel() > 1
    with pytest.raises(UsageError, match="not a classifier"):
        finetune.load_classifier(os.path.join(made["graft"], "encoder.pt"))


def test_statistics_and_size_come_from_the_checkpoint(made, tmp_path):
    content = checkpoint.read(os.path.join(made["graft"], "encoder.pt"))
    content["meta"]["mean"], content["meta"]["std"] = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    checkpoint.save(content, str(tmp_path / "encoder.pt"))
    _, saved = tune(str(tmp_path), tmp_path / "a")
    assert saved["mean"] == [0.1, 0.2, 0.3] and saved["std"] == [0.4, 0.5, 0.6]
    del content["meta"]["mean"], content["meta"]["std"]
    checkpoint.save(content, str(tmp_path / "encoder.pt"))
    _, saved = tune(str(tmp_path), tmp_path / "b", "--stats", "imagenet", "--img-size", "40x48")
    assert saved["mean"] == list(data.IMAGENET_STATS[0]) and saved["config"]["img_size"] == [40, 48]


def test_log_and_results_folder(made, tmp_path):
    entry, _ = tune(made["graft"], tmp_path / "run", "--epochs", "2", "--eval-every", "1", "--results", str(tmp_path))
    lines = [json.loads(line) for line in open(tmp_path / "run" / "log.jsonl")]
    assert [line["step"] for line in lines if "top1" in line] == [4, 8]
    assert round(lines[-1]["top1"], 2) == entry["top1"] <= entry["top5"]
    assert json.loads(open(tmp_path / "results.jsonl").read()) == entry
    assert not os.path.exists(tmp_path / "run" / "results.jsonl")


def test_protocol_names():
    def name(share=1, **given):
        return finetune.protocol_name(SimpleNamespace(**dict(from_projector=False, freeze_blocks=0, probe_block=None,
                                                             blocks=0) | given), share)

    assert name() == "fine-tune" and name(0.1016) == "10% fine-tune" and name(0.004) == "0.4% fine-tune"
    assert name(128116 / 1281167, from_projector=True) == "10% from projector"
    assert name(freeze_blocks=9) == "partial fine-tune 9" and name(probe_block=6) == "probe block 6 + 0 blocks"


@pytest.mark.parametrize("options, message", [
    (("--labels", "90 per class"), "has only"),
    (("--labels", "0%"), "out of range"),
    (("--labels", "some"), "neither a share"),
    (("--labels", "ONE_MISSING"), "no picture of 1 of the 4 classes"),
    (("--labels", "ONE_CLASS"), "one class only"),
    (("--labels", "UNKNOWN"), "do not exist"),
    (("--data", "UNLABELLED"), "no labels"),
    (("--freeze-blocks", "4"), "the encoder has 3 blocks"),
    (("--probe-block", "4"), "the encoder has 3 blocks"),
])
def test_bad_input(made, folder, tmp_path, options, message):
    lists = dict(ONE_MISSING=["class0/00.png", "class1/01.png", "class3/03.png"],
                 ONE_CLASS=["class0/00.png", "class0/04.png"], UNKNOWN=["class0/00.png", "nothing.png"])
    for name, lines in lists.items():
        (tmp_path / name).write_text("\n".join(lines))
    for part in ("train", "val"):
        (tmp_path / "UNLABELLED" / part).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "UNLABELLED" / part / "a.png")
    options = [str(tmp_path / word) if (tmp_path / word).exists() else word for word in options]
    with pytest.raises(UsageError, match=message):
        tune(made["graft"], tmp_path / "out", "--data", folder, *options)


@pytest.mark.parametrize("options, message", [
    (("--blocks", "2"), "--blocks goes with --probe-block"),
    (("--from-projector", "--freeze-blocks", "2"), "not allowed with"),
    (("--checkpoint", "nowhere"), "no checkpoint nowhere"),
    (("--rand-augment", "11"), "at most 10"),
])
def test_bad_options(made, options, message, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments(made["graft"], "unused", *options)
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_more_processes_than_pictures(made, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "setup", lambda *options: (torch.device("cpu"), 0, 20))
    with pytest.raises(UsageError, match="fewer than the 20 processes"):
        tune(made["graft"], tmp_path, "--labels", "1 per class")
    monkeypatch.setattr(run, "setup", lambda *options: (torch.device("cpu"), 0, 3))
    with pytest.raises(UsageError, match="--batch-size 40 is not divided by 3"):
        tune(made["graft"], tmp_path)


def test_rand_augment_needs_colours(made):
    pictures = data.Pictures(files=["a.png"], in_chans=4)
    with pytest.raises(UsageError, match="1 or 3 channels"):
        finetune.train_view(arguments(made["graft"], "unused", "--rand-augment", "9"), pictures)
