"""Test cases, plain-loop counterparts of the planner's tables, and the compile report, for tests and `make gpu`."""
