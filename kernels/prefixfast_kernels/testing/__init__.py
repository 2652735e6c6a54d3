"""Test cases, plain-loop twins of the planner's tables, and the offline compiler; used by tests and `make gpu`."""
