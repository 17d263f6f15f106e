"""The planner of one GPU: golden numbers, a brute force of its own making, reasons, differences, pictures."""

from __future__ import annotations

import dataclasses
import itertools
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator

import pytest

from forja.errors import BadInput, Refused
from forja.mig import bench, picture, planner
from forja.mig.tables import ENGINES, GPUS, Gpu, gpu

PLAIN = {8: ("1g", "2g", "3g", "4g", "7g"), 4: ("1g", "2g", "4g"), 12: ("1g", "2g", "4g")}


def names(one: Gpu, *, double: bool = False) -> list[str]:
    """Profiles without attributes; with the 1g of double memory, or without it."""
    plain = [n for n in one.profiles if not set(n) & {"+", "-"}]
    twice = [n for n in plain if n.startswith("1g.") and one.profiles[n].size == 2 and one.units == 8]
    return plain if double else [n for n in plain if n not in twice]


def multisets(layouts: list[planner.Layout]) -> set[tuple[tuple[str, int], ...]]:
    return {tuple(layout.counts.items()) for layout in layouts}


@pytest.mark.parametrize("one", GPUS.values(), ids=lambda g: g.name)
def test_golden_numbers(one: Gpu) -> None:
    """NVIDIA's nineteen configurations of the eight-slice family, and what a GPU of four 1g has."""
    chosen = names(one)
    assert tuple(n[:2] for n in chosen) == PLAIN[one.units]
    placed, full = list(planner.layouts(one, chosen)), list(planner.maximal(one, chosen))
    golden = (297, 19, 37, 14) if one.units == 8 else (25, 5, 9, 4)
    assert (len(placed), len(full), len(multisets(placed)), len(multisets(full))) == golden


@pytest.mark.parametrize("one", [g for g in GPUS.values() if g.units == 8], ids=lambda g: g.name)
def test_golden_numbers_with_double_memory(one: Gpu) -> None:
    chosen = names(one, double=True)
    placed, full = list(planner.layouts(one, chosen)), list(planner.maximal(one, chosen))
    assert (len(placed), len(full), len(multisets(placed)), len(multisets(full))) == (722, 78, 77, 38)


# Written out again from nvidia-smi's output, so that a slip in the tables shows: profile -> (starts, size, most).
SMI = {
    "a100-40": {
        "1g.5gb": ({0, 1, 2, 3, 4, 5, 6}, 1, 7), "1g.5gb+me": ({0, 1, 2, 3, 4, 5, 6}, 1, 1), "1g.10gb": ({0, 2, 4, 6}, 2, 4),
        "2g.10gb": ({0, 2, 4}, 2, 3), "3g.20gb": ({0, 4}, 4, 2), "4g.20gb": ({0}, 4, 1), "7g.40gb": ({0}, 8, 1),
    },
    "a30": {
        "1g.6gb": ({0, 1, 2, 3}, 1, 4), "1g.6gb+me": ({0, 1, 2, 3}, 1, 1), "2g.12gb": ({0, 2}, 2, 2), "2g.12gb+me": ({0, 2}, 2, 1),
        "4g.24gb": ({0}, 4, 1),
    },
}  # fmt: skip
ONLY_ONE_JPEG = {"1g.6gb+me", "2g.12gb+me", "4g.24gb"}


def brute(name: str) -> Iterator[frozenset[tuple[str, int]]]:
    """All legal sets of placements by trying every subset, with none of the planner's code."""
    table = SMI[name]
    everywhere = [(p, s, frozenset(range(s, s + size))) for p, (starts, size, _) in table.items() for s in sorted(starts)]
    widest = max(most for _, _, most in table.values())
    for size in range(1, widest + 1):
        for chosen in itertools.combinations(everywhere, size):
            taken = [cell for _, _, cells in chosen for cell in cells]
            counts = Counter(p for p, _, _ in chosen)
            media = sum(counts[p] for p in ONLY_ONE_JPEG) <= 1 or name != "a30"
            if len(taken) == len(set(taken)) and all(n <= table[p][2] for p, n in counts.items()) and media:
                yield frozenset((p, s) for p, s, _ in chosen)


def test_brute_force_agrees_on_a30() -> None:
    ours = {frozenset((i.profile, i.start) for i in layout.instances) for layout in planner.layouts(gpu("a30"))}
    assert ours == set(brute("a30"))


