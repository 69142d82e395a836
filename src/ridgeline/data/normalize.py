"""One form for every text: Unicode normal form, one kind of line end, no control characters."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
SURROGATES = re.compile("[\ud800-\udfff]")


def normalize(text: str, form: str) -> str:
    """``text`` in Unicode form ``form`` (``"nfc"``, ``"nfkc"`` or ``"none"``), whatever its origin.

    Line ends of any kind (CR LF, CR, vertical tab, form feed, NEL, line and paragraph separator) become one
    newline; other control characters but the tab, and byte order marks, are removed; a surrogate without its
    other half, which no UTF-8 file can hold, becomes U+FFFD. Applying it twice changes nothing.
    """
    target: Literal["NFC", "NFKC"] = "NFKC" if form == "nfkc" else "NFC"
    if form != "none" and not text.isascii():
        text = unicodedata.normalize(target, text)
    text = CONTROLS.sub("", LINE_ENDS.sub("\n", text))
    if not text.isascii():
        text = SURROGATES.sub("\ufffd", text)
        # Removing a character may bring two together that compose.
        if form != "none" and not unicodedata.is_normalized(target, text):
            text = unicodedata.normalize(target, text)
    return text
