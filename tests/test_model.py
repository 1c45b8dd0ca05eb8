"""model.py against loops written out from the papers' formulas, torch's modules and timm's."""
import copy
import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import model

TINY = dict(img_size=16, patch_size=4, dim=24, depth=3, heads=3)            # 16 patches
EXACT = dict(rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------ helpers
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


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def assert_same(a, b, **tolerance):
    """Two dicts of tensors with the same keys and close values."""
    assert set(a) == set(b)
    for key in a:
        torch.testing.assert_close(a[key], b[key], msg=lambda text, key=key: f"{key}: {text}",
                                   **(tolerance or EXACT))


SYSTEMS = ("moco", "vicreg", "simclr")


def contrastive(system, mim=False, dtype=torch.float64):
    torch.manual_seed(0)
    encoder = model.MaskedAutoencoder(16, 1, 2, **TINY) if mim else model.VisionTransformer(**TINY)
    kind = {"moco": model.MoCoV3, "vicreg": model.VICReg, "simclr": model.SimCLR}[system]
    return randomise(kind(encoder, 32, 16, mim_weight=0.7 * mim)).to(dtype).train()


def vit_names(depth):
    parts = ["patch_embed.proj", "norm"]
    parts += [f"blocks.{i}.{part}" for i in range(depth)
              for part in ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    names = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    return {"cls_token", "pos_embed"} | names


# ------------------------------------------------------------------------------------------ encoder
def test_block_equals_torch_encoder_layer():
    block = vit().blocks[1]
    layer = nn.TransformerEncoderLayer(24, 3, 96, dropout=0.0, activation="gelu",
                                       layer_norm_eps=1e-6, batch_first=True, norm_first=True)
    layer = layer.double()
    names = {"norm1": "norm1", "norm2": "norm2", "attn.qkv": "self_attn.in_proj",
             "attn.proj": "self_attn.out_proj", "mlp.fc1": "linear1", "mlp.fc2": "linear2"}
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
    theirs = timm_vit.VisionTransformer(img_size=size, patch_size=4, embed_dim=24, depth=3,
                                        num_heads=3, num_classes=0, global_pool="token").double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = rand(2, 3, *model.pair(size))
    torch.testing.assert_close(ours.tokens(x), theirs.forward_features(x), **EXACT)
    torch.testing.assert_close(ours(x), theirs(x), **EXACT)
    torch.testing.assert_close(ours.forward_features(x), theirs(x), **EXACT)
    _, middle = theirs.forward_intermediates(x, indices=[0, 1], return_prefix_tokens=True,
                                             output_fmt="NLC")
    for mine, (patches, prefix) in zip(ours.intermediate(x, [1, 2]), middle):
        torch.testing.assert_close(mine, torch.cat([prefix, patches], 1), **EXACT)


def test_intermediate_and_attention_agree_with_the_plain_forward():
    net, x = vit(), rand(2, 3, 16, 16)
    outputs, weights = net.intermediate(x, attention=True)
    assert len(outputs) == len(weights) == 3
    torch.testing.assert_close(net.norm(outputs[-1]), net.tokens(x), **EXACT)
    torch.testing.assert_close(torch.stack(outputs), torch.stack(net.intermediate(x)), **EXACT)
    second, weights_to_second = net.intermediate(x, [2], attention=True)
    assert len(weights_to_second) == 2  # no block is run in vain
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
        row = torch.tensor(row, dtype=torch.float64)
        torch.testing.assert_close(table[1 + y * grid[1] + x], row, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        model.sincos_pos_embed(10, grid)


@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_orders_row_column_channel_and_unpatchify_inverts_it(channels):
    images = torch.arange(2 * channels * 4 * 6).reshape(2, channels, 4, 6)
    patches = model.patchify(images, 2)
    assert patches.shape == (2, 6, 4 * channels)
    every = itertools.product(range(2), range(3), range(2), range(2), range(channels))
    for gy, gx, y, x, c in every:
        expected = images[:, c, 2 * gy + y, 2 * gx + x]
        assert torch.equal(patches[:, gy * 3 + gx, (y * 2 + x) * channels + c], expected)
    assert torch.equal(model.unpatchify(patches, 2, (2, 3)), images)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 3)
    y = model.drop_path(x, 0.25, training=True)
    assert y.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert y.eq(y[:, :1, :1]).all()  # an image is kept or dropped whole
    assert abs(y.mean() - 1) < 0.05
    assert model.drop_path(x, 0.25, training=False) is x
    rates = [block.drop_path for block in vit(depth=5, drop_path=0.2).blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])


# ---------------------------------------------------------------------------------------------- MAE
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


@pytest.mark.parametrize("norm_pix_loss, ratio, size",
                         [(True, 0.75, 16), (False, 0.5, (8, 24)), (True, 0.6, (8, 12))])
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
    assert torch.equal(mask, torch.ones_like(mask).scatter(1, kept, 0.0))  # 0 at the smallest noise


# ------------------------------------------------------------------------------------------- losses
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
    x, y = 0.3 * rand(5, 4), 0.3 * rand(5, 4, seed=1)  # small: the hinge is active
    n, width = x.shape
    places = list(itertools.product(range(n), range(width)))
    invariance = sum(float(x[i, j] - y[i, j]) ** 2 for i, j in places) / (n * width)
    variance, covariance = 0.0, 0.0
    for z in (x, y):
        mean = [sum(float(z[i, j]) for i in range(n)) / n for j in range(width)]
        for a, b in itertools.product(range(width), range(width)):
            cov = sum(float(z[i, a] - mean[a]) * float(z[i, b] - mean[b]) for i in range(n))
            cov = cov / (n - 1)
            if a == b:
                variance += max(0.0, 1 - math.sqrt(cov + 1e-4)) / width / 2
            else:
                covariance += cov ** 2 / width
    whole = [t.item() for t in model.vicreg_terms(x, y)]
    assert whole == pytest.approx([invariance, variance, covariance], rel=1e-10)
    shares = [model.vicreg_terms(x, y, rank, 3)[2].item() for rank in range(3)]
    assert sum(shares) / 3 == pytest.approx(covariance, rel=1e-10)          # 3 does not divide 4
    assert len({round(share, 6) for share in shares}) == 3
    assert model.vicreg_terms(100 * x, 100 * y)[1].item() == 0               # the hinge is at 1


def test_anchor_penalty_sums_over_all_parameters():
    now, then = [rand(2, 3), rand(4, seed=1)], [rand(2, 3, seed=2), rand(4, seed=3)]
    distances = [float(a - b) for w, v in zip(now, then) for a, b in zip(w.flatten(), v.flatten())]
    assert model.anchor_penalty(now, then, "l1").item() == pytest.approx(sum(map(abs, distances)))
    squares = model.anchor_penalty(now, then, "l2").item()
    assert squares == pytest.approx(sum(d * d for d in distances))


def test_nearest_neighbours_equal_a_loop():
    queries, bank, labels = rand(7, 5), rand(9, 5, seed=1), torch.tensor([0, 1, 2] * 3)
    expected = torch.zeros(2, 7, 3)
    for i, k in enumerate((2, 4)):
        for n, query in enumerate(queries):
            near = sorted(range(9), key=lambda j: -cosine(query, bank[j]))[:k]
            for j in near:
                expected[i, n, labels[j]] += math.exp(cosine(query, bank[j]) / 0.07)
    found = model.knn_scores(queries.float(), bank.float(), labels, 3, [2, 4], chunk=3)
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.knn_scores(queries.float(), bank.float(), labels, 3, 4), found[1])


