"""What the code must hold: against loops written out from the papers' formulas, against torch's, torchvision's and
timm's own modules, and in small runs of the two training scripts.

    python -m pytest test_smoke.py
"""
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("DATA", None)

import copy
import itertools
import json
import math
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as tv
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import augment
import checkpoint
import data
import graft_train
import mae_pretrain
import model
import run

torch.set_num_threads(1)

HERE = os.path.dirname(os.path.abspath(__file__))
TINY = dict(img_size=16, patch_size=4, dim=24, depth=3, heads=3)            # 16 patches
EXACT = dict(rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ helpers
def randomise(net, seed=0, scale=0.1):
    """Move every weight away from its initial value, so that no zero bias hides an error."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def vit(dtype=torch.float64, **changes):
    torch.manual_seed(0)
    return randomise(model.VisionTransformer(**TINY | changes)).to(dtype)


def mae(dtype=torch.float64, norm_pix_loss=True, **changes):
    torch.manual_seed(0)
    return randomise(model.MaskedAutoencoder(16, 2, 2, norm_pix_loss, **TINY | changes)).to(dtype)


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pictures_like(n, h, w, seed=0):
    """Random uint8 pictures (n, 3, h, w) with large and small structure."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(seed + 1))
    x = 0.7 * F.interpolate(coarse, size=(h, w), mode="bilinear") + 0.3 * fine
    return (x * 255).to(torch.uint8)


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a, b, **tolerance):
    """Two dicts of tensors with the same keys and close values."""
    assert set(a) == set(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}", **(tolerance or EXACT))


def assert_identical(a, b):
    assert set(a) == set(b)
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different


# ------------------------------------------------------------------------------------------------ encoder
def test_block_equals_torch_encoder_layer():
    block = vit().blocks[1]
    layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu", layer_norm_eps=1e-6,
                                       batch_first=True, norm_first=True).double()
    names = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "self_attn.in_proj", "attn.proj": "self_attn.out_proj",
             "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
    state = {}
    for name, value in block.state_dict().items():
        module, kind = name.rsplit(".", 1)
        joint = "_" if module == "attn.qkv" else "."
        state[names[module] + joint + kind] = value
    layer.load_state_dict(state, strict=True)
    x = rand(2, 5, 24)
    torch.testing.assert_close(block(x), layer(x), **EXACT)


@pytest.mark.parametrize("size", [16, (8, 24)])
def test_vit_equals_timm(size):
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    ours = vit(img_size=size)
    theirs = timm_vit.VisionTransformer(img_size=size, patch_size=4, embed_dim=24, depth=3, num_heads=3,
                                        num_classes=0, global_pool="token").double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = rand(2, 3, *model.pair(size))
    torch.testing.assert_close(ours.tokens(x), theirs.forward_features(x), **EXACT)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    torch.testing.assert_close(ours.forward_features(x), theirs(x), **EXACT)
    _, middle = theirs.forward_intermediates(x, indices=[0, 1], return_prefix_tokens=True, output_fmt="NLC")
    for mine, (patches, prefix) in zip(ours.intermediate(x, [1, 2]), middle):
        torch.testing.assert_close(mine, torch.cat([prefix, patches], 1), **EXACT)


def test_intermediate_and_attention_agree_with_the_plain_forward():
    net, x = vit(), rand(2, 3, 16, 16)
    outputs, weights = net.intermediate(x, attention=True)
    assert len(outputs) == len(weights) == 3
    torch.testing.assert_close(net.norm(outputs[-1]), net.tokens(x), **EXACT)
    torch.testing.assert_close(torch.stack(outputs), torch.stack(net.intermediate(x)), **EXACT)
    second, weights_to_second = net.intermediate(x, [2], attention=True)
    assert len(weights_to_second) == 2                                      # no block is run in vain
    torch.testing.assert_close(second[0], outputs[1], **EXACT)
    with pytest.raises(ValueError, match="blocks 1 to 3"):
        net.intermediate(x, [4])
    # the weights of the second block, written out
    attn, tokens = net.blocks[1].attn, net.blocks[1].norm1(outputs[0])
    q, k, _ = attn.qkv(tokens).chunk(3, dim=-1)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        logits = torch.einsum("nid,njd->nij", q[..., part], k[..., part]) / math.sqrt(8)
        torch.testing.assert_close(weights[1][:, head], logits.softmax(-1), **EXACT)


