"""The networks, losses and rates of Layer Grafted Pre-training. Needs torch alone: copy it freely.

Shapes: N images (n of one process), C channels, (H, W) pixels, p patch size, L patches, T = 1 + L
tokens, D width, h heads. Layers are numbered as in layer-wise rate decay: 0 the embeddings,
1..depth the blocks, depth + 1 all that follows (final norm, heads, predictor, decoder).
"""
import math
from functools import partial

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# name: (patch, dim, depth, heads), then the MAE decoder's (dim, depth, heads)
ARCHS = {
    "vit_mini": ((4, 96, 6, 3), (64, 1, 2)),        # the demonstration on two cores
    "vit_tiny": ((16, 192, 12, 3), (192, 4, 6)),
    "vit_small": ((16, 384, 12, 12), (512, 8, 16)),  # 12 heads as in MoCo v3; DINO and DeiT have 6
    "vit_base": ((16, 768, 12, 12), (512, 8, 16)),
    "vit_large": ((16, 1024, 24, 16), (512, 8, 16)),
    "vit_huge": ((14, 1280, 32, 16), (512, 8, 16)),
}


class SizeError(ValueError):
    """Sizes or rates that do not fit each other: what was asked for cannot be built."""
    exit_code = 2                                       # of the script that it ends


def decoder_of(config):
    """MAE's decoder (dim, depth, heads) for an encoder of this width and depth, else of this width;
    by default ViT-B's."""
    alike = [(e[2] != config["depth"], d) for e, d in ARCHS.values() if e[1] == config["dim"]]
    return min(alike, default=(True, (512, 8, 16)))[1]


# ---------------------------------------------------------------------------------------- processes
def world():
    """(rank, number of processes); (0, 1) where there is no process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@torch.no_grad()
def gather(x, dim=0):
    """x (.., n, ..) of each process -> (.., processes * n, ..) in rank order, without gradient."""
    if world()[1] == 1:
        return x
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(world()[1])]
    dist.all_gather(parts, x)
    return torch.cat(parts, dim)


class Gather(torch.autograd.Function):
    """`gather`, whose backward gives each process the sum of all gradients of its rows."""

    @staticmethod
    def forward(ctx, x, dim):
        ctx.dim = dim
        return gather(x, dim)

    @staticmethod
    def backward(ctx, grad):
        rank, processes = world()
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(processes, ctx.dim)[rank], None


def gather_with_grad(x, dim=0):
    """As `gather`, and the gradient reaches every process: its mean over them is then exact."""
    return Gather.apply(x, dim) if world()[1] > 1 else x


def full(x):
    """x in float32, or in float64 if it is in that."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Normalise(torch.autograd.Function):
    """x (V, n, D) -> x of mean 0 and variance 1 over the rows of all processes, mean, var (V, D).

    One all-reduce forward and one backward; every process has n rows. Each takes its mean and its
    variance around it in x's precision; they are joined in float64, so that a large mean costs no
    digits.
    """

    @staticmethod
    def forward(ctx, x, eps):
        var, mean = torch.var_mean(x, 1, correction=0)
        moments = torch.stack([mean.double(), var.double() + mean.double().square()])
        dist.all_reduce(moments)
        mean, square = moments / world()[1]
        var = (square - mean.square()).clamp_min(0)
        mean, var = mean.to(x.dtype), var.to(x.dtype)
        scale = torch.rsqrt(var + eps)[:, None]
        y = (x - mean[:, None]) * scale
        ctx.save_for_backward(y, scale)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        y, scale = ctx.saved_tensors
        means = torch.stack([grad.mean(1), (grad * y).mean(1)])             # (2, V, D)
        dist.all_reduce(means)
        mean, along = means[:, :, None] / world()[1]
        return (grad - mean - y * along) * scale, None


class BatchNorm1d(nn.BatchNorm1d):
    """BatchNorm over the global batch, in float32 under autocast. (torch's needs a GPU for that.)

    x (N, D), or (V, N, D): V views, each normalised on its own as in V calls. One process computes
    nn.BatchNorm1d. Several need equally many rows each. A batch that is not finite, whose step is
    skipped, leaves no trace in the running statistics.
    """

    def forward(self, x):
        x = full(x)
        if not self.training:
            return super().forward(x.flatten(0, -2)).view_as(x)
        views = x[None] if x.ndim == 2 else x
        processes = world()[1]
        if processes == 1:
            y = torch.stack([F.batch_norm(view, None, None, self.weight, self.bias, training=True,
                                          eps=self.eps) for view in views])
            var, mean = torch.var_mean(x.detach(), -2, correction=0)
        else:
            y, mean, var = Normalise.apply(views, self.eps)
            y = y * self.weight + self.bias if self.affine else y
        rows = views.shape[1] * processes
        with torch.no_grad():
            self.num_batches_tracked += len(views)
            unbiased = var * (rows / (rows - 1))
            for running, values in ((self.running_mean, mean), (self.running_var, unbiased)):
                for value in values.view(len(views), -1):               # in the order of the views
                    value = torch.where(value.isfinite(), value, running)
                    running.lerp_(value, self.momentum)
        return y.view_as(x)


