"""The report says what the result says, in all its forms, and its pictures can be looked at."""

import json
import re

from pipelines.sweep import pictures, report
from pipelines.sweep.report import Machine
from tests.pipelines.sweep.test_results import results, row

MACHINE = Machine("a | chip", 2, "2.13")
LOSSES = {("rmsnorm", 0): 4.0, ("layernorm", 0): 4.5, ("rmsnorm", 1): 4.25, ("layernorm", 1): None}


def made(**keys):
    expect = [{"lower": "rmsnorm", "than": "layernorm", "source": "<somebody>"}]
    return results(LOSSES, expect=expect, title="Norms & all", notes="First <b>.\n\nSecond.", **keys)


def test_markdown_has_a_row_for_every_cell_and_names_what_is_missing() -> None:
    text = report.markdown(made(), MACHINE, "caravan sweep s.yaml", ["results.png"])
    assert "| rmsnorm | 4.1250 ± 0.1768 | 10 | 1.00e+09 | 100 | 5 bytes |" in text
    assert "| layernorm | 4.5000 (1 of 2 seeds) |" in text
    assert "layernorm, seed 1: it broke" in text
    assert (
        "| rmsnorm below layernorm | pretrain.val_loss | -0.5000 (one seed) | holds, with 1 of 2 seeds | <somebody> |"
        in text
    )
    assert "![results](results.png)" in text and "caravan sweep s.yaml" in text and "seeds 0, 1" in text
    assert "| rmsnorm | model.norm=rmsnorm |" in text


def test_the_page_is_one_file_and_takes_nothing_for_markup() -> None:
    page = report.html_page(made(), MACHINE, "caravan sweep 'a&b.yaml'", {"results.png": b"\x89PNG"})
    assert "Norms &amp; all" in page and "&lt;somebody&gt;" in page and "First &lt;b&gt;." in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert not re.search(r'(src|href)="(?!data:)', page), "it loads nothing"


def test_json_has_all_figures_and_no_curve() -> None:
    figures = json.loads(report.json_bytes(made(), MACHINE))
    assert figures["machine"]["cores"] == 2 and figures["seeds"] == [0, 1]
    assert figures["cells"][0]["measures"]["pretrain.val_loss"]["mean"] == 4.125
    assert figures["trials"][3]["error"] == "it broke" and "curve" not in figures["trials"][3]
    assert figures["expected"][0]["verdict"] == "holds, with 1 of 2 seeds"


def test_pictures_are_drawn_of_what_has_values() -> None:
    result = made(curves=["loss", "val_loss", "imbalance"])
    for trial in result.trials:
        object.__setattr__(trial, "curve", [row(step) for step in range(1, 9)])
    drawn = pictures.draw(result)
    assert list(drawn) == ["results.png", "loss.png"], "nothing was validated, and nothing is routed"
    assert all(picture.startswith(b"\x89PNG") for picture in drawn.values())
    axes = pictures.draw_curve(result, "loss").axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["rmsnorm", "layernorm"]
    assert axes.get_ylabel() == "training loss (nats per token)" and axes.get_xlabel() == "tokens trained on"
    low, high = axes.get_ylim()
    assert low < 5.0 - 8 and high > 5.0 - 1, "all that is drawn after the first steps is inside"


def test_beyond_the_length_of_training_is_a_line_for_every_cell_and_scaling() -> None:
    result = made()
    for seed, trial in enumerate(result.trials):
        curves = (
            {"rope": [4.0, 5.0 + seed], "rope under yarn": [4.0, 4.5]}
            if trial.cell == "rmsnorm"
            else {"rope": [3.0, None]}
        )
        object.__setattr__(trial, "beyond", {"curves": curves, "positions": [64, 512], "train_seq_len": 64})
    (figure,) = pictures.draw_beyond(result).values()
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines["rmsnorm"] == [4.0, 6.0] and lines["rope under yarn"] == [4.0, 4.5]
    assert lines["layernorm"][0] == 3.0 and "extrapolation.png" in pictures.draw(result)
    assert pictures.draw_beyond(made()) == {}
    for trial in result.trials:
        object.__setattr__(
            trial, "beyond", {**trial.beyond, "curves": {"rope": [4.0, 5.0], "rope under yarn": [1.0, 2.0]}}
        )
    (figure,) = pictures.draw_beyond(result).values()
    names = {line.get_label() for line in figure.axes[0].lines[:4]}
    assert names == {"rmsnorm", "rmsnorm, rope under yarn", "layernorm", "layernorm, rope under yarn"}
    object.__setattr__(
        result.trials[0], "beyond", {**result.trials[0].beyond, "train_seq_len": 32, "positions": [32, 256]}
    )
    assert list(pictures.draw_beyond(result)) == ["extrapolation-32.png", "extrapolation-64.png"]
