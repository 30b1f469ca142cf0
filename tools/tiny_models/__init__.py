"""Scripts that train the tiny models shipped in `inlaid.tiny`; not part of the wheel."""
