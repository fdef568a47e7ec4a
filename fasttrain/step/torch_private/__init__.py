"""Every private torch API that the compiled step needs, in one room, for torch 2.11 to 2.13.

Each has a canary in tests/step: test_torch_private.py, test_torch_objects.py, test_kernels.py, test_small.py,
test_scratch.py, test_native.py, test_cpp.py, test_marked.py or test_cudagraph.py.
"""

from fasttrain.step.torch_private.cuda import (
    cudnn_precision,
    end_failed_capture,
    reserve_workspace,
    without_cudnn_tf32,
)
from fasttrain.step.torch_private.dynamo import (
    DynamoCapture,
    GraphInput,
    Guarded,
    capture_function,
    function_modes,
    scope_of,
)
from fasttrain.step.torch_private.graphs import (
    global_module_hooks,
    has_onednn_lstm,
    is_changed,
    prepare_for_inductor,
    reported_as_compiling,
    trace_graph,
    unpickle_with_graph,
    without_onednn,
)
from fasttrain.step.torch_private.marking import origins_of, recorded_as
from fasttrain.step.torch_private.native import native_loop
from fasttrain.step.torch_private.objects import (
    NO_GRADIENT_HOOKS,
    has_gradient_hooks,
    has_own_step,
    module_tables,
    note_step,
    optimizer_hooks,
    replace_listing,
    restore_listing,
    run_backward,
    scaler_tensors,
    step_optimizer,
    was_compiled_by_user,
    was_step_taken,
)
from fasttrain.step.torch_private.programs import (
    Compilation,
    compilations,
    compile_package,
    dynamo_error,
    examples_of,
    flat_runner,
    lacks_resources,
    tensor_check,
)

__all__ = [
    "NO_GRADIENT_HOOKS",
    "Compilation",
    "DynamoCapture",
    "GraphInput",
    "Guarded",
    "capture_function",
    "compilations",
    "compile_package",
    "cudnn_precision",
    "dynamo_error",
    "end_failed_capture",
    "examples_of",
    "flat_runner",
    "function_modes",
    "global_module_hooks",
    "has_gradient_hooks",
    "has_onednn_lstm",
    "has_own_step",
    "is_changed",
    "lacks_resources",
    "module_tables",
    "native_loop",
    "note_step",
    "optimizer_hooks",
    "origins_of",
    "prepare_for_inductor",
    "recorded_as",
    "replace_listing",
    "reported_as_compiling",
    "reserve_workspace",
    "restore_listing",
    "run_backward",
    "scaler_tensors",
    "scope_of",
    "step_optimizer",
    "tensor_check",
    "trace_graph",
    "unpickle_with_graph",
    "was_compiled_by_user",
    "was_step_taken",
    "without_cudnn_tf32",
    "without_onednn",
]
