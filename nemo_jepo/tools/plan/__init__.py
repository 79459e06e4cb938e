"""nemo-jepo plan: memory, time and cost of a run, before a GPU is touched. Neither torch nor NeMo is imported here.

hardware     what GPUs can do           workload   what a step has to do, and how long sequences are
shape        parameters and FLOP        memory     bytes on a GPU, phase by phase
calibration  what software reaches      training, generation   seconds of a phase
estimate     one run on one cluster     search     the best layout, and what makes a run fit
"""
