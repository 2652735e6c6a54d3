"""Rows and tasks: from files and tables to the strings that a model sees."""
