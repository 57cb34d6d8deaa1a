"""report.html: what a run did and measured, on one page that needs nothing else."""
