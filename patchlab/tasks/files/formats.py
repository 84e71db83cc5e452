"""The formats of task files, and how a file's is recognised by its columns."""

from collections.abc import Sequence

from patchlab.errors import TaskError
from patchlab.tasks.files import mib, rows
from patchlab.tasks.files.rows import OWN, Fields, Format

FORMATS = (*rows.FORMATS, *mib.FORMATS)


def recognise(name: str, listed: Sequence[Fields], corrupted: str) -> Format:
    """The format of a file, from its columns.

    Raises:
        TaskError: no format has these columns.
    """
    columns = set(listed[0])

    def chosen(column: str) -> str:
        return corrupted if column == "corrupted" else column

    missing = [chosen(column) for column, either in OWN.items() if not columns & {chosen(column), either}]
    for format_ in FORMATS[1:]:
        if missing and {chosen(column) for column in format_.columns} <= columns:
            return format_
    if missing:
        others = "; ".join(f"{format_.name}: {', '.join(format_.columns)}" for format_ in FORMATS[1:])
        raise TaskError(
            f"{name} lacks the column{'s' if len(missing) > 1 else ''} {', '.join(missing)}; it has {', '.join(sorted(columns)) or 'none'}. "
            f"A task file has clean, corrupted, correct and incorrect (as text, or as clean_ids, corrupted_ids, correct_id, incorrect_id). "
            f"Also read: {others}."
        )
    return FORMATS[0]
