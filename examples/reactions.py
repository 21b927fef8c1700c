"""Which atom of the reactants becomes which atom of the product? One attention head of RXNMapper knows it.

    pip install --no-deps rxnmapper
    python examples/reactions.py
    python examples/reactions.py "CCO.CC(=O)O>>CC(=O)OCC" --html reaction.html

RXNMapper [1]_ is a language model (ALBERT [2]_) that was trained to fill in missing atoms of chemical reactions. Nobody
told it how reactions work, but head 5 of its eleventh layer attends from each atom of the product to the atom that it
was before. The weights are in the wheel `rxnmapper`, 3 MB, of which only the files are read: neither PyTorch nor
RXNMapper's code is needed, and nothing is unpickled. Prints the map, and writes a page with all heads if asked.

References
----------
.. [1] Schwaller et al., "Extraction of organic chemistry grammar from unsupervised learning of chemical reactions",
   Science Advances, 2021.
.. [2] Lan et al., "ALBERT", 2020, section 3.1: one block for all layers, and embeddings smaller than the layers.
"""

import argparse
import importlib.util
import json
import pickletools
import re
import sys
from pathlib import Path

import numpy as np

import numba_attention as na
from numba_attention.nn import layer_norm, linear

LAYER, HEAD = 10, 5
EXAMPLE = "CC(C)S.CN(C)C=O.Fc1cccnc1F.O=C([O-])[O-].[K+].[K+]>>CC(C)Sc1ncccc1F"
TOKEN = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)
ATOM = re.compile(r"\[|[A-Z]|[bcnops]$")


def find_folder(path=None):
    """The folder with config.json, vocab.txt and pytorch_model.bin; by default, of the installed wheel."""
    if path is not None:
        return Path(path)
    spec = importlib.util.find_spec("rxnmapper")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the weights are not installed: pip install --no-deps rxnmapper")
    return Path(spec.submodule_search_locations[0], "models/transformers/albert_heads_8_uspto_all_1310k")


def read_tensors(path):
    """The float32 tensors of a file of PyTorch before 1.6, by name.

    Such a file is four pickles (a magic number, the version, facts about the machine, and the tensors without their
    numbers), a fifth with the order of the storages, and the numbers. The fourth is read as a list of instructions, of
    which strings, numbers, tuples and references are followed, and none is executed.
    """
    with path.open("rb") as file:
        pickles = [list(pickletools.genops(file)) for _ in range(5)]
        tensors = dict(_described(pickles[3]))
        keys = [x for op, x, _ in pickles[4] if op.name == "BINUNICODE"]
        storages = {}
        for key in keys:
            (count,) = np.fromfile(file, "<i8", 1)
            storages[key] = np.fromfile(file, "<f4", count)
    return {
        name: storages[key][offset : offset + int(np.prod(shape))].reshape(shape)
        for name, (key, offset, shape) in tensors.items()
    }


def _described(operations):
    """Name, storage, offset and shape of each tensor in a pickle of a dictionary of tensors."""
    stack, memo, marks = [], {}, []
    for op, x, _ in operations:
        name = op.name
        if name == "MARK":
            marks.append(len(stack))
        elif name in ("BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1"):
            stack.append(x)
        elif name in ("NONE", "NEWFALSE", "NEWTRUE"):
            stack.append({"NONE": None, "NEWFALSE": False, "NEWTRUE": True}[name])
        elif name == "GLOBAL":
            stack.append(x)
        elif name == "EMPTY_TUPLE":
            stack.append(())
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "TUPLE":
            start = marks.pop()
            stack[start:] = [tuple(stack[start:])]
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[x] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[x])
        elif name == "REDUCE":  # a call: what it would be given stands for its result
            arguments = stack.pop()
            stack[-1] = (stack[-1], arguments)
        elif name == "BUILD":
            stack.pop()
        elif name in ("SETITEMS", "SETITEM"):
            start = marks.pop() if name == "SETITEMS" else len(stack) - 2
            pairs = stack[start:]
            for key, value in zip(pairs[::2], pairs[1::2], strict=True):
                if isinstance(value, tuple) and value[0] == "torch._utils _rebuild_tensor_v2":
                    (_, kind, storage, *_), offset, shape, *_ = value[1]
                    if kind == "torch FloatStorage":
                        yield key, (storage, offset, shape)
            del stack[start:]


