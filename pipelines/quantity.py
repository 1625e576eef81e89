"""Numbers for the eye."""


def size_in_words(count: float) -> str:
    """`512 bytes`, `3.4 MB`: decimal units."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
