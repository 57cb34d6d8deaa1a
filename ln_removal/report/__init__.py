"""What people look at: pages, plots, tables and model cards."""
