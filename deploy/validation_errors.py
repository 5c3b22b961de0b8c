"""What is wrong with a field, in OpenAI's codes and in words that name it."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from deploy.openai_errors import ApiError

# Endings of pydantic's names for "this is of another type".
_TYPE_ERRORS = ("_type", "_parsing", "int_from_float")


def validation_error(error: ValidationError) -> ApiError:
    """The first field at fault; its name is `param`, and the way inside it is in the message."""
    details = error.errors(include_url=False, include_input=False)
    found = _most_telling(details)
    if not found["loc"]:
        return ApiError(found["msg"])
    param = str(found["loc"][0])
    where = _path(found)
    if found["type"] == "missing":
        return ApiError(
            f"{where}: missing required parameter", param=param, code="missing_required_parameter"
        )
    if found["type"] == "extra_forbidden":
        return ApiError(f"{where}: unknown parameter", param=param, code="unknown_parameter")
    code = "invalid_type" if _is_type_error(found) else "invalid_value"
    message = found["msg"].removeprefix("Value error, ")
    return ApiError(f"{where}: {message}", param=param, code=code)


def _is_type_error(error: ErrorDetails) -> bool:
    return error["type"].endswith(_TYPE_ERRORS)


def _most_telling(details: list[ErrorDetails]) -> ErrorDetails:
    """Of the first field's errors the one of the alternative that came nearest to fitting."""
    first = details[0]["loc"][:1]
    same_field = [each for each in details if each["loc"][:1] == first]
    return max(same_field, key=lambda each: (not _is_type_error(each), len(each["loc"])))


def _path(error: ErrorDetails) -> str:
    """`messages[0].content`: pydantic's names of a union's alternatives are left out."""
    field, *inner = error["loc"]
    path = str(field)
    for part in inner:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "TextPart"):
            path += f".{part}"
    return path
