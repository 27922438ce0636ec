"""The simulation's clusters, its choice of S and L, its demands, and the script from end to end."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY
from simulation import demands, tails

from vapo_async.config import ConfigError
from vapo_async.simulation import sweep
from vapo_async.simulation.cluster import Lengths, parse_cluster, read_cluster
from vapo_async.simulation.lengths import mean_length, sampler
from vapo_async.simulation.sweep import Pair, pareto, recommend

script = runpy.run_path(str(REPOSITORY / "benchmarks" / "simulate.py"))
CLUSTERS = sorted((REPOSITORY / "benchmarks" / "clusters").glob("*.yaml"))
SMALLEST = {
    "name": "one",
    "batch": {"groups": 2},
    "lengths": {"median_tokens": 10},
    "rollout": {"workers": 1, "tokens_per_s_alone": 1},
}


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.stem)
def test_the_example_clusters_run(path: Path) -> None:
    cluster = read_cluster(path)
    outcome = sweep.simulate(cluster, 2, 1, versions=2)
    assert outcome.versions == 2 and outcome.max_age <= 2 and outcome.tokens_per_s > 0


@pytest.mark.parametrize(
    ("section", "key", "value", "told"),
    [
        ("rollout", "slot", 4, "unknown key 'rollout.slot'; did you mean 'slots'?"),
        ("", "leaner", {}, "unknown key 'leaner'; did you mean 'learner'?"),
        ("batch", "qqq", 1, "unknown key 'batch.qqq'; there are groups, group_size"),
        ("rollout", "slots", "many", "rollout.slots is 'many', expected a whole number >= 1"),
        ("rollout", "slots", 1.5, "rollout.slots is 1.5, expected a whole number >= 1"),
        ("rollout", "workers", True, "rollout.workers is True, expected a whole number >= 1"),
        ("rollout", "workers", 0, "rollout.workers is 0, expected a whole number >= 1"),
        ("rollout", "workers", None, "rollout.workers is None, expected a whole number >= 1"),
        ("rollout", "tokens_per_s_alone", 0, "rollout.tokens_per_s_alone is 0, expected a number > 0"),
        ("rollout", "tokens_per_s_alone", float("nan"), "rollout.tokens_per_s_alone is nan, expected a number > 0"),
        ("rollout", "restart_s", float("inf"), "rollout.restart_s is inf, expected a number >= 0"),
        ("rollout", "tokens_per_s_full", 3, "rollout.tokens_per_s_full: what full is has to be said by rollout.slots"),
        ("learner", "fixed_s", -1, "learner.fixed_s is -1, expected a number >= 0"),
        ("publication", "recompute_kv", 1, "publication.recompute_kv is 1, expected true or false"),
        ("publication", "recompute_kv", True, "publication.recompute_kv takes no time without rollout.prefill_tok"),
        ("lengths", "histogram", {10: 1}, "lengths: give median_tokens or histogram, one of them"),
        ("lengths", "histogram", {"10": 1}, "lengths.histogram is {'10': 1}, expected upper bounds in tokens with"),
        ("lengths", "histogram", {10: 0}, "lengths.histogram is {10: 0}, expected upper bounds in tokens with"),
        ("", "batch", 3, "batch is 3, expected a section with keys"),
    ],
)
def test_a_mistake_is_one_line(
    section: str, key: str, value: object, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = {name: dict(part) if isinstance(part, dict) else part for name, part in SMALLEST.items()}
    (loaded.setdefault(section, {}) if section else loaded)[key] = value  # type: ignore[index]
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump(loaded))
    assert script["main"](["--cluster", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {told}") and error.count("\n") == 1


def test_what_is_no_cluster_is_told(tmp_path: Path) -> None:
    for text, told in (("[", "is not valid YAML"), ("", "the file is None, expected a section with keys")):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_cluster(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=r"cannot read the cluster .*No such file"):
        read_cluster(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match=r"key 'rollout.workers' is missing"):
        parse_cluster({**SMALLEST, "rollout": {"tokens_per_s_alone": 1}})


def test_full_engines_lie_between_one_response_and_all_at_its_speed() -> None:
    rollout = {"workers": 1, "tokens_per_s_alone": 10, "slots": 4, "tokens_per_s_full": 40}
    assert parse_cluster({**SMALLEST, "rollout": rollout}).rollout.tokens_per_s_full == 40
    for wrong in (9, 41):
        with pytest.raises(ConfigError, match="expected 10 to 40"):
            parse_cluster({**SMALLEST, "rollout": {**rollout, "tokens_per_s_full": wrong}})


def test_lengths() -> None:
    class Fixed:
        """``random`` and ``gauss`` give the numbers that they are told."""

        def __init__(self, *numbers: float) -> None:
            self.numbers = list(numbers)

        def random(self) -> float:
            return self.numbers.pop(0)

        gauss = lambda self, mean, deviation: self.random()  # noqa: E731

    def draw(lengths: Lengths, *numbers: float) -> int:
        return sampler(lengths, Fixed(*numbers))()  # type: ignore[arg-type]

    log_normal = Lengths(median_tokens=100, sigma=1.0, max_tokens=250)
    assert [draw(log_normal, z) for z in (0.0, -1.0, 0.5, 3.0, -9.0)] == [100, 37, 165, 250, 1]
    histogram = Lengths(histogram={4: 1.0, 8: 3.0})
    cases = ((0.1, 0.0), (0.2, 0.99), (0.3, 0.0), (0.9, 0.99))
    assert [draw(histogram, *case) for case in cases] == [1, 4, 5, 8]
    assert mean_length(histogram) == pytest.approx(0.25 * 2.5 + 0.75 * 6.5, rel=0.01)
    # exp(sigma² / 2) times the median
    assert mean_length(Lengths(median_tokens=1000, sigma=1.0)) == pytest.approx(1648.7, rel=0.02)


def pair(bound: int, lead: int, speed: float, age: float) -> Pair:
    return Pair(bound, lead, speed, speed, speed, speed, age, bound, {0: 1, bound: 3}, 0.1, 0.0, 0.2, 0.0, {})


def test_the_recommended_pair_is_the_youngest_that_is_fast_enough() -> None:
    pairs = [
        pair(0, 0, 50, 0.0),
        pair(1, 1, 94.9, 0.9),
        pair(2, 2, 95.1, 1.96),
        pair(4, 2, 99, 1.99),
        pair(8, 8, 100, 5),
    ]
    assert recommend(pairs) is pairs[2], "ages that differ by less than a tenth: the smaller S"
    assert recommend([*pairs, pair(4, 1, 96, 1.0)]).lead == 1
    assert recommend(pairs[:1]) is pairs[0]
    assert [(p.max_staleness, p.lead) for p in pareto([*pairs, pair(6, 6, 98, 4.0)])] == [
        (0, 0), (1, 1), (2, 2), (4, 2), (8, 8),
    ]  # fmt: skip
    cluster = parse_cluster(SMALLEST)
    shown = sweep.describe(cluster, pairs)
    assert "take buffer.max_staleness=2 buffer.lead=2: 95% of the best" in shown and "(ages 0: 25% · 2: 75%)" in shown


def test_demands_fail_where_they_are_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = lambda text: None  # noqa: E731
    _, checks = demands.overlaps(((2, 1), (2, 2)), versions=6, seeds=1, tell=quiet)
    assert [check.text.split(":")[0] for check in checks] == ["S = 2, L = 2"]
    share = float(checks[0].text.split("takes ")[1].split(" ")[0])
    assert 0.8 < share < 1 and checks[0].holds == (share >= 0.95)
    slowed = replace(demands.scaled(64), learner=demands.Learner(fixed_s=1e6))
    scaled = demands.scaled
    monkeypatch.setattr(demands, "scaled", lambda workers: slowed if workers == 65 else scaled(workers))
    rows, checks = demands.scaling((64, 65), versions=2, warm_up=0, seeds=1, tell=quiet)
    assert [row.workers for row in rows] == [64, 65] and rows[0].groups_per_s_per_worker > 0
    assert [check.holds for check in checks] == [False] and "among 65 by that among 64: 0.00" in checks[0].text
    _, checks = tails.tails([(2, 1.5, 1)], 3, quiet)
    assert len(checks) == 2 and all("S = 8, L = 2" in check.text for check in checks)


def test_a_quick_run_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "sim.json"), "--png", str(tmp_path / "sim.png")]
    assert script["main"](["--quick", *files, f"cluster={CLUSTERS[1]}"]) == 0
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "sim.json").read_text())
    plane = written["sweep"]
    assert plane["cluster"]["name"] in out
    assert [(p["max_staleness"], p["lead"]) for p in plane["pairs"]] == [(0, 0), (1, 1), (2, 1), (2, 2)]
    assert f"take buffer.max_staleness={plane['recommended']['max_staleness']} " in out
    assert (tmp_path / "sim.png").read_bytes().startswith(b"\x89PNG")
    rows, checks = script["run_demands"](script["QUICK"])
    assert {name: len(part) for name, part in rows.items()} == {"heavy_tails": 15, "overlap": 6, "scaling": 2}
    assert checks == [] and "weak scaling" in capsys.readouterr().out


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = script["main"].__globals__
    monkeypatch.setitem(names, "run_sweep", lambda cluster, sizes, png: {})
    for holds, code in ((True, 0), (False, 1)):
        monkeypatch.setitem(names, "run_demands", lambda sizes, holds=holds: ({}, [demands.Check("it", holds)]))
        assert script["main"](["--quick"]) == code
        assert ("holds  it" if holds else "FAILS  it") in capsys.readouterr().out
    with pytest.raises(SystemExit):
        script["main"](["--json", str(tmp_path / "nowhere" / "x.json")])
    assert "--json: no folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        script["main"](["--seeds", "0"])
    assert "--seeds is 0, expected at least 1" in capsys.readouterr().err