# ------------------------------------------------------------------------------------------ encoder
def pair(x):
    """16 -> (16, 16); (h, w) stays."""
    return (x, x) if isinstance(x, int) else tuple(x)


def sincos_pos_embed(dim, grid):
    """MAE's fixed position embedding (1, 1 + h w, dim): [sin xw, cos xw, sin yw, cos yw].

    w_i = 10000^(-i / (dim / 4)); zeros for the class token. Generated for any grid (h, w), not
    stretched. MoCo v3's has x and y swapped. SizeError: dim is not divisible by 4.
    """
    if dim % 4:
        raise SizeError(f"the width {dim} must be divisible by 4 for the sine-cosine positions")
    h, w = (torch.arange(side, dtype=torch.float64) for side in grid)
    freq = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    y, x = torch.meshgrid(h, w, indexing="ij")
    x, y = x.reshape(-1, 1) * freq, y.reshape(-1, 1) * freq                 # (h w, dim / 4)
    table = torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], 1)
    table = torch.cat([torch.zeros(1, dim, dtype=torch.float64), table])
    return table[None].to(torch.get_default_dtype())


def patchify(imgs, p):
    """(N, C, H, W) -> (N, L, p p C), each patch ordered (row, column, channel) as in MAE."""
    n, c, h, w = imgs.shape
    x = imgs.reshape(n, c, h // p, p, w // p, p)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(n, (h // p) * (w // p), p * p * c)


def unpatchify(x, p, grid):
    """The inverse of `patchify`: (N, L, p p C) -> (N, C, H, W) for a grid (H / p, W / p)."""
    h, w = grid
    n, _, d = x.shape
    x = x.reshape(n, h, w, p, p, d // (p * p))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(n, d // (p * p), h * p, w * p)


def take(x, ids):
    """Tokens (N, T, D) at ids (N, K) -> (N, K, D)."""
    return x.gather(1, ids[..., None].expand(-1, -1, x.shape[2]))


class PatchEmbed(nn.Module):
    """The patch projection, as unfolding and one matrix product: masked patches cost nothing."""

    def __init__(self, patch_size, in_chans, dim):
        super().__init__()
        # a Conv2d for the official names
        self.proj = nn.Conv2d(in_chans, dim, patch_size, patch_size)

    def forward(self, x, ids_keep=None):
        n, c, h, w = x.shape
        p = self.proj.kernel_size[0]
        x = x.reshape(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(n, -1, c * p * p)
        if ids_keep is not None:
            x = take(x, ids_keep)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)     # (N, L or kept, D)


class Attention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, attention=None, first=None):
        """(N, T, D) -> (N, T, D); a list given as `attention` receives the weights (N, h, T, T).

        With `first`, that many of the first tokens ask all tokens: (N, first, D).
        """
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        q = q[:, :, :first]                                             # (N, h, T or first, D / h)
        # on a CPU in bf16, torch's fused kernel takes 2 to 5 times as long as the two products
        if attention is None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
            x = F.scaled_dot_product_attention(q, k, v)
        else:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()    # once, not in each product
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
            x = weights @ v
            if attention is not None:
                attention.append(weights)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


def drop_path(x, rate, training):
    """Stochastic depth: the branch is 0 for a random share `rate` of the images, scaled up else."""
    if rate == 0.0 or not training:
        return x
    keep = torch.rand(len(x), 1, 1, device=x.device) >= rate
    return x * keep / (1 - rate)


class Block(nn.Module):
    def __init__(self, dim, heads, mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x, attention=None, first=None):
        """(N, T, D) -> (N, T, D), or of the `first` tokens alone, (N, first, D)."""
        branch = self.attn(self.norm1(x), attention, first)
        x = x[:, :first] + drop_path(branch, self.drop_path, self.training)
        return x + drop_path(self.mlp(self.norm2(x)), self.drop_path, self.training)


class VisionTransformer(nn.Module):
    """ViT, pre-norm, class token, fixed sine-cosine positions; names of MAE, MoCo v3 and timm.

    `config` holds the arguments that rebuild it: VisionTransformer(**encoder.config). `head` is
    what follows the class token: nothing, the projector in MoCo v3, a classifier in fine-tuning.
    SizeError: sizes that do not divide each other.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, dim=768, depth=12, heads=12,
                 mlp_ratio=4.0, drop_path=0.0):
        super().__init__()
        img_size = pair(img_size)
        if img_size[0] % patch_size or img_size[1] % patch_size:
            raise SizeError(f"--img-size {img_size[0]}x{img_size[1]} is not a multiple of "
                            f"--patch-size {patch_size}")
        if dim % heads:
            raise SizeError(f"the width {dim} is not divisible by {heads} heads")
        self.config = dict(img_size=list(img_size), patch_size=patch_size, in_chans=in_chans,
                           dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio)
        self.dim, self.depth, self.patch_size = dim, depth, patch_size
        self.grid = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.patch_embed = PatchEmbed(patch_size, in_chans, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(dim, self.grid), requires_grad=False)
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]   # rising with depth
        self.blocks = nn.ModuleList([Block(dim, heads, mlp_ratio, rate) for rate in rates])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Identity()
        init_mae_(self)

    def embed(self, x, ids_keep=None):
        """(N, C, H, W) -> (N, 1 + L, D); with ids_keep (N, K) only those patches, (N, 1 + K, D)."""
        if tuple(x.shape[-2:]) != tuple(self.config["img_size"]):
            raise ValueError(f"images of {tuple(x.shape[-2:])} pixels, the encoder takes "
                             f"{self.config['img_size']}")
        pos = self.pos_embed[:, 1:].expand(len(x), -1, -1)
        if ids_keep is not None:
            pos = take(pos, ids_keep)
        cls = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        return torch.cat([cls, self.patch_embed(x, ids_keep) + pos], 1)

    def tokens(self, x, ids_keep=None):
        """All tokens after the final norm, (N, 1 + L, D)."""
        x = self.embed(x, ids_keep)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_features(self, x):
        """The class token after the final norm, (N, D): the feature that the paper evaluates."""
        x = self.embed(x)
        for i, block in enumerate(self.blocks, start=1):
            x = block(x, first=1 if i == self.depth else None)          # nobody reads the others
        return self.norm(x[:, 0])

    def forward(self, x):
        return self.head(self.forward_features(x))

    def intermediate(self, x, blocks=None, attention=False):
        """Tokens (N, T, D) after each of the given blocks (1 the first; default all), not normed.

        With attention=True returns (tokens, weights): weights (N, h, T, T) of every block up to the
        last asked for. ValueError: no such block.
        """
        wanted = range(1, self.depth + 1) if blocks is None else blocks
        if not all(1 <= b <= self.depth for b in wanted):
            raise ValueError(f"blocks {list(wanted)}: the encoder has blocks 1 to {self.depth}")
        weights = [] if attention else None
        outputs = {}
        x = self.embed(x)
        for i, block in enumerate(self.blocks[:max(wanted)], start=1):
            x = block(x, weights)
            outputs[i] = x
        outputs = [outputs[b] for b in wanted]
        return (outputs, weights) if attention else outputs


def init_mae_(model):
    """MAE's initial weights: Linear xavier-uniform, biases 0, LayerNorm 1 and 0, tokens std .02."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
        elif isinstance(m, PatchEmbed):
            nn.init.xavier_uniform_(m.proj.weight.view(m.proj.weight.shape[0], -1))
            nn.init.zeros_(m.proj.bias)
    nn.init.normal_(model.cls_token, std=0.02)


def init_moco_(encoder):
    """MoCo v3's initial weights: q, k, v xavier-uniform each on its own, cls_token of std 1e-6."""
    init_mae_(encoder)
    for block in encoder.blocks:
        bound = math.sqrt(6.0 / (encoder.dim + encoder.dim))
        nn.init.uniform_(block.attn.qkv.weight, -bound, bound)
    fan = encoder.patch_embed.proj.weight[0].numel() + encoder.dim
    nn.init.uniform_(encoder.patch_embed.proj.weight, -math.sqrt(6.0 / fan), math.sqrt(6.0 / fan))
    nn.init.normal_(encoder.cls_token, std=1e-6)


# ---------------------------------------------------------------------------------------------- MAE
class MaskedAutoencoder(VisionTransformer):
    """MAE (He et al., 2021): encodes the kept patches, decodes all, learns the masked ones."""

    def __init__(self, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pix_loss=True,
                 **encoder):
        super().__init__(**encoder)
        self.norm_pix_loss = norm_pix_loss
        self.decoder_config = dict(decoder_dim=decoder_dim, decoder_depth=decoder_depth,
                                   decoder_heads=decoder_heads, norm_pix_loss=norm_pix_loss)
        self.decoder_embed = nn.Linear(self.dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_dim, self.grid),
                                              requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads)
                                             for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, self.patch_size ** 2 * self.config["in_chans"])
        init_mae_(self)
        nn.init.normal_(self.mask_token, std=0.02)

    def random_masking(self, noise, mask_ratio):
        """noise (N, L) -> ids_keep (N, K), mask (N, L) with 1 = removed, ids_restore (N, L)."""
        n, length = noise.shape
        keep = int(length * (1 - mask_ratio))
        ids_shuffle = noise.argsort(dim=1, stable=True)                 # the same on every device
        ids_restore = ids_shuffle.argsort(1)
        mask = (ids_restore >= keep).to(noise.dtype)
        return ids_shuffle[:, :keep], mask, ids_restore

    def decode(self, latent, ids_restore):
        """latent (N, 1 + K, D), ids_restore (N, L) -> predicted patches (N, L, p p C)."""
        x = self.decoder_embed(latent)
        missing = ids_restore.shape[1] + 1 - x.shape[1]
        masks = self.mask_token.to(x.dtype).expand(len(x), missing, -1)
        patches = take(torch.cat([x[:, 1:], masks], 1), ids_restore)        # unshuffle
        x = torch.cat([x[:, :1], patches], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x))[:, 1:]

    def target(self, imgs):
        """Pixels of each patch (N, L, p p C), with norm_pix_loss of mean 0 and variance 1."""
        target = patchify(imgs, self.patch_size)
        if self.norm_pix_loss:
            target = target - target.mean(-1, keepdim=True)
            # .var() takes 5 times as long
            variance = target.square().sum(-1, keepdim=True) / (target.shape[-1] - 1)
            target = target / (variance + 1e-6).sqrt()
        return target

    def forward(self, imgs, mask_ratio=0.75, noise=None):
        """(N, C, H, W) -> (loss, pred (N, L, p p C), mask (N, L), 1 = removed).

        noise (N, L), by default drawn: the patches of the smallest are kept.
        """
        if noise is None:
            noise = torch.rand(len(imgs), self.grid[0] * self.grid[1], device=imgs.device)
        ids_keep, mask, ids_restore = self.random_masking(noise, mask_ratio)
        pred = self.decode(self.tokens(imgs, ids_keep), ids_restore)
        with torch.autocast(imgs.device.type, enabled=False):
            pred = full(pred)
            loss = (pred - self.target(imgs)).square().mean(-1)             # (N, L)
            loss = (loss * mask).sum() / mask.sum()
        return loss, pred, mask


