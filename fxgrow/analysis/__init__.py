"""Analysis: the axes of a traced program, their names, and what values look-ups can take."""
