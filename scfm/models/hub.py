"""Whether the hub can be reached, in seconds: its own clients try again and again."""

import ssl
from http.client import HTTPException
from threading import Thread
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants

SECONDS = 5.0


def hub_reachable() -> bool:
    """Whether the hub of huggingface_hub's settings answers; no where HF_HUB_OFFLINE is set."""
    return not constants.HF_HUB_OFFLINE and answers(constants.ENDPOINT, SECONDS)


def unreachable() -> str:
    """Why `hub_reachable` says no, in a few words."""
    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"


def answers(url: str, seconds: float = SECONDS) -> bool:
    """Whether a server answers within so many seconds, be it with an error; through the proxies of the
    environment."""
    found: list[bool] = []

    def ask() -> None:
        try:
            urlopen(Request(url, method="HEAD"), timeout=seconds).close()
            found.append(True)
        except (HTTPError, HTTPException):
            found.append(True)
        except OSError as error:  # other clients may know the certificate
            found.append(isinstance(getattr(error, "reason", None), ssl.SSLError))

    thread = Thread(target=ask, daemon=True)  # the look-up of a name knows no time limit
    thread.start()
    thread.join(seconds)
    return found == [True]
