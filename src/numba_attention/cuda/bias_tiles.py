"""A bias beside the products: its tiles in shared memory, and what kernels of gradients store of dS, its gradient.

A bias of a half type whose rows are whole words of 16 bytes is copied asynchronously, one tile ahead, and read by
`ldmatrix`, which gives threads of tensor cores the elements of their scores, also where rows of the tile are keys.
The gradient of a bias is dS summed over what shares an element. Kernels that have dS in registers store it
(``Spec.grad_bias``) where no sum is needed, or add to sums in memory by atomics.
"""

from .blocks import Block, Lanes
from .emit import I32, I64, Emit, Regs
from .formats import HALVES, SIZES
from .products import TensorCores
from .spec import Spec
from .tiles import Rows, Tile, fetch

ACROSS_ROWS = (4, 8, 16)  # distances of the lanes of tensor cores that share a column
KEYS = 32  # that four lanes store at once of a row, 16 bytes each


def tile_of(c: Spec, offset: int) -> Tile:
    """The tile of the bias in shared memory: rows are queries, columns are keys."""
    rows, columns = (c.columns, c.rows) if c.task == "key" else (c.rows, c.columns)
    return Tile(rows, columns, c.bias, offset)


def load(b: Block, tile: Tile, base: I32, thread: I32, query: I32, key: I32, head: I32 | None = None) -> None:
    """Copy the bias from a query and a key on; of queries that are columns, of head `head` of the group."""
    e, c, p = b.e, b.c, b.p
    base, thread = e.opaque(base), e.opaque(thread)
    queries, keys = (b.span.columns, b.span.rows) if c.task == "key" else (b.span.rows, b.span.columns)
    address = b.places["bias"] + e.wide(key) * SIZES[c.bias]
    if head is not None:
        address = address + e.wide(head) * p.bias_head
    rows = Rows(address, p.bias_row, p.bias_column, queries - query, keys - key, query)
    fetch(e, tile, base, rows, thread, c.threads, c.bias, True)


def read(e: Emit, product: TensorCores, tile: Tile, base: I32, thread: I32, transposed: bool) -> Regs:
    """The elements of a thread, in the order of its scores; ``transposed``: rows of the scores are keys."""
    warp, lane, half = thread >> 5, thread & 31, HALVES[tile.storage]
    numbers: Regs = []
    columns = tile.rows if transposed else tile.columns
    for m in range(product.tiles):
        for k in range(columns // 16):
            if transposed:
                place = tile.row(base, (lane & 7) + (lane >> 4) * 8, 16 * k)
                address = tile.chunk(place, warp * (2 * product.tiles) + ((lane >> 3) & 1), 2 * m)
            else:
                place = tile.row(base, warp * product.rows + (lane & 15), 16 * m)
                address = tile.chunk(place, lane >> 4, 2 * k)
            for word in e.load_matrices(address, transposed):
                numbers += e.unpack(half, word)
    return numbers


def _of_head(b: Block, head: I32 | None) -> I64:
    """The address of the gradient of the bias of a head; of queries that are columns, of head `head` of the group."""
    start: I64 = b.places["grad_bias"]
    return start if head is None else start + b.e.wide(head) * b.p.grad_bias_head


def write_tile(b: Block, tile: Tile, base: I32, thread: I32, query: I32, head: I32) -> None:
    """Store dS from a tile of shared memory, whose rows are keys: 16 bytes of a row of the gradient at once.

    `ldmatrix` transposes. Its lanes name the rows of the tile in such an order that a thread gets eight neighbours.
    """
    e, c, p = b.e, b.c, b.p
    warp, lane, parts = thread >> 5, thread & 31, tile.rows // KEYS
    address = _of_head(b, head)
    for n in range(parts * tile.columns // 8 // c.warps):
        unit = warp + n * c.warps
        part, chunk = unit % parts, unit // parts
        place = tile.row(base, part * KEYS + ((lane & 6) << 2) + ((lane >> 3) << 1) + (lane & 1))
        words = e.load_matrices(tile.chunk(place, chunk), True)
        i, j = query + chunk * 8 + (lane >> 2), b.first + part * KEYS + (lane & 3) * 8
        at = address + e.wide(i) * p.grad_bias_row + e.wide(j) * SIZES[c.storage]
        e.store("i", at, words, (i < b.span.columns) & (j < b.rows))


def write(b: Block, lanes: Lanes, thread: I32, column: I32, ds: Regs, head: I32 | None) -> None:
    """Store dS, or add it to sums (`Spec.grad_bias`); the tile begins at a column. Rows are keys if there is a `head`.

    What a thread adds to one element is summed in registers first, and over the lanes that share it.
    """
    e, c, p, product, layout = b.e, b.c, b.p, lanes.product, lanes.layout
    lane, kind = thread & 31, product.kind
    of_row, of_column, shared_rows, shared_columns = p.grad_bias_row, p.grad_bias_column, False, False
    if c.grad_bias in ("sums_of_rows", "sums_of_all"):
        shared_rows = True
    if c.grad_bias in ("sums_of_keys", "sums_of_all"):
        shared_columns = True
    if head is not None:
        of_row, of_column, shared_rows, shared_columns = of_column, of_row, shared_columns, shared_rows
    sums: dict[tuple[int, int], list[int]] = {}
    for n, (slot, offset) in enumerate(layout.elements):
        sums.setdefault((0 if shared_rows else slot, 0 if shared_columns else offset), []).append(n)
    row, column = b.first + lanes.rows(thread)[0], column + product.lane_column(lane)
    start = _of_head(b, head) + e.wide(row) * of_row + e.wide(column) * of_column
    own = None  # whether the lane is the one that adds
    if shared_columns:
        own = (lane & 3).equals(0)
    if shared_rows:
        first = (lane >> 2).equals(0)
        own = first if own is None else own & first
    for (slot, offset), registers in sums.items():
        x = ds[registers[0]]
        for n in registers[1:]:
            x = x + ds[n]
        for distance in (*(product.reduce if shared_columns else ()), *(ACROSS_ROWS if shared_rows else ())):
            x = x + e.shuffle_xor(x, distance)
        down = product.slot_row(slot)
        inside = None if shared_rows else row + down < b.span.rows
        if not shared_columns:
            within = column + offset < b.span.columns
            inside = within if inside is None else inside & within
        where = own if inside is None else inside if own is None else own & inside
        assert where is not None
        at = start + of_row * down + of_column * offset
        if c.grad_bias == "elements":
            e.store(kind, at, [x], where)
        else:
            e.add_anywhere(at, x, where)
