"""A step: the user's forward, loss and optimizer, and the engines that run them.

train_step   TrainStep, the public object; which engine it gets
spec         the user's objects and options, checked; what an engine is
eager        the eager engine; torch.compile as an engine to measure against
ladder       the engine above eager: compiled candidates are verified, tried and adopted
candidate    one compiled form of the step; what runs it on a device
verify       does a program give eager's numbers? one rule, against the step in fp64
capture      Dynamo: forward, loss and metrics as a graph, with guards on what they read
guards       guards on the optimizer, the gradients and the metrics
trace        the whole step as graphs: what they hold for, and their inputs
function     the step as a function that a trace records; the recorded graphs
state        the tensors that a step changes; snapshots of them
optimizer    the user's optimizer as graph code; its options
walk         resident rows: a step that takes its batch by a cursor, many steps a call
program      a compiled step, loaded
cudagraph    compiled steps in CUDA graphs, of one step and of 16
compiler     from a traced step to its program: keys, cache, child; does compiling pay?
build        the compiling child process
cache        compiled programs on disk
kernels      sums of rows of unequal length: loops of our own on the CPU, torch's operators elsewhere
timing       clocks, trials, the number of CPU threads
torch_private/  every private torch API that this needs, each with a canary test
"""
