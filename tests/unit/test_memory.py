"""The predictor of memory against what llama-server of b11434 logged for the same files."""

from __future__ import annotations

import struct
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from llama_common import gguf
from llama_common.gguf import HeaderError
from llama_common.memory import CUDA, MIB, RPC, NotPredicted, Settings, estimate
from llama_common.model import Model

from scripts import _tiny_models
from scripts._header import NoHeader, read_file


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    """Every architecture that is known."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        name: Model.of([read_file(_tiny_models.write(name, folder, weights=False))])
        for name in _tiny_models.ARCHITECTURES
    }


# weights, cache and compute buffer on the CPU, in MiB, as llama-server printed them
LOGGED_ON_CPU = {
    "qwen2": (Settings(65_536), (37.80, 384.00, 77.27)),
    "qwen35": (Settings(65_536, parallel=2), (40.90, 129.09, 45.27)),
}
# the same on the second device, then on the CPU
LOGGED_SPLIT = {
    ("qwen3", 0, 0): ((0, 0, 0), (37.78, 384.00, 77.27)),
    ("qwen3", 1, 0): ((2.00, 0, 0.01), (35.78, 384.00, 77.27)),
    ("qwen3", 3, 0): ((13.26, 128.00, 74.26), (24.52, 256.00, 77.27)),
    ("qwen3", 6, 0): ((30.15, 320.00, 74.26), (7.63, 64.00, 77.27)),
    ("qwen3", 7, 0): ((35.78, 384.00, 76.26), (2.00, 0, 68.02)),
    ("qwen3moe", 99, 2): ((41.12, 384.00, 71.76), (17.00, 0, 68.02)),
    ("qwen3moe", 99, 6): ((11.12, 384.00, 70.01), (47.00, 0, 68.02)),
}


def mib(use: object) -> tuple[float, ...]:
    """Weights, cache and compute as llama-server rounds them."""
    return tuple(round(getattr(use, name) / MIB, 2) for name in ("weights", "cache", "compute"))


@pytest.mark.parametrize("name", LOGGED_ON_CPU)
def test_on_the_cpu_alone(tiny: dict[str, Model], name: str) -> None:
    settings, logged = LOGGED_ON_CPU[name]
    said = estimate(tiny[name], settings, None)
    assert mib(said.cpu) == pytest.approx(logged, abs=0.011)
    assert said.gpu.total == 0


@pytest.mark.parametrize(("name", "layers", "moe"), LOGGED_SPLIT)
def test_on_two_devices(tiny: dict[str, Model], name: str, layers: int, moe: int) -> None:
    said = estimate(tiny[name], Settings(65_536, n_gpu_layers=layers, n_cpu_moe=moe), RPC)
    for use, logged in zip((said.gpu, said.cpu), LOGGED_SPLIT[name, layers, moe], strict=True):
        assert mib(use) == pytest.approx(logged, abs=0.011)


@pytest.mark.parametrize("name", _tiny_models.ARCHITECTURES)
def test_facts_say_all_that_the_header_says(tiny: dict[str, Model], name: str) -> None:
    settings = Settings(65_536, n_gpu_layers=4, n_cpu_moe=2, parallel=2)
    model = tiny[name]
    again = Model.from_facts(model.facts())
    assert estimate(again, settings) == estimate(model, settings)
    assert again.facts() == model.facts()


def test_experts_in_main_memory_are_copied_to_a_gpu_that_takes_over(tiny: dict[str, Model]) -> None:
    settings = Settings(65_536, n_cpu_moe=6)
    taken = estimate(tiny["qwen3moe"], settings, CUDA).gpu.compute
    left = estimate(tiny["qwen3moe"], settings, replace(CUDA, takes_over=False)).gpu.compute
    table = tiny["qwen3moe"].weights["blk.0.ffn_up_exps.weight"].size
    assert taken - left == pytest.approx(table, rel=0.5)


def test_more_context_and_wider_caches_take_more(tiny: dict[str, Model]) -> None:
    def total(**keys: object) -> int:
        return estimate(tiny["llama"], replace(Settings(65_536), **keys)).gpu.total  # type: ignore[arg-type]

    assert total(kv_cache_type="q4_0") < total(kv_cache_type="q8_0") < total() < total(context=131_072)


@pytest.mark.parametrize(
    ("keys", "slot", "tokens"),
    [
        ({}, 65_536, 512),
        ({"ubatch": 64}, 65_536, 64),
        ({"batch": 256}, 65_536, 256),
        ({"context": 256}, 256, 256),
        ({"context": 1000}, 1024, 512),
        ({"context": 1024}, 1024, 512),
        ({"parallel": 3}, 22_016, 513),  # 21,845 tokens a slot; of a batch as many from each
        ({"context": 512, "parallel": 4, "ubatch": 4096}, 256, 1024),
    ],
)
def test_slots_and_batches_are_rounded_as_llama_cpp_does(
    keys: dict[str, int], slot: int, tokens: int
) -> None:
    settings = replace(Settings(65_536), **keys)  # type: ignore[arg-type]
    assert (settings.slot_context, settings.tokens) == (slot, tokens)


def test_what_predicts_further_tokens_takes_nothing_while_it_is_not_used(tiny: dict[str, Model]) -> None:
    """A last block of that kind is in the file and among its layers, and in no buffer."""
    plain = tiny["qwen35"]
    spare = {name.replace("blk.5.", "blk.6."): weight for name, weight in plain.weights.items()}
    numbers = {**plain.numbers, "block_count": 7, "nextn_predict_layers": 1}
    headed = replace(plain, numbers=numbers, weights={**spare, **plain.weights})
    assert len(headed.weights) > len(plain.weights)
    for gpu in (CUDA, None):
        assert estimate(headed, Settings(65_536), gpu) == estimate(plain, Settings(65_536), gpu)


def test_gemma_4_with_embeddings_of_each_layer_is_not_guessed_at(tiny: dict[str, Model]) -> None:
    numbers = {**tiny["gemma4"].numbers, "embedding_length_per_layer_input": 256}
    with pytest.raises(NotPredicted, match="embedding_length_per_layer_input"):
        estimate(replace(tiny["gemma4"], numbers=numbers), Settings(4096))


@pytest.mark.parametrize(
    ("name", "layers", "copies"), [("gemma3", 0, 0), ("gemma3", 99, 1), ("gemma4", 0, 1), ("gemma4", 99, 1)]
)
def test_an_embedding_that_the_output_shares_is_copied_to_where_that_is(
    tiny: dict[str, Model], name: str, layers: int, copies: int
) -> None:
    """Gemma 4's output is made first, so that even on the CPU there are two."""
    said = estimate(tiny[name], Settings(4096, n_gpu_layers=layers))
    weights = tiny[name].weights
    one, all_of_them = weights["token_embd.weight"].size, sum(weight.size for weight in weights.values())
    assert said.gpu.weights + said.cpu.weights == all_of_them + copies * one


