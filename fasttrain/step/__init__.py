"""A step: the user's forward, loss and optimizer, and the engines that run them.

spec         what a step is made of; what an engine is
train_step   TrainStep, the public door
plan         which engine, and why
eager, torch_compile, compiled, auto     the engines
state, optimizer, trace, guards          from the user's objects to one graph, and what it takes for granted
program, build, compiler, cache          from the graph to a loaded program: child process, cache on disk
replay, parity                           running programs, and judging that they give eager's numbers
torch_private                            every private torch API that this needs
"""
