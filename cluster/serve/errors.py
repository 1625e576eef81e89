"""What can go wrong when an application is deployed, scaled or removed."""


class ServeError(RuntimeError):
    """Serving cannot do what was asked; the message says why in one line."""


class PortTaken(ServeError):
    """Something else listens where the endpoint should."""


class NoRoom(ServeError):
    """The cluster is too small for what is asked of it."""


class DeployFailed(ServeError):
    """The application did not come up."""


class NotDeployed(ServeError):
    """There is no application to act on."""


def telling_line(message: str) -> str:
    """The line that says what went wrong: of a traceback, the exception's first; else the last that has a word in it.

    What Ray says of a dead actor has many lines, and its clients put a full stop after them, in a line of its own."""
    lines = [line for line in message.splitlines() if any(map(str.isalnum, line))]
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    after = lines[frames[-1] + 1 :] if frames else []
    raised = [line for line in after if not line[0].isspace()]
    return (raised[:1] or lines[-1:] or [""])[0].strip()
