"""Which draft a preset may have, by the headers in the lock; and what of it reaches the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_common import derive, draft, fit
from llama_common.dialect import Dialect
from llama_common.draft import MTP, SIMPLE, Draft
from llama_common.gguf import parse
from llama_common.memory import NotPredicted
from llama_common.presets import HostConfig, LockedTokenizer
from llama_common.problems import InventoryError

TOKENIZER: dict[str, Any] = {"model": "gpt2", "tokens": 151_936, "sha256": "1" * 64, "eos": 7}
HELP = (
    "--spec-type none,draft-simple,draft-mtp,ngram-mod\n--spec-draft-model, -md FNAME\n--spec-draft-ngl N\n"
)
OLD_HELP = "-md,   --model-draft FNAME              draft model\n-m, --model FNAME   model\n"


def sha(name: str) -> str:
    return name.encode().hex().ljust(64, "0")[:64]


def header(name: str, *blocks: str, **changes: Any) -> dict[str, Any]:
    """A lock's header of a model whose blocks are `attn` or `head`."""
    tensors: dict[str, list[list[Any]]] = {}
    for index, block in enumerate(blocks or ("attn", "attn")):
        kind = {"attn": "blk.*.attn_q.weight", "head": "blk.*.nextn.eh_proj.weight"}[block]
        tensors.setdefault(kind, []).append([1, [8, 8], 128, index, 1])
        if block == "head":
            tensors.setdefault("blk.*.attn_q.weight", []).append([1, [8, 8], 128, index, 1])
    numbers = {"block_count": len(blocks or "ab"), "embedding_length": 8, **changes.pop("numbers", {})}
    return {
        "sha256": sha(name),
        "architecture": changes.pop("architecture", "qwen3"),
        "numbers": numbers,
        "tensors": tensors,
        "tokenizer": {**TOKENIZER, **changes} if changes.get("model", "gpt2") else None,
    }


def variables(headers: dict[str, Any], sizes: dict[str, int], **more: Any) -> dict[str, Any]:
    """The variables of a box with these models, whose preset `p` runs the model `big`."""
    preset = {"description": "d", "build": "b", "model": "big", "context": 65_536, "kv_cache_type": "f16"}
    return {
        "llama_cpp_builds": {"b": {"repo": "https://x.invalid/a.git", "commit": "b" * 40}},
        "gguf_models": {
            name: {"url": f"http://x.invalid/{name}.gguf", "sha256": sha(name), "size": size}
            for name, size in sizes.items()
        },
        "llama_presets": {"p": {**preset, "draft": more.pop("draft", "auto"), **more.pop("preset", {})}},
        "llama_lock": {"headers": headers},
        **more,
    }


def config(headers: dict[str, Any], sizes: dict[str, int], **more: Any) -> HostConfig:
    """The same, read."""
    return HostConfig.load(variables(headers, sizes, **more))


def choice(verdict: str = "kept", **changes: Any) -> dict[str, Any]:
    return {
        "verdict": verdict,
        "reason": "r",
        "type": SIMPLE,
        "draft": "small",
        "model_sha256": sha("big"),
        "draft_sha256": sha("small"),
        "release": "r1",
        "driver": "none",
        "measured": "2026-11-28T00:00Z",
        "pairs": 5,
        **changes,
    }


BOTH = {"big": header("big"), "small": header("small")}
SIZES = {"big": 1000, "small": 10}


def test_the_smallest_model_with_the_same_tokenizer_is_the_candidate() -> None:
    headers = {name: header(name) for name in ("big", "middle", "small", "huge")}
    headers["tiny"] = header("tiny", sha256="2" * 64)
    sizes = {"big": 1000, "middle": 50, "small": 10, "tiny": 1, "huge": 2000}
    assert draft.candidates(config(headers, sizes), "p") == [Draft(SIMPLE, "small")]


@pytest.mark.parametrize(("size", "drafts"), [(999, True), (1000, False), (2000, False)])
def test_a_model_that_is_no_smaller_is_no_draft(size: int, drafts: bool) -> None:
    found = draft.candidates(config(BOTH, {**SIZES, "small": size}), "p")
    assert found == ([Draft(SIMPLE, "small")] if drafts else [])


