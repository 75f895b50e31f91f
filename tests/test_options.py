"""Options of a defense at run time: how their text is read, and that no row with options passes for another."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from assay import data
from assay.card import Card, Traits
from assay.cli import main
from assay.defense import Defense, DefenseSpec, read_options
from assay.defenses import adp, denoised_smoothing, diffpure, gdmp, likelihood_maximisation, victim_guided
from assay.digest import sha256_of_file, sha256_of_json
from assay.display import default_folder
from assay.errors import InputError
from assay.evaluation import execute
from assay.leaderboards.render import render
from assay.leaderboards.site import render_site
from assay.noise import Noise
from assay.prepare import Prepared, prepare
from assay.publish import publish_record
from assay.record import RECORD, DefenseRef, Record, read_record
from assay.registry import DEFENSES, resolve_defense

FFDNET = Path(os.environ.get(data.DATA_VARIABLE, "")) / "denoisers" / "ffdnet_net_rgb.pth"
CARD = Card(name="tuned", title="Tuned", summary="A toy with options.", traits=Traits(), datasets=("digits",))


class Tuned(Defense):
    """A linear classifier of the digits' pixels whose logits are `gain` times the zoo's."""

    weight: Tensor
    bias: Tensor

    def __init__(self, zoo: ModuleType, gain: float) -> None:
        super().__init__()
        self.card, self.n_classes = CARD, 10
        weight, bias = zoo.ridge()
        self.register_buffer("weight", gain * torch.from_numpy(weight).float())
        self.register_buffer("bias", gain * torch.from_numpy(bias).float())

    def draw(self, x: Tensor, noise: Noise) -> Tensor:
        return x.flatten(1) @ self.weight.T + self.bias


@pytest.fixture
def seen() -> list[dict[str, Any]]:
    """What the loader of `spec` was called with."""
    return []


@pytest.fixture
def spec(zoo: ModuleType, seen: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> DefenseSpec:
    """A registered defense with an option of each type; `weights` is a file or a folder of them."""

    def load(dataset: str, *, weights: str = "", gain: float = 1.0, steps: int = 4, loud: bool = False) -> Defense:
        seen.append({"weights": weights, "gain": gain, "steps": steps, "loud": loud})
        return Tuned(zoo, gain)

    def weight_files(dataset: str, *, weights: str = "") -> Mapping[str, Path]:
        path = Path(weights)
        files = [path] if path.is_file() else path.glob("*") if weights else []
        return {f"weights/{file.name}": file for file in files}

    made = DefenseSpec(CARD, load, None, weight_files, needs=("weights",))
    monkeypatch.setitem(DEFENSES._entries, "tuned", made)
    return made


@pytest.fixture
def ready(zoo: ModuleType, spec: DefenseSpec) -> Callable[..., Prepared]:
    def make(**options: str) -> Prepared:
        return prepare("tuned", zoo.board(n=20), only=("uniform",), options=options)

    return make


# Text to values


def test_text_becomes_the_default_s_type(spec: DefenseSpec, seen: list[dict[str, Any]]) -> None:
    spec.build("digits", options={"weights": "a=b", "gain": "2.50", "steps": "07", "loud": "True"})
    assert seen == [{"weights": "a=b", "gain": 2.5, "steps": 7, "loud": True}]
    assert [type(value) for value in seen[0].values()] == [str, float, int, bool]
    spec.build("digits")
    assert seen[1] == spec.options == {"weights": "", "gain": 1.0, "steps": 4, "loud": False}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"step": "1"}, r"tuned has no option 'step'\. Did you mean 'steps'\? Known: gain, loud, steps, weights\."),
        ({"steps": "2.5"}, "option 'steps' takes a whole number, such as 4; got '2.5'"),
        ({"steps": ""}, "takes a whole number"),
        ({"gain": "1/2"}, r"option 'gain' takes a number, such as 1\.0; got '1/2'"),
        ({"gain": "nan"}, "takes a finite number"),
        ({"gain": "inf"}, "takes a finite number"),
        ({"loud": "1"}, "option 'loud' takes true or false, such as false; got '1'"),
    ],
)
def test_what_is_no_value_is_refused(spec: DefenseSpec, options: dict[str, str], says: str) -> None:
    for call in (spec.build, spec.files, spec.recorded):
        with pytest.raises(InputError, match=says):
            call("digits", options=options)


def test_a_defense_without_options_takes_none() -> None:
    with pytest.raises(InputError, match=r"undefended has no option 'steps'\. Known: none"):
        DEFENSES["undefended"].build("digits", options={"steps": "1"})


def test_an_option_needs_a_default_of_a_type_that_text_can_have(zoo: ModuleType) -> None:
    def load(dataset: str, *, levels: tuple[int, ...] = (1, 2)) -> Defense:
        return Tuned(zoo, 1.0)

    with pytest.raises(InputError, match=r"'levels'.*str, int, float or bool"):
        DefenseSpec(CARD, load).build("digits")


def test_words_are_names_and_values() -> None:
    assert read_options(["a=1", "b=x=y", "c="]) == {"a": "1", "b": "x=y", "c": ""}
    for words, says in ((["a"], "NAME=VALUE, got 'a'"), (["=1"], "NAME=VALUE"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(InputError, match=says):
            read_options(words)


def test_other_data_sets_need_their_weights(spec: DefenseSpec) -> None:
    with pytest.raises(InputError, match=r"has weights for digits, not for 'cifar10'\. Give it --option weights=…"):
        spec.build("cifar10", options={"gain": "2"})
    spec.build("cifar10", options={"weights": "a file"})
    with pytest.raises(InputError, match=r"not for 'cifar10'\.$"):
        replace(spec, needs=()).build("cifar10", options={"weights": "a file"})


# What a record says


def test_options_at_their_default_are_no_options(spec: DefenseSpec) -> None:
    assert spec.recorded("digits", {"gain": "1", "steps": "4", "loud": "false", "weights": ""}) == {}
    assert spec.recorded("digits", {"steps": "05", "gain": ".5"}) == {"gain": "0.5", "steps": "5"}
    assert spec.recorded("digits", {"loud": " TRUE"}) == {"loud": "true"}


def test_a_path_is_cut_where_its_files_are_hashed(spec: DefenseSpec, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"a")
    assert spec.recorded("digits", {"weights": f"{folder}/"}) == {"weights": "model"}
    assert spec.recorded("digits", {"weights": str(folder / "a.bin")}) == {"weights": "a.bin"}
    assert spec.recorded("digits", {"weights": "owner/name"}) == {"weights": "owner/name"}
    unhashed = replace(spec, weight_files=lambda dataset: {})
    assert unhashed.recorded("digits", {"weights": str(folder)}) == {"weights": str(folder)}


def test_a_record_names_its_options_and_hashes_their_files(ready: Callable[..., Prepared], tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"w")
    weights, out = str(tmp_path / "w.bin"), tmp_path / "run"
    record = execute(ready(weights=weights, steps="5"), out)
    assert record.defense.options == {"steps": "5", "weights": "w.bin"}
    assert record.defense.weights == {"weights/w.bin": sha256_of_file(tmp_path / "w.bin")}
    assert record.defense.title == "Tuned (steps=5, weights=w.bin)"
    assert read_record(out, files=True) == record
    assert json.loads((out / "plan.json").read_text())["defense"]["options"] == record.defense.options
    for changed in ({"steps": "6"}, {"gain": "2"}, {}):
        with pytest.raises(InputError, match=r"defense\.options"):
            execute(ready(**{"weights": weights, **changed}), out)
    (tmp_path / "w.bin").write_bytes(b"v")
    with pytest.raises(InputError, match=r"defense\.weights"):
        execute(ready(weights=weights, steps="5"), out)


def test_a_record_without_options_is_as_it_was_before_there_were_any(toy_run: Path) -> None:
    record = read_record(toy_run)
    plain = json.loads((toy_run / RECORD).read_text())
    assert "options" not in plain["defense"]
    assert record.defense.options == {}
    assert record.defense.title == record.defense.card.title
    assert record.defense.variant == ""
    assert record.as_json() == plain
    assert plain["digest"] == sha256_of_json({key: value for key, value in plain.items() if key != "digest"})


def test_the_source_of_transfer_is_exempt_with_its_defaults_only(zoo: ModuleType, spec: DefenseSpec) -> None:
    board = zoo.board(n=20, source="tuned")

    def names(**options: str) -> set[str]:
        return {attack.name for attack in prepare("tuned", board, options=options).mandatory}

    assert "transfer" not in names()
    assert "transfer" not in names(steps="4")
    assert "transfer" in names(steps="5")


# Folders


def reference(digest: str = "0", **options: str) -> DefenseRef:
    return DefenseRef(name="tuned", card=CARD, options=options, weights={"a": digest}, source_sha256=None)


def test_variants_are_safe_folder_names_and_differ() -> None:
    refs = [
        reference(),
        reference(steps="5"),
        reference(steps="6"),
        reference("1", steps="5"),
        reference(weights="a/b"),
        reference(weights="a-b"),
        reference(weights="../../x"),
        reference(weights="é" * 300),
    ]
    variants = [ref.variant for ref in refs]
    assert len(set(variants)) == len(refs)
    assert variants[0] == ""
    for variant in variants[1:]:
        assert len(variant) < 100
        assert not set(variant) & set("/\\ \0")
    assert variants[1].startswith("+steps=5+")


def test_runs_with_other_options_lie_apart(ready: Callable[..., Prepared]) -> None:
    plain, five = default_folder(ready()), default_folder(ready(steps="5"))
    assert plain.name == "tuned-quick-n20-uniform"
    assert five.name.startswith("tuned+steps=5+")
    assert default_folder(ready(steps="4")) == plain
    assert default_folder(ready(steps="05")) == five


def test_published_rows_with_options_stand_beside_the_default_one(
    zoo: ModuleType, spec: DefenseSpec, toy_run: Path, tmp_path: Path
) -> None:
    board = zoo.board(n=40)
    (tmp_path / "lb" / "boards").mkdir(parents=True)
    zoo.write_board(tmp_path / "lb" / "boards", board)

    def publish(**options: str) -> Path:
        """The finished toy's record, as if it had been made with these options."""
        folder = tmp_path / "copy"
        shutil.copytree(toy_run, folder, dirs_exist_ok=True)
        plain = json.loads((folder / RECORD).read_text())
        if options:
            plain["defense"]["options"] = options
        plain["digest"] = sha256_of_json({key: value for key, value in plain.items() if key != "digest"})
        (folder / RECORD).write_text(json.dumps(plain))
        return publish_record(folder, tmp_path / "lb")

    folders = {publish(), publish(steps="5"), publish(steps="5", weights="<b>w|x</b>")}
    assert len(folders) == 3
    assert publish(steps="5") in folders
    pages = {path.name: content.decode() for path, content in render(tmp_path / "lb").items()}
    title = read_record(toy_run).defense.card.title
    assert f"{title} (steps=5)" in pages["toy.csv"]
    assert f"{title} (steps=5)".replace("-", "\\-") in pages["toy.md"] or f"{title} (steps=5)" in pages["toy.md"]
    site = {name: page.decode() for name, page in render_site(tmp_path / "lb").items() if name.endswith(".html")}
    assert any(f"{title} (steps=5)" in page for page in site.values())
    assert not any("<b>w" in page for page in site.values())
    assert "weights=\\<b\\>w\\|x" in pages["toy.md"]


