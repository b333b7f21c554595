"""VILA-U at its published sizes has the published keys and shapes, and reads the published three folders."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vilau_small import SEPARATE, SHARED, weights

from unifiedar.checkpoints import load_tensors
from unifiedar.models import VILAU

MANIFESTS = Path(__file__).parent / "manifests"
# Prefixes that the published files leave out, by folder.
FOLDERS = {"llm": "llm.", "vision_tower": "vision_tower.vision_tower.", "mm_projector": "mm_projector."}


@pytest.mark.parametrize(
    ("name", "count", "parts"),
    [
        (
            "7b-256",
            1402,
            {
                "llm": 6_738_448_384,
                "mm_projector": 20_979_712,
                "vision_tower.vision_tower.rqtransformer": 527_145_984,
                "vision_tower.vision_tower.rqvaesiglip.siglip_model": 652_150_786,
            },
        ),
        (
            "7b-384",
            1504,
            {
                "llm": 6_738_448_384,
                "mm_projector": 21_504_000,
                "vision_tower.vision_tower.rqtransformer": 527_504_384,
                "vision_tower.vision_tower.rqvaesiglip.siglip_model": 877_960_498,
            },
        ),
    ],
)
def test_published_keys_and_shapes(name, count, parts):
    published = json.loads(gzip.decompress((MANIFESTS / f"vilau-{name}.json.gz").read_bytes()))
    with torch.device("meta"):
        model = VILAU(VILAU.configs[name])
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == published
    assert len(published) == count
    for part, numbers in parts.items():
        assert sum(p.numel() for p in model.get_submodule(part).parameters()) == numbers


def write_published(model: VILAU, folder: Path) -> None:
    """The three folders of a published checkpoint: prefixes stripped, the language model in shards with an index."""
    for part, prefix in FOLDERS.items():
        (folder / part).mkdir()
        state = {
            key.removeprefix(prefix): value.clone()  # aliases are stored once for each name, as published
            for key, value in model.state_dict().items()
            if key.startswith(prefix)
        }
        if part != "llm":
            save_file(state, folder / part / "model.safetensors", metadata={"format": "pt"})
            continue
        index = {}
        for i in range(3):
            shard = f"model-{i + 1:05}-of-00003.safetensors"
            chosen = dict(list(state.items())[i::3])
            save_file(chosen, folder / part / shard, metadata={"format": "pt"})
            index.update(dict.fromkeys(chosen, shard))
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": index})
        (folder / part / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("config", [SHARED, SEPARATE], ids=["shared", "separate"])
def test_three_folders(tmp_path, config):
    model = VILAU(config)
    model.load_state_dict(weights(model.state_dict(), config.shared_codebook))
    write_published(model, tmp_path)
    state: dict[str, Tensor] = {}
    for part, prefix in FOLDERS.items():
        tensors = load_tensors(tmp_path / part)
        first = {
            "llm": {"model", "lm_head"},
            "vision_tower": {"rqvaesiglip", "rqtransformer"},
            "mm_projector": {"layers"},
        }
        assert {key.split(".")[0] for key in tensors} == first[part]
        state |= {prefix + key: value for key, value in tensors.items()}
    with torch.device("meta"):
        again = VILAU(config)
    again.load_state_dict(state, strict=True, assign=True)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())
