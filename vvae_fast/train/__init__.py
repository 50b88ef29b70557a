"""Training on Lightning: data, objective, module, plots and the command line (extra ``[train]``)."""
