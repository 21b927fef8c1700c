"""`plot.explore`: what the page contains, and what it does in a browser."""

import base64
import json
import re

import ml_dtypes
import numpy as np
import pytest

import browser
import numba_attention as na
from numba_attention import plot

TOKENS = ["[CLS]", "the", "<b>cat</b>", "</script>", "sat & slept", "\u2028", "café 猫"]
L = len(TOKENS)


def probabilities(*shape, seed=0):
    x = np.exp(3 * np.random.default_rng(seed).standard_normal(shape))
    return x / x.sum(-1, keepdims=True)


def content(page):
    """The data in a page, read as a browser reads it."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def stored(page, layer):
    one = content(page)["layers"][layer]
    return np.frombuffer(base64.b64decode(one["weights"]), "<u2").reshape(one["heads"], L, -1) / 65535


# The page.


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_what_a_page_contains(dtype, tmp_path):
    weights = probabilities(2, 3, L, L).astype(dtype)
    page = plot.explore(weights, TOKENS, tmp_path / "heads.html", title="A & B")
    assert (tmp_path / "heads.html").read_text(encoding="utf-8") == page
    data = content(page)
    assert data["queries"] == data["keys"] == TOKENS
    assert data["title"] == "A & B"
    for n in range(2):
        np.testing.assert_allclose(stored(page, n), weights[n].astype(np.float64), atol=0.5 / 65535 + 1e-9)
    assert "http" not in page  # one file, no network
    assert page.count("</script>") == 2


def test_half_a_character(tmp_path):
    """A tokenizer of bytes may cut a character in two; Python then has a surrogate, which no UTF-8 file can hold."""
    tokens = [*TOKENS[:-1], "\ud83d"]
    plot.explore(probabilities(2, 3, L, L), tokens, tmp_path / "heads.html")
    assert content((tmp_path / "heads.html").read_text(encoding="utf-8"))["queries"] == tokens


def test_layers_of_different_size_and_two_texts():
    weights = [probabilities(3, L, 4), probabilities(1, L, 4, seed=1)]
    page = plot.explore(weights, TOKENS, key_tokens=list("abcd"), layers=["first", "last"], heads=["x", "y", "z"])
    data = content(page)
    assert [layer["name"] for layer in data["layers"]] == ["first", "last"]
    assert [layer["heads"] for layer in data["layers"]] == [3, 1]
    assert data["keys"] == list("abcd")
    np.testing.assert_allclose(stored(page, 1), weights[1], atol=1e-5)
    assert content(plot.explore(weights[1][0], TOKENS, key_tokens=list("abcd")))["layers"][0]["heads"] == 1


def test_a_notebook_shows_it():
    page = plot.explore(probabilities(3, L, L), TOKENS)
    shown = page._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!DOCTYPE html&gt;')
    assert shown.count('"') == 4


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.ones((2, 3, 3), int), "abc"), TypeError, "weights must be floating point"),
        ((np.ones((2, 2, 2, 3, 3)) / 3, "abc"), ValueError, r"weights must have shape \(heads, L, S\)"),
        (([np.ones((2, 3, 3)) / 3, np.ones((2, 4, 3)) / 3], "abc"), ValueError, "weights must have shape"),
        (([], "abc"), ValueError, "got none"),
        ((np.full((2, 3, 3), 2.0), "abc"), ValueError, "between 0 and 1"),
        ((np.full((2, 3, 3), np.nan), "abc"), ValueError, "between 0 and 1"),
        ((np.ones((2, 3, 3)) / 3, "ab"), ValueError, "^tokens must have length 3, got 2"),
        ((np.ones((2, 3, 4)) / 4, "abc"), ValueError, "key_tokens must have length 4, got 0"),
        ((np.ones((2, 3, 3)) / 3, 3), TypeError, "tokens must be a sequence of str, got builtins.int"),
        ((np.ma.masked_array(np.ones((2, 3, 3)) / 3), "abc"), TypeError, "weights is a masked array"),
    ],
)
def test_misuse(arguments, error, message):
    with pytest.raises(error, match=message):
        plot.explore(*arguments)


# In a browser.

HELP = """
const press = key => document.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
const text = id => element(id).textContent;
const pressed = () => [...element("heads").children].map(b => +(b.getAttribute("aria-pressed") === "true")).join("");
const tap = (side, n) => element(side).children[n].click();
const point = (node, kind, x = 0, y = 0) => node.dispatchEvent(
  new PointerEvent(kind, {pointerType: "mouse", clientX: x, clientY: y, bubbles: kind === "pointermove"}));
const ink = canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data
  .reduce((sum, x, n) => n % 4 === 3 ? sum + (x > 0) : sum, 0);
