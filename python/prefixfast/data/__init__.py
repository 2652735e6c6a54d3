"""Rows and tasks, which turn files and tables into the strings that a model reads."""

from prefixfast.data.builtin_tasks import TASKS, find_task, table_task
from prefixfast.data.columns import column_task
from prefixfast.data.corpora import read_task
from prefixfast.data.rows import read_rows
from prefixfast.data.task import Task

__all__ = ["TASKS", "Task", "column_task", "find_task", "read_rows", "read_task", "table_task"]
