"""The demo's report: page, twin and data from plain rows."""

import csv
import re
from dataclasses import replace

import browser
import pytest

from sparseswaps.reports import DemoLayer, DemoMethod, DemoText, Fact, write_demo_report

METHODS = [
    DemoMethod("Wanda", 0.2, 0.22, 21.0, 4.5, 1.5),
    DemoMethod("1-swap", 0.1, 0.15, 14.0, 4.5, 3.0),
    DemoMethod("drift & more", 0.12, None, 11.0, 4.5, 4.0),
]
LAYERS = [
    DemoLayer(method.label, f"layers.{block}.{kind}", block, kind, method.error + 0.01 * block, 0.2, 0.5)
    for method in METHODS
    for block in range(3)
    for kind in ("q_proj", "up_proj")
]


def _files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_rows_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_demo_report(tmp_path / name, METHODS, LAYERS)
    assert _files(tmp_path / "a") == _files(tmp_path / "b")


def test_text_follows_the_rows(tmp_path):
    page = write_demo_report(tmp_path, METHODS, LAYERS).read_text()
    assert "50% less than Wanda (20.00%)" in page
    assert "lowest perplexity is 11.00, from drift &amp; more" in page
    # 1-swap has the smaller error than drift but the higher perplexity: one of three pairs disagrees
    assert "agree in 2 of 3 pairs" in page


def test_data_beside_the_figures_is_what_was_given(tmp_path):
    write_demo_report(tmp_path, METHODS, LAYERS)
    with (tmp_path / "figures" / "layer-errors.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert [(row[0], row[3], float(row[4])) for row in rows] == [
        (layer.method, layer.name, layer.error) for layer in LAYERS
    ]
    with (tmp_path / "figures" / "error-perplexity.csv").open() as file:
        rows = list(csv.reader(file))[1:]
    assert [[row[0], *map(float, row[1:])] for row in rows] == [
        [m.label, m.error, m.perplexity, m.perplexity_dense] for m in METHODS
    ]


def test_the_page_needs_no_network_and_the_twin_shows_the_same_figures(tmp_path):
    page = write_demo_report(tmp_path, METHODS, LAYERS).read_text()
    twin = (tmp_path / "README.md").read_text()
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    assert "<script" not in page
    assert page.count("<svg") == twin.count("![") == 2
    for link in re.findall(r'\]\(([^)]+)\)|(?:href)="((?!#|data:)[^"]+)"', twin + page):
        assert (tmp_path / (link[0] or link[1])).is_file()


def test_layers_of_one_kind_in_a_block_are_told_apart(tmp_path):
    names = ["a.0.attention.output.dense", "a.0.output.dense", "a.0.query"]
    layers = [DemoLayer("Wanda", name, 0, name.split(".")[-1], 0.1, 0.1, 0.1) for name in names]
    write_demo_report(tmp_path, METHODS, layers)
    with (tmp_path / "figures" / "layer-errors.csv").open() as file:
        kinds = [row[2] for row in csv.reader(file)][1:]
    assert kinds == ["attention.output.dense", "a.output.dense", "query"]


def test_models_without_perplexity_are_reported_too(tmp_path):
    methods = [DemoMethod("Wanda", 0.2, None, None, None, 1.0)]
    page = write_demo_report(tmp_path, methods, [layer for layer in LAYERS if layer.method == "Wanda"])
    assert "perplexity is" not in page.read_text()


def test_a_layer_of_an_unknown_method_is_refused(tmp_path):
    with pytest.raises(ValueError, match="found 'RIA'"):
        write_demo_report(tmp_path, METHODS, [DemoLayer("RIA", "a", 0, "q", 0.1, 0.1, 0.1)])
    with pytest.raises(ValueError, match="0 layers"):
        write_demo_report(tmp_path, METHODS, [])


TEXTS = [
    DemoText(
        "Once", {"dense model": "upon a time there", "Wanda": "upon the\n\nhill", "1-swap": "upon a hill"}
    ),
    DemoText("The", {"dense model": "end", "Wanda": "a", "1-swap": "a"}),
]


def test_continuations_stand_side_by_side(tmp_path):
    page = write_demo_report(tmp_path, METHODS, LAYERS, texts=TEXTS).read_text()
    # the first word and "upon a" are shared, of the four words and the one of the dense model
    assert "1-swap follows the dense model longest." in page
    assert "of 5 after 2 prompts: 2 of 1-swap, 1 of Wanda." in page
    with (tmp_path / "tables" / "continuations.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["prompt", "dense model", "Wanda", "1-swap"]
    assert rows[1][2] == "upon the hill"


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_the_page_fits_on_the_screen(tmp_path, width):
    facts = [Fact("versions", "sparseswaps 0.1.0, torch 2.13.0, transformers 5.24.0"), Fact("windows", "16")]
    methods = [replace(METHODS[0], label="one-very-long-name-of-a-method, without any drift"), *METHODS[1:]]
    layers = [
        replace(layer, method=methods[0].label) if layer.method == "Wanda" else layer for layer in LAYERS
    ]
    browser.check_fits(
        write_demo_report(tmp_path, methods, layers, facts=facts, texts=TEXTS), tmp_path, width
    )


def test_the_text_on_layers_by_hand(tmp_path):
    # errors fall from 0.2, 0.21, 0.22 to 0.12, 0.13, 0.14 in both layer types
    page = write_demo_report(tmp_path, METHODS, LAYERS).read_text()
    assert "drift &amp; more has a lower error than Wanda in 6 of 6 layers: -40% to -36%, -38% in the" in page
