// Processors with AVX-512, VNNI and BF16.
#include "operations.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")
#define SEGUE_VNNI 1
#define SEGUE_BF16 1

namespace segue::avx512bf16 {
namespace {
#include "vector_avx512.h"
#include "math.h"
#include "linear.h"
#include "attention.h"
}  // namespace
const Operations operations = {"avx512bf16", linear, rotate_and_write, attend};
}  // namespace segue::avx512bf16
#endif