def test_attention_in_bfloat16_on_a_cpu_equals_the_fused_kernel():
    attn, x = vit(torch.bfloat16).blocks[0].attn, rand(2, 17, 24).bfloat16()
    q, k, v = attn.qkv(x).reshape(2, 17, 3, 3, 8).permute(2, 0, 3, 1, 4)
    fused = attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 17, 24))
    torch.testing.assert_close(attn(x), fused, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("grid", [(2, 2), (2, 3), (3, 1)])
def test_position_table_is_the_formula(grid):
    table, dim = model.sincos_pos_embed(8, grid)[0].double(), 8
    assert table.shape == (1 + grid[0] * grid[1], dim)
    assert table[0].eq(0).all()
    for y, x in itertools.product(range(grid[0]), range(grid[1])):
        w = [10000 ** (-i / (dim / 4)) for i in range(dim // 4)]
        row = [f(position * f_i) for position in (x, y) for f in (math.sin, math.cos) for f_i in w]
        torch.testing.assert_close(table[1 + y * grid[1] + x], torch.tensor(row, dtype=torch.float64),
                                   rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        model.sincos_pos_embed(10, grid)


@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_orders_row_column_channel_and_unpatchify_inverts_it(channels):
    images = torch.arange(2 * channels * 4 * 6).reshape(2, channels, 4, 6)
    patches = model.patchify(images, 2)
    assert patches.shape == (2, 6, 4 * channels)
    for gy, gx, y, x, c in itertools.product(range(2), range(3), range(2), range(2), range(channels)):
        expected = images[:, c, 2 * gy + y, 2 * gx + x]
        assert torch.equal(patches[:, gy * 3 + gx, (y * 2 + x) * channels + c], expected)
    assert torch.equal(model.unpatchify(patches, 2, (2, 3)), images)


def test_masked_embedding_selects_from_the_full_one():
    net, x = vit(img_size=(8, 24)), rand(2, 3, 8, 24)
    ids = torch.tensor([[5, 0, 11], [3, 7, 1]])
    full, some = net.embed(x), net.embed(x, ids)
    assert torch.equal(some[:, 0], full[:, 0])
    for n, k in itertools.product(range(2), range(3)):
        torch.testing.assert_close(some[n, 1 + k], full[n, 1 + ids[n, k]], **EXACT)
    conv = net.patch_embed.proj(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(full[:, 1:], conv + net.pos_embed[:, 1:], **EXACT)
    with pytest.raises(ValueError, match="pixels"):
        net.embed(rand(2, 3, 24, 8))


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = model.drop_path(x, 0.25, training=True)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert y.eq(y[:, :1, :1]).all()                                         # an image is kept or dropped whole
    assert abs(y.mean() - 1) < 0.05
    assert model.drop_path(x, 0.25, training=False) is x
    rates = [block.drop_path for block in vit(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


# ---------------------------------------------------------------------------------------------------- MAE
def mae_by_loop(net, images, noise, keep):
    """(loss, pred) image by image and patch by patch, the tokens never shuffled."""
    losses, predictions = [], []
    p, grid = net.patch_size, net.grid
    for image, u in zip(images, noise):
        kept = sorted(u.argsort()[:keep].tolist())
        tokens = net.embed(image[None])[:, [0] + [1 + i for i in kept]]
        for block in net.blocks:
            tokens = block(tokens)
        tokens = net.decoder_embed(net.norm(tokens))[0]
        full = [tokens[0]] + [tokens[1 + kept.index(i)] if i in kept else net.mask_token[0, 0]
                              for i in range(grid[0] * grid[1])]
        x = torch.stack(full)[None] + net.decoder_pos_embed
        for block in net.decoder_blocks:
            x = block(x)
        pred = net.decoder_pred(net.decoder_norm(x))[0, 1:]
        for i in range(grid[0] * grid[1]):
            if i in kept:
                continue
            top, left = i // grid[1] * p, i % grid[1] * p
            target = image[:, top:top + p, left:left + p].permute(1, 2, 0).flatten()
            if net.norm_pix_loss:
                mean = target.sum() / len(target)
                variance = ((target - mean) ** 2).sum() / (len(target) - 1)
                target = (target - mean) / torch.sqrt(variance + 1e-6)
            losses.append(((pred[i] - target) ** 2).sum() / len(target))
        predictions.append(pred)
    return sum(losses) / len(losses), torch.stack(predictions)


@pytest.mark.parametrize("norm_pix_loss, ratio, size", [(True, 0.75, 16), (False, 0.5, (8, 24)), (True, 0.6, (8, 12))])
def test_mae_equals_a_loop_over_images_and_patches(norm_pix_loss, ratio, size):
    net = mae(norm_pix_loss=norm_pix_loss, img_size=size)
    length = net.grid[0] * net.grid[1]
    images, noise = rand(3, 3, *model.pair(size)), rand(3, length, seed=1).sigmoid()
    loss, pred, mask = net(images, ratio, noise)
    loss.backward()
    ours = gradients(net)
    net.zero_grad()
    expected, expected_pred = mae_by_loop(net, images, noise, int(length * (1 - ratio)))
    expected.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(pred, expected_pred, **EXACT)
    assert_same(ours, gradients(net))
    kept = noise.argsort(1)[:, :int(length * (1 - ratio))]
    assert torch.equal(mask, torch.ones_like(mask).scatter(1, kept, 0.0))   # 0 at the smallest noise


def test_only_masked_patches_are_learnt_and_only_kept_ones_are_seen():
    net, noise = mae(), rand(2, 16, seed=1).sigmoid()
    images = rand(2, 3, 16, 16).requires_grad_()
    loss, pred, mask = net(images, 0.75, noise)
    assert mask.sum(1).tolist() == [12, 12]
    pred.retain_grad()
    pred.square().sum().backward(retain_graph=True)
    seen = model.patchify(images.grad, 4).abs().sum(-1)
    assert torch.equal(seen > 0, mask == 0)
    pred.grad = None
    loss.backward()
    assert torch.equal(pred.grad.abs().sum(-1) > 0, mask == 1)


def test_mae_draws_noise_when_none_is_given():
    net, images = mae(torch.float32), rand(4, 3, 16, 16, dtype=torch.float32)
    masks = [net(images)[2] for _ in range(2)]
    assert masks[0].sum(1).eq(12).all()
    assert not torch.equal(masks[0], masks[1])


# ------------------------------------------------------------------------------------------------- losses
def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("rank", [0, 1])
def test_info_nce_equals_a_loop(rank):
    q, k, tau = rand(3, 5), rand(6, 5, seed=1), 0.3
    total = 0.0
    for i in range(3):
        logits = [cosine(q[i], k[j]) / tau for j in range(6)]
        total -= logits[3 * rank + i] - math.log(sum(math.exp(z) for z in logits))
    assert model.info_nce(q, k, tau, rank).item() == pytest.approx(2 * tau * total / 3, rel=1e-12)


def test_chance_level_of_the_contrastive_loss():
    collapsed = torch.ones(64, 8)
    both = 2 * model.info_nce(collapsed, collapsed, 0.2)
    assert both.item() == pytest.approx(4 * 0.2 * math.log(64), rel=1e-6)


def test_nt_xent_equals_a_loop_and_ranks_average_to_the_whole():
    z1, z2, tau = rand(4, 5), rand(4, 5, seed=1), 0.5
    z = torch.cat([z1, z2])
    total = 0.0
    for i in range(8):
        others = [j for j in range(8) if j != i]
        positive = cosine(z[i], z[(i + 4) % 8]) / tau
        total -= positive - math.log(sum(math.exp(cosine(z[i], z[j]) / tau) for j in others))
    whole = model.nt_xent(z1, z2, tau)
    assert whole.item() == pytest.approx(total / 8, rel=1e-12)
    parts = [model.nt_xent(z1, z2, tau, rank, 2) for rank in (0, 1)]
    assert parts[0] != parts[1]
    torch.testing.assert_close(sum(parts) / 2, whole, **EXACT)


def test_vicreg_terms_equal_loops():
    x, y = 0.3 * rand(5, 4), 0.3 * rand(5, 4, seed=1)                       # small: the hinge is active
    n, width = x.shape
    invariance = sum(float(x[i, j] - y[i, j]) ** 2 for i in range(n) for j in range(width)) / (n * width)
    variance, covariance = 0.0, 0.0
    for z in (x, y):
        mean = [sum(float(z[i, j]) for i in range(n)) / n for j in range(width)]
        for a, b in itertools.product(range(width), range(width)):
            cov = sum(float(z[i, a] - mean[a]) * float(z[i, b] - mean[b]) for i in range(n)) / (n - 1)
            if a == b:
                variance += max(0.0, 1 - math.sqrt(cov + 1e-4)) / width / 2
            else:
                covariance += cov ** 2 / width
    assert [t.item() for t in model.vicreg_terms(x, y)] == pytest.approx([invariance, variance, covariance], rel=1e-10)
    assert model.vicreg_terms(100 * x, 100 * y)[1].item() == 0               # the hinge is at 1


def test_anchor_penalty_sums_over_all_parameters():
    now, then = [rand(2, 3), rand(4, seed=1)], [rand(2, 3, seed=2), rand(4, seed=3)]
    distances = [float(a - b) for w, v in zip(now, then) for a, b in zip(w.flatten(), v.flatten())]
    assert model.anchor_penalty(now, then, "l1").item() == pytest.approx(sum(map(abs, distances)))
    assert model.anchor_penalty(now, then, "l2").item() == pytest.approx(sum(d * d for d in distances))


def test_feature_stats_show_a_collapse():
    spread = torch.cat([torch.eye(8), -torch.eye(8)])
    stats = model.feature_stats(spread, spread, spread)
    assert stats["acc"] == 1
    assert stats["rank"].item() == pytest.approx(8, rel=1e-4)               # eight equal singular values
    assert stats["std"].item() == pytest.approx(math.sqrt(2 / 15), rel=1e-4)
    collapsed = torch.ones(16, 8)
    stats = model.feature_stats(collapsed, collapsed, collapsed)
    assert stats["std"] == 0 and stats["rank"].item() < 1.01
    second = model.feature_stats(spread[8:], spread[8:], spread, rank=1)
    assert second["acc"] == 1                                               # rows 8 to 15 of the gathered keys
    broken = torch.full((4, 8), float("nan"))
    model.feature_stats(broken, broken, broken)                             # it is the run that names such a step


# ------------------------------------------------------------------------------------ contrastive models
SYSTEMS = ("moco", "vicreg", "simclr")


def contrastive(system, mim=False, dtype=torch.float64):
    torch.manual_seed(0)
    encoder = model.MaskedAutoencoder(16, 1, 2, **TINY) if mim else model.VisionTransformer(**TINY)
    kind = {"moco": model.MoCoV3, "vicreg": model.VICReg, "simclr": model.SimCLR}[system]
    return randomise(kind(encoder, 32, 16, mim_weight=0.7 * mim)).to(dtype).train()


def vit_names(depth):
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    return names | {f"blocks.{i}.{part}.{kind}" for i in range(depth) for part in parts for kind in ("weight", "bias")}


def head_names(prefix, linear, norm, plain_norm):
    names = {f"{prefix}.{i}.weight" for i in linear + norm} | {f"{prefix}.{i}.bias" for i in norm}
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return names | {f"{prefix}.{i}.{buffer}" for i in norm + plain_norm for buffer in buffers}


def test_moco_state_names_are_the_official_ones():
    head = head_names("head", (0, 3, 6), (1, 4), (7,))
    expected = {f"{net}.{name}" for net in ("base_encoder", "momentum_encoder") for name in vit_names(3) | head}
    expected |= head_names("predictor", (0, 3), (1,), (4,))
    assert set(contrastive("moco").state_dict()) == expected


def test_moco_starts_with_a_copy_as_momentum_encoder():
    torch.manual_seed(0)
    net = model.MoCoV3(model.VisionTransformer(**TINY), 32, 16)
    assert_identical(net.base_encoder.state_dict(), net.momentum_encoder.state_dict())
    assert not any(p.requires_grad for p in net.momentum_encoder.parameters())
    shapes = [tuple(p.shape) for name, p in net.base_encoder.head.named_parameters() if p.ndim == 2]
    assert shapes == [(32, 24), (32, 32), (16, 32)]
    assert [tuple(p.shape) for p in net.predictor.parameters() if p.ndim == 2] == [(32, 16), (16, 32)]


def head_by_hand(head, x):
    """A head of MoCo v3 with torch's batch normalisation, in training mode."""
    for layer in head:
        if isinstance(layer, nn.BatchNorm1d):
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
        else:
            x = F.relu(x) if isinstance(layer, nn.ReLU) else F.linear(x, layer.weight, layer.bias)
    return x


def test_moco_equals_its_formula_and_no_gradient_reaches_the_keys():
    net, x1, x2 = contrastive("moco"), rand(6, 3, 16, 16), rand(6, 3, 16, 16, seed=1)
    assert not torch.equal(net.momentum_encoder.cls_token, net.base_encoder.cls_token)
    loss = net(x1, x2)
    loss.backward()
    assert all(p.grad is None for p in net.momentum_encoder.parameters())
    ours = gradients(net)
    net.zero_grad()
    q = [head_by_hand(net.predictor, head_by_hand(net.base_encoder.head, net.base_encoder.forward_features(x)))
         for x in (x1, x2)]
    k = [head_by_hand(net.momentum_encoder.head, net.momentum_encoder.forward_features(x)).detach() for x in (x1, x2)]
    expected = 0.0
    for a, b in ((q[0], k[1]), (q[1], k[0])):
        similarity = F.cosine_similarity(a[:, None], b[None], dim=-1) / net.temperature
        expected = expected - 2 * net.temperature * similarity.log_softmax(1).diagonal().mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, **EXACT)
    assert_same(ours, gradients(net))


def test_momentum_update():
    net = contrastive("moco")
    before = copy.deepcopy(net.state_dict())
    net.update_momentum(0.9)
    after = net.state_dict()
    for name in after:
        expected = before[name]
        if name.startswith("momentum_encoder.") and "running_" not in name and "num_batches" not in name:
            expected = 0.9 * before[name] + 0.1 * before[name.replace("momentum_encoder", "base_encoder")]
            torch.testing.assert_close(after[name], expected, **EXACT)
        else:
            assert torch.equal(after[name], expected), name
    # weights that are equal stay equal to the last bit
    net = model.MoCoV3(vit(torch.float32), 32, 16)
    for m in (0.99, 0.9973, 0.3, 1.0):
        net.update_momentum(m)
    for name, p in net.momentum_encoder.named_parameters():
        assert torch.equal(p, dict(net.base_encoder.named_parameters())[name]), name


def test_multi_task_loss_is_the_sum():
    net, x1, x2 = contrastive("moco", mim=True), rand(4, 3, 16, 16), rand(4, 3, 16, 16, seed=1)
    images, noise = rand(4, 3, 16, 16, seed=2), rand(4, 16, seed=3).sigmoid()
    log = {}
    loss = net(x1, x2, mim=(images, noise, 0.75), log=log)
    alone = net(x1, x2)
    reconstruction = net.base_encoder(images, 0.75, noise)[0]
    torch.testing.assert_close(loss, alone + 0.7 * reconstruction, **EXACT)
    torch.testing.assert_close(log["contrastive"], alone.detach(), **EXACT)
    torch.testing.assert_close(log["mim"], reconstruction.detach(), **EXACT)


@pytest.mark.parametrize("mim", [False, True])
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_loss_of_a_fixed_batch_falls(system, mim):
    net = contrastive(system, mim, torch.float32)
    views = [rand(8, 3, 16, 16, seed=s, dtype=torch.float32) for s in (1, 2, 3)]
    noise = rand(8, 16, seed=4, dtype=torch.float32).sigmoid()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=2e-3)
    logs = []
    for _ in range(30):
        logs.append({})
        net.update_momentum(0.9)
        loss = net(views[0], views[1], mim=(views[2], noise, 0.75) if mim else None, log=logs[-1])
        logs[-1]["loss"] = loss.detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for key in ("loss", "contrastive", "mim") if mim else ("loss",):
        assert logs[-1][key] < 0.7 * logs[0][key], (key, logs[0][key], logs[-1][key])


# ------------------------------------------------------------------------------------------ micro-batches
BATCH = 6
CASES = [(system, mim, anchor) for system in SYSTEMS for mim in (False, True) for anchor in (False, True)]


def one_step(case, part=slice(None), micro=0, wrap=lambda net: net):
    """Loss, gradients and the state after a step of SGD and a momentum update, on a part of a fixed batch."""
    system, mim, anchor = case
    net = contrastive(system, mim)
    wrapped = wrap(net)
    views = [rand(BATCH, 3, 16, 16, seed=s)[part] for s in (1, 2, 3)]
    noise = rand(BATCH, 16, seed=4).sigmoid()[part]
    loss = wrapped(views[0], views[1], micro, (views[2], noise, 0.75) if mim else None)
    if anchor:
        lower = [p for name, p in net.base_encoder.named_parameters()
                 if model.layer_of(name, 3) <= 2 and p.requires_grad]
        start = [rand(*p.shape, seed=5) for p in lower]
        loss = loss + 0.01 * model.anchor_penalty(lower, start, "l1") + 0.02 * model.anchor_penalty(lower, start, "l2")
    loss.backward()
    grads = gradients(net)
    with torch.no_grad():
        for p in net.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    net.update_momentum(0.9)
    return {"loss": loss.detach()}, grads, net.state_dict()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_equal_the_undivided_step(case):
    whole = one_step(case)
    assert any("running_mean" in name for name in whole[2])
    for micro in (1, 2, 4, BATCH, 100):                                     # 4 does not divide 6
        for ours, expected in zip(one_step(case, micro=micro), whole):
            assert_same(ours, expected)


def test_micro_batches_keep_fewer_activations():
    """The bytes that autograd keeps for the encoder fall with the micro-batch."""
    def kept(micro):
        net, x = contrastive("simclr"), rand(32, 3, 16, 16)
        sizes = {}

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            f = model.class_tokens(net.base_encoder, x, x, micro)
        assert f[0].shape == (32, 24)
        return sum(sizes.values())
    assert kept(4) < 0.2 * kept(0)


# ------------------------------------------------------------------------------------------ two processes
def normalised_batch(norm, part=slice(None)):
    """Outputs, input gradients and running statistics of two training steps and one in evaluation mode."""
    x, upstream = 3 * rand(8, 5) + 1, rand(8, 5, seed=1)
    found = {}
    for i in range(2):
        leaf = (x[part] + i).requires_grad_()
        y = norm(leaf)
        y.backward(upstream[part])
        found |= {f"y{i}": y.detach(), f"x{i}": leaf.grad}
    norm.eval()
    found["eval"] = norm(x[part]).detach()
    return found, norm.state_dict()


def batchnorms():
    """Ours and torch's with the same weights, with and without affine."""
    for affine in (True, False):
        pair = [kind(5, affine=affine).double() for kind in (model.BatchNorm1d, nn.BatchNorm1d)]
        for norm in pair:
            if affine:
                norm.weight.data, norm.bias.data = rand(5, seed=2), rand(5, seed=3)
        yield pair


def in_a_process(rank, folder):
    """What each of two processes computes of its half of the batch, written to a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    half, found = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2), {}
    for case in CASES:
        for micro in (0, 2):                                                # 2 does not divide the 3 images of each
            found[case, micro] = one_step(case, half, micro,
                                          lambda net: DistributedDataParallel(net, broadcast_buffers=False))
    found["norm"] = [normalised_batch(ours, slice(rank * 4, rank * 4 + 4)) for ours, _ in batchnorms()]
    rows = rand(6, 2)[half]
    leaf = rows.clone().requires_grad_()
    weights = rand(6, 2, seed=10 + rank)
    (model.gather_with_grad(leaf) * weights).sum().backward()
    found["gather"] = model.gather(rows), leaf.grad
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("processes"))
    torch.multiprocessing.spawn(in_a_process, (folder,), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in (0, 1)]


@pytest.mark.parametrize("micro", [0, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_equal_one_on_the_whole_batch(two_processes, case, micro):
    loss, grads, state = one_step(case)
    both = [found[case, micro] for found in two_processes]
    torch.testing.assert_close((both[0][0]["loss"] + both[1][0]["loss"]) / 2, loss["loss"], **EXACT)
    for _, ours, weights in both:
        assert_same(ours, grads)
        assert_same(weights, state)


def test_batchnorm_in_one_process_is_torchs():
    for ours, torchs in batchnorms():
        for a, b in zip(normalised_batch(ours), normalised_batch(torchs)):
            assert_same(a, b)


def test_batchnorm_in_two_processes_is_torchs_on_the_whole_batch(two_processes):
    for i, (_, torchs) in enumerate(batchnorms()):
        expected, state = normalised_batch(torchs)
        halves = [found["norm"][i] for found in two_processes]
        assert_same({k: torch.cat([halves[0][0][k], halves[1][0][k]]) for k in expected}, expected)
        for _, ours in halves:
            assert_same(ours, state)


def test_gathering(two_processes):
    rows, total = rand(6, 2), rand(6, 2, seed=10) + rand(6, 2, seed=11)
    for rank, found in enumerate(two_processes):
        gathered, grad = found["gather"]
        assert torch.equal(gathered, rows)                                  # in rank order
        torch.testing.assert_close(grad, total[3 * rank:3 * rank + 3], **EXACT)


def test_batchnorm_keeps_its_statistics_when_a_batch_is_not_finite():
    norm = model.BatchNorm1d(5)
    norm(rand(8, 5, dtype=torch.float32))
    before = copy.deepcopy(norm.state_dict())
    assert norm(torch.full((8, 5), float("nan"))).isnan().all()
    for name in ("running_mean", "running_var"):
        assert torch.equal(norm.state_dict()[name], before[name])


def test_batchnorm_leaves_half_precision():
    norm = model.BatchNorm1d(5)
    assert norm(rand(8, 5).bfloat16()).dtype == torch.float32


# -------------------------------------------------------------------------------------- rates, schedules
def test_layers_and_stages():
    names = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0, "blocks.0.norm1.weight": 1,
             "blocks.11.mlp.fc2.bias": 12, "norm.weight": 13, "head.0.weight": 13, "predictor.0.weight": 13,
             "decoder_blocks.0.norm1.weight": 13, "mask_token": 13, "decoder_pos_embed": 13}
    for prefix in ("", "base_encoder.", "module.base_encoder."):
        for name, layer in names.items():
            assert model.layer_of(prefix + name, 12) == layer, prefix + name
    assert [model.stage_of(layer, 12, 3) for layer in range(14)] == [0] * 5 + [1] * 4 + [2] * 5
    assert [model.stage_of(layer, 4, 4) for layer in range(6)] == [0, 0, 1, 2, 3, 3]
    assert {model.stage_of(layer, 7, 1) for layer in range(9)} == {0}
    with pytest.raises(ValueError, match="5 rates .* 12 blocks"):
        model.stage_of(0, 12, 5)


def groups_of(net, **options):
    options = dict(depth=3, lrs=[1e-3, 1e-2, 1e-1], weight_decay=0.1) | options
    return model.param_groups(net, **options)


@pytest.mark.parametrize("net", [mae(torch.float32), *(contrastive(s, m) for s in SYSTEMS for m in (False, True))])
def test_each_trained_parameter_is_in_one_group_with_the_rate_of_its_stage(net):
    groups = groups_of(net)
    placed = [name for group in groups for name in group["names"]]
    assert sorted(placed) == sorted(name for name, p in net.named_parameters() if p.requires_grad)
    own = dict(net.named_parameters())
    for group in groups:
        assert [id(p) for p in group["params"]] == [id(own[name]) for name in group["names"]]
        for name in group["names"]:
            short = name.removeprefix("base_encoder.")
            block = short.split(".")[1] if short.startswith("blocks.") else None
            first = short.startswith(("cls_token", "patch_embed"))
            assert group["base_lr"] == [1e-3, 1e-2, 1e-1][int(block) if block else 0 if first else 2], name
            assert group["weight_decay"] == (0.1 if own[name].ndim > 1 else 0.0), name
    assert {g["weight_decay"] for g in groups_of(net, decay_all=True)} == {0.1}
    with pytest.raises(ValueError, match="must divide the depth"):
        groups_of(net, lrs=[1.0, 1.0])
    table = "\n".join(model.group_table(groups, 2.0))
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        int(line.split()[5].replace(",", "")) for line in table.splitlines()[1:])


def test_layer_decay_scales_each_layer():
    net = vit()
    net.head = nn.Linear(24, 5).double()
    for group in groups_of(net, lrs=[2.0], layer_decay=0.5):
        for name in group["names"]:
            layer = {"blo": 1, "cls": 0, "pat": 0}.get(name[:3], 4)
            layer += int(name.split(".")[1]) if name.startswith("blocks.") else 0
            assert group["base_lr"] == 2.0 * 0.5 ** (4 - layer), name


def frozen_by(**options):
    net = contrastive("moco")
    model.freeze(net, 3, **options)
    return {name.removeprefix("base_encoder.") for name, p in net.named_parameters()
            if not p.requires_grad and not name.startswith("momentum_encoder.")}


def test_freeze():
    def lowest(k):
        return {name for name in vit_names(3) if model.layer_of(name, 3) <= k}
    assert frozen_by() == {"pos_embed"}
    assert frozen_by(patch_embed=True) == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert frozen_by(blocks=1) == lowest(1)
    assert frozen_by(lrs=[0.0, 0.0, 1.0]) == lowest(2)
    assert frozen_by(lrs=[1.0, 0.0, 1.0]) == {"pos_embed"} | lowest(2) - lowest(1)
    assert not any("head" in name or "predictor" in name or name.startswith("norm.") for name in frozen_by(blocks=3))
    for nothing_left in (dict(lrs=[0.0]), dict(blocks=4)):
        with pytest.raises(ValueError, match="nothing is left to train"):
            frozen_by(**nothing_left)


def train_a_little(net, groups, steps, decay=0.0):
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
        group["weight_decay"] = decay
    for _ in range(steps):
        optimizer.zero_grad()
        net(rand(6, 3, 16, 16), rand(6, 3, 16, 16, seed=1)).backward()
        optimizer.step()


def test_weights_move_in_proportion_to_the_rate_of_their_stage():
    rates = [1e-7, 3e-6, 2e-5]
    net = contrastive("moco")
    before = copy.deepcopy(net.state_dict())
    train_a_little(net, groups_of(net, lrs=rates), steps=1)
    moved = {name: (p.detach() - before[name]).abs() for name, p in net.named_parameters() if p.requires_grad}
    del moved["base_encoder.norm.bias"]         # no gradient: the BatchNorm of the projector takes a shift out again
    for stage, rate in enumerate(rates):
        for name, distance in moved.items():
            if model.stage_of(model.layer_of(name, 3), 3, 3) == stage:
                # the first step of AdamW is the rate times the sign of the gradient
                assert distance.max().item() == pytest.approx(rate, rel=1e-3), name


@pytest.mark.parametrize("options, lowest", [(dict(blocks=2), 2), (dict(lrs=[0.0, 1e-3, 1e-2]), 1)])
def test_frozen_layers_stay_to_the_bit_and_no_gradient_is_computed_below(options, lowest):
    net = contrastive("moco")
    model.freeze(net, 3, **options)
    before = copy.deepcopy(net.state_dict())
    outputs = net.base_encoder.intermediate(rand(2, 3, 16, 16))
    assert [x.requires_grad for x in outputs] == [i >= lowest for i in range(3)]
    train_a_little(net, groups_of(net, lrs=options.get("lrs", [1e-3])), steps=3, decay=0.5)
    for name, p in net.named_parameters():
        same = torch.equal(p, before[name])
        assert same == (not p.requires_grad), name
        assert (p.grad is None) == (not p.requires_grad), name


def test_lr_factor_at_known_points():
    assert [model.lr_factor(s, 110, 10) for s in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert model.lr_factor(35, 110, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert [model.lr_factor(s, 110, 10, floor=0.2) for s in (10, 60, 110)] == pytest.approx([1, 0.6, 0.2])
    assert model.lr_factor(0, 4, 0) == 1
    rates = [model.lr_factor(s, 110, 10) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_momentum_at_known_points():
    assert [model.momentum_at(s, 100) for s in (0, 50, 100)] == pytest.approx([0.99, 0.995, 1])
    assert model.momentum_at(25, 100, 0.9) == pytest.approx(1 - 0.1 * 0.5 * (1 + math.cos(math.pi / 4)))


# --------------------------------------------------------------------------------- randomness per picture
def test_random_numbers_depend_on_the_key_and_the_picture_alone():
    ids = torch.tensor([5, 0, 3, 1 << 20, 7, 4095])
    u = augment.uniform(ids, 6, 2, 0, 13)
    assert u.dtype == torch.float32 and u.shape == (6, 6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(augment.uniform(ids[order], 6, 2, 0, 13), u[order])
    assert torch.equal(augment.uniform(ids[2:5], 6, 2, 0, 13), u[2:5])
    assert torch.equal(augment.uniform(ids[3:4], 9, 2, 0, 13)[:, :6], u[3:4])
    for other in ((2, 0, 14), (2, 1, 13), (3, 0, 13), (0, 2, 13), (13, 0, 2), (2, 0), (2, 0, 13, 0)):
        assert not (augment.uniform(ids, 6, *other) == u).any(), other


def test_random_numbers_are_uniform_and_uncorrelated():
    n = 20000
    u = augment.uniform(torch.arange(n), 8, 1, 2, 3).double()
    assert 0 <= u.min() and u.max() < 1
    error = 1 / math.sqrt(12 * n)                                           # of the mean of n uniform numbers
    assert ((u.mean(0) - 0.5).abs() < 4.5 * error).all()
    assert ((u.var(0) * 12 - 1).abs() < 0.05).all()
    neighbours = [u, u.roll(1, 0), augment.uniform(torch.arange(n), 8, 1, 2, 4).double(),
                  augment.uniform(torch.arange(n), 8, 1, 3, 3).double()]
    correlation = torch.corrcoef(torch.cat(neighbours, 1).T) - torch.eye(32)
    assert correlation.abs().max() < 5 / math.sqrt(n)


def test_shuffled_is_a_permutation_that_depends_on_the_key():
    a, b = augment.shuffled(1000, 0, 1, 2), augment.shuffled(1000, 0, 1, 3)
    assert a.sort().values.tolist() == list(range(1000))
    assert torch.equal(a, augment.shuffled(1000, 0, 1, 2))
    assert (a == b).sum() < 10 and (a == torch.arange(1000)).sum() < 10


# -------------------------------------------------------------------------------------- boxes, resampling
def box_by_loop(u, h, w, scale, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop.get_params of torchvision with its random numbers given: u holds 10 areas, 10 ratios, 2."""
    for i in range(10):
        area = h * w * (scale[0] + (scale[1] - scale[0]) * u[i])
        aspect = math.exp(math.log(ratio[0]) + (math.log(ratio[1]) - math.log(ratio[0])) * u[10 + i])
        box_w, box_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_w <= w and 0 < box_h <= h:
            return [int(u[20] * (h - box_h + 1)), int(u[21] * (w - box_w + 1)), box_h, box_w]
    return list(transforms.RandomResizedCrop.get_params(torch.empty(3, h, w), (2.0, 2.0), ratio))


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0), (0.95, 1.0)])
def test_random_boxes_follow_torchvisions_algorithm(scale):
    sizes = torch.tensor([[32, 32], [224, 300], [300, 224], [64, 96], [40, 20], [100, 20], [20, 190], [7, 5]])
    sizes = sizes.repeat(100, 1)
    ids = torch.arange(len(sizes))
    boxes = augment.random_boxes(ids, sizes, scale, 9)
    u = augment.uniform(ids, 22, 9).double().tolist()
    expected = torch.tensor([box_by_loop(u[i], *sizes[i].tolist(), scale) for i in range(len(sizes))])
    off = (boxes - expected).abs().max(1).values
    assert (off == 0).float().mean() > 0.995                                # float32 may round .5 to the other side
    assert off.max() <= 1
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= sizes).all() and (boxes[:, 2:] > 0).all()


def test_a_picture_too_long_for_any_box_gets_torchvisions_central_one():
    sizes = torch.tensor([[20, 190], [190, 20], [33, 101], [101, 33]])
    boxes = augment.random_boxes(torch.arange(4), sizes, (0.95, 1.0), 9)
    for box, (h, w) in zip(boxes.tolist(), sizes.tolist()):
        theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, h, w), (0.95, 1.0), (3 / 4, 4 / 3))
        assert box == list(theirs)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(8, 8), (20, 28), (64, 48)])
