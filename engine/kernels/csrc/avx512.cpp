// Processors with AVX-512 but without its int8 dot products.
#include "operations.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define SEGUE_VNNI 0

namespace segue::avx512 {
namespace {
#include "vector_avx512.h"
#include "math.h"
#include "linear.h"
#include "attention.h"
}  // namespace
const Operations operations = {"avx512", linear, rotate_and_write, attend};
}  // namespace segue::avx512
#endif
