"""Methods by which all points of a path agree about its end."""
