"""What keys say of each other: references, uniqueness, ports, the agent's context, the lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final

from pydantic_core import PydanticCustomError

from llama_common import draft as drafts
from llama_common import fields, flags
from llama_common.problems import HIDDEN, MISSING, Problem
from llama_common.translate import closest

if TYPE_CHECKING:
    from llama_common.presets import GgufModel, HostConfig, ModelPart

LOCK_COMMAND: Final = "scripts/lock_models.py --inventory DIR"


def check(config: HostConfig) -> list[Problem]:
    """Every problem of a configuration whose single values are all right."""
    return [problem for rule in RULES for problem in rule(config)]


def build_pins(config: HostConfig) -> Iterator[Problem]:
    """A build has a commit, or a ref that the lock knows."""
    for name, build in config.llama_cpp_builds.items():
        path = ("llama_cpp_builds", name)
        if build.commit and build.ref:
            yield Problem(
                (*path, "ref"),
                build.ref,
                "commit and ref are both there; exactly one is allowed",
                "remove one of them",
            )
        elif not build.commit and not build.ref:
            yield Problem(
                (*path, "commit"),
                MISSING,
                "neither commit nor ref is there; one is needed",
                "add 'ref: TAG' or 'commit:'",
            )
        elif build.ref:
            locked = config.llama_lock.builds.get(name)
            if locked is None:
                yield Problem(
                    (*path, "ref"),
                    build.ref,
                    "its commit is not in the lock (llama_lock.builds)",
                    f"run {LOCK_COMMAND}",
                )
            elif (locked.repo, locked.ref) != (build.repo, build.ref):
                yield Problem(
                    (*path, "ref"),
                    build.ref,
                    f"the lock is for {locked.ref} of {locked.repo}, not for what stands here",
                    f"run {LOCK_COMMAND}",
                )


def model_sources(config: HostConfig) -> Iterator[Problem]:
    """A model has exactly one source, and checksum and size stand where they belong."""
    for name, model in config.gguf_models.items():
        path = ("gguf_models", name)
        sources = [source for source in ("url", "path", "hf", "files") if getattr(model, source) is not None]
        if len(sources) != 1:
            found = " and ".join(sources) or "none"
            yield Problem(
                (*path, sources[-1] if sources else "url"),
                getattr(model, sources[-1]) if sources else MISSING,
                f"has {found} of url, path, hf and files; exactly one is allowed",
                f"keep only {sources[0]}" if sources else "add 'url:' with sha256 and size, or 'hf:'",
            )
            continue
        source = sources[0]
        for key in ("sha256", "size"):
            given = getattr(model, key)
            if source in ("url", "path") and given is None:
                yield Problem((*path, key), MISSING, f"a model with {source} needs {key}", f"add '{key}:'")
            elif source in ("hf", "files") and given is not None:
                where = "the lock" if source == "hf" else "each item of files"
                yield Problem(
                    (*path, key), given, f"a model with {source} has its {key} in {where}", "remove it here"
                )
        if model.file and (source == "files" or (model.hf and len(model.hf.files) > 1)):
            yield Problem(
                (*path, "file"),
                model.file,
                "a split model has several files, each with its own name",
                "remove it",
            )
        for part_path, part in _parts(path, model):
            both = part.url is not None and part.path is not None
            if source == "files" and (both or (part.url is None and part.path is None)):
                yield Problem(
                    (*part_path, "url"),
                    part.url or MISSING,
                    "needs exactly one of url and path",
                    "write one of them",
                )


def model_file_names(config: HostConfig) -> Iterator[Problem]:
    """Every file has a safe name, parts are complete and in order, and no name stands for two contents."""
    owners: dict[str, tuple[str, str, int | None]] = {}
    for name, model in config.gguf_models.items():
        path = ("gguf_models", name)
        names = []
        for key, value, file, sha256, size in _named_files(path, model, config):
            bad = _bad_name(file)
            if bad:
                yield Problem(
                    key,
                    value,
                    f"names the file {file!r}, which {bad[0]}",
                    f"add 'file: NAME.gguf' ({bad[1]})",
                )
                continue
            names.append((key, value, file))
            other = owners.setdefault(file, (name, sha256, size))
            if sha256 and other[1] == sha256 and size != other[2]:
                yield Problem(
                    key if model.hf else (*key[:-1], "size"),
                    size,
                    f"{file} is also a file of {other[0]} with this SHA-256 and {other[2]} bytes",
                    "write the one size that the file has",
                )
            if sha256 and other[1] and other[1] != sha256:
                yield Problem(
                    key,
                    value,
                    f"{file} is also a file of {other[0]} with another SHA-256; one name, one content",
                    f"give this one another name: 'file: {name}.gguf'",
                )
        yield from _bad_parts(names)


def model_locks(config: HostConfig) -> Iterator[Problem]:
    """The lock knows every hub file as the data asks for it."""
    for name, model in config.gguf_models.items():
        if model.hf is None:
            continue
        path = ("gguf_models", name, "hf")
        locked = config.llama_lock.models.get(name)
        if locked is None:
            yield Problem(
                (*path, "revision"),
                model.hf.revision,
                "its commit, checksums and sizes are not in the lock (llama_lock.models)",
                f"run {LOCK_COMMAND}",
            )
        elif (locked.repo, locked.revision) != (model.hf.repo, model.hf.revision):
            yield Problem(
                (*path, "repo"),
                model.hf.repo,
                f"the lock is for {locked.repo} at {locked.revision}, not for what stands here",
                f"run {LOCK_COMMAND}",
            )
        elif [file.file for file in locked.files] != model.hf.files:
            yield Problem(
                (*path, "file"), model.hf.file, "the lock is for other files", f"run {LOCK_COMMAND}"
            )


def references(config: HostConfig) -> Iterator[Problem]:
    """A preset names a build, a model, a projector and a draft model that exist."""
    for name, preset in config.llama_presets.items():
        path = ("llama_presets", name)
        yield from _unknown((*path, "build"), preset.build, config.llama_cpp_builds, "llama_cpp_builds")
        yield from _unknown((*path, "model"), preset.model, config.gguf_models, "gguf_models")
        if preset.projector is not None:
            at = (*path, "projector")
            yield from _unknown(at, preset.projector, config.gguf_models, "gguf_models")
            if preset.projector == preset.model:
                yield Problem(at, preset.projector, "is the model itself", "name its mmproj file")
        if preset.draft in fields.DRAFT_WORDS:
            continue
        yield from _unknown(
            (*path, "draft"), preset.draft, config.gguf_models, "gguf_models", also=fields.DRAFT_WORDS
        )
        if preset.draft == preset.model:
            yield Problem(
                (*path, "draft"),
                preset.draft,
                "a model cannot be its own draft",
                "name a smaller model, or none",
            )
    for word in fields.DRAFT_WORDS:
        if word in config.gguf_models:
            yield Problem(
                ("gguf_models", word),
                word,
                f"'{word}' has a meaning of its own in draft:",
                "rename the model",
            )


def draft_models(config: HostConfig) -> Iterator[Problem]:
    """A draft model has its model's tokenizer, as far as the lock knows; auto needs a gateway."""
    for name, preset in config.llama_presets.items():
        path = ("llama_presets", name, "draft")
        if preset.draft == "auto" and preset.scope == "system":
            yield Problem(
                path,
                preset.draft,
                "a system preset is not behind the gateway, by which drafts are measured",
                "name a draft model, or none",
            )
        elif reason := drafts.refusal(config, preset.model, preset.draft):
            yield Problem(
                path,
                preset.draft,
                f"has another tokenizer than {preset.model}: {reason}",
                "name a model of the same family, or write draft: auto",
            )


