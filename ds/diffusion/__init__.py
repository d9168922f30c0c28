"""The mathematics of diffusion: schedules, denoisers, grids, noise and solvers."""