def test_brute_force_agrees_on_which_sets_fit_on_a100() -> None:
    """Every multiset up to two instances beyond what fits: the planner says yes exactly where some placement is legal."""
    table = SMI["a100-40"]
    assert {n: (set(p.starts), p.size, p.most) for n, p in gpu("a100-40").profiles.items()} == table
    legal: set[tuple[tuple[str, int], ...]] = set()

    def place(left: list[str], taken: frozenset[int]) -> bool:
        if not left:
            return True
        starts, size, _ = table[left[0]]
        cells = [frozenset(range(s, s + size)) for s in starts]
        return any(place(left[1:], taken | c) for c in cells if not c & taken)

    ranges = [range(min(most, 3) + 2) for _, _, most in table.values()]
    for numbers in itertools.product(*ranges):
        wanted = dict(zip(table, numbers, strict=True))
        units = sum(table[p][1] * n for p, n in wanted.items())
        expect = (
            units <= 8
            and all(n <= table[p][2] for p, n in wanted.items())
            and place([p for p, n in wanted.items() for _ in range(n)], frozenset())
        )
        fit = planner.fits(gpu("a100-40"), wanted)
        assert (fit.layout is not None) == expect, wanted
        assert bool(fit.reason) == (not expect)
        if fit.layout is not None:
            assert {n: c for n, c in wanted.items() if c} == fit.layout.counts
            assert planner.placed(gpu("a100-40"), fit.layout.pairs) == fit.layout
            legal.add(tuple(fit.layout.counts.items()))
    assert len(legal) > 60


@pytest.mark.parametrize(
    ("name", "wanted", "said"),
    [
        ("h100-80", {"3g.40gb": 3}, "at most 2 of 3g.40gb"),
        ("h100-80", {"1g.10gb+me": 2}, "at most 1 of 1g.10gb+me"),
        ("h100-80", {"3g.40gb": 2, "1g.10gb": 1}, "9 memory slices"),
        ("a100-80", {"4g.40gb": 1, "1g.10gb": 4}, "1 x 4g.40gb and 4 x 1g.10gb find no place together"),
        ("a100-80", {"3g.40gb": 1, "2g.20gb": 1, "1g.20gb": 1, "1g.10gb": 0}, ""),
        ("b200", {"2g.45gb": 2, "4g.90gb": 1}, "find no place together"),
        ("a30", {"1g.6gb+me": 1, "2g.12gb+me": 1}, "2 JPEG, and a30 has 1"),
        ("a30", {"2g.12gb+me": 1, "2g.12gb": 1}, ""),
        ("rtx-pro-6000", {"1g.24gb+me.all": 1, "1g.24gb": 1}, "NVDEC"),
        ("rtx-pro-6000", {"1g.24gb+me.all": 1, "1g.24gb-me": 3}, ""),
        ("rtx-pro-6000", {"2g.48gb+me.all": 1, "2g.48gb-me": 1}, ""),
    ],
)  # fmt: skip
def test_reasons(name: str, wanted: dict[str, int], said: str) -> None:
    fit = planner.fits(gpu(name), wanted)
    assert (fit.layout is None) == bool(said)
    assert said in fit.reason
    if said:
        with pytest.raises(Refused, match=name):
            planner.plan(gpu(name), wanted)


@pytest.mark.parametrize("one", GPUS.values(), ids=lambda g: g.name)
def test_engines_never_bind_beyond_the_known_families(one: Gpu) -> None:
    """Profiles without attributes are bound by slices alone, and no engine of the tables has a name of its own."""
    full = one.profiles[one.full].engines
    for profile in one.profiles.values():
        assert set(profile.engines) <= set(ENGINES)
        assert all(count <= full.get(engine, count) for engine, count in profile.engines.items())
        assert all(start + profile.size <= one.units for start in profile.starts)
    bare = dataclasses.replace(one, profiles={n: dataclasses.replace(p, engines={}) for n, p in one.profiles.items()})
    by_slices = [x.instances for x in planner.layouts(bare, names(one, double=True))]
    assert [x.instances for x in planner.layouts(one, names(one, double=True))] == by_slices


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gpu("h101"), "allowed: a100-40"),
        (lambda: planner.fits(gpu("a30"), {"1g.5gb": 1}), "1g.6gb"),
        (lambda: planner.fits(gpu("a30"), {"1g.6gb": -1}), "0 or more"),
        (lambda: planner.placed(gpu("a30"), ["2g.12gb:1"]), "0, 2"),
        (lambda: planner.placed(gpu("a30"), ["2g.12gb"]), "PROFILE:START"),
        (lambda: planner.placed(gpu("a30"), ["2g.12gb:0", "1g.6gb:1"]), "overlap"),
        (lambda: planner.placed(gpu("a100-40"), ["3g.20gb:0", "4g.20gb:0"]), "overlap"),
        (lambda: planner.placed(gpu("a30"), ["1g.6gb+me:0", "1g.6gb+me:1"]), "at most 1"),
    ],
)
def test_bad_input(call: object, said: str) -> None:
    assert callable(call)
    with pytest.raises(BadInput, match=said):
        call()