def names(config: HostConfig) -> Iterator[Problem]:
    """Every word that lmswitch takes means one thing."""
    taken: dict[str, str] = dict.fromkeys(fields.LMSWITCH_VERBS, "a word of lmswitch")
    for name in config.llama_presets:
        path = ("llama_presets", name)
        if name in taken:
            yield Problem(path, name, f"'{name}' is already {taken[name]}", "rename the preset")
        if name.startswith("build-"):
            yield Problem(path, name, "units named llama-build-… belong to the builds", "rename the preset")
        taken.setdefault(name, f"the preset {name}")
    for name, preset in config.llama_presets.items():
        for index, alias in enumerate(preset.aliases):
            place = ("llama_presets", name, "aliases", str(index))
            if alias in taken:
                yield Problem(
                    place,
                    alias,
                    f"'{alias}' is already {taken[alias]}; an alias stands for one preset",
                    "choose another alias",
                )
            taken.setdefault(alias, f"an alias of {name}")


def contexts(config: HostConfig) -> Iterator[Problem]:
    """Every slot gets whole steps of context, and an agent's slot enough of it."""
    for name, preset in config.llama_presets.items():
        path = ("llama_presets", name, "context")
        slots = f" in each of {preset.parallel} slots" if preset.parallel > 1 else ""
        if preset.context % (fields.CONTEXT_STEP * preset.parallel):
            step = fields.CONTEXT_STEP * preset.parallel
            yield Problem(
                path,
                preset.context,
                f"must be a multiple of {step}" + (f" for {preset.parallel} slots" if slots else ""),
                f"write {max(preset.context // step * step, step)}",
            )
        elif preset.agent and preset.context_per_slot < fields.AGENT_CONTEXT_FLOOR:
            yield Problem(
                path,
                preset.context,
                f"gives {preset.context_per_slot} tokens{slots}; "
                f"an agent needs at least {fields.AGENT_CONTEXT_FLOOR}",
                f"write {fields.AGENT_CONTEXT_FLOOR * preset.parallel} or more, or agent: false",
            )
        if preset.agent and not preset.jinja:
            yield Problem(
                ("llama_presets", name, "jinja"),
                False,
                "an agent's tool calls need jinja",
                "write jinja: true, or agent: false",
            )


