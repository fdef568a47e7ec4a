"""A step: the user's forward, loss and optimizer, and the engines that run them.

spec         what a step is made of; what an engine is
arguments    checks of the objects that a step is made of
train_step   TrainStep, the public door
plan         which engine, and why
eager, torch_compile, compiled, auto, worth  the engines
rung, graphed, cudagraph                 what a compiled step runs by: the program itself, or CUDA graphs of it
state, options, gradients                what a graph reads and changes: the user's own tensors and options
function, optimizer, scaling             the step as a function of them, for a trace to record
kernels, padded                          sums of rows: loops of our own on the CPU, torch's operators elsewhere
trace, recorded                          the graphs of a step
capture, guards, attributes              what they depend on of the user's objects
unroll, span, launch                     several steps over resident rows as one, and when that is taken up
compiler, identity, cache, shared_folder from graphs to programs on disk, by what they are known
build, toolkit, program                  the compiling child and what it needs; the program that it leaves
replay, parity, changes, apart, snapshot running programs, and judging that they give eager's numbers
marked                                   programs whose kernels the profiler sees
clock, trial, threads                    how long a step takes; which way is fastest; how many CPU threads
torch_private/                           every private torch API that this needs
"""
