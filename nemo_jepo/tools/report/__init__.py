"""nemo-jepo report: run folders and results of experiments as one page that needs no network. No torch here.

runs     a run folder, checked          figures   results.parquet -> the paper's plots
page     runs and figures -> HTML       command   the command line
"""