def caches(config: HostConfig) -> Iterator[Problem]:
    """A quantized V cache needs flash attention: llama-server refuses to start otherwise."""
    for name, preset in config.llama_presets.items():
        if preset.kv_cache_type not in fields.UNQUANTIZED_KV_CACHE_TYPES and not preset.flash_attention:
            yield Problem(
                ("llama_presets", name, "flash_attention"),
                False,
                f"kv_cache_type {preset.kv_cache_type} needs flash attention",
                f"write flash_attention: true, or kv_cache_type: {fields.UNQUANTIZED_KV_CACHE_TYPES[1]}",
            )


def extra_args(config: HostConfig) -> Iterator[Problem]:
    """extra_args says nothing that a key says, and nothing twice."""
    for name, preset in config.llama_presets.items():
        for problem in flags.check_extra_args(preset.extra_args):
            path = ("llama_presets", name, "extra_args", str(problem.index))
            yield Problem(path, preset.extra_args[problem.index], problem.message, problem.fix)


def expectations(config: HostConfig) -> Iterator[Problem]:
    """A floor is not above its target."""
    for name, preset in config.llama_presets.items():
        for metric in ("generation_tok_s", "prefill_tok_s"):
            speed = getattr(preset.expect, metric)
            if speed and speed.floor is not None and speed.floor > speed.target:
                yield Problem(
                    ("llama_presets", name, "expect", metric, "floor"),
                    speed.floor,
                    f"is above its target of {speed.target:g} tok/s",
                    f"write {speed.target:g} or less",
                )


def memory(config: HostConfig) -> Iterator[Problem]:
    """Something of the GPU's memory and of the host's is left for presets."""
    for key, of, room in (
        ("llama_presets_gpu", "the GPU's", config.gpu_room),
        ("llama_presets_main", "main memory's", config.main_room),
    ):
        there, reserved = (getattr(config, f"{key}_{name}_mib") for name in ("memory", "reserved"))
        if there and not room:
            yield Problem(
                (f"{key}_reserved_mib",),
                reserved,
                f"leaves nothing of {of} {there} MiB ({key}_memory_mib)",
                "write the MiB that stay free beside the presets",
            )


