"""Paper cards, their published tables, and the verdicts that records lead to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dfkd_lib.errors import DamagedFile, InputError
from dfkd_lib.locations import book_root
from dfkd_lib.reproduction import papers
from dfkd_lib.reproduction.cards import Claim, Evidence, read_card
from dfkd_lib.reproduction.parameters import profile, profiles
from dfkd_lib.reproduction.verdicts import Verdict, judge

BETTER = Evidence("classification/DFAD/accuracy", than="classification/RANDOM/accuracy")
RATIO = Evidence("classification/DFAD/accuracy", 0.9, of="classification/teacher/accuracy")


def record(**accuracies: float | None) -> dict[str, Any]:
    metrics = {f"classification/{row}/accuracy": value for row, value in accuracies.items()}
    return {"chapter": "dfad", "parameters": {}, "metrics": metrics}


def verdict(evidence: Evidence | list[Evidence], *records: dict[str, Any]) -> Verdict:
    pieces = tuple(evidence) if isinstance(evidence, list) else (evidence,)
    return judge(Claim("id", "text", "where", pieces), records)


@pytest.mark.parametrize("name", papers.paper_ids())
def test_every_card_is_valid_and_its_ids_are_unique(name: str) -> None:
    card = papers.paper(name)
    for ids in ([claim.id for claim in card.claims], [table.id for table in card.tables]):
        assert len(ids) == len(set(ids))
    assert card.claims
    assert all(claim.evidence or claim.why for claim in card.claims)
    assert all(
        0 <= cell[0] <= 1 and (cell[1] is None or 0 <= cell[1] < 0.2)
        for table in card.tables
        if table.measure != "hours"
        for row in table.rows.values()
        for cell in row.values()
        if cell
    )


@pytest.mark.parametrize("name", papers.paper_ids())
def test_what_a_claim_asks_of_its_runs_is_what_some_profile_sets(name: str) -> None:
    card = papers.paper(name)
    settings = [profile(chapter, each) for chapter in card.chapters for each in profiles(chapter)]
    for claim in card.claims:
        assert any(claim.only.items() <= known.items() for known in settings), claim.id


def test_dfad_card_credits_the_earlier_work_and_names_the_official_code() -> None:
    card = papers.paper("dfad")
    assert (card.arxiv, card.code) == ("1912.11006", "VainF/Data-Free-Adversarial-Distillation")
    assert any("1905.09768" in credit for credit in card.credits)


@pytest.mark.parametrize(
    ("table", "dataset", "method", "mean", "std"),
    [
        ("classification", "mnist", "DFAD", 0.983, 0.002),
        ("classification", "mnist", "RANDOM", 0.747, 0.033),
        ("classification", "cifar10", "KD-ORI", 0.939, 0.011),
        ("classification", "cifar100", "DFAD", 0.677, 0.003),
        ("segmentation", "camvid", "DFAD", 0.535, None),
        ("segmentation", "nyuv2", "KD-REL", 0.396, None),
        ("mmrazor", "cifar10", "DFAD", 0.928, None),
    ],
)
def test_published_figures(table: str, dataset: str, method: str, mean: float, std: float | None) -> None:
    row = papers.published("dfad", table, dataset).set_index("method").loc[method]
    assert row["mean"] == mean
    assert row["std"] == std if std is not None else row.isna()["std"]


def test_a_published_failure_is_not_a_number() -> None:
    frame = papers.published("dfad", "classification", "caltech101").set_index("method")
    assert frame.loc["DAFL"].isna().all()
    assert frame["mean"].notna().sum() == len(frame) - 1


def test_unknown_names_are_input_errors_that_name_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'dfad'"):
        papers.paper("dfda")
    with pytest.raises(InputError, match="did you mean 'classification'"):
        papers.published("dfad", "clasification", "mnist")
    with pytest.raises(InputError, match="did you mean 'mnist'"):
        papers.published("dfad", "classification", "mnits")
    with pytest.raises(InputError, match="did you mean 'game-matters'"):
        papers.paper("dfad").claim("game-maters")


def test_one_record_decides_by_the_sign_of_its_margin() -> None:
    assert verdict(BETTER, record(DFAD=0.98, RANDOM=0.75)).verdict == "holds"
    assert verdict(BETTER, record(DFAD=0.7, RANDOM=0.75)).verdict == "does not hold"
    assert verdict(BETTER, record(DFAD=0.1, RANDOM=0.1)).verdict == "undecided"


def test_a_margin_asked_for_is_met_by_equality() -> None:
    by = Evidence(BETTER.metric, 0.15, than=BETTER.than)
    assert verdict(by, record(DFAD=0.9, RANDOM=0.75)).verdict == "holds"
    assert verdict(by, record(DFAD=0.89, RANDOM=0.75)).verdict == "holds in part"
    assert verdict(Evidence(BETTER.metric, 0.9), record(DFAD=0.9)).verdict == "holds"


def test_several_records_are_held_against_the_standard_error() -> None:
    clear = [record(DFAD=0.98, RANDOM=value) for value in (0.70, 0.75, 0.80)]
    mixed = [record(DFAD=0.98, RANDOM=value) for value in (0.97, 0.995, 0.98)]
    lost = [record(DFAD=0.5, RANDOM=value) for value in (0.70, 0.75, 0.80)]
    assert [verdict(BETTER, *runs).verdict for runs in (clear, mixed, lost)] == ["holds", "undecided", "does not hold"]
    assert verdict(BETTER, *clear).figures == "DFAD 98.0 ± 0.0 % against RANDOM 75.0 ± 5.0 %, 3 seeds"
    same = [record(DFAD=0.98, RANDOM=0.9)] * 2
    assert verdict(BETTER, *same).verdict == "holds"


def test_a_ratio() -> None:
    found = verdict(RATIO, record(DFAD=0.95, teacher=1.0))
    assert (found.verdict, found.n) == ("holds", 1)
    assert found.figures == "DFAD 95.0 % of teacher 100.0 %, a ratio of 95.0 %, 1 seed"
    assert verdict(RATIO, record(DFAD=0.85, teacher=1.0)).verdict == "does not hold"
    assert verdict(RATIO, record(DFAD=0.85, teacher=0.0)).verdict == "not tested here"


def test_bare_numbers_are_not_shown_as_percent() -> None:
    evidence = Evidence("gradient/MAE norm ratio/value", than="gradient/KL norm ratio/value")
    run = {"metrics": {evidence.metric: 1.0, evidence.than: 0.00123}}
    assert verdict(evidence, run).figures == "MAE norm ratio 1 against KL norm ratio 0.0012, 1 seed"


def test_records_without_the_metrics_do_not_count() -> None:
    assert verdict(BETTER, record(DFAD=0.9)).verdict == "not tested here"
    found = verdict(BETTER, record(DFAD=0.9), record(DFAD=0.9, RANDOM=0.5))
    assert (found.verdict, found.n) == ("holds", 1)
    assert verdict(BETTER).n == 0


def test_a_diverged_run_counts_as_zero() -> None:
    assert verdict(BETTER, record(DFAD=0.9, RANDOM=None)).verdict == "holds"
    assert verdict(BETTER, record(DFAD=None, RANDOM=0.1)).verdict == "does not hold"


def test_a_claim_with_parts_holds_only_if_each_part_does() -> None:
    kl = Evidence("classification/DFAD/accuracy", than="classification/KL/accuracy")
    assert verdict([BETTER, kl], record(DFAD=0.9, RANDOM=0.5, KL=0.8)).verdict == "holds"
    assert verdict([BETTER, kl], record(DFAD=0.9, RANDOM=0.5, KL=0.95)).verdict == "does not hold"
    assert verdict([BETTER, kl], record(DFAD=0.9, RANDOM=0.5, KL=0.9)).verdict == "undecided"
    assert verdict([BETTER, kl], record(DFAD=0.9, RANDOM=0.5)).verdict == "not tested here"


def test_claims_table_has_a_verdict_for_each_claim() -> None:
    card = papers.paper("dfad")
    frame = papers.claims_table("dfad", [record(DFAD=0.98, RANDOM=0.7, teacher=0.99)])
    assert list(frame.columns) == ["claim", "where", "verdict", "figures"]
    assert len(frame) == len(card.claims)
    verdicts = dict(zip([claim.id for claim in card.claims], frame["verdict"], strict=True))
    assert verdicts["game-matters"] == verdicts["learns-without-data"] == "holds"
    assert verdicts["upper-bound"] == verdicts["segmentation"] == "not tested here"
    assert card.claim("upper-bound").why in set(frame["figures"])


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("title",), None, "'title'"),
        (("arxiv",), 1912.11006, "'arxiv'"),
        (("colour",), "blue", "'colour'"),
        (("id",), "another", "'id'"),
        (("tables", 0, "measure"), None, r"tables\[0\]: key 'measure'"),
        (("tables", 0, "rows", "DFAD", "mnist"), [0.983], r"rows: DFAD: key 'mnist'"),
        (("tables", 0, "rows", "DFAD", "imagenet"), [0.5, None], "'imagenet'"),
        (("tables", 0, "ours", "Nobody"), "nobody", "'Nobody'"),
        (("claims", 1, "evidence", "bigger"), "a/b/c", r"claims\[1\]: evidence\[0\]: key 'bigger'"),
        (("claims", 1, "evidence", "than"), "RANDOM", "'than'"),
        (("claims", 1, "evidence"), None, r"claims\[1\]: key 'why'"),
        (("claims", 1), "a sentence", r"claims\[1\]: expected keys"),
    ],
)
def test_a_malformed_card_names_file_and_key(tmp_path: Path, path: tuple[Any, ...], value: Any, named: str) -> None:
    card = yaml.safe_load((book_root() / "papers" / "dfad.yml").read_text(encoding="utf-8"))
    inner = card
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    if value is None and path[-1] not in ("evidence", "mnist"):
        del inner[path[-1]]
    target = tmp_path / "dfad.yml"
    target.write_text(yaml.safe_dump(card), encoding="utf-8")
    with pytest.raises(DamagedFile, match=named) as caught:
        read_card(target)
    assert str(target) in str(caught.value) and "\n" not in str(caught.value)


def test_a_card_that_is_not_yaml(tmp_path: Path) -> None:
    target = tmp_path / "dfad.yml"
    target.write_text("id: [dfad\n", encoding="utf-8")
    with pytest.raises(DamagedFile, match="not valid YAML") as caught:
        read_card(target)
    assert "\n" not in str(caught.value)


def test_seeds_are_summed_up_with_the_sample_deviation_and_divergence_is_told():
    assert papers.percent([0.9, 0.8]) == "85.0 ± 7.1"
    assert papers.percent([0.9, 0.8, None], " %") == "85.0 ± 7.1 %, 1 of 3 diverged"
    assert papers.percent([None]) == "diverged"


def test_seconds_are_shown_as_seconds_and_their_ratio_as_times() -> None:
    slow, quick = "synthesis/CMI/synthesis seconds", "synthesis/Fast/synthesis seconds"
    run = {"metrics": {slow: 90.0, quick: 4.5}}
    found = verdict(Evidence(slow, 10.0, of=quick), run)
    assert found.verdict == "holds"
    assert found.figures == "CMI 90 s of Fast 4.5 s, a ratio of 20 times, 1 seed"


def test_one_run_whose_figures_read_the_same_decides_nothing() -> None:
    evidence = Evidence("classification/A/accuracy", than="classification/B/accuracy")
    assert verdict(evidence, record(A=0.28112, B=0.28108)).verdict == "undecided"
    assert verdict(evidence, record(A=0.2821, B=0.2810)).verdict == "holds"
    assert verdict(evidence, record(A=0.2810, B=0.2821)).verdict == "does not hold"


def test_repeats_within_a_run_count_one_by_one() -> None:
    ours, theirs = "draws/NetGraft K=1 #*/accuracy", "draws/KD K=1 #*/accuracy"
    evidence = Evidence(ours, than=theirs)

    def run(*pairs: tuple[float | None, float | None]) -> dict[str, Any]:
        metrics = {}
        for i, (a, b) in enumerate(pairs):
            metrics |= {ours.replace("#*", f"#{i}"): a, theirs.replace("#*", f"#{i}"): b}
        return {"metrics": metrics}

    clear, mixed = run((0.6, 0.5), (0.55, 0.46), (0.5, 0.39)), run((0.6, 0.5), (0.4, 0.55), (0.5, 0.44))
    found = verdict(evidence, clear)
    assert found.verdict == "holds"
    assert found.figures == "NetGraft K=1 55.0 ± 5.0 % against KD K=1 45.0 ± 5.6 %, 3 repeats, 1 seed"
    assert verdict(evidence, mixed).verdict == "undecided"
    assert verdict(evidence, clear, clear).figures.endswith("6 repeats, 2 seeds")
    unpaired = clear["metrics"] | {"draws/NetGraft K=1 #3/accuracy": 0.0}
    assert verdict(evidence, {"metrics": unpaired}).n == 3, "a repeat that only one of the two has does not count"
    assert verdict(evidence, run((None, 0.5), (0.9, 0.5))).verdict == "undecided"
    against_one = Evidence(ours, 0.9, of="shots/teacher/accuracy")
    found = verdict(against_one, {"metrics": clear["metrics"] | {"shots/teacher/accuracy": 0.5}})
    assert found.n == 3 and "of teacher 50.0 %, a ratio of 110.0 ± 10.0 %" in found.figures
    assert verdict(evidence, {"metrics": {}}).verdict == "not tested here"