def test_feature_stats_show_a_collapse():
    spread = torch.cat([torch.eye(8), -torch.eye(8)])
    stats = model.feature_stats(spread, spread, spread)
    assert stats["acc"] == 1
    assert stats["rank"].item() == pytest.approx(8, rel=1e-4)  # eight equal singular values
    assert stats["std"].item() == pytest.approx(math.sqrt(2 / 15), rel=1e-4)
    collapsed = torch.ones(16, 8)
    stats = model.feature_stats(collapsed, collapsed, collapsed)
    assert stats["std"] == 0 and stats["rank"].item() < 1.01
    second = model.feature_stats(spread[8:], spread[8:], spread, rank=1)
    assert second["acc"] == 1  # rows 8 to 15 of the gathered keys
    broken = torch.full((4, 8), float("nan"))
    model.feature_stats(broken, broken, broken)  # it is the run that names such a step


# --------------------------------------------------------------------------------- rates, schedules
def test_layers_and_stages():
    names = {"cls_token": 0, "pos_embed": 0, "patch_embed.proj.weight": 0,
             "blocks.0.norm1.weight": 1, "blocks.11.mlp.fc2.bias": 12, "norm.weight": 13,
             "head.0.weight": 13, "predictor.0.weight": 13, "decoder_blocks.0.norm1.weight": 13,
             "mask_token": 13, "decoder_pos_embed": 13}
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


