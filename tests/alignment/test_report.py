"""The report: it shows what lies in a run's folder, whatever the method, and nothing from elsewhere."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignment import report
from alignment.report import plots, write
from alignment.report.plots import Series, limits, path, series, shown, smoothed, thinned, ticks

VOID = {"meta", "path", "rect", "circle", "wbr"}


class Page(HTMLParser):
    """A page's headings, plots, tables and text; complains where tags do not match or ids come twice."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        assert self.open == []
        ids = [attrs["id"] for _, attrs in self.tags if "id" in attrs]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, tag: str) -> list[str]:
        """The texts right inside the tags of a name."""
        return [text for where, text in self.texts if where == tag]

    @property
    def text(self) -> str:
        return " ".join(text for where, text in self.texts if where != "style")

    @property
    def titles(self) -> list[str]:
        """What each plot says to a screen reader."""
        return [attrs["aria-label"] or "" for tag, attrs in self.tags if tag == "svg" and "aria-label" in attrs]


def rows(folder: Path, name: str, lines: list[dict[str, object]], more: str = "") -> None:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + more)


def page(folder: Path, title: str = "A run") -> Page:
    return Page(write(folder, title).read_text())


def numbers(count: int, **metrics) -> list[dict[str, object]]:
    """Rows of updates 1, 2, ...; metrics are functions of the update, None leaves one out."""
    made = []
    for n in range(1, count + 1):
        found = {name.replace("__", "/"): f(n) for name, f in metrics.items()}
        made.append({"step": n, "time": 1.7e9 + n} | {name: v for name, v in found.items() if v is not None})
    return made


# --- the page


def test_an_empty_folder_has_a_page_that_says_so(tmp_path):
    assert "the run has not finished an update" in page(tmp_path).text


def test_the_page_is_whole_by_itself_and_in_one_file(tmp_path):
    rows(tmp_path, "metrics.jsonl", numbers(3, loss=lambda n: 1 / n))
    html = write(tmp_path, "A run").read_text()
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|https?:|src=", html)
    assert "default-src 'none'" in html and "prefers-color-scheme:dark" in html and 'name="viewport"' in html
    assert [one.name for one in tmp_path.iterdir() if "report" in one.name] == ["report.html"]


@pytest.mark.parametrize(
    ("metrics", "plots"),
    [
        (
            ["loss", "entropy", "grad", "lr", "per_second", "test/loss", "test/perplexity"],
            ["Loss", "Perplexity", "Entropy", "Learning rate", "Gradient norm", "Throughput"],
        ),
        (["loss", "test/accuracy", "test/accuracy/hr", "test/ece"], ["Loss", "Accuracy", "Calibration error"]),
        (["loss", "accuracy", "margin", "gain/chosen", "gain/rejected", "test/gain/chosen", "test/margin"],
         ["Loss", "Accuracy", "Margin", "Gain"]),
        (["loss", "accuracy", "baseline", "gain", "test/gain", "count"], ["Loss", "Accuracy", "Gain", "count"]),
        (
            ["reward/mean", "reward/std", "rewards/kind", "signs/held_out", "test/score", "kl/reply", "kl/k1", "kl/k3",
             "value/explained", "value/loss", "constraint/kind",
             "policy/loss", "policy/grad", "value/grad", "reply/tokens", "tokens/s", "lr"],
            ["Reward", "KL to the reference", "KL estimates", "Constraints", "Policy loss", "Length",
             "Explained variance", "Value loss", "Learning rate", "Gradient norm", "Throughput"],
        ),
        (["odd/one", "odd/two", "new"], ["new", "odd"]),
    ],
)  # fmt: skip
def test_every_method_has_the_plots_of_the_metrics_that_are_there(tmp_path, metrics, plots):
    rows(tmp_path, "metrics.jsonl", [{"step": n, **dict.fromkeys(metrics, n / 10)} for n in (1, 2, 3)])
    found = page(tmp_path)
    assert [one.partition(":")[0] for one in found.titles] == plots
    named = "".join(found.of("code"))
    assert [one for one in metrics if one not in named and one != "reward/std"] == []  # which is the band of another


def test_first_and_last_values_are_told_beside_the_plot(tmp_path):
    rows(tmp_path, "metrics.jsonl", numbers(3, loss=lambda n: [2.5, 0.125, 0.5][n - 1]))
    found = page(tmp_path)
    start = found.of("th").index("most")
    assert found.of("th")[start - 4 : start + 1] == ["metric", "first", "last", "least", "most"]
    assert found.of("td")[:4] == ["2.50", "0.500", "0.125", "2.50"]
    assert found.titles == ["Loss: loss from 2.50 to 0.500, updates 1 to 3"]


