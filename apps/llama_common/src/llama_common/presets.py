"""The one model of the inventory's data: builds, GGUF models, presets and the lock, for one host.

`HostConfig.load` is the only way in. It refuses data with `InventoryError`, whose problems name key,
value, limit and fix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from llama_common import draft as drafts
from llama_common import rules
from llama_common.draft import Draft, DraftType
from llama_common.fields import (
    CONTEXT_STEP,
    KV_CACHE_TYPES,
    Address,
    Alias,
    BuildName,
    CmakeName,
    CmakeValue,
    Commit,
    Description,
    DownloadUrl,
    Endpoint,
    ExtraArgument,
    FileName,
    ForeignUnit,
    Front,
    GitRef,
    HubFile,
    HubRepo,
    KeyName,
    KeySha256,
    Listen,
    LocalPath,
    ModelName,
    ModelPattern,
    PresetName,
    RepoUrl,
    Sha256,
    url_file_name,
)
from llama_common.problems import HIDDEN, InventoryError, Problem
from llama_common.translate import problems_of

MAX_CONTEXT = 1_048_576
MAX_FILE_BYTES = 2**42
MAX_BUDGET = 10**12
MAX_MEMORY_MIB = 2**24
DEFAULT_LISTEN = "/run/user/1500/llama/server.sock"
DEFAULT_FRONT = "0.0.0.0:1234"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Build(_Strict):
    """One llama.cpp checkout with one CMake configuration."""

    repo: RepoUrl = Field(description="URL of the git repository.")
    commit: Commit | None = Field(
        None, description="The whole commit, 40 hexadecimal digits. Either this or `ref`."
    )
    ref: GitRef | None = Field(
        None,
        description="A tag or branch; its commit comes from the lock that scripts/lock_models.py writes.",
    )
    cmake_options: dict[CmakeName, CmakeValue] = Field(
        default_factory=dict,
        description="CMake variables, for example GGML_CUDA: true; true and false become ON and OFF.",
    )


class HubSource(_Strict):
    """Files of a Hugging Face repository; checksums and sizes come from the lock."""

    repo: HubRepo = Field(description="owner/name of the repository.")
    file: HubFile | list[HubFile] = Field(
        description="The file, or all parts of a split model in order: x-00001-of-00002.gguf, ..."
    )
    revision: GitRef = Field("main", description="Branch, tag or whole commit.")
    endpoint: Endpoint = Field(
        "https://huggingface.co", description="Address of the hub or of a mirror of it."
    )

    @property
    def files(self) -> list[str]:
        """Every file, in order."""
        return self.file if isinstance(self.file, list) else [self.file]


class _FileSource(_Strict):
    """Where a file comes from, and its name on disk."""

    url: DownloadUrl | None = Field(None, description="Where it is downloaded from (http or https).")
    path: LocalPath | None = Field(None, description="A file that is already on the host.")
    file: FileName | None = Field(None, description="Name on disk; default: the last part of the source.")

    @property
    def disk_name(self) -> str:
        """The name on disk; empty when neither file, url nor path gives one."""
        if self.file:
            return self.file
        return url_file_name(self.url) if self.url else (self.path or "").rpartition("/")[2]


class ModelPart(_FileSource):
    """One file of a split model, from exactly one of url and path."""

    sha256: Sha256 = Field(description="SHA-256 of the file, 64 hexadecimal digits.")
    size: int = Field(ge=1, le=MAX_FILE_BYTES, description="Size in bytes.")


class GgufModel(_FileSource):
    """One model, from exactly one of url, path, hf and files."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": [source]} for source in ("url", "path", "hf", "files")]}
    )

    hf: HubSource | None = Field(
        None, description="Files of a Hugging Face repository, pinned by the lock file."
    )
    files: list[ModelPart] | None = Field(
        None,
        min_length=2,
        max_length=99,
        description="The parts of a split model, in order: x-00001-of-00003.gguf, ...",
    )
    sha256: Sha256 | None = Field(
        None, description="SHA-256 of the file, 64 hexadecimal digits; with url and path."
    )
    size: int | None = Field(None, ge=1, le=MAX_FILE_BYTES, description="Size in bytes; with url and path.")


