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


def last_line(message: str) -> str:
    """The last line of a message that says something: of a traceback, the exception."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else ""