def test_several_rewards_share_a_plot_with_a_legend_and_the_mean_has_a_band(tmp_path):
    made = numbers(3, reward__mean=float, reward__std=lambda n: 0.5, reward__kind=lambda n: 2.0 * n)
    rows(tmp_path, "metrics.jsonl", made)
    found = page(tmp_path)
    assert len(found.titles) == 1
    classes = [attrs.get("class") for tag, attrs in found.tags if tag == "path"]
    assert classes.count("band s0") == 1 and {"line s0", "line s1"} <= set(classes) and "line s2" not in classes
    legend = [attrs["class"] for tag, attrs in found.tags if tag == "i"]
    assert legend == ["s0", "s1"]


@pytest.mark.parametrize("key", ["target", "budget"])
def test_the_kl_has_the_line_of_its_budget(tmp_path, key):
    rows(tmp_path, "metrics.jsonl", numbers(3, kl__reply=float))
    (tmp_path / "recipe.toml").write_text(f"[settings.kl]\n{key} = 4.0\n")
    found = page(tmp_path)
    assert f"{key} 4" in found.of("text")
    assert "level" in [attrs.get("class") for tag, attrs in found.tags if tag == "path"]
    (tmp_path / "recipe.toml").write_text(f"[settings.kl]\n{key} = 400.0\n")
    found = page(tmp_path)
    assert f"The {key} of 400 is far above the plot." in found.text
    assert "level" not in [attrs.get("class") for tag, attrs in found.tags if tag == "path"]


def test_a_recipe_is_shown_as_it_is_even_when_it_is_no_toml(tmp_path):
    (tmp_path / "recipe.toml").write_text("kl.target = <b>\n")
    rows(tmp_path, "metrics.jsonl", numbers(2, kl__reply=float))
    assert page(tmp_path).of("pre") == ["kl.target = <b>\n"]


def test_titles_metrics_and_texts_are_escaped(tmp_path):
    bad = "<b onclick='x'>\"&"
    rows(tmp_path, "metrics.jsonl", [{"step": 1, bad: 1.0}])
    rows(
        tmp_path, "samples.jsonl", [{"step": 1, "prompt": bad, "before": bad, "after": [{"role": bad, "content": bad}]}]
    )
    (tmp_path / "evaluation.json").write_text(json.dumps({bad: {"value": 1.0}}))
    (tmp_path / "data.json").write_text(json.dumps({bad: bad}))
    (tmp_path / "calibration.json").write_text(json.dumps({bad: CALIBRATION | {bad: 1}}))
    found = page(tmp_path, bad)
    assert not [1 for tag, attrs in found.tags if tag == "b" and attrs]
    assert found.of("h1") == [bad] and found.text.count(bad) >= 9


# --- reading


def test_a_line_that_a_crash_has_cut_is_skipped_and_others_are_told(tmp_path):
    made = numbers(4, loss=float)
    text = [json.dumps(line) for line in made]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([*text[:2], '{"step": 9,', "", "[1]", *text[2:], '{"step": 5, "lo'])
    )
    found = report.read(tmp_path)
    assert [row["step"] for row in found.metrics] == [1, 2, 3, 4]
    assert found.troubles == ["metrics.jsonl: 2 of its lines cannot be read and were left out (line 3, 5)."]
    assert found.troubles[0] in page(tmp_path).text


