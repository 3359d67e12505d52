"""tune_moe: what a setting's run comes to, what is kept and not run again, and what is proposed."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml
from llama_common import fit
from llama_common.memory import Estimate, Use
from llama_common.model import Model
from llama_common.presets import HostConfig
from llmbox.gateway.requests import TOO_LONG
from PIL import Image

from scripts import _tiny_models, _tuning_chart, tune_moe
from scripts._chart import WIDTH
from scripts._gpu_watch import GpuWatch
from scripts._header import read_file
from scripts._inventory import Host
from scripts._llm_box import LlmBox
from scripts._measure import NotMeasured, Shape, Timed
from scripts._search import Axis, OutOfTime, Setting
from scripts._trial import Serving, TrialFailed
from scripts._tuning import RUNS, Case, NotTuned, Point, Points, Tuner
from scripts.tune_moe import Commands, axes, cores_of, searched, too_large, with_room, with_setting
from tests.unit.test_search import SERVED, Surface, between
from tests.unit.test_verify_health import COMMIT, VARIABLES, seen

RELEASE = f"{COMMIT}-0123abcd"
PROGRAM = f"/opt/llama.cpp/upstream/releases/{RELEASE}/bin/llama-server"
CASE = Case("coder", RELEASE, "580", "a" * 64, "base", 16384, 128)
LAYERS = Axis("n_cpu_moe", tuple(range(49)), memory="falls")


class Box:
    """A box whose speed is a surface; settings in `broken` do not start, those in `dying` die under load."""

    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.now = 0.0
        self.started: list[dict[str, int]] = []
        self.serves: dict[str, int] = {}
        self.broken: dict[int, TrialFailed] = {}
        self.dying: dict[int, bool] = {}
        self.slow: set[int] = set()
        self.program = PROGRAM
        self.disturbed: Callable[[str], None] = lambda _: None
        self.said: list[str] = []

    @property
    def key(self) -> int:
        return next(iter(self.serves.values()))

    def run(self, command: Sequence[str] | None) -> None:
        assert command is not None
        self.serves = {word.partition("=")[0]: int(word.partition("=")[2]) for word in command}
        self.started.append(dict(self.serves))
        self.now += 20
        if self.key in self.broken:
            raise self.broken[self.key]
        if self.surface(self.serves) is None:
            raise TrialFailed("coder failed", ["CUDA error: out of memory"], out_of_memory=True)

    def serving(self) -> Serving:
        dead = self.key in self.dying
        return Serving(self.program, int(dead), out_of_memory=dead and self.dying[self.key])

    def series(self, shape: Shape, count: int) -> Iterator[Timed]:
        if self.key in self.slow:
            self.disturbed(f"HTTP 503: {TOO_LONG} (90 s)")
        if self.key in self.dying:
            self.disturbed("HTTP 502: the server ended")
        for _ in range(count):
            self.now += 10
            speed = self.surface(self.serves)
            assert speed is not None
            yield Timed(shape.prompt, 1e9, shape.generate, speed, 0.0, 1.0)

    def tuner(self, points: Points, minutes: float = 1000, **more: Any) -> Tuner:
        return Tuner(
            self, self, points, CASE,
            lambda setting: [f"{name}={value}" for name, value in setting.items()],
            more.pop("too_large", lambda _: ""), self.said.append,
            goal="turn", budget_s=60 * minutes, clock=lambda: self.now, **more,
        )  # fmt: skip


@pytest.fixture
def points(tmp_path: Path) -> Points:
    return Points(tmp_path / "box.jsonl")


@pytest.fixture
def box() -> Box:
    return Box(between(SERVED))


def at(value: int) -> dict[str, int]:
    return {"n_cpu_moe": value}


def test_the_best_is_found_held_against_the_one_in_use_and_proposed(box: Box, points: Points) -> None:
    found = searched("box", box.tuner(points), (LAYERS,), at(24))
    assert found.finished and found.code == 0
    assert found.best == found.changes == at(16)
    assert found.gain == pytest.approx(78.0 / 69.5 - 1, abs=0.001)
    assert box.started[-2:] == [at(24), at(16)], "the last two runs are the comparison"
    assert len(box.started) - 2 <= 49 / 3
    assert {point.outcome for point in found.points} == {"measured", "out of memory"}
    assert any("n_cpu_moe 16: prefill " in line for line in box.said)


def test_what_was_measured_is_not_run_again(box: Box, points: Points) -> None:
    first = searched("box", box.tuner(points), (LAYERS,), at(24))
    box.started.clear()
    tuner = box.tuner(points)
    again = searched("box", tuner, (LAYERS,), at(24))
    assert box.started == [] and tuner.known == len(first.points)
    assert (again.best, again.gain, again.changes) == (first.best, first.gain, first.changes)
    searched("box", box.tuner(points, fresh=True), (LAYERS,), at(24))
    assert len(box.started) == len(first.points)
    other = replace(CASE, driver="581")
    assert points.of_case(other) == [], "another driver is another case"


@pytest.mark.parametrize("torn", [b"", b'{"time": "2026', b"\xff\xfe\x80"])
def test_a_run_that_was_killed_goes_on_where_it_was(box: Box, points: Points, torn: bytes) -> None:
    whole = Box(box.surface)
    searched("box", whole.tuner(Points(points.file.with_name("whole.jsonl"))), (LAYERS,), at(24))

    class Killed(BaseException):
        pass

    def killed(self: Box, command: Sequence[str] | None) -> None:
        if len(box.started) == 5:
            raise Killed
        Box.run(box, command)

    box.run = killed.__get__(box)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        searched("box", box.tuner(points), (LAYERS,), at(24))
    del box.run
    with points.file.open("ab") as file:
        file.write(torn)
    found = searched("box", box.tuner(points), (LAYERS,), at(24))
    assert box.started == whole.started
    assert len(points.of_case(CASE)) == len(found.points), "the torn line did not spoil the next one"


def test_the_budget_ends_it_with_the_best_so_far_and_the_comparison_still_fits(
    box: Box, points: Points
) -> None:
    found = searched("box", box.tuner(points, minutes=6), (LAYERS,), at(48))
    assert not found.finished and found.code == 1 and "run it again" in found.note
    assert box.now <= 6 * 60
    assert found.gain is not None and found.changes
    box.now = 0
    assert searched("box", box.tuner(points), (LAYERS,), at(48)).best == at(16)


def test_one_point_is_run_whatever_the_budget_is(box: Box, points: Points) -> None:
    found = searched("box", box.tuner(points, minutes=0.1), (LAYERS,), at(24))
    assert (len(found.points), found.changes, found.finished) == (1, {}, False)


def test_a_budget_for_less_than_a_point_of_another_setting_is_no_lack_of_memory(
    box: Box, points: Points
) -> None:
    """The preset says something else by now, and an earlier run told how long a point takes."""
    box.tuner(points)(at(24))
    box.started.clear()
    found = searched("box", box.tuner(points, minutes=1), (LAYERS,), at(30))
    assert box.started == [] and [point.setting for point in found.points] == [at(24)]
    assert (found.code, found.changes, found.finished) == (1, {}, False)
    assert "the time was over" in found.note and "a larger --budget" in found.note


def test_a_change_that_does_not_show_again_is_not_proposed(points: Points) -> None:
    lucky = iter([1.0] * RUNS + [1.1] * RUNS + [1.0] * 1000)
    box = Box(lambda _: 50.0 * next(lucky))
    box.run = lambda command: box.serves.update(x=1) or box.started.append({})  # type: ignore[method-assign,func-returns-value]
    found = searched("box", box.tuner(points), (Axis("threads", (1, 2)),), {"threads": 1})
    assert found.best == {"threads": 2} and found.changes == {}
    assert found.gain is not None and abs(found.gain) < 0.001
    assert "nothing was faster by 2%" in tune_moe.screen(found)


def test_memory_slowness_and_other_faults_are_told_apart(box: Box, points: Points) -> None:
    box.broken[30] = TrialFailed("coder failed", ["error: unknown tensor"])
    box.dying = {20: True, 22: False}
    box.slow = {40}
    tuner = box.tuner(points)
    tuner(at(24))
    outcomes = {value: tuner.point(at(value)).outcome for value in (8, 20, 22, 30, 40)}
    assert outcomes == {
        8: "out of memory", 20: "out of memory", 22: "failed", 30: "failed", 40: "too slow",
    }  # fmt: skip
    assert [tuner(at(value)) for value in (8, 20)] == [None, None]
    assert [tuner(at(value)) for value in (22, 30, 40)] == [0.0] * 3
    assert tuner.point(at(8)).detail == "CUDA error: out of memory"
    assert tuner.point(at(30)).detail == "error: unknown tensor"
    with pytest.raises(NotTuned, match="n_cpu_moe 26: error"):
        box.broken[26] = box.broken[30]
        tuner(at(26))
    box.broken.clear()
    box.dying.clear()
    assert box.tuner(points)(at(30)) == pytest.approx(box.surface(at(30))), "a fault may be mended"


def test_a_preset_that_does_not_start_as_it_is_ends_the_search(box: Box, points: Points) -> None:
    box.broken[24] = TrialFailed("coder failed after 2 s", ["error: no such file"])
    with pytest.raises(NotTuned, match="n_cpu_moe 24: error: no such file"):
        searched("box", box.tuner(points), (LAYERS,), at(24))


def test_a_setting_in_use_that_does_not_fit_is_replaced_without_a_comparison(
    box: Box, points: Points
) -> None:
    found = searched("box", box.tuner(points), (LAYERS,), at(4))
    assert (found.changes, found.gain) == (at(16), None)


def test_what_cannot_fit_is_not_run(box: Box, points: Points) -> None:
    def predicted(setting: Setting) -> str:
        return "needs 20 GiB of 16 GiB" if setting["n_cpu_moe"] < 14 else ""

    found = searched("box", box.tuner(points, too_large=predicted), (LAYERS,), at(24))
    assert found.best == at(16)
    assert min(setting["n_cpu_moe"] for setting in box.started) >= 14
    assert "too large" in {point.outcome for point in found.points}
    none = searched("box", box.tuner(points, too_large=lambda _: "no", fresh=True), (LAYERS,), at(24))
    assert none.code == 1 and "no setting" in none.note


def test_figures_of_another_release_count_for_nothing(box: Box, points: Points) -> None:
    box.program = "/opt/llama.cpp/upstream/releases/other/bin/llama-server"
    with pytest.raises(NotMeasured, match="served instead of"):
        box.tuner(points)(at(24))
    assert points.of_case(CASE) == []


def test_speeds_of_a_turn_and_of_its_halves() -> None:
    point = Point("t", CASE, at(1), "measured", (1000.0, 2048.0, 9e9), (51.2, 1.0, 99.0))
    assert (point.speed("prefill"), point.speed("generation")) == (2048.0, 51.2)
    assert point.speed("turn") == pytest.approx(512 / 11)


def test_only_one_works_on_a_host(points: Points) -> None:
    with points.locked(), pytest.raises(OSError, match="another tune_moe works on box"), points.locked():
        pass


# --- the axes of a preset ---


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Model:
    path = _tiny_models.write("qwen3moe", tmp_path_factory.mktemp("models"), weights=False)
    return Model.of([read_file(path)])


def box_data(card: int = 0, **preset: Any) -> LlmBox:
    presets = {**VARIABLES["llama_presets"], "one": {**VARIABLES["llama_presets"]["one"], **preset}}
    memory = card and card + 1024  # what stays free by default
    return LlmBox.of({**VARIABLES, "llama_presets": presets, "llama_presets_gpu_memory_mib": memory})


def test_a_machine_without_a_gpu_has_threads_and_ubatch(moe: Model) -> None:
    preset = box_data(extra_args=["-b", "1024", "-ub", "256"]).config.llama_presets["one"]
    made, used = axes(preset, moe, 0, (6, 12), {})
    assert [(axis.name, axis.values) for axis in made] == [
        ("threads", tuple(range(1, 13))), ("ubatch", (128, 256, 512, 1024)),
    ]  # fmt: skip
    assert used == {"threads": 6, "ubatch": 256}


def test_experts_on_a_gpu_come_first(moe: Model) -> None:
    preset = box_data(n_cpu_moe=3, threads=2).config.llama_presets["one"]
    made, used = axes(preset, moe, 1000, (6, 12), {"threads": [], "n_cpu_moe": [0, 5, 6]})
    assert [axis.name for axis in made] == ["n_cpu_moe", "threads"]
    assert made[0] == Axis("n_cpu_moe", (0, 3, 5, 6), "falls")
    assert used == {"n_cpu_moe": 3, "threads": 2}
    dense = replace(moe, numbers={**moe.numbers, "expert_count": 0})
    assert [axis.name for axis in axes(preset, dense, 1000, (6, 12), {})[0]] == ["threads", "ubatch"]
    for model, said in ((None, "has experts is not known"), (dense, "no experts on a GPU")):
        with pytest.raises(NotTuned, match=said):
            axes(preset, model, 1000, (6, 12), {"n_cpu_moe": []})


def test_a_layer_that_only_predicts_further_tokens_is_no_value(moe: Model) -> None:
    preset = box_data().config.llama_presets["one"]
    headed = replace(moe, numbers={**moe.numbers, "nextn_predict_layers": 1})
    for model, most in ((moe, moe.layers), (headed, moe.layers - 1)):
        made, _ = axes(preset, model, 1000, (6, 12), {"n_cpu_moe": []})
        assert made[0].values == tuple(range(most + 1))


def test_a_file_is_written_with_the_mode_that_it_has_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "presets.yml"
    file.write_text("before\n")
    for mode in (0o640, 0o604):
        file.chmod(mode)
        tune_moe.put(file, f"{mode}\n")
        assert (file.read_text(), file.stat().st_mode & 0o7777) == (f"{mode}\n", mode)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        tune_moe.put(file, "after\n")
    assert [path.name for path in tmp_path.iterdir()] == ["presets.yml"]
    assert file.read_text() == f"{0o604}\n"


def test_a_setting_becomes_a_command_line_and_a_prediction(moe: Model) -> None:
    box = box_data(card=300)
    command = Commands(box, "one", "")({"n_cpu_moe": 2, "threads": 5, "ubatch": 64})
    for words in ("--n-cpu-moe 2", "--threads 5", "--ubatch-size 64"):
        assert words in " ".join(command)
    base = Commands(box, "one", "").base(["threads"])
    assert base == Commands(box_data(card=300, threads=7), "one", "").base(["threads"])
    for other in (
        box_data(card=301),
        box_data(card=300, context=4096),
        box_data(card=300, extra_args=["-x"]),
    ):
        assert base != Commands(other, "one", "").base(["threads"])
    judge = too_large(box.config, "one", {"small": moe})
    needs = [judge({"n_cpu_moe": value}) for value in (0, 6)]
    assert needs[0] == "" and too_large(box_data(card=10).config, "one", {"small": moe})({"ubatch": 64})
    assert too_large(box_data().config, "one", {})({"ubatch": 64}) == ""


def test_a_setting_that_fills_the_card_to_the_last_byte_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    config = box_data(card=300).config
    for more, said in ((0, ""), (1, "needs 0.29 GiB of 0.29 GiB")):
        monkeypatch.setattr(fit, "estimate_of", lambda *_, more=more: Estimate(Use(config.gpu_room + more)))
        assert too_large(config, "one", {})({"ubatch": 64}) == said


def test_experts_that_main_memory_cannot_hold_are_no_values(moe: Model) -> None:
    """A search that ran into one would take everything else for too large as well."""
    data = box_data(card=300, n_cpu_moe=moe.layers).config
    axis = Axis("n_cpu_moe", tuple(range(moe.layers + 1)), "falls")
    taken = [
        fit.estimate_of(with_setting(data, "one", {"n_cpu_moe": value}), "one", {"small": moe}).cpu.total
        for value in axis.values
    ]
    assert taken == sorted(set(taken))
    room = data.model_copy(
        update={"llama_presets_main_memory_mib": taken[2] // 2**20 + 1, "llama_presets_main_reserved_mib": 0}
    )
    kept = tuple(value for value in axis.values if taken[value] <= room.main_room)
    (cut,) = with_room([axis], room, "one", {"small": moe})
    assert 2 < len(kept) < len(axis.values) and cut.values == (*kept, moe.layers)
    assert with_room([axis], data, "one", {"small": moe}) == (axis,)
    assert with_room([axis], room, "one", {}) == (axis,)


def test_what_a_head_takes_is_not_guessed(moe: Model) -> None:
    """It counts to what the preset takes and stands in no prediction: the server itself shows if it fits."""
    head = {
        "verdict": "kept", "reason": "r", "type": "draft-mtp", "draft": None, "model_sha256": "0" * 64,
        "draft_sha256": None, "release": "r", "driver": "none", "measured": "2026-11-28T00:00Z", "pairs": 5,
    }  # fmt: skip
    config = box_data(card=10, draft="auto").config
    setting = {"ubatch": 64}
    assert too_large(config, "one", {"small": moe})(setting)
    drafted = HostConfig.load({**config.model_dump(), "llama_drafts": {"one": head}})
    assert too_large(drafted, "one", {"small": moe})(setting) == ""


def test_cores() -> None:
    assert cores_of("12\n# c\n" + "".join(f"{n % 6},0\n" for n in range(12))) == (6, 12)
    assert cores_of("4\n") == (4, 4)
    with pytest.raises(NotTuned, match="nproc said"):
        cores_of("hello\n")


def test_the_chart(box: Box, points: Points) -> None:
    found = searched("box", box.tuner(points), (LAYERS, Axis("threads", (1, 2))), {**at(24), "threads": 2})
    image = Image.open(io.BytesIO(_tuning_chart.draw("coder", found.points, found.best, "turn")))
    assert image.width == WIDTH and image.height > 2 * _tuning_chart.PANEL
    assert _tuning_chart.draw("coder", [], at(3), "turn").startswith(b"\x89PNG")


# --- the whole command ---


class Gateway(Box):
    """The same box behind HTTP: `one` has threads and ubatch, two threads are twice as fast.

    A run takes 10 s, and a start 20. `more`: variables of the host, and what it runs.
    """

    def __init__(self) -> None:
        super().__init__(lambda setting: 40.0 * setting["threads"])
        self.prefill: Callable[[Setting], float] = lambda _: 500.0
        self.more: dict[str, Any] = {}
        self.models: dict[str, Model] = {}
        self.gpu: dict[str, Any] = {"absent": True}
        self.keys: set[str | None] = set()
        self.prompts: list[int] = []  # words
        self.held = ""
        self.ended = 0

    def run(self, command: Sequence[str] | None) -> None:
        assert command is not None
        words = dict(itertools.pairwise(command))
        super().run([f"threads={words.get('--threads', 1)}", f"n_cpu_moe={words.get('--n-cpu-moe', 0)}"])

    def http(self, request: httpx.Request) -> httpx.Response:
        self.keys.add(request.headers.get("authorization"))
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            return httpx.Response(200, json={"tokens": body["content"].split()})
        self.now += 10
        self.prompts.append(len(body["prompt"].split()))
        timings = {
            "cache_n": 0, "prompt_n": 900, "prompt_per_second": self.prefill(self.serves),
            "predicted_n": body["n_predict"], "predicted_per_second": self.surface(self.serves),
        }  # fmt: skip
        return httpx.Response(200, json={"timings": timings}, headers={"X-Llmbox-Alone": str(self.started)})


@pytest.fixture
def inventory(tmp_path: Path) -> Path:
    file = tmp_path / "inventory/group_vars/llm_servers.yml"
    file.parent.mkdir(parents=True)
    file.write_text(yaml.safe_dump({"llama_presets": VARIABLES["llama_presets"]}, sort_keys=False))
    return tmp_path / "inventory"


@pytest.fixture
def gateway(inventory: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Gateway:
    fake = Gateway()
    client = httpx.Client

    def read(*_: object, **__: object) -> list[Host]:
        text = (inventory / "group_vars/llm_servers.yml").read_text()
        return [
            Host("box", frozenset({"llm_servers"}), {**VARIABLES, **yaml.safe_load(text), **fake.more}),
            Host("other"),
        ][: 1 if __.get("limit") else 2]  # fmt: skip

    def asked(*_: object, **__: object) -> dict[str, Any]:
        found = seen()
        command = Commands(LlmBox.of({**VARIABLES, **fake.more}), "one", "")({})
        found["presets"]["presets"]["one"]["command"] = command
        return {"llm": found}

    def ran(_host: Host, command: str) -> str:
        return {"readlink": f"/opt/llama.cpp/upstream/releases/{RELEASE}\n", "nproc;": "2\n0,0\n1,0\n"}.get(
            command.split()[0], ""
        )

    @contextmanager
    def held(_host: Host, preset: str) -> Iterator[Gateway]:
        fake.held = preset
        try:
            yield fake
        finally:
            fake.ended += 1

    @contextmanager
    def reached(*_: object) -> Iterator[str]:
        yield "http://box"

    @contextmanager
    def watched(_: Host) -> Iterator[GpuWatch]:
        watch = GpuWatch()
        watch.add(0.0, fake.gpu)
        yield watch

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for name, value in {
        "load": read, "ask": asked, "run": ran, "trial": held, "reach": reached, "watched": watched,
        "headers": lambda _: fake.models,
    }.items():  # fmt: skip
        monkeypatch.setattr(tune_moe, name, value)
    made = httpx.MockTransport(fake.http)
    monkeypatch.setattr(httpx, "Client", lambda **options: client(transport=made, **options))
    return fake


def tune(inventory: Path, *words: str) -> int:
    return tune_moe.main(["--inventory", str(inventory), "--preset", "one", *words])


def test_a_diff_is_shown_and_nothing_written(
    gateway: Gateway, inventory: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = inventory / "group_vars/llm_servers.yml"
    before = file.read_text()
    report = tmp_path / "report.json"
    assert tune(inventory, "--axis", "threads", "--json", str(report)) == 0
    said = capsys.readouterr()
    # Two cores: llama-server itself would take both, so that only another setting can be proposed.
    assert "no change" in said.out and gateway.ended == 1 and gateway.held == "one"
    assert json.loads(report.read_text())["ok"] and file.read_text() == before
    gateway.surface = lambda setting: 80.0 / setting["threads"]
    assert tune(inventory, "--axis", "threads", "--fresh") == 0
    said = capsys.readouterr()
    assert "+    threads: 1\n" in said.out and "not written; fix: the same command with --write" in said.out
    assert file.read_text() == before and "box: one: 1: threads 2: prefill" in said.err
    chart = next(line for line in said.err.splitlines() if line.startswith("chart: "))
    assert Path(chart.removeprefix("chart: ")).read_bytes().startswith(b"\x89PNG")


def test_write_makes_the_change(
    gateway: Gateway, inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gateway.surface = lambda setting: 80.0 / setting["threads"]
    assert tune(inventory, "--axis", "threads", "--write", "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["written"] and report["changes"] == {"threads": 1} and report["gain"] > 0.5
    assert [point["tok_s"] for point in report["points"]]
    after = yaml.safe_load((inventory / "group_vars/llm_servers.yml").read_text())["llama_presets"]
    assert after == {**VARIABLES["llama_presets"], "one": {**VARIABLES["llama_presets"]["one"], "threads": 1}}


@pytest.mark.parametrize("words", [(), ("--write",)])
def test_a_change_that_must_be_made_by_hand_does_not_lead_back_to_this_command(
    gateway: Gateway,
    inventory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
) -> None:
    gateway.surface = lambda setting: 80.0 / setting["threads"]
    file = inventory / "group_vars/llm_servers.yml"
    file.write_text(before := "llama_presets:\n  one: {threads: '{{ cores }}'}\n")
    host = Host("box", frozenset({"llm_servers"}), VARIABLES)
    monkeypatch.setattr(tune_moe, "load", lambda *_, **__: [host])
    assert tune(inventory, "--axis", "threads", *words) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("box: one: threads 1 is better; llama_presets.one")
    assert last.endswith("; fix: write threads: 1")
    assert file.read_text() == before


def test_a_change_that_another_file_overrides_is_taken_back(
    gateway: Gateway, inventory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.surface = lambda setting: 80.0 / setting["threads"]
    file = inventory / "group_vars/llm_servers.yml"
    before = file.read_text()
    host = Host("box", frozenset({"llm_servers"}), VARIABLES)
    monkeypatch.setattr(tune_moe, "load", lambda *_, **__: [host])
    assert tune(inventory, "--axis", "threads", "--write") == 1
    assert "another place of the inventory overrides it" in capsys.readouterr().out
    assert file.read_text() == before


def test_a_change_that_would_be_another_box_s_too_is_taken_back(
    gateway: Gateway, inventory: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They share the file; nothing was measured on the other one."""
    gateway.surface = lambda setting: 80.0 / setting["threads"]
    file = inventory / "group_vars/llm_servers.yml"
    before = file.read_text()
    one = Host("box", frozenset({"llm_servers"}), VARIABLES)

    def hosts(*_: Any, **__: Any) -> list[Host]:
        shared = yaml.safe_load(file.read_text())["llama_presets"]
        its = {**VARIABLES, "llama_presets": shared}
        mac = Host("mac", frozenset({"clients"}), its)  # runs none
        return [one, Host("other", frozenset({"llm_servers"}), its), mac]

    monkeypatch.setattr(tune_moe, "load", lambda *_, limit=None, **__: [one] if limit else hosts())
    assert tune(inventory, "--limit", "box", "--axis", "threads", "--write") == 1
    assert (
        "one of other would change with it, where nothing was measured; fix: move" in capsys.readouterr().out
    )
    assert file.read_text() == before