def test_names_of_files_decide_nothing() -> None:
    headers = {"big": header("big"), "big-draft-0-5b": header("big-draft-0-5b", model="llama")}
    assert draft.candidates(config(headers, {"big": 1000, "big-draft-0-5b": 1}), "p") == []


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({**BOTH, "big": header("big", "attn", "attn", "head")}, [Draft(MTP), Draft(SIMPLE, "small")]),
        ({**BOTH, "small": header("small", "head")}, [Draft(MTP, "small")]),
        ({**BOTH, "small": header("small", "head", numbers={"embedding_length": 9})}, []),
        ({**BOTH, "small": header("small", "head", architecture="qwen35")}, []),
        ({**BOTH, "small": header("small", "attn", "head")}, [Draft(SIMPLE, "small")]),
        ({"small": header("small")}, []),
        ({**BOTH, "big": header("other")}, []),
    ],
    ids=["its own", "a file", "another width", "another architecture", "a whole model", "no header", "stale"],
)
def test_a_head_for_multi_token_prediction_comes_first(
    headers: dict[str, Any], expected: list[Draft]
) -> None:
    assert draft.candidates(config(headers, SIZES), "p") == expected


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"tokens": 152_064}, ""),
        ({"tokens": 152_065}, "152065 tokens beside 151936"),
        ({"model": "llama"}, "its kind is llama beside gpt2"),
        ({"sha256": "2" * 64}, "tokens that are not the same"),
        ({"eos": 8}, ""),
        ({"add_bos": True}, ""),
    ],
)
def test_two_tokenizers_are_compared_as_llama_server_does(changes: dict[str, Any], said: str) -> None:
    mine, its = (LockedTokenizer.model_validate({**TOKENIZER, **more}) for more in ({}, changes))
    assert (said in draft.unlike(mine, its)) if said else draft.unlike(mine, its) == ""


@pytest.mark.parametrize(
    ("mine", "its", "said"),
    [
        ({"add_bos": True, "bos": 1}, {"add_bos": False, "bos": 1}, "one adds a token at the beginning"),
        ({"add_bos": True, "bos": 1}, {"add_bos": True, "bos": 2}, "the beginning of a text is token 2 bes"),
        ({"add_bos": False, "bos": 1}, {"add_bos": False, "bos": 2}, ""),
        ({"add_eos": True, "eos": 1}, {"add_eos": True, "eos": 2}, "the end of a text is token 2 beside 1"),
    ],
)
def test_special_tokens_count_where_they_are_added(mine: Any, its: Any, said: str) -> None:
    one, other = (LockedTokenizer.model_validate({**TOKENIZER, **more}) for more in (mine, its))
    assert draft.unlike(one, other).startswith(said) and bool(draft.unlike(one, other)) == bool(said)


def test_a_named_draft_with_another_tokenizer_is_refused_with_the_reason() -> None:
    headers = {"big": header("big"), "small": header("small", tokens=262_144)}
    with pytest.raises(InventoryError, match="another tokenizer than big: 262144 tokens beside 151936; fix"):
        config(headers, SIZES, draft="small")
    config({"big": header("big")}, SIZES, draft="small")  # what nobody could read is not refused


def test_auto_is_refused_for_a_system_preset() -> None:
    system = {"scope": "system", "listen": "127.0.0.1:8090"}
    with pytest.raises(InventoryError, match="is not behind the gateway"):
        config(BOTH, SIZES, preset=system)


def test_auto_installs_its_candidate_and_starts_nothing_before_it_was_measured() -> None:
    found = config(BOTH, SIZES)
    assert [model["used_by"] for model in derive.models_plan(found)] == [["p"], ["p"]]
    (plan,) = derive.presets_plan(found, models_dir="/m").values()
    assert plan["draft_path"] is None and "--spec-type" not in plan["command"]
    assert plan["draft_choice"] is None


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({}, True),
        ({"verdict": "rejected"}, False),
        ({"verdict": "undecided"}, False),
        ({"model_sha256": "9" * 64}, False),
        ({"draft_sha256": "9" * 64}, False),
        ({"draft": "gone"}, False),
        ({"release": "another"}, True),
    ],
)
def test_a_draft_that_was_kept_for_these_files_is_started(changes: dict[str, Any], used: bool) -> None:
    found = config(BOTH, SIZES, llama_drafts={"p": choice(**changes)})
    (plan,) = derive.presets_plan(found, models_dir="/m", dialects={"b": HELP}).values()
    assert (plan["draft_path"] == "/m/small.gguf") == used
    assert (plan["command"][-4:] == ["--spec-draft-ngl", "99", "--spec-type", "draft-simple"]) == used
    if "verdict" in changes:
        assert plan["draft_choice"]["verdict"] == changes["verdict"]


