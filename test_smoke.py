"""Read this first: each stage once for real, and the identities of the method.

    python -m pytest                    # this and everything in tests/
    python -m pytest test_smoke.py      # this alone, under a minute
"""
import json
import math
import os
import socket

import pytest
import torch
import torch.nn.functional as F

import augment
import checkpoint
import data
import evaluate
import finetune
import graft_train
import mae_pretrain
import model
import run

TINY = dict(img_size=[16, 16], patch_size=4, dim=24, depth=3, heads=3)
# 96 images in class folders, a network of 3 blocks, float32 on the CPU
SHORT = ["--epochs", "2", "--batch-size", "16", "--log-every", "1", "--amp", "off",
         "--device", "cpu", "--workers", "0"]
GRAFT = ["--lr", "0.001,0.003,0.01", "--hidden-dim", "32"]
NEW = ["--arch", "vit_mini", "--patch-size", "8", "--img-size", "16"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Embedded images as PNG files: train/CLASS and val/CLASS of 4 classes."""
    from PIL import Image
    root = tmp_path_factory.mktemp("images")
    for part, n in (("train", 48), ("val", 24)):
        embedded = data.embedded(part == "train", n=4 * n)
        for i, image in enumerate(embedded.images):
            name = embedded.classes[embedded.labels[i]].split(" of ")[0]
            (root / part / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def mae(folder, tmp_path_factory):
    """The folder of step i, trained for real."""
    out = tmp_path_factory.mktemp("runs") / "mae"
    train(mae_pretrain, "--data", folder, *SHORT, *NEW, "--lr", "0.02", "--out", out)
    return out


def train(stage, *options):
    return stage.main(stage.get_args([str(option) for option in options]))


def log_of(out):
    with open(os.path.join(out, "log.jsonl")) as f:
        return [json.loads(line) for line in f]


def weights(out, name="encoder.pt"):
    return torch.load(os.path.join(out, name), weights_only=True)["model"]


# ------------------------------------------------------------------------------------ the stages
def test_step_one_trains_a_masked_autoencoder(mae):
    losses = [line["loss"] for line in log_of(mae)]
    assert len(losses) == 24 and sum(losses[-6:]) < 0.95 * sum(losses[:6])
    encoder = checkpoint.load(str(mae))
    assert encoder.forward_features(torch.zeros(2, 3, 16, 16)).shape == (2, 96)


def test_step_two_moves_each_stage_at_its_rate(folder, mae, tmp_path):
    """One step of AdamW moves a weight by its rate in force, whatever its gradient."""
    rates = [1e-4, 1e-3, 1e-2]
    once = ["--batch-size", "128", "--epochs", "1", "--warmup-epochs", "0", "--weight-decay", "0"]
    result = train(graft_train, "--data", folder, *SHORT, *once, "--init", mae,
                   "--hidden-dim", "32", "--lr", ",".join(map(str, rates)), "--out", tmp_path)
    start, end = weights(mae), weights(tmp_path)
    for name in (name for name in start if name.endswith("fc1.weight")):
        rate = rates[model.stage_of(model.layer_of(name, 6), 6, 3)] * 128 / 256
        assert (end[name] - start[name]).abs().max().item() == pytest.approx(rate, rel=1e-3), name
    assert result["step"] == 1 and result["path"] == str(tmp_path / "encoder.pt")


def test_evaluations_read_what_the_stages_wrote(folder, mae, tmp_path):
    graft = tmp_path / "graft"
    train(graft_train, "--data", folder, *SHORT, *GRAFT, "--init", mae, "--out", graft)
    where = ["--data", folder, *SHORT[-6:], "--out", tmp_path]
    for mode in (["linear", "--cache-features", "--epochs", "5"], ["knn", "--k", "5"],
                 ["fewshot", "--labels", "5 per class"]):
        entry, = train(evaluate, "--mode", *mode, *where, "--checkpoint", graft)
        assert 0 <= entry["top1"] <= 100 and entry["tested"] == 96
    entry = train(finetune, *where, "--checkpoint", graft, "--epochs", "1", "--batch-size", "16")
    assert entry["tested"] == 96 and len(run.read_results(tmp_path / "results.jsonl")) == 4


BOTH = [(mae_pretrain, [*NEW, "--lr", "0.02"]),
        (graft_train, [*GRAFT, "--mim-weight", "1", "--anchor-weight", "1e-4"])]


def train_both(rank, processes, port, folder, mae, out):
    """The two steps, in one of several processes that meet as torchrun's do."""
    if processes > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for (stage, options), init in zip(BOTH, ([], ["--init", mae])):
        train(stage, "--data", folder, *SHORT, "--epochs", "1", "--batch-size", "32",
              "--micro-batch", "6", *options, *init, "--out", out / f"{stage.__name__}{processes}")


def test_two_processes_equal_one(folder, mae, tmp_path):
    """Order, crops, masks are those of the images; BatchNorm, keys, losses those of the batch."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        train_both, (2, port, folder, mae, tmp_path), nprocs=2, start_method="forkserver")
    train_both(0, 1, None, folder, mae, tmp_path)
    for stage, _ in BOTH:
        one, two = (log_of(tmp_path / f"{stage.__name__}{n}") for n in (1, 2))
        steps = [line["step"] for line in one]
        assert steps == [line["step"] for line in two] == list(range(1, 7))
        for a, b in zip(one, two):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_stopped_run_goes_on_to_the_bit(folder, mae, tmp_path, monkeypatch):
    options = ["--data", folder, *SHORT, *GRAFT, "--init", mae, "--batch-size", "32"]
    train(graft_train, *options, "--out", tmp_path / "whole")
    vote = run.Job.vote
    with monkeypatch.context() as patch:
        patch.setattr(run.Job, "vote", lambda self, step: (
            (15, True) if step == 7 else vote(self, step)))
        with pytest.raises(run.Stopped):
            train(graft_train, *options, "--out", tmp_path / "parts")
    train(graft_train, *options, "--out", tmp_path / "parts")
    whole, parts = (weights(tmp_path / name, "last.pt") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert [line["loss"] for line in log_of(tmp_path / "whole")] == [
        line["loss"] for line in log_of(tmp_path / "parts")]


# --------------------------------------------------------------------- the identities of the method
def test_contrastive_loss_is_algorithm_1_of_moco_v3():
    q, k = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    expected = 0.0
    for i in range(4):
        logits = [F.cosine_similarity(q[i], k[j], dim=0).item() / 0.2 for j in range(4)]
        expected += (math.log(sum(map(math.exp, logits))) - logits[i]) / 4
    assert model.info_nce(q, k, 0.2).item() == pytest.approx(2 * 0.2 * expected, rel=1e-12)


def test_masking_keeps_the_patches_of_the_smallest_noise():
    net = model.MaskedAutoencoder(16, 1, 2, **TINY).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    noise = torch.rand(2, 16, dtype=torch.float64)
    loss, predicted, mask = net(images, 0.75, noise)
    assert mask.sum(1).tolist() == [12, 12]                             # 1 = removed
    assert (noise[mask == 0].view(2, 4).amax(1) < noise[mask == 1].view(2, 12).amin(1)).all()
    target = model.patchify(images, 4)
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    by_hand = (predicted - target).square().mean(-1)[mask == 1].mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-12)


def test_stages_are_equal_parts_and_every_parameter_is_in_one_group():
    net = model.MoCoV3(model.VisionTransformer(**TINY), hidden=16, out=8)
    groups = model.param_groups(net, 3, [1.0, 2.0, 3.0], 0.1)
    rate = {name: group["base_lr"] for group in groups for name in group["names"]}
    assert rate["base_encoder.cls_token"] == rate["base_encoder.blocks.0.norm1.weight"] == 1.0
    assert rate["base_encoder.blocks.1.mlp.fc1.bias"] == 2.0
    for name in ("base_encoder.norm.weight", "predictor.0.weight", "base_encoder.head.0.weight"):
        assert rate[name] == 3.0
    assert set(rate) == {name for name, p in net.named_parameters() if p.requires_grad}


def test_momentum_encoder_follows_and_the_schedules_end_where_they_must():
    net = model.MoCoV3(model.VisionTransformer(**TINY), hidden=16, out=8).double()
    before = {k: v.clone() for k, v in net.momentum_encoder.named_parameters()}
    with torch.no_grad():
        net.base_encoder.norm.bias.fill_(1.0)
    net.update_momentum(0.9)
    after = dict(net.momentum_encoder.named_parameters())
    expected = torch.full((24,), 0.1, dtype=torch.float64)
    assert torch.allclose(after["norm.bias"], expected, rtol=1e-12)
    assert torch.equal(after["head.0.weight"], before["head.0.weight"])
    assert model.momentum_at(0, 10) == 0.99 and model.momentum_at(10, 10) == 1.0
    assert model.lr_factor(5, 100, 10) == 0.5
    assert model.lr_factor(100, 100, 10) == pytest.approx(0.0)


@pytest.mark.parametrize("kind", ["MoCoV3", "VICReg", "SimCLR"])
def test_micro_batches_give_the_gradient_of_the_undivided_batch(kind):
    def gradients(micro_batch):
        torch.manual_seed(0)
        encoder = model.MaskedAutoencoder(16, 1, 2, **TINY)
        net = getattr(model, kind)(encoder, hidden=16, out=8, mim_weight=0.5).double()
        x1, x2, x3 = torch.randn(3, 6, 3, 16, 16, dtype=torch.float64)
        noise = torch.rand(6, 16, dtype=torch.float64)
        loss, _ = net(x1, x2, micro_batch, (x3, noise, 0.75))
        loss.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    whole, parts = gradients(6), gradients(4)
    assert (parts - whole).norm() < 1e-10 * whole.norm()


def test_randomness_belongs_to_the_image():
    ids = torch.tensor([7, 3, 11])
    whole = augment.uniform(ids, 5, 1, 2)
    assert torch.equal(whole[1:2], augment.uniform(ids[1:2], 5, 1, 2))
    assert not torch.equal(whole, augment.uniform(ids, 5, 1, 3))
    assert sorted(augment.shuffled(100, 0, 1).tolist()) == list(range(100))
