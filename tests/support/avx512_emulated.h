// The AVX-512 intrinsics that the kernels use, each made of two AVX2 halves, so that their AVX-512 code runs where the processor has none.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

struct Wide { __m256i low, high; };
struct WideFloats { __m256 low, high; };

#define SEGUE_EMULATED 1
#define __m512i Wide
#define __m512 WideFloats

#define EACH_HALF_INTS(name) \
  inline Wide emulated_##name(Wide x, Wide y) { return {_mm256_##name(x.low, y.low), _mm256_##name(x.high, y.high)}; }
#define EACH_HALF_FLOATS(name) \
  inline WideFloats emulated_##name(WideFloats x, WideFloats y) { return {_mm256_##name(x.low, y.low), _mm256_##name(x.high, y.high)}; }
#define EACH_HALF_SHIFT(name) \
  inline Wide emulated_##name(Wide x, int count) { return {_mm256_##name(x.low, count), _mm256_##name(x.high, count)}; }

EACH_HALF_INTS(add_epi32)
EACH_HALF_INTS(add_epi16)
EACH_HALF_INTS(madd_epi16)
EACH_HALF_INTS(maddubs_epi16)
EACH_HALF_FLOATS(add_ps)
EACH_HALF_FLOATS(sub_ps)
EACH_HALF_FLOATS(mul_ps)
EACH_HALF_FLOATS(div_ps)
EACH_HALF_FLOATS(max_ps)
EACH_HALF_FLOATS(min_ps)
EACH_HALF_FLOATS(andnot_ps)
EACH_HALF_SHIFT(slli_epi32)
EACH_HALF_SHIFT(slli_epi16)
EACH_HALF_SHIFT(srai_epi16)
EACH_HALF_SHIFT(srli_epi16)
EACH_HALF_SHIFT(srli_epi32)

