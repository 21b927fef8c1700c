"""The atom map of examples/reactions.py, against the maps that RXNMapper's authors publish."""

import importlib.util
import io
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import reactions

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("rxnmapper") is None,
    reason="the weights are not installed: pip install --no-deps rxnmapper",
)
# From rxnmapper's tests/test_mapper.py: the same atoms in the same order, with the numbers of the map.
REACTION = "C1COCCO1.CC(C)(C)OC(=O)CONC(=O)NCc1cccc2ccccc12.Cl>>O=C(O)CONC(=O)NCc1cccc2ccccc12"
PUBLISHED = (
    "C1COCCO1.CC(C)(C)[O:3][C:2](=[O:1])[CH2:4][O:5][NH:6][C:7](=[O:8])[NH:9][CH2:10][c:11]1[cH:12][cH:13][cH:14][c:15]2"
    "[cH:16][cH:17][cH:18][cH:19][c:20]12.Cl>>[O:1]=[C:2]([OH:3])[CH2:4][O:5][NH:6][C:7](=[O:8])[NH:9][CH2:10][c:11]1"
    "[cH:12][cH:13][cH:14][c:15]2[cH:16][cH:17][cH:18][cH:19][c:20]12"
)


@pytest.fixture(scope="module")
def model():
    return reactions.Reactions()


def atoms_of(tokens):
    return [n for n, token in enumerate(tokens) if reactions.element(token)]


def test_the_published_map(model):
    tokens, maps = model(REACTION)
    numbers = re.findall(r"\[[^\]]*?(?::(\d+))?\]|Br|Cl|[A-Z]|(?<![\[A-Za-z])[bcnops]", PUBLISHED)
    atoms = atoms_of(tokens)
    assert len(atoms) == len(numbers)
    arrow = tokens.index(">>")
    of_number = {number: n for n, number in zip(atoms, numbers, strict=True) if number and n < arrow}
    want = {n: of_number[number] for n, number in zip(atoms, numbers, strict=True) if n > arrow}
    got = reactions.atom_map(tokens, maps[reactions.LAYER, reactions.HEAD])
    assert {i: j for i, (j, _) in got.items()} == want
    assert len(want) == 20


def test_another_published_map(model):
    """Its reactants are in another order there, so it is written by hand: the fluorine beside the nitrogen leaves."""
    tokens, maps = model(reactions.EXAMPLE)
    got = reactions.atom_map(tokens, maps[reactions.LAYER, reactions.HEAD])
    found = {i: j for i, (j, _) in got.items()}
    assert found == {40: 1, 41: 2, 43: 4, 45: 6, 46: 24, 48: 23, 49: 22, 50: 21, 51: 20, 52: 18, 54: 17}
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-5)
    assert maps.shape == (12, 8, len(tokens), len(tokens))


def test_elements():
    texts = ["[nH]", "n", "[C@@H]", "Cl", "[Na+]", "[H-]", "[O-]", "c", "(", "1", "[CLS]", ">>", "="]
    assert [reactions.element(x) for x in texts] == ["N", "N", "C", "CL", "NA", "H", "O", "C"] + [None] * 5


def test_nothing_in_a_file_is_executed():
    """A call in the pickle is described, not made."""

    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    import pickletools

    data = pickle.dumps({"x": Evil()}, protocol=2)
    assert list(reactions._described(list(pickletools.genops(io.BytesIO(data))))) == []


@pytest.mark.peer
def test_maps_are_those_of_transformers(model):
    """All layers and heads, from the same file, which PyTorch reads."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = reactions.find_folder()
    config = transformers.AlbertConfig.from_json_file(str(folder / "config.json"))
    config._attn_implementation = "eager"
    theirs = transformers.AlbertModel(config, add_pooling_layer=False).eval()
    state = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    theirs.load_state_dict({k.removeprefix("albert."): x for k, x in state.items()}, strict=False)
    tokens, maps = model(reactions.EXAMPLE)
    ids = torch.tensor([[model.vocabulary[token] for token in tokens]])
    with torch.no_grad():
        want = theirs(ids, output_attentions=True).attentions
    np.testing.assert_allclose(maps, np.stack([x[0] for x in want]), atol=1e-5)


def test_what_is_printed_and_written(tmp_path):
    done = subprocess.run(
        [sys.executable, reactions.__file__, "CCO.CC(=O)Cl>>CC(=O)OCC", "--html", str(tmp_path / "reaction.html")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "O (token 19) was     O (token 3)" in done.stdout
    assert "Cl&gt;" not in (tmp_path / "reaction.html").read_text(encoding="utf-8")
    assert str(tmp_path / "reaction.html") in done.stdout