# The command line

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def assay(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_THREADS", "1")
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        shown = capsys.readouterr()
        code = leaving.value.code
        return (code if isinstance(code, int) else 0), shown.out, shown.err

    return call


@pytest.fixture
def board(zoo: ModuleType, toy_source: str, tmp_path: Path) -> Path:
    path: Path = zoo.write_board(tmp_path, zoo.board(n=20, source=toy_source))
    return path


def test_options_go_from_the_command_line_into_the_record(
    assay: Run, board: Path, spec: DefenseSpec, tmp_path: Path
) -> None:
    words = ("tuned", "--board", board, "--attack", "uniform", "--option", "gain=2", "-O", "loud=true")
    code, out, _ = assay("plan", *words)
    assert code == 0
    assert "tuned (gain=2.0, loud=true) on toy" in out
    code, out, _ = assay("run", *words)
    assert code == 4
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    assert read_record(folder).defense.options == {"gain": "2.0", "loud": "true"}
    code, shown, _ = assay("show", folder)
    assert "option gain: 2.0" in shown
    assert "tuned (gain=2.0, loud=true) on toy" in shown
    assert "".join(shown.splitlines(keepends=True)[:-1]) in out  # the last line has the path as it was given


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["tuned", "--option", "gian=1"], "Did you mean 'gain'"),
        (["tuned", "--option", "steps=many"], "whole number"),
        (["tuned", "--option", "steps"], "NAME=VALUE"),
        (["tuned", "-O", "steps=1", "-O", "steps=2"], "given twice"),
        (["--all", "--option", "steps=1"], "--option is for one defense"),
        (["diffpure", "--board", "cifar10-linf"], "--option denoiser="),
        (["diffpure", "-O", "denoiser=nowhere"], "no denoiser at 'nowhere'"),
        (["diffpure", "-O", "level=1001"], "levels 0 to 1000, got 1001"),
        (["diffpure", "-O", "steps=0"], "1 to 150 steps"),
    ],
)
def test_a_bad_option_exits_with_2(assay: Run, spec: DefenseSpec, words: list[str], says: str) -> None:
    code, out, err = assay("run", *words)
    assert code == 2
    assert says in " ".join(err.split())
    assert "Traceback" not in out + err