def test_a_decision_counts_for_nothing_once_the_inventory_says_something_else() -> None:
    for word, path in (("none", None), ("small", "/m/small.gguf")):
        found = config(BOTH, SIZES, draft=word, llama_drafts={"p": choice()})
        (plan,) = derive.presets_plan(found, models_dir="/m").values()
        assert plan["draft_path"] == path and plan["draft_choice"] is None


def test_the_model_s_own_head_needs_no_file() -> None:
    headers = {**BOTH, "big": header("big", "attn", "head")}
    own = choice(type=MTP, draft=None, draft_sha256=None)
    found = config(headers, SIZES, llama_drafts={"p": own})
    (plan,) = derive.presets_plan(found, models_dir="/m", dialects={"b": HELP}).values()
    assert plan["command"][-2:] == ["--spec-type", "draft-mtp"]
    assert "--spec-draft-model" not in plan["command"]
    with pytest.raises(InventoryError, match="does not know --spec-type draft-mtp"):
        derive.presets_plan(found, models_dir="/m", dialects={"b": OLD_HELP})
    with pytest.raises(NotPredicted, match="draft-mtp"):
        fit.estimate_of(found, "p", fit.models(found))


def test_a_named_draft_that_is_a_head_is_started_as_one() -> None:
    headers = {**BOTH, "small": header("small", "head")}
    found = config(headers, SIZES, draft="small")
    (plan,) = derive.presets_plan(found, models_dir="/m", dialects={"b": HELP}).values()
    assert plan["command"][-2:] == ["--spec-type", "draft-mtp"]


def test_the_tensor_types_of_model_and_draft_stand_apart() -> None:
    small = header("small", "head")
    small["tensors"]["blk.*.attn_q.weight"][0][0] = 46
    found = config({"small": small}, SIZES, draft="small")
    (plan,) = derive.presets_plan(found, models_dir="/m", dialects={"b": HELP}).values()
    assert plan["models"] == [
        {"name": "big", "files": ["/m/big.gguf"], "tensor_types": []},
        {"name": "small", "files": ["/m/small.gguf"], "tensor_types": [1, 46]},
    ]


@pytest.mark.parametrize(
    ("help_text", "kinds"),
    [(HELP, {SIMPLE, MTP}), (OLD_HELP, set()), (None, {SIMPLE, MTP}), ("--spec-type TYPES\n", {SIMPLE, MTP})],
)
def test_the_help_says_which_kinds_a_binary_takes(help_text: str | None, kinds: set[str]) -> None:
    known = Dialect.from_help(help_text)
    assert {kind for kind in (SIMPLE, MTP) if known.knows_draft(kind)} == kinds


def vocabulary(folder: Path, tokens: list[str], **keys: int) -> dict[str, Any] | None:
    """What the lock would keep of the tokenizer of a file with these tokens."""
    path = folder / "v.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    for name, value in keys.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", value)
    writer.add_add_bos_token(False)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return draft.tokenizer_facts(parse(path.read_bytes(), path.stat().st_size))


def test_a_vocabulary_is_known_by_its_tokens_without_what_fills_it_up(tmp_path: Path) -> None:
    tokens = [f"t{index}" for index in range(50)]
    plain = vocabulary(tmp_path, tokens, bos_token_id=1, eos_token_id=2)
    assert plain is not None
    assert LockedTokenizer.model_validate(plain).add_bos is False
    assert (plain["model"], plain["tokens"], plain["bos"], plain["eos"]) == ("gpt2", 50, 1, 2)
    filled = vocabulary(tmp_path, [*tokens, *(f"[PAD{index}]" for index in range(50, 60))])
    assert filled is not None and filled["tokens"] == 60
    assert filled["sha256"] == plain["sha256"]
    first = vocabulary(tmp_path, ["<pad>", *tokens[1:]])
    assert first is not None and first["sha256"] == plain["sha256"]
    for other in ([*tokens[:-1], "u"], [*tokens, "u"], [*tokens[:30], "[PAD1]", *tokens[31:]]):
        found = vocabulary(tmp_path, other)
        assert found is not None and found["sha256"] != plain["sha256"]
    few = vocabulary(tmp_path, tokens[:3])
    assert few is not None and few["tokens"] == 3
