"""Adversarial examples that somebody else found: when they lower a row, when they don't, and the history they leave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from assay import data, protocol
from assay.auditing import audit
from assay.audits import Audit, AuditedSample, lowered, read_audits
from assay.bundles import read_bundle
from assay.defense import DefenseSpec
from assay.digest import sha256_of_file, sha256_of_json
from assay.errors import InputError, IntegrityError
from assay.perturbation import bundle_bytes
from assay.record import BUNDLE, RECORD, SAMPLES, read_record
from assay.registry import DEFENSES

EPS, N, DRAWS = 0.1, 30, 20
NAMES = ("toy-known", "toy-noisy")


@pytest.fixture(scope="module")
def folder(zoo: ModuleType, toy_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A leaderboards folder with a deterministic and a stochastic row that only random points were tried on."""
    from assay.evaluation import execute
    from assay.prepare import prepare

    folder = tmp_path_factory.mktemp("leaderboards")
    (folder / "boards").mkdir()
    path = str(zoo.write_board(folder / "boards", zoo.board(n=N, draws=DRAWS)))
    models = {"toy-known": zoo.Linear("toy-known"), "toy-noisy": zoo.Abstaining(0.25, "toy-noisy")}
    with pytest.MonkeyPatch.context() as patch:
        # `toy_run`, which other files share, was made before: it asks for all checks.
        asked = replace(protocol.PROTOCOLS["2026.1"], checks=("interface",))
        patch.setitem(protocol.PROTOCOLS, "2026.1", asked)  # type: ignore[arg-type]
        for name, model in models.items():
            patch.setitem(DEFENSES._entries, name, DefenseSpec(model.card, lambda dataset, model=model: model))
            run = tmp_path_factory.mktemp(name) / "run"
            execute(prepare(name, path, only=["uniform"]), run)
            target = folder / "records" / "toy" / name / "quick"
            target.parent.mkdir(parents=True)
            shutil.copytree(run, target, ignore=lambda _, names: set(names) - {RECORD, SAMPLES, BUNDLE})
        yield folder


