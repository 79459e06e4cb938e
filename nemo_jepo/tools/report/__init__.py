"""nemo-jepo report: run folders and results of experiments as one page that needs no network. No torch here.

runs     a run folder, checked          results, plots, drawings   results.parquet -> the paper's plots
page     runs and plots -> HTML         command                    the command line
"""
