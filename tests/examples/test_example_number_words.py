"""The example that reads numbers: its English, its gradients, and that it learns what it was not shown."""

import importlib.util
import sys
from pathlib import Path

import numba
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import number_words
from number_words import Translator, draw, loss_of, mistakes, pad, read, spell, split, train, translate, write

LARGEST = 999


@pytest.fixture(scope="module")
def trained():
    """A small model of small numbers, the loss it ended with, and numbers that it has not seen."""
    rng = np.random.default_rng(0)
    known, held_out = split(LARGEST, rng)
    model = Translator(features=32, heads=2, blocks=1, rng=rng)
    threads = numba.get_num_threads()
    # On busy cores, a second thread that spins between so small calls makes this take ten times as long.
    numba.set_num_threads(1)
    loss = train(model, draw(known, 2000, rng), 400, rng, batch=64, tell=lambda line: None)
    numba.set_num_threads(threads)
    return model, loss, held_out


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "zero"),
        (7, "seven"),
        (10, "ten"),
        (13, "thirteen"),
        (19, "nineteen"),
        (20, "twenty"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (101, "one hundred and one"),
        (110, "one hundred and ten"),
        (342, "three hundred and forty-two"),
        (1000, "one thousand"),
        (1001, "one thousand and one"),
        (1100, "one thousand one hundred"),
        (12_345, "twelve thousand three hundred and forty-five"),
        (90_006, "ninety thousand and six"),
        (100_000, "one hundred thousand"),
        (342_017, "three hundred and forty-two thousand and seventeen"),
        (805_040, "eight hundred and five thousand and forty"),
        (999_999, "nine hundred and ninety-nine thousand nine hundred and ninety-nine"),
    ],
)
def test_numbers_in_english(number, text):
    assert spell(number) == text


def test_some_leave_out_and():
    rng = np.random.default_rng(0)
    said = {spell(342_017, rng) for _ in range(50)}
    assert len(said) == 4
    assert "three hundred and forty-two thousand seventeen" in said
    assert {text.replace(" and ", " ") for text in said} == {"three hundred forty-two thousand seventeen"}


def test_no_two_numbers_are_said_alike():
    assert len({spell(number).replace(" and ", " ") for number in range(20_000)}) == 20_000


def test_tokens():
    assert [word for word, token in number_words.WORDS.items() if token in read("Twenty-one")] == ["one", "twenty"]
    assert write(305) == [3, 0, 5, number_words.STOP]
    padded, lengths = pad([[4, 5], [6], [7, 8, 9]])
    np.testing.assert_array_equal(padded, [[4, 5, 0], [6, 0, 0], [7, 8, 9]])
    np.testing.assert_array_equal(lengths, [2, 1, 3])


@pytest.mark.parametrize("largest", [LARGEST, number_words.LARGEST])
def test_what_is_held_out_is_not_learned_from(largest):
    rng = np.random.default_rng(0)
    known, held_out = split(largest, rng)
    np.testing.assert_array_equal(np.sort(np.concatenate([known, held_out])), np.arange(largest + 1))
    assert 0.07 < len(held_out) / largest < 0.13
    drawn = draw(known, 20_000, rng)
    assert not np.intersect1d(drawn, held_out).size
    assert not np.intersect1d(draw(held_out, 2000, rng), known).size
    for digits in range(1, len(str(largest)) + 1):  # some of every length
        assert ((drawn >= 10 ** (digits - 1)) & (drawn < 10**digits)).mean() > 0.01


def test_gradients_of_the_model():
    rng = np.random.default_rng(0)
    model = Translator(features=8, heads=2, blocks=2, rng=rng, dtype=np.float64)
    numbers = [342_017, 5, 90_006]
    words, digits = [read(spell(number)) for number in numbers], [write(number) for number in numbers]
    loss_of(model, words, digits)
    parameters, grads = model.parameters(), model.grads
    assert grads.keys() == parameters.keys()
    for name, parameter in parameters.items():
        direction = rng.standard_normal(parameter.shape)
        kept, losses = parameter.copy(), []
        for step in (1e-5, -1e-5):
            parameter[...] = kept + step * direction
            losses.append(loss_of(model, words, digits))
        parameter[...] = kept
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope == pytest.approx(float((grads[name] * direction).sum()), rel=1e-6, abs=1e-9), name