@pytest.fixture
def here(folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder to audit in."""
    target = tmp_path / "leaderboards"
    shutil.copytree(folder, target)
    return target


def row(folder: Path, name: str) -> Path:
    return folder / "records" / "toy" / name / "quick"


@pytest.fixture(scope="module")
def samples(zoo: ModuleType) -> tuple[tuple[int, ...], Tensor, Tensor]:
    ids = zoo.board(n=N).ids
    x, y = data.load("digits", ids)
    return ids, x, y


@pytest.fixture(scope="module")
def worst(zoo: ModuleType, samples: tuple[tuple[int, ...], Tensor, Tensor]) -> Tensor:
    """The image of each ball where the linear model is weakest: it falls wherever it can."""
    points: Tensor = zoo.linf_worst_point(*samples[1:], EPS)
    return points


@pytest.fixture(scope="module")
def fall(zoo: ModuleType, samples: tuple[tuple[int, ...], Tensor, Tensor]) -> list[int]:
    """The samples that can be made to fall, in closed form."""
    return [each for each, held in zip(samples[0], zoo.linf_robust(*samples[1:], EPS), strict=True) if not held]


@pytest.fixture
def given(tmp_path: Path) -> Callable[[Any, Tensor], Path]:
    def write(ids: Any, images: Tensor) -> Path:
        path = tmp_path / "given.safetensors"
        path.write_bytes(bundle_bytes(np.asarray(ids), images.numpy()))
        return path

    return write


def stands(folder: Path, name: str) -> dict[int, float]:
    table = pd.read_parquet(row(folder, name) / SAMPLES)
    final = table[table["attack"] == "final"]
    return dict(zip(final["id"].tolist(), final["expected"].tolist(), strict=True))


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in (folder / "audits").rglob("*.*"))


def test_a_deterministic_row_falls_to_what_it_can_be_brought_to(
    here: Path, samples: Any, worst: Tensor, fall: list[int], given: Callable[[Any, Tensor], Path]
) -> None:
    before = stands(here, "toy-known")
    bundle = given(samples[0], worst)
    told = audit(row(here, "toy-known"), bundle, "A. Nother", note="closed form", url="https://example.org/x",
                 leaderboards=here)  # fmt: skip
    broken = [each for each in fall if before[each] > 0]
    assert len(broken) > 3
    assert [sample.id for sample in told.samples] == broken
    assert {sample.expected for sample in told.samples} == {0.0}
    assert told.before == pytest.approx(np.mean(list(before.values())))
    assert told.after == pytest.approx(told.before - len(broken) / N)
    assert (told.valid, told.invalid) == (N, 0)
    place = "audits/toy/toy-known/quick"
    assert files(here) == [f"{place}/001.json", f"{place}/001.safetensors"]
    (found,) = read_audits(here, read_record(row(here, "toy-known")))
    assert (found.by, found.note, found.url) == ("A. Nother", "closed form", "https://example.org/x")
    assert found.bundle.given_sha256 == sha256_of_file(bundle)
    assert found.value_after == told.after
    # What lies beside the audit is a bundle of its own, of what lowered something.
    kept = read_bundle(here / place / "001.safetensors", ids=samples[0], x=samples[1])
    assert kept.ids.tolist() == broken
    rows = [samples[0].index(each) for each in broken]
    assert torch.equal(kept.images, worst[rows])
    norms = (worst[rows].double() - samples[1][rows].double()).abs().flatten(1).amax(1)
    assert [sample.norm for sample in found.samples] == pytest.approx(norms.tolist())


def test_nothing_is_lowered_twice_and_a_second_audit_builds_on_the_first(
    here: Path, samples: Any, worst: Tensor, fall: list[int], given: Callable[[Any, Tensor], Path]
) -> None:
    record = read_record(row(here, "toy-known"))
    half, ids = len(fall) // 2, samples[0]
    rows = [ids.index(each) for each in fall]
    first = audit(row(here, "toy-known"), given(fall[:half], worst[rows[:half]]), "One", leaderboards=here)
    again = audit(row(here, "toy-known"), given(fall[:half], worst[rows[:half]]), "Too late", leaderboards=here)
    assert again.samples == ()
    assert again.file is None
    assert again.before == again.after == first.after
    second = audit(row(here, "toy-known"), given(ids, worst), "Two", leaderboards=here)
    assert second.before == pytest.approx(first.after)
    assert {sample.id for sample in second.samples} <= set(fall[half:])
    assert second.after < first.after
    history = read_audits(here, record)
    assert [found.by for found in history] == ["One", "Two"]
    known = lowered(stands(here, "toy-known"), history)
    assert np.mean(list(known.values())) == pytest.approx(second.after)


def test_invalid_points_are_counted_and_the_rest_still_counts(
    here: Path, samples: Any, worst: Tensor, fall: list[int], given: Callable[[Any, Tensor], Path]
) -> None:
    ids, x, _ = samples
    images = worst.clone()
    bad = [ids.index(each) for each in fall[:3]]
    images[bad[0], 0, 0, 0] = float("nan")
    pixel = np.unravel_index(int((x[bad[1]] - 0.5).abs().argmin()), (1, 8, 8))
    images[bad[1]][pixel] = float(x[bad[1]][pixel]) + EPS + 1e-6
    images[bad[2], 0, 0, 0] = -0.01
    told = audit(row(here, "toy-known"), given(ids, images), "A", leaderboards=here)
    assert told.reasons == {"not finite": 1, "outside the ball linf 1/10": 1, "outside the box [0, 1]": 1}
    assert (told.valid, told.invalid) == (N - 3, 3)
    assert not {sample.id for sample in told.samples} & set(fall[:3])
    (found,) = read_audits(here, read_record(row(here, "toy-known")))
    assert (found.n_valid, found.n_invalid) == (N - 3, 3)
    outside = images.clone()
    outside += 1
    nothing = audit(row(here, "toy-known"), given(ids, outside), "A", leaderboards=here)
    assert (nothing.valid, nothing.samples) == (0, ())


def test_a_stochastic_row_falls_where_an_example_is_better_beyond_chance(
    here: Path, samples: Any, worst: Tensor, fall: list[int], given: Callable[[Any, Tensor], Path]
) -> None:
    before = stands(here, "toy-noisy")
    told = audit(row(here, "toy-noisy"), given(samples[0], worst), "A", leaderboards=here, seed=1)
    broken = {each for each in fall if before[each] > 0}
    assert {sample.id for sample in told.samples} == broken
    assert {sample.expected for sample in told.samples} == {0.0}
    assert told.after == pytest.approx(told.before - sum(before[each] for each in broken) / N)


def test_chance_lowers_no_stochastic_row(here: Path, samples: Any, given: Callable[[Any, Tensor], Path]) -> None:
    """Clean images, and the record's own examples, whatever the draws: what is as good as before lowers nothing."""
    path = row(here, "toy-noisy")
    for seed in range(10):
        for bundle in (given(samples[0], samples[1]), path / BUNDLE):
            assert audit(path, bundle, "A", leaderboards=here, seed=seed).samples == ()
    assert not (here / "audits").exists()


def test_an_audit_is_scored_on_draws_that_chose_nothing(
    here: Path, samples: Any, given: Callable[[Any, Tensor], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defense that is right half the time on what was moved: what is entered is a second count, not the lowest."""
    import assay.auditing as module

    asked: list[int] = []

    def halved(defense: Any, board: Any, ids: Any, images: Tensor, y: Tensor, noise: Any, draws: int) -> Any:
        asked.append(len(ids))
        generator = np.random.default_rng(noise.seed())
        return generator.binomial(draws, 0.2, len(ids))

    monkeypatch.setattr(module, "count_right", halved)
    told = audit(row(here, "toy-noisy"), given(*samples[:2]), "A", leaderboards=here, seed=3)
    assert len(asked) == 2
    assert len(told.samples) == asked[1] > 10
    # Unselected: about a fifth, though what was chosen on was lower than most.
    assert np.mean([sample.expected for sample in told.samples]) == pytest.approx(0.2, abs=0.06)


def test_the_same_seed_gives_the_same_audit_and_no_seed_another(
    here: Path, samples: Any, worst: Tensor, given: Callable[[Any, Tensor], Path]
) -> None:
    bundle = given(samples[0], worst)
    one, two = (audit(row(here, "toy-noisy"), bundle, "A", leaderboards=here, dry_run=True, seed=7) for _ in range(2))
    assert one == two
    assert one.file is None
    assert not (here / "audits").exists()
    seeds = set()
    for _ in range(2):
        audit(row(here, "toy-noisy"), bundle, "A", leaderboards=here)
        (found,) = read_audits(here, read_record(row(here, "toy-noisy")))
        seeds.add(found.seed)
        shutil.rmtree(here / "audits")
    assert len(seeds) == 2


# What is refused


def test_a_bundle_of_other_samples_is_refused_whole(
    here: Path, samples: Any, worst: Tensor, given: Callable[[Any, Tensor], Path]
) -> None:
    ids = list(samples[0])
    others = [each for each in range(1797) if each not in ids][:N]
    with pytest.raises(InputError, match="made for another board or data set"):
        audit(row(here, "toy-known"), given(others, worst), "A", leaderboards=here)
    with pytest.raises(InputError, match="more than one image"):
        audit(row(here, "toy-known"), given([*ids[:-1], ids[0]], worst), "A", leaderboards=here)
    with pytest.raises(InputError, match="expected"):
        audit(row(here, "toy-known"), given(ids, worst.repeat(1, 3, 1, 1)[:, :, :4, :4]), "A", leaderboards=here)
    assert not (here / "audits").exists()


def test_a_row_that_is_not_there_can_not_be_lowered(
    here: Path, samples: Any, worst: Tensor, given: Callable[[Any, Tensor], Path], tmp_path: Path
) -> None:
    bundle = given(samples[0], worst)
    run = tmp_path / "elsewhere"
    shutil.move(row(here, "toy-known"), run)
    with pytest.raises(InputError, match="holds no row of this record"):
        audit(run, bundle, "A", leaderboards=here)
    with pytest.raises(InputError, match="--leaderboards"):
        audit(run, bundle, "A")
    assert audit(run, bundle, "A", leaderboards=here, dry_run=True).samples
    assert not (here / "audits").exists()


@pytest.mark.parametrize(
    ("by", "note", "url"),
    [("", "", ""), ("  ", "", ""), ("A\nB", "", ""), ("A\x1b[2J", "", ""), ("A", "\u202eoops", ""),
     ("A", "", "javascript:alert(1)"), ("A" * 500, "", "")],
)  # fmt: skip
def test_a_signature_is_one_line_of_text(by: str, note: str, url: str, here: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an audit is signed"):
        audit(row(here, "toy-known"), tmp_path / "none", by, note=note, url=url, leaderboards=here)


def test_without_the_defense_nothing_is_scored(
    here: Path, samples: Any, worst: Tensor, given: Callable[[Any, Tensor], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(DEFENSES._entries, "toy-known")
    with pytest.raises(InputError, match="can't be had here: no defense is called 'toy-known'"):
        audit(row(here, "toy-known"), given(samples[0], worst), "A", leaderboards=here)


# The history


@pytest.fixture
def audited(here: Path, samples: Any, worst: Tensor, fall: list[int], given: Callable[[Any, Tensor], Path]) -> Path:
    """The folder after two audits."""
    rows = [samples[0].index(each) for each in fall]
    audit(row(here, "toy-known"), given(fall[:4], worst[rows[:4]]), "One", leaderboards=here)
    audit(row(here, "toy-known"), given(fall, worst[rows]), "Two", leaderboards=here)
    return here


def reseal(file: Path, **changes: Any) -> None:
    plain = {**json.loads(file.read_text()), **changes}
    plain["digest"] = sha256_of_json({key: value for key, value in plain.items() if key != "digest"})
    file.write_text(json.dumps(plain))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a changed number": (lambda p: _edit(p / "001.json", '"by": "One"', '"by": "Won"'), "was changed after"),
    "no JSON": (lambda p: (p / "002.json").write_text("{"), "not a valid audit"),
    "no text": (lambda p: (p / "002.json").write_bytes(b"\xff\x00"), "not a valid audit"),
    "other examples": (lambda p: (p / "001.safetensors").write_bytes(b"x"), "missing or was changed"),
    "no examples": (lambda p: (p / "002.safetensors").unlink(), "missing or was changed"),
    "the first one gone": (lambda p: (p / "001.json").unlink(), "an earlier audit is missing"),
    "a value raised": (lambda p: reseal(p / "001.json", value_after=1.0), "never raises one"),
    "another's examples": (
        lambda p: reseal(p / "001.json", bundle={**json.loads((p / "001.json").read_text())["bundle"],
                                                 "file": "002.safetensors"}), "expected 001.safetensors"),
    "a path as examples": (
        lambda p: reseal(p / "001.json", bundle={**json.loads((p / "001.json").read_text())["bundle"],
                                                 "file": "../../x.safetensors"}), "not a valid audit"),
    "a link": (lambda p: (p / "002.json").rename(p / "x") and (p / "002.json").symlink_to(p / "x"), "symbolic link"),
}  # fmt: skip


def _edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_history_is_refused(what: str, audited: Path) -> None:
    record = read_record(row(audited, "toy-known"))
    assert len(read_audits(audited, record)) == 2
    change, says = DAMAGE[what]
    change(audited / "audits" / "toy" / "toy-known" / "quick")
    with pytest.raises(IntegrityError, match=says):
        read_audits(audited, record)


def test_audits_of_an_earlier_record_are_left_out_and_their_numbers_are_not_used_again(audited: Path) -> None:
    place = audited / "audits" / "toy" / "toy-known" / "quick"
    record = read_record(row(audited, "toy-known"))
    other = record.model_copy(update={"digest": "f" * 64})
    assert read_audits(audited, other) == ()
    (place / "002.json").unlink()  # as if a crash had left the examples alone
    assert len(read_audits(audited, record)) == 1
    told = audit(row(audited, "toy-known"), place / "002.safetensors", "Three", leaderboards=audited)
    assert told.file == place / "003.json"
    assert [found.by for found in read_audits(audited, record)] == ["One", "Three"]


def test_an_audit_of_a_sample_that_the_record_does_not_have_is_refused(audited: Path) -> None:
    (first, _) = read_audits(audited, read_record(row(audited, "toy-known")))
    with pytest.raises(IntegrityError, match="which the record doesn't have"):
        lowered({1: 1.0}, [first])
    changed = first.model_copy(update={"samples": (AuditedSample(id=1, expected=0.25, norm=0.1),)})
    assert lowered({1: 1.0, 2: 0.5}, [changed]) == {1: 0.25, 2: 0.5}
    assert lowered({1: 0.0, 2: 0.5}, [changed]) == {1: 0.0, 2: 0.5}
    assert Audit.model_validate_json(json.dumps(first.as_json()), strict=True) == first


def test_a_verification_reads_the_history(audited: Path) -> None:
    from assay.verify import verify_record

    def item() -> Any:
        report = verify_record(row(audited, "toy-known"), leaderboards=audited, defense=False)
        return next(each for each in report.items if each.name == "audits")

    assert (item().status, item().message) == ("ok", "2 of this record")
    (audited / "audits" / "toy" / "toy-known" / "quick" / "001.json").unlink()
    assert item().status == "failed"


# The command


@pytest.fixture(scope="module")
def command() -> Callable[..., Any]:
    import typer

    from assay.cli_verify import add_to

    app = typer.Typer()
    add_to(app)
    return lambda *words: CliRunner().invoke(app, [*map(str, words)])


def test_the_command_tells_what_came_of_it(
    command: Callable[..., Any], here: Path, samples: Any, worst: Tensor, given: Callable[[Any, Tensor], Path]
) -> None:
    bundle = given(samples[0], worst)
    words = ("audit", row(here, "toy-known"), bundle, "--by", "A", "--leaderboards", here, "--threads", 1)
    dry = command(*words, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "nothing was written (dry run)" in dry.stdout
    done = command(*words)
    assert done.exit_code == 0
    assert "samples lowered: best known robust accuracy" in done.stdout
    assert "001.json" in done.stdout
    again = command(*words)
    assert again.exit_code == 0
    assert "nothing is lowered" in again.stdout
    bundle.write_bytes(b"no")
    assert isinstance(command(*words).exception, InputError)
    assert command("audit", row(here, "toy-known"), bundle).exit_code == 2  # unsigned
