// The operations that each instruction set implements, and the standard headers that they use: included before any instruction set is
// chosen, so that no function of the standard library is compiled for more than the oldest processor.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "abi.h"
#include "pool.h"

namespace segue {

// Denormals count as zero, in what is read and in results, until it ends.
class FlushDenormals {
#if defined(__x86_64__)
 public:
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON | 0x0040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
 public:
  FlushDenormals() {}
#endif
};

struct Operations {
  const char* name;
  // inputs [num_rows][num_inputs, twice as many if gated] → outputs [num_rows][num_outputs], stored or added
  void (*linear)(Pool&, const Linear&, const float* inputs, int64_t num_rows, float* outputs, bool is_added);
  // heads [rows][num_heads + 2 * num_kv_heads][head_dim]: queries, keys, values
  void (*rotate_and_write)(Pool&, const Cache&, int64_t layer, float* heads, const float* qk_norm, const Piece*, int64_t num_pieces);
  // outputs [rows][num_heads][head_dim]
  void (*attend)(Pool&, const Cache&, int64_t layer, const float* heads, float* outputs, const Piece*, int64_t num_pieces);
};

namespace portable { extern const Operations operations; }
#if defined(__x86_64__)
namespace avx2 { extern const Operations operations; }
namespace avx512 { extern const Operations operations; }
namespace avx512vnni { extern const Operations operations; }
namespace avx512bf16 { extern const Operations operations; }
#endif

}  // namespace segue