NETS = [mae(torch.float32), *(contrastive(s, mim) for s in SYSTEMS for mim in (False, True))]


@pytest.mark.parametrize("net", NETS, ids=lambda net: type(net).__name__)
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
            stage = int(block) if block else 0 if first else 2
            assert group["base_lr"] == [1e-3, 1e-2, 1e-1][stage], name
            assert group["weight_decay"] == (0.1 if own[name].ndim > 1 else 0.0), name
    assert {g["weight_decay"] for g in groups_of(net, decay_all=True)} == {0.1}
    with pytest.raises(ValueError, match="must divide the depth"):
        groups_of(net, lrs=[1.0, 1.0])
    table = "\n".join(model.group_table(groups, 2.0))
    assert sum(p.numel() for g in groups for p in g["params"]) == sum(
        int(line.split()[5].replace(",", "")) for line in table.splitlines()[1:])


def frozen_by(**options):
    net = contrastive("moco")
    model.freeze(net, 3, **options)
    return {name.removeprefix("base_encoder.") for name, p in net.named_parameters()
            if not p.requires_grad and not name.startswith("momentum_encoder.")}


def test_freeze():
    def lowest(k):
        return {name for name in vit_names(3) if model.layer_of(name, 3) <= k}
    assert frozen_by() == {"pos_embed"}
    patches = {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    assert frozen_by(patch_embed=True) == {"pos_embed"} | patches
    assert frozen_by(blocks=1) == lowest(1)
    assert frozen_by(lrs=[0.0, 0.0, 1.0]) == lowest(2)
    assert frozen_by(lrs=[1.0, 0.0, 1.0]) == {"pos_embed"} | lowest(2) - lowest(1)
    assert not any(name.startswith(("head", "predictor", "norm.")) for name in frozen_by(blocks=3))
    for nothing_left in (dict(lrs=[0.0]), dict(blocks=4)):
        with pytest.raises(ValueError, match="nothing is left to train"):
            frozen_by(**nothing_left)


def test_weights_move_in_proportion_to_the_rate_of_their_stage():
    """The first step of AdamW is the rate times the sign of the gradient."""
    rates, net = [1e-7, 3e-6, 2e-5], contrastive("moco")
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW(groups_of(net, lrs=rates, weight_decay=0.0), lr=0.0)
    model.set_rates(optimizer, 0.5)
    net(rand(6, 3, 16, 16), rand(6, 3, 16, 16, seed=1))[0].backward()
    optimizer.step()
    moved = {name: (p.detach() - before[name]).abs() for name, p in net.named_parameters()
             if p.requires_grad}
    del moved["base_encoder.norm.bias"]  # the projector's BatchNorm takes a shift out again
    for name, distance in moved.items():
        rate = 0.5 * rates[model.stage_of(model.layer_of(name, 3), 3, 3)]
        assert distance.max().item() == pytest.approx(rate, rel=1e-3), name


def test_lr_factor_at_known_points():
    factors = [model.lr_factor(s, 110, 10) for s in (0, 5, 10, 60, 110)]
    assert factors == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert model.lr_factor(35, 110, 10) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    factors = [model.lr_factor(s, 110, 10, floor=0.2) for s in (10, 60, 110)]
    assert factors == pytest.approx([1, 0.6, 0.2])
    assert model.lr_factor(0, 4, 0) == 1
    rates = [model.lr_factor(s, 110, 10) for s in range(10, 111)]
    assert rates == sorted(rates, reverse=True)


def test_momentum_at_known_points():
    assert [model.momentum_at(s, 100) for s in (0, 50, 100)] == pytest.approx([0.99, 0.995, 1])
    quarter = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi / 4))
    assert model.momentum_at(25, 100, 0.9) == pytest.approx(quarter)
