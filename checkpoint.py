"""Checkpoints: written so that a kill loses nothing, read as tensors only, in many layouts.

`read_encoder` takes our own files, MAE's (encoder only or full), MoCo v3's, DINO's, timm's and
torchvision's ViT, transformers' ViT and ViTMAE (safetensors or pickle, a folder or a name in the
local hub cache), told apart by their keys and shapes. For features of your own images,
(N, C, H, W) in [0, 1] -> (N, D):

    import checkpoint
    encoder = checkpoint.load("out/graft")              # frozen, in evaluation mode
    features = encoder.forward_features(encoder.normalise(images))
"""
import argparse
import errno
import glob
import hashlib
import json
import math
import os
import pickletools
import re
import shutil
import struct
import zipfile

import torch
import torch.nn.functional as F

from model import ARCHS, VisionTransformer

# pickle operations in a file: a ViT-H with its optimizer has some 50,000
LONGEST = 1_000_000
# the largest a ViT is rebuilt from: far above any that exists, far below what fills a machine
LARGEST = dict(patch_size=256, in_chans=64, dim=16384, depth=256, heads=256)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SAFE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
              "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
              "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


class CheckpointError(ValueError):
    """A file that cannot be used (exit code 2), or one that cannot be written (1)."""

    def __init__(self, message, exit_code=2):
        super().__init__(message)
        self.exit_code = exit_code


