"""Reads the machine code of CUDA kernels."""

from pathlib import Path
from sysconfig import get_path

import pytest


def disassembler():
    """``nvdisasm``, from NVIDIA's wheel."""
    found = sorted(Path(get_path("purelib")).glob("nvidia/**/bin/nvdisasm*"))
    return found[0] if found else pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