def test_the_box_goes_back_whatever_ends_the_search(
    gateway: Gateway, inventory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gateway, "surface", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(inventory)
    assert gateway.ended == 1


@pytest.mark.parametrize(("words", "depth"), [((), 3840), (("--depth", "200"), 200)])
def test_a_point_is_measured_at_the_presets_depth_and_kept_under_all_that_decides_it(
    gateway: Gateway, inventory: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], depth: int
) -> None:
    monkeypatch.setenv("LLMBOX_KEY", "k")
    gateway.gpu = {"driver": "580.95"}
    assert tune(inventory, "--axis", "threads", *words) == 0
    base = Commands(LlmBox.of(VARIABLES), "one", "").base(["threads"])
    case = Case("one", RELEASE, "580.95", "0" * 64, base, prompt=depth, generate=128)
    assert len(Points.of(inventory, "box").of_case(case)) == len(gateway.started) > 0
    assert all(0 <= count - depth < 10 for count in gateway.prompts), "the nonce and the question on top"
    assert gateway.keys == {"Bearer k"}
    gateway.started.clear()
    assert tune(inventory, "--axis", "threads", *words) == 0 and gateway.started == [], "all is known"


@pytest.mark.parametrize(("goal", "changes"), [("turn", {}), ("generation", {}), ("prefill", {"threads": 1})])
def test_what_is_to_be_fast_decides(
    gateway: Gateway,
    inventory: Path,
    capsys: pytest.CaptureFixture[str],
    goal: str,
    changes: dict[str, int],
) -> None:
    """A second thread writes twice as fast here, and reads half as fast."""
    gateway.prefill = lambda setting: 1000.0 / setting["threads"]
    assert tune(inventory, "--axis", "threads", "--goal", goal, "--json", "-") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["goal"], report["changes"]) == (goal, changes)


