"""Methods on the straight path from noise to data, x_t = (1 - t) * x0 + t * noise."""
