"""Test cases, plain-loop counterparts of the planner's tables, and the compile report; used by tests and `make gpu`."""