# ------------------------------------------------------------------------------- contrastive losses
def info_nce(q, k, temperature, rank=0):
    """2 T * cross-entropy of q k^T / T with the positive at its own index (MoCo v3, Algorithm 1).

    q (n, D) of this process, k (N, D) of all; row i of q belongs to row rank * n + i of k.
    """
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    labels = torch.arange(len(q), device=q.device) + len(q) * rank
    return 2 * temperature * F.cross_entropy(q @ k.T / temperature, labels)


def nt_xent(z1, z2, temperature, rank=0, processes=1):
    """SimCLR's loss (Chen et al., 2020): each of 2 N embeddings against the 2 N - 1 others.

    z1, z2 (N, D) of all processes. Returns the mean over this process's rows, so that the mean over
    processes is the loss of the whole batch.
    """
    z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    n = len(z1) // processes
    rows = torch.arange(n, device=z1.device) + n * rank
    z = torch.cat([z1, z2])
    loss = 0.0
    for own, positive in ((rows, rows + len(z1)), (rows + len(z1), rows)):
        logits = z[own] @ z.T / temperature
        logits = logits.scatter(1, own[:, None], float("-inf"))             # never against itself
        loss = loss + F.cross_entropy(logits, positive) / 2
    return loss


def vicreg_terms(x, y, rank=0, processes=1):
    """VICReg's three terms (Bardes et al., 2021) of the whole batch x, y (N, D).

    Invariance: mean squared error; variance: hinge at 1 of sqrt(var + 1e-4), averaged over both;
    covariance: off-diagonal squares / D, summed over both. Each process takes its share of the
    columns of the covariance, times processes: the mean over processes is that of the whole.
    """
    invariance = F.mse_loss(x, y)
    variance, covariance = 0.0, 0.0
    for z in (x, y):
        z = z - z.mean(0)
        var = z.var(0)
        variance = variance + F.relu(1 - (var + 1e-4).sqrt()).mean() / 2
        own = z.tensor_split(processes, 1)[rank]                            # (N, D / processes)
        cov = z.T @ own / (len(z) - 1)
        diagonal = var.tensor_split(processes)[rank]
        covariance = covariance + (cov.square().sum() - diagonal.square().sum()) / z.shape[1]
    return invariance, variance, covariance * processes


