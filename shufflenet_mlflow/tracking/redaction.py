"""Remove credentials from text before anyone sees it."""

import re

# Up to the last @: an unquoted password may contain anything. File names may contain an @ of their own.
_USERINFO = re.compile(r"\b(?!sqlite[:+]|file:)(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://)[^\s'\"]*@")
_USERINFO_IN_WORD = re.compile(r"\b(?!sqlite[:+]|file:)(?P<scheme>[a-zA-Z][a-zA-Z0-9+.-]*://).*@", re.DOTALL)
_SECRET = re.compile(r"(?P<name>[?&][\w.-]*(?:password|passwd|pwd|token|secret|key|signature|sig)=)[^&\s'\"]*", re.I)


def redact(text: str) -> str:
    """Return `text` without user, password and secret query values of the URIs in it."""
    return _SECRET.sub(r"\g<name>***", _USERINFO.sub(r"\g<scheme>", text))


def redact_word(word: str) -> str:
    """Do the same for one word of a command line, in which passwords may contain blanks and quotes."""
    return redact(_USERINFO_IN_WORD.sub(r"\g<scheme>", word))
