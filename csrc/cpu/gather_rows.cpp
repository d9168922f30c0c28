// Gathers rows of several arrays, which count as one array, by their indices: one copy a row.
//
// On one thread, because memory is the limit and the caller reads ahead while others compute.
#include <algorithm>
#include <cstring>

#include "parallel.h"

// parts[k] holds the rows from the index starts[k] to starts[k + 1]. Stops at an index outside of
// them, and writes its place to `outside`.
EXPORT void ds_gather_rows(const int64_t* indices, const char* const* parts, const int64_t* starts,
                           char* rows, int64_t count, int64_t number_of_parts, int64_t row_bytes,
                           int64_t* outside) {
  for (int64_t i = 0; i < count; ++i) {
    if (indices[i] < 0 || indices[i] >= starts[number_of_parts]) {
      *outside = i;
      return;
    }
    if (row_bytes == 0) continue;  // which may have null for an address
    const int64_t* end = std::upper_bound(starts, starts + number_of_parts, indices[i]);
    const int64_t part = end - starts - 1;
    std::memcpy(rows + i * row_bytes, parts[part] + (indices[i] - starts[part]) * row_bytes,
                static_cast<size_t>(row_bytes));
  }
}