def test_all_skips_what_needs_an_option(assay: Run, monkeypatch: pytest.MonkeyPatch, spec: DefenseSpec) -> None:
    entries = {"tuned": spec, "diffpure": DEFENSES["diffpure"]}
    monkeypatch.setattr(DEFENSES, "_entries", entries)
    code, out, _ = assay("run", "--all", "--board", "cifar10-linf")
    assert code == 0
    assert out.count("no weights for this board's data set, skipped") == 2


def test_list_names_the_options(assay: Run, spec: DefenseSpec) -> None:
    # A narrow terminal breaks the cell between two options.
    assert re.search(r"options: weights,.{0,90}gain,.{0,90}steps,.{0,90}loud", assay("list")[1], re.DOTALL)
    (card,) = (card for card in json.loads(assay("list", "--json")[1])["defenses"] if card["name"] == "tuned")
    assert card["options"] == {"weights": "", "gain": 1.0, "steps": 4, "loud": False}


def test_a_user_s_spec_keeps_its_options(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from assay.defense import DefenseSpec, Card\n"
        "def load(dataset, *, steps=3): raise NotImplementedError\n"
        "MINE = DefenseSpec(Card(name='mine', title='Mine', summary=''), load, needs=('steps',))\n"
    )
    spec = resolve_defense(f"{tmp_path / 'mine.py'}:MINE", trust=True)
    assert spec.options == {"steps": 3}
    assert spec.needs == ("steps",)
    assert spec.source == tmp_path / "mine.py"


