"""A step: the user's forward, loss and optimizer, and the engines that run them.

spec         what a step is made of; what an engine is
train_step   TrainStep, the public door
plan         which engine, and why
eager, torch_compile, compiled, auto, worth  the engines
rung, graphed, capture                   what a compiled step runs by: the program itself, or CUDA graphs of it
state, options, gradients                what a graph reads and changes: the user's own tensors and options
function, optimizer, scaling             the step as a function of them, for a trace to record
kernels, padded                          sums of rows: loops of our own on the CPU, torch's operators elsewhere
trace, recorded, guards                  the graphs of a step, and what they take for granted
unroll, span, launch                     several steps over resident rows as one, and when that is taken up
program, build, compiler, identity, cache  from graphs to a loaded program: child process, cache on disk
replay, parity, changes, apart           running programs, and judging that they give eager's numbers
marked                                   programs whose kernels the profiler sees
clock, threads                           how long a step takes; how many CPU threads, by measuring
torch_private/                           every private torch API that this needs
"""