def test_what_fills_up_has_no_part():
    rng = np.random.default_rng(0)
    model = Translator(features=16, heads=2, blocks=2, rng=rng, dtype=np.float64)
    numbers = [777_777, 3, 90_006]
    words, lengths = pad([read(spell(number)) for number in numbers])
    digits, counts = pad([write(number) for number in numbers])
    together, _ = model.decode(digits, model.encode(words, lengths)[0], lengths)
    for n, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = lengths[n : n + 1]
        alone, _ = model.decode(digits[n : n + 1, :count], model.encode(words[n : n + 1, :length], own)[0], own)
        np.testing.assert_allclose(together[n, :count], alone[0], atol=1e-12)


def test_learns_numbers_it_has_not_seen(trained):
    model, loss, held_out = trained
    assert loss < 0.02
    wrong = mistakes(model, held_out)
    assert len(wrong) < 0.1 * len(held_out), wrong


def test_a_translation_does_not_depend_on_its_batch(trained):
    model, _, _ = trained
    texts = ["five", "seven hundred and seventy-seven", "two hundred six", "forty"]
    together = translate(model, texts)
    assert together == [translate(model, [text])[0] for text in texts]
    assert together[1] == "777"


def test_looks_are_probabilities(trained):
    model, _, _ = trained
    text = "seven hundred and six"
    looks = model.looks(text, "706")
    assert looks.shape == (2, 4, 4)
    np.testing.assert_allclose(looks.sum(-1), 1, atol=1e-5)
    assert looks.mean(0)[0].argmax() == 0  # the 7 comes from "seven"
    # What they are computed from is what the last block gives its attention in `decode`.
    words, lengths = pad([read(text)])
    memory, _ = model.encode(words, lengths)
    _, (*_, block, _, _) = model.decode(np.array([[number_words.STOP, 7, 0, 6]]), memory, lengths)
    attended = block[3].inputs[0]
    _, weights = model.decoder[-1].cross(attended, memory, need_weights=True, average_weights=False)
    np.testing.assert_allclose(looks, weights[0], atol=1e-6)


def test_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # what main sets in a process of its own
    options = ["--steps", "1", "--batch", "4"]
    if importlib.util.find_spec("matplotlib"):
        options += ["--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["number_words.py", *options, "ninety thousand six"])
    number_words.main()
    printed = capsys.readouterr().out
    assert "others to test with" in printed
    assert "right in every digit" in printed
    assert "\nninety thousand six -> " in printed
    assert "\n    ninety thousand six\n" in printed
    assert (tmp_path / "number-words-attention.png").exists() == ("--out" in options)


def test_other_words_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["number_words.py", "a million"])
    with pytest.raises(SystemExit):
        number_words.main()
    assert "not a number word: a, million" in capsys.readouterr().err


def test_caches_change_nothing():
    rng = np.random.default_rng(0)
    model = Translator(features=16, heads=2, blocks=2, rng=rng, dtype=np.float64)
    words, lengths = pad([read(spell(number)) for number in (777_777, 3, 90_006)])
    digits = rng.integers(0, 10, (3, 5))
    memory, _ = model.encode(words, lengths)
    want, _ = model.decode(digits, memory, lengths)
    caches = model.caches(3, 5, memory.shape[1])
    for n in range(5):
        scores = model.decode_next(
            digits[:, n : n + 1], caches, *((memory, lengths) if n == 0 else (memory[:, :0], None))
        )
        np.testing.assert_allclose(scores[:, 0], want[:, n], atol=1e-12)
