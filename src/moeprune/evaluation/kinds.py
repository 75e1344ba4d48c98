"""What kind of text a domain is, told by its name; a name that says nothing has no kind."""

from __future__ import annotations

import re

LANGUAGES, CODE, MATHS = "languages", "code", "maths"

_NAMES = {
    LANGUAGES: """
        arabic bengali bulgarian catalan chinese croatian czech danish dutch english estonian
        finnish french german greek hebrew hindi hungarian indonesian italian japanese korean
        latvian lithuanian malay norwegian persian polish portuguese romanian russian serbian slovak
        slovenian spanish swahili swedish tamil telugu thai turkish ukrainian urdu vietnamese""",
    CODE: "code python java javascript typescript rust golang sql bash humaneval mbpp",
    MATHS: "math maths mathematics algebra arithmetic geometry gsm8k",
}
_KIND = {word: kind for kind, words in _NAMES.items() for word in words.split()}
_CODES = """
    ar bn bg ca zh hr cs da nl en et fi fr de el he hi hu id it ja ko lv lt ms no fa pl pt ro ru sr
    sk sl es sw sv ta te th tr uk ur vi"""


def kind_of(domain: str) -> str | None:
    """Languages, code or maths; None if the name does not say.

    >>> kind_of("wiki-german"), kind_of("de"), kind_of("python"), kind_of("gov")
    ('languages', 'languages', 'code', None)
    """
    name = domain.lower()
    if name in _CODES.split():
        return LANGUAGES
    words = re.findall(r"[a-z0-9]+", name)
    return next((_KIND[word] for word in words if word in _KIND), None)