# ------------------------------------------------------------------------- writing and reading
def save(obj, path, write=torch.save):
    """write(obj, file) under a temporary name, flushed, renamed: `path` is whole, old or new."""
    temporary = f"{path}.tmp"
    folder = os.path.dirname(path) or "."
    try:
        with open(temporary, "wb") as f:
            write(obj, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
        opened = os.open(folder, os.O_RDONLY)
        os.fsync(opened)                                # the new name too, should the power fail
        os.close(opened)
    except (OSError, RuntimeError) as error:
        full = (getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                or "file write failed" in str(error))
        if "unexpected pos" in str(error):              # all that torch says of a short write
            full = full or shutil.disk_usage(folder).free < 1 << 20
        why = "the disk is full" if full else getattr(error, "strerror", None) or "the write fails"
        if os.path.exists(temporary):
            os.remove(temporary)
        kept = f"; the one before is intact: {path}" if os.path.exists(path) else ""
        raise CheckpointError(f"cannot write {path}: {why}{kept}", exit_code=1) from None


def write_safetensors(state, f):
    """safetensors' format: the header's length in 8 bytes, the header as JSON, the bytes."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    kinds = {dtype: name for name, dtype in SAFE_TYPES.items()}
    for name, tensor in state.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=kinds[tensor.dtype], shape=list(tensor.shape),
                            data_offsets=[start, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    f.write(len(text).to_bytes(8, "little") + text)
    for tensor in state.values():
        f.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def read_safetensors(path):
    """{name: tensor}; ValueError and its like for a damaged file."""
    size, total, state = os.path.getsize(path), 0, {}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(size - 8, 1 << 22):
            raise ValueError("its header is longer than the file, or than that of any model")
        header = json.loads(f.read(length))
        header.pop("__metadata__", None)
        for name, part in header.items():
            (start, end), dtype = part["data_offsets"], SAFE_TYPES[part["dtype"]]
            total += end - start
            if (not 0 <= start <= end or total > size - 8 - length
                    or end - start != math.prod(part["shape"]) * dtype.itemsize):
                raise ValueError(f"{name} claims bytes that are not there")
            f.seek(8 + length + start)
            content = bytearray(f.read(end - start))
            tensor = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0)
            state[name] = tensor.to(dtype).reshape(part["shape"])
    return state


class Dtype:
    """Stands for numpy.dtype where a pickle holds numbers of numpy: no code of it is run."""

    def __init__(self, code, *_):
        self.format = "<" + {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "i2": "h",
                             "i1": "b", "u8": "Q", "u4": "I", "u2": "H", "u1": "B", "b1": "?"}[code]

    def __setstate__(self, state):
        if state[1] == ">":
            self.format = ">" + self.format[1:]


def number(dtype, content):
    """A number of numpy as a plain one."""
    return struct.unpack(dtype.format, content)[0]


# the options in MAE's and DINO's own files, and numbers of numpy 1 and 2
HARMLESS = [argparse.Namespace, (Dtype, "numpy.dtype"), (number, "numpy.core.multiarray.scalar"),
            (number, "numpy._core.multiarray.scalar")]


def read(path):
    """What a checkpoint holds, on the CPU: tensors and plain values. Code is refused, not run."""
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint")
    kind = "PyTorch checkpoint"
    try:
        with open(path, "rb") as f:
            if f.read(9)[8:] == b"{":
                kind = "safetensors file"
                return read_safetensors(path)
        check_pickle(path)
        with torch.serialization.safe_globals(HARMLESS):
            content = torch.load(path, map_location="cpu", weights_only=True)
        check_sizes(content, path)
        return content
    except CheckpointError:
        raise
    except Exception as error:                          # torch raises many kinds for a bad file
        said = str(error)
        # torch's words for a class or a function
        if "global" in said.lower() or "unrecognized function" in said:
            named = re.search(r"GLOBAL (\S+)|function (\S+)", said)
            named = (named[1] or named[2]).strip("<>`.,") if named else "class"
            raise CheckpointError(
                f"{path}: refused, it holds more than tensors and plain values ({named:.60}), "
                "which could run code when read. If you trust it, save its weights alone: c = "
                "torch.load(FILE, weights_only=False); torch.save(c.get('model') or c['state_dict'], NEW)"
            ) from None
        raise CheckpointError(f"{path}: not a readable {kind} "
                              f"({type(error).__name__}: {said.split('. ')[0][:80]})") from None


def check_pickle(path):
    """Refuse, before it is read, what would unpack to more than the file or take minutes."""
    archive = zipfile.ZipFile(path) if zipfile.is_zipfile(path) else None
    if archive is None:                                 # torch before 1.6: five pickles, then bytes
        stream, pickles = open(path, "rb"), 5
    else:
        entries = archive.infolist()
        if sum(e.file_size for e in entries) > os.path.getsize(path):
            raise CheckpointError(f"{path}: refused, its parts claim more bytes than the file has")
        listed = [e for e in entries if e.filename.endswith("/data.pkl")]
        if len(listed) != 1:
            return                                      # torch says what it is instead
        stream, pickles = archive.open(listed[0]), 1
    seen = 0
    with stream:
        try:
            for _ in range(pickles):
                for _ in pickletools.genops(stream):
                    seen += 1
                    if seen > LONGEST:
                        break
        except Exception:                               # damaged, or the bytes after the pickles
            pass
    if seen > LONGEST:
        raise CheckpointError(f"{path}: refused, its list of contents is longer than that of any "
                              f"model (over {LONGEST:,} operations)")


def check_sizes(content, path):
    """Refuse tensors that are not in the file: none of their bytes has been touched yet."""
    todo, seen, storages = [content], set(), {}
    while todo:
        value = todo.pop()
        if id(value) in seen:                           # what is nested in itself ends here
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.layout is not torch.strided or value.device.type != "cpu":
                raise CheckpointError(f"{path}: refused, it holds a tensor that is not dense or "
                                      "not stored")
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if value.numel() * value.element_size() > storage.nbytes():
                raise CheckpointError(f"{path}: refused, a tensor of shape {tuple(value.shape)} "
                                      f"has only {storage.nbytes()} bytes in the file")
        elif isinstance(value, dict):
            todo += [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set)):
            todo += value
        elif isinstance(value, argparse.Namespace):
            todo.append(vars(value))
    size = os.path.getsize(path)
    if sum(storages.values()) > size:
        raise CheckpointError(f"{path}: refused, its tensors claim {sum(storages.values()):,} "
                              f"bytes, the file has {size:,}")


def digest(encoder, only=lambda name: True):
    """12 hexadecimal digits of a hash over every weight, or over those whose name passes `only`."""
    total = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        if only(name):
            content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            total.update(name.encode())
            total.update(content.numpy().tobytes())
    return total.hexdigest()[:12]


# ------------------------------------------------------------------------------------- layouts
# what ends in one of these is the patch projection of a ViT; what stands before it is a prefix
ANCHORS = {"patch_embed.proj.weight": "timm", "conv_proj.weight": "torchvision",
           "embeddings.patch_embeddings.projection.weight": "transformers"}
WRAPPERS = re.compile(r"(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# name there -> official name; each row is applied to every name in turn
RENAMES = {
    "torchvision": (
        (r"^class_token$", "cls_token"), (r"^encoder\.pos_embedding$", "pos_embed"),
        (r"^conv_proj\.", "patch_embed.proj."), (r"^encoder\.ln\.", "norm."),
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.self_attention\.in_proj_", ".attn.qkv."),
        (r"\.self_attention\.out_proj\.", ".attn.proj."),
        (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."), (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2.")),
    # the files on the hub, those that transformers 5 writes, and its names in memory
    "transformers": (
        (r"^embeddings\.cls_token$", "cls_token"),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^layernorm\.", "norm."), (r"^(encoder\.layer|layers)\.(\d+)\.", r"blocks.\2."),
        (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.(\d+)\.", r"decoder_blocks.\2."),
        (r"^decoder\.(mask_token|decoder_)", r"\1"),
        (r"\.layernorm_before\.", ".norm1."), (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(attention\.)?([qkv])(uery|ey|alue|_proj)\.", r".attn.\2."),
        (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."))}
# what a ViT of another kind has, by the names of its tensors
UNLIKE = (
    (r"\b(ls[12]|gamma_[12]|layer_scale\d?)\b", "layer scale"),
    (r"\b[qk]_norm\b", "normalised queries and keys (qk-norm)"),
    (r"\b(reg_token|register_tokens)\b", "register tokens"),
    (r"\b(dist_token|distillation_token)\b", "a distillation token"),
    (r"\b(norm_pre|ln_pre|pre_layrnorm)\b", "a norm before the blocks, as CLIP (often quick-GELU)"),
    (r"\b(rope|relative_position_bias\w*|rel_pos\w*)\b", "relative positions"),
    (r"\b(w12|fc1_g|fc1_x|weights_in)\b", "gated MLPs"))


def in_folder(path, name="encoder.pt"):
    """A run's folder stands for the encoder.pt in it."""
    return os.path.join(path, name) if os.path.isdir(path) else path


def locate(path):
    """The file with the weights, for a file, a run's folder, transformers' folder or hub name.

    A name such as facebook/vit-mae-base is looked up in the local cache, never in the network.
    """
    if not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
        cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
        kept = os.path.join(glob.escape(cache), "models--" + path.replace("/", "--"), "snapshots")
        found = sorted(glob.glob(os.path.join(kept, "*")), key=os.path.getmtime)
        if not found:
            raise CheckpointError(f"{path}: no such checkpoint, and no model of this name in "
                                  f"{cache}; `hf download {path}` fetches one from the hub")
        path = found[-1]
    if os.path.isdir(path):
        for name in ("encoder.pt", "model.safetensors", "pytorch_model.bin"):
            if os.path.exists(os.path.join(path, name)):
                return os.path.join(path, name)
        if glob.glob(os.path.join(glob.escape(path), "*.index.json")):
            raise CheckpointError(f"{path}: its weights are in several files; save_pretrained with "
                                  "a larger max_shard_size writes one")
    return in_folder(path)


def described(path):
    """What the JSON files beside transformers' or timm's weights say: (config, preprocessor)."""
    said = []
    for name in ("config.json", "preprocessor_config.json"):
        beside = os.path.join(os.path.dirname(path), name)
        said.append({})
        if (os.path.basename(path) in ("model.safetensors", "pytorch_model.bin")
                and os.path.isfile(beside)):
            try:
                with open(beside, "rb") as f:
                    said[-1] = json.loads(f.read(1 << 20))
            except (ValueError, OSError, RecursionError) as error:
                raise CheckpointError(f"{beside}: not readable ({str(error):.80})") from None
            if not isinstance(said[-1], dict):
                raise CheckpointError(f"{beside}: holds no settings")
    return said


def groups(content, name="", depth=2):
    """(name, {key: tensor}) of every dict in a checkpoint: under "model", "teacher", ..."""
    for key, value in content.items() if depth else ():
        if isinstance(key, str) and isinstance(value, dict):
            yield from groups(value, f"{name}{key}.", depth - 1)
    yield name, {k: v for k, v in content.items()
                 if isinstance(k, str) and isinstance(v, torch.Tensor)}


def unwrap(content, path="checkpoint", weights="base"):
    """(state of one ViT, whatever hangs on it, name of the layout, notes for `report`).

    weights: "base"; "momentum", MoCo v3's other encoder; or "ema", the average of the weights.
    """
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict of tensors")
    found = []                                          # (rank, place, group, prefix, layout)
    for group, tensors in groups(content):
        for key in tensors:
            anchor = next((a for a in ANCHORS if f".{key}".endswith(f".{a}")), None)
            if anchor:
                prefix = key.removesuffix(anchor)
                place = (group + prefix).strip(".")
                words = set(re.split(r"[._]", place))
                kind = ("ema" if "ema" in words else "momentum" if "momentum" in words else "base")
                rank = {"ema": 3, "momentum": 4}.get(kind, 2 if "student" in words else 0)
                found.append((rank, place, kind, group, prefix, ANCHORS[anchor]))
    if not found:
        keys = [k for k in content if isinstance(k, str)]
        raise CheckpointError(f"{path}: no ViT in it (no patch_embed.proj.weight and pos_embed, "
                              "nor their like); its first keys are "
                              f"{', '.join(keys[:3]) or 'none'}")
    fit_for = found if weights == "base" else [f for f in found if f[2] == weights]
    if not fit_for:
        what = {"momentum": "momentum encoder", "ema": "averaged weights (ema)"}[weights]
        raise CheckpointError(f"{path}: holds no {what}")
    _, place, kind, group, prefix, layout = min(fit_for, key=lambda f: f[0])
    words = set(re.split(r"[._]", place))
    notes = [f"weights of {place}"] if prefix or group not in ("", "model.", "state_dict.") else []
    for _, other, kind_of, *_ in found:
        if other != place:
            way = f" (--weights {kind_of})" if kind_of not in ("base", kind) else ""
            notes.append(f"also there: {other or 'the weights beside them'}{way}")
    if layout == "timm":
        layout = ("MoCo v3" if "base_encoder" in place or "momentum_encoder" in place
                  else "DINO" if words & {"teacher", "student"}
                  else "MAE" if group == "model." else "timm")
    tensors = dict(groups(content))[group]
    state = {WRAPPERS.sub("", k.removeprefix(prefix)): v for k, v in tensors.items()
             if k.startswith(prefix)}
    rest = {WRAPPERS.sub("", k).removeprefix("module."): v for k, v in tensors.items()
            if not k.startswith(prefix)}
    for pattern, new in RENAMES.get(layout, ()):
        state = {re.sub(pattern, new, k): v for k, v in state.items()}
        rest = {re.sub(pattern, new, k): v for k, v in rest.items()}
    if "norm.weight" not in state and "fc_norm.weight" in state:
        state = {re.sub(r"^fc_norm\.", "norm.", k): v for k, v in state.items()}
        notes.append("fc_norm taken as the final norm: it was trained on the patches' mean")
    return fused(state), fused(rest), layout, notes


def fused(state):
    """q, k and v as one tensor, where they are three."""
    whole = {}
    for key, value in state.items():
        parts = [key.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if ".attn.q." in key and all(part in state and state[part].ndim for part in parts):
            whole[key.replace(".q.", ".qkv.")] = torch.cat([state[part] for part in parts])
        elif not re.search(r"\.attn\.[kv]\.", key):
            whole[key] = value
    return whole


def is_encoder(key):
    return (key in ("cls_token", "pos_embed")
            or key.startswith(("patch_embed.proj.", "blocks.", "norm.")))


def square_side(pos, size, patch, path):
    """(h, w) in patches of a table of positions (1, 1 + L, D): as `size` says, or square."""
    n = pos.shape[1] - 1
    if size is not None:
        h, w = size[0] // patch, size[1] // patch
        if h * w != n:
            raise CheckpointError(f"{path}: images of {size[0]}x{size[1]} have {h}x{w} patches of "
                                  f"{patch}, and it has {n} positions")
        return h, w
    side = math.isqrt(n)
    if side * side != n or not n:
        raise CheckpointError(f"{path}: {n} positions are no square grid after one class token; "
                              "--init-size says which, where one is (distilled models and register "
                              "tokens are not supported)")
    # rows of the true grid resemble their neighbours; those of a wrong one are scrambled
    table = pos[0, 1:].float()
    steps = {}
    for h in (h for h in range(2, n // 2 + 1) if n % h == 0):
        grid = table.reshape(h, n // h, -1)
        steps[h] = (grid[1:] - grid[:-1]).square().mean().item()
    smooth = min(steps, key=steps.get, default=side)
    if steps and steps[smooth] < 0.5 * steps[side]:
        raise CheckpointError(f"{path}: its {n} positions look like {smooth}x{n // smooth} patches"
                              f", not {side}x{side}: say the size of its images with --init-size")
    return side, side


def config_of(state, layout, path, known=(), heads=None, size=None):
    """(VisionTransformer's arguments, notes) for a state dict: from its shapes, and from `known`,
    a transformers config, where there is one."""
    known = dict(known)
    weight, pos = state["patch_embed.proj.weight"], state.get("pos_embed", torch.zeros(0))
    if (weight.ndim != 4 or pos.ndim != 3 or weight.shape[2] != weight.shape[3]
            or pos.shape[2] != weight.shape[0] or 0 in weight.shape or 0 in pos.shape):
        raise CheckpointError(f"{path}: patch projection {tuple(weight.shape)} and pos_embed "
                              f"{tuple(pos.shape)} are not those of a ViT")
    for pattern, words in UNLIKE:
        unlike = [k for k in state if re.search(pattern, k)]
        if unlike:
            raise CheckpointError(f"{path}: a ViT with {words} ({unlike[0]:.60}): not the one of "
                                  "MAE and MoCo v3, its features would be others")
    act = known.get("hidden_act", "gelu")
    if act != "gelu" or "quickgelu" in str(known.get("architecture")):
        act = act if act != "gelu" else "quick_gelu"
        raise CheckpointError(f"{path}: a ViT with {act!r:.20} in its MLPs, not GELU: its features "
                              "would be others")
    if "cls_token" not in state:
        raise CheckpointError(f"{path}: a ViT without class token (cls_token)")
    dim, in_chans, patch, _ = weight.shape
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    hidden = state.get("blocks.0.mlp.fc1.bias", pos)
    hidden = len(hidden) if hidden.ndim == 1 else 0
    notes = []
    if size is None and "image_size" in known:
        size = known["image_size"]
        size = [size, size] if type(size) is int else size
        if not isinstance(size, list) or [type(s) for s in size] != [int, int]:
            raise CheckpointError(f"{path}: its image_size is {size!r:.40}")
    stated = known.get("num_attention_heads")
    if stated is not None:
        if heads not in (None, stated):
            raise CheckpointError(f"{path}: its config.json says {stated!r:.20} heads, not {heads}")
        heads = stated
    elif heads is None:
        # heads leave no trace in the shapes: 64 wide, but MoCo v3's ViT-S has 12, ViT-H 80 wide
        heads = {1280: 16}.get(dim, max(dim // 64, 1))
        heads = 12 if layout == "MoCo v3" and dim == 384 else heads
        more = {384: "; a ViT-S has 6, that of MoCo v3 12"}.get(dim, "")
        if dim not in (192, 384, 768, 1024, 1280):
            more = "; no published ViT has this width"
        notes.append(f"heads: {heads} assumed ({dim // heads} wide{more}); --heads says otherwise")
    if known.get("layer_norm_eps", 1e-6) != 1e-6:
        notes.append(f"its norms add {known['layer_norm_eps']!r:.10}, here 1e-06")
    grid = square_side(pos, size, patch, path)
    return dict(img_size=[side * patch for side in grid], patch_size=patch, in_chans=in_chans,
                dim=dim, depth=depth, heads=heads, mlp_ratio=hidden / dim), notes


def check_config(config, state, path):
    """Refuse what no ViT is, before one of that size is made: a file may claim any width."""
    sides = config.get("img_size")
    sides = sides if isinstance(sides, (list, tuple)) else [sides, sides]
    ratio = config.get("mlp_ratio", 4.0)
    claims = [("img_size", side) for side in sides]
    claims += [(k, v) for k, v in config.items() if k in LARGEST]
    for name, value in claims:
        if type(value) is not int or not 1 <= value <= LARGEST.get(name, 16384):
            raise CheckpointError(f"{path}: refused, it claims a ViT with {name} {value!r:.40}")
    if len(sides) != 2 or not isinstance(ratio, (int, float)) or not 0 < ratio <= 64:
        raise CheckpointError(f"{path}: refused, it claims a ViT with img_size {sides!r:.40} and "
                              f"mlp_ratio {ratio!r:.40}")
    blocks = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    if config.get("depth", blocks) != blocks:
        raise CheckpointError(f"{path}: refused, it claims {config['depth']} blocks and has "
                              f"{blocks}")
    lengths = [state[k].numel() for k in ("cls_token", "norm.weight") if k in state]
    if any(n != config.get("dim", n) for n in lengths):
        raise CheckpointError(f"{path}: refused, it claims a width of {config['dim']} and has "
                              f"{lengths[0]}")


def finite(values, low, high):
    return isinstance(values, (list, tuple)) and all(
        isinstance(v, (int, float)) and low <= v <= high for v in values)


def check_meta(meta, config, path):
    """Mean, std (a number a channel) and range (low, high) that a file gives for its images."""
    channels = config.get("in_chans", 3)
    for name, low, high, n in (("mean", -1e4, 1e4, channels), ("std", 1e-6, 1e4, channels),
                               ("range", -1e30, 1e30, 2)):
        values = meta.get(name)
        if values is not None and not (finite(values, low, high) and len(values) == n):
            raise CheckpointError(f"{path}: refused, its {name} of the images is {values!r:.60}")
    if meta.get("range") is not None and meta["range"][0] >= meta["range"][1]:
        raise CheckpointError(f"{path}: refused, its range of the images is {meta['range']!r:.60}")
    if not isinstance(meta.get("system", ""), str):
        raise CheckpointError(f"{path}: refused, its system is {meta['system']!r:.40}, no name")


def check_weights(state, path):
    """Refuse weights that are no numbers: NaN, infinite or beyond any use."""
    for name, tensor in state.items():
        if not tensor.is_floating_point() or not (tensor.abs() < 1e30).all():
            raise CheckpointError(f"{path}: {name} holds what is not a finite number")


def check_linear(content, path, width=None):
    """Refuse a classifier-*.pt whose parts are not what evaluate.py writes.

    width: that of the features it is for.
    """
    head, classes = content.get("classifier"), content.get("classes")
    kinds = (("checkpoint", str), ("encoder_digest", str), ("classes", (list, tuple)),
             ("classifier", dict), ("mean", (list, tuple)), ("std", (list, tuple)))
    wrong = [name for name, kind in kinds if not isinstance(content.get(name), kind)]
    if not wrong:
        weight, bias = head.get("weight"), head.get("bias")
        if not (torch.is_tensor(weight) and torch.is_tensor(bias) and weight.ndim == 2
                and bias.ndim == 1 and len(weight) == len(bias) == len(classes) > 0
                and isinstance(head.get("normalise"), bool)):
            wrong = ["classifier"]
        elif not all(isinstance(name, str) for name in classes):
            wrong = ["classes"]
    if wrong:
        raise CheckpointError(f"{path}: not a classifier that evaluate.py wrote ({wrong[0]})")
    if width is not None and weight.shape[1] != width:
        raise CheckpointError(f"{path}: for features of width {weight.shape[1]}, not {width}")
    check_weights(dict(weight=weight, bias=bias), path)
    check_meta(content, dict(in_chans=len(content["mean"])), path)


def check_run(content, needed, path):
    """Refuse a last.pt that a run cannot go on from: every name of `needed`, of its kind."""
    kinds = dict(model=dict, settings=dict, optimizer=dict, step=int, skipped=int, meta=dict)
    wrong = [name for name in sorted(needed)
             if name not in content or not isinstance(content[name], kinds.get(name, object))
             ] if isinstance(content, dict) else ["no dict"]
    wrong += [k for k in ("step", "skipped") if not wrong and k in needed and content[k] < 0]
    if wrong:
        raise CheckpointError(f"{path}: not a checkpoint to resume from ({wrong[0]})")
    tensors = {k: v for k, v in content.get("model", {}).items()
               if torch.is_tensor(v) and v.is_floating_point()}
    check_weights(tensors, path)


def read_encoder(path, weights="base", heads=None, size=None):
    """The ViT in a checkpoint file (or in the folder of a run, or of transformers).

    Returns a dict: state (encoder tensors under the official names), config (arguments of
    VisionTransformer), rest (every other tensor found beside them), meta (what the file says
    besides: mean, std, range, system, ...), layout, notes (what was assumed), path, digest.
    weights: "base", "momentum" or "ema", for files that hold several. heads, size (h, w) in
    pixels: for files that do not state them; without, heads are guessed and images square.
    """
    path = locate(path)
    content = read(path)
    state, rest, layout, notes = unwrap(content, path, weights)
    said = content.get("config")
    if isinstance(said, dict) and {"img_size", "patch_size", "dim"} <= set(said):
        config, meta, layout = said, content.get("meta"), "ours"
        meta = meta if isinstance(meta, dict) else {}
        stated = config["img_size"]
        if heads not in (None, config.get("heads")):
            raise CheckpointError(f"{path}: says that it has {config.get('heads')!r:.20} heads, "
                                  f"not {heads}")
        if size is not None and stated not in (list(size), tuple(size)):
            raise CheckpointError(f"{path}: says that its images are {stated!r:.40}, not {size}")
    else:
        known, shown = described(path)
        config, more = config_of(state, layout, path, known, heads, size)
        notes += more
        meta = foreign_meta(known, shown, config)
    check_config(config, state, path)
    check_meta(meta, config, path)
    try:
        with torch.device("meta"):
            expected = VisionTransformer(**config).state_dict()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: not a ViT that can be rebuilt ({error})") from None
    encoder = {k: v for k, v in state.items() if is_encoder(k)}
    missing = sorted(set(expected) - set(encoder))
    surplus = sorted(set(encoder) - set(expected))
    wrong = [k for k in expected if k in encoder and encoder[k].shape != expected[k].shape]
    if missing or surplus or wrong:
        first = (missing or surplus or wrong)[0]
        raise CheckpointError(f"{path}: {len(missing)} encoder tensors missing, {len(surplus)} "
                              f"unknown, {len(wrong)} of another shape; first: {first}")
    check_weights(encoder, path)
    with open(path, "rb") as f:
        file_digest = hashlib.file_digest(f, "sha256").hexdigest()[:12]
    return dict(state=encoder, config=config, meta=meta, layout=layout, path=path, notes=notes,
                rest=rest | {k: v for k, v in state.items() if k not in encoder},
                digest=file_digest)


def foreign_meta(known, shown, config):
    """meta from the JSON files of transformers: statistics, range, the MAE decoder's settings."""
    meta = {}
    if isinstance(known.get("decoder_num_attention_heads"), int):
        meta["decoder"] = dict(decoder_heads=known["decoder_num_attention_heads"],
                               norm_pix_loss=known.get("norm_pix_loss") is True)
    n = config["in_chans"]
    mean, std = shown.get("image_mean"), shown.get("image_std")
    if (shown.get("do_normalize", True) is True and finite(mean, -1e4, 1e4) and len(mean) == n
            and finite(std, 1e-6, 1e4) and len(std) == n):
        meta |= dict(mean=mean, std=std)
    factor = shown.get("rescale_factor", 1 / 255)
    if finite([factor], 1e-12, 1e12) and abs(factor * 255 - 1) > 1e-6:
        meta["range"] = [0.0, 1 / factor]
    return meta


def fit(source, img_size=None, in_chans=None):
    """The encoder of `read_encoder` for another image size or number of channels: (state, config).

    Positions are carried, resampled (bicubic) for another grid: MoCo v3's table is not MAE's, and
    trained ones exist. Channels: the patch projection is summed to one, else repeated in turn and
    scaled by old / new.
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
        if pos.shape[1] != 1 + old[0] * old[1]:
            raise CheckpointError(f"{pos.shape[1] - 1} positions are no grid of {old[0]}x{old[1]}")
        if old != new and min(new) > 0:
            grid = pos[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
            grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
            grid = grid.to(pos.dtype).permute(0, 2, 3, 1).flatten(1, 2)
            state["pos_embed"] = torch.cat([pos[:, :1], grid], 1)
        config["img_size"] = list(img_size)
    return state, config


def there(path):
    """Whether there may be a checkpoint: a file, a folder, or a model's name on the hub."""
    return os.path.exists(path) or bool(re.fullmatch(r"[\w.-]+/[\w.-]+", path))


def start(args):
    """(source, state, config) of the encoder that a training stage begins with: that of --init, for
    --img-size and --in-chans, or with --init none the architecture alone, with source None."""
    if args.init == "none":
        (patch, dim, depth, heads), _ = ARCHS[args.arch]
        return None, None, dict(img_size=args.img_size, patch_size=args.patch_size or patch, dim=dim,
                                in_chans=args.in_chans or 3, depth=depth, heads=args.heads or heads)
    source = read_encoder(args.init, heads=args.heads, size=args.init_size)
    return source, *fit(source, args.img_size, args.in_chans)


def decoder_config(source, norm_pix_loss=None):
    """MaskedAutoencoder's arguments for the MAE decoder in a file of `read_encoder`.

    As our files and transformers' say, else from shapes; norm_pix_loss is nowhere in the other
    layouts: False unless given.
    """
    rest, known = source["rest"], source["meta"].get("decoder") or {}
    dim = rest["decoder_embed.weight"].shape[0]
    blocks = {k.split(".")[1] for k in rest if k.startswith("decoder_blocks.")}
    # heads leave no trace in the shapes; MAE's have a width of 32
    heads = known.get("decoder_heads", max(dim // 32, 1)) if isinstance(known, dict) else 0
    for name, value, most in (("width", dim, LARGEST["dim"]),
                              ("blocks", len(blocks), LARGEST["depth"]),
                              ("heads", heads, LARGEST["heads"])):
        if (type(value) is not int or not 0 <= value <= most
                or (name == "heads" and (not value or dim % value))):
            raise CheckpointError(f"{source['path']}: refused, it claims a decoder with {name} "
                                  f"{value!r:.40}")
    if norm_pix_loss is None:
        norm_pix_loss = known.get("norm_pix_loss", source["layout"] == "ours")
    return dict(decoder_dim=dim, decoder_depth=len(blocks), decoder_heads=heads,
                norm_pix_loss=norm_pix_loss)


def report(source, taken=()):
    """Lines that say what a file gave: layout, tensors taken and left out, what was assumed."""
    c = source["config"]
    left = [k for k in source["rest"] if k not in taken]
    more = f", {len(taken)} more" if taken else ""
    lines = [f"{source['path']}: {source['layout']} layout, ViT of width {c['dim']}, {c['depth']} "
             f"blocks, {c['heads']} heads, patch {c['patch_size']}, images of "
             f"{c['img_size'][0]}x{c['img_size'][1]}; {len(source['state'])} encoder tensors "
             f"loaded{more}"]
    lines += [f"  {note}" for note in source["notes"]]
    if left:
        kinds = sorted({k.split(".")[0] for k in left})
        lines.append(f"  left out: {len(left)} tensors that are not of the encoder "
                     f"({', '.join(kinds[:6])})")
    return lines


def encoder_file(model, meta):
    """What encoder.pt holds: the encoder's weights under the official names and what rebuilds it.

    A MoCo v3 projector is kept beside them (head.*): fine-tuning can start from its first layer.
    """
    encoder = getattr(model, "base_encoder", model)
    state = {k: v.detach().cpu() for k, v in encoder.state_dict().items()
             if is_encoder(k) or k.startswith("head.")}
    return {"model": state, "config": encoder.config, "meta": meta}


# ------------------------------------------------------------------------------ use and export
class Encoder(VisionTransformer):
    """A frozen VisionTransformer that knows the statistics of its images.

    mean, std: (C, 1, 1); config["img_size"]: the size it takes, (H, W) in pixels.
    """

    def __init__(self, mean, std, **config):
        super().__init__(**config)
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.eval().requires_grad_(False)

    def normalise(self, images):
        """(N, C, H, W) or (C, H, W) in [0, 1] -> what the network takes, float32."""
        return (images.float() - self.mean) / self.std


def statistics(source):
    """(mean, std) of the images of `read_encoder`; ImageNet's where the file says nothing."""
    n = source["config"]["in_chans"]
    usual = [list(v) if n == 3 else [sum(v) / 3] * n for v in IMAGENET]
    return [source["meta"].get(name) or v for name, v in zip(("mean", "std"), usual)]


def load(path, weights="base", heads=None, size=None):
    """A ready, frozen `Encoder` in evaluation mode, on the CPU: see the top of this file."""
    source = read_encoder(path, weights, heads, size)
    encoder = Encoder(*map(list, statistics(source)), **source["config"])
    encoder.load_state_dict(source["state"])
    return encoder


def export(source, kind, path):
    """Write the encoder of `read_encoder` for other libraries; says how to load it.

    timm: a state dict (safetensors if `path` ends so) for load_state_dict, strict. hf: a folder
    for transformers' AutoModel and AutoImageProcessor. onnx: images (N, C, H, W) -> (N, D).
    """
    state, config = source["state"], source["config"]
    state = {k: v.contiguous().clone() for k, v in state.items()}
    if kind == "timm":
        safe = path.endswith(".safetensors")
        save(state, path, write_safetensors if safe else torch.save)
        how = f"safetensors.torch.load_file({path!r})" if safe else f"torch.load({path!r})"
        size = config["img_size"]
        size = size[0] if size[0] == size[1] else tuple(size)
        return (f"wrote {path}; load it with\n  model = timm.models.VisionTransformer("
                f"img_size={size}, patch_size={config['patch_size']}, in_chans={config['in_chans']}"
                f", embed_dim={config['dim']}, depth={config['depth']}, num_heads={config['heads']}"
                f", mlp_ratio={config['mlp_ratio']:g}, num_classes=0)\n"
                f"  model.load_state_dict({how}, strict=True)")
    if kind == "onnx":
        return export_onnx(source, path)
    os.makedirs(path, exist_ok=True)
    for name, content in zip(("config.json", "preprocessor_config.json"), hf_settings(source)):
        text = json.dumps(content, indent=1).encode()
        save(text, os.path.join(path, name), lambda content, f: f.write(content))
    save(hf_state(state), os.path.join(path, "model.safetensors"), write_safetensors)
    return (f"wrote {path}/; load it with\n  model = transformers.AutoModel.from_pretrained("
            f"{path!r}, add_pooling_layer=False)\n"
            f"  processor = transformers.AutoImageProcessor.from_pretrained({path!r})")


def hf_state(state):
    """The encoder under the names of the files on the hub."""
    names = {}
    parts = {"norm1": "layernorm_before", "norm2": "layernorm_after",
             "attn.proj": "attention.output.dense", "mlp.fc1": "intermediate.dense",
             "mlp.fc2": "output.dense"}
    whole = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
             "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}
    for key, value in state.items():
        stem, _, kind = key.rpartition(".")
        if not stem.startswith("blocks."):
            names[f"{whole[stem]}.{kind}" if stem else whole[key]] = value
            continue
        _, i, part = stem.split(".", 2)
        if part == "attn.qkv":
            for letter, third in zip(("query", "key", "value"), value.chunk(3)):
                names[f"encoder.layer.{i}.attention.attention.{letter}.{kind}"] = third
        else:
            names[f"encoder.layer.{i}.{parts[part]}.{kind}"] = value
    return names


def hf_settings(source):
    """(config.json, preprocessor_config.json) of the encoder."""
    config = source["config"]
    height, width = config["img_size"]
    mean, std = statistics(source)
    low, high = source["meta"].get("range") or (0, 255)
    vit = dict(model_type="vit", architectures=["ViTModel"], hidden_size=config["dim"],
               num_hidden_layers=config["depth"], num_attention_heads=config["heads"],
               intermediate_size=int(config["dim"] * config["mlp_ratio"]), hidden_act="gelu",
               hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=1e-6,
               image_size=height if height == width else [height, width], qkv_bias=True,
               patch_size=config["patch_size"], num_channels=config["in_chans"])
    # (x - low) / (high - low), then mean and std: the processor knows a factor alone
    images = dict(image_processor_type="ViTImageProcessor", do_resize=True, resample=3,
                  size=dict(height=height, width=width), do_rescale=True,
                  rescale_factor=1 / (high - low), do_normalize=True,
                  image_mean=[m + low / (high - low) for m in mean], image_std=list(std))
    return vit, images


def export_onnx(source, path):
    encoder = VisionTransformer(**source["config"]).eval()
    encoder.load_state_dict(source["state"])
    images = torch.zeros(2, source["config"]["in_chans"], *source["config"]["img_size"])
    try:
        torch.onnx.export(encoder, (images,), path, input_names=["images"], dynamo=True,
                          output_names=["features"], external_data=False,
                          dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    except ImportError as error:
        raise CheckpointError("torch's ONNX exporter needs another package: pip install onnx "
                              f"onnxscript ({error})") from None
    return f"wrote {path}; normalised images (n, C, H, W) -> features (n, {encoder.dim})"
