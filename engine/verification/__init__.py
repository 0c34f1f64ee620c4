"""A layout against one rank: the same batch, the same model, on CPUs; every gradient and every weight compared."""
