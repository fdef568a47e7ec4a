"""`bench`: arms of a workload against each other, in blocks of fresh processes that take turns.

arm, arms, sources          what an arm is, the arms that every job has, and where others come from
plan, run, rounds           what is to be measured; blocks, flags and repeats; the turns within a block
runner, process, messages   the process of an arm from without and from within, and what both say
losses                      whether an arm trains the reference's numbers
machine, noise              what disturbs a measurement, and what is known of this machine's noise
record, summary             the file, and its tables
"""
