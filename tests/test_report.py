"""`gcpo report`: what a run records, the page made of it, and that page in a browser."""

import html.parser
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import SHORT_TEMPLATES, count_low, options, prompts, save_policy

from gcpo import GCPOConfig, GCPOTrainer
from gcpo.cli import main
from gcpo.reports import plots
from gcpo.reports.report import make_page
from gcpo.run.meter import AccountedGRPOTrainer
from gcpo.run.records import CONFIG, LOG, SAMPLES, Run, append_line, read_run

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
HOSTILE = "<script>document.title = 'taken'</script><b>&amp;"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of GCPO and one of GRPO; the former's last sample says something nasty."""
    from trl import GRPOConfig

    folder = tmp_path_factory.mktemp("runs")
    policy = save_policy(folder / "policy")
    shown = {"log_completions": True, "num_completions_to_print": 0, "max_steps": 3}
    common = options(folder, gradient_accumulation_steps=1, beta=0.04, **shown)
    causal = {"num_colliders": 2, "collider_max_completion_length": 6, **SHORT_TEMPLATES}
    for name, trainer, config in (("grpo", AccountedGRPOTrainer, GRPOConfig), ("gcpo", GCPOTrainer, GCPOConfig)):
        args = config(**{**common, **(causal if name == "gcpo" else {}), "output_dir": str(folder / "both" / name)})
        trainer(policy, count_low, args=args, train_dataset=prompts()).train()
    return folder / "both"


@pytest.fixture(scope="module")
def page(runs: Path) -> str:
    found = [read_run(runs / name) for name in ("grpo", "gcpo")]
    found[1].samples[-1]["candidates"][0]["text"] = HOSTILE
    return make_page(found, "A <title>")


def test_a_run_records_its_options_steps_and_samples(runs: Path) -> None:
    run = read_run(runs / "gcpo")
    assert [row["step"] for row in run.log] == [1, 2, 3]
    assert run.config["kappa"] == 0.06
    assert run.config["trainer"] == "GCPOTrainer"
    assert [group["step"] for group in run.samples] == [1, 2, 3]
    for group in run.samples:
        assert len(group["candidates"]) == 4
        assert len(group["colliders"]) == 2 and all(isinstance(text, str) for text in group["colliders"])
        for candidate in group["candidates"]:
            assert candidate["B"] == pytest.approx(candidate["A"] * candidate["upsilon"], rel=1e-5)
            assert candidate["rewards"]["count_low"] == count_low([candidate["text"]])[0]
        assert sum(candidate["A"] for candidate in group["candidates"]) == pytest.approx(0.0, abs=1e-4)
    mean = sum(candidate["upsilon"] for candidate in run.samples[0]["candidates"]) / 4
    assert mean == pytest.approx(run.log[0]["gcpo/upsilon/mean"], rel=1e-5)
    plain = read_run(runs / "grpo").samples[0]
    assert plain["colliders"] == []
    assert all(candidate["upsilon"] is None and candidate["A"] == candidate["B"] for candidate in plain["candidates"])


def test_another_run_in_the_same_folder_starts_over_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    policy = save_policy(tmp_path / "policy")
    settings = options(tmp_path, gradient_accumulation_steps=1, num_colliders=2, collider_max_completion_length=4)

    def train(resume: str | None = None, **changes: Any) -> list[int]:
        args = GCPOConfig(**{**settings, **SHORT_TEMPLATES, **changes})
        trainer = GCPOTrainer(policy, count_low, args=args, train_dataset=prompts())
        trainer.train(resume_from_checkpoint=resume)
        return [row["step"] for row in read_run(tmp_path / "out").log]

    assert train(max_steps=3, save_strategy="steps", save_steps=2) == [1, 2, 3]
    assert train(str(tmp_path / "out" / "checkpoint-2"), max_steps=4) == [1, 2, 3, 4]
    lines = (tmp_path / "out" / LOG).read_text().splitlines()
    assert len([line for line in lines if json.loads(line)["step"] == 3 and "reward" in line]) == 2
    assert train(max_steps=1) == [1]
    assert not (tmp_path / "out" / SAMPLES).exists()
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["max_steps"] == 1


def test_a_run_is_read_whatever_its_texts_hold(tmp_path: Path) -> None:
    group = {"prompt": "a\u2028b\x85c", "candidates": []}
    log = [json.dumps({"step": k, "reward": 0.5, "note": "\u2028"}, ensure_ascii=False) for k in (1, 2)]
    (tmp_path / LOG).write_bytes("\ufeff".encode() + "\n".join([*log, '{"step": 3, "rew']).encode())
    (tmp_path / SAMPLES).write_text(json.dumps({"step": 1, "groups": [group]}, ensure_ascii=False), encoding="utf-8")
    run = read_run(tmp_path)
    assert [row["step"] for row in run.log] == [1, 2]
    assert run.samples == [{"step": 1, **group}]


class Page(html.parser.HTMLParser):
    """What is in a page; `open` is not empty where tags do not match."""

    VOID = {"meta", "link", "br"}

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v and v[0] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.loads == ["data:,"]  # an icon that is not there, so that no browser asks for one
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) <= set(parsed.ids)
    assert parsed.tags.count("svg") == 9
    assert "script" not in parsed.tags
    for text in ("A &lt;title&gt;", "&lt;script&gt;document", "Colliders they led to", "count_low", "grpo", "gcpo"):
        assert text in page