def anchors_of(encoder, blocks):
    """(parameters, their values now) of the embeddings and the first `blocks` blocks that train;
    none of them with blocks=None."""
    anchored = [p for name, p in encoder.named_parameters() if blocks is not None
                and p.requires_grad and layer_of(name, encoder.depth) <= min(blocks, encoder.depth)]
    return anchored, [p.detach().clone() for p in anchored]


def anchor_penalty(params, anchors, norm):
    """Sum over all given parameters of |w - w0| (l1) or (w - w0)^2 (l2), w0 those grafted onto."""
    power = {"l1": torch.abs, "l2": torch.square}[norm]
    return sum(power(w - w0).sum() for w, w0 in zip(params, anchors, strict=True))


@torch.no_grad()
def feature_stats(features, q, k, rank=0):
    """What shows a collapse before the accuracy does.

    acc: share of q (n, D) whose nearest k (N, D) is its own, row rank * n + i; std: of the
    normalised q, 1 / sqrt(D) when spread evenly and 0 when collapsed; rank: effective rank of the
    features (n, width), exp(entropy of their normalised singular values) (Roy & Vetterli, 2007).
    """
    q, k = F.normalize(q.float(), dim=1), F.normalize(k.float(), dim=1)
    own = torch.arange(len(q), device=q.device) + (len(q) * rank if len(k) > len(q) else 0)
    centred = features.float() - features.float().mean(0)
    gram = (centred.T @ centred).nan_to_num(0, 0, 0)        # eigvalsh fails on what is not finite
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    share = (singular / singular.sum().clamp_min(1e-12)).clamp_min(1e-12)
    return {"acc": ((q @ k.T).argmax(1) == own).float().mean(), "std": q.std(0).mean(),
            "rank": torch.exp(-(share * share.log()).sum())}


