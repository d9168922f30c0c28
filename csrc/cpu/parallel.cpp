#include "parallel.h"

// As declared in torch/csrc/stable/c/shim.h.
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain,
                                RangeFunction function, void* context);

static ParallelFor pool = nullptr;

EXPORT void ds_set_parallel_for(ParallelFor parallel_for) { pool = parallel_for; }

// Tells code of another version that this library is not its own.
EXPORT int ds_cpu_interface() { return DS_INTERFACE; }

int parallel_for(int64_t count, int64_t grain, RangeFunction function, void* context) {
  if (pool != nullptr) return pool(0, count, grain, function, context);
  function(0, count, context);
  return 0;
}
