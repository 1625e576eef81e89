"""What the sections of a recipe have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from cluster.location import check_slashes, has_credentials

Positive = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """Frozen, with no key that is not obeyed and no number that is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def lasting_uri(uri: str) -> str:
    """The same place, named so that it means that everywhere: a recipe is stored with its run and may be read in
    another folder, by other people. Raises ValueError for a URI with credentials or with a slash too few."""
    check_slashes(uri)
    if has_credentials(uri):
        raise ValueError("carries credentials; put them in the environment, a recipe is stored with its run")
    if "://" in uri:
        return uri
    path = os.path.abspath(os.path.expanduser(uri))
    try:
        path.encode()
    except UnicodeEncodeError:  # names on disk are bytes, and a recipe is text
        return Path(path).as_uri()
    return path