def gateway_only(config: HostConfig) -> Iterator[Problem]:
    """No preset of the LLM box is ever reachable except through the gateway, which looks in one place."""
    front = config.llama_presets_listen
    if config.user_presets and not fields.Address.parse(front).is_socket:
        yield Problem(
            ("llama_presets_listen",),
            front,
            "would let clients past the gateway: user presets listen on a UNIX socket only",
            "remove it; llm_gateway_listen says where clients connect",
        )
        return
    for name in config.user_presets:
        listen = config.llama_presets[name].listen
        if listen is not None and listen != front:
            past = (
                "would let clients past the gateway" if not listen.startswith("/") else "is no place for it"
            )
            yield Problem(
                ("llama_presets", name, "listen"),
                listen,
                f"{past}: a user preset listens where the gateway looks, at llama_presets_listen",
                "remove it; llm_gateway_listen says where clients connect",
            )


def addresses(config: HostConfig) -> Iterator[Problem]:
    """What runs at the same time listens at different places."""
    taken: list[tuple[fields.Address, str]] = []
    if config.user_presets:
        for index, text in enumerate(config.llm_gateway_listen):
            mine = fields.Address.parse(text)
            clash = next((owner for other, owner in taken if mine.clashes_with(other)), None)
            if clash:
                yield Problem(
                    ("llm_gateway_listen", str(index)),
                    text,
                    f"is already taken by {clash}: the same port at the same or at every address",
                    "remove one of them",
                )
            taken.append((mine, f"llm_gateway_listen.{index}"))
        taken.append((fields.Address.parse(config.llama_presets_listen), "llama_presets_listen"))
    for name, preset in config.llama_presets.items():
        if preset.scope != "system":
            continue
        path = ("llama_presets", name, "listen")
        if preset.listen is None:
            yield Problem(
                path,
                MISSING,
                "a preset of scope system has a place of its own to listen at",
                'add listen: "127.0.0.1:8090"',
            )
            continue
        mine = fields.Address.parse(preset.listen)
        for other, owner in taken:
            if mine.clashes_with(other):
                yield Problem(
                    path,
                    preset.listen,
                    f"is already taken by {owner}; both run at the same time",
                    "choose another port" if mine.port else "choose another path",
                )
                break
        taken.append((mine, f"the preset {name}"))


def gateway_names(config: HostConfig) -> Iterator[Problem]:
    """What the gateway starts, and lets a key use, are user presets of this host."""
    known = dict.fromkeys(config.user_presets)
    if not known:
        return  # a host without them has no gateway
    group = "llama_presets with scope user"
    if config.llm_gateway_default_preset:
        yield from _unknown(("llm_gateway_default_preset",), config.llm_gateway_default_preset, known, group)
    words = {word for name in known for word in (name, *config.llama_presets[name].aliases)}
    for pattern, name in config.llm_gateway_model_names.items():
        path = ("llm_gateway_model_names", pattern)
        yield from _unknown(path, name, known, group)
        if pattern in words:
            yield Problem(
                path, name, f"'{pattern}' means a preset already, by its name or alias", "remove it"
            )
    seen: dict[str, str] = {}
    for index, key in enumerate(config.llm_gateway_keys):
        place = ("llm_gateway_keys", str(index))
        for number, name in enumerate(key.presets or ()):
            yield from _unknown((*place, "presets", str(number)), name, known, group)
        for what, value in (("name", key.name), ("sha256", key.sha256)):
            if value in seen:
                fix = (
                    "give it another name" if what == "name" else f"make one with: llmbox-key new {key.name}"
                )
                shown = value if what == "name" else HIDDEN
                yield Problem((*place, what), shown, f"is that of {seen[value]} too", fix)
            seen.setdefault(value, f"llm_gateway_keys.{index}")


def cmake_switches(config: HostConfig) -> Iterator[Problem]:
    """An option that roles act on is true or false: 1 would mean the same to CMake, and nothing to a role."""
    for name, build in config.llama_cpp_builds.items():
        for option, value in build.cmake_options.items():
            if option in fields.CMAKE_SWITCHES and not isinstance(value, bool):
                path = ("llama_cpp_builds", name, "cmake_options", option)
                fix = "write false" if str(value).strip() in ("", "0") else "write true"
                yield Problem(path, value, "must be true or false: roles act on it", fix)


