"""The steps of `prepare` on other machines: as blocks of datatrove, on Slurm, on Ray."""