@pytest.mark.parametrize(
    ("current", "wanted", "kept"),
    [
        (["3g.40gb:0", "2g.20gb:4"], {"3g.40gb": 1, "1g.10gb": 3}, {"3g.40gb:0"}),
        (["3g.40gb:0", "2g.20gb:4"], {"4g.40gb": 1, "2g.20gb": 1}, {"2g.20gb:4"}),
        (["1g.10gb:0", "1g.10gb:3", "1g.10gb:6"], {"3g.40gb": 1, "1g.10gb": 2}, {"1g.10gb:0", "1g.10gb:3"}),
        (["1g.10gb:0", "1g.10gb:4"], {"3g.40gb": 2}, set()),
        (["1g.10gb:2"], {"1g.10gb": 7}, {"1g.10gb:2"}),
        ([], {"7g.80gb": 1}, set()),
        (["7g.80gb:0"], {}, set()),
        (["2g.20gb:0", "2g.20gb:4"], {"2g.20gb": 2}, {"2g.20gb:0", "2g.20gb:4"}),
    ],
)
def test_difference_keeps_what_can_stay(current: list[str], wanted: dict[str, int], kept: set[str]) -> None:
    one = gpu("h100-80")
    now = planner.placed(one, current)
    found = planner.difference(now, wanted)
    assert set(map(str, found.keep)) == kept
    assert found.layout.counts == wanted
    assert set(found.keep) | set(found.destroy) == set(now.instances)
    assert planner.placed(one, [str(i) for i in (*found.keep, *found.create)]) == found.layout


def test_no_placement_keeps_more() -> None:
    """Against all placements of all wanted sets of an A30."""
    one = gpu("a30")
    every = list(planner.layouts(one))
    for now, wanted in itertools.product(every, {tuple(x.counts.items()) for x in every}):
        best = max(len(set(now.instances) & set(x.instances)) for x in every if tuple(x.counts.items()) == wanted)
        assert len(planner.difference(now, dict(wanted)).keep) == best, (now, wanted)


def test_creation_order_begins_with_the_largest() -> None:
    layout = planner.plan(gpu("h100-80"), {"1g.10gb": 2, "2g.20gb": 1, "3g.40gb": 1})
    sizes = [layout.gpu.profiles[pair.rpartition(":")[0]].size for pair in layout.pairs]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("one", GPUS.values(), ids=lambda g: g.name)
def test_pictures_show_every_instance_at_its_place(one: Gpu) -> None:
    for layout in planner.maximal(one, names(one)):
        _, bar, text = picture.lines(layout)
        assert [i.profile for i in layout.instances] == text.split()
        assert bar.count("├") == bar.count("┤") == len(layout.instances)
        drawn = ET.fromstring(picture.svg("a <title> & more", [("GPU 0", layout)]))  # noqa: S314 - our own text
        words = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
        assert "a <title> & more" in words
        assert all(i.profile in words for i in layout.instances)
        boxes = [r for r in drawn.iter("{http://www.w3.org/2000/svg}rect") if (r.get("class") or "").startswith("s")]
        unit = 8 * picture.UNIT / one.units
        assert [(float(r.get("x") or 0) - 2 - picture.MARGIN) / unit for r in boxes] == [i.start for i in layout.instances]


def test_the_bench_measures_fresh_processes() -> None:
    found = bench.measure(worst=1, processes=1)
    assert found["plan_sets"] > 1000
    assert 0 < found["plan_ms"] <= found["plan_max_ms"]
    assert found["plan_case"].split(":")[0] in GPUS