def foreign_units(config: HostConfig) -> Iterator[Problem]:
    """A foreign unit is not one of ours and is named once."""
    ours = {f"llama-{name}.service" for name in config.llama_presets}
    seen: set[str] = set()
    for index, unit in enumerate(config.llama_presets_foreign_units):
        path = ("llama_presets_foreign_units", str(index))
        if unit in ours:
            yield Problem(
                path, unit, "is the unit of a preset here; presets exclude each other anyway", "remove it"
            )
        elif unit in seen:
            yield Problem(path, unit, "is there twice", "remove one of them")
        seen.add(unit)


Rule = Callable[["HostConfig"], Iterable[Problem]]

RULES: Final[tuple[Rule, ...]] = (
    build_pins,
    cmake_switches,
    model_sources,
    model_file_names,
    model_locks,
    references,
    draft_models,
    names,
    contexts,
    caches,
    extra_args,
    expectations,
    memory,
    gateway_only,
    addresses,
    gateway_names,
    foreign_units,
)


def _unknown(
    path: tuple[str, ...], name: str, known: Mapping[str, Any], group: str, also: tuple[str, ...] = ()
) -> Iterator[Problem]:
    if name in known:
        return
    choices = [*also, *known]
    guess = closest(name, choices)
    listed = ", ".join(choices[:6]) + (", …" if len(choices) > 6 else "")
    message = f"is not a key of {group}; known: {listed or 'none'}"
    yield Problem(
        path,
        name,
        message,
        f"did you mean '{guess}'?" if guess else f"add it to {group}, or name a known one",
    )


def _parts(
    path: tuple[str, ...], model: GgufModel
) -> Iterator[tuple[tuple[str, ...], ModelPart | GgufModel]]:
    """Every entry of a model that has a URL or a path of its own."""
    if model.files is not None:
        for index, part in enumerate(model.files):
            yield (*path, "files", str(index)), part
    elif model.hf is None:
        yield path, model


def _named_files(
    path: tuple[str, ...], model: GgufModel, config: HostConfig
) -> Iterator[tuple[tuple[str, ...], object, str, str, int | None]]:
    """Key, value, name on disk, SHA-256 and size of every file of a model."""
    if model.hf is not None:
        locked = config.llama_lock.models.get(path[-1])
        sums = {file.file: (file.sha256, file.size) for file in locked.files} if locked else {}
        for index, file in enumerate(model.hf.files):
            key = (
                (*path, "hf", "file", str(index))
                if isinstance(model.hf.file, list)
                else (*path, "hf", "file")
            )
            yield key, file, model.file or file.rpartition("/")[2], *sums.get(file, ("", None))
        return
    for part_path, part in _parts(path, model):
        source = "file" if part.file else "url" if part.url else "path"
        if getattr(part, source) is not None:
            yield (*part_path, source), getattr(part, source), part.disk_name, part.sha256 or "", part.size


def _bad_name(file: str) -> tuple[str, str] | None:
    """Why a name cannot be used on disk, and how to write it."""
    try:
        fields.check_file_name(file)
    except PydanticCustomError as error:
        context = error.context or {}
        return str(context["message"]), str(context["fix"])
    return None


def _bad_parts(names: list[tuple[tuple[str, ...], object, str]]) -> Iterator[Problem]:
    """Parts of a split model that are missing, foreign or out of order."""
    total = len(names)
    first = fields.GGUF_PART.fullmatch(names[0][2]) if names else None
    for position, (path, value, file) in enumerate(names, start=1):
        match = fields.GGUF_PART.fullmatch(file)
        wanted = f"{first['stem'] if first else 'NAME'}-{position:05d}-of-{total:05d}.gguf"
        if match is None and total == 1:
            continue
        if (
            match is None
            or int(match["parts"]) != total
            or int(match["part"]) != position
            or (first and match["stem"] != first["stem"])
        ):
            count = f"part {position} of {total}"
            hint = (
                f"list all {int(match['parts'])} parts in order"
                if match and int(match["parts"]) != total
                else f"write {wanted} here"
            )
            yield Problem(
                path, value, f"does not fit as {count}: llama-server opens the parts by their numbers", hint
            )
            return