def test_a_crash_within_a_character_is_skipped(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes('{"step": 1, "prompt": "a"}\n{"step": 2, "prompt": "ü'.encode()[:-1])
    found = report.read(tmp_path)
    assert len(found.samples) == 1 and not found.troubles


def test_the_later_row_of_an_update_counts(tmp_path):
    rows(tmp_path, "metrics.jsonl", [{"step": 1, "loss": 5}, {"step": 2, "loss": 4}, {"step": 1, "loss": 3}])
    assert [row["loss"] for row in report.read(tmp_path).metrics] == [3, 4]


def test_other_files_that_are_broken_are_told(tmp_path):
    (tmp_path / "calibration.json").write_text("{")
    assert "calibration.json is not JSON and was left out" in page(tmp_path).text
    for odd in ("[]", "3", '{"bins": 3}', '{"bins": [{"low": 0}]}', '{"a": {"bins": [3]}}', "null"):
        for name in ("calibration", "evaluation", "data"):
            (tmp_path / f"{name}.json").write_text(odd)
        page(tmp_path)


# --- lines


def test_what_is_no_number_leaves_a_gap():
    found = series([{"step": 1, "a": 1}, {"step": 2, "a": None}, {"step": 3, "a": math.nan}, {"step": 4, "a": 2}], "a")
    assert found.points == [(1, 1), (2, None), (3, None), (4, 2)]
    assert found.values == [1, 2]


def test_a_metric_of_every_tenth_update_is_a_line_and_what_lacks_in_between_is_a_gap():
    made = [{"step": n, "all": n} | ({"some": n} if n % 10 == 0 else {}) for n in range(1, 51)]
    assert series(made, "some").points == [(10, 10), (20, 20), (30, 30), (40, 40), (50, 50)]
    del made[29]["some"], made[4]["all"]
    assert series(made, "some").points == [(10, 10), (20, 20), (30, None), (40, 40), (50, 50)]
    assert series(made, "all").points[3:6] == [(4, 4), (5, None), (6, 6)]


def test_a_long_line_is_thinned_with_its_peaks_and_gaps_kept():
    points = [(float(n), math.sin(n / 50)) for n in range(20_000)]
    points[7777], points[8888], points[9999] = (7777.0, 99.0), (8888.0, -99.0), (9999.0, None)
    kept = thinned(points)
    assert len(kept) <= 600 and kept == sorted(set(kept))
    assert {7777, 8888, 9999} <= set(kept)
    assert thinned(points[:600]) == list(range(600))


def test_a_long_run_makes_a_page_of_bounded_size(tmp_path):
    rows(tmp_path, "metrics.jsonl", numbers(5000, loss=lambda n: math.sin(n) + 5, test__loss=lambda n: float(n)))
    assert write(tmp_path, "Long").stat().st_size < 100_000


def test_a_moving_mean_keeps_gaps_and_no_spike_moves_it():
    flat = [(float(n), 1.0) for n in range(100)]
    assert smoothed(flat) == flat
    spiked = [*flat[:50], (50.0, 1e6), (51.0, None), *flat[52:]]
    found = dict(smoothed(spiked))
    assert found[50.0] == 1.0 and found[51.0] is None
    assert len(smoothed([(float(n), 1.0) for n in range(10_000)])) <= 400


def test_a_line_is_broken_at_gaps_and_a_lone_point_is_a_dot():
    x = plots.Scale(0, 4, 40)
    y = plots.Scale(0, 1, 10, up=True)
    assert path([(0, 0), (1, 1), (2, None), (3, 0.5), (4, None)], x, y) == "M0 10L10 0M30 5h0"


def test_a_band_is_broken_at_gaps():
    x, y = plots.Scale(0, 4, 40), plots.Scale(0, 10, 10, up=True)
    one = Series("a", [(0, 5), (1, 6), (2, None), (3, 5)], [1, 2, None, 0])
    assert plots.band(one, [0, 1, 2, 3], x, y) == "M0 4L10 2L10 6L0 6ZM30 5L30 5Z"


def test_one_spike_does_not_flatten_the_rest_and_is_told(tmp_path):
    values = [*(1 + n % 7 / 10 for n in range(99)), 1e6]
    low, high = limits(values)
    assert 0.9 < low < 1 and 1.6 < high < 1.7
    assert limits([0, 1e6]) == (-6e4, 1.06e6)  # two values are no spike
    rows(tmp_path, "metrics.jsonl", numbers(100, loss=lambda n: values[n - 1]))
    assert "One value is above the plot, up to 1M." in page(tmp_path).text.replace("1.00M", "1M")


def test_axes_have_round_numbers():
    assert ticks(0, 1) == (pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]), 0.2)
    assert ticks(-3, 17) == ([0, 5, 10, 15], 5)
    assert ticks(1e-5, 3e-5)[0] == pytest.approx([1e-5, 1.5e-5, 2e-5, 2.5e-5, 3e-5])
    assert limits([2.0, 2.0]) == (1.8, 2.2) and limits([0.0]) == (-1, 1)
    assert limits([3, 5], low=0) == (0, 5.3) and limits([0.2, 0.4], 0, 1) == (0, 1)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (3, "3"), (-12, "−12"), (0.5, "0.500"), (1.23456, "1.23"), (12.3456, "12.3"),
        (123.456, "123"), (1234.56, "1230"), (1234, "1234"), (9999.9, "10.0k"), (12345, "12.3k"), (-1.5e6, "−1.50M"),
        (0.0012345, "0.00123"), (0.00001234, "1.23×10⁻⁵"), (1e-5, "1×10⁻⁵"), (-2.5e-7, "−2.5×10⁻⁷"),
        (1e15, "1×10¹⁵"), (0.9996, "1.00"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value, text):
    assert shown(value) == text


@pytest.mark.parametrize("value", [1.7e308, -1.7e308, 1e140, 1e-140, 5e-324, 1e16, 10**400])
def test_no_size_of_a_number_breaks_the_page(tmp_path, value):
    rows(tmp_path, "metrics.jsonl", numbers(30, loss=lambda n: value if n == 3 else n / 7, kl__reply=lambda n: value))
    html = write(tmp_path, "Diverged").read_text()
    assert "nan" not in html and not re.search(r"\binf\b", html)