# The project's own


def test_diffpure_s_card_follows_its_options() -> None:
    spec = DEFENSES["diffpure"]
    assert spec.build("digits", options={"level": "150"}).card == spec.card
    changed = spec.build("digits", options={"level": "80", "steps": "2"})
    assert changed.card.network_calls == 3
    assert "t* = 80" in changed.card.summary
    assert changed.card.weights == spec.card.weights
    assert changed.chain().network_calls == 3


def test_smoothing_s_card_follows_its_votes() -> None:
    spec = denoised_smoothing.SPEC
    changed = spec.build("digits", options={"votes": "8", "sigma": "0.1"})
    assert changed.votes().draws == 8
    assert "votes" in changed.card.handles
    assert ".25" not in changed.card.title
    single = spec.build("digits", options={"votes": "1"})
    assert "votes" not in single.card.handles
    assert not single.card.traits.non_differentiable


def test_adp_s_card_follows_its_options() -> None:
    spec = adp.SPEC
    changed = spec.build("digits", options={"votes": "3", "steps": "2"})
    assert changed.votes().draws == 3
    assert changed.card.network_calls == 5
    assert spec.build("digits").card == spec.card


def test_adp_s_rate_is_the_share_of_a_newton_step() -> None:
    x, _ = data.load("digits", data.train_split("digits")[:8])
    noise = Noise.from_seed(0, 8)
    slow, fast = (adp.load("digits", rate=rate, steps=1).purifier for rate in (0.05, 0.2))
    with torch.no_grad():
        start = slow.start(x, noise)
        moves = [(purifier.step(start, x, noise) - start).flatten(1).norm(dim=1) for purifier in (slow, fast)]
    assert (moves[1] > 1.5 * moves[0]).any()
    assert (moves[1] >= moves[0]).all()


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        (denoised_smoothing.SPEC, {"votes": "0"}, "at least 1 vote"),
        (denoised_smoothing.SPEC, {"sigma": "-1"}, "a noise of -1"),
        (adp.SPEC, {"steps": "0"}, "at least 1 step"),
        (adp.SPEC, {"rate": "0"}, "a rate above 0"),
        (adp.SPEC, {"sigma": "9"}, "needs σ = 18"),
    ],
)
def test_what_a_defense_can_not_do_is_refused(spec: DefenseSpec, options: dict[str, str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        spec.build("digits", options=options)


@pytest.mark.skipif(not FFDNET.is_file(), reason="ASSAY_DATA names no folder with cifar10 and denoisers/")
@pytest.mark.parametrize(
    "spec",
    [
        diffpure.SPEC,
        denoised_smoothing.SPEC,
        adp.SPEC,
        gdmp.SPEC,
        victim_guided.SPEC,
        likelihood_maximisation.SPEC,
    ],
    ids=lambda spec: spec.card.name,
)
def test_a_brought_denoiser_runs_on_cifar10(spec: DefenseSpec) -> None:
    given = {"denoiser": str(FFDNET), "steps": "2", "votes": "2", "sigma": "0.1", "level": "50", "rounds": "1"}
    given |= {"step_size": "0.01", "radius": "0.03", "lowest": "0.1", "highest": "0.3"}
    options = {name: text for name, text in given.items() if name in spec.options}
    defense = spec.build("cifar10", options=options)
    assert defense.card.weights.keys() == {"denoiser/ffdnet_net_rgb.pth", "pyautoattack/model_test.pt"}
    assert defense.card.weights == {key: sha256_of_file(path) for key, path in spec.files("cifar10", options).items()}
    x, y = data.load("cifar10", range(8))
    with torch.no_grad():
        assert (defense(x, Noise.from_seed(0, 8)).argmax(1) == y).sum() >= 3
    assert spec.recorded("cifar10", options)["denoiser"] == "ffdnet_net_rgb.pth"


def test_a_record_s_options_are_text(toy_run: Path) -> None:
    plain = json.loads((toy_run / RECORD).read_text())
    plain["defense"]["options"] = {"steps": 5}
    with pytest.raises(ValueError, match="options"):
        Record.model_validate_json(json.dumps(plain), strict=True)
