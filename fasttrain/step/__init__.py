"""A step: the user's forward, loss and optimizer, and the engines that run them.

spec         what a step is made of; what an engine is
train_step   TrainStep, the public door
plan         which engine, and why
eager, torch_compile, compiled, auto, worth  the engines
graphed, capture                         the engine of CUDA graphs, and what captures and replays them
state, options, gradients                what a graph reads and changes: the user's own tensors and options
function, optimizer, scaling             the step as a function of them, for a trace to record
kernels                                  loops of our own where the compiler has no good code
trace, recorded, guards                  the graphs of a step, and what they take for granted
unroll, span, launch                     several steps over resident rows as one graph, and when that is taken up
program, build, compiler, identity, cache  from graphs to a loaded program: child process, cache on disk
replay, parity, changes, apart           running programs, and judging that they give eager's numbers
marked                                   programs whose kernels the profiler sees
threads                                  how many CPU threads, by measuring
torch_private/                           every private torch API that this needs
"""