"""


@pytest.fixture(scope="module")
def weights():
    return probabilities(2, 3, L, L)


@pytest.fixture(scope="module")
def page(weights):
    return plot.explore(weights, TOKENS)


def run(page, tmp_path, body, size=(1400, 900)):
    return browser.run(page, HELP + "function test() {" + body + "}", tmp_path, size)


def shares(weights, n=5):
    """The strongest of some labels, as the page says them."""
    order = np.argsort(-weights, kind="stable")[:n]
    said = (f"{100 * x:.1f}" if x < 0.0995 else f"{100 * x:.0f}" for x in weights[order])
    return ", ".join(f"{TOKENS[j]} {share} %" for j, share in zip(order, said, strict=True))


def test_tokens_and_lines(page, tmp_path, weights):
    got = run(page, tmp_path, """
        const canvas = element("between").firstElementChild, before = ink(canvas);
        tap("queries", 2);
        const said = text("detail"), one = ink(canvas);
        tap("queries", 2);
        point(element("keys").children[4], "pointerenter");
        const of_key = text("detail");
        point(element("keys").children[4], "pointerleave");
        return {labels: [...element("keys").children].map(x => x.firstElementChild.textContent), said, of_key,
                less: one < before && one > 0, sizes: text("sizes"), after: text("detail")};
    """)  # fmt: skip
    assert got["labels"] == TOKENS
    mean = weights[0].mean(0)
    assert got["said"] == f"{TOKENS[2]} attends to {shares(mean[2])} (mean of all heads)."
    assert got["of_key"] == f"{TOKENS[4]} is attended to by {shares(mean[:, 4])} (mean of all heads)."
    assert got["less"]
    assert got["sizes"] == f"2 layers, 3 heads, {L} queries, {L} keys"
    assert got["after"] == "Shown: mean of all heads."


def test_keyboard(page, tmp_path, weights):
    got = run(page, tmp_path, """
        const log = [pressed()];
        for (const key of ["ArrowRight", "ArrowRight", "ArrowLeft", "ArrowLeft", "a", "ArrowLeft"]) {
          press(key); log.push(pressed());
        }
        press("ArrowDown"); press("ArrowDown");
        const first = text("detail");
        press("]");
        const second = text("detail"), layer = element("layer").value;
        press("]"); press("["); press("m");
        const matrix = !element("matrix").hidden && element("lines").hidden;
        press("m"); press("Escape");
        return {log, first, second, layer, last: element("layer").value, matrix, lines: !element("lines").hidden,
                after: text("detail")};
    """)  # fmt: skip
    assert got["log"] == ["111", "100", "010", "100", "001", "111", "001"]
    assert got["first"] == f"{TOKENS[1]} attends to {shares(weights[0, 2, 1])} (head 2)."
    assert got["second"] == f"{TOKENS[1]} attends to {shares(weights[1, 2, 1])} (head 2)."
    assert (got["layer"], got["last"]) == ("1", "0")
    assert got["matrix"]
    assert got["lines"]
    assert got["after"] == "Shown: head 2."


def test_heads_by_mouse_and_matrix(page, tmp_path, weights):
    got = run(page, tmp_path, """
        const buttons = element("heads").children;
        buttons[0].click();
        const two = pressed();
        element("show-matrix").click();
        const canvas = element("matrix").firstElementChild, box = canvas.getBoundingClientRect();
        const x = box.left + grid.left + 3.5 * grid.cell, y = box.top + grid.top + 5.5 * grid.cell;
        point(canvas, "pointermove", x, y);
        const cell = text("detail"), painted = ink(canvas) > 0;
        point(canvas, "pointerleave");
        buttons[1].click(); buttons[2].click();
        return {two, cell, painted, none: text("detail")};
    """)  # fmt: skip
    assert got["two"] == "011"
    share = 100 * weights[0, 1:, 5, 3].mean()
    said = f"{share:.1f}" if share < 9.95 else f"{share:.0f}"
    assert got["cell"] == f"{TOKENS[5]} attends to {TOKENS[3]} with {said} % (mean of 2 heads)."
    assert got["painted"]
    assert got["none"] == "No head is chosen."


@pytest.mark.parametrize("width", [1400, 500])
def test_nothing_is_wider_than_the_screen(tmp_path, width):
    """Long tokens are cut, and many heads go into several rows. 500 pixels is the narrowest window of Chromium."""
    tokens = ["a" * 200, *(f"token{n}" for n in range(39))]
    page = plot.explore(probabilities(16, 40, 40), tokens)
    got = run(page, tmp_path, """
        const wide = document.documentElement.scrollWidth - window.innerWidth;
        element("show-matrix").click();
        return [wide, document.documentElement.scrollWidth - window.innerWidth];
    """, (width, 800))  # fmt: skip
    assert max(got) <= 0


# Pictures of caches and layers in notebooks.


def test_caches_and_layers_have_pictures(tmp_path):
    cache = na.KVCache(3, 2, 20, 8, window=12, keep_first=2)
    cache.append(*np.zeros((2, 3, 2, 9, 8), np.float32), [9, 0, 4])
    pages = na.PagedKVCache(10, 4, 2, 8)
    ids = pages.add(1)
    pages.append(ids, *np.zeros((2, 1, 2, 9, 8), np.float32))
    pages.fork(int(ids[0]))
    layer = na.MultiHeadAttention(24, 4, num_kv_heads=2)
    texts = [x._repr_html_() for x in (cache, pages, layer)]
    assert "sequence 2: 4 tokens, 4 of 20 places" in texts[0]
    assert "keep_first" in texts[0]
    assert texts[1].count("shared by 2 sequences") == 3
    assert texts[1].count(": free") == 7
    assert "q_proj.weight" in texts[2]
    assert "24 x 24" in texts[2]
    assert f"{sum(x.size for x in layer.parameters().values()):,}" in texts[2]
    whole = "<!DOCTYPE html><html><head></head><body>" + "".join(texts) + "</body></html>"
    got = browser.run(whole, """function test() {
        return [document.querySelectorAll("table").length, document.querySelectorAll("svg rect").length];
    }""", tmp_path)  # fmt: skip
    assert got == [3, 3 * 2 + 10]