class Speed(_Strict):
    """What a throughput should be and must not fall under, in tokens per second."""

    target: float = Field(gt=0, le=1_000_000, description="Expected tokens per second.")
    floor: float | None = Field(
        None, gt=0, le=1_000_000, description="Verification fails under this many tokens per second."
    )


class Expect(_Strict):
    """Throughput that the verification holds a preset to."""

    generation_tok_s: Speed | None = Field(None, description="Generation speed, tokens per second.")
    prefill_tok_s: Speed | None = Field(None, description="Prompt processing speed, tokens per second.")


class Preset(_Strict):
    """One way to run one model on one build: becomes one systemd unit."""

    description: Description = Field(description="One line for people: units, lmswitch and tables show it.")
    build: BuildName = Field(description="Key of llama_cpp_builds.")
    model: ModelName = Field(description="Key of gguf_models.")
    draft: ModelName = Field(
        "none",
        description="Draft model for speculative decoding: none, auto (what scripts/choose_draft.py measured "
        "to be faster on this host), or a key of gguf_models.",
    )
    projector: ModelName | None = Field(
        None, description="Key of gguf_models: the file through which a model takes pictures (--mmproj)."
    )
    aliases: list[Alias] = Field(
        default_factory=list, max_length=8, description="Short names for lmswitch, unique on the host."
    )
    context: int = Field(
        ge=CONTEXT_STEP,
        le=MAX_CONTEXT,
        json_schema_extra={"multipleOf": CONTEXT_STEP},
        description="Context in tokens over all slots, a multiple of 256; an agent's slot needs 32768.",
    )
    kv_cache_type: Literal[KV_CACHE_TYPES] = Field(  # type: ignore[valid-type]
        description="Type of the KV cache, for K and V alike: different types take a path many times slower."
    )
    n_gpu_layers: int = Field(
        99, ge=0, le=999, description="Layers on the GPU; 99 means all of today's models, 0 none."
    )
    n_cpu_moe: int = Field(
        0, ge=0, le=999, description="Layers whose expert weights stay in main memory (MoE models)."
    )
    threads: int | None = Field(
        None, ge=1, le=512, description="CPU threads for generation; left out, llama-server chooses."
    )
    flash_attention: bool = Field(True, description="Flash attention; a quantized KV cache needs it.")
    parallel: int = Field(
        1, ge=1, le=64, description="Slots: requests answered at the same time; they share the context."
    )
    agent: bool = Field(
        True,
        description="Whether coding agents use it: each slot then needs 32768 tokens of context and jinja.",
    )
    jinja: bool = Field(True, description="Use the model's own chat template; tool calls need it.")
    extra_args: list[ExtraArgument] = Field(
        default_factory=list,
        max_length=64,
        description="Further llama-server arguments, one per item; none that a key here sets.",
    )
    scope: Literal["user", "system"] = Field(
        "user",
        description="user: one of the exclusive presets of the LLM user. system: a service of its own.",
    )
    listen: Listen | None = Field(
        None,
        description="Of a system preset: IP:PORT or the path of a socket ending in .sock. "
        "User presets listen at llama_presets_listen.",
    )
    start_timeout: int = Field(180, ge=5, le=3600, description="Seconds from start to a healthy server.")
    stop_timeout: int = Field(15, ge=1, le=300, description="Seconds from the stop signal to the kill.")
    expect: Expect = Field(default_factory=Expect, description="Throughput that verification holds it to.")

    @property
    def context_per_slot(self) -> int:
        """Tokens of context that one request can use."""
        return self.context // self.parallel


class LockedBuild(_Strict):
    """The commit that a build's ref stood for."""

    repo: RepoUrl = Field(description="URL of the repository that was asked.")
    ref: GitRef = Field(description="The ref that was asked for.")
    commit: Commit = Field(description="What it stood for.")


class LockedFile(_Strict):
    """One file of a hub repository."""

    file: HubFile = Field(description="Path in the repository.")
    sha256: Sha256 = Field(description="SHA-256 as the hub publishes it.")
    size: int = Field(ge=1, le=MAX_FILE_BYTES, description="Size in bytes.")


