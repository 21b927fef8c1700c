"""What a family of CPU kernels is compiled for, and the shapes of tiles that follow from it."""

from typing import Any, NamedTuple

from .elements import ELEMENTS, Element
from .machine_code import part
from .simd import Host, Vector


def usual_vectors(host: Host) -> int:
    """Return the number of vectors of queries in a tile for long sequences."""
    return 4 if host.registers == 32 else 3 if host.bits == 256 else 2


class Spec(NamedTuple):
    """What one family of kernels is compiled for: how the numbers are stored, and the host."""

    storage: str  # a name in ELEMENTS
    host: Host
    task: str = "forward"  # or "weights", "backward", "decode"
    kv_storage: str = ""  # of keys and values, where a cache stores them in another format
    vectors: int = 0  # of queries in a tile, if another number than is best for long sequences
    wide: bool = False  # whether results are in the compute type and not rounded to a half type

    @property
    def name(self) -> str:
        kinds = self.storage + (f"-{self.kv_storage}" if self.kv_storage else "")
        more = (f"-{self.vectors}" if self.vectors else "") + ("-wide" if self.wide else "")
        return f"{self.task}-{kinds}-{self.host.name}{more}"

    def jit(self, function: Any) -> Any:
        """`part`, under a symbol that no other kernel has.

        Numba numbers functions of one name by order of compilation. Kernels that were compiled in different processes
        and loaded into one can then share a symbol, and the linker takes the first for both: seen as float32 data in
        bfloat16 code.
        """
        function.__qualname__ = function.__name__ = f"{function.__name__}_{self.name}".replace("-", "_")
        return part(function)

    @property
    def element(self) -> Element:
        return ELEMENTS[self.storage]

    @property
    def out_element(self) -> Element:
        """What results are stored as: the output, and the gradients of queries, keys and values."""
        return ELEMENTS["float32"] if self.wide else self.element

    @property
    def kv_element(self) -> Element:
        """What keys and values are stored as."""
        return ELEMENTS[self.kv_storage or self.storage]

    @property
    def quantized(self) -> bool:
        """Whether every key and every value has a scale, by which its numbers are to be multiplied."""
        return self.kv_element.size == 1

    @property
    def vector(self) -> Vector:
        return Vector(64 if self.storage == "float64" else 32, self.host)

    @property
    def bf16_dot(self) -> bool:
        """Whether products are taken by the host's bfloat16 dot-product instruction."""
        return self.storage == "bfloat16" and not self.kv_storage and self.host.bf16_dot and self.task != "decode"

    @property
    def widens_kv(self) -> bool:
        """Whether keys and values are widened into scratch, tile by tile, before they are used."""
        return self.kv_element.size < self.vector.bytes and not self.bf16_dot

    @property
    def block(self) -> tuple[int, int]:
        """Rows x vectors that stay in registers: flat within 7 % among those that fit, half the speed where none do."""
        if self.task == "decode":  # few queries, so that a tile is one vector of them
            return (4, 1)
        vectors = self.vectors or usual_vectors(self.host)
        # Beside the block, registers hold a row of vectors and a broadcast number.
        return (8 if 9 * vectors < self.host.registers else 4), vectors

    @property
    def query_tile(self) -> int:
        return self.block[1] * self.vector.width

    @property
    def key_tile(self) -> int:
        return 64
