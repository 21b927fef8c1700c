"""Loaded by every Python process of the kit, as its folder is on PYTHONPATH: see gpukit.py beside the folder."""

import os
import sys

if os.environ.get("NA_KIT"):
    sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    import gpukit

    gpukit.install()
