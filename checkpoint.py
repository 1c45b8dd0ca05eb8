"""Checkpoints: written so that a kill loses nothing, read as tensors only, in the layouts people have.

`read_encoder` takes our own files, MAE's (encoder only or full), MoCo v3's, DINO's and timm's ViT, told apart by
their keys and shapes.
"""
import argparse
import errno
import hashlib
import json
import math
import os
import pickletools
import shutil
import zipfile
from collections import Counter

import torch
import torch.nn.functional as F

from data import RunError, UsageError
from model import VisionTransformer


# pickle operations in a file: a ViT-H with its optimizer has some 50,000
LONGEST = 1_000_000
# the largest of everything that a ViT is rebuilt from: far above any that exists, far below what fills a machine
LARGEST = dict(patch_size=256, in_chans=64, dim=16384, depth=256, heads=256)


# ---------------------------------------------------------------------------------------- writing and reading
def save(obj, path):
    """torch.save under a temporary name, flushed to disk, then renamed: `path` is always whole, old or new."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as f:
            torch.save(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)                                                    # the new name too, should the power fail
        os.close(folder)
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "file write failed" in str(error)
        if "unexpected pos" in str(error):                                  # all that torch says of a short write
            full = full or shutil.disk_usage(os.path.dirname(path) or ".").free < 1 << 20
        why = "the disk is full" if full else getattr(error, "strerror", None) or "the write fails"
        if os.path.exists(temporary):
            os.remove(temporary)
        kept = f"; the one before is intact: {path}" if os.path.exists(path) else ""
        raise RunError(f"cannot write {path}: {why}{kept}") from None


def read(path):
    """What a checkpoint holds, on the CPU. Tensors and plain values only: a file that carries code is refused."""
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such checkpoint")
    try:
        parts = inspect(path)
        with torch.serialization.safe_globals([argparse.Namespace]):        # the options in MAE's and DINO's own files
            content = torch.load(path, map_location="cpu", weights_only=True)
        measure(content, os.path.getsize(path), parts, path)
        return content
    except UsageError:
        raise
    except Exception as error:                                              # torch raises many kinds for a bad file
        said = str(error)
        if "global" in said.lower() or "unrecognized function" in said:     # torch's words for a class or a function
            raise UsageError(f"{path}: refused, it holds more than tensors and plain values "
                             "(a pickled object could run code when it is read)") from None
        raise UsageError(f"{path}: not a readable PyTorch checkpoint "
                         f"({type(error).__name__}: {said.split('. ')[0][:80]})") from None


def inspect(path):
    """Refuse, before a byte of it is interpreted, a file that would take hours or all memory to read.

    Its pickle may not have more operations than LONGEST, and a zip archive holds its tensors uncompressed, as
    torch.save writes them: a small file cannot blow up. Returns the sizes of what the archive holds, or None.
    """
    if not zipfile.is_zipfile(path):                                        # torch before 1.6: five pickles, then bytes
        with open(path, "rb") as f:
            count_operations(f, path, pickles=5)
        return None
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > LONGEST or any(e.compress_type != zipfile.ZIP_STORED for e in entries):
            raise UsageError(f"{path}: refused, it is compressed or has too many parts (torch.save writes neither)")
        if sum(e.file_size for e in entries) > os.path.getsize(path):
            raise UsageError(f"{path}: refused, its parts claim more bytes than the file has")
        for e in entries:
            if e.filename.endswith("/data.pkl"):
                with archive.open(e) as f:
                    count_operations(f, path)
    return Counter(e.file_size for e in entries)


def count_operations(stream, path, pickles=1):
    """Refuse pickles of more than LONGEST operations. What is no pickle is left for torch to say."""
    seen = 0
    try:
        for _ in range(pickles):
            for _ in pickletools.genops(stream):
                seen += 1
                if seen > LONGEST:
                    raise UsageError(f"{path}: refused, its list of contents is longer than that of any model "
                                     f"(over {LONGEST:,} operations)")
    except UsageError:
        raise
    except Exception:                                                       # damaged, or the bytes after the pickles
        return


def measure(content, size, parts, path):
    """Refuse tensors that are not in the file: larger than it or its parts, or one number repeated into a huge shape.

    None of their bytes has been touched yet: those of a tensor larger than its part of the archive may not exist.
    """
    todo, seen, storages = [content], set(), {}
    while todo:
        value = todo.pop()
        if id(value) in seen:                                               # what is nested in itself ends here
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise UsageError(f"{path}: refused, it holds a tensor that is not dense or not stored")
            storage = value.untyped_storage()
            if storage.nbytes():
                storages[storage.data_ptr()] = storage.nbytes()
            if value.numel() * value.element_size() > storage.nbytes():
                raise UsageError(f"{path}: refused, a tensor of shape {tuple(value.shape)} has only "
                                 f"{storage.nbytes()} bytes in the file")
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo.append(vars(value))
    if sum(storages.values()) > size or (parts is not None and Counter(storages.values()) - parts):
        raise UsageError(f"{path}: refused, its tensors claim {sum(storages.values()):,} bytes, the file has {size:,}")


def in_folder(path, name="encoder.pt"):
    """A run's folder stands for the encoder.pt in it."""
    return os.path.join(path, name) if os.path.isdir(path) else path


