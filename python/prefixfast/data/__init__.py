"""Rows and tasks: from files and tables to the strings that a model sees."""

from prefixfast.data.corpora import read_task
from prefixfast.data.rows import read_rows
from prefixfast.data.tasks import TASKS, Task, find_task, table_task

__all__ = ["TASKS", "Task", "find_task", "read_rows", "read_task", "table_task"]
