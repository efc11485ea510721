"""Counts what Python asks MLX for, as the engine's Device::counts does for us."""

import mlx.core as mx


class Counter:
    """Counts the array operations that Python asks MLX for: calls of mlx.core and mlx.core.fast, operators and methods of arrays.

    What runs inside a compiled function is one operation, as it is one kernel.
    """

    # Not operations: they run what was asked for, or only look at arrays.
    LOOKS = {"eval", "async_eval", "compile", "clear_cache", "get_peak_memory", "get_active_memory", "stream", "synchronize",
             "new_stream", "default_device", "default_stream", "array", "disable_compile", "enable_compile", "issubdtype",
             "set_wired_limit", "device_info", "thread_local_stream", "new_thread_local_stream"}
    OPERATORS = ["add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "neg", "matmul", "lt", "le", "gt", "ge", "eq",
                 "ne", "and", "or", "getitem", "setitem", "invert", "floordiv", "mod"]
    METHODS = ["reshape", "transpose", "swapaxes", "astype", "sum", "max", "min", "mean", "squeeze", "flatten", "split", "moveaxis",
               "square", "exp", "log", "argmax", "cumsum", "view", "item", "tolist", "sqrt", "rsqrt", "any", "all"]

    def __init__(self):
        self.operations = self.reads = self.depth = 0

    def wrapped(self, function, is_read=False):
        def call(*arguments, **options):
            self.depth += 1
            try:
                return function(*arguments, **options)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    if is_read:
                        self.reads += 1
                    else:
                        self.operations += 1
        return call

    def install(self):
        for module in (mx, mx.fast, mx.random, mx.linalg):
            for name in dir(module):
                function = getattr(module, name)
                is_operation = not name.startswith("_") and name not in self.LOOKS and not isinstance(function, type)
                is_ours = getattr(function, "__module__", None) == "released_mlx"
                if is_operation and (is_ours or type(function).__name__ == "nb_func"):
                    setattr(module, name, self.wrapped(function))
        for name in [f"__{name}__" for name in self.OPERATORS] + self.METHODS:
            if hasattr(mx.array, name):
                setattr(mx.array, name, self.wrapped(getattr(mx.array, name), name in ("item", "tolist")))
        transposed = mx.array.T
        mx.array.T = property(self.wrapped(transposed.__get__))