def nearest_of_all(similarity, votes, k):
    """The k most similar (Q, k) of what each process found in its part of the bank, and their
    votes."""
    missing = k - similarity.shape[1]                       # of a part with fewer than k
    similarity = gather(F.pad(similarity, (0, missing), value=-math.inf), 1)
    similarity, index = similarity.topk(k, dim=1)
    return similarity, gather(F.pad(votes, (0, missing)), 1).gather(1, index)


def knn_scores(queries, bank, labels, classes, k=20, temperature=0.07, chunk=1024, shared=False):
    """DINO's weighted k-NN: (Q, classes) sums of exp(cos / temperature) over the k nearest.

    queries (Q, D), bank (N, D), labels (N,). In chunks of queries, so that memory is chunk x N and
    not Q x N. k may be a list: then a list is returned. shared: bank and labels are this process's
    part of them, and all processes ask the same queries.
    """
    ks = [k] if isinstance(k, int) else list(k)
    queries, bank = F.normalize(queries, dim=1), F.normalize(bank, dim=1)
    scores = [torch.zeros(len(queries), classes, device=queries.device) for _ in ks]
    for start in range(0, len(queries), chunk):
        similarity = queries[start:start + chunk] @ bank.T
        nearest, index = similarity.topk(min(max(ks), len(bank)), dim=1)
        votes = labels[index]
        if shared:
            nearest, votes = nearest_of_all(nearest, votes, max(ks))
        weights = (nearest / temperature).exp()
        for score, n in zip(scores, ks):
            score[start:start + chunk].scatter_add_(1, votes[:, :n], weights[:, :n])
    return scores[0] if isinstance(k, int) else scores


# ------------------------------------------------------------------------------- contrastive models
def mlp_head(dims, last="batchnorm", bias=False):
    """Linear, BatchNorm, ReLU, ..., Linear; then BatchNorm without affine (MoCo v3) or nothing."""
    layers = []
    for i, (a, b) in enumerate(zip(dims[:-1], dims[1:])):
        final = i == len(dims) - 2
        layers.append(nn.Linear(a, b, bias=bias and not final))
        if not final:
            layers += [BatchNorm1d(b), nn.ReLU(inplace=True)]
        elif last == "batchnorm":
            layers.append(BatchNorm1d(b, affine=False))
    return nn.Sequential(*layers)


