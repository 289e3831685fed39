"""Tables in README and on the pages agree with the committed results, and README code runs."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")


def test_tables_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import accelerators_page, update_docs

    for page in (path.read_text("utf-8") for path in update_docs.PAGES):
        assert update_docs.filled(page) == page
    accelerators = accelerators_page.PAGE.read_text("utf-8")
    assert accelerators_page.filled(accelerators) == accelerators
    changed = BENCHMARKS.replace("| bfloat16 | 0.1352", "| bfloat16 | 0.9999")
    assert changed != BENCHMARKS and update_docs.filled(changed) == BENCHMARKS


def test_numbers_in_sentences_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import accelerators_page, sentence_values, update_docs

    paths = [*update_docs.PAGES, accelerators_page.PAGE]
    pages = [path.read_text("utf-8") for path in paths]
    used = {name for page in pages for name in re.findall(r"<!-- value: (\w+) -->", page)}
    assert used == set(sentence_values.VALUES)
    for page in pages:  # Markdown ends a paragraph at a comment that begins a line
        assert not re.search(r"^ *<!-- value:", page, re.M)
    changed = re.sub(r"(<!-- value: v_exact -->).*?(<!--)", r"\g<1>0.5\2", README)
    assert changed != README and update_docs.filled(changed) == README


def test_statements_about_learning_rates_hold_in_the_committed_results(monkeypatch):
    """Sentences of docs/guide/when_to_use.md without a number."""
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import reporting
    from benchmarks.learning_rate_summary import summary

    results = reporting.read_json("learning_rate")
    for task in results["tasks"].values():
        for noise in results["noises"]:
            best = summary(task, noise)
            lowest = min(row["loss"] for row in best.values())
            assert best["optax.sgd, momentum"]["loss"] > lowest
            good = best["Adamax, float32"]["good_rates"]
            assert best["Adamax, 2 bytes"]["good_rates"] == good
            adamax, adam = (
                {r: sum(x) for r, x in zip(row["rates"], row["held_out_loss"], strict=True)}
                for row in (task[noise]["Adamax, float32"], task[noise]["optax.adam"])
            )
            assert all(adam[rate] < adamax[rate] for rate in (0.001, 0.003, 0.01))
            assert not adamax[0.1] >= adam[0.1]  # NaN if Adam diverged


def test_every_result_says_where_it_comes_from():
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert results
    for path in results:
        made = json.loads(path.read_text("utf-8"))["provenance"]
        assert made["command"].startswith("python -m benchmarks."), path
        assert made["machine"] and made["versions"]["jax"] and "seeds" in made


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_code_in_the_readme_runs(code):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(code, "README.md", "exec"), {})


def test_tests_named_on_the_pages_exist():
    named = re.findall(r"`(?:tests/)?([\w/]*test_\w+\.py)::(test_\w+)`", BENCHMARKS)
    assert named and len(named) == BENCHMARKS.count(".py::")
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / path).read_text("utf-8"), re.M), name


def test_paths_and_anchors_in_the_readme_exist():
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", README)
    assert any(anchor for _, anchor in links)
    for path, anchor in links:
        assert (ROOT / path).exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text("utf-8"), re.M)
            slugs = {re.sub(r"[^\w -]", "", x.lower()).replace(" ", "-") for x in headings}
            assert anchor in slugs, (path, anchor)