def test_a_run_without_samples_or_metrics_still_makes_a_page() -> None:
    bare = Run("bare", log=[{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}])
    page = make_page([bare], "t")
    assert Page(page).tags.count("svg") >= 1
    assert "log_completions" in page
    with pytest.raises(ValueError, match="`runs` must not be empty"):
        make_page([], "t")


def test_the_picture_of_the_demo_is_tolerant_of_missing_metrics(tmp_path: Path) -> None:
    log = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": 0.6}]
    plots.save_overview([Run("GRPO", log=log), Run("GCPO", log=log)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_gcpo_has_its_color_and_grpo_is_gray_whatever_their_order(runs: Path) -> None:
    import matplotlib.pyplot as plt

    grpo, gcpo = (read_run(runs / name) for name in ("grpo", "gcpo"))
    for order in ([grpo, gcpo], [gcpo, grpo], [gcpo, replace(gcpo), grpo, replace(grpo)]):
        axis = plt.figure().add_subplot()
        plots.rewards(axis, order)
        colors = [line.get_color() for line in axis.get_lines()[1::2]]  # the smoothed ones
        assert len(set(colors)) == len(order)
        assert colors[order.index(gcpo)] == "tab:blue"
        assert colors[order.index(grpo)] == "tab:gray"
    plt.close("all")


@pytest.mark.parametrize(
    ("draw", "key"),
    [
        (plots.reference_kls, "kl"),
        (plots.causal_kls, "gcpo/kl_causal"),
        (plots.both_kls, "gcpo/kl_causal"),
        (plots.gradient_norms, "grad_norm"),
        (plots.step_times, "step_time"),
    ],
)
def test_an_axis_is_logarithmic_where_a_spike_flattens_the_rest(draw: plots.Draw, key: str) -> None:
    import matplotlib.pyplot as plt

    for spike, scale in ((0.3, "linear"), (17.8, "log")):
        values = [0.0, 1e-15, *[0.08, 0.1, 0.12] * 5, spike]
        axis = plt.figure().add_subplot()
        draw(axis, [Run("GCPO", log=[{"step": step, key: value} for step, value in enumerate(values)])])
        assert axis.get_yscale() == scale
        low, high = axis.get_ylim()
        assert low < 0.08 and high > spike
        assert scale == "linear" or low > 1e-5  # zero but for rounding takes no room
    plt.close("all")


def test_the_command(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert main(["report", str(runs), "--output", str(output), "--title", "Both"]) == 0
    assert "<title>Both</title>" in output.read_text()
    assert "2 runs" in capsys.readouterr().out
    one, *more = sorted(path for path in runs.iterdir() if path.is_dir())
    monkeypatch.chdir(tmp_path)
    output.unlink()
    # Without --output into the run's folder, or the folder of runs; of several runs, here.
    for given, wanted in (([runs], runs), ([one], one), ([one / LOG], one), ([one, *more], tmp_path)):
        assert main(["report", *map(str, given)]) == 0
        assert (wanted / "report.html").read_text().startswith("<!DOCTYPE html>")
        assert output.exists() == (wanted == tmp_path)
        (wanted / "report.html").unlink()
    append_line(tmp_path / "empty" / LOG, {"step": 1, "train_runtime": 1.0})
    for wrong, wanted in (
        (tmp_path / "nowhere", "must be the output folder of a run"),
        (tmp_path / "empty", "no training step"),
    ):
        assert main(["report", str(wrong), "--output", str(output)]) == 2
        assert wanted in capsys.readouterr().err


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: one of {', '.join(BROWSERS)}")
def test_the_page_in_a_browser(page: str, tmp_path: Path) -> None:
    # The page has no script of its own; this one says what the browser made of it.
    measure = """<script>window.addEventListener("load", () => {
        const size = (e) => { const r = e.getBoundingClientRect(); return [r.width, r.height, r.bottom]; };
        document.body.dataset.found = JSON.stringify({
            title: document.title,
            svgs: [...document.querySelectorAll("figure svg")].map(size),
            paths: [...document.querySelectorAll("figure svg")].map((e) => e.querySelectorAll("path, use").length),
            rows: document.querySelectorAll("#summary tr").length,
            tables: [...document.querySelectorAll("details[open] table.samples")].map(size),
            folded: document.querySelectorAll("details:not([open])").length,
            hostile: [...document.querySelectorAll("td.text")].filter((e) => e.textContent.includes("<script>")).length,
            overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        });
    });</script>"""
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", measure + "</body>"))
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--window-size=1200,900",
        "--enable-logging",
    ]
    command += ["--log-level=0", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr
    found = json.loads(html.unescape(re.search(r'data-found="([^"]*)"', done.stdout)[1]))  # type: ignore[index]
    assert found["title"] == "A <title>"
    assert len(found["svgs"]) == 9
    assert all(width > 200 and height > 100 for width, height, _ in found["svgs"])
    assert min(found["paths"]) > 5
    assert found["rows"] > 10
    assert found["tables"] and all(width > 100 and height > 50 for width, height, _ in found["tables"])
    assert found["hostile"] == 1
    assert found["overflow"] <= 0
