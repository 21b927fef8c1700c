"""What a family of CPU kernels is compiled for, and the shapes of tiles that follow from it."""

from typing import Any, NamedTuple

from .elements import ELEMENTS, Element
from .machine_code import part
from .simd import Host, Vector


class Spec(NamedTuple):
    """What one family of kernels is compiled for: how the numbers are stored, and the host."""

    storage: str  # a name in ELEMENTS
    host: Host
    task: str = "forward"  # or "weights", "backward", "decode"
    stored: str = ""  # how keys and values are stored, if not as the queries: in a cache

    @property
    def name(self) -> str:
        kinds = self.storage + (f"-{self.stored}" if self.stored else "")
        return f"{self.task}-{kinds}-{self.host.name}"

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
    def kept(self) -> Element:
        """What keys and values are stored as."""
        return ELEMENTS[self.stored or self.storage]

    @property
    def scaled(self) -> bool:
        """Whether every key and every value has a scale, by which its numbers are to be multiplied."""
        return self.kept.size == 1

    @property
    def vector(self) -> Vector:
        return Vector(64 if self.storage == "float64" else 32, self.host)

    @property
    def dot(self) -> bool:
        """Whether products are taken by the host's bfloat16 dot-product instruction."""
        return self.storage == "bfloat16" and not self.stored and self.host.bf16_dot and self.task != "decode"

    @property
    def converts(self) -> bool:
        """Whether keys and values are widened into scratch, tile by tile, before they are used."""
        return self.kept.size < self.vector.bytes and not self.dot

    @property
    def block(self) -> tuple[int, int]:
        """Rows x vectors that stay in registers: flat within 7 % among those that fit, half the speed where none do."""
        if self.task == "decode":  # few queries: a tile is one vector of them
            return (4, 1)
        return (4, 4) if self.host.registers == 32 else (4, 3) if self.host.bits == 256 else (4, 2)

    @property
    def query_tile(self) -> int:
        return self.block[1] * self.vector.width

    @property
    def key_tile(self) -> int:
        return 64
