"""Reading machine code."""

import re


def innermost(code, instruction, without=None):
    """The instructions of the loop that holds most of one kind, and none of another."""
    label = r"^(\.LBB\d+_\d+):"
    blocks = re.split(label, code, flags=re.M)
    named = zip(blocks[1::2], blocks[2::2], strict=True)
    bodies = [body for name, body in named if re.search(rf"{re.escape(name)}\b", body)]
    if without is not None:
        bodies = [body for body in bodies if not re.search(without, body)]
    return max(bodies, key=lambda body: len(re.findall(instruction, body)))