class Reactions:
    """The model, in NumPy: a block of attention and MLP that is applied twelve times."""

    def __init__(self, folder=None):
        folder = find_folder(folder)
        config = json.loads((folder / "config.json").read_text())
        self.layers, self.eps = config["num_hidden_layers"], config["layer_norm_eps"]
        self.vocabulary = {token: n for n, token in enumerate((folder / "vocab.txt").read_text().splitlines())}
        self.weights = {
            name.removeprefix("albert."): x for name, x in read_tensors(folder / "pytorch_model.bin").items()
        }
        block = "encoder.albert_layer_groups.0.albert_layers.0."
        self.block = {name.removeprefix(block): x for name, x in self.weights.items() if name.startswith(block)}
        names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "dense"}
        self.attention = na.MultiHeadAttention(config["hidden_size"], config["num_attention_heads"])
        self.attention.load_parameters(
            {
                f"{own}.{kind}": self.block[f"attention.{name}.{kind}"]
                for own, name in names.items()
                for kind in ("weight", "bias")
            }
        )

    def __call__(self, reaction):
        """Tokens of a reaction in SMILES, and all attention maps (layers, heads, tokens, tokens)."""
        tokens = ["[CLS]", *TOKEN.findall(reaction), "[SEP]"]
        ids = [self.vocabulary.get(token, self.vocabulary["[UNK]"]) for token in tokens]
        tables = [self.weights[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type")]
        x = tables[0][ids] + tables[1][: len(ids)] + tables[2][0]
        x = self._project(
            self._norm(x, self.weights, "embeddings.LayerNorm"), self.weights, "encoder.embedding_hidden_mapping_in"
        )
        maps = []
        for _ in range(self.layers):
            attended, weights = self.attention(x, need_weights=True, average_weights=False)
            maps.append(weights)
            x = self._norm(attended, self.block, "attention.LayerNorm", residual=x)
            hidden = self._project(x, self.block, "ffn", activation="gelu")
            out = self._project(hidden, self.block, "ffn_output")
            x = self._norm(out, self.block, "full_layer_layer_norm", residual=x)
        return tokens, np.stack(maps)

    def _norm(self, x, weights, name, residual=None):
        """The norm of x, or of x + residual in one pass."""
        return layer_norm(x, weights[f"{name}.weight"], weights[f"{name}.bias"], self.eps, residual=residual)

    def _project(self, x, weights, name, activation=None):
        """A product, of which bias and activation are part."""
        return linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"], activation=activation)


def element(token):
    """The element of an atom, in capitals, or None: "[nH]" and "n" are N, and "(" is none."""
    if not ATOM.match(token) or token in ("[CLS]", "[SEP]"):
        return None
    return re.search(r"[A-Z][a-z]?|[a-z]", token.strip("[]")).group().upper()[:2].rstrip("H@") or "H"


def atom_map(tokens, weights):
    """For each atom of the product, the most attended atom of the same element among the reactants, and its share.

    Pairs are taken in order of their attention, in both directions, and no atom twice.
    """
    arrow = tokens.index(">>")
    elements = [element(token) for token in tokens]
    product = [n for n in range(arrow, len(tokens)) if elements[n]]
    reactants = [n for n in range(arrow) if elements[n]]
    scores = weights[np.ix_(product, reactants)] + weights[np.ix_(reactants, product)].T
    scores *= np.array([[elements[i] == elements[j] for j in reactants] for i in product])
    shares = scores / np.maximum(scores.sum(1, keepdims=True), 1e-9)
    found = {}
    for _ in product:
        i, j = np.unravel_index(np.argmax(scores), scores.shape)
        if scores[i, j] <= 0:
            break
        found[product[i]] = reactants[j], float(shares[i, j])
        scores[i], scores[:, j] = 0, 0
    return dict(sorted(found.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reaction", nargs="?", default=EXAMPLE, help="in SMILES: reactants>>product")
    parser.add_argument("--model", type=Path, help="folder with the weights, if the wheel is not installed")
    parser.add_argument("--html", type=Path, help="write a page with all heads and layers")
    arguments = parser.parse_args()
    if ">>" not in arguments.reaction:
        parser.error("a reaction has >> between reactants and product")
    tokens, maps = Reactions(arguments.model)(arguments.reaction)
    print(arguments.reaction)
    for i, (j, share) in atom_map(tokens, maps[LAYER, HEAD]).items():
        print(f"{tokens[i]:>5} (token {i}) was {tokens[j]:>5} (token {j}), {share:.0%}")
    if arguments.html:
        na.plot.explore(
            maps, [f"{n} {token}" for n, token in enumerate(tokens)], arguments.html, title=arguments.reaction
        )
        print(f"a page with all heads: {arguments.html}; look at layer {LAYER}, head {HEAD}")


if __name__ == "__main__":
    main()