class LockedModel(_Strict):
    """The commit that a model's revision stood for, and its files."""

    repo: HubRepo = Field(description="owner/name of the repository that was asked.")
    revision: GitRef = Field(description="The revision that was asked for.")
    commit: Commit = Field(description="What it stood for.")
    files: list[LockedFile] = Field(description="The files, in the order of the inventory.")


class LockedTokenizer(_Strict):
    """What decides whether one model can be the draft of another."""

    model: str = Field(max_length=64, description="tokenizer.ggml.model.")
    tokens: int = Field(ge=0, description="Number of tokens.")
    sha256: Sha256 = Field(description="SHA-256 of the tokens from the sixth on, without filler at the end.")
    bos: int | None = Field(None, description="Token at the beginning of a text.")
    eos: int | None = Field(None, description="Token at its end.")
    add_bos: bool | None = Field(None, description="Whether it is added.")
    add_eos: bool | None = Field(None, description="Whether it is added.")


class LockedHeader(_Strict):
    """What the header of a model's file says about its memory and its tokenizer."""

    sha256: Sha256 = Field(description="SHA-256 of the (first) file that it was read from.")
    architecture: str = Field(max_length=64, description="general.architecture.")
    numbers: dict[str, Any] = Field(description="Numbers of the metadata, without the architecture's name.")
    tensors: dict[str, list[list[Any]]] = Field(
        description="Tensors by name, * for the layer: runs of type, shape, bytes, first layer, layers."
    )
    tokenizer: LockedTokenizer | None = Field(None, description="The tokenizer, where the file has one.")


class Lock(_Strict):
    """What scripts/lock_models.py found out: never written by hand."""

    builds: dict[BuildName, LockedBuild] = Field(
        default_factory=dict, description="One entry per build with a ref."
    )
    models: dict[ModelName, LockedModel] = Field(
        default_factory=dict, description="One entry per model with hf."
    )
    headers: dict[ModelName, LockedHeader] = Field(
        default_factory=dict, description="One entry per model whose header could be read."
    )


class DraftFigure(_Strict):
    """One speed without and with a draft: medians, and their ratio with its 95 % interval."""

    without: float = Field(gt=0, description="Median without the draft.")
    drafted: float = Field(gt=0, description="Median with the draft.")
    ratio: float = Field(gt=0, description="With over without.")
    low: float = Field(gt=0, description="Lower end of the ratio's interval.")
    high: float = Field(gt=0, description="Upper end of the ratio's interval.")


class DraftChoice(_Strict):
    """What scripts/choose_draft.py decided about the draft of one preset on this host, and for what."""

    verdict: Literal["kept", "rejected", "undecided"] = Field(description="Whether the draft is used.")
    reason: str = Field(max_length=1000, description="Why, in one line.")
    type: DraftType = Field(description="The kind of draft, as --spec-type names it.")
    draft: ModelName | None = Field(description="Key of gguf_models; null: the model's own head.")
    model_sha256: Sha256 = Field(description="SHA-256 of the (first) file of the model.")
    draft_sha256: Sha256 | None = Field(description="SHA-256 of the (first) file of the draft model.")
    release: str = Field(max_length=128, description="The release of llama.cpp that it was measured with.")
    driver: str = Field(max_length=64, description="The NVIDIA driver, or none.")
    measured: str = Field(max_length=32, description="When, in UTC.")
    pairs: int = Field(ge=0, description="How many pairs of runs.")
    figures: dict[Literal["answer", "generation", "prefill"], DraftFigure] = Field(
        default_factory=dict,
        description="Speeds in tokens per second; answer: tokens written in the time of a whole answer.",
    )


Budget = Annotated[int, Field(ge=1, le=MAX_BUDGET)]


