"""Teachers and students: reading and writing them, running them, drawing from them."""
