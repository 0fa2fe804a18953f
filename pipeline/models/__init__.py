"""Model families: what the planner needs of them, and their torch code beside it."""
