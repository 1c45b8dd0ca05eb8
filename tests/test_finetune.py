"""finetune.py: what each protocol trains, that nothing else moves, restarts, bad input."""
import json
import os
from types import SimpleNamespace

import pytest
import torch

import checkpoint
import data
import finetune
import model
import run
from conftest import QUIET, class_folder, corrupt, folder_of, log_of

DEPTH, DIM, CLASSES = 3, 24, 16
SCALE = 96 / 256                                            # of rates, where a batch is every image
# everything that draws random numbers
HARD = ["--rand-augment", "9", "--mixup", "0.8", "--cutmix", "1", "--erasing", "0.5",
        "--drop-path", "0.3"]
CPU = run.Env(torch.device("cpu"))


@pytest.fixture(autouse=True)
def small(world):
    """96 images to train on, 50 to test; a vit_mini of three blocks."""


@pytest.fixture
def made(encoder):
    """Folders of a MAE and of a grafted run, made by our own scripts."""
    return dict(mae=str(encoder.parent / "mae"), graft=str(encoder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of several sizes, read and not held: 4 classes, 24 images to train on, 16 to test."""
    return str(class_folder(tmp_path_factory.mktemp("files"), 6, 4, list("abcd"), sizes=3))


def arguments(path, out, *more):
    return finetune.get_args([*QUIET, "--checkpoint", path, "--out", str(out), "--batch-size", "24",
                              "--epochs", "1", *more])


def tune(path, out, *more):
    """(result, what classifier.pt holds) of a run."""
    entry = finetune.main(arguments(path, out, *more))
    return entry, checkpoint.read(os.path.join(out, "classifier.pt"))


def built(path, *more):
    """(network as it starts, what the checkpoint held)."""
    args = arguments(path, "unused", *more)
    source = checkpoint.read_encoder(args.checkpoint, args.weights)
    return finetune.build(args, source, CLASSES)[0], source


def moved_by(out, start, names):
    """Adam's first step moves a parameter by its rate, whatever the gradient: its median way."""
    last = checkpoint.read(str(out / "last.pt"))
    assert last["step"] == 1
    return {name: (last["model"][name] - start[name]).abs().median().item() for name in names}


# ------------------------------------------------------------------------------------ rates
def test_rates_fall_with_depth(made, tmp_path):
    lr, decay = 1e-3, 0.5
    tune(made["graft"], tmp_path, "--lr", str(lr), "--layer-decay", str(decay), "--batch-size",
         "96", "--warmup-epochs", "0", "--drop-path", "0")
    start = checkpoint.read_encoder(made["graft"])["state"]
    layers = {"patch_embed.proj.bias": 0, "blocks.0.mlp.fc2.bias": 1, "blocks.1.mlp.fc2.bias": 2,
              "blocks.2.mlp.fc2.bias": 3, "norm.weight": 4}
    for name, way in moved_by(tmp_path, start, layers).items():
        assert way == pytest.approx(lr * SCALE * decay ** (DEPTH + 1 - layers[name]), rel=0.1), name
    last = checkpoint.read(str(tmp_path / "last.pt"))
    assert torch.equal(last["model"]["pos_embed"], start["pos_embed"])
    groups = {name: group for group in last["optimizer"]["param_groups"] for name in group["names"]}
    assert set(groups) == set(last["model"]) - {"pos_embed"}
    undecayed = {name for name, group in groups.items() if group["weight_decay"] == 0}
    assert undecayed == {n for n in groups if n.endswith("bias") or "norm" in n or n == "cls_token"}
    assert {group["weight_decay"] for group in groups.values()} == {0, 0.05}


def test_rate_ends_at_min_lr(made, tmp_path):
    tune(made["graft"], tmp_path, "--lr", "1e-3", "--min-lr", "1e-5", "--log-every", "1",
         "--warmup-epochs", "0")
    lines, scale, floor = log_of(tmp_path), 24 / 256, 1e-5
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["lr"] == pytest.approx([1e-3 * scale])
    assert lines[2]["lr"] == pytest.approx([floor + (1e-3 * scale - floor) / 2])
    # with no room above the floor the rate stays where it is
    tune(made["graft"], tmp_path / "b", "--lr", "1e-6", "--min-lr", "1", "--log-every", "1",
         "--warmup-epochs", "0")
    assert all(line["lr"] == pytest.approx([1e-6 * scale]) for line in log_of(tmp_path / "b"))


def test_defaults(made, folder):
    def of(*options):
        return finetune.get_args(["--checkpoint", made["graft"], *options])

    args = of("--data", folder)
    assert (args.epochs, args.batch_size, args.lr, args.layer_decay) == (100, 1024, 5e-4, 0.6)
    assert (args.weight_decay, args.min_lr, args.drop_path) == (0.05, 1e-6, 0.1)
    assert (args.rand_augment, args.mixup, args.cutmix, args.erasing) == (9, 0.8, 1.0, 0.25)
    assert (args.label_smoothing, args.crop_min, args.warmup_epochs) == (0.1, 0.08, 5)
    # with a part of the labels every row of a table trains alike, with or without a projector
    for more in ((), ("--from-projector",), ("--freeze-blocks", "2")):
        args = of("--data", folder, "--labels", "10%", *more)
        assert (args.epochs, args.lr, args.layer_decay, args.mixup) == (400, 3e-5, 0.6, 0.8)
        assert of("--labels", "10%", *more).epochs == 60
        assert of(*more).epochs == of("--labels", "100%", *more).epochs == 10


# ------------------------------------------------------------------------------------ what trains
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
    expected = dict(protocol="fine-tune", labels="all", labelled=96, tested=50, unreadable=0,
                    system="MoCo v3 from MAE weights")    # one rate for all
    assert {k: entry[k] for k in expected} == expected
    for name, value in start["state"].items():
        assert torch.equal(content["model"][name], value) == (name == "pos_embed"), name
    assert content["head"] == {"kind": "linear"} and content["encoder_digest"] == entry["digest"]
    assert entry["digest"] == checkpoint.digest(checkpoint.load(made["graft"]))
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
    assert not net.intermediate(x, [2])[0].requires_grad                # no graph below
    assert torch.equal(net.intermediate(x, [2])[0], net.intermediate(x, [2])[0])
    assert not torch.equal(net(x), net(x))                              # drop path, above
    net(x).sum().backward()
    for name, p in net.named_parameters():
        assert (p.grad is None) == (model.layer_of(name, DEPTH) <= 2), name


@pytest.mark.parametrize("block, blocks", [(2, 1), (2, 2), (3, 1)])
def test_probe_trains_only_what_is_new(made, tmp_path, block, blocks):
    """New blocks directly on the block's tokens, then a new norm, also for the last block; dropped
    paths and layer decay count them as the highest layers."""
    lr, decay = 1e-3, 0.5
    options = ("--probe-block", str(block), "--blocks", str(blocks))
    entry, content = tune(made["graft"], tmp_path, *options, "--drop-path", "0", "--lr", str(lr),
                          "--layer-decay", str(decay), "--batch-size", "96", "--warmup-epochs",
                          "0")
    source = checkpoint.read_encoder(made["graft"])
    assert entry["protocol"] == f"probe block {block} + {blocks} blocks"
    assert entry["digest"] == checkpoint.digest(checkpoint.load(made["graft"]))
    torch.manual_seed(0)
    fresh, _ = built(made["graft"], *options, "--drop-path", "0.1")
    assert [b.drop_path for b in fresh.blocks[block:]] == [0.1] * blocks
    trained = {name for name, p in fresh.named_parameters() if p.requires_grad}
    new = tuple(f"blocks.{block + i}." for i in range(blocks))
    assert trained == {n for n in content["model"] if n.startswith(("norm.", "head.", *new))}
    for name, value in content["model"].items():
        assert torch.equal(value, fresh.state_dict()[name]) == (name not in trained), name
        assert name in trained or torch.equal(value, source["state"][name])
    layers = {f"blocks.{block + i}.mlp.fc2.bias": i for i in range(blocks)}
    layers["norm.weight"] = blocks
    for name, way in moved_by(tmp_path, fresh.state_dict(), layers).items():
        assert way == pytest.approx(lr * SCALE * decay ** (blocks - layers[name]), rel=0.1), name
    # the definition, written out with a plain encoder
    net, _ = checkpoint.load_classifier(str(tmp_path))
    encoder, x = checkpoint.load(made["graft"]), torch.rand(5, 3, 32, 32)
    with torch.no_grad():
        tokens, = encoder.intermediate(x, [block])
        for own in net.blocks[block:]:
            tokens = own(tokens)
        assert torch.allclose(net(x), net.head(net.norm(tokens[:, 0])), atol=1e-6)


def test_from_projector(made, tmp_path):
    entry, content = tune(made["graft"], tmp_path, "--from-projector", "--labels", "20%",
                          "--layer-decay", "0.6")
    assert entry["protocol"] == "20% from projector" and entry["labelled"] == 16
    assert entry["labels"].startswith("20%") and entry["batch_size"] == 16
    with pytest.raises(run.UsageError, match="no projector in it"):
        tune(made["mae"], tmp_path, "--from-projector")
    net, source = built(made["graft"], "--from-projector")
    weight = source["rest"]["head.0.weight"]
    assert weight.shape == (32, DIM) and torch.equal(net.head[0].weight, weight)
    assert 0 < (content["model"]["head.0.weight"] - weight).abs().max() < 1e-2  # started there
    x = torch.rand(2, 3, 32, 32)
    net.eval()
    with torch.no_grad():
        expected = net.forward_features(x) @ weight.T @ net.head[1].weight.T
        assert net.head[0].bias is None and torch.allclose(net(x), expected, rtol=1e-4, atol=1e-9)


def test_official_layout_and_weights(made, tmp_path):
    """A file as MoCo v3 writes them: the base or the momentum encoder, each with its projector."""
    last = checkpoint.read(os.path.join(made["graft"], "last.pt"))["model"]
    state = {f"module.{name}": value for name, value in last.items()}
    path = str(tmp_path / "moco.pth")
    torch.save({"state_dict": state, "arch": "vit", "epoch": 1}, path)
    for which in ("base", "momentum"):
        net, _ = built(path, "--from-projector", "--weights", which)
        assert torch.equal(net.head[0].weight, last[f"{which}_encoder.head.0.weight"])
        name = "blocks.2.mlp.fc1.weight"
        assert torch.equal(net.state_dict()[name], last[f"{which}_encoder.{name}"])


# ------------------------------------------------------------------------- seeds, processes
# -------------------------------------------------------------------------------- augmentation
@pytest.mark.parametrize("mixup, cutmix, kinds", [(0.8, 0, {"MixUp"}), (0, 1.0, {"CutMix"}),
                                                  (0.8, 1.0, {"MixUp", "CutMix"})])
def test_mixed_targets_say_what_is_in_the_image(mixup, cutmix, kinds):
    """Images of one value each: the mean of a mixed one is the mean of values by its target."""
    mix = finetune.mixing(SimpleNamespace(mixup=mixup, cutmix=cutmix), 6)
    values = torch.tensor([1.0, 5.0, -2.0, 0.0, 3.0, 9.0])
    images, labels = values[:, None, None, None].expand(6, 3, 16, 16).clone(), torch.arange(6)
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        mixed, targets = mix(images, labels)
        assert torch.allclose(targets.sum(1), torch.ones(6)) and (targets >= 0).all()
        assert torch.allclose(mixed.mean((1, 2, 3)), targets @ values, atol=1e-4)
        seen.add("CutMix" if torch.isin(mixed, values).all() else "MixUp")
    assert seen == kinds
    unmixed = finetune.mixing(SimpleNamespace(mixup=0, cutmix=0), 2)(images, labels)
    assert unmixed[0] is images and unmixed[1] is labels


def test_rand_augment_goes_by_image(made, folder):
    """Every image its own operations, the same whatever batch it comes in, others by epoch."""
    args = arguments(made["graft"], "unused", "--rand-augment", "9")
    plain_args = arguments(made["graft"], "unused", "--rand-augment", "0")
    for dataset in (data.embedded(True, 3).select(range(24)), data.load(folder, True)):
        def crops(args, batch_size, epoch=0, workers=0):
            view = finetune.train_view(args, dataset)
            loader = data.Loader(dataset, [view], (32, 32), batch_size, 3, workers)
            parts = [(batch.ids, batch.view(0)) for batch in loader.epoch(epoch)]
            ids, x = (torch.cat(values) for values in zip(*parts))
            return x[ids.argsort()]

        x = crops(args, 24)
        assert torch.equal(x, crops(args, 8, workers=2 if dataset.images is None else 0))
        untouched = (x - crops(plain_args, 24)).abs().amax((1, 2, 3)) < 0.02
        assert 2 <= untouched.sum() <= 15                               # 1/4 and a little more
        assert not torch.equal(x, crops(args, 24, epoch=1))


# ---------------------------------------------------------------------------- what is read, written
def test_unreadable_images_are_left_out(made, tmp_path, monkeypatch):
    root = class_folder(tmp_path / "files", 6, 4, sizes=3)
    for name in ("train/cat/1.png", "val/dog/2.png"):
        corrupt(root / name)
    seen, mixing = [], finetune.mixing
    monkeypatch.setattr(finetune, "mixing", lambda *a: lambda images, labels: (
        seen.append(len(images)), mixing(*a)(images, labels))[1])
    entry, _ = tune(made["graft"], tmp_path / "out", "--data", str(root), "--max-bad", "0.2",
                    "--batch-size", "12", "--epochs", "2")
    assert entry["tested"] == 7 and entry["labelled"] == 12 and entry["unreadable"] == 2
    assert seen == [11, 11]                                         # no image under a wrong label


def test_processes_weigh_all_images_alike_where_one_cannot_be_read(made, tmp_path, start):
    root = class_folder(tmp_path / "files", 6, 4, sizes=3)
    corrupt(root / "train/cat/1.png")
    still = [word for option in ("rand-augment", "mixup", "cutmix", "erasing", "drop-path")
             for word in (f"--{option}", "0")]
    gradients = []                                                  # a tenth of that of one step
    for n in (1, 2):
        out = tmp_path / str(n)
        job = start("finetune", *QUIET, "--checkpoint", made["graft"], "--out", out, "--data", root,
                    *still, "--max-bad", "0.2", "--batch-size", "12", "--epochs", "1", processes=n)
        assert job.codes() == [0] * n, job.said()
        state = checkpoint.read(str(out / "last.pt"))["optimizer"]["state"].values()
        gradients.append(torch.cat([moments["exp_avg"].flatten() for moments in state]))
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()


def logits_of(out, folder=None):
    net, content = checkpoint.load_classifier(str(out))
    return run.extract(net, data.load(folder, False), CPU, function=lambda net, x: net(x),
                       mean=content["mean"], std=content["std"])[0]


def test_saved_classifier_gives_the_same_logits(made, tmp_path):
    for i, more in enumerate(((), ("--from-projector",), ("--probe-block", "2"))):
        out = tmp_path / str(i)
        entry, content = tune(made["graft"], out, *more, "--lr", "1e-2", "--epochs", "3")
        x, labels = logits_of(out), data.embedded(False).labels
        right = (x.argmax(1) == labels).float().mean().item() * 100
        assert right == pytest.approx(entry["top1"], abs=0.006) and x.argmax(1).unique().numel() > 1
    with pytest.raises(checkpoint.CheckpointError, match="not a classifier"):
        checkpoint.load_classifier(os.path.join(made["graft"], "encoder.pt"))
    content["model"]["head.weight"][0, 0] = float("nan")
    checkpoint.save(content, str(tmp_path / "nan.pt"))
    with pytest.raises(checkpoint.CheckpointError, match="not a finite number"):
        checkpoint.load_classifier(str(tmp_path / "nan.pt"))


def test_statistics_and_size_come_from_the_checkpoint(made, tmp_path):
    content = checkpoint.read(os.path.join(made["graft"], "encoder.pt"))
    content["meta"]["mean"], content["meta"]["std"] = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    checkpoint.save(content, str(tmp_path / "encoder.pt"))
    _, saved = tune(str(tmp_path), tmp_path / "a")
    assert saved["mean"] == [0.1, 0.2, 0.3] and saved["std"] == [0.4, 0.5, 0.6]
    _, saved = tune(str(tmp_path), tmp_path / "b", "--stats", "imagenet", "--img-size", "40x48")
    assert saved["mean"] == list(data.IMAGENET_STATS[0]) and saved["config"]["img_size"] == [40, 48]


def test_log_and_results_folder(made, tmp_path):
    entry, _ = tune(made["graft"], tmp_path / "run", "--epochs", "2", "--eval-every", "1",
                    "--results", str(tmp_path), "--per-class")
    lines = log_of(tmp_path / "run")
    assert [line["step"] for line in lines if "top1" in line] == [4, 8]
    assert round(lines[-1]["top1"], 2) == entry["top1"] <= entry["top5"]
    assert json.loads(open(tmp_path / "results.jsonl").read()) == entry
    assert not os.path.exists(tmp_path / "run" / "results.jsonl")
    assert os.path.exists(tmp_path / "run" / "per-class-finetune.csv")


def test_a_run_with_other_labels_or_epochs_is_refused(made, tmp_path):
    names = [f"{i}.png" for i in range(20)]
    root, table = folder_of(tmp_path / "data", names, (32, 32)), tmp_path / "labels.csv"

    def go(turned, *more):
        rows = [f"{name},{'xy'[(i + turned) % 2]},{'val' if i > 15 else 'train'}\n"
                for i, name in enumerate(names)]
        table.write_text("file,label,split\n" + "".join(rows))
        return tune(made["mae"], tmp_path / "out", "--data", root, "--labels-file", str(table),
                    "--batch-size", "8", *more)

    go(0)
    for turned, more, words in ((1, (), "labels_digest"), (0, ("--epochs", "2"), "epochs 1, now")):
        with pytest.raises(run.UsageError, match=f"{words}.*use another --out, or --resume never"):
            go(turned, *more)


def test_more_processes_than_images(made, tmp_path, monkeypatch):
    for processes, message in ((20, "fewer than the 20 processes"), (3, "not divided by 3")):
        monkeypatch.setattr(run, "setup", lambda args: run.Env(CPU.device, None, 0, processes))
        with pytest.raises(run.UsageError, match=message):
            tune(made["graft"], tmp_path, "--labels", "1 per class", "--batch-size", "40")
