// Processors with AVX2, FMA and F16C.
#include "operations.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define SEGUE_VNNI 0

namespace segue::avx2 {
namespace {
#include "vector_avx2.h"
#include "math.h"
#include "linear.h"
#include "attention.h"
}  // namespace
const Operations operations = {"avx2", linear, rotate_and_write, attend};
}  // namespace segue::avx2
#endif