class GatewayKey(_Strict):
    """Whoever may use the gateway, and how much of it."""

    name: KeyName = Field(description="Whose key it is; logs and figures show this name.")
    sha256: KeySha256 = Field(description="SHA-256 of the key, as `llmbox-key new NAME` prints it.")
    presets: list[PresetName] | None = Field(
        None, description="Presets that it may use; left out or null: all."
    )
    measures: bool = Field(
        False, description="Whether it may have the server for itself while it measures; all others wait."
    )
    requests_per_minute: Budget | None = Field(None, description="Requests in a minute; null: no limit.")
    requests_per_day: Budget | None = Field(None, description="Requests in 24 hours; null: no limit.")
    tokens_per_minute: Budget | None = Field(None, description="Tokens in a minute; null: no limit.")
    tokens_per_day: Budget | None = Field(None, description="Tokens in 24 hours; null: no limit.")


class ModelFile(_Strict):
    """One file that a host needs, with everything known about it."""

    file: str
    url: str | None
    path: str | None
    sha256: str
    size: int


class HostConfig(_Strict):
    """All data of one host: builds, models and presets, with the lock merged in."""

    llama_cpp_builds: dict[BuildName, Build] = Field(
        default_factory=dict, description="Builds of llama.cpp, by name."
    )
    gguf_models: dict[ModelName, GgufModel] = Field(default_factory=dict, description="GGUF models, by name.")
    llama_presets: dict[PresetName, Preset] = Field(default_factory=dict, description="Presets, by name.")
    llama_lock: Lock = Field(
        default_factory=Lock, description="Written by scripts/lock_models.py; do not edit."
    )
    llama_drafts: dict[PresetName, DraftChoice] = Field(
        default_factory=dict,
        description="Written by scripts/choose_draft.py, one file a host; do not edit.",
    )
    llama_presets_listen: Listen = Field(
        DEFAULT_LISTEN,
        description="Where the active user preset listens: the path of a socket ending in .sock, behind the "
        "gateway.",
    )
    llama_presets_foreign_units: list[ForeignUnit] = Field(
        default_factory=list,
        description="User units of other programs that must not run beside a preset, e.g. lmstudio.service.",
    )
    llama_presets_gpu_memory_mib: int = Field(
        0,
        ge=0,
        le=MAX_MEMORY_MIB,
        description="Memory of the GPU in MiB, as nvidia-smi names it; 0: no GPU, nothing is checked.",
    )
    llama_presets_gpu_reserved_mib: int = Field(
        1024,
        ge=0,
        le=MAX_MEMORY_MIB,
        description="What of it presets leave free, for CUDA's own needs and for the desktop. The default is "
        "llama.cpp's own (--fit-target).",
    )
    llama_presets_main_memory_mib: int = Field(
        0,
        ge=0,
        le=MAX_MEMORY_MIB,
        description="Main memory that is built in, in MiB (32 GB: 32768); 0: not known, not checked.",
    )
    llama_presets_main_reserved_mib: int = Field(
        4096,
        ge=0,
        le=MAX_MEMORY_MIB,
        description="What of it presets leave free, for the firmware, the system and all other programs.",
    )
    llm_gateway_listen: list[Front] = Field(
        [DEFAULT_FRONT],
        min_length=1,
        max_length=16,
        description="Where clients reach the gateway of the LLM box: IP:PORT each.",
    )
    llm_gateway_default_preset: PresetName | Literal[""] = Field(
        "", description="The user preset that a request starts when nothing runs; empty: none."
    )
    llm_gateway_model_names: dict[ModelPattern, PresetName] = Field(
        default_factory=dict,
        description="Names that clients use, with * and ?, and the user preset that each means.",
    )
    llm_gateway_keys: list[GatewayKey] = Field(
        default_factory=list,
        max_length=1000,
        description="Keys that clients must show; none: see the networks.",
    )

    @classmethod
    def load(cls, variables: Mapping[str, Any]) -> HostConfig:
        """Check `variables` (the names above; those left out have their defaults) and merge the lock.

        Raises InventoryError with every problem of the first stage that found any: shape first, then what
        keys say of each other.
        """
        data = {
            name: value
            for name, value in variables.items()
            if not (name in ("llama_lock", "llama_drafts") and value is None)
        }
        try:
            config = cls.model_validate(data)
        except ValidationError as error:
            raise InventoryError([_hidden(problem) for problem in problems_of(error, data, cls)]) from None
        problems = rules.check(config)
        if problems:
            raise InventoryError(problems)
        return config

    def commit(self, build: str) -> str:
        """The commit of a build, from the data or from the lock."""
        return self.llama_cpp_builds[build].commit or self.llama_lock.builds[build].commit

    def files(self, model: str) -> list[ModelFile]:
        """The files of a model in order; the first is what llama-server is given."""
        entry = self.gguf_models[model]
        if entry.hf is not None:
            locked = self.llama_lock.models[model]
            return [
                ModelFile(
                    file=entry.file or file.file.rpartition("/")[2],
                    url=f"{entry.hf.endpoint}/{locked.repo}/resolve/{locked.commit}/{file.file}",
                    path=None,
                    sha256=file.sha256,
                    size=file.size,
                )
                for file in locked.files
            ]
        parts: Sequence[ModelPart | GgufModel] = entry.files or [entry]
        return [
            ModelFile(
                file=part.disk_name,
                url=part.url,
                path=part.path,
                sha256=part.sha256 or "",
                size=part.size or 0,
            )
            for part in parts
        ]

    @property
    def gpu_room(self) -> int:
        """Bytes of the GPU's memory that presets may take; 0 without a GPU."""
        return max(0, self.llama_presets_gpu_memory_mib - self.llama_presets_gpu_reserved_mib) * 2**20

    @property
    def main_room(self) -> int:
        """Bytes of main memory that a preset may take; 0 where nobody said how much there is."""
        return max(0, self.llama_presets_main_memory_mib - self.llama_presets_main_reserved_mib) * 2**20

    def models_of(self, preset: str) -> list[str]:
        """The models that a preset is started with: its own, then its draft."""
        entry = self.llama_presets[preset]
        draft = self.draft(preset)
        return [entry.model, *([draft.model] if draft and draft.model else [])]

    def projector_of(self, preset: str) -> list[str]:
        """The projector of a preset, nothing without one."""
        projector = self.llama_presets[preset].projector
        return [projector] if projector else []

    def models_for(self, preset: str) -> list[str]:
        """The models that a preset needs on its host: its projector and what `draft: auto` may try too."""
        names = [*self.models_of(preset), *self.projector_of(preset)]
        if self.llama_presets[preset].draft == "auto":
            names += [one.model for one in drafts.candidates(self, preset) if one.model]
        return list(dict.fromkeys(names))

    def draft(self, preset: str) -> Draft | None:
        """The draft of a preset, None without one. `auto` has one when it was measured and kept."""
        draft = self.llama_presets[preset].draft
        if draft == "none":
            return None
        if draft != "auto":
            return Draft(drafts.type_of(self, draft), draft)
        choice = self.draft_choice(preset)
        return Draft(choice.type, choice.draft) if choice and choice.verdict == "kept" else None

    def draft_choice(self, preset: str) -> DraftChoice | None:
        """What was decided for `draft: auto`; None when model or draft are others by now."""
        choice = self.llama_drafts.get(preset)
        if choice is None or self.llama_presets[preset].draft != "auto":
            return None
        wanted = [(self.llama_presets[preset].model, choice.model_sha256)]
        if choice.draft is not None:
            wanted.append((choice.draft, choice.draft_sha256 or ""))
        same = all(name in self.gguf_models and self.files(name)[0].sha256 == sha for name, sha in wanted)
        return choice if same else None

    def address(self, preset: str) -> Address:
        """Where a preset listens."""
        return Address.parse(self.llama_presets[preset].listen or self.llama_presets_listen)

    @property
    def user_presets(self) -> list[str]:
        """The presets behind the gateway, in the order of the data."""
        return [name for name, preset in self.llama_presets.items() if preset.scope == "user"]


def _hidden(problem: Problem) -> Problem:
    """The problem, without what stands among the keys: it may be a key itself."""
    return replace(problem, value=HIDDEN) if problem.path[:1] == ("llm_gateway_keys",) else problem