def test_resample_equals_torchvisions_resized_crop(mode, size):
    images = pictures_like(6, 32, 40)
    boxes = torch.tensor([[0, 0, 32, 40], [3, 5, 20, 30], [31, 39, 1, 1], [0, 10, 32, 7], [10, 0, 13, 40],
                          [5, 6, 8, 8]])
    ours = augment.resample(images, boxes.float(), size, mode)
    for i in range(6):
        theirs = tv.resized_crop(images[i].float() / 255, *boxes[i].tolist(), list(size),
                                 interpolation=tv.InterpolationMode(mode), antialias=True).clamp(0, 1)
        torch.testing.assert_close(ours[i], theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("size", [(128, 128), (96, 192), (160, 64)])
def test_central_view_equals_resize_and_centre_crop(size):
    """Resize to 8/7 of the side, then CenterCrop, as one box: equal but for one or two pixels at the border."""
    images, side = pictures_like(2, *size), 56
    boxes = augment.central_boxes(torch.tensor([size] * 2), (side, side))
    ours = augment.resample(images, boxes, (side, side), "bicubic")
    for i in range(2):
        resized = tv.resize(images[i].float() / 255, 64, tv.InterpolationMode.BICUBIC, antialias=True)
        theirs = tv.center_crop(resized, [side, side]).clamp(0, 1)
        inner = (slice(None), slice(3, -3), slice(3, -3))
        torch.testing.assert_close(ours[i][inner], theirs[inner], rtol=0, atol=2e-4)
    whole = augment.central_boxes(torch.tensor([[56, 56]]), (side, side))
    assert whole.tolist() == [[0, 0, 56, 56]]


# ------------------------------------------------------------------------------------------ augmentations
FACTORS = torch.tensor([0.0, 0.6, 1.0, 1.37, 2.5])
TURNS = torch.tensor([-0.5, -0.1, 0.0, 0.07, 0.5])


def float_pictures(n=5, h=12, w=10):
    x = pictures_like(n, h, w).float() / 255
    x[0, :, :4] = 0.5                                                       # grey
    x[1, :, :4], x[1, 1, :4] = 1.0, 0.0                                     # saturated
    return x


@pytest.mark.parametrize("ours, theirs, factors", [
    (augment.adjust_brightness, tv.adjust_brightness, FACTORS),
    (augment.adjust_contrast, tv.adjust_contrast, FACTORS),
    (augment.adjust_saturation, tv.adjust_saturation, FACTORS),
    (augment.adjust_hue, tv.adjust_hue, TURNS)], ids=["brightness", "contrast", "saturation", "hue"])
def test_jitter_operations_equal_torchvisions(ours, theirs, factors):
    x = float_pictures()
    for shift in range(5):                                                  # every factor on every picture
        rolled = factors.roll(shift)
        expected = torch.stack([theirs(picture, factor.item()) for picture, factor in zip(x, rolled)])
        torch.testing.assert_close(ours(x, rolled), expected, rtol=0, atol=2e-5)


def test_grey_and_solarise_equal_torchvisions():
    x = float_pictures()
    x[2, 0, 0, :3] = torch.tensor([127.0, 128.0, 129.0]) / 255              # around the threshold
    for i in range(5):
        torch.testing.assert_close(augment.grey(x)[i], tv.rgb_to_grayscale(x[i]), rtol=0, atol=1e-6)
        assert torch.equal(augment.solarise(x)[i], tv.solarize(x[i], 128 / 255))
    eight_bit = pictures_like(2, 12, 10)
    ours = (augment.solarise(eight_bit.float() / 255) * 255).round().to(torch.uint8)
    assert torch.equal(ours, tv.solarize(eight_bit, 128))                   # the threshold that the recipe names


def test_blur_equals_torchvisions():
    x, sigmas = float_pictures(6, 20, 16), torch.tensor([0.1, 0.31, 0.77, 1.0, 1.5, 2.0])
    ours = augment.gaussian_blur(x, sigmas)
    for i, sigma in enumerate(sigmas.tolist()):
        width = 2 * math.ceil(3 * sigma) + 1
        torch.testing.assert_close(ours[i], tv.gaussian_blur(x[i], [width, width], [sigma, sigma]), rtol=0, atol=2e-5)
    torch.testing.assert_close(augment.gaussian_blur(x, torch.zeros(6)), x)


def test_color_jitter_honours_each_pictures_order():
    operations = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    orders = torch.tensor(list(itertools.permutations(range(4))) + [[-1] * 4, [2, -1, 0, -1]])
    x = pictures_like(1, 12, 10).float().expand(len(orders), -1, -1, -1) / 255
    factors = torch.tensor([1.4, 0.6, 1.3, 0.1]).expand(len(orders), 4)
    before = x.clone()
    ours = augment.color_jitter(x, factors, orders)
    for i, order in enumerate(orders.tolist()):
        expected = x[i]
        for k in order:
            expected = operations[k](expected, factors[i, k].item()) if k >= 0 else expected
        torch.testing.assert_close(ours[i], expected, rtol=0, atol=5e-5)
    assert torch.equal(x, before)
    assert (ours[0] - ours[1]).abs().max() > 0.01                           # the order matters


def test_views_are_the_recipe():
    first, second = augment.MOCO_VIEWS
    common = dict(scale=(0.08, 1.0), mode="bilinear", jitter=0.8, grey=0.2, flip=0.5)
    assert first == common | dict(blur=1.0, solarise=0.0)
    assert second == common | dict(blur=0.1, solarise=0.2)
    assert augment.MAE_VIEW == dict(scale=(0.2, 1.0), mode="bicubic", flip=0.5)
    assert augment.JITTER == (0.4, 0.4, 0.2, 0.1)


def test_each_operation_has_its_probability_independently_of_the_others():
    n = 4000
    x = pictures_like(1, 8, 8).float().expand(n, -1, -1, -1) / 255
    changed = {}
    for name, share in (("jitter", 0.8), ("grey", 0.2), ("blur", 0.1), ("solarise", 0.2), ("flip", 0.5)):
        y = augment.augment(x.clone(), torch.arange(n), {name: share}, 1, 2, 3)
        changed[name] = (y != x).flatten(1).any(1)
        assert abs(changed[name].float().mean() - share) < 0.03, name
        assert torch.equal(augment.augment(x.clone(), torch.arange(n), {name: 0.0}, 1, 2, 3), x)
    assert torch.equal(augment.augment(x.clone(), torch.arange(n), {"flip": 1.0}, 1), x.flip(3))
    correlation = torch.corrcoef(torch.stack(list(changed.values())).float()) - torch.eye(5)
    assert correlation.abs().max() < 0.08


def test_jitter_draws_its_factors_and_orders_as_colorjitter_does(monkeypatch):
    drawn, n = {}, 3000

    def note(x, factors, order):
        drawn.update(factors=factors, order=order)
        return x

    monkeypatch.setattr(augment, "color_jitter", note)
    augment.augment(torch.zeros(n, 3, 2, 2), torch.arange(n), {"jitter": 1.0}, 1)
    for k, (centre, spread) in enumerate(((1, 0.4), (1, 0.4), (1, 0.2), (0, 0.1))):
        values = drawn["factors"][:, k]
        assert values.min().item() == pytest.approx(centre - spread, abs=0.01)
        assert values.max().item() == pytest.approx(centre + spread, abs=0.01)
        assert values.mean().item() == pytest.approx(centre, abs=0.05 * spread)
    orders = [tuple(order) for order in drawn["order"].tolist()]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert sum(counts) == n and min(counts) > 80                            # 125 expected of each of 24


def test_blur_draws_its_sigma_from_the_range(monkeypatch):
    drawn = []
    monkeypatch.setattr(augment, "gaussian_blur", lambda x, sigma: drawn.append(sigma) or x)
    augment.augment(torch.zeros(3000, 3, 2, 2), torch.arange(3000), {"blur": 1.0}, 1)
    assert drawn[0].min().item() == pytest.approx(0.1, abs=0.01)
    assert drawn[0].max().item() == pytest.approx(2.0, abs=0.01)
    assert drawn[0].mean().item() == pytest.approx(1.05, abs=0.04)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channel_counts_pass_through_the_augmentations(channels):
    x = torch.rand(8, channels, 6, 6)
    y = augment.augment(x.clone(), torch.arange(8), augment.MOCO_VIEWS[1], 1)
    assert y.shape == x.shape and y.isfinite().all() and not torch.equal(x, y)


# --------------------------------------------------------------------------------------- reading pictures
def save_picture(path, pixels, **options):
    """uint8 pixels (H, W, 3) as a file, its folder made."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def folder_of(root, names, size=(16, 16), seed=0):
    """A folder with a picture for each name."""
    for i, (name, pixels) in enumerate(zip(names, pictures_like(len(names), *size, seed).permute(0, 2, 3, 1).numpy())):
        save_picture(os.path.join(root, name), pixels)
    return str(root)


def class_folder(root, part="train", classes=("cat", "dog"), each=3, **options):
    folder_of(os.path.join(root, part), [f"{c}/{c}_{i}.png" for c in classes for i in range(each)], **options)
    return str(root)


def test_class_folders(tmp_path):
    class_folder(tmp_path, "train", ("b", "a", "c"))
    class_folder(tmp_path, "test", ("c", "a"), each=2)
    train, test = data.load_data(str(tmp_path)), data.load_data(str(tmp_path), train=False)
    assert train.classes == ["a", "b", "c"] and train.labels.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert [train.file(i) for i in (0, 3)] == ["a/a_0.png", "b/b_0.png"]
    assert test.classes == ["a", "c"] and len(test) == 4
    assert data.same_classes(train, test).labels.tolist() == [0, 0, 2, 2] and test.classes == train.classes
    class_folder(tmp_path, "val", ("z",))
    other = data.load_data(str(tmp_path), train=False)                      # val/ goes before test/
    other.labels, other.classes = torch.zeros(3, dtype=torch.long), ["z"]
    with pytest.raises(data.UsageError, match="test class z"):
        data.same_classes(train, other)


def test_unlabelled_folders_flat_and_nested(tmp_path):
    flat = data.load_data(folder_of(tmp_path / "flat", ["1.png", "2.JPG", "3.webp", ".hidden.png"]))
    assert len(flat) == 3 and flat.labels is None
    (tmp_path / "flat" / "notes.txt").write_text("no picture")
    nested = data.load_data(folder_of(tmp_path / "nested", ["x/1.png", "y/deep/2.png", "3.png", ".git/4.png"]))
    assert sorted(nested.files) == ["3.png", "x/1.png", "y/deep/2.png"] and nested.labels is None
    with pytest.raises(data.UsageError, match="no train/ and no val/"):
        data.load_data(str(tmp_path / "flat"), train=False)


@pytest.mark.parametrize("text", ["dog_1.png\ncat_0.png\n", "dog_1.png\r\ncat_0.png", "\ndog_1.png\ncat_0.png\n\n",
                                  "train/dog/dog_1.png 1\ntrain/cat/cat_0.png 0\n",
                                  "train/dog/dog_1.png 1\r\ntrain/cat/cat_0.png 0\r\n",
                                  "dog/dog_1.png\ncat/cat_0.png"])
def test_list_files(tmp_path, text):
    root = class_folder(tmp_path)
    (tmp_path / "some.txt").write_bytes(text.encode())
    listed = data.load_data(f"{root}/some.txt")
    assert [os.path.basename(name) for name in listed.files] == ["dog_1.png", "cat_0.png"]
    full = data.load_data(root)
    expected = [full.files.index("dog/dog_1.png"), full.files.index("cat/cat_0.png")]
    assert torch.equal(listed.images, full.images[expected])
    ids, how = data.labelled(full, f"{root}/some.txt")
    assert ids.tolist() == sorted(expected) and how == "list some.txt"


def test_list_files_that_cannot_be_followed(tmp_path):
    root = class_folder(tmp_path)
    folder_of(tmp_path / "train", ["cat/same.png", "dog/same.png", "dog/only.png"])
    full = data.load_data(root)
    for text, message in (("cat_9.png", "do not exist, first cat_9"), ("same.png", "several pictures"),
                          ("../cat_0.png", "leads out"), ("/etc/cat_0.png", "leads out"), ("\n\n", "empty"),
                          ("cat/only.png", "do not exist, first cat/only.png")):
        (tmp_path / "bad.txt").write_text(text)
        with pytest.raises(data.UsageError, match=message):
            data.labelled(full, f"{root}/bad.txt")
    (tmp_path / "good.txt").write_text("dog/same.png\ncat/same.png")
    assert [full.files[i] for i in data.labelled(full, f"{root}/good.txt")[0]] == ["cat/same.png", "dog/same.png"]


def read_back(tmp_path, image, name="picture.png", in_chans=3, **options):
    image.save(tmp_path / name, **options)
    read = data.Pictures([name], str(tmp_path), in_chans=in_chans).read(0)
    return np.asarray(read).reshape(read.size[1], read.size[0], -1)


def test_kinds_of_pictures_are_read_right(tmp_path):
    rgb = pictures_like(1, 10, 14)[0].permute(1, 2, 0).numpy()
    grey = rgb[..., 0]
    three = np.repeat(grey[..., None], 3, 2)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb)), rgb)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(grey)), three)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(grey), in_chans=1), grey[..., None])
    rgba = np.dstack([rgb, np.full((10, 14), 77, np.uint8)])
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgba)), rgb)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgba), in_chans=4), rgba)
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb), in_chans=4)[..., 3], np.full((10, 14), 255))
    assert np.array_equal(read_back(tmp_path, Image.fromarray(np.dstack([grey, rgba[..., 3]]))), three)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert sixteen.mode == "I;16"
    assert np.abs(read_back(tmp_path, sixteen).astype(int) - three).max() <= 1
    assert np.abs(read_back(tmp_path, sixteen, "p.tif", in_chans=1).astype(int) - grey[..., None]).max() <= 1
    palette = Image.fromarray(rgb).quantize(16)
    assert np.array_equal(read_back(tmp_path, palette), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read_back(tmp_path, palette, transparency=3), np.asarray(palette.convert("RGB")))
    assert np.array_equal(read_back(tmp_path, palette, "p.gif"), np.asarray(palette.convert("RGB")))
    bilevel = Image.fromarray(grey > 128)
    assert np.array_equal(read_back(tmp_path, bilevel), np.repeat((grey > 128)[..., None] * 255, 3, 2))
    ink = 255 - rgb                                                         # CMYK without black is the complement
    cmyk = Image.fromarray(np.dstack([ink, np.zeros((10, 14), np.uint8)]), mode="CMYK")
    assert np.array_equal(read_back(tmp_path, cmyk, "p.tif"), rgb)
    smooth = Image.fromarray(rgb).resize((4, 4)).resize((56, 40), Image.BICUBIC)
    ink = 255 - np.asarray(smooth)
    cmyk = Image.fromarray(np.dstack([ink, np.zeros((40, 56), np.uint8)]), mode="CMYK")
    read = read_back(tmp_path, cmyk, "p.jpg", quality=98)
    assert np.abs(read.astype(int) - np.asarray(smooth)).mean() < 3
    assert read_back(tmp_path, cmyk, "p.jpg", in_chans=1).shape == (40, 56, 1)


@pytest.mark.parametrize("orientation, turned", [(3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)),
                                                 (8, lambda x: np.rot90(x))])
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation, turned):
    rgb = pictures_like(1, 10, 14)[0].permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(read_back(tmp_path, Image.fromarray(rgb), exif=exif), turned(rgb))


def corrupt(path):
    """The first half of a picture file."""
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:len(content) // 2])


@pytest.mark.parametrize("in_memory", [True, False])
def test_corrupt_files_are_skipped_named_and_counted(tmp_path, capsys, in_memory):
    names = [f"{i:03}.png" for i in range(200)]
    root = folder_of(tmp_path, names, (16, 16) if in_memory else (24, 136))
    corrupt(tmp_path / "050.png")
    (tmp_path / "150.png").write_text("no picture at all")
    pictures = data.load_data(root)
    assert (pictures.images is not None) == in_memory
    loader = data.Loader(pictures, [augment.MAE_VIEW], (16, 16), 18)
    for epoch in range(2):
        batches = list(loader.epoch(epoch))
        assert len(batches) == 11 and all(b.views[0][:].shape == (18, 3, 16, 16) for b in batches)
    assert sorted(pictures.bad) == [50, 150]
    said = capsys.readouterr().out
    assert said.count("warning: skipped") == 2
    assert said.count("skipped " + str(tmp_path / "050.png")) == said.count("skipped " + str(tmp_path / "150.png")) == 1
    if in_memory:
        assert len(pictures) == 198 and not {"050.png", "150.png"} & set(pictures.files)
        assert torch.equal(pictures.images[50], torch.from_numpy(np.array(pictures.read(50))).permute(2, 0, 1))
    for name in names[::20]:
        corrupt(tmp_path / name)
    with pytest.raises(data.RunError, match=r"of 200 pictures cannot be read, more than --max-bad 0.01"):
        for _ in data.Loader(data.load_data(root), [augment.MAE_VIEW], (16, 16), 18).epoch(0):
            pass


def test_a_picture_that_cannot_be_read_is_replaced_by_one_with_its_own_label(tmp_path):
    root = folder_of(tmp_path, [f"{i}.png" for i in range(8)], (24, 136))
    corrupt(tmp_path / "3.png")
    pictures = data.load_data(root)
    batch = next(data.Loader(pictures, [augment.TEST_VIEW], (16, 16), 8, shuffle=False).epoch(0))
    assert batch.ids.tolist() == list(range(8)) and batch.shown[3] != 3
    views = batch.views[0][:]
    assert torch.equal(views[3], views[batch.shown[3]])


def test_small_pictures_of_one_size_are_held_in_memory(tmp_path, monkeypatch):
    small = data.load_data(folder_of(tmp_path / "small", ["1.png", "2.png"], (16, 24)))
    assert small.images.shape == (2, 3, 16, 24) and small.images.dtype == torch.uint8
    assert np.array_equal(small.images[1].permute(1, 2, 0).numpy(), np.array(small.read(1)))
    assert data.load_data(folder_of(tmp_path / "large", ["1.png"], (16, 136))).images is None
    folder_of(tmp_path / "mixed", ["1.png"], (16, 24))
    assert data.load_data(folder_of(tmp_path / "mixed", ["2.png"], (24, 16))).images is None
    monkeypatch.setattr(data, "MEMORY_LIMIT", 1000)
    assert data.load_data(str(tmp_path / "small")).images is None


def test_a_turned_picture_among_equal_ones_is_not_garbled(tmp_path):
    root = folder_of(tmp_path, ["1.png", "2.png"], (16, 24))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "1.png").save(tmp_path / "3.png", exif=exif)
    pictures = data.load_data(root)
    assert pictures.images is None and pictures.read(2).size == (16, 24)


def test_reading_files_gives_the_views_of_memory(tmp_path, monkeypatch):
    names = [f"{i}.png" for i in range(8)]
    root, views = folder_of(tmp_path, names, (40, 48)), [*augment.MOCO_VIEWS, augment.MAE_VIEW, augment.TEST_VIEW]
    held = data.load_data(root)
    monkeypatch.setattr(data, "MEMORY_SIDE", 8)
    files = data.load_data(root)
    assert held.images is not None and files.images is None
    a, b = (next(data.Loader(p, views, (16, 16), 8, seed=3).epoch(2)) for p in (held, files))
    assert torch.equal(a.ids, b.ids)
    for k in range(4):
        difference = (a.views[k][:] - b.views[k][:]).abs()
        assert difference.mean() < 0.03, k                                  # pillow rounds to 8 bits; and at the border


def test_large_jpegs_are_decoded_small_without_moving_the_crop(tmp_path):
    smooth = F.interpolate(pictures_like(1, 8, 8).float(), size=(512, 640), mode="bicubic").clamp(0, 255)
    save_picture(str(tmp_path / "1.jpg"), smooth[0].permute(1, 2, 0).numpy().astype(np.uint8), quality=95)
    save_picture(str(tmp_path / "1.png"), smooth[0].permute(1, 2, 0).numpy().astype(np.uint8))
    sizes = []
    for name in ("1.jpg", "1.png"):
        pictures = data.Pictures([name], str(tmp_path))
        loader = data.Loader(pictures, [augment.TRAIN_VIEW | dict(flip=0), augment.TEST_VIEW], (16, 16), 1)
        sizes.append([next(loader.epoch(e)).views for e in range(4)])
        shrunk = pictures.read(0, lambda full: 4)
        assert shrunk.size == ((160, 128) if name == "1.jpg" else (640, 512))
    for jpeg, png in zip(*sizes):
        for k in (0, 1):
            assert (jpeg[k][:] - png[k][:]).abs().mean() < 0.05


# ------------------------------------------------------------------------------------ sets, labels, order
def test_embedded_pictures_depend_on_their_index_alone():
    few, many = data.embedded(n=10), data.embedded(n=50)
    assert torch.equal(few.images, many.images[:10])
    assert few.images.shape == (10, 3, 32, 32) and few.images.dtype == torch.uint8
    assert torch.equal(few.labels, many.labels[:10])
    test = data.embedded(train=False, n=10)
    assert len({x.numpy().tobytes() for x in torch.cat([many.images, test.images])}) == 60
    assert data.embedded(n=32).labels.bincount().tolist() == [2] * 16
    assert data.embedded(n=10, in_chans=1).images.shape == (10, 1, 32, 32)
    assert many.images.float().std() > 30                                   # not blank
    with pytest.raises(data.UsageError, match="--in-chans 4"):
        data.embedded(n=10, in_chans=4)


def test_label_subsets():
    pictures = data.embedded(n=1600)
    ids, how = data.labelled(pictures)
    assert ids.tolist() == list(range(1600)) and how == "all"
    for spec, each in (("1%", 1), ("10%", 10), ("0.1%", 1), ("7 per class", 7), ("7", 7)):
        ids, how = data.labelled(pictures, spec, seed=5)
        assert pictures.labels[ids].bincount().tolist() == [each] * 16, spec
        assert ids.tolist() == sorted(set(ids.tolist())) and "seed 5" in how
        assert torch.equal(ids, data.labelled(pictures, spec, seed=5)[0])
        assert not torch.equal(ids, data.labelled(pictures, spec, seed=6)[0])
    small = set(data.labelled(pictures, "5%")[0].tolist())
    assert small < set(data.labelled(pictures, "20%")[0].tolist())          # one draw holds the other


@pytest.mark.parametrize("spec, message", [("x", "neither a share"), ("0%", "out of range"), ("101%", "out of range"),
                                           ("nan%", "out of range"), ("-3", "out of range"), ("1.5", "neither a share"),
                                           ("101 per class", "has only 100"), ("/nowhere.txt", "neither a share")])
def test_label_subsets_that_cannot_be_drawn(spec, message):
    with pytest.raises(data.UsageError, match=message):
        data.labelled(data.embedded(n=1600), spec)


def test_label_errors(tmp_path):
    root = class_folder(tmp_path)
    pictures = data.load_data(root)
    (tmp_path / "one.txt").write_text("cat_0.png\ncat_1.png")
    with pytest.raises(data.UsageError, match="one class only"):
        data.labelled(pictures, f"{root}/one.txt")
    with pytest.raises(data.UsageError, match="a list names files"):
        data.labelled(data.embedded(n=16), f"{root}/one.txt")
    pictures.labels = None
    with pytest.raises(data.UsageError, match="no labels"):
        data.labelled(pictures, "1%")


def test_channel_statistics():
    pictures = data.embedded(n=64)
    mean, std = data.measure_stats(pictures)
    x = pictures.images.double() / 255
    assert mean == pytest.approx(x.mean((0, 2, 3)).tolist())
    assert std == pytest.approx(x.transpose(0, 1).flatten(1).std(1, unbiased=False).tolist())
    view = next(data.Loader(pictures, [augment.TEST_VIEW], (32, 32), 64, shuffle=False).epoch(0)).views[0][:]
    for c in range(3):
        expected = (x[:, c] - data.IMAGENET_STATS[0][c]) / data.IMAGENET_STATS[1][c]
        torch.testing.assert_close(view[:, c].double(), expected, rtol=0, atol=1e-5)


def loaded(pictures, start=0, epoch=1, rank=0, processes=1, batch=12, workers=0, views=augment.MOCO_VIEWS):
    """What a process gets of an epoch: ids, both views and mask noise of each batch."""
    loader = data.Loader(pictures, views, (16, 16), batch // processes, seed=7, workers=workers, rank=rank,
                         processes=processes)
    return [(b.ids, *(view[:] for view in b.views), b.noise(4)) for b in loader.epoch(epoch, start)]


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_do_not_depend_on_processes_workers_or_restarts(tmp_path, in_memory):
    if in_memory:
        pictures = data.embedded(n=50)
    else:
        pictures = data.load_data(folder_of(tmp_path, [f"{i:02}.png" for i in range(50)], (24, 136)))
    whole = loaded(pictures)
    assert len(whole) == 4                                                  # the last 2 of 50 fill no batch
    seen = torch.cat([batch[0] for batch in whole]).tolist()
    assert len(set(seen)) == 48
    assert seen != torch.cat([batch[0] for batch in loaded(pictures, epoch=2)]).tolist()
    ranks = [loaded(pictures, rank=rank, processes=2, workers=0 if in_memory else 2) for rank in (0, 1)]
    for expected, *parts in zip(whole, *ranks, strict=True):
        for k in range(4):
            assert torch.equal(torch.cat([part[k] for part in parts]), expected[k])
    for expected, again in zip(whole[2:], loaded(pictures, start=2), strict=True):
        for k in range(4):
            assert torch.equal(again[k], expected[k])


def test_a_slice_of_a_view_is_the_slice_of_the_batch():
    pictures, views = data.embedded(n=20), [*augment.MOCO_VIEWS, augment.MAE_VIEW]
    batch = next(data.Loader(pictures, views, (16, 24), 10).epoch(0))
    for view in batch.views:
        assert len(view) == 10 and view[:].shape == (10, 3, 16, 24)
        assert torch.equal(torch.cat([view[:4], view[4:8], view[8:12]]), view[:])
    assert not torch.equal(batch.views[0][:], batch.views[1][:])


@pytest.mark.parametrize("view, equal", [(dict(scale=(0.2, 1.0), mode="bilinear"), 0.0),
                                         (dict(scale=None, mode="bilinear", flip=0.5), 0.5)], ids=["crop", "flip"])
def test_views_and_epochs_are_drawn_independently(view, equal):
    """Share of pictures that come out the same: none where they are cropped, half where they are only flipped."""
    pictures = data.embedded(n=64)
    loader = data.Loader(pictures, [view, view], (32, 32), 64, seed=1)

    def drawn(epoch):
        batch = next(loader.epoch(epoch))
        return [v[:][batch.ids.argsort()] for v in batch.views]

    (first, second), (later, _) = drawn(0), drawn(1)
    for other in (second, later):
        same = (first == other).flatten(1).all(1).float().mean().item()
        assert abs(same - equal) < 0.2 * equal + 0.01


def test_views_are_drawn_in_float32_under_autocast():
    view = next(data.Loader(data.embedded(n=8), augment.MOCO_VIEWS, (16, 16), 8).epoch(0)).views[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = view[:]
    assert torch.equal(inside, view[:])


def test_evaluation_order_covers_every_picture():
    pictures = data.embedded(n=21)
    loader = data.Loader(pictures, [augment.TEST_VIEW], (32, 32), 8, shuffle=False)
    batches = list(loader.epoch(0))
    assert len(loader) == 3 and [len(b) for b in batches] == [8, 8, 5]
    assert torch.cat([b.ids for b in batches]).tolist() == list(range(21))


# -------------------------------------------------------------------------------------------- checkpoints
WIDE = dict(img_size=16, patch_size=4, dim=128, depth=2, heads=2)           # the heads follow from the width


def wide_vit():
    torch.manual_seed(0)
    return randomise(model.VisionTransformer(**WIDE))


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def layouts():
    """name: (content of the file, layout reported, encoder in it, what is left out)."""
    net = wide_vit()
    state = net.state_dict()
    torch.manual_seed(1)
    full = model.MaskedAutoencoder(32, 1, 1, **WIDE)
    full.load_state_dict(state, strict=False)
    moco = randomise(model.MoCoV3(wide_vit(), 32, 16), seed=2)
    base = {k: v for k, v in moco.base_encoder.state_dict().items() if not k.startswith("head.")}
    momentum = {k: v for k, v in moco.momentum_encoder.state_dict().items() if not k.startswith("head.")}
    official = {"state_dict": prefixed("module.", moco.state_dict()), "epoch": 300, "arch": "vit_base", "optimizer": {},
                "scaler": {}}
    dino_head = {"head.mlp.0.weight": torch.zeros(4, 128), "head.last_layer.weight_v": torch.zeros(8, 4)}
    classifier = {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    return {
        "ours": (checkpoint.encoder_file(net, {"system": "mae"}), "ours", state, ""),
        "ours, to resume": ({"model": moco.state_dict(), "config": net.config, "meta": {}}, "ours", base, "predictor"),
        "MAE": ({"model": state}, "MAE", state, ""),
        "MAE, full": ({"model": full.state_dict()}, "MAE", state, "decoder_blocks"),
        "MAE, with its options": ({"model": state, "args": run.argparse.Namespace(lr=0.1)}, "MAE", state, ""),
        "MoCo v3": (official, "MoCo v3", base, "predictor"),
        "MoCo v3, momentum": (official, "MoCo v3", momentum, "base_encoder"),
        "MoCo v3, unwrapped": (moco.state_dict(), "MoCo v3", base, "momentum_encoder"),
        "DINO": ({"student": prefixed("module.backbone.", full.state_dict()), "epoch": 1,
                  "teacher": prefixed("backbone.", state) | dino_head}, "DINO", state, "head"),
        "DINO, encoder only": (state, "timm", state, ""),
        "timm": (state | classifier, "timm", state, "head"),
        "timm, wrapped": ({"state_dict": state | classifier, "arch": "vit"}, "timm", state, "head"),
    }


@pytest.mark.parametrize("name", ["ours", "ours, to resume", "MAE", "MAE, full", "MAE, with its options", "MoCo v3",
                                  "MoCo v3, momentum", "MoCo v3, unwrapped", "DINO", "DINO, encoder only", "timm",
                                  "timm, wrapped"])
def test_every_layout_is_read_and_reported(tmp_path, name):
    content, layout, expected, left_out = layouts()[name]
    path = str(tmp_path / "encoder.pt")
    torch.save(content, path)
    for given in (path, str(tmp_path)):                                     # a folder stands for its encoder.pt
        source = checkpoint.read_encoder(given, "momentum" if name.endswith("momentum") else "base")
        assert_identical(source["state"], expected)
        assert source["layout"] == layout
    net = model.VisionTransformer(**source["config"])
    net.load_state_dict(source["state"], strict=True)
    x, reference = rand(2, 3, 16, 16, dtype=torch.float32), wide_vit()
    reference.load_state_dict(expected)
    assert torch.equal(net(x), reference(x))
    report = "\n".join(checkpoint.report(source))
    for fact in (f"{layout} layout", "width 128", "2 blocks", "2 heads", "16x16", f"{len(expected)} encoder tensors"):
        assert fact in report, fact
    assert ("left out" in report) == bool(left_out) and left_out in report


def test_official_mae_and_moco_states_load_strictly():
    contents = layouts()
    model.MaskedAutoencoder(32, 1, 1, **WIDE).load_state_dict(contents["MAE, full"][0]["model"], strict=True)
    expected = vit_names(3) | {"mask_token", "decoder_pos_embed"}
    expected |= {f"decoder_{name}" for name in vit_names(2) if name.startswith(("blocks.", "norm."))}
    expected |= {f"decoder_{part}.{kind}" for part in ("embed", "pred") for kind in ("weight", "bias")}
    assert set(mae().state_dict()) == expected
    state = {k.removeprefix("module."): v for k, v in contents["MoCo v3"][0]["state_dict"].items()}
    model.MoCoV3(wide_vit(), 32, 16).load_state_dict(state, strict=True)


@pytest.mark.parametrize("dim, layout, heads", [
    (192, "timm", 3), (384, "timm", 6), (384, "DINO", 6), (384, "MoCo v3", 12), (768, "MAE", 12), (1024, "MAE", 16),
    (1280, "MAE", 16)])
def test_the_number_of_heads_of_the_published_models(dim, layout, heads):
    with torch.device("meta"):
        state = model.VisionTransformer(32, 16, dim=dim, depth=1, heads=1).state_dict()
    config = checkpoint.config_of(state, layout, "file")
    assert config["heads"] == heads and config["mlp_ratio"] == 4


class Payload:
    """A pickled object that would run code when it is read."""

    def __reduce__(self):
        return os.mkdir, ("payload-was-run",)


def damaged(kind, path):
    """Write a checkpoint that must be refused."""
    state = wide_vit().state_dict()
    if kind == "missing":
        del state["blocks.1.norm1.bias"]
    elif kind == "shape":
        state["blocks.1.attn.qkv.weight"] = torch.zeros(128, 128)
    elif kind == "unknown":
        state["blocks.0.ls1.gamma"] = torch.zeros(128)
    elif kind == "no ViT":
        state = {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(3)}
    elif kind == "code":
        state = {"model": state, "extra": Payload()}
    elif kind == "whole model":
        state = wide_vit()
    elif kind == "grid":
        state["pos_embed"] = torch.zeros(1, 1 + 15, 128)
    elif kind == "list":
        state = [1, 2]
    torch.save(state, path)
    if kind == "truncated":
        corrupt(path)
    raw = {"empty": b"", "text": b"hello, this is text\n", "picture": b"\xff\xd8\xff\xe0" + bytes(range(256)),
           "pickle": pickle.dumps({"model": Payload()}, protocol=2)}
    if kind in raw:
        path.write_bytes(raw[kind])


@pytest.mark.parametrize("kind, message", [
    ("missing", "1 encoder tensors missing.*blocks.1.norm1.bias"), ("shape", "1 of another shape.*blocks.1.attn.qkv"),
    ("unknown", "1 unknown.*blocks.0.ls1.gamma"), ("no ViT", "no ViT in it.*conv1.weight"),
    ("code", "refused, it holds more than tensors"), ("whole model", "refused, it holds more than tensors"),
    ("pickle", "refused|not a readable"), ("grid", "15 positions are no square grid"), ("list", "holds a list"),
    ("truncated", "not a readable"), ("empty", "not a readable"), ("text", "not a readable"),
    ("picture", "not a readable")])
def test_damaged_checkpoints_are_refused_in_one_line(tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    damaged(kind, tmp_path / "file.pt")
    with pytest.raises(data.UsageError, match=message) as error:
        checkpoint.read_encoder(str(tmp_path / "file.pt"))
    assert "\n" not in str(error.value) and str(tmp_path / "file.pt") in str(error.value)
    assert not os.path.exists("payload-was-run")


def source_of(net):
    return dict(state=net.state_dict(), config=net.config)


def test_positions_are_carried_and_resampled_for_another_grid():
    net = wide_vit()
    same, config = checkpoint.fit(source_of(net), [16, 16])
    assert_identical(same, net.state_dict())
    state, config = checkpoint.fit(source_of(net), [8, 24])
    wider = model.VisionTransformer(**config)
    wider.load_state_dict(state, strict=True)
    assert wider.grid == (2, 6) and wider(rand(1, 3, 8, 24, dtype=torch.float32)).shape == (1, 128)
    assert torch.equal(state["pos_embed"][:, 0], net.pos_embed[:, 0])
    grid = net.pos_embed[0, 1:].T.reshape(128, 4, 4)
    expected = tv.resize(grid, [2, 6], tv.InterpolationMode.BICUBIC, antialias=False).flatten(1).T
    torch.testing.assert_close(state["pos_embed"][0, 1:], expected)
    back, _ = checkpoint.fit(dict(state=state, config=config), [8, 24])
    assert_identical(back, state)


def test_input_channels_are_summed_or_repeated():
    net, x = wide_vit(), rand(2, 1, 16, 16, dtype=torch.float32)
    state, config = checkpoint.fit(source_of(net), in_chans=1)
    one = model.VisionTransformer(**config)
    one.load_state_dict(state, strict=True)
    torch.testing.assert_close(one(x), net(x.expand(-1, 3, -1, -1)))        # grey in three channels is grey in one
    state, config = checkpoint.fit(source_of(net), in_chans=4)
    model.VisionTransformer(**config).load_state_dict(state, strict=True)
    old, new = net.patch_embed.proj.weight, state["patch_embed.proj.weight"]
    for c in range(4):
        torch.testing.assert_close(new[:, c], old[:, c % 3] * 0.75)


@pytest.mark.parametrize("error, message", [(OSError(28, "No space left on device"), "the disk is full"),
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
    with pytest.raises(data.RunError, match=f"{message}.*the one before is intact"):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.read(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["last.pt"]


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
        assert {"loss", "lr", "images_per_second", "data_wait"} < set(line) and len(line["lr"]) == 1
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
    assert encoder["meta"]["system"] == {"mae": "mae", "graft": "MoCo v3"}[stage]
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
    (BOTH, ["--in-chans", "2", "--data", "{tmp}/flat"], "--in-chans 2: pictures are read with 1"),
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
    monkeypatch.setattr(run, "setup", lambda device: (torch.device("cpu"), 0, 3))
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
    monkeypatch.setattr(run.Run, "save", lambda self, state: (save(self, state), after.update(
        {state["step"]: copy.deepcopy(state["model"])})))
    out = train(stage, tmp_path, "--save-minutes", "1e-9")
    assert list(after) == list(range(1, 9)) and all_finite(after[8])
    for name in after[3]:
        if not name.startswith("momentum_encoder.") and "num_batches" not in name:
            assert torch.equal(after[3][name], after[2][name]), name
    assert "loss is nan at step 3, step skipped; pictures embedded/" in capsys.readouterr().out
    assert [math.isfinite(line["loss"]) for line in log_of(out)] == [step != 3 for step in range(1, 9)]
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
    base = ["--arch", "vit_test", "--epochs", "6", "--batch-size", "32", "--log-every", "1", "--amp", "off", "--lr",
            "1e39", "--weight-decay", "0", "--out", tmp_path, "--warmup-epochs", "1"]
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
