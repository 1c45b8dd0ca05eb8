"""The shape of the code: who imports whom, what stands alone when copied, how long lines are."""
import ast
import functools
import os
import shutil
import subprocess
import sys

import pytest
import torch

from conftest import QUIET, ROOT, folder_of

STAGES = {"mae_pretrain", "graft_train", "finetune", "evaluate", "segment", "analyze", "reproduce"}
LIBRARY = {"model", "data", "augment", "checkpoint", "run"}
OPTIONAL = {"torchvision", "matplotlib", "sklearn", "safetensors", "tensorboard", "onnx"}
NEEDED = {"torch", "torchvision", "numpy", "PIL"}
# beside Python's own
MAY = {"model": {"torch"}, "augment": {"torch"}, "data": {"augment"} | NEEDED,
       "checkpoint": {"model", "torch"}, "run": LIBRARY | NEEDED,
       **dict.fromkeys(STAGES, LIBRARY | NEEDED), "analyze": LIBRARY | NEEDED | {"figures"},
       "segment": LIBRARY | NEEDED | {"figures"},
       "reproduce": LIBRARY | NEEDED | STAGES}


@functools.cache
def sources():
    """{module: syntax tree} of the files that belong to the product."""
    found = {}
    for name in os.listdir(ROOT):
        if name.endswith(".py") and not name.startswith("test_"):
            with open(os.path.join(ROOT, name)) as f:
                found[name.removesuffix(".py")] = ast.parse(f.read(), name)
    return found


def names_of(node):
    """What a statement imports, with dots."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []


def imports(source):
    """The names without dots that a module imports at its top."""
    found, todo = set(), list(source.body)
    while todo:
        node = todo.pop()
        found |= {name.split(".")[0] for name in names_of(node)}
        todo += [] if isinstance(node, ast.FunctionDef) else ast.iter_child_nodes(node)
    return found


def test_stages_and_library_import_what_they_may():
    tree = sources()
    assert set(tree) == STAGES | LIBRARY
    for module, source in tree.items():
        more = imports(source) - MAY[module] - set(sys.stdlib_module_names)
        assert not more, (module, more)
        first = next(node for node in source.body if isinstance(node, ast.Import))
        # so that a Ctrl-C while torch is imported ends in a line
        assert module in LIBRARY or first.names[0].name == "run", module


def test_imports_inside_functions_are_of_optional_packages():
    for module, source in sources().items():
        for function in ast.walk(source):
            for node in ast.walk(function) if isinstance(function, ast.FunctionDef) else ():
                for name in names_of(node):
                    assert OPTIONAL & set(name.split(".")), (module, name)


def test_there_is_no_circle():
    left = {module: imports(source) & set(sources()) for module, source in sources().items()}
    while left:
        ready = {module for module, needed in left.items() if not needed & set(left)}
        assert ready, f"a circle among {sorted(left)}"
        left = {module: needed for module, needed in left.items() if module not in ready}


def test_no_line_is_longer_than_100_columns():
    long = []
    for folder, _, names in os.walk(ROOT):
        if os.path.relpath(folder, ROOT).split(os.sep)[0] in (".", "tests", "bench", "figures"):
            for name in sorted(name for name in names if name.endswith(".py")):
                with open(os.path.join(folder, name)) as f:
                    long += [f"{name}:{i}" for i, line in enumerate(f, 1) if len(line) > 101]
    assert not long, long


def test_the_diff_of_the_two_steps_is_the_method():
    command = ["diff", "mae_pretrain.py", "graft_train.py"]
    diff = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert 0 < sum(line.startswith(("<", ">")) for line in diff.splitlines()) <= 110


def copied(folder, *names):
    """Prepare a process that knows copies of these files, and of nothing else of ours."""
    for name in names:
        shutil.copy(os.path.join(ROOT, f"{name}.py"), folder)
    return functools.partial(alone, str(folder))


def alone(folder):
    for name in [*STAGES, *LIBRARY]:
        sys.modules.pop(name, None)
    sys.path[:] = [folder, *(place for place in sys.path if place not in ("", ROOT))]
    os.chdir(folder)


def use_model():
    import model
    net = model.MaskedAutoencoder(16, 1, 2, img_size=16, patch_size=8, dim=24, depth=2, heads=3)
    net(torch.zeros(2, 3, 16, 16), 0.5)[0].backward()
    print(model.__file__)


def use_augment():
    import augment
    x = augment.augment(torch.rand(2, 3, 16, 16), torch.arange(2), augment.MOCO_VIEWS[0], 0)
    assert x.shape == (2, 3, 16, 16)
    print(augment.__file__)


@pytest.mark.parametrize("name, use", [("model", use_model), ("augment", use_augment)])
def test_a_copied_file_works_alone(start, tmp_path, name, use):
    job = start(use, prepare=copied(tmp_path, name))
    assert job.codes() == [0] and job.said().strip() == f"{tmp_path}/{name}.py", job.said()


def test_grafting_runs_when_copied_with_five_files(start, tmp_path):
    folder_of(tmp_path / "images", [f"{i}.png" for i in range(4)], (32, 32))
    job = start("graft_train", "--init", "none", "--arch", "vit_mini", "--hidden-dim", "16",
                "--data", "images", "--epochs", "1", "--batch-size", "4", "--img-size", "32",
                *QUIET, prepare=copied(tmp_path, "graft_train", *LIBRARY))
    assert job.codes() == [0], job.said()
    assert (tmp_path / "out/graft/encoder.pt").exists()