inline WideFloats emulated_loadu_ps(const void* p) {
  return {_mm256_loadu_ps(static_cast<const float*>(p)), _mm256_loadu_ps(static_cast<const float*>(p) + 8)};
}
inline void emulated_storeu_ps(void* p, WideFloats x) {
  _mm256_storeu_ps(static_cast<float*>(p), x.low);
  _mm256_storeu_ps(static_cast<float*>(p) + 8, x.high);
}
inline Wide emulated_loadu_si512(const void* p) {
  Wide x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline void emulated_storeu_si512(void* p, Wide x) { std::memcpy(p, &x, sizeof x); }
inline WideFloats emulated_set1_ps(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Wide emulated_set1_epi32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Wide emulated_set1_epi16(short x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
inline Wide emulated_set1_epi8(char x) { return {_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }
inline Wide emulated_and_si512(Wide x, Wide y) { return {_mm256_and_si256(x.low, y.low), _mm256_and_si256(x.high, y.high)}; }
inline Wide emulated_or_si512(Wide x, Wide y) { return {_mm256_or_si256(x.low, y.low), _mm256_or_si256(x.high, y.high)}; }
inline WideFloats emulated_fmadd_ps(WideFloats x, WideFloats y, WideFloats z) {
  return {_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)};
}
inline WideFloats emulated_mask_blend_ps(uint16_t mask, WideFloats x, WideFloats y) {
  float lanes[16], others[16];
  emulated_storeu_ps(lanes, x);
  emulated_storeu_ps(others, y);
  for (int i = 0; i < 16; ++i) lanes[i] = mask >> i & 1 ? others[i] : lanes[i];
  return emulated_loadu_ps(lanes);
}
inline __m256 emulated_castps512_ps256(WideFloats x) { return x.low; }
inline __m256 emulated_extractf32x8_ps(WideFloats x, int half) { return half ? x.high : x.low; }
inline Wide emulated_cvtps_epi32(WideFloats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline WideFloats emulated_cvtepi32_ps(Wide x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline WideFloats emulated_castsi512_ps(Wide x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Wide emulated_castps_si512(WideFloats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Wide emulated_cvtepu16_epi32(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline WideFloats emulated_cvtph_ps(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}
inline Wide emulated_cvtepi8_epi32(__m128i x) { return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))}; }
// Truncates each lane.
template <class Narrow, class Register>
inline Register emulated_narrow(Wide x) {
  int32_t lanes[16];
  emulated_storeu_si512(lanes, x);
  Narrow narrow[16];
  for (int i = 0; i < 16; ++i) narrow[i] = static_cast<Narrow>(lanes[i]);
  Register result;
  std::memcpy(&result, narrow, sizeof result);
  return result;
}
inline __m128i emulated_cvtepi32_epi8(Wide x) { return emulated_narrow<int8_t, __m128i>(x); }
inline __m256i emulated_cvtepi32_epi16(Wide x) { return emulated_narrow<int16_t, __m256i>(x); }
inline Wide emulated_dpbusd_epi32(Wide sum, Wide x, Wide y) {
  int32_t sums[16];
  uint8_t left[64];
  int8_t right[64];
  emulated_storeu_si512(sums, sum);
  emulated_storeu_si512(left, x);
  emulated_storeu_si512(right, y);
  for (int i = 0; i < 64; ++i) sums[i / 4] += left[i] * right[i];
  return emulated_loadu_si512(sums);
}
// Pairs of bfloat16: the second of a pair is added first, and denormals are 0 (which the caller sees to).
inline WideFloats emulated_dpbf16_ps(WideFloats sum, Wide x, Wide y) {
  const Wide high = {_mm256_set1_epi32(0xFFFF0000), _mm256_set1_epi32(0xFFFF0000)};
  const auto second = [&](Wide pairs) { return emulated_castsi512_ps(emulated_and_si512(pairs, high)); };
  const auto first = [&](Wide pairs) { return emulated_castsi512_ps(emulated_slli_epi32(pairs, 16)); };
  return emulated_fmadd_ps(first(x), first(y), emulated_fmadd_ps(second(x), second(y), sum));
}
// Rounded to the nearest, ties to even; of numbers.
inline __m256i emulated_cvtneps_pbh(WideFloats x) {
  const Wide bits = emulated_castps_si512(x), odd = emulated_and_si512(emulated_srli_epi32(bits, 16), emulated_set1_epi32(1));
  return emulated_narrow<uint16_t, __m256i>(emulated_srli_epi32(emulated_add_epi32(emulated_add_epi32(bits, emulated_set1_epi32(0x7FFF)), odd), 16));
}

#define _mm512_add_epi32 emulated_add_epi32
#define _mm512_add_epi16 emulated_add_epi16
#define _mm512_madd_epi16 emulated_madd_epi16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_add_ps emulated_add_ps
#define _mm512_sub_ps emulated_sub_ps
#define _mm512_mul_ps emulated_mul_ps
#define _mm512_div_ps emulated_div_ps
#define _mm512_max_ps emulated_max_ps
#define _mm512_min_ps emulated_min_ps
#define _mm512_andnot_ps emulated_andnot_ps
#define _mm512_fmadd_ps emulated_fmadd_ps
#define _mm512_mask_blend_ps emulated_mask_blend_ps
#define _mm512_loadu_ps emulated_loadu_ps
#define _mm512_storeu_ps emulated_storeu_ps
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_set1_ps emulated_set1_ps
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi16 emulated_set1_epi16
#define _mm512_set1_epi8 emulated_set1_epi8
#define _mm512_and_si512 emulated_and_si512
#define _mm512_castps512_ps256 emulated_castps512_ps256
#define _mm512_extractf32x8_ps emulated_extractf32x8_ps
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_castsi512_ps emulated_castsi512_ps
#define _mm512_slli_epi32(x, n) emulated_slli_epi32(x, n)
#define _mm512_slli_epi16(x, n) emulated_slli_epi16(x, n)
#define _mm512_srai_epi16(x, n) emulated_srai_epi16(x, n)
#define _mm512_srli_epi16(x, n) emulated_srli_epi16(x, n)
#define _mm512_cvtepu16_epi32 emulated_cvtepu16_epi32
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi8_epi32 emulated_cvtepi8_epi32
#define _mm512_cvtepi32_epi8 emulated_cvtepi32_epi8
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define _mm512_dpbusd_epi32 emulated_dpbusd_epi32
#define _mm512_or_si512 emulated_or_si512
#define _mm512_castps_si512 emulated_castps_si512
#define _mm512_srli_epi32(x, n) emulated_srli_epi32(x, n)
#define _mm512_dpbf16_ps emulated_dpbf16_ps
#define _mm512_cvtneps_pbh emulated_cvtneps_pbh
