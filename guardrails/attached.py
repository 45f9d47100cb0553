"""Files that belong to a policy and stand beside it: word lists, schemas.

They are read once, while the policy is read, and become part of its options, so that the policy's version covers them.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationInfo

LARGEST = 16 * 1024 * 1024
"""Bytes of a file that a policy may bring."""


def read(name: str, info: ValidationInfo) -> str:
    """The text of a file, looked up in the policy's folder (`context={"folder": ...}` of the validation), else here.

    Raises ValueError where the policy has no folder, for a path that leads out of it, and for a file that cannot be
    read as UTF-8.
    """
    context = {"folder": "."} if info.context is None else info.context
    if context.get("folder") is None:
        raise ValueError(f"{name!r} belongs in the folder of a policy, and this policy is in none; write it out here")
    folder = Path(context["folder"]).resolve()
    path = (folder / name).resolve()
    if not path.is_relative_to(folder):
        raise ValueError(f"{name!r} leads out of the policy's folder; put the file beside the policy")
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{name!r} is larger than {LARGEST >> 20} MB; split it over several rules")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{name!r} cannot be read ({error.strerror}); put it beside the policy") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{name!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
