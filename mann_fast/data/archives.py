"""What is asked of a zip archive's entries before they are inflated."""

from __future__ import annotations

import zipfile


def check_entry(entry: zipfile.ZipInfo) -> None:
    """ValueError where it is encrypted, or compressed in a way that inflates without a bound."""
    if entry.flag_bits & 1:
        raise ValueError("it is encrypted; expected an archive without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        method = zipfile.compressor_names.get(entry.compress_type, entry.compress_type)
        raise ValueError(f"compressed by the method {method}; expected deflate or none")