def micro_batches(n, size):
    """Slices of n images, `size` in each but the first, which has the rest; 0: all in one."""
    size = size or n
    return [slice(max(end - size, 0), end) for end in range(n, 0, -size)][::-1]


def again(function, *inputs):
    """function(*inputs), whose activations are not kept but computed again in the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def class_tokens(encoder, x1, x2, micro_batch=0, keep_last=True):
    """Features (2, n, D) of two views (n, C, h, w), each image's on its own, in float32 or better.

    With micro_batch, activations are kept for that many images per view only and computed again in
    the backward pass: exact, since nothing in the encoder mixes images (Gao et al., 2021, "Scaling
    deep contrastive learning batch size under memory limited setup"). The last images' backward
    pass comes first: their activations are kept, unless keep_last is False.
    """
    def features(x1, x2):
        return full(encoder.forward_features(torch.cat([x1, x2]))).unflatten(0, (2, -1))

    *first, last = [(x1[part], x2[part]) for part in micro_batches(len(x1), micro_batch)]
    kept = features if keep_last or not first else partial(again, features)
    return torch.cat([*(again(features, *views) for views in first), kept(*last)], 1)


def mae_loss(encoder, images, noise, mask_ratio, micro_batch=0):
    """The MAE loss of the whole batch, as the mean of its micro-batches (all mask equally many)."""
    def share(images, noise):
        return encoder(images, mask_ratio, noise)[0] * (len(images) / n)

    n = len(images)
    *first, last = [(images[part], noise[part]) for part in micro_batches(n, micro_batch)]
    return sum([again(share, *part) for part in first] + [share(*last)])


class TwoViews(nn.Module):
    """One encoder, two views: what MoCo v3, VICReg and SimCLR share. `base_encoder.head` projects.

    forward(x1, x2 (n, C, h, w), micro_batch=0, mim=None) returns (loss, log): the mean over
    processes of the loss is that of the whole batch; log holds tensors without gradient, features,
    q and k for `feature_stats` and the terms of the loss. For multi-task learning, mim = (images,
    noise, mask_ratio) adds mim_weight * the MAE loss of the same encoder, a MaskedAutoencoder.
    """

    def __init__(self, encoder, head, mim_weight=0.0):
        super().__init__()
        self.base_encoder = encoder
        self.base_encoder.head = head
        self.mim_weight = mim_weight

    def with_mim(self, loss, log, mim, micro_batch):
        """What `forward` returns, from a contrastive loss and its log."""
        if mim is None:
            return loss, log
        reconstruction = mae_loss(self.base_encoder, *mim, micro_batch)
        log |= dict(contrastive=loss.detach(), mim=reconstruction.detach())
        return loss + self.mim_weight * reconstruction, log

    def update_momentum(self, m):
        """Nothing to move: only MoCo v3 has a momentum encoder."""


class MoCoV3(TwoViews):
    """MoCo v3 (Chen et al., 2021), with its names base_encoder, momentum_encoder and predictor."""

    def __init__(self, encoder, hidden=4096, out=256, temperature=0.2, mim_weight=0.0):
        super().__init__(encoder, mlp_head([encoder.dim, hidden, hidden, out]), mim_weight)
        self.temperature = temperature
        self.momentum_encoder = VisionTransformer(**encoder.config)
        self.momentum_encoder.head = mlp_head([encoder.dim, hidden, hidden, out])
        self.predictor = mlp_head([out, hidden, out])
        base = encoder.state_dict()
        ours = self.momentum_encoder.state_dict()
        self.momentum_encoder.load_state_dict({name: base[name] for name in ours})
        self.momentum_encoder.requires_grad_(False)

    def forward(self, x1, x2, micro_batch=0, mim=None):
        """Algorithm 1 of MoCo v3; `update_momentum` was called before."""
        base, momentum, tau = self.base_encoder, self.momentum_encoder, self.temperature
        features = class_tokens(base, x1, x2, micro_batch, keep_last=mim is None)
        q1, q2 = self.predictor(base.head(features))
        with torch.no_grad():
            k1, k2 = gather(momentum.head(class_tokens(momentum, x1, x2, micro_batch)), dim=1)
        with torch.autocast(x1.device.type, enabled=False):     # q and k leave a BatchNorm: float32
            loss = info_nce(q1, k2, tau, world()[0]) + info_nce(q2, k1, tau, world()[0])
        log = dict(features=features[0].detach(), q=q1.detach(), k=k2)
        return self.with_mim(loss, log, mim, micro_batch)

    @torch.no_grad()
    def update_momentum(self, m):
        """momentum <- m * momentum + (1 - m) * base. As lerp: equal weights stay equal."""
        base = dict(self.base_encoder.named_parameters())
        names, ours = zip(*self.momentum_encoder.named_parameters())
        torch._foreach_lerp_(list(ours), [base[name] for name in names], 1 - m)


class VICReg(TwoViews):
    """VICReg: expander Linear, BatchNorm, ReLU twice, then Linear; weights 25, 25, 1."""

    def __init__(self, encoder, hidden=8192, out=8192, coefficients=(25.0, 25.0, 1.0),
                 mim_weight=0.0):
        head = mlp_head([encoder.dim, hidden, hidden, out], last="linear", bias=True)
        super().__init__(encoder, head, mim_weight)
        self.coefficients = coefficients

    def forward(self, x1, x2, micro_batch=0, mim=None):
        features = class_tokens(self.base_encoder, x1, x2, micro_batch, keep_last=mim is None)
        z = self.base_encoder.head(features)
        with torch.autocast(x1.device.type, enabled=False):     # the covariance overflows float16
            z1, z2 = gather_with_grad(full(z), dim=1)                       # (2, N, D)
            terms = vicreg_terms(z1, z2, *world())
            loss = sum(c * term for c, term in zip(self.coefficients, terms))
        log = dict(zip(("invariance", "variance", "covariance"), (term.detach() for term in terms)))
        log["covariance"] = gather(log["covariance"][None]).mean()
        log |= dict(features=features[0].detach(), q=z1.detach(), k=z2.detach())
        return self.with_mim(loss, log, mim, micro_batch)


class SimCLR(TwoViews):
    """SimCLR's loss on MoCo v3's projector, without momentum encoder or predictor."""

    def __init__(self, encoder, hidden=4096, out=256, temperature=0.2, mim_weight=0.0):
        super().__init__(encoder, mlp_head([encoder.dim, hidden, hidden, out]), mim_weight)
        self.temperature = temperature

    def forward(self, x1, x2, micro_batch=0, mim=None):
        features = class_tokens(self.base_encoder, x1, x2, micro_batch, keep_last=mim is None)
        z = self.base_encoder.head(features)
        with torch.autocast(x1.device.type, enabled=False):
            z1, z2 = gather_with_grad(full(z), dim=1)                       # (2, N, D)
            loss = nt_xent(z1, z2, self.temperature, *world())
        log = dict(features=features[0].detach(), q=z1.detach(), k=z2.detach())
        return self.with_mim(loss, log, mim, micro_batch)


# ------------------------------------------------------------------------------ rates and schedules
def layer_of(name, depth):
    """Layer number of a parameter name: 0 embeddings, 1..depth blocks, depth + 1 all after them."""
    name = name.removeprefix("module.").removeprefix("base_encoder.")
    if name.startswith(("patch_embed.", "cls_token", "pos_embed")):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def stage_of(layer, depth, stages):
    """The blocks in equal parts; embeddings go with the first, norm and heads with the last.

    SizeError: the number of stages does not divide the depth.
    """
    if depth % stages:
        raise SizeError(f"{stages} rates given (--lr) for {depth} blocks: the number of stages "
                        "must divide the depth")
    return min(max(layer - 1, 0) * stages // depth, stages - 1)


def freeze(model, depth, lrs=(1.0,), blocks=0, patch_embed=False):
    """Excludes from training what must not move: layers whose stage has rate 0, the embeddings and
    the lowest `blocks` blocks, the patch projection. Nothing is computed for them in the backward
    pass, nor below the lowest layer that is trained. SizeError: nothing is left to train.
    """
    for name, p in model.named_parameters():
        layer = layer_of(name, depth)
        if lrs[stage_of(layer, depth, len(lrs))] == 0 or (blocks and layer <= blocks):
            p.requires_grad = False
        if patch_embed and ".patch_embed." in "." + name:
            p.requires_grad = False
    if not any(p.requires_grad for p in model.parameters()):
        raise SizeError("nothing is left to train: every rate is 0 (--lr), or every block is "
                        "frozen (--freeze-blocks)")


def param_groups(model, depth, lrs, weight_decay, decay_all=False, layer_decay=None, no_decay=()):
    """AdamW groups, each with a base rate. One table serves MAE (one rate), grafting (a rate per
    stage) and fine-tuning (one rate times layer_decay ** layers above).

    1-D parameters get no weight decay unless decay_all, nor do those of a name in no_decay. Frozen
    parameters (requires_grad False) are in no group. Returns a list of dicts with params, names,
    weight_decay, base_lr and stage.
    """
    groups = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layer = layer_of(name, depth)
        decays = decay_all or p.ndim > 1 and name.split(".")[-1] not in no_decay
        decay = weight_decay if decays else 0.0
        if layer_decay is None:
            # Layer grafting is these two lines. Trained together, MAE's and the contrastive loss
            # pull the encoder in opposite directions; what MAE gives best are the lower layers.
            # They keep a tenth of the rate (1.5e-5, 1.5e-5, 1.5e-4 in the paper) and stay close to
            # it, while the upper third learns the contrastive loss. One rate for all is MoCo v3
            # from MAE's weights; 0 below is MIM -> CL grafting with frozen layers.
            stage = stage_of(layer, depth, len(lrs))
            base_lr = lrs[stage]
        else:
            stage = layer
            base_lr = lrs[0] * layer_decay ** (depth + 1 - layer)
        new = dict(params=[], names=[], weight_decay=decay, base_lr=base_lr, stage=stage)
        group = groups.setdefault((stage, decay), new)
        group["params"].append(p)
        group["names"].append(name)
    placed = sorted(id(p) for g in groups.values() for p in g["params"])
    trained = sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert placed == trained, "each trained parameter in exactly one group"
    return [groups[key] for key in sorted(groups)]


def group_table(groups, scale):
    """Lines that show each group: base rate, rate in force (base * scale), decay, sizes, name."""
    lines = [f"{'stage':>5} {'base rate':>10} {'actual':>10} {'decay':>6} {'tensors':>8} "
             f"{'parameters':>12}  first tensor"]
    for g in groups:
        base, size = g["base_lr"], sum(p.numel() for p in g["params"])
        lines.append(f"{g['stage']:>5} {base:>10.3g} {base * scale:>10.3g} "
                     f"{g['weight_decay']:>6.2g} {len(g['params']):>8} {size:>12,}  "
                     f"{g['names'][0]}")
    return lines


def set_rates(optimizer, factor):
    """Each group's rate: its base rate times `factor`, global batch / 256 times `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def lr_factor(step, steps, warmup_steps, floor=0.0):
    """Linear warm-up from 0, then half a cosine down to `floor`: the factor on every base rate."""
    if step < warmup_steps:
        return step / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def momentum_at(step, steps, start=0.99):
    """MoCo v3's encoder momentum, rising from `start` to 1 over half a cosine."""
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * step / steps))


