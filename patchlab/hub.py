"""The Hugging Face hub: its address, whether it may be asked, and what its refusals mean."""

import os

HUB_TIMEOUT = 2.0
"""Seconds to wait for the hub's answer about what is not in the cache."""


def is_offline() -> bool:
    """Whether the hub may not be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")


def hub_endpoint() -> str:
    """The address of the hub."""
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")


def refusal(code: int, endpoint: str, what: str, needs: str = "") -> str:
    """What an HTTP status of the hub means: for a model or another repository, and the file that it must have."""
    return {
        401: f"the hub has no such {what}, or it is private: set HF_TOKEN if you have access",
        403: "access to it is restricted: set HF_TOKEN to a token that has access",
        404: f"the hub has no such {what}{needs}",
    }.get(code, f"the hub at {endpoint} answered with HTTP {code}")