def test_a_run_of_one_update_has_plots(tmp_path):
    rows(tmp_path, "metrics.jsonl", [{"step": 1, "loss": 2.0, "reward/mean": 1.0, "reward/std": 0.5}])
    assert len(page(tmp_path).titles) == 2


# --- samples, calibration, results, data


def test_samples_show_before_and_after_with_their_rewards_the_last_update_first(tmp_path):
    made = [
        {"step": n, "prompt": f"p{n}", "before": "b", "after": f"a{n}", "reward_before": -0.5, "reward_after": n / 2}
        for n in (1, 3)
    ]
    rows(tmp_path, "samples.jsonl", made)
    text = page(tmp_path).text
    assert "After update 3" in text and text.index("p3") < text.index("Earlier samples") < text.index("p1")
    assert "reward −0.500" in text and "reward 1.50" in text


def test_samples_may_be_conversations_or_lack_what_was_said_before(tmp_path):
    said = [{"role": "user", "content": "Hello"}]
    rows(tmp_path, "samples.jsonl", [{"step": 1, "prompt": said, "reply": "Hi", "reward": 2, "odd": None, "after": ""}])
    found = page(tmp_path)
    assert found.of("th") == ["prompt", "after", "reply", "reward", "odd"]
    assert {"user", "Hello", "Hi", "2", "–", "empty"} <= {text.strip() for _, text in found.texts}


def test_of_many_samples_some_are_shown_and_long_ones_scroll(tmp_path):
    rows(tmp_path, "samples.jsonl", [{"step": 1, "prompt": f"[{n}]", "after": "word " * 1000} for n in range(90)])
    found = page(tmp_path)
    assert "24 of 90" in found.text and "[23]" in found.text and "[24]" not in found.text
    assert [attrs.get("tabindex") for _, attrs in found.tags if attrs.get("class") == "long"] == ["0"] * 24


CALIBRATION = {
    "bins": [
        {"low": 0.5, "high": 0.75, "count": 30, "confidence": 0.6, "accuracy": 0.55},
        {"low": 0.75, "high": 1.0, "count": 10, "confidence": 0.9, "accuracy": 0.95},
        {"low": 1.0, "high": 1.0, "count": 0, "confidence": None, "accuracy": None},
    ],
    "ece": 0.05,
    "temperature": 1.25,
}


def test_calibration_is_a_reliability_diagram_with_its_table(tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps(CALIBRATION))
    found = page(tmp_path)
    assert found.titles == ["Reliability"]
    assert found.of("dt") == ["ece", "temperature"] and found.of("dd") == ["0.0500", "1.25"]
    assert found.of("td") == ["0.600", "0.550", "30", "0.900", "0.950", "10"]
    bars = [attrs for tag, attrs in found.tags if tag == "rect" and attrs.get("class") == "bar"]
    # Accuracy .55 of an axis from .5 to 1 is a tenth of its height of 250.
    assert [float(one["height"] or 0) for one in bars] == pytest.approx([25, 225])


def test_several_objectives_have_a_diagram_each(tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps({"helpful": CALIBRATION, "harmless": CALIBRATION, "n": 3}))
    assert page(tmp_path).titles == ["Reliability of helpful", "Reliability of harmless"]


def test_results_are_a_table_with_intervals(tmp_path):
    results = {"wins": {"value": 0.634, "low": 0.6, "high": 0.67, "n": 1700}, "kl": {"value": 5.4}, "plain": 0.25}
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    found = page(tmp_path)
    assert [text for text in found.of("b") if text.strip()] == ["0.634", "5.40", "0.250"]
    assert found.of("td") == ["0.600 to 0.670", "1,700", "–", "–", "–", "–"]
    assert [attrs["class"] for tag, attrs in found.tags if tag == "svg"] == ["whisker"]


def test_results_within_others_have_the_names_of_all(tmp_path):
    one = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    results = {"members": [one, one], "slices": {"hr": one}, "like": {"within": 0.1, "accuracy": one}, "text": "x"}
    (tmp_path / "evaluation.json").write_text(json.dumps(results))
    heads = "".join(page(tmp_path).of("th")).replace("measurevalueintervaln", "")
    assert heads == "members/1members/2slices/hrlike/withinlike/accuracy"


@pytest.mark.parametrize(
    "data",
    [
        {"a.jsonl": "f" * 64, "b.jsonl": {"fingerprint": "e" * 64, "rows": 1234, "splits": {"train": 9, "test": 1}}},
        [{"path": "a.jsonl", "fingerprint": "f" * 64}, {"path": "b.jsonl", "fingerprint": "e" * 64, "rows": 1234}],
    ],
)
def test_the_data_is_listed_with_its_fingerprints(tmp_path, data):
    (tmp_path / "data.json").write_text(json.dumps(data))
    text = page(tmp_path).text
    assert all(one in text for one in ("a.jsonl", "b.jsonl", "f" * 64, "e" * 64, "1,234"))