# -------------------------------------------------------------------------------------- classifiers
class Classifier(VisionTransformer):
    """An encoder and a linear classifier on its class token: (N, C, H, W) -> logits (N, classes).

    head: {"kind": "linear"}, or {"kind": "projector", "width", "bias"} for the projector's first
    Linear before the classifier, with nothing between them. The first `frozen` blocks stay in
    evaluation mode.
    """

    def __init__(self, config, head, classes, drop_path=0.0):
        super().__init__(**config, drop_path=drop_path)
        self.frozen = 0
        self.head = classifier = nn.Linear(head.get("width", self.dim), classes)
        if head["kind"] == "projector":
            first = nn.Linear(self.dim, head["width"], bias=head["bias"])
            self.head = nn.Sequential(first, classifier)
        # MAE's: std 2e-5 (cut at +-2, as in timm), so that classes are equally likely at first
        nn.init.trunc_normal_(classifier.weight, std=2e-5)
        nn.init.zeros_(classifier.bias)

    def train(self, mode=True):
        super().train(mode)
        self.blocks[:self.frozen].eval()
        return self


def confusion_matrix(predicted, labels, classes):
    """(C, C) counts of images by true class (rows) and predicted class, from (N,) int64 each."""
    return (labels * classes + predicted).bincount(minlength=classes ** 2).reshape(classes, classes)


def accuracies(confusion, among_five):
    """Percentages from a confusion matrix (C, C) and the number of images whose class is among the
    five likeliest: top1; balanced, the mean recall of the classes tested; top5, of more than five
    classes.
    """
    right, support = confusion.diagonal().double(), confusion.sum(1).double()
    recall = right[support > 0] / support[support > 0]
    found = dict(top1=100 * (right.sum() / support.sum()).item(),
                 balanced=100 * recall.mean().item())
    if len(confusion) > 5:
        found["top5"] = 100 * among_five / int(support.sum())
    return found