# ------------------------------------------------------------------------------------------------ layouts
def _strip(state, prefix):
    """Names without the prefix. Those that lack it stay as they are: they are reported as left out."""
    return {k.removeprefix(prefix): v for k, v in state.items()}


def _tensors(state):
    return {k: v for k, v in state.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def unwrap(content, path="checkpoint", weights="base"):
    """(state of one ViT with whatever hangs on it, name of the layout)."""
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    state, layout = content, "timm"
    for key, name in (("model", "MAE"), ("state_dict", "timm"), ("teacher", "DINO")):
        if isinstance(content.get(key), dict):
            state, layout = content[key], name
            break
    state = _tensors(state)
    if any(k.startswith("module.") for k in state):
        layout = "MoCo v3" if layout == "timm" else layout                  # its linear classifiers are such files
        state = _strip(state, "module.")
    if any(k.startswith("backbone.") for k in state):
        state, layout = _strip(state, "backbone."), "DINO"
    if any(k.startswith("base_encoder.") for k in state):
        state, layout = _strip(state, {"base": "base_encoder.", "momentum": "momentum_encoder."}[weights]), "MoCo v3"
    elif weights == "momentum":
        raise UsageError(f"{path}: holds no momentum encoder")
    return state, layout


def is_encoder(key):
    return key in ("cls_token", "pos_embed") or key.startswith(("patch_embed.proj.", "blocks.", "norm."))


def config_of(state, layout, path):
    """The VisionTransformer arguments that a state dict was made with, from its shapes."""
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise UsageError(f"{path}: no ViT in it (no patch_embed.proj.weight and pos_embed); its first keys are "
                         f"{', '.join(list(state)[:3]) or 'none'}")
    weight, pos = state["patch_embed.proj.weight"], state["pos_embed"]
    if (weight.ndim != 4 or pos.ndim != 3 or weight.shape[2] != weight.shape[3] or pos.shape[2] != weight.shape[0]
            or 0 in weight.shape or 0 in pos.shape):
        raise UsageError(f"{path}: patch projection {tuple(weight.shape)} and pos_embed {tuple(pos.shape)} "
                         "are not those of a ViT")
    side = math.isqrt(pos.shape[1] - 1)
    if side * side != pos.shape[1] - 1:
        raise UsageError(f"{path}: {pos.shape[1] - 1} positions are no square grid after one class token "
                         "(distilled models and register tokens are not supported)")
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    dim, in_chans, patch, _ = weight.shape
    hidden = len(state["blocks.0.mlp.fc1.bias"]) if state.get("blocks.0.mlp.fc1.bias", pos).ndim == 1 else 0
    # the number of heads leaves no trace in the shapes: 64 wide, but MoCo v3's ViT-S has 12, ViT-H 80 wide
    heads = {1280: 16}.get(dim, max(dim // 64, 1))
    if layout == "MoCo v3" and dim == 384:
        heads = 12
    return dict(img_size=[side * patch, side * patch], patch_size=patch, in_chans=in_chans, dim=dim, depth=depth,
                heads=heads, mlp_ratio=hidden / dim)


def check_config(config, state, path):
    """Refuse what no ViT is, before one of that size is made: a file may claim any width, depth or picture."""
    sides = config.get("img_size")
    sides = sides if isinstance(sides, (list, tuple)) else [sides, sides]
    ratio = config.get("mlp_ratio", 4.0)
    whole = {"img_size": 16384} | LARGEST
    claims = [("img_size", side) for side in sides] + [(k, v) for k, v in config.items() if k in LARGEST]
    for name, value in claims:
        if type(value) is not int or not 1 <= value <= whole[name]:
            raise UsageError(f"{path}: refused, it claims a ViT with {name} {value!r:.40}")
    if len(sides) != 2 or not isinstance(ratio, (int, float)) or not 0 < ratio <= 64:
        raise UsageError(f"{path}: refused, it claims a ViT with img_size {sides!r:.40} and mlp_ratio {ratio!r:.40}")
    blocks = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    if config.get("depth", blocks) != blocks:
        raise UsageError(f"{path}: refused, it claims {config['depth']} blocks and has {blocks}")
    lengths = [state[k].numel() for k in ("cls_token", "norm.weight") if k in state]
    if any(n != config.get("dim", n) for n in lengths):
        raise UsageError(f"{path}: refused, it claims a width of {config['dim']} and has {lengths[0]}")


def check_meta(meta, config, path):
    """Mean and std that a file gives for its pictures must be numbers, one for each channel."""
    for name in ("mean", "std"):
        values = meta.get(name)
        if values is None:
            continue
        if (not isinstance(values, (list, tuple)) or len(values) != config.get("in_chans", 3)
                or not all(isinstance(v, float) and 0 <= v <= 1 for v in values) or (name == "std" and 0 in values)):
            raise UsageError(f"{path}: refused, its {name} of the channels is {values!r:.60}")
    if not isinstance(meta.get("system", ""), str):
        raise UsageError(f"{path}: refused, its system is {meta['system']!r:.40}, no name")


def check_linear(content, path):
    """Refuse a classifier-*.pt whose parts are not what evaluate.py writes."""
    head, classes = content.get("classifier"), content.get("classes")
    kinds = (("checkpoint", str), ("encoder_digest", str), ("classes", (list, tuple)), ("classifier", dict),
             ("mean", (list, tuple)), ("std", (list, tuple)))
    wrong = [name for name, kind in kinds if not isinstance(content.get(name), kind)]
    if not wrong and not (all(torch.is_tensor(head.get(k)) for k in ("weight", "bias")) and "normalise" in head and
                          head["weight"].ndim == 2 and len(head["weight"]) == len(classes) == head["bias"].numel()):
        wrong = ["classifier"]
    if wrong:
        raise UsageError(f"{path}: not a classifier that evaluate.py wrote ({wrong[0]})")
    check_meta(content, dict(in_chans=len(content["mean"])), path)


def read_encoder(path, weights="base"):
    """The ViT in a checkpoint file (or in the encoder.pt of a run's folder).

    Returns a dict: state (encoder tensors under the official names), config (arguments of VisionTransformer), rest
    (every other tensor found beside them), meta (what our own files say besides: mean, std, system, ...), layout, digest.
    weights: "base" or "momentum", for files of MoCo v3 that hold both.
    """
    path = in_folder(path)
    content = read(path)
    state, layout = unwrap(content, path, weights)
    meta = {}
    if isinstance(content.get("config"), dict):
        config, meta, layout = content["config"], content.get("meta"), "ours"
        meta = meta if isinstance(meta, dict) else {}
    else:
        config = config_of(state, layout, path)
    check_config(config, state, path)
    check_meta(meta, config, path)
    encoder = {k: v for k, v in state.items() if is_encoder(k)}
    try:
        with torch.device("meta"):
            expected = {k: v.shape for k, v in VisionTransformer(**config).state_dict().items()}
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path}: not a ViT that can be rebuilt ({error})") from None
    missing = sorted(set(expected) - set(encoder))
    surplus = sorted(set(encoder) - set(expected))
    wrong = [k for k in expected if k in encoder and encoder[k].shape != expected[k]]
    if missing or surplus or wrong:
        first = (missing or surplus or wrong)[0]
        raise UsageError(f"{path}: {len(missing)} encoder tensors missing, {len(surplus)} unknown, {len(wrong)} of "
                         f"another shape; first: {first}")
    broken = [k for k, v in encoder.items() if not v.is_floating_point() or not v.isfinite().all()]
    if broken:
        raise UsageError(f"{path}: {broken[0]} holds what is not a finite number")
    with open(path, "rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()[:12]
    return dict(state=encoder, config=config, rest={k: v for k, v in state.items() if not is_encoder(k)}, meta=meta,
                layout=layout, path=path, digest=digest)


def fit(source, img_size=None, in_chans=None):
    """The encoder of `read_encoder` for another picture size or number of channels, as (state, config).

    Positions are carried, resampled (bicubic) for another grid: MoCo v3's table is not MAE's, and trained ones exist.
    Channels: the patch projection is summed to one, else repeated in turn and scaled by old / new.
    """
    state, config = dict(source["state"]), dict(source["config"])
    patch = config["patch_size"]
    if in_chans is not None and in_chans != config["in_chans"]:
        weight = state["patch_embed.proj.weight"]
        old = config["in_chans"]
        if in_chans == 1:
            weight = weight.sum(1, keepdim=True)
        else:
            weight = weight[:, [i % old for i in range(in_chans)]] * (old / in_chans)
        state["patch_embed.proj.weight"] = weight
        config["in_chans"] = in_chans
    if img_size is not None and list(img_size) != list(config["img_size"]):
        old = [s // patch for s in config["img_size"]]
        new = [s // patch for s in img_size]
        pos = state["pos_embed"]
        if old != new:
            grid = pos[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False).to(pos.dtype)
            state["pos_embed"] = torch.cat([pos[:, :1], grid.permute(0, 2, 3, 1).flatten(1, 2)], 1)
        config["img_size"] = list(img_size)
    return state, config


def decoder_config(source, norm_pix_loss=None):
    """MaskedAutoencoder's arguments for the MAE decoder in a file of `read_encoder`: as ours say, else from shapes.

    norm_pix_loss is nowhere in the other layouts: False unless given.
    """
    rest, known = source["rest"], source["meta"].get("decoder") or {}
    dim = rest["decoder_embed.weight"].shape[0]
    blocks = {k.split(".")[1] for k in rest if k.startswith("decoder_blocks.")}
    # heads leave no trace in the shapes; MAE's have a width of 32
    heads = known.get("decoder_heads", max(dim // 32, 1)) if isinstance(known, dict) else 0
    for name, value, most in (("width", dim, LARGEST["dim"]), ("blocks", len(blocks), LARGEST["depth"]),
                              ("heads", heads, LARGEST["heads"])):
        if type(value) is not int or not 0 <= value <= most or (name == "heads" and (not value or dim % value)):
            raise UsageError(f"{source['path']}: refused, it claims a decoder with {name} {value!r:.40}")
    if norm_pix_loss is None:
        norm_pix_loss = known.get("norm_pix_loss", source["layout"] == "ours")
    return dict(decoder_dim=dim, decoder_depth=len(blocks), decoder_heads=heads, norm_pix_loss=norm_pix_loss)


def report(source, taken=()):
    """Lines that say what a file gave: layout, tensors taken, tensors left out and why."""
    c = source["config"]
    left = [k for k in source["rest"] if k not in taken]
    lines = [f"{source['path']}: {source['layout']} layout, ViT of width {c['dim']}, {c['depth']} blocks, "
             f"{c['heads']} heads, patch {c['patch_size']}, pictures of {c['img_size'][0]}x{c['img_size'][1]}; "
             f"{len(source['state'])} encoder tensors loaded" + (f", {len(taken)} more" if taken else "")]
    if left:
        groups = sorted({k.split(".")[0] for k in left})
        lines.append(f"  left out: {len(left)} tensors that are not of the encoder ({', '.join(groups[:6])})")
    return lines


def encoder_file(model, meta):
    """What encoder.pt holds: the encoder's weights under the official names and what rebuilds it.

    A MoCo v3 projector is kept beside them (head.*): fine-tuning can start from its first layer.
    """
    encoder = getattr(model, "base_encoder", model)
    state = {k: v.detach().cpu() for k, v in encoder.state_dict().items() if is_encoder(k) or k.startswith("head.")}
    return {"model": state, "config": encoder.config, "meta": meta}


# ------------------------------------------------------------------------------------------------ export
def export(source, kind, path):
    """Write the encoder of `read_encoder` for timm (a state dict file) or transformers (a folder); says how to load it.

    timm: timm.create_model(...).load_state_dict(torch.load(path), strict=True); its features are ours.
    hf: ViTModel.from_pretrained(path, add_pooling_layer=False), under the names of the files on the hub.
    """
    state, config = source["state"], source["config"]
    height, width = config["img_size"]
    size = height if height == width else (height, width)
    if kind == "timm":
        save({k: v.contiguous() for k, v in state.items()}, path)
        return (f"wrote {path}; load it with\n  model = timm.models.VisionTransformer(img_size={size}, "
                f"patch_size={config['patch_size']}, in_chans={config['in_chans']}, embed_dim={config['dim']}, "
                f"depth={config['depth']}, num_heads={config['heads']}, mlp_ratio={config['mlp_ratio']:g}, num_classes=0)\n"
                f"  model.load_state_dict(torch.load({path!r}), strict=True)")
    names = {"embeddings.cls_token": state["cls_token"], "embeddings.position_embeddings": state["pos_embed"],
             "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
             "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
             "layernorm.weight": state["norm.weight"], "layernorm.bias": state["norm.bias"]}
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.output.dense",
             "mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for i in range(config["depth"]):
        for kind_of in ("weight", "bias"):
            for ours, theirs in parts.items():
                names[f"encoder.layer.{i}.{theirs}.{kind_of}"] = state[f"blocks.{i}.{ours}.{kind_of}"]
            qkv = state[f"blocks.{i}.attn.qkv.{kind_of}"].chunk(3)
            for letter, value in zip(("query", "key", "value"), qkv):
                names[f"encoder.layer.{i}.attention.attention.{letter}.{kind_of}"] = value
    described = dict(model_type="vit", architectures=["ViTModel"], hidden_size=config["dim"],
                     num_hidden_layers=config["depth"], num_attention_heads=config["heads"],
                     intermediate_size=int(config["dim"] * config["mlp_ratio"]), hidden_act="gelu",
                     hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-6,
                     image_size=size, patch_size=config["patch_size"], num_channels=config["in_chans"], qkv_bias=True)
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(described, f, indent=1)
    save({k: v.contiguous().clone() for k, v in names.items()}, os.path.join(path, "pytorch_model.bin"))
    return f"wrote {path}/; load it with\n  model = transformers.ViTModel.from_pretrained({path!r}, add_pooling_layer=False)"