def test_an_unknown_architecture_is_named(tiny: dict[str, Model]) -> None:
    with pytest.raises(NotPredicted, match="architecture falcon-h9 is not known"):
        estimate(replace(tiny["llama"], architecture="falcon-h9"), Settings(4096))


def test_a_missing_tensor_is_named(tiny: dict[str, Model]) -> None:
    weights = {
        name: weight for name, weight in tiny["llama"].weights.items() if name != "blk.3.ffn_up.weight"
    }
    with pytest.raises(NotPredicted, match=r"lacks blk\.3\.ffn_up\.weight"):
        estimate(replace(tiny["llama"], weights=weights), Settings(4096))


def test_flags_that_move_memory_are_named() -> None:
    with pytest.raises(NotPredicted, match="extra_args has -ot"):
        Settings.of({"context": 4096, "extra_args": ["-ot", "exps=CPU"]})
    assert Settings.of({"context": 4096, "extra_args": ["-ub", "1024"]}).ubatch == 1024


def test_the_header_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = _tiny_models.write("llama", tmp_path, weights=False).read_bytes()
    monkeypatch.setattr(gguf, "FIRST_PIECE_BYTES", 64)
    asked = []

    def fetch(start: int, end: int) -> bytes:
        asked.append((start, end))
        return data[start:end]

    header = gguf.read(fetch, len(data))
    assert header.architecture == "llama"
    assert len(asked) > 3
    assert all(end == start for (_, end), (start, _) in pairwise(asked))
    assert sum(tensor.size for tensor in header.tensors) <= len(data)


HEAD = b"GGUF" + struct.pack("<I", 3)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 9, 0, 0), "GGUF version 9"),
        (HEAD + struct.pack("<QQ", 2**40, 0), "tensors and 0 keys"),
        (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**50), "larger than a header may be"),
        (HEAD + struct.pack("<QQ", 3, 3), "ends within its header"),
        (HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q1sI", 1, b"k", 77), "unknown kind 77"),
        (
            HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 4096) + bytes(4000),
            "tensor 't' begins behind the end of the file; the file is cut off",
        ),
    ],
)
def test_damaged_headers_are_refused_in_one_line(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    with pytest.raises(NoHeader, match=said) as refused:
        read_file(path)
    assert "\n" not in str(refused.value)


def test_a_header_of_more_than_32_mb_is_refused() -> None:
    text = 31_999_990
    data = HEAD + struct.pack("<QQQ", 1, 1, text) + bytes(text + 100)
    asked = []

    def fetch(start: int, end: int) -> bytes:
        asked.append(end)
        return data[start:end]

    with pytest.raises(HeaderError, match="larger than 32 MB"):
        gguf.read(fetch, 2**34)
    assert max(asked) == 32_000_000
