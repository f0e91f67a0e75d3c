// Sixteen lanes in two 256-bit registers: AVX2, FMA and F16C.
#include <immintrin.h>

constexpr int kMaxRows = 6;
constexpr int kMaxSums = 6;

struct Floats { __m256 a, b; };
struct Ints { __m256i a, b; };

inline __m256 load_eight(const float* p) { return _mm256_loadu_ps(p); }
// bfloat16
inline __m256 load_eight(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline __m256 load_eight(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <class Number>
inline Floats load(const Number* p) { return {load_eight(p), load_eight(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a); _mm256_storeu_ps(p + 8, x.b); }
inline Floats broadcast(float x) { __m256 v = _mm256_set1_ps(x); return {v, v}; }
inline Floats broadcast(const float* p) { __m256 v = _mm256_broadcast_ss(p); return {v, v}; }
inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
// x * y + z, rounded once
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
// sums[c * R + r] += a[r * a_stride] * sixteen numbers from p + c * c_stride, eight of them after the other: twelve registers of sums, three
// of a's numbers and one of b's fill all there are.
template <int R, class Number>
inline __attribute__((always_inline)) void add_columns(Floats (&sums)[2 * R], const float* a, int64_t a_stride, const Number* p, int64_t c_stride) {
  __m256 x[R];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) x[r] = _mm256_broadcast_ss(a + r * a_stride);
#pragma GCC unroll 2
  for (int c = 0; c < 2; ++c) {
    const __m256 low = load_eight(p + c * c_stride);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[c * R + r].a = _mm256_fmadd_ps(x[r], low, sums[c * R + r].a);
    const __m256 high = load_eight(p + c * c_stride + 8);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sums[c * R + r].b = _mm256_fmadd_ps(x[r], high, sums[c * R + r].b);
  }
}
inline Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
// Lanes below `count` from x, the others from y.
inline Floats first(int count, Floats x, Floats y) {
  const __m256 n = _mm256_set1_ps(static_cast<float>(count));
  const __m256 low = _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_ps(low, _mm256_set1_ps(8));
  return {_mm256_blendv_ps(y.a, x.a, _mm256_cmp_ps(low, n, _CMP_LT_OQ)), _mm256_blendv_ps(y.b, x.b, _mm256_cmp_ps(high, n, _CMP_LT_OQ))};
}
// Lane i joins lane i + 8, then i + 4, i + 2, i + 1.
inline float sum(Floats x) {
  const __m256 eight = _mm256_add_ps(x.a, x.b);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(Floats x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// To the nearest, ties to even.
inline Ints round(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// 2 to the power of x, -126 ... 127; 0 for -127
inline Floats power_of_two(Ints x) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(x.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(x.b, bias), 23))};
}

inline __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline Floats load_float16(const uint16_t* p) {
  const __m256i x = load_bytes(p);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
// Rounded to bfloat16, ties to even.
inline __m256 to_bfloat16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  return _mm256_castsi256_ps(_mm256_and_si256(rounded, _mm256_set1_epi32(0xFFFF0000)));
}
inline Floats to_bfloat16(Floats x) { return {to_bfloat16(x.a), to_bfloat16(x.b)}; }
// Lanes -128 ... 127 as 16 bytes
inline void store_int8(int8_t* p, Ints x) {
  const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
}

// sum + x, in the register of sum. Written in C++ the compiler (GCC 12) copies each sum once more for every product.
inline __m256i plus_int32(__m256i sum, __m256i x) {
  asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x));
  return sum;
}
inline __m256i plus_int16(__m256i sum, __m256i x) {
  asm("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x));
  return sum;
}

// int8 products without VNNI: weights and activations are widened to 16 bits and multiplied in pairs. Of four inputs 0 1 2 3 the even
// ones (0, 2) make one pair and the odd ones the other, since that is how bytes are widened with two shifts.
using Activation = int16_t;
struct Pairs { __m256i a, b; };
inline void store_activations(Activation* p, Ints x) {
  const __m256i swap = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15, 0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xD8);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_shuffle_epi8(words, swap));
}
inline Pairs load_pairs(const int16_t* p) { return {load_bytes(p), load_bytes(p + 16)}; }
inline void store_pairs(int16_t* p, Pairs x) {
  _mm256_store_si256(reinterpret_cast<__m256i*>(p), x.a);
  _mm256_store_si256(reinterpret_cast<__m256i*>(p + 16), x.b);
}
// Of 16 outputs x 4 inputs
inline Pairs even_pairs(const int8_t* p) {
  return {_mm256_srai_epi16(_mm256_slli_epi16(load_bytes(p), 8), 8), _mm256_srai_epi16(_mm256_slli_epi16(load_bytes(p + 32), 8), 8)};
}
inline Pairs odd_pairs(const int8_t* p) { return {_mm256_srai_epi16(load_bytes(p), 8), _mm256_srai_epi16(load_bytes(p + 32), 8)}; }
inline void add_products(Ints& sum, Pairs w, const Activation* pair) {
  int32_t both;
  std::memcpy(&both, pair, 4);
  const __m256i x = _mm256_set1_epi32(both);
  sum.a = plus_int32(sum.a, _mm256_madd_epi16(w.a, x));
  sum.b = plus_int32(sum.b, _mm256_madd_epi16(w.b, x));
}

// int4 products: within a group, eight times two products of at most 15 * 127 fit 16 bits.
using Nibbles = Pairs;  // 16 outputs x 4 inputs, unsigned bytes
inline Nibbles low_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(load_bytes(p), mask), _mm256_and_si256(load_bytes(p + 32), mask)};
}
inline Nibbles high_nibbles(const uint8_t* p) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(load_bytes(p), 4), mask), _mm256_and_si256(_mm256_srli_epi16(load_bytes(p + 32), 4), mask)};
}
using GroupSums = Ints;
inline void first_products(GroupSums& sum, Nibbles w, const int8_t* four) {
  int32_t all;
  std::memcpy(&all, four, 4);
  const __m256i x = _mm256_set1_epi32(all);
  sum.a = _mm256_maddubs_epi16(w.a, x);
  sum.b = _mm256_maddubs_epi16(w.b, x);
}
inline void add_products(GroupSums& sum, Nibbles w, const int8_t* four) {
  GroupSums more;
  first_products(more, w, four);
  sum.a = plus_int16(sum.a, more.a);
  sum.b = plus_int16(sum.b, more.b);
}
inline Floats to_floats_of_group(GroupSums x) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_cvtepi32_ps(_mm256_madd_epi16(x.a, one)), _mm256_cvtepi32_ps(_mm256_madd_epi16(x.b, one))};
}
