"""The rules by which records become verdicts: rows that work, budgets, spreads, needs."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import pytest

from dfkd_lib import records
from dfkd_lib.reproduction import budgets, floors, pages, papers, tables
from dfkd_lib.reproduction.cards import Budget, Claim, Evidence, Need
from dfkd_lib.reproduction.verdicts import judge, spreads_of

LEADS = Evidence("comparison/OURS/accuracy", than="comparison/THEIRS/accuracy")
BY_TEN = Evidence(LEADS.metric, 0.1, than=LEADS.than)
BUDGET = Budget(
    "some", (), "updates times batch", ("n_updates", "batch"), {"any": 1000.0}, "dataset",
    "comparison/teacher/accuracy", {"digits": 0.95},
)  # fmt: skip


def run(n_updates: int = 10, profile: str = "cpu", **accuracies: float | None) -> dict[str, Any]:
    return {
        "chapter": "some",
        "profile": profile,
        "seed": 0,
        "parameters": {"dataset": "digits", "n_updates": n_updates, "batch": 50},
        "teachers": [{"n_classes": 10}],
        "metrics": {f"comparison/{row}/accuracy": value for row, value in accuracies.items()},
        "best": {},
    }


def claim(*evidence: Evidence, **more: Any) -> Claim:
    return Claim("id", "text", "where", evidence, **more)


def test_a_row_has_to_be_ten_points_above_chance() -> None:
    found = judge(claim(LEADS), [run(OURS=0.9, THEIRS=0.19)])
    assert (found.verdict, found.n) == ("not tested here", 0)
    assert found.figures.startswith("THEIRS is less than ten points above chance: OURS 90.0 %")
    assert judge(claim(LEADS), [run(OURS=0.9, THEIRS=0.21)]).verdict == "holds"
    assert judge(claim(LEADS), [run(OURS=0.15, THEIRS=0.9)]).verdict == "not tested here"
    assert judge(claim(LEADS), [run(OURS=0.9, THEIRS=None)]).verdict == "not tested here"
    control = Evidence(LEADS.metric, than=LEADS.than, control=True)
    assert judge(claim(control), [run(OURS=0.9, THEIRS=0.1)]).verdict == "holds"
    assert judge(claim(control), [run(OURS=0.15, THEIRS=0.1)]).verdict == "not tested here"


def test_a_claim_about_one_dataset_is_judged_by_its_runs_alone() -> None:
    other = run(OURS=0.3, THEIRS=0.9)
    other["parameters"]["dataset"] = "mnist"
    about = claim(LEADS, only={"dataset": "digits"})
    assert judge(about, [run(OURS=0.9, THEIRS=0.3), other]) == judge(about, [run(OURS=0.9, THEIRS=0.3)])
    assert judge(about, [run(OURS=0.9, THEIRS=0.3)]).verdict == "holds"
    assert (judge(about, [other]).verdict, judge(about, [other]).n) == ("not tested here", 0)
    assert judge(claim(LEADS), [other]).verdict == "does not hold"


def test_chance_is_that_of_the_teachers_classes() -> None:
    of_four = run(OURS=0.5, THEIRS=0.3)
    of_four["teachers"] = [{"n_classes": 4}, {}]
    assert floors.chance(of_four) == 0.25
    assert judge(claim(LEADS), [of_four]).verdict == "not tested here"
    del of_four["teachers"]
    assert floors.chance(of_four) is None
    assert judge(claim(LEADS), [of_four]).verdict == "holds"


def test_a_row_that_is_fast_has_to_work_too() -> None:
    faster = Evidence("comparison/THEIRS/total seconds", than="comparison/OURS/total seconds")
    seconds = {"comparison/THEIRS/total seconds": 20.0, "comparison/OURS/total seconds": 10.0}
    works, fails = run(OURS=0.9, THEIRS=0.9), run(OURS=0.12, THEIRS=0.9)
    for record in (works, fails):
        record["metrics"] |= seconds
    assert judge(claim(faster), [works]).verdict == "holds"
    assert judge(claim(faster), [fails]).verdict == "not tested here"


def test_a_student_has_to_learn_something() -> None:
    knew = claim(LEADS, before="comparison/before/accuracy")
    assert judge(knew, [run(OURS=0.9, THEIRS=0.8, before=0.7)]).verdict == "holds"
    found = judge(knew, [run(OURS=0.9, THEIRS=0.8, before=0.85)])
    assert found.figures.startswith("THEIRS is no better than the student before it learned")


def test_repeats_are_judged_by_their_mean() -> None:
    each = Evidence("comparison/OURS #*/accuracy", than="comparison/THEIRS #*/accuracy")
    record = run(**{"OURS #0": 0.9, "OURS #1": 0.8, "THEIRS #0": 0.25, "THEIRS #1": 0.1})
    assert judge(claim(each), [record]).figures.startswith("THEIRS is less than ten points above chance")
    record["metrics"]["comparison/THEIRS #1/accuracy"] = 0.2
    assert judge(claim(each), [record]).verdict == "holds"


def test_what_is_asked_may_not_exceed_the_teacher() -> None:
    found = judge(claim(BY_TEN), [run(OURS=0.94, THEIRS=0.9, teacher=0.95)], [BUDGET])
    assert found.figures.startswith("it asks for more than the teacher has")
    assert judge(claim(BY_TEN), [run(OURS=0.94, THEIRS=0.8, teacher=0.95)], [BUDGET]).verdict == "holds"
    alone = Evidence(LEADS.metric, 0.97)
    assert judge(claim(alone), [run(OURS=0.94, teacher=0.95)], [BUDGET]).verdict == "not tested here"


def test_needs_come_first_and_say_why() -> None:
    need = Need(Evidence("comparison/labels/accuracy", than="comparison/teacher/accuracy"), "labels do not suffice")
    needy = claim(LEADS, needs=(need,))
    assert judge(needy, [run(OURS=0.9, THEIRS=0.8, labels=0.99, teacher=0.95)]).verdict == "holds"
    found = judge(needy, [run(OURS=0.9, THEIRS=0.8, labels=0.9, teacher=0.95)])
    assert found.verdict == "not tested here" and found.figures.startswith("labels do not suffice: labels 90.0 %")
    assert judge(needy, [run(OURS=0.9, THEIRS=0.8)]).figures == "labels do not suffice: no run has these measures"
    assert judge(needy, [run()]).figures == "no run has these measures"


def test_a_lead_without_the_points_asked_holds_in_part() -> None:
    assert judge(claim(BY_TEN), [run(OURS=0.9, THEIRS=0.8)]).verdict == "holds"
    assert judge(claim(BY_TEN), [run(OURS=0.9, THEIRS=0.85)]).verdict == "holds in part"
    assert judge(claim(BY_TEN), [run(OURS=0.8, THEIRS=0.85)]).verdict == "does not hold"
    tolerance = Evidence(LEADS.metric, -0.01, than=LEADS.than)
    assert judge(claim(tolerance), [run(OURS=0.8, THEIRS=0.85)]).verdict == "does not hold"
    mixed = [run(OURS=0.9, THEIRS=0.85), run(OURS=0.9, THEIRS=0.95), run(OURS=0.9, THEIRS=0.9)]
    assert judge(claim(BY_TEN), mixed).verdict == "does not hold"


def test_a_negative_verdict_needs_a_tenth_of_the_budget_and_a_teacher() -> None:
    lost = {"OURS": 0.7, "THEIRS": 0.8}
    found = judge(claim(LEADS), [run(1, **lost)], [BUDGET])
    assert (found.verdict, found.terms) == ("not reached at this budget", "at 5 % of the paper's updates times batch")
    assert judge(claim(LEADS), [run(2, **lost)], [BUDGET]).verdict == "does not hold"
    weak = judge(claim(LEADS), [run(20, teacher=0.89, **lost)], [BUDGET])
    assert weak.verdict == "not reached at this budget"
    assert weak.terms == "at 100 % of the paper's updates times batch, teacher 89.0 of 95.0"
    assert judge(claim(LEADS), [run(20, teacher=0.91, **lost)], [BUDGET]).verdict == "does not hold"
    assert judge(claim(LEADS), [run(1, OURS=0.9, THEIRS=0.8)], [BUDGET]).verdict == "holds"
    other = run(1, **lost) | {"chapter": "other"}
    assert judge(claim(LEADS), [other], [BUDGET]).terms == ""


def test_a_budget_multiplies_parameters_and_adds_up_lists() -> None:
    record = run(4)
    assert budgets.share(BUDGET, record) == 4 * 50 / 1000
    record["parameters"]["batch"] = [10, 20]
    assert budgets.share(BUDGET, record) == 4 * 30 / 1000
    del record["parameters"]["batch"]
    assert budgets.share(BUDGET, record) is None


def test_one_seed_decides_nothing_within_what_seeds_differ_by() -> None:
    elsewhere = [[run(OURS=value, THEIRS=0.5, OTHER=0.5) for value in (0.6, 0.7)]]
    spreads = spreads_of(elsewhere)
    assert spreads[LEADS.metric] == pytest.approx(0.0707, abs=1e-4)
    assert judge(claim(LEADS), [run(OURS=0.65, THEIRS=0.6)], (), spreads).verdict == "undecided"
    assert judge(claim(LEADS), [run(OURS=0.70, THEIRS=0.6)], (), spreads).verdict == "holds"
    assert judge(claim(LEADS), [run(OURS=0.65, THEIRS=0.6)]).verdict == "holds"
    # A row that was never repeated is taken to scatter as the others do.
    unknown = Evidence("comparison/NEW/accuracy", than="comparison/THEIRS/accuracy")
    spreads |= {"": 0.03, "comparison/THEIRS/accuracy": 0.04}
    assert judge(claim(unknown), [run(NEW=0.64, THEIRS=0.6)], (), spreads).verdict == "undecided"
    assert judge(claim(unknown), [run(NEW=0.66, THEIRS=0.6)], (), spreads).verdict == "holds"


def test_a_ratio_of_one_run_is_held_against_the_spreads_of_both_its_parts() -> None:
    kept = Evidence("comparison/OURS/accuracy", 0.91, of="comparison/THEIRS/accuracy")
    one = [run(OURS=0.46, THEIRS=0.5)]  # a quotient of 0.92
    assert judge(claim(kept), one).verdict == "holds"
    for spreads in ({kept.metric: 0.01}, {str(kept.of): 0.01}, {"": 0.01}):
        assert judge(claim(kept), one, (), spreads).verdict == "undecided"
        # 0.46 / 0.5 differs by 0.01 / 0.5 and by 0.92 * 0.01 / 0.5
        small = {key: value / 4 for key, value in spreads.items()}
        assert judge(claim(kept), one, (), small).verdict == "holds"


def test_an_upper_bound() -> None:
    small = Evidence("comparison/gap/value", at_most=0.001)
    record = run()
    for value, verdict in ((0.0005, "holds"), (0.001, "holds"), (0.002, "does not hold")):
        record["metrics"]["comparison/gap/value"] = value
        assert judge(claim(small), [record]).verdict == verdict


def test_a_budget_may_count_what_a_record_measured() -> None:
    counted = replace(BUDGET, ours=("comparison/OURS/images",))
    record = run(OURS=0.9)
    assert budgets.share(counted, record) is None
    record["metrics"]["comparison/OURS/images"] = 250
    assert budgets.share(counted, record) == 0.25


def test_smoke_runs_decide_nothing() -> None:
    won = {"OURS": 0.9, "THEIRS": 0.8}
    groups = {"smoke digits": [run(profile="smoke", **won)]}
    assert tables.at_largest_scale(claim(LEADS), groups)[1].verdict == "not tested here"
    groups = {"cpu digits": [run(OURS=0.9, THEIRS=0.1)], **groups}
    found = tables.at_largest_scale(claim(LEADS), groups)[1]
    assert found.verdict == "not tested here" and "above chance" in found.figures
    assert tables.at_largest_scale(claim(LEADS), {"cpu digits": [run(**won)]})[1].verdict == "holds"


def test_of_runs_of_one_scale_on_the_same_data_the_longest_counts() -> None:
    won, lost = {"OURS": 0.9, "THEIRS": 0.8}, {"OURS": 0.8, "THEIRS": 0.9}
    on = {"data": [{"name": "digits", "split": "test"}]}
    short, long = run(**won) | on, run(20, profile="cpu-long", **lost) | on
    verdict = tables.at_largest_scale(claim(LEADS), {"cpu": [short], "cpu-long": [long]})
    assert (verdict[0], verdict[1].verdict) == ("cpu-long", "does not hold")
    larger = tables.at_largest_scale(claim(LEADS), {"gpu": [run(profile="gpu", **won) | on], "cpu-long": [long]})
    assert (larger[0], larger[1].verdict) == ("gpu", "holds")
    other = long | {"data": [{"name": "mnist", "split": "test"}]}
    assert tables.at_largest_scale(claim(LEADS), {"cpu": [short], "cpu-long": [other]})[0] == "cpu"
    blind = run(20, profile="cpu-long", OURS=0.9) | on
    assert tables.at_largest_scale(claim(LEADS), {"cpu": [short], "cpu-long": [blind]})[0] == "cpu"


def test_the_length_of_a_run_is_all_the_updates_that_it_asks_for() -> None:
    asked = {"block_steps": [200, 120], "network_steps": 80, "n_updates": 5, "lr_steps": 0.5, "batch_size": 64}
    assert records.length({"parameters": asked}) == 405


def committed(paper_id: str, chapter: str, name: str) -> tuple[Any, dict[str, list[dict[str, Any]]]]:
    """A card, and one group of its committed records to change."""
    card = papers.paper(paper_id)
    found = [record for record in records.committed(chapter) if record["run"].startswith(name)]
    return card, copy.deepcopy(records.group(found))


def test_changing_a_committed_record_changes_its_verdict_as_the_rules_say() -> None:
    card, groups = committed("dfad", "dfad", "cpu-mnist")
    unrelated = card.claim("beats-unrelated-data")

    def verdict() -> str:
        return tables.at_largest_scale(unrelated, groups, card.budgets)[1].verdict

    (runs,) = groups.values()
    key, ours = "classification/KD unrelated/accuracy", "classification/DFAD/accuracy"
    assert verdict() == "holds"
    for record in runs:  # the baseline at chance
        record["metrics"][key] = 0.1
    assert verdict() == "not tested here"
    for record in runs:  # a baseline that is better
        record["metrics"][key] = record["metrics"][ours] + 0.01
    assert verdict() == "not reached at this budget"
    for record in runs:  # at the paper's length it would be a failure, with a teacher as good as the paper's
        record["parameters"]["n_steps"] *= 2
    assert verdict() == "does not hold"
    for record in runs:
        record["metrics"]["classification/teacher/accuracy"] = 0.93
    assert verdict() == "not reached at this budget"


def test_a_seed_less_can_make_a_verdict_undecided() -> None:
    card, groups = committed("customised", "amalgamation", "cpu-cifar10-")
    selection = card.claim("selection")
    (runs,) = groups.values()
    assert tables.at_largest_scale(selection, groups, card.budgets)[1].verdict == "holds"
    elsewhere = spreads_of([runs])
    found = [judge(selection, [record], card.budgets, elsewhere).verdict for record in runs]
    assert "undecided" in found


def test_chapters_the_page_of_claims_and_the_command_agree() -> None:
    found = records.committed()
    for table, card in zip(tables.claims(found), tables.in_order(), strict=True):
        shown = str(pages.verdicts(card.id).data)
        badges = re.findall(r'class="verdict [\w-]+">\S+ ([^<]+)</span>', shown)
        assert badges == list(table.frame["verdict"])


def test_the_landing_page_counts_what_the_page_of_claims_shows() -> None:
    shown = str(pages.standing().data)
    ruled = [verdict for table in tables.claims(records.committed()) for verdict in table.frame["verdict"]]
    assert f"{len(ruled)} claims of {len(papers.paper_ids())} papers" in shown
    for name in pages.MARKS:
        assert f"{name} {ruled.count(name)}" in shown
    assert "at the paper's full budget" in shown


def test_papers_come_in_the_order_of_the_chapters_and_smoke_runs_last() -> None:
    ids = [card.id for card in tables.in_order()]
    assert ids.index("dfad") < ids.index("cmi") < ids.index("fast") < ids.index("grafting")
    kinds = [table.kind for table in tables.results(records.committed())]
    assert kinds == sorted(kinds) and set(kinds) == {"results", "smoke"}


def test_no_verdict_of_the_book_rests_on_a_row_at_chance() -> None:
    for card in map(papers.paper, papers.paper_ids()):
        groups = records.group([r for r in records.committed() if r["chapter"] in card.chapters])
        for one in card.claims:
            label, verdict = tables.at_largest_scale(one, groups, card.budgets)
            if not verdict.n or verdict.verdict in ("does not hold", "not reached at this budget"):
                continue
            for evidence in one.evidence:
                for key in (evidence.metric, None if evidence.control else evidence.than):
                    if key and floors.is_accuracy(key) and "#*" not in key:
                        values = [record["metrics"][key] or 0.0 for record in groups[label]]
                        guess = floors.chance(groups[label][0])
                        assert guess is not None and sum(values) / len(values) >= guess + 0.1, (card.id, one.id, key)