@pytest.mark.parametrize(("minutes", "points", "code"), [("3.9", 1, 1), ("4", 2, 0)])
def test_a_budget_is_minutes(
    gateway: Gateway, inventory: Path, monkeypatch: pytest.MonkeyPatch, minutes: str, points: int, code: int
) -> None:
    """A point takes one here: a start and four runs; the next one is begun only with room for three."""
    monkeypatch.setattr(tune_moe, "time", SimpleNamespace(monotonic=lambda: gateway.now))
    assert tune(inventory, "--axis", "threads", "--budget", minutes) == code
    assert len(gateway.started) == points


@pytest.mark.parametrize(("faster", "best"), [(1, 5), (-1, 3)])
def test_what_neither_memory_has_room_for_is_not_started(
    gateway: Gateway,
    inventory: Path,
    moe: Model,
    capsys: pytest.CaptureFixture[str],
    faster: int,
    best: int,
) -> None:
    """The card has room from three layers of experts on the CPU on, main memory up to five of the six."""
    gateway.models, gateway.surface = {"small": moe}, lambda setting: 50.0 + 5 * faster * setting["n_cpu_moe"]
    gateway.more = {
        "llama_presets": {"one": {**VARIABLES["llama_presets"]["one"], "n_cpu_moe": 4}},
        "llama_presets_gpu_memory_mib": 1024 + 100,
        "llama_presets_main_memory_mib": 50,
        "llama_presets_main_reserved_mib": 0,
    }
    assert tune(inventory, "--axis", "n_cpu_moe", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["changes"] == {"n_cpu_moe": best}
    assert {setting["n_cpu_moe"] for setting in gateway.started} <= {3, 4, 5}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--depth", "9000"], "--depth 9000: a slot of 4096 tokens has room for a prompt of 3840"),
        (["--preset", "three"], "--preset three: no such preset; give one of one, two"),
        (["--axis", "n_cpu_moe"], "no experts on a GPU; give one of threads, ubatch"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    gateway: Gateway, inventory: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert tune(inventory, *words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert said in line and line.startswith("tune_moe: ")
    assert gateway.started == []


def test_a_box_that_runs_other_flags_is_refused(
    gateway: Gateway, inventory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = inventory / "group_vars/llm_servers.yml"
    file.write_text(file.read_text().replace("context: 8192", "context: 4096"))
    assert tune(inventory) == 2
    assert "runs one with other flags than this inventory says; fix: run site.yml" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text", ["cores", "threads=", "threads=0", "threads=4-2", "ubatch=x", "threads=1-99999"]
)
def test_an_axis_that_makes_no_sense(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tune_moe.parse(["--inventory", "x", "--preset", "y", "--axis", text])
    assert text in capsys.readouterr().err


def test_an_axis_that_is_named_twice_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    twice = ["--axis", "threads=1,2", "--axis", "ubatch", "--axis", "threads=7"]
    with pytest.raises(SystemExit, match="2"):
        tune_moe.parse(["--inventory", "x", "--preset", "y", *twice])
    assert "--axis threads: given twice; fix: all its values in one" in capsys.readouterr().err


def test_an_axis_in_every_form() -> None:
    forms = {"threads": (), "threads=2-4": (2, 3, 4), "n_cpu_moe=0,8": (0, 8)}
    for text, values in forms.items():
        assert tune_moe.axis_of(text)[1] == values


def test_out_of_time_is_the_searchs_own_signal(box: Box, points: Points) -> None:
    tuner = box.tuner(points, minutes=1)
    tuner(at(24))
    with pytest.raises(OutOfTime):
        tuner(at(25))


def test_a_picture_that_cannot_be_written_is_told_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_moe, "load", lambda *_, **__: pytest.fail("it began to work"))
    for wrong in (tmp_path, tmp_path / "no-folder" / "x.png"):
        assert tune_moe.main(["--inventory", "x", "--preset", "coder", "--chart", str(wrong)]) == 2
        assert f"--chart {wrong}: " in capsys.readouterr().err
